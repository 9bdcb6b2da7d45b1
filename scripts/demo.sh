#!/bin/sh
# From nothing to a trained model: libtorch, build, the built-in arithmetic problems, a tokenizer, pretraining on two
# ranks with sharded parameters, and what the model then writes. Everything it makes lies in runs/data and runs/demo.
set -eu
cd "$(dirname "$0")/.."
bin=${CARGO_TARGET_DIR:-target}/release
stages=
total=$(date +%s)
stage() { # stage NAME COMMAND...
    name=$1
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    started=$(date +%s)
    "$@"
    stages="$stages$(printf '  %-10s %4d s' "$name" $(($(date +%s) - started)))
"
}

stage setup make --no-print-directory setup
stage build cargo build --release --workspace
stage data "$bin/corral" data synth --output runs/data
stage tokenizer "$bin/corral" tokenizer train --input runs/data/pretrain.train.jsonl --vocab-size 400 \
    --output runs/data/tokenizer
stage tokenize "$bin/corral" tokenize --input runs/data/pretrain.train.jsonl --tokenizer runs/data/tokenizer \
    --output runs/data/tokens
stage pretrain "$bin/launch" --nproc 2 pretrain --config configs/pretrain/default.yaml \
    --resume never --overwrite output_dir=runs/demo
# Problems whose numbers no training text has combined.
head -n 4 runs/data/prompts.valid.jsonl >runs/demo/prompts.jsonl
stage generate "$bin/corral" generate --model runs/demo/model --input runs/demo/prompts.jsonl --max-new-tokens 64 \
    --temperature 0

printf '\nThe trained model is in runs/demo/model (Hugging Face format), its metrics in runs/demo/metrics.jsonl.\n'
printf 'TensorBoard files: runs/demo/events.out.tfevents.* (tensorboard --logdir runs/demo)\n'
printf 'Wall time of each stage:\n%s  %-10s %4d s\n' "$stages" total $(($(date +%s) - total))
