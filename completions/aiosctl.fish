# fish completion for aiosctl(1): put it into /usr/share/fish/vendor_completions.d.

# The folder of the tree: --mount, $AIOS, /aios, or the user's own mount, as aiosctl finds it.
function __aiosctl_root
    set -l words (commandline -opc)
    set -l given (contains -i -- --mount $words)
    and test (count $words) -gt $given
    and echo $words[(math $given + 1)]
    and return
    set -l own /tmp/aios-(id -u)/aios
    set -q XDG_RUNTIME_DIR
    and set own $XDG_RUNTIME_DIR/aios
    if set -q AIOS
        echo $AIOS
    else if not test -e /aios/version; and test -d $own
        echo $own
    else
        echo /aios
    end
end

# The words so far that are not options.
function __aiosctl_words
    set -l skip no
    for word in (commandline -opc)[2..]
        if test $skip = yes
            set skip no
        else if contains -- $word --mount --name --agent --group --user --to --plot --expires --tokens-per-day -m --model
            set skip yes
        else if not string match -q -- '-*' $word
            echo $word
        end
    end
end

# Whether the words are exactly these: the next one is to be completed.
function __aiosctl_at
    set -l words (__aiosctl_words)
    test "$words" = "$argv"
end

# Whether the words begin with these: the options of that command.
function __aiosctl_in
    set -l words (__aiosctl_words)
    test "$words[1..$(count $argv)]" = "$argv"
end

function __aiosctl_names
    command ls (__aiosctl_root)/$argv[1] 2>/dev/null
end

function __aiosctl_queue
    awk 'NR > 1 { print $1 }' (__aiosctl_root)/scheduler/queue 2>/dev/null
end

function __aiosctl_keys
    aiosctl --mount (__aiosctl_root) key list -q 2>/dev/null
end

function __aiosctl_packages
    aiosctl agent list -q 2>/dev/null
    __fish_complete_directories (commandline -ct)
end

complete -c aiosctl -f
complete -c aiosctl -s h -l help -d 'print a summary'
complete -c aiosctl -n __aiosctl_at -l mount -x -a '(__fish_complete_directories (commandline -ct))' -d 'the folder of the tree'
complete -c aiosctl -n __aiosctl_at -s v -l verbose -d 'print equivalent shell commands'
complete -c aiosctl -n __aiosctl_at -l version -d 'print the version'

complete -c aiosctl -n __aiosctl_at -a status -d 'the state of the daemon'
complete -c aiosctl -n __aiosctl_at -a queue -d 'the waiting and running requests'
complete -c aiosctl -n __aiosctl_at -a agents -d 'your agents and their state'
complete -c aiosctl -n __aiosctl_at -a agent -d 'packaged agents'
complete -c aiosctl -n __aiosctl_at -a engine -d 'the PyTorch of workers'
complete -c aiosctl -n __aiosctl_at -a models -d 'the models and their state'
complete -c aiosctl -n __aiosctl_at -a pull -d 'get a model'
complete -c aiosctl -n __aiosctl_at -a ls -d 'the models with size, quantisation, state and licence'
complete -c aiosctl -n __aiosctl_at -a show -d 'what is known of a model'
complete -c aiosctl -n __aiosctl_at -a rm -d 'remove models and their files'
complete -c aiosctl -n __aiosctl_at -a cp -d 'give a pulled model another name too'
complete -c aiosctl -n __aiosctl_at -a ps -d 'the loaded models, with size, device, requests and time'
complete -c aiosctl -n __aiosctl_at -a run -d 'talk with a model, or ask it once'
complete -c aiosctl -n __aiosctl_at -a ask -d 'ask an agent, or a model with -m, and print the answer'
complete -c aiosctl -n __aiosctl_at -a log -d "why an agent's requests were refused or failed"
complete -c aiosctl -n __aiosctl_at -a cancel -d 'end unfinished requests'
complete -c aiosctl -n __aiosctl_at -a user -d 'users who go'
complete -c aiosctl -n __aiosctl_at -a key -d 'API keys, by which other programs act as you'
complete -c aiosctl -n __aiosctl_at -a share -d 'let a group use one of your agents'
complete -c aiosctl -n __aiosctl_at -a unshare -d 'take it back'
complete -c aiosctl -n __aiosctl_at -a policy -d 'show or switch the scheduling policy'
complete -c aiosctl -n __aiosctl_at -a tools -d 'the tools that you may call'
complete -c aiosctl -n __aiosctl_at -a access -d 'irreversible calls that wait for your decision'
complete -c aiosctl -n __aiosctl_at -a audit -d 'the audit log'
complete -c aiosctl -n __aiosctl_at -a mcp -d 'serve the tree to an MCP client'
complete -c aiosctl -n __aiosctl_at -a trace -d 'a timeline of the requests, as JSON or as a picture'
complete -c aiosctl -n __aiosctl_at -a model -d 'add, load, unload or remove a model'

