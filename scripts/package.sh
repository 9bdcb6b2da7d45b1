#!/bin/sh
# package.sh DIR: gathers what a machine needs to run Corral into DIR, which can then be moved: bin/ (corral, launch),
# lib/ (libtorch with its CUDA parts, found by the binaries through their run path), configs/. `make package` builds them first
# (profile dist).
set -eu
dest=${1:?usage: package.sh DIR}
cd "$(dirname "$0")/.."
bin=${CARGO_TARGET_DIR:-target}/dist
for b in corral launch; do
    [ -x "$bin/$b" ] || { echo "$bin/$b is not there: run 'make package'" >&2; exit 1; }
done
torch=${LIBTORCH:-.libtorch/torch}
[ -e "$torch/lib/libtorch_cuda.so" ] && [ -d "$torch/../nvidia" ] || {
    echo "$torch is not laid out as 'make setup' does (torch/ and nvidia/ side by side): unset LIBTORCH, run 'make setup'" >&2
    exit 1
}
[ ! -e "$dest" ] || { echo "$dest exists: remove it, or name another folder" >&2; exit 1; }

partial=$dest.partial
rm -rf "$partial"
trap 'rm -rf "$partial"' EXIT
mkdir -p "$partial/bin" "$partial/lib/torch/lib" "$partial/lib/nvidia/cu13"
cp "$bin/corral" "$bin/launch" "$partial/bin/"
strip "$partial/bin/corral" "$partial/bin/launch"
cp -r configs LICENSE LICENSE-MIT LICENSE-APACHE "$partial/"
# libtorch's libraries look for CUDA's in ../../nvidia/*/lib. Python's binding and static libraries stay behind.
cp "$torch"/lib/*.so* "$partial/lib/torch/lib/"
rm -f "$partial"/lib/torch/lib/libtorch_python.so "$partial"/lib/torch/lib/libshm*
for lib in "$torch"/../nvidia/*/lib; do
    part=$partial/lib/nvidia/$(basename "$(dirname "$lib")")
    mkdir -p "$part/lib"
    find "$lib" -maxdepth 1 -name '*.so*' -exec cp {} "$part/lib/" \;
done
# Kernels are compiled at run time, against CUDA's headers.
cp -r "$torch/../nvidia/cu13/include" "$partial/lib/nvidia/cu13/"
mv "$partial" "$dest"
echo "$dest: $(du -sh "$dest" | cut -f1)"
