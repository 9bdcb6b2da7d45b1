#!/bin/sh
# docker_bases.sh: makes the two images that the Dockerfile begins with, debian:bookworm-slim and rust:1.95-bookworm, from Debian's
# packages and this machine's Rust, for machines that reach no registry of images. Needs root, debootstrap and docker.
# MIRROR names another mirror of Debian. About two minutes.
set -eu
cd "$(dirname "$0")/.."
mirror=${MIRROR:-http://deb.debian.org/debian}
for tool in debootstrap docker rustc; do
    command -v "$tool" >/dev/null || { echo "$tool is missing: apt-get install debootstrap docker.io; Rust from rustup" >&2; exit 1; }
done
wanted=$(sed -n 's/^FROM rust:\([0-9.]*\)-.*/\1/p' Dockerfile)
toolchain=$(rustc --print sysroot)
case $(rustc --version) in
    "rustc $wanted."*) ;;
    *) echo "the Dockerfile builds with Rust $wanted, but this machine's is: $(rustc --version)" >&2; exit 1 ;;
esac

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

debootstrap --variant=minbase bookworm "$scratch/root" "$mirror" >"$scratch/log" 2>&1 || {
    tail -n 5 "$scratch/log" >&2
    echo "debootstrap failed; MIRROR=URL names another mirror than $mirror" >&2
    exit 1
}
rm -rf "$scratch"/root/var/cache/apt/archives/*.deb "$scratch"/root/var/lib/apt/lists/* \
    "$scratch"/root/usr/share/doc/* "$scratch"/root/usr/share/man/* "$scratch"/root/usr/share/locale/*
tar -C "$scratch/root" -c . | docker import --change 'CMD ["bash"]' - debian:bookworm-slim >/dev/null

# What the official image has: Rust, a C and C++ compiler, git. This machine's certificates come along: where a proxy answers for the
# registries of crates and wheels, they say whom to trust.
mkdir "$scratch/rust"
cp -r "$toolchain/bin" "$toolchain/lib" "$scratch/rust/"
rm -rf "$scratch"/rust/lib/rustlib/src
cp /etc/ssl/certs/ca-certificates.crt "$scratch/"
cat >"$scratch/Dockerfile" <<'END'
FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates build-essential pkg-config git \
    && rm -rf /var/lib/apt/lists/*
COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY rust /usr/local
ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt PIP_CERT=/etc/ssl/certs/ca-certificates.crt \
    CARGO_HTTP_CAINFO=/etc/ssl/certs/ca-certificates.crt
CMD ["bash"]
END
rm -rf "$scratch/root"
docker build --network host --quiet --tag "rust:$wanted-bookworm" "$scratch" >/dev/null
docker image ls --format '{{.Repository}}:{{.Tag}} {{.Size}}' | grep -E "^(debian:bookworm-slim|rust:$wanted-bookworm) "
