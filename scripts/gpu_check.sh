#!/bin/sh
# What needs a GPU: parity with golden data on the GPU, a world of one rank over NCCL, a short pretraining, benchmarks.
#
#   gpu_check.sh               runs them; with binaries from gpu-check/ if that is there, else it builds
#   gpu_check.sh --pack        (on any machine with the build) gathers the binaries into gpu-check/, for a machine that has
#                              this folder, a GPU and a Python with torch 2.11, but no Rust
# libtorch is that of .libtorch/, of LIBTORCH, or else of $PYTHON's torch (default: python3).
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
target=${CARGO_TARGET_DIR:-target}

pack() {
    make --no-print-directory build
    parity=$(cargo test --release --test parity --no-run --message-format json |
        "$PYTHON" -c 'import json, sys
print(next(m["executable"] for m in map(json.loads, sys.stdin)
           if m["reason"] == "compiler-artifact" and m["target"]["name"] == "parity" and m["executable"]))')
    mkdir -p gpu-check
    cp "$target/release/corral" "$target/release/launch" gpu-check/
    cp "$parity" gpu-check/parity
    strip gpu-check/*
}
if [ "${1:-}" = --pack ]; then
    pack
    echo "gpu-check/ holds the binaries ($(du -sh gpu-check | cut -f1))"
    exit 0
elif [ $# -gt 0 ]; then
    echo "usage: gpu_check.sh [--pack]" >&2
    exit 2
fi

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null || {
    echo "no NVIDIA GPU here (nvidia-smi found none); this check needs one" >&2
    exit 1
}
[ -x gpu-check/parity ] || pack
if [ -n "${LIBTORCH:-}" ]; then
    torch=$LIBTORCH
elif [ -e .libtorch/torch/lib/libtorch_cuda.so ]; then
    torch=$PWD/.libtorch/torch
else
    torch=$("$PYTHON" -c 'import torch; assert torch.__version__.startswith("2.11."), "torch is " + torch.__version__
print(torch.__path__[0])') || { echo "no libtorch 2.11: neither .libtorch/, LIBTORCH, nor $PYTHON's torch" >&2; exit 1; }
fi
# The binaries were built elsewhere: their run path may not lead anywhere here.
export LD_LIBRARY_PATH="$torch/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
out=${OUT:-runs/gpu-check}
mkdir -p "$out"
stage() {
    printf '\n== %s\n' "$*"
    "$@"
}

CORRAL_GOLDEN=${CORRAL_GOLDEN:-$PWD/tests/golden} CORRAL_TEST_DEVICE=cuda stage gpu-check/parity
stage gpu-check/corral data synth --output "$out/data"
stage gpu-check/corral tokenizer train --input "$out/data/pretrain.train.jsonl" --vocab-size 280 --output "$out/tokenizer"
stage gpu-check/corral tokenize --input "$out/data/pretrain.train.jsonl" --tokenizer "$out/tokenizer" --output "$out/tokens"
stage gpu-check/launch --nproc 1 --backend nccl pretrain --device cuda --config configs/pretrain/default.yaml \
    --resume never --overwrite output_dir="$out/run" precision.compute=bfloat16 train.steps=200 \
    tokenizer.path="$out/tokens/tokenizer" data.train="[$out/tokens/train]" data.valid="[$out/tokens/valid]"
"$PYTHON" - "$out/run/metrics.jsonl" <<'PY'
import json, sys
loss = [m["loss"] for m in map(json.loads, open(sys.argv[1])) if m["kind"] == "train"]
print(f"loss: {loss[0]:.3f} -> {loss[-1]:.3f} in {len(loss)} steps")
sys.exit(not loss[-1] < 0.6 * loss[0])
PY
stage gpu-check/corral generate --device cuda --model "$out/run/model" --prompt "2+3=" --max-new-tokens 16
measure() { # a pipe would hide the exit code
    stage "$@" >"$out/measured.txt"
    cat "$out/measured.txt"
    grep '^{' "$out/measured.txt" >>"$out/bench.jsonl"
}
for preset in llama-42m llama-110m llama-1b; do
    measure gpu-check/corral bench train --device cuda --preset $preset --precision bfloat16 --steps 20 --warmup 5
done
measure gpu-check/launch --nproc 1 --backend nccl bench collectives --device cuda
echo "all checks on the GPU passed; measurements: $out/bench.jsonl"
