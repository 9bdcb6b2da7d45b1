#!/bin/sh
# Whether two commits train alike, to the bit: builds both, and runs scripts/same.py with their binaries.
#
#   scripts/same.sh OLD NEW [--only pretrain-2,ppo-1] [--keep FOLDER]
#
# OLD and NEW are names of commits; NEW may be `.`, the working tree's build of `make build`. Binaries are kept by commit under
# $CORRAL_SAME (default: ~/.cache/corral/same), where both builds share their dependencies. Exit code 1 where a bit differs.
set -eu
[ $# -ge 2 ] || { sed -n '2,/^set/{s/^# \{0,1\}//;/^set/!p}' "$0" >&2; exit 2; }
cd "$(dirname "$0")/.."
root=$PWD
kept=${CORRAL_SAME:-$HOME/.cache/corral/same}

# Builds a commit, unless it was; prints the folder of its binaries.
binaries() {
    if [ "$1" = . ]; then
        echo "$root/target/release"
        return
    fi
    commit=$(git rev-parse --verify "$1^{commit}")
    if [ ! -e "$kept/$commit/launch" ]; then
        echo "building $1 (log: $kept/log)" >&2
        mkdir -p "$kept"
        git worktree prune
        [ -e "$kept/tree" ] || git worktree add --quiet --detach "$kept/tree" "$commit"
        git -C "$kept/tree" checkout --quiet --detach "$commit"
        if [ -z "${LIBTORCH:-}${LIBTORCH_USE_PYTORCH:-}" ]; then
            scripts/setup.sh
            ln -sfn "$root/.libtorch" "$kept/tree/.libtorch"
        fi
        (cd "$kept/tree" && CARGO_TARGET_DIR=$kept/target cargo build --release --locked) >"$kept/log" 2>&1 || {
            tail -n 20 "$kept/log" >&2
            exit 1
        }
        mkdir -p "$kept/$commit"
        cp "$kept/target/release/corral" "$kept/target/release/launch" "$kept/$commit/"
    fi
    echo "$kept/$commit"
}

old=$(binaries "$1")
new=$(binaries "$2")
shift 2
exec python3 scripts/same.py "$old" "$new" "$@"
