#!/bin/sh
# docker_check.sh [IMAGE]: runs the image (corral) on the CPU: not as root; two ranks in one container; the same run on two containers that
# are two nodes of a private network, with the same bits; a container that is killed, which the other one names; a container that is
# stopped, which saves. Half a minute; needs docker.
set -eu
image=${1:-corral}
work=$(mktemp -d)
network=corral-check-$$
cleanup() {
    docker rm --force "node0-$$" "node1-$$" "stopped-$$" >/dev/null 2>&1 || true
    docker network rm "$network" >/dev/null 2>&1 || true
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
fail() { echo "docker_check: $1" >&2; exit 1; }
say() { echo "docker_check: $1"; }

mkdir "$work/data" "$work/one" "$work/two"
chmod 777 "$work" "$work"/*
on() { docker run --rm --volume "$work/data:/data" "$@"; }
corral() { on --entrypoint corral "$image" "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; fail "corral $1 failed"; }; }

[ "$(on --entrypoint id "$image" -u)" = 1000 ] || fail "the image does not run as user 1000"
corral data synth --count 500 --output /data
corral tokenizer train --input /data/pretrain.train.jsonl --vocab-size 300 --output /data/bpe
corral tokenize --input /data/pretrain.train.jsonl --tokenizer /data/bpe --output /data/tokens --valid-fraction 0.1
cat >"$work/data/run.yaml" <<'END'
output_dir: runs/tiny
tokenizer: {path: /data/tokens/tokenizer}
model: {init: {hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4}}
data: {train: [/data/tokens/train], valid: [/data/tokens/valid], sequence_length: 64}
train: {steps: 40, batch_size: 8}
checkpoint: {every: 20}
valid: {every: 20, batches: 3}
parallel: {timeout_s: 60}
END

on --ipc host --volume "$work/one:/home/corral/runs" "$image" --nproc 2 pretrain --device cpu --config /data/run.yaml \
    >"$work/log" 2>&1 || { tail -n 5 "$work/log" >&2; fail "a run in one container failed"; }
grep -o '40 steps in.*tokens/s' "$work/log" >"$work/told" || fail "a run in one container does not end after 40 steps"
say "two ranks in one container: $(cat "$work/told")"

await_steps() { # await_steps CONTAINER: until it has some
    tries=0
    until docker logs "$1" 2>&1 | grep -q 'step *[0-9][0-9]*/'; do
        tries=$((tries + 1))
        [ $tries -lt 300 ] || fail "the run in $1 does not get on"
        sleep 0.2
    done
}

docker network create --internal "$network" >/dev/null
node() { # node I OVERRIDES...
    i=$1
    shift
    docker run --detach --name "node$i-$$" --hostname "node$i-$$" --network "$network" --cpus 1 --volume "$work/data:/data" \
        --volume "$work/two:/home/corral/runs" "$image" --nproc 1 --nnodes 2 --node-rank "$i" --rdzv "node0-$$:29500" \
        pretrain --device cpu --config /data/run.yaml "$@" >/dev/null
}
node 1
node 0
[ "$(docker wait "node0-$$" "node1-$$" | tr '\n' ' ')" = "0 0 " ] || { docker logs "node0-$$" >&2; fail "a run on two containers failed"; }
cmp "$work/one/tiny/model/model.safetensors" "$work/two/tiny/model/model.safetensors" || fail "two containers make another model"
say "two containers as two nodes: $(docker logs "node0-$$" 2>&1 | grep -o '40 steps in.*tokens/s'), the same bits"
docker rm "node0-$$" "node1-$$" >/dev/null

node 1 train.steps=4000
node 0 train.steps=4000
await_steps "node0-$$"
docker kill "node1-$$" >/dev/null
[ "$(docker wait "node0-$$")" = 1 ] || fail "a lost node does not end the other with exit code 1"
docker logs "node0-$$" 2>&1 | grep 'missing: rank 1' >"$work/log" || fail "the lost node is not named"
say "a lost node: $(tail -n 1 "$work/log" | sed 's/^ *//')"

docker run --detach --name "stopped-$$" --volume "$work/data:/data" --volume "$work/one:/home/corral/runs" "$image" --nproc 2 \
    pretrain --device cpu --config /data/run.yaml --resume never --overwrite train.steps=100000 >/dev/null
await_steps "stopped-$$"
docker stop --time 60 "stopped-$$" >/dev/null
[ "$(docker wait "stopped-$$")" = 143 ] || fail "docker stop does not end with exit code 143"
docker logs "stopped-$$" 2>&1 | grep -o 'stopped by SIGTERM after step [0-9]*' >"$work/log" || fail "docker stop does not stop after a step"
step=$(sed 's/.* //' "$work/log")
[ -e "$work/one/tiny/checkpoints/step-$(printf %08d "$step")/meta.json" ] || fail "no checkpoint of step $step"
say "docker stop: $(cat "$work/log"), with its checkpoint"
docker image ls --format '{{.Repository}}:{{.Tag}} {{.Size}}' "$image"
docker history --format '{{.Size}}\t{{.CreatedBy}}' "$image" | grep -v '^0B' | cut -c1-90
