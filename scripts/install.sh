#!/bin/sh
# install.sh: puts Corral where a user's programs lie: a folder as `make package` makes it in PREFIX/share/corral, links in
# PREFIX/bin, completions for bash, zsh and fish, and man pages. PREFIX is ~/.local unless it is set. `make install` builds first.
set -eu
cd "$(dirname "$0")/.."
prefix=${PREFIX:-$HOME/.local}
share=$prefix/share/corral
mkdir -p "$prefix/bin" "$prefix/share"
rm -rf "$share.new"
PROFILE=release LINK=1 scripts/package.sh "$share.new"
rm -rf "$share.old"
[ ! -e "$share" ] || mv "$share" "$share.old"
mv "$share.new" "$share"
rm -rf "$share.old"
for program in corral launch; do ln -sf "$share/bin/$program" "$prefix/bin/$program"; done

corral=$share/bin/corral
put() { # put SHELL FILE
    mkdir -p "$(dirname "$2")"
    "$corral" completions "$1" >"$2"
}
put bash "$prefix/share/bash-completion/completions/corral"
put zsh "$prefix/share/zsh/site-functions/_corral"
put fish "$prefix/share/fish/vendor_completions.d/corral.fish"
"$corral" help --man "$prefix/share/man/man1"

echo "corral and launch are in $prefix/bin"
case ":$PATH:" in
*":$prefix/bin:"*) ;;
*) echo "it is not on the path yet: export PATH=$prefix/bin:\$PATH" ;;
esac
