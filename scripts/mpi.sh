#!/bin/sh
# What a build with FEATURES=mpi takes: OpenMPI with its headers, and libclang, which reads them. Installs Debian's packages where they are
# missing and this is root; exit code 1, with one line, where they cannot be had.
set -eu
packages="openmpi-bin libopenmpi-dev libclang-dev"
missing() { # shellcheck disable=SC2086 # a list of packages
    dpkg-query -W -f '${Package} ${db:Status-Status}\n' $packages 2>/dev/null | grep -c ' installed$' | grep -qv '^3$'
}
if command -v mpicc >/dev/null && command -v mpirun >/dev/null && ! command -v dpkg-query >/dev/null; then
    exit 0 # another system, with an MPI of its own
fi
missing || exit 0
if [ "$(id -u)" != 0 ]; then
    echo "for a build with MPI: sudo apt-get install $packages" >&2
    exit 1
fi
echo "installing $packages ..." >&2
# shellcheck disable=SC2086
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends $packages; } >/dev/null 2>&1 || true
if missing; then
    echo "OpenMPI could not be installed (apt-get install $packages): builds and tests go without MPI" >&2
    exit 1
fi
