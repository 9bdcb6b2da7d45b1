#!/bin/sh
# Checks that need no build: format, licenses, duplicate crates, sources and advisories of dependencies (deny.toml), unused
# dependencies and files (cargo-shear), spelling (_typos.toml). The tools come from PyPI, as pinned in scripts/lint.txt, into
# CORRAL_TOOLS (default: ~/.cache/corral/tools); a second when they are not there yet.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

pins=$(sha256sum scripts/lint.txt | cut -c1-12)
tools=${CORRAL_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/corral/tools}/lint-$pins
if [ ! -d "$tools" ]; then
    scripts/doctor.sh pip
    partial=$tools.partial.$$
    trap 'rm -rf "$partial"' EXIT
    PIP_ROOT_USER_ACTION=ignore "$PYTHON" -m pip install --quiet --disable-pip-version-check --target "$partial" \
        --no-deps --require-hashes --only-binary=:all: -r scripts/lint.txt || {
        echo "the tools of scripts/lint.txt could not be fetched; pip's message is above" >&2
        exit 1
    }
    # Another run may have been faster.
    mv -T "$partial" "$tools" 2>/dev/null || [ -d "$tools" ]
fi
PATH=$tools/bin:$PATH

failed=
check() { # check COMMAND...: all checks run, even after one has failed
    echo "lint: $*"
    "$@" || failed="$failed
  $*"
}

check cargo fmt --all --check
check cargo-deny --locked check --hide-inclusion-graph licenses bans sources
if timeout 60 cargo-deny --locked fetch db >/dev/null 2>&1; then
    check cargo-deny --locked check --disable-fetch advisories
else
    echo "lint: advisories are left out: the database github.com/RustSec/advisory-db cannot be reached"
fi
check cargo-shear shear --locked
check typos
[ -z "$failed" ] || { printf 'lint failed:%s\n' "$failed" >&2; exit 1; }
