#!/bin/sh
# Checks Corral on a GPU: see gpu_check.py (--pack, --prove, --device cpu, --stage NAME, --part A|B|C, --list).
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
