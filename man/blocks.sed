# What go-md2man leaves as it is in a block of code: a dot in front would be a macro, and these characters would be
# printed as typographic ones that a shell does not know.
/^\.nf$/,/^\.fi$/ {
    /^\.nf$/b
    /^\.fi$/b
    s/^\./\\\&./
    s/'/\\(aq/g
    s/`/\\(ga/g
    s/\^/\\(ha/g
    s/~/\\(ti/g
}
