#!/bin/sh
# Makes the Python environment .interop/ (scripts/interop.txt) for `make interop` and `make bench`.
# Milliseconds when it is there already. INTEROP=full also builds llama.cpp (llama-cpp-python, minutes).
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
# torch comes from .libtorch/ (or the folder of LIBTORCH) where that holds the whole wheel for this Python; else from PyPI.
suffix=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))') || {
    scripts/doctor.sh venv
    exit 1
}
packages=$PWD/.libtorch
[ -z "${LIBTORCH:-}" ] || packages=$(dirname "$LIBTORCH")
[ -e "$packages/torch/_C$suffix" ] && [ -e "$packages/torch-2.11.0.dist-info" ] || packages=
wanted="$(sha256sum scripts/interop.txt | cut -d' ' -f1) $suffix $packages ${INTEROP:-}"
# An environment that has more than is asked for will do.
[ "$(cat .interop/.requirements 2>/dev/null)" != "${wanted}full" ] || exit 0
[ "$(cat .interop/.requirements 2>/dev/null)" != "$wanted" ] || exit 0

scripts/doctor.sh venv
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "the Python environment of this target needs Python 3.11 or newer ($PYTHON is $("$PYTHON" -V)): set PYTHON" >&2
    exit 1
}
started=$(date +%s)
echo "making the Python environment .interop/ ..." >&2
rm -rf .interop # without .interop/.requirements it is not finished
trap 'exit 130' INT
"$PYTHON" -m venv .interop
.interop/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r scripts/interop.txt
if [ -n "$packages" ]; then
    echo "$packages" >"$(.interop/bin/python -c 'import site; print(site.getsitepackages()[0])')/libtorch.pth"
else
    .interop/bin/python -m pip install --quiet --disable-pip-version-check torch==2.11.0
fi
if [ "${INTEROP:-}" = full ]; then
    echo "building llama.cpp ..." >&2
    CMAKE_ARGS="-DLLAVA_BUILD=OFF" .interop/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
        llama-cpp-python==0.3.36 diskcache==5.6.3
fi
.interop/bin/python -c 'import torch, transformers, tensorboard, sys; sys.exit(torch.__version__.split("+")[0] != "2.11.0")' || {
    echo "the environment in .interop/ does not work; the message is above" >&2
    exit 1
}
echo "$wanted" >.interop/.requirements
echo "the Python environment .interop/ is ready ($(($(date +%s) - started)) s)" >&2
