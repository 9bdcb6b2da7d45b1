#!/bin/sh
# How the memory of a rank falls with the number of ranks when parameters are sharded (mode full): peaks of the largest
# rank in training steps of PRESET, with as many tokens at once on every rank. What a model of hardly any parameters
# takes (program, libraries, communication) is measured too and subtracted.
#   scripts/memory_table.sh [PRESET]     default: llama-42m
set -eu
cd "$(dirname "$0")/.."
bin=${CARGO_TARGET_DIR:-target}/release
preset=${1:-llama-42m}
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

field() { # field NAME: the number of that name in JSON lines
    sed -n "s/.*\"$1\":\([0-9]*\).*/\1/p"
}

"$bin/corral" data synth --count 150 --output "$dir" >"$dir/log"
"$bin/corral" tokenizer train --input "$dir/pretrain.train.jsonl" --vocab-size 300 --output "$dir/bpe" >"$dir/log"
"$bin/corral" tokenize --input "$dir/pretrain.train.jsonl" --tokenizer "$dir/bpe" --output "$dir/tokens" >"$dir/log"
cat >"$dir/tiny.yaml" <<END
output_dir: $dir/run
tokenizer: {path: $dir/bpe}
model: {init: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 1}}
data: {train: [$dir/tokens/train], sequence_length: 64}
train: {steps: 3, batch_size: 4, micro_batch_size: 1}
END

printf '%s, float32, micro-batches of 1 x 64 tokens; MiB of the largest rank\n' "$preset"
printf 'ranks     peak  without model     model  model x ranks\n'
for ranks in 1 2 4; do
    "$bin/launch" --nproc "$ranks" pretrain --device cpu --config "$dir/tiny.yaml" output_dir="$dir/run-$ranks" \
        >"$dir/log" 2>&1 || { cat "$dir/log" && exit 1; }
    base=$(field peak_bytes <"$dir/run-$ranks/metrics.jsonl" | tail -n 1)
    peak=$("$bin/launch" --nproc "$ranks" bench train --device cpu --preset "$preset" --batch-size 4 --micro-batch-size 1 \
        --sequence-length 64 --steps 2 --warmup 1 | field peak_bytes)
    echo "$ranks $peak $base" | awk '{ m = 1048576
        printf "%5d %8.0f %14.0f %9.0f %14.0f\n", $1, $2 / m, $3 / m, ($2 - $3) / m, $1 * ($2 - $3) / m }'
done
