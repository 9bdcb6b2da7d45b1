#!/bin/sh
# Puts libtorch 2.11.0 into .libtorch/{torch,nvidia}, from PyPI, exactly as pinned in scripts/libtorch.txt.
# Milliseconds when it is there already. LIBTORCH or LIBTORCH_USE_PYTORCH in the environment: nothing is fetched.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

if [ -n "${LIBTORCH_USE_PYTORCH:-}" ]; then
    version=$("$PYTHON" -c 'import torch; print(torch.__version__.split("+")[0])' 2>/dev/null) || version=none
    [ "$version" = 2.11.0 ] || {
        echo "LIBTORCH_USE_PYTORCH is set, but $PYTHON has torch $version; 2.11.0 is needed (or unset it)" >&2
        exit 1
    }
    exit 0
elif [ -n "${LIBTORCH:-}" ]; then
    [ -e "$LIBTORCH/lib/libtorch_cpu.so" ] || {
        echo "LIBTORCH is $LIBTORCH, where there is no lib/libtorch_cpu.so: correct it, or unset it" >&2
        exit 1
    }
    exit 0
fi

requirements=$(sha256sum scripts/libtorch.txt | cut -d' ' -f1)
installed() { [ "$(cat .libtorch/.requirements 2>/dev/null)" = "$requirements" ]; }
installed && exit 0
scripts/doctor.sh libtorch disk

# One installation at a time; whoever waited finds it done.
exec 9>.libtorch.lock
flock -n 9 || { echo "waiting for another setup of libtorch ..." >&2; flock 9; }
installed && exit 0

echo "fetching libtorch 2.11.0 with its CUDA parts from PyPI into .libtorch/ (2.3 GB to download) ..." >&2
started=$(date +%s)
partial=.libtorch.partial
rm -rf "$partial"
trap 'rm -rf "$partial"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
mkdir -p "$partial/tmp"
# torch's wheel is for CPython 3.11, named explicitly, so that any Python can unpack it; the C++ libraries are the same
# in all of torch's wheels (--ignore-requires-python: they are not imported here). Wheels state the oldest platform they run on, and pip wants each such name listed.
platforms=
for p in 2_28 2_27 2_25 2_18 2_17 2014 2_12 2010 2_5 1; do
    case $p in
        *_*) platforms="$platforms --platform manylinux_${p}_x86_64" ;;
        *) platforms="$platforms --platform manylinux${p}_x86_64" ;;
    esac
done
quiet=--quiet
[ ! -t 2 ] || quiet= # progress bars for a person
# shellcheck disable=SC2086 # lists of options
PIP_ROOT_USER_ACTION=ignore TMPDIR=$PWD/$partial/tmp "$PYTHON" -m pip install $quiet --disable-pip-version-check \
    --target "$partial/tree" --no-compile --no-deps --require-hashes --only-binary=:all: \
    --ignore-requires-python --implementation cp --python-version 3.11 --abi cp311 --abi none $platforms -r scripts/libtorch.txt || {
    echo "libtorch could not be fetched; pip's message is above. Try again, or set LIBTORCH to a copy of 2.11.0" >&2
    exit 1
}
for part in torch/lib/libtorch_cpu.so torch/include/torch/extension.h nvidia/cu13/lib/libnvrtc.so.13 \
    nvidia/cu13/include/cuda_runtime.h nvidia/cu13/include/crt nvidia/cu13/include/cccl nvidia/nccl/include/nccl.h; do
    [ -e "$partial/tree/$part" ] || { echo "the fetched libtorch lacks $part" >&2; exit 1; }
done
echo "$requirements" >"$partial/tree/.requirements"
rm -rf .libtorch
mv "$partial/tree" .libtorch
echo "libtorch 2.11.0 is in .libtorch/ ($(du -sh .libtorch | cut -f1), $(($(date +%s) - started)) s)" >&2
