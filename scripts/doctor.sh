#!/bin/sh
# Names every missing prerequisite in one line, with the package that brings it (Debian and Ubuntu).
# doctor.sh [libtorch] [cargo] [lint] [pip] [venv] [disk]: checks these parts; without arguments: libtorch cargo disk.
set -u
cd "$(dirname "$0")/.." || exit 1
PYTHON=${PYTHON:-python3}
[ $# -gt 0 ] || set -- libtorch cargo disk
missing=0

need() { # need WHAT HOW-TO-GET-IT
    echo "missing: $1: $2" >&2
    missing=1
}
has() { command -v "$1" >/dev/null 2>&1; }
at_least() { # at_least HAVE WANT: dotted versions
    [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]
}
own_libtorch() { [ -n "${LIBTORCH:-}" ] || [ -n "${LIBTORCH_USE_PYTORCH:-}" ]; }

python_and() { # python_and MODULE PACKAGE
    if ! has "$PYTHON"; then
        need "$PYTHON (3.9 or newer)" "sudo apt install python3 $2"
    elif ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 9))'; then
        need "Python 3.9 or newer ($PYTHON is $("$PYTHON" -V 2>&1))" "set PYTHON=/path/to/a/newer/python3"
    elif ! "$PYTHON" -c "import $1" 2>/dev/null; then
        need "Python's $1" "sudo apt install $2"
    fi
}

check_libtorch() {
    own_libtorch && return
    [ "$(uname -s)/$(uname -m)" = Linux/x86_64 ] || need "Linux on x86_64 (this is $(uname -s) on $(uname -m))" \
        "build libtorch 2.11.0 for this machine and set LIBTORCH to its folder"
    glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d' ' -f2)
    at_least "${glibc:-0}" 2.28 || need "glibc 2.28 or newer (found ${glibc:-none})" \
        "Debian 10, Ubuntu 20.04 or newer"
    check_pip
    has flock || need flock "sudo apt install util-linux"
}

check_cargo() {
    want=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    rustup="install Rust from https://rustup.rs (Debian's own cargo is too old)"
    has cargo || need "cargo (Rust $want or newer)" "$rustup"
    if has rustc; then
        have=$(rustc --version | cut -d' ' -f2)
        at_least "$have" "$want" || need "Rust $want or newer (found $have)" "rustup update stable"
    else
        need "rustc (Rust $want or newer)" "$rustup"
    fi
    has "${CXX:-c++}" || need "a C++ compiler (${CXX:-c++})" "sudo apt install g++"
    has "${CC:-cc}" || need "a C compiler (${CC:-cc})" "sudo apt install gcc"
}

check_lint() {
    cargo fmt --version >/dev/null 2>&1 || need rustfmt "rustup component add rustfmt"
    cargo clippy --version >/dev/null 2>&1 || need clippy "rustup component add clippy"
}

check_pip() { python_and pip python3-pip; }

# The virtual environment of `make interop` needs ensurepip, which Debian leaves out of python3.
check_venv() { python_and ensurepip python3-venv; }

check_disk() {
    gb=0
    own_libtorch || [ -e .libtorch/.requirements ] || gb=8 # 3.9 GB stay; while pip works, the wheels lie beside them
    [ -d "${CARGO_TARGET_DIR:-target}/release" ] || gb=$((gb + 4))
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge "$gb" ] || need "disk space: $gb GB for libtorch and the build, $free GB free in $(pwd)" \
        "free some, or clone onto a larger disk"
}

for part in "$@"; do
    case $part in
        libtorch | cargo | lint | pip | venv | disk) "check_$part" ;;
        *) echo "doctor.sh: unknown part '$part': libtorch, cargo, lint, pip, venv or disk" >&2; exit 2 ;;
    esac
done
exit $missing
