#!/usr/bin/env python3
"""Seconds a step and peak memory of Corral's training beside TRL's trainers: a table.

    step_times.py sft|dpo|reward|grpo|ppo --data FILE [--model NAME] [--corral BINARY] [--steps 10] [--rounds 3] [--work FOLDER]

Runs of `steps` steps alternate, each in a process of its own; prints medians of all steps but each run's first, and the largest resident
memory. Float32, the same model, number of examples, and for sft, dpo and reward the same examples; LoRA of rank 16 on all linear layers,
but for ppo, whose policy and critic are trained whole: its peer takes no adapters for the critic.

FILE is as for first_steps.py; for grpo and ppo, lines with the messages of a prompt and an answer, 16 responses a step of at most `--new` tokens, rewarded
by their last number in grpo, by a reward model of the same size, whose head is drawn, in ppo. The peers are TRL 1.16 and, for ppo, TRL 1.0.0,
whose unpacked wheel $TRL_PPO names.
"""
import argparse
import json
import os
import pathlib
import re
import resource
import statistics
import subprocess
import sys
import time

import first_steps

RESPONSES = 16
GROUP = 8
ADAM = first_steps.ADAM
LORA = dict(rank=16, alpha=32, dropout=0.0)


def model_of(args):
    return args.work / args.model.strip("/").replace("/", "_")


def questions(args):
    rows = [json.loads(line) for line in open(args.data)]
    return [(row["prompt"], row["answer"].split("####")[-1].strip()) for row in rows]


def ours(args, output):
    """Steps of Corral: their seconds, and the process's peak memory in bytes."""
    if args.algorithm in first_steps.LR:
        rows = first_steps.corral(args, args.work / f"{args.algorithm}.jsonl", output, args.steps, first_steps.LR[args.algorithm])
    else:
        optim = dict(lr=2e-4, weight_decay=0.0, clip=1.0, **ADAM)
        config = dict(output_dir=str(output), data=dict(train=[str(args.data)], sequence_length=96), precision=dict(compute="float32"),
                      generation=dict(max_new_tokens=args.new, temperature=1.0), schedule=dict(kind="constant"),
                      checkpoint=dict(every=args.steps), log=dict(every=1), seed=1)
        if args.algorithm == "grpo":
            config.update(actor=dict(path=args.model, lora=LORA), optim=optim, rewards=[dict(kind="gsm8k", form="flexible")],
                          grpo=dict(group_size=GROUP, loss="dapo", beta=0.0), train=dict(steps=args.steps, batch_size=RESPONSES // GROUP))
        else:
            config.update(actor=dict(path=args.model, optim=optim), critic=dict(path=args.model, optim=optim), reward_model=dict(path=str(args.work / "scorer")),
                          ppo=dict(epochs=1, minibatch_size=RESPONSES, kl_coef=0.05), train=dict(steps=args.steps, batch_size=RESPONSES))
        path = args.work / f"{output.name}.yaml"
        path.write_text(json.dumps(config))
        subprocess.run([args.corral, "-q", args.algorithm, "--config", path, "--resume", "never", "--overwrite"], check=True, stdout=sys.stderr)
        rows = [row for row in map(json.loads, (output / "metrics.jsonl").open()) if row["kind"] == "train"]
    return [row["step_s"] for row in rows], max(row["peak_bytes"] for row in rows)


def peer(args):
    """Steps of TRL's trainer, in a process of its own."""
    if args.algorithm in first_steps.LR:
        from transformers import AutoTokenizer

        pairs = given(args, AutoTokenizer.from_pretrained(model_of(args)))
        rows = [pairs[i][1] for i in first_steps.permutation(len(pairs), 1, "loader.order", 0)]  # in Corral's order
        _, seconds = first_steps.trl(args, rows, model_of(args), args.work / f"{args.algorithm}-start" / "model")
    else:
        seconds = {"grpo": grpo, "ppo": ppo}[args.algorithm](args)
    print(json.dumps(dict(seconds=seconds, peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)), flush=True)
    os._exit(0)


def clock(ends):
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    return Clock()


def common(args):
    return dict(learning_rate=2e-4, adam_beta1=ADAM["betas"][0], adam_beta2=ADAM["betas"][1], adam_epsilon=ADAM["eps"], weight_decay=0.0,
                lr_scheduler_type="constant", max_grad_norm=1.0, gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none",
                save_strategy="no", optim="adamw_torch", disable_tqdm=True, logging_steps=10**6, dataloader_pin_memory=False, seed=1)


def grpo(args):
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    def right(completions, truth, **_):
        numbers = [re.findall(r"-?\d+", turns[-1]["content"]) for turns in completions]
        return [float(bool(found) and found[-1] == wanted) for found, wanted in zip(numbers, truth)]

    ends = []
    config = GRPOConfig(str(args.work / "trl"), per_device_train_batch_size=RESPONSES, num_generations=GROUP, max_completion_length=args.new, beta=0.0,
                        temperature=1.0, loss_type="dapo", max_steps=args.steps, model_init_kwargs=dict(dtype="float32"), **common(args))
    rows = Dataset.from_list([dict(prompt=prompt, truth=truth) for prompt, truth in questions(args)])
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    GRPOTrainer(model=str(model_of(args)), reward_funcs=right, args=config, train_dataset=rows, peft_config=lora, callbacks=[clock(ends)]).train()
    return [b - a for a, b in zip(ends, ends[1:])]


def ppo(args):
    sys.path.insert(0, os.environ["TRL_PPO"])
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model_of(args), padding_side="left", pad_token=args.pad)
    rows = Dataset.from_list([dict(input_ids=tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)) for prompt, _ in questions(args)])
    policy, reference = (AutoModelForCausalLM.from_pretrained(model_of(args), dtype=torch.float32) for _ in range(2))
    scored = dict(num_labels=1, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id)
    scorer = AutoModelForSequenceClassification.from_pretrained(args.work / "scorer", **scored)
    critic = AutoModelForSequenceClassification.from_pretrained(model_of(args), **scored)
    ends = []
    config = PPOConfig(str(args.work / "trl"), per_device_train_batch_size=RESPONSES, gradient_accumulation_steps=1, num_mini_batches=1, num_ppo_epochs=1,
                       response_length=args.new, temperature=1.0, total_episodes=RESPONSES * args.steps, local_rollout_forward_batch_size=RESPONSES,
                       num_sample_generations=0, kl_coef=0.05, stop_token="eos", **common(args))
    PPOTrainer(args=config, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=scorer, value_model=critic, train_dataset=rows,
               eval_dataset=rows.select(range(4)), callbacks=[clock(ends)]).train()
    return [b - a for a, b in zip(ends, ends[1:])]


