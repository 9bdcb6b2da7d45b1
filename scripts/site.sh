#!/bin/sh
# Builds docs/ into a searchable site, target/site/ (scripts/site.yml), by mkdocs from PyPI as pinned in scripts/site.txt, in an
# environment of its own in CORRAL_TOOLS (default: ~/.cache/corral/tools).
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
pins=$(sha256sum scripts/site.txt | cut -c1-12)
tools=${CORRAL_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/corral/tools}/site-$pins
if [ ! -e "$tools/ready" ]; then
    scripts/doctor.sh venv
    rm -rf "$tools"
    "$PYTHON" -m venv "$tools"
    "$tools/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r scripts/site.txt
    touch "$tools/ready"
fi
"$tools/bin/mkdocs" build --quiet --strict -f scripts/site.yml
echo "the documentation is in target/site/getting-started.html"
