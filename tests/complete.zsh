# What a real zsh offers for each line of standard input: `complete.zsh FOLDER` with FOLDER/_aiosctl. A line in,
# the words out, one each, and an empty line. The zsh that completes has a terminal of its own (zpty(1)).
zmodload zsh/zpty || exit 1
zpty z zsh -f -i
ask() {
    zpty -w z "$1 && echo rea''dy"
    while zpty -r z REPLY; do [[ $REPLY == ready* ]] && return; done
    exit 1
}
ask "PROMPT= RPROMPT= PS2=; stty -echo; unsetopt zle_bracketed_paste beep 2>/dev/null; zle_bracketed_paste=(); fpath=($1 \$fpath)"
ask "autoload -Uz compinit && compinit -u -D"
zpty -w z "source ${(q)0:A:h}/complete-inside.zsh && echo rea''dy"
while zpty -r z REPLY; do [[ $REPLY == ready* ]] && break; done
while IFS= read -r line; do
    zpty -n -w z $'\025'"$line"$'\t'
    while zpty -r z REPLY; do
        [[ $REPLY == *'<word>'* ]] && print -r -- ${${REPLY##*'<word>'}%%[$'\r\n']*}
        [[ $REPLY == *'<end>'* ]] && break
    done
    print
done
