# bash completion for aiosctl(1): put it into /usr/share/bash-completion/completions/aiosctl, or source it.

# The folder of the tree: --mount, $AIOS, /aios, or the user's own mount, as aiosctl finds it.
_aiosctl_root() {
    local i own=${XDG_RUNTIME_DIR:-/tmp/aios-$UID}/aios
    for ((i = 1; i < COMP_CWORD; i++)); do
        if [[ ${COMP_WORDS[i]} == --mount ]]; then
            printf %s "${COMP_WORDS[i + 1]}"
            return
        fi
    done
    if [[ ! -e /aios/version && -d $own ]]; then
        printf %s "${AIOS:-$own}"
    else
        printf %s "${AIOS:-/aios}"
    fi
}

# The options of a command.
_aiosctl_options() {
    case $1 in
        '') echo --mount -v --verbose --version ;;
        ask*) echo -m --model ;;
        'access allow'*) echo --always ;;
        cancel*) echo --user ;;
        'user remove'*) echo --to ;;
        'key new'*) echo --agent --expires --tokens-per-day ;;
        share*) echo --group --with-context ;;
        trace*) echo --plot ;;
        'mcp serve'*) echo --agent ;;
        'engine install'*) echo --cuda --cpu ;;
        'model add'*) echo --name --replace ;;
        pull*) echo --name --link ;;
        show*) echo --json ;;
        rm*) echo --force ;;
    esac
    case $1 in
        status | queue | agents | models | ls | ps | log* | policy* | tools | access | 'agent list' | 'key list') echo --json -q --quiet --no-legend ;;
    esac
    echo -h --help
}

_aiosctl() {
    local root word i words=() current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
    local answers='' files='' asks_model=no
    root=$(_aiosctl_root)
    for ((i = 1; i < COMP_CWORD; i++)); do # the words that are not options
        word=${COMP_WORDS[i]}
        case $word in
            --mount | --name | --agent | --group | --user | --to | --plot | --expires | --tokens-per-day) ((i++)) ;;
            -m | --model) asks_model=yes && ((i++)) ;;
            -*) ;;
            *) words+=("$word") ;;
        esac
    done

    case $previous in
        --mount) files=-d ;;
        --plot) files=-f ;;
        -m | --model) answers=$(command ls "$root/models" 2>/dev/null) ;;
        --agent) answers=$(command ls "$root/agents" 2>/dev/null) ;;
        --name | --tokens-per-day) ;;
        --expires) answers='30d never' ;;
        --group) answers=$(compgen -g) ;;
        --user | --to) answers=$(compgen -u) ;;
        *)
            if [[ $current == -* ]]; then
                answers=$(_aiosctl_options "${words[*]}")
            else
                case "${words[*]}" in
                    '') answers='status queue agents agent models ps pull ls show rm cp run ask log cancel user key share unshare policy tools access audit mcp trace engine model' ;;
                    ask) [[ $asks_model == yes ]] || answers=$(command ls "$root/agents" 2>/dev/null) ;;
                    run) answers=$(command ls "$root/models" 2>/dev/null) ;;
                    log | share | unshare) answers=$(command ls "$root/agents" 2>/dev/null) ;;
                    cancel) answers=$(awk 'NR > 1 { print $1 }' "$root/scheduler/queue" 2>/dev/null) ;;
                    user) answers=remove ;;
                    key) answers='new list revoke' ;;
                    'key revoke'*) answers=$(aiosctl --mount "$root" key list -q 2>/dev/null) ;;
                    'user remove') answers=$(compgen -u) ;;
                    policy) answers=$(cat "$root/scheduler/policies" 2>/dev/null) ;;
                    access) answers='allow deny' ;;
                    'access allow' | 'access deny') answers=$(command ls "$root/access/pending" 2>/dev/null) ;;
                    agent) answers='run check list' ;;
                    'agent run' | 'agent check') files=-d && answers=$(aiosctl agent list -q 2>/dev/null) ;;
                    audit) answers=verify ;;
                    'audit verify'*) files=-f ;;
                    mcp) answers=serve ;;
                    engine) answers='install status remove' ;;
                    model) answers='add load unload remove' ;;
                    pull) files=-f && answers='smollm2 qwen3 llama3.2 gemma3' ;;
                    show | rm* | cp) answers=$(command ls "$root/models" 2>/dev/null) ;;
                    'model add') files=-d ;;
                    'model load' | 'model unload' | 'model remove') answers=$(command ls "$root/models" 2>/dev/null) ;;
                esac
            fi
            ;;
    esac

    if [[ $files ]]; then
        compopt -o filenames 2>/dev/null
    fi
    # shellcheck disable=SC2086 # -d, -f or nothing
    mapfile -t COMPREPLY < <(compgen $files -W "$answers" -- "$current")
}

complete -F _aiosctl aiosctl
