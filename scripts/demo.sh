#!/bin/sh
# From nothing to a trained model: libtorch, build, the built-in arithmetic problems, a tokenizer, pretraining on two
# ranks with sharded parameters, fine-tuning, and the model's answers. Everything it makes lies in runs/.
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
stage sft "$bin/launch" --nproc 2 sft --config configs/sft/default.yaml \
    --resume never --overwrite output_dir=runs/demo-sft model.path=runs/demo
# Problems whose numbers no training text has combined.
head -n 4 runs/data/prompts.valid.jsonl >runs/demo-sft/prompts.jsonl
stage answers "$bin/corral" generate --chat --model runs/demo-sft --input runs/demo-sft/prompts.jsonl \
    --max-new-tokens 64 --temperature 0
stage eval "$bin/corral" eval --task gsm8k --model runs/demo-sft --input runs/data/sft.valid.jsonl --limit 1000 --by level \
    --max-new-tokens 64 --batch-size 128 --output runs/demo-sft/eval.json

printf '\nThe pretrained model is in runs/demo/model, the one that answers in runs/demo-sft/model (Hugging Face format); their\n'
printf 'metrics lie beside them in metrics.jsonl, every answer of the evaluation in runs/demo-sft/eval.answers.jsonl.\n'
printf 'TensorBoard files: runs/demo*/events.out.tfevents.* (tensorboard --logdir runs)\n'
printf 'Wall time of each stage:\n%s  %-10s %4d s\n' "$stages" total $(($(date +%s) - total))
