#!/bin/sh
# From nothing to a model that was taught by its own answers: libtorch, build, the built-in arithmetic problems, a tokenizer;
# then, on two ranks with sharded parameters, pretraining, fine-tuning, a reward model and PPO. Everything it makes lies in
# runs/.
set -eu
cd "$(dirname "$0")/.."
bin=${CARGO_TARGET_DIR:-target}/release
times=
table=
total=$(date +%s)
stage() { # stage NAME COMMAND...
    name=$1
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    started=$(date +%s)
    "$@"
    seconds=$(($(date +%s) - started))
    times="$times$(printf '  %-12s %4d s' "$name" $seconds)
"
}
row() { # row STAGE METRIC BEFORE AFTER: a row of the table, with the time of the last stage
    table="$table$(printf '  %-12s %-50s %8s %8s %6d s' "$1" "$2" "$3" "$4" "$seconds")
"
}
# A number of the first or last line of metrics of a kind.
metric() { # metric RUN KIND KEY head|tail
    grep "\"kind\":\"$2\"" "$1/metrics.jsonl" | "$4" -n 1 | sed "s/.*\"$3\":\([0-9.eE+-]*\).*/\1/" | cut -c1-6
}
# Right answers of a model to 1,000 (or 500) held-out problems, in per cent.
right() { # right MODEL OUTPUT TEMPERATURE
    "$bin/corral" -q eval --task gsm8k --model "$1" --input runs/data/sft.valid.jsonl --limit $limit --by level \
        --max-new-tokens 64 --batch-size 128 --temperature "$3" --output "$2" |
        sed 's/^{"accuracy":\([0-9.]*\).*/\1/' | awk '{printf "%.1f %%", 100 * $1}'
}
# The share of wrong answers that a reward model puts below the right one, in per cent.
judged() { # judged MODEL
    "$bin/corral" -q eval --task preference --model "$1" --input runs/data/rankings.valid.jsonl --limit $limit |
        sed 's/.*"best":{"accuracy":\([0-9.]*\).*/\1/' | awk '{printf "%.1f %%", 100 * $1}'
}
# SEED=2 make demo: other initial weights and orders, the same data.
new="--resume never --overwrite seed=${SEED:-1}"
stage setup make --no-print-directory setup
stage build cargo build --release
# How fast this machine is; each training then says first how long it will take.
mkdir -p runs
rates() {
    env -u OMP_NUM_THREADS "$bin/corral" --device cpu bench rates >runs/rates.jsonl
}
stage rates rates
# GFLOP/s of a step of a model of this size.
rate() { # rate DTYPE
    sed -n "s/.*\"training\":128,\"compute\":\"$1\",\"gflops\":\([0-9]*\).*/\1/p" runs/rates.jsonl
}
# Only some processors have instructions that make products in bfloat16 the faster ones.
bf16= fastest=$(rate float32)
if [ "$(rate bfloat16)" -gt "$fastest" ]; then
    bf16=precision.compute=bfloat16 fastest=$(rate bfloat16)
fi
printf 'a model of this size trains here at %s GFLOP/s, in %s\n' "$fastest" "${bf16:-float32}"
# A slow machine takes fewer steps: the aim is 14 minutes for all of it on two cores.
less_pretrain= less_sft= less_reward= less_ppo= limit=1000
if [ "$fastest" -lt 100 ]; then
    less_pretrain=train.steps=800 less_sft=train.steps=400 less_reward=train.steps=300 less_ppo=train.steps=20 limit=500
fi
stage data "$bin/corral" data synth --output runs/data
stage noisy "$bin/corral" data synth --output runs/data/noisy --wrong-answers 0.4
stage tokenizer "$bin/corral" tokenizer train --input runs/data/pretrain.train.jsonl --vocab-size 400 \
    --output runs/data/tokenizer
stage tokenize "$bin/corral" tokenize --input runs/data/pretrain.train.jsonl --tokenizer runs/data/tokenizer \
    --output runs/data/tokens

stage pretrain "$bin/launch" --nproc 2 pretrain --config configs/pretrain/default.yaml $new $bf16 $less_pretrain
row pretrain "nats a token, validation" "$(metric runs/pretrain train loss head)" "$(metric runs/pretrain valid loss tail)"

stage sft "$bin/corral" --threads 2 sft --config configs/sft/default.yaml $new $bf16 $less_sft
# Problems whose numbers no training text has combined.
head -n 4 runs/data/prompts.valid.jsonl >runs/sft/prompts.jsonl
"$bin/corral" generate --chat --model runs/sft --input runs/sft/prompts.jsonl --max-new-tokens 64 --temperature 0
row sft "right answers, the most probable ones" - "$(right runs/sft runs/sft/eval.json 0)"

stage reward "$bin/corral" --threads 2 reward --config configs/reward/default.yaml $new $bf16 $less_reward
row reward "wrong answers judged below the right one" "50 %" "$(judged runs/reward)"

# PPO corrects, by what the reward model thinks of its answers, a model whose teacher was wrong in 40 of 100.
stage start "$bin/corral" --threads 2 sft --config configs/sft/noisy.yaml $new $bf16 train.steps=400 checkpoint.every=400
stage ppo "$bin/launch" --nproc 2 ppo --config configs/ppo/reward_model.yaml $new $less_ppo
row ppo "right answers, sampled" "$(right runs/start runs/start/sampled.json 1)" \
    "$(right runs/ppo-reward-model runs/ppo-reward-model/sampled.json 1)"
row ppo "right answers, the most probable ones" "$(right runs/start runs/start/greedy.json 0)" \
    "$(right runs/ppo-reward-model runs/ppo-reward-model/greedy.json 0)"

printf '\nThe models are in runs/*/model (Hugging Face format); their metrics (metrics.jsonl) and curves (report.html) stand beside\n'
printf 'them, every answer of the evaluations in runs/*/*.answers.jsonl.\n\n'
printf '  %-12s %-50s %8s %8s %8s\n%s' stage metric before after time "$table"
printf '\nWall time:\n%s  %-12s %4d s, evaluations included\n' "$times" total $(($(date +%s) - total))
printf '\nNext, each a command:\n'
printf '  %s\n' "$bin/corral runs runs                         # the runs, their state and best value" \
    "$bin/corral report runs/pretrain runs/sft    # their curves over one another, in a page" \
    "$bin/corral chat --model runs/sft            # ask it a sum" \
    "$bin/corral get smollm2-135m-instruct        # a real model; README.md, \"Your own chats\""