for command in status queue agents models ls ps log policy tools access 'agent list' 'key list'
    test $command = access
    and set -l where "__aiosctl_at $command"
    or set -l where "__aiosctl_in $command"
    complete -c aiosctl -n $where -l json -d 'print JSON, with all that is known'
    complete -c aiosctl -n $where -s q -l quiet -d 'print only the first column'
    complete -c aiosctl -n $where -l no-legend -d 'print no titles'
end

complete -c aiosctl -n '__aiosctl_at run' -a '(__aiosctl_names models)'
complete -c aiosctl -n '__aiosctl_in ask' -s m -l model -x -a '(__aiosctl_names models)' -d 'ask this model without an agent'
complete -c aiosctl -n '__aiosctl_at ask; and not __fish_contains_opt -s m model' -a '(__aiosctl_names agents)'
complete -c aiosctl -n '__aiosctl_at log' -a '(__aiosctl_names agents)'
complete -c aiosctl -n '__aiosctl_at cancel' -a '(__aiosctl_queue)'
complete -c aiosctl -n '__aiosctl_in cancel' -l user -x -a '(__fish_complete_users)' -d 'all requests of this user'
complete -c aiosctl -n '__aiosctl_at user' -a remove -d 'cancel the requests of a user and remove his objects'
complete -c aiosctl -n '__aiosctl_at user remove' -a '(__fish_complete_users)'
complete -c aiosctl -n '__aiosctl_in user remove' -l to -x -a '(__fish_complete_users)' -d 'give the objects to this user instead'
complete -c aiosctl -n '__aiosctl_at key' -a new -d 'make a key, and print it this once'
complete -c aiosctl -n '__aiosctl_at key' -a list -d 'your keys; for administrators, those of all users'
complete -c aiosctl -n '__aiosctl_at key' -a revoke -d 'end keys'
complete -c aiosctl -n '__aiosctl_in key new' -l agent -x -a '(__aiosctl_names agents)' -d 'the key may use this agent only'
complete -c aiosctl -n '__aiosctl_in key new' -l expires -x -a '30d never' -d '30d, 12h or a date; default: never'
complete -c aiosctl -n '__aiosctl_in key new' -l tokens-per-day -x -d 'default: no bound of its own'
complete -c aiosctl -n '__aiosctl_in key revoke' -a '(__aiosctl_keys)'
complete -c aiosctl -n '__aiosctl_at share' -a '(__aiosctl_names agents)'
complete -c aiosctl -n '__aiosctl_at unshare' -a '(__aiosctl_names agents)'
complete -c aiosctl -n '__aiosctl_in share' -l group -x -a '(__fish_complete_groups)' -d 'the group that may use it'
complete -c aiosctl -n '__aiosctl_in share' -l with-context -d 'let it continue the conversation too'
complete -c aiosctl -n '__aiosctl_at policy' -a '(cat (__aiosctl_root)/scheduler/policies 2>/dev/null)'
complete -c aiosctl -n '__aiosctl_at access' -a allow -d 'run the call'
complete -c aiosctl -n '__aiosctl_at access' -a deny -d 'end the call as failed'
complete -c aiosctl -n '__aiosctl_at access allow' -a '(__aiosctl_names access/pending)'
complete -c aiosctl -n '__aiosctl_at access deny' -a '(__aiosctl_names access/pending)'
complete -c aiosctl -n '__aiosctl_in access allow' -l always -d 'also all later calls of this tool by this agent'
complete -c aiosctl -n '__aiosctl_at agent' -a run -d 'run an agent as this process'
complete -c aiosctl -n '__aiosctl_at agent' -a check -d 'check an agent.toml'
complete -c aiosctl -n '__aiosctl_at agent' -a list -d 'list packaged agents'
complete -c aiosctl -n '__aiosctl_at agent run' -a '(__aiosctl_packages)'
complete -c aiosctl -n '__aiosctl_at agent check' -a '(__aiosctl_packages)'
complete -c aiosctl -n '__aiosctl_at audit' -a verify -d 'check that no line was changed or removed'
complete -c aiosctl -n '__aiosctl_in audit verify' -F
complete -c aiosctl -n '__aiosctl_at engine' -a install -d 'install a PyTorch other than that of the package'
complete -c aiosctl -n '__aiosctl_at engine' -a status -d 'the PyTorch in use'
complete -c aiosctl -n '__aiosctl_at engine' -a remove -d 'go back to the PyTorch of the package'
complete -c aiosctl -n '__aiosctl_in engine install' -l cuda -d 'for NVIDIA GPUs: some 3 GB'
complete -c aiosctl -n '__aiosctl_in engine install' -l cpu -d 'for processors'
complete -c aiosctl -n '__aiosctl_at mcp' -a serve -d 'your agents, contexts and tools, over standard input and output'
complete -c aiosctl -n '__aiosctl_in mcp serve' -l agent -x -a '(__aiosctl_names agents)' -d 'call tools through this agent'
complete -c aiosctl -n '__aiosctl_in trace' -l plot -r -F -d 'draw the timeline: svg, png or pdf'
complete -c aiosctl -n '__aiosctl_at model' -a add -d 'serve a folder with a model'
complete -c aiosctl -n '__aiosctl_at model' -a load -d 'load a model again'
complete -c aiosctl -n '__aiosctl_at model' -a unload -d 'end the workers of a model'
complete -c aiosctl -n '__aiosctl_at model' -a remove -d 'remove an added model'
complete -c aiosctl -n '__aiosctl_at model add' -a '(__fish_complete_directories (commandline -ct))'
complete -c aiosctl -n '__aiosctl_in model add' -l name -x -d 'a name other than that of the folder'
complete -c aiosctl -n '__aiosctl_in model add' -l replace -d 'replace the model of this name'
for verb in load unload remove
    complete -c aiosctl -n "__aiosctl_at model $verb" -a '(__aiosctl_names models)'
end

complete -c aiosctl -n '__aiosctl_in pull' -l name -x -d 'a name other than that of the source'
complete -c aiosctl -n '__aiosctl_in pull' -l link -d 'serve a folder or file where it is'
complete -c aiosctl -n '__aiosctl_at pull' -a 'smollm2 qwen3 llama3.2 gemma3 (__fish_complete_path (commandline -ct))'
complete -c aiosctl -n '__aiosctl_in show' -l json -d 'print one object, with all that is known'
complete -c aiosctl -n '__aiosctl_at show' -a '(__aiosctl_names models)'
complete -c aiosctl -n '__aiosctl_in rm' -l force -d 'although agents use them'
complete -c aiosctl -n '__aiosctl_in rm' -a '(__aiosctl_names models)'
complete -c aiosctl -n '__aiosctl_at cp' -a '(__aiosctl_names models)'
