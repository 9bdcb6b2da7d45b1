#!/usr/bin/env python3
"""A step of TRL's DPO, GRPO or PPO, timed: one JSON line on standard output. Called by bench_trl.py, which also makes FOLDER.

    peers_trl.py dpo|grpo|ppo FOLDER [--steps N]     FOLDER holds model/, reward/, pairs.jsonl, prompts.jsonl

`step_s` are the times of the steps after the first two, from the end of one to the end of the next.
"""
import argparse
import json
import os
import pathlib
import resource
import time

WARMUP = 2
COMMON = dict(learning_rate=1e-5, weight_decay=0.0, max_grad_norm=1.0, lr_scheduler_type="constant", optim="adamw_torch_fused", bf16=False,
              fp16=False, use_cpu=True, gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True,
              logging_steps=10**6, seed=1, dataloader_pin_memory=False)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("algorithm", choices=["dpo", "grpo", "ppo"])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback

    disable_progress_bars()
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    def rows(name):
        return Dataset.from_list([json.loads(line) for line in (args.folder / name).open()])

    def policy():
        return LlamaForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")

    def scorer():
        return LlamaForSequenceClassification.from_pretrained(str(args.folder / "reward"), num_labels=1, dtype=torch.float32)

    model, out = str(args.folder / "model"), str(args.folder / "trl")
    tokenizer = AutoTokenizer.from_pretrained(model)
    common = dict(processing_class=tokenizer, callbacks=[Clock()])
    steps = args.steps + WARMUP
    if args.algorithm == "dpo":
        from trl import DPOConfig, DPOTrainer

        config = DPOConfig(out, per_device_train_batch_size=8, max_length=128, beta=0.1, max_steps=steps, **COMMON)
        DPOTrainer(model=policy(), ref_model=policy(), args=config, train_dataset=rows("pairs.jsonl"), **common).train()
    elif args.algorithm == "grpo":
        from trl import GRPOConfig, GRPOTrainer

        def long(completions, **_):
            return [len(text) / 100 for text in completions]

        config = GRPOConfig(out, per_device_train_batch_size=16, num_generations=8, max_completion_length=64, beta=0.04, temperature=1.0,
                            num_iterations=1, steps_per_generation=1, loss_type="dapo", max_steps=steps,
                            model_init_kwargs=dict(dtype="float32", attn_implementation="sdpa"), **COMMON)
        GRPOTrainer(model=model, reward_funcs=long, args=config, train_dataset=rows("prompts.jsonl"), **common).train()
    else:
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        tokenizer.padding_side = "left"
        prompts = rows("prompts.jsonl").map(lambda r: dict(input_ids=tokenizer(r["prompt"])["input_ids"]), remove_columns=["prompt"])
        config = PPOConfig(out, per_device_train_batch_size=16, gradient_accumulation_steps=1, num_mini_batches=1, num_ppo_epochs=2,
                           response_length=64, temperature=1.0, total_episodes=16 * steps, local_rollout_forward_batch_size=16,
                           num_sample_generations=0, kl_coef=0.05, cliprange=0.2, cliprange_value=0.2, gamma=1.0, lam=0.95, **COMMON)
        PPOTrainer(args=config, model=policy(), ref_model=policy(), reward_model=scorer(), value_model=scorer(), train_dataset=prompts,
                   eval_dataset=prompts.select(range(4)), **common).train()
    import trl

    times = [b - a for a, b in zip(ends, ends[1:])][WARMUP - 1:]
    print(json.dumps(dict(trl=trl.__version__, step_s=times, threads=torch.get_num_threads(),
                          peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)), flush=True)
    os._exit(0)  # some versions wait for threads of their loaders


if __name__ == "__main__":
    main()
