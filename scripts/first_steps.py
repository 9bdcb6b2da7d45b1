#!/usr/bin/env python3
"""Losses of the first steps of LoRA training, beside TRL's trainers on PEFT's adapters: the same weights, adapters, order of examples.

    first_steps.py sft|dpo|kto|reward --data FILE [--model NAME] [--pad TOKEN] [--corral BINARY] [--steps 20] [--batch 4] [--work FOLDER]

FILE holds GSM8K's records for sft, pairs of HH's dialogues for the others (kto: of one the chosen, of the next the rejected). Needs trl 1.16, peft, transformers, datasets. Prints a line
a step, and ends with exit code 1 where losses differ by more than 1e-4 of their size. Float32, no dropout.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
LR = {"sft": 5e-4, "dpo": 1e-4, "kto": 1e-4, "reward": 1e-4}
ADAM = dict(betas=[0.9, 0.999], eps=1e-8)
BOUND = 1e-4


def mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def permutation(n, seed, purpose, index):
    """src/random.rs: where each of 0..n goes."""
    name = 0xCBF29CE484222325
    for byte in purpose.encode():
        name = (name ^ byte) * 0x100000001B3 & MASK
    state = 0x243F6A8885A308D3
    for part in (seed, name, index):
        state = mix((state + GAMMA & MASK) ^ mix(part + GAMMA & MASK))
    keys = []
    for _ in range(6):
        state = state + GAMMA & MASK
        keys.append(mix(state))
    half = max(1, -(-(n - 1).bit_length() // 2))
    low = (1 << half) - 1

    def network(x):
        left, right = x >> half, x & low
        for key in keys:
            left, right = right, left ^ mix(right + key & MASK) & low
        return left << half | right

    def apply(x):
        x = network(x)
        while x >= n:
            x = network(x)
        return x

    return [apply(i) for i in range(n)]


def dialogue(text):
    """A dialogue of HH as messages."""
    turns = []
    for part in ("\n\n" + text.strip()).split("\n\nHuman:")[1:]:
        human, *answers = part.split("\n\nAssistant:")
        turns.append({"role": "user", "content": human.strip()})
        turns += [{"role": "assistant", "content": answer.strip()} for answer in answers]
    return turns


def tokenized(tokenizer, prompt, answer):
    """Ids of the prompt, and of the answer up to the end of its turn."""
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    text = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": answer}], tokenize=False).rstrip("\n")
    assert text.startswith(before), text
    prompt = tokenizer(before)["input_ids"]
    return prompt, tokenizer(text)["input_ids"][len(prompt):]


def examples(algorithm, tokenizer, path, longest):
    """Yields (record, columns of TRL); those of more than `longest` tokens are left out."""
    good = False
    for line in open(path):
        record = json.loads(line)
        if algorithm == "sft":
            prompt, answer = tokenized(tokenizer, [{"role": "user", "content": record["question"]}], record["answer"])
            columns = dict(input_ids=prompt + answer, labels=[-100] * len(prompt) + answer)
            if len(columns["input_ids"]) <= longest:
                yield record, columns
            continue
        chosen, rejected = dialogue(record["chosen"]), dialogue(record["rejected"])
        fit = chosen[:-1] == rejected[:-1] and chosen[-1] != rejected[-1] and chosen[-1]["content"] and rejected[-1]["content"]
        if not fit or any(a["role"] == b["role"] for a, b in zip(chosen, chosen[1:])):
            continue
        prompt, better = tokenized(tokenizer, chosen[:-1], chosen[-1]["content"])
        _, worse = tokenized(tokenizer, chosen[:-1], rejected[-1]["content"])
        if len(prompt) + max(len(better), len(worse)) > longest:
            continue
        record = dict(prompt=chosen[:-1], chosen=chosen[-1:], rejected=rejected[-1:])
        if algorithm == "kto":
            good = not good
            answer = chosen if good else rejected
            record = dict(prompt=chosen[:-1], completion=answer[-1:], label=good)
            yield record, dict(prompt_ids=prompt, completion_ids=better if good else worse, label=good)
        elif algorithm == "dpo":
            yield record, dict(prompt_ids=prompt, chosen_ids=better, rejected_ids=worse)
        else:
            yield record, dict(chosen_ids=prompt + better, rejected_ids=prompt + worse)


def corral(args, data, output, steps, lr):
    config = dict(output_dir=str(output), model=dict(path=args.model), data=dict(train=[str(data)], sequence_length=args.longest, packing=False),
                  precision=dict(compute="float32"), lora=dict(rank=16, alpha=32, dropout=0.0), optim=dict(lr=lr, weight_decay=0.0, clip=1.0, **ADAM),
                  schedule=dict(kind="constant"), train=dict(steps=steps, batch_size=args.batch, micro_batch_size=args.batch),
                  checkpoint=dict(every=steps), log=dict(every=1), seed=1)
    if args.algorithm == "reward":
        config.update(tokenizer=dict(pad_token=args.pad), reward=dict(loss="pairs", score="last"))
    if args.algorithm == "dpo":
        config.update(dpo=dict(loss="sigmoid", beta=0.1))
    if args.algorithm == "kto":
        config.update(kto=dict(loss="kto", beta=0.1))
    path = args.work / f"{output.name}.yaml"
    path.write_text(json.dumps(config))
    subprocess.run([args.corral, "-q", args.algorithm, "--config", path, "--resume", "never", "--overwrite"], check=True, stdout=sys.stderr)
    return [row for row in map(json.loads, (output / "metrics.jsonl").open()) if "loss" in row]


def trl(args, rows, model, adapter):
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

    losses, ends = [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    if args.algorithm == "sft":
        from trl import SFTConfig as Config, SFTTrainer as Trainer
    elif args.algorithm == "dpo":
        from trl import DPOConfig as Config, DPOTrainer as Trainer
    elif args.algorithm == "kto":
        from trl import KTOConfig as Config, KTOTrainer as Trainer
        # Each prompt with the completion of the row before it in its batch.
        for i, row in enumerate(rows):
            before = i - 1 if i % args.batch else i + args.batch - 1
            row["KL_completion_ids"] = rows[before]["completion_ids"]
    else:
        from trl import RewardConfig as Config, RewardTrainer as Trainer

    class Ordered(Trainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, *inputs, **named):
            out = super().compute_loss(*inputs, **named)
            losses.append((out[0] if isinstance(out, tuple) else out).item())
            return out

    tokenizer = AutoTokenizer.from_pretrained(model, pad_token=args.pad)
    if args.algorithm == "reward":
        base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id)
    else:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    named = dict(beta=0.1) if args.algorithm in ("dpo", "kto") else {}
    config = Config(str(args.work / "trl"), per_device_train_batch_size=args.batch, max_steps=args.steps, max_length=args.longest, weight_decay=0.0,
                    learning_rate=LR[args.algorithm], adam_beta1=ADAM["betas"][0], adam_beta2=ADAM["betas"][1], adam_epsilon=ADAM["eps"], lr_scheduler_type="constant", max_grad_norm=1.0, gradient_checkpointing=False, bf16=False,
                    use_cpu=True, report_to="none", save_strategy="no", optim="adamw_torch", disable_tqdm=True, logging_steps=10**6,
                    dataloader_pin_memory=False, remove_unused_columns=False, **named)
    Ordered(PeftModel.from_pretrained(base, adapter, is_trainable=True), args=config, train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer, callbacks=[Clock()]).train()
    return losses, [b - a for a, b in zip(ends, ends[1:])]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("algorithm", choices=list(LR))
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--pad", default="<empty_output>", help="a token of the vocabulary that no text uses, and that ends none")
    parser.add_argument("--corral", default="target/release/corral")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--longest", type=int, default=384)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/first-steps"))
    args = parser.parse_args()
    from transformers import AutoTokenizer

    model = args.work / args.model.strip("/").replace("/", "_")
    args.work.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        subprocess.run([args.corral, "-q", "convert", "--from", args.model, "--to", model, "--format", "hf"], check=True, stdout=sys.stderr)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if args.pad not in tokenizer.get_vocab():
        sys.exit(f"--pad: {args.pad} is not in the vocabulary of {args.model}")
    n = args.steps * args.batch
    given = [pair for pair, _ in zip(examples(args.algorithm, tokenizer, args.data, args.longest), range(n))]
    if len(given) < n:
        sys.exit(f"{args.data}: {len(given)} examples of at most {args.longest} tokens; {n} are needed")
    data = args.work / f"{args.algorithm}.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record, _ in given))
    # A step that changes nothing: A as it begins, and the head of a reward model.
    corral(args, data, args.work / f"{args.algorithm}-start", 1, 1e-30)
    ours = corral(args, data, args.work / f"{args.algorithm}-corral", args.steps, LR[args.algorithm])
    rows = [given[i][1] for i in permutation(len(given), 1, "loader.order", 0)]
    theirs, seconds = trl(args, rows, model, args.work / f"{args.algorithm}-start" / "model")
    print("step corral peer relative")
    differences = []
    for row, peer in zip(ours, theirs, strict=True):
        differences.append(abs(row["loss"] / peer - 1))
        print(row["step"], f"{row['loss']:.7f} {peer:.7f} {differences[-1]:.1e}")
    tokens_per_s = statistics.median(row["tokens_per_s"] for row in ours)
    print(f"largest difference {max(differences):.1e}; Corral {tokens_per_s:.0f} tokens/s, TRL {statistics.median(seconds or [0]):.2f} s a step (medians)")
    sys.stdout.flush()
    os._exit(not all(d <= BOUND for d in differences))  # some versions wait for threads of their loaders


if __name__ == "__main__":
    main()
