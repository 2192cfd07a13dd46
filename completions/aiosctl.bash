# bash completion for aiosctl(1): put it into /usr/share/bash-completion/completions/aiosctl, or source it.

# Where the tree is: --mount, $AIOS, /aios, or the user's own mount, as aiosctl finds it.
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

_aiosctl() {
    local root word i words=() current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
    local answers='' folders=no asks_model=no
    root=$(_aiosctl_root)
    for ((i = 1; i < COMP_CWORD; i++)); do # the words that are no options
        word=${COMP_WORDS[i]}
        case $word in
            --mount | --name | --agent) ((i++)) ;;
            -m | --model) asks_model=yes && ((i++)) ;;
            -*) ;;
            *) words+=("$word") ;;
        esac
    done

    case $previous in
        --mount) folders=yes ;;
        -m | --model) answers=$(command ls "$root/models" 2>/dev/null) ;;
        --name) ;;
        *)
            case "${words[*]}" in
                '') answers='status queue agents agent models ask log cancel policy tools access audit mcp trace model --mount --verbose --version --help' ;;
                ask) [[ $asks_model == yes ]] || answers="-m $(command ls "$root/agents" 2>/dev/null)" ;;
                log) answers=$(command ls "$root/agents" 2>/dev/null) ;;
                cancel) answers=$(awk 'NR > 1 { print $1 }' "$root/scheduler/queue" 2>/dev/null) ;;
                trace) if [[ $previous == --plot ]]; then folders=yes; else answers=--plot; fi ;;
                policy) answers=$(cat "$root/scheduler/policies" 2>/dev/null) ;;
                access) answers='allow deny' ;;
                'access allow' | 'access deny') answers=$(command ls "$root/access/pending" 2>/dev/null) ;;
                agent) answers='run check list' ;;
                'agent run' | 'agent check') folders=yes && answers=$(aiosctl agent list 2>/dev/null | awk '{ print $1 }') ;;
                audit) answers=verify ;;
                mcp) answers=serve ;;
                'mcp serve') if [[ $previous == --agent ]]; then answers=$(command ls "$root/agents" 2>/dev/null); else answers=--agent; fi ;;
                model) answers='add load unload remove' ;;
                'model add') folders=yes ;;
                'model load' | 'model unload' | 'model remove') answers=$(command ls "$root/models" 2>/dev/null) ;;
                'model add '*) answers=--name ;;
            esac
            ;;
    esac

    if [[ $folders == yes ]]; then
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -d -W "$answers" -- "$current")
    else
        mapfile -t COMPREPLY < <(compgen -W "$answers" -- "$current")
    fi
}

complete -F _aiosctl aiosctl
