#!/bin/sh
# Memory and speed of full fine-tuning, LoRA, and LoRA on weights in int8 and nf4: the same rows of PRESET, each method ROUNDS
# times in turn, medians. The model is new: one step of pretraining makes its folder.
#   scripts/method_table.sh [PRESET [ROUNDS]]     default: llama-110m 3
set -eu
cd "$(dirname "$0")/.."
bin=${CARGO_TARGET_DIR:-target}/release
preset=${1:-llama-110m}
rounds=${2:-3}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

corral() { "$bin/corral" -q --device cpu "$@" >"$dir/log" 2>&1 || { cat "$dir/log" && exit 1; }; }

corral data synth --count 600 --output "$dir"
corral tokenizer train --input "$dir/pretrain.train.jsonl" --vocab-size 400 --output "$dir/bpe"
corral tokenize --input "$dir/pretrain.train.jsonl" --tokenizer "$dir/bpe" --output "$dir/tokens"
cat >"$dir/new.yaml" <<END
output_dir: $dir/new
tokenizer: {path: $dir/bpe}
model: {preset: $preset}
data: {train: [$dir/tokens/train], sequence_length: 32}
train: {steps: 1, batch_size: 1}
END
corral pretrain --config "$dir/new.yaml"
rm -r "$dir/new/checkpoints"
cat >"$dir/sft.yaml" <<END
output_dir: $dir/run
tokenizer: {template: "{prompt}\n{completion}"}
model: {path: $dir/new}
data: {train: [$dir/sft.train.jsonl], sequence_length: 128, cache: $dir/cache}
train: {steps: 3, batch_size: 4}
END

for round in $(seq "$rounds"); do
    for method in full lora int8 nf4; do
        case $method in
        full) lora= ;;
        lora) lora='lora={rank: 16, alpha: 32}' ;;
        *) lora="lora={rank: 16, alpha: 32, base: $method}" ;;
        esac
        rm -rf "$dir/run"
        corral sft --config "$dir/sft.yaml" ${lora:+"$lora"}
        # The peak of the run, and its fastest step after the first.
        sed -n 's/.*"tokens_per_s":\([0-9.]*\).*"peak_bytes":\([0-9]*\).*/\1 \2/p' "$dir/run/metrics.jsonl" |
            awk -v m="$method" 'NR > 1 && $1 > t { t = $1 } $2 > p { p = $2 } END { print m, t, p }' >>"$dir/results"
    done
done

printf '%s, float32, 4 x 128 tokens, rank 16 on every linear layer; medians of %s\n' "$preset" "$rounds"
printf 'method   peak MiB  tokens/s  of full\n'
for method in full lora int8 nf4; do
    median() { awk -v m="$method" -v c="$1" '$1 == m { print $c }' "$dir/results" | sort -n | sed -n "$((rounds / 2 + 1))p"; }
    tokens=$(median 2)
    [ "$method" != full ] || full=$tokens
    echo "$method $(median 3) $tokens $full" | awk '{ printf "%-8s %8.0f %9.0f %8.2f\n", $1, $2 / 1048576, $3, $3 / $4 }'
done
