#!/bin/sh
# What needs a GPU: every operation and the golden models on the GPU, a world of one rank over NCCL, a short pretraining,
# benchmarks against PyTorch. Ends with markdown for docs/benchmarks.md.
#
#   gpu_check.sh               runs them; with binaries from gpu-check/ if that is there, else it builds
#   gpu_check.sh --pack        (on any machine with the build) gathers the binaries into gpu-check/, for a machine that has
#                              this folder, a GPU and a Python with torch 2.11 for CUDA 13, but no Rust
#   gpu_check.sh --no-bench    leaves the benchmarks out
# libtorch is that of .libtorch/, of LIBTORCH, or else of $PYTHON's torch (default: python3). The benchmarks of PyTorch run
# in $PYTHON; what it lacks (transformers) is left out and named.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
target=${CARGO_TARGET_DIR:-target}
tests="parity parity_training ops" # golden models; golden training; kernels/tests/ops.rs

pack() {
    make --no-print-directory build
    rm -rf gpu-check
    mkdir gpu-check
    cp "$target/release/corral" "$target/release/launch" gpu-check/
    # Cargo names the test binaries with a hash; its messages tell which.
    cargo test --release --workspace --test parity --test parity_training --test ops --no-run --message-format json | "$PYTHON" -c '
import json, shutil, sys
found = {m["target"]["name"]: m["executable"] for m in map(json.loads, sys.stdin)
         if m["reason"] == "compiler-artifact" and m["executable"] and m["target"]["kind"] == ["test"]}
for name in sys.argv[1:]:
    shutil.copy(found[name], "gpu-check/" + name)' $tests
    strip gpu-check/*
}

bench=yes
case "${1:-}" in
"") ;;
--no-bench) bench=no ;;
--pack)
    pack
    echo "gpu-check/ holds the binaries ($(du -sh gpu-check | cut -f1))"
    exit 0
    ;;
*)
    echo "usage: gpu_check.sh [--pack | --no-bench]" >&2
    exit 2
    ;;
esac

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null || {
    echo "no NVIDIA GPU here (nvidia-smi found none); this check needs one" >&2
    exit 1
}
for binary in corral launch $tests; do
    [ -x gpu-check/$binary ] && continue
    command -v cargo >/dev/null || {
        echo "gpu-check/$binary is missing and there is no cargo here: run scripts/gpu_check.sh --pack where corral is built, and bring gpu-check/ along" >&2
        exit 1
    }
    pack
    break
done
if [ -n "${LIBTORCH:-}" ]; then
    torch=$LIBTORCH
elif [ -e .libtorch/torch/lib/libtorch_cuda.so ]; then
    torch=$PWD/.libtorch/torch
else
    torch=$("$PYTHON" -c 'import torch; assert torch.__version__.startswith("2.11."), "torch is " + torch.__version__
print(torch.__path__[0])') || {
        echo "no libtorch 2.11: neither .libtorch/, LIBTORCH, nor $PYTHON's torch" >&2
        exit 1
    }
fi
# The binaries were built elsewhere: their run path may not lead anywhere here.
export LD_LIBRARY_PATH="$torch/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
out=${OUT:-runs/gpu-check}
mkdir -p "$out"
stage() {
    printf '\n== %s\n' "$*"
    "$@"
}

export CORRAL_GOLDEN="${CORRAL_GOLDEN:-$PWD/tests/golden}"
for binary in $tests; do # one test at a time: they share the GPU
    CORRAL_TEST_DEVICE=cuda stage gpu-check/$binary --test-threads 1
done
stage gpu-check/corral data synth --output "$out/data"
stage gpu-check/corral tokenizer train --input "$out/data/pretrain.train.jsonl" --vocab-size 400 \
    --output "$out/data/tokenizer"
stage gpu-check/corral tokenize --input "$out/data/pretrain.train.jsonl" --tokenizer "$out/data/tokenizer" \
    --output "$out/data/tokens"
stage gpu-check/launch --nproc 1 --backend nccl pretrain --device cuda --config configs/pretrain/default.yaml \
    --resume never --overwrite output_dir="$out/run" precision.compute=bfloat16 train.steps=200 \
    tokenizer.path="$out/data/tokens/tokenizer" data.train="[$out/data/tokens/train]" \
    data.valid="[$out/data/tokens/valid]"
"$PYTHON" - "$out/run/metrics.jsonl" <<'PY'
import json, sys
train = [m for m in map(json.loads, open(sys.argv[1])) if m["kind"] == "train"]
loss = [m["loss"] for m in train]
print(f"loss: {loss[0]:.3f} -> {loss[-1]:.3f} in {len(loss)} steps, {train[-1]['tokens_per_s']:,.0f} tokens/s, "
      f"mfu {train[-1].get('mfu', 'of an unknown GPU')}")
sys.exit(not loss[-1] < 0.6 * loss[0])
PY
stage gpu-check/corral generate --device cuda --model "$out/run/model" --prompt "2+3=" --max-new-tokens 16
[ $bench = yes ] || {
    echo "all checks on the GPU passed; no benchmarks"
    exit 0
}

compare() { # compare NAME ARGUMENTS...: a pipe would hide the exit code
    name=$1
    shift
    stage "$PYTHON" scripts/bench.py --device cuda --corral gpu-check/corral --rounds 3 --steps 20 --warmup 5 \
        --out "$out/$name.jsonl" "$@" >"$out/$name.md"
    cat "$out/$name.md"
}
compare small --presets llama-42m llama-110m --batch 16
compare large --presets llama-1b --batch 4
stage gpu-check/launch --nproc 1 --backend nccl bench collectives --device cuda >"$out/collectives.txt"
cat "$out/collectives.txt"
printf '\n== for docs/benchmarks.md\n\n'
grep -hv '^== ' "$out/small.md" "$out/large.md"
"$PYTHON" - "$out/small.jsonl" "$out/large.jsonl" <<'PY'
import json, statistics, sys
rows = [m for file in sys.argv[1:] for m in map(json.loads, open(file)) if m["impl"] == "corral"]
print("\n| corral, bfloat16 | tokens a step | step, ms | share of the matrix-product rate | mfu |\n| --- | ---: | ---: | ---: | ---: |")
for preset in dict.fromkeys(m["preset"] for m in rows):
    mine = [m for m in rows if m["preset"] == preset]
    middle = lambda key: statistics.median(m[key] for m in mine)
    mfu = "unknown GPU" if mine[0]["mfu"] is None else f"{middle('mfu'):.3f}"
    print(f"| {preset} | {mine[0]['batch_size'] * mine[0]['sequence_length']:,} | {1e3 * middle('step_s'):.1f} "
          f"| {middle('matmul_share'):.3f} | {mfu} |")
PY
echo "all checks on the GPU passed; measurements: $out/*.jsonl"