def given(args, tokenizer):
    """As many examples as a run takes, in the file's order."""
    pairs = [pair for pair, _ in zip(first_steps.examples(args.algorithm, tokenizer, args.data, args.longest), range(args.steps * args.batch))]
    if len(pairs) < args.steps * args.batch:
        sys.exit(f"{args.data}: {len(pairs)} examples of at most {args.longest} tokens; {args.steps * args.batch} are needed")
    return pairs


def prepare(args):
    """The model in Hugging Face's form, and what a run of the algorithm reads."""
    args.work.mkdir(parents=True, exist_ok=True)
    if not model_of(args).exists():
        subprocess.run([args.corral, "-q", "convert", "--from", args.model, "--to", model_of(args), "--format", "hf"], check=True, stdout=sys.stderr)
    if args.algorithm == "ppo" and not (args.work / "scorer").exists():
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        torch.manual_seed(1)
        tokenizer = AutoTokenizer.from_pretrained(model_of(args), pad_token=args.pad)
        scorer = AutoModelForSequenceClassification.from_pretrained(model_of(args), num_labels=1, dtype=torch.float32, pad_token_id=tokenizer.pad_token_id)
        scorer.save_pretrained(args.work / "scorer")
        tokenizer.save_pretrained(args.work / "scorer")
    if args.algorithm in first_steps.LR:
        from transformers import AutoTokenizer

        pairs = given(args, AutoTokenizer.from_pretrained(model_of(args)))
        (args.work / f"{args.algorithm}.jsonl").write_text("".join(json.dumps(record) + "\n" for record, _ in pairs))
        first_steps.corral(args, args.work / f"{args.algorithm}.jsonl", args.work / f"{args.algorithm}-start", 1, 1e-30)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("algorithm", choices=["sft", "dpo", "reward", "grpo", "ppo"])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--pad", default="<empty_output>", help="a token of the vocabulary that no text uses, and that ends none")
    parser.add_argument("--corral", default="target/release/corral")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8, help="examples a step of sft, dpo and reward")
    parser.add_argument("--longest", type=int, default=384)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("runs/step-times"))
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        return peer(args)
    prepare(args)
    times, peaks = {"corral": [], "TRL": []}, {"corral": 0, "TRL": 0}
    theirs = [sys.executable, __file__, *sys.argv[1:], "--peer"]
    for _ in range(args.rounds):
        seconds, peak = ours(args, args.work / f"{args.algorithm}-corral")
        times["corral"] += seconds[1:]
        peaks["corral"] = max(peaks["corral"], peak)
        out = json.loads(subprocess.run(theirs, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])
        times["TRL"] += out["seconds"]
        peaks["TRL"] = max(peaks["TRL"], out["peak"])
    print("algorithm program seconds/step ratio peak")
    for name, values in times.items():
        median = statistics.median(values)
        print(args.algorithm, name, f"{median:.2f} {median / statistics.median(times['corral']):.2f} {peaks[name] / 1e9:.1f}GB", flush=True)


if __name__ == "__main__":
    main()
