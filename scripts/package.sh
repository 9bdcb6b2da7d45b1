#!/bin/sh
# package.sh DIR: gathers what a machine needs to run Corral into DIR, which can then be moved: bin/ (corral, launch),
# lib/ (libtorch with its CUDA parts, found by the binaries through their run path), configs/. `make package` builds them first
# (profile dist; PROFILE names another). LINK=1: libraries are hard links where the file system allows that.
set -eu
dest=${1:?usage: package.sh DIR}
cd "$(dirname "$0")/.."
profile=${PROFILE:-dist}
bin=${CARGO_TARGET_DIR:-target}/$profile
for b in corral launch; do
    [ -x "$bin/$b" ] || { echo "$bin/$b is missing: run 'make package'" >&2; exit 1; }
done
torch=${LIBTORCH:-.libtorch/torch}
[ -e "$torch/lib/libtorch_cuda.so" ] && [ -d "$torch/../nvidia" ] || {
    echo "$torch is not laid out as 'make setup' does (torch/ and nvidia/ side by side): unset LIBTORCH, run 'make setup'" >&2
    exit 1
}
[ ! -e "$dest" ] || { echo "$dest exists: remove it, or name another folder" >&2; exit 1; }

copy() { # copy FILE FOLDER
    [ -n "${LINK:-}" ] && cp -l "$1" "$2" 2>/dev/null || cp "$1" "$2"
}

partial=$dest.partial
rm -rf "$partial"
trap 'rm -rf "$partial"' EXIT
mkdir -p "$partial/bin" "$partial/lib/torch/lib" "$partial/lib/nvidia/cu13"
cp "$bin/corral" "$bin/launch" "$partial/bin/"
strip "$partial/bin/corral" "$partial/bin/launch"
cp -r configs LICENSE LICENSE-MIT LICENSE-APACHE "$partial/"
# libtorch's libraries look for CUDA's in ../../nvidia/*/lib. Python's binding and static libraries stay behind.
for lib in "$torch"/lib/*.so*; do copy "$lib" "$partial/lib/torch/lib/"; done
rm -f "$partial"/lib/torch/lib/libtorch_python.so "$partial"/lib/torch/lib/libshm*
for lib in "$torch"/../nvidia/*/lib; do
    part=$partial/lib/nvidia/$(basename "$(dirname "$lib")")
    mkdir -p "$part/lib"
    for file in "$lib"/*.so*; do [ ! -e "$file" ] || copy "$file" "$part/lib/"; done
done
# Kernels are compiled at run time, against CUDA's headers.
cp -r "$torch/../nvidia/cu13/include" "$partial/lib/nvidia/cu13/"
mv "$partial" "$dest"
echo "$dest: $(du -sh "$dest" | cut -f1)"
