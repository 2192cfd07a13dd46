# Read by the zsh that complete.zsh asks: each word that a completion offers is printed, and nothing is inserted.
bindkey '^I' complete-word '^U' kill-whole-line
zstyle ':completion:*' insert-tab false
setopt no_always_last_prompt
finish() {
    compstate[insert]= compstate[list]=
    comppostfuncs=(finish) # which a completion empties
    print -r -- '<end>'
}
comppostfuncs=(finish)
compadd() {
    if [[ ${@[1,(i)(-|--)]} == *-(O|A|D)\ * ]]; then # not offered yet
        builtin compadd "$@"
        return
    fi
    local -a offered
    builtin compadd -A offered "$@"
    (( $#offered )) && print -rl -- '<word>'${^offered}
    builtin compadd "$@"
}
