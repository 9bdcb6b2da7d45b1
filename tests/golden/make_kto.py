#!/usr/bin/env python3
"""Generate algo/kto.json and algo/kto_model.safetensors with TRL's KTOTrainer.

    python make_kto.py --seed 1 --out DIR

DIR is a golden root: models/llama2 is read from it. Every loss, metric and gradient comes from TRL's own
KTOTrainer._compute_loss and _compute_kl_logps, run in float64; the formulas below only check it.
Needs what make_golden.py needs: torch transformers tokenizers safetensors trl.
"""
import argparse
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import make_golden as g
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference, KTOTrainer

SETTINGS = [(0.1, 1.0, 1.0), (0.5, 1.0, 1.0), (0.1, 1.33, 0.75)]  # beta, desirable_weight, undesirable_weight
LOSSES = ["kto", "apo_zero_unpaired"]


def trl_loss(model, inputs, loss_type, beta, desirable, undesirable):
    """Loss and metrics of one batch. model(input_ids=.., attention_mask=.., labels=..) returns token log-probs."""
    metrics = {"train": defaultdict(list)}

    def fused(use_cache=None, fused_lm_head=None, **inputs):
        logps = model(**inputs)
        zero = torch.zeros_like(logps)
        return SimpleNamespace(log_probs=logps, entropy=zero, mean_logits=zero)

    trainer = SimpleNamespace(model=SimpleNamespace(training=True), accelerator=g._Acc(), aux_loss_enabled=False,
                              precompute_ref_logps=True, calculate_KL=loss_type == "kto", loss_type=loss_type, beta=beta,
                              desirable_weight=desirable, undesirable_weight=undesirable, _metrics=metrics,
                              _total_train_tokens=0, _tp_size=1)
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)
    loss = KTOTrainer._compute_loss(trainer, fused, inputs, False)
    return loss, {k: v[-1] for k, v in metrics["train"].items()}


def formula(loss_type, beta, desirable, undesirable, labels, ratios, kl_ratios):
    kl = kl_ratios.mean().clamp(min=0) if loss_type == "kto" else g.f64(0.0)
    good = desirable * (1 - torch.sigmoid(beta * (ratios - kl)))
    bad = undesirable * (1 - torch.sigmoid(beta * (kl - ratios)))
    return torch.where(labels, good, bad), kl


def sums_case(batch, loss_type, beta, desirable, undesirable):
    """One case on sums of log-probs: a row is a prompt of one token and a completion of one token."""
    labels, pol, kl_pol = batch["labels"], batch["policy_logps"], batch["kl_policy_logps"]
    pol, kl_pol = pol.clone().requires_grad_(), kl_pol.clone().requires_grad_()
    settings = (loss_type, beta, desirable, undesirable)

    def loss_of(rows):
        n, m = len(rows), len(kl_pol)
        inputs = dict(input_ids=torch.zeros(n, 2, dtype=torch.int64), attention_mask=torch.ones(n, 2, dtype=torch.int64),
                      completion_mask=torch.tensor([[0, 1]] * n), label=labels[rows], ref_logps=batch["ref_logps"][rows])
        if loss_type == "kto":
            inputs.update(KL_input_ids=torch.ones(m, 2, dtype=torch.int64), KL_attention_mask=torch.ones(m, 2, dtype=torch.int64),
                          KL_completion_mask=torch.tensor([[0, 1]] * m), ref_KL_logps=batch["kl_ref_logps"])
        model = lambda input_ids, **_: (kl_pol if input_ids[0, 0] == 1 else pol[rows])[:, None]
        return trl_loss(model, inputs, *settings)

    rows = torch.arange(len(pol))
    loss, metrics = loss_of(rows)
    losses = torch.stack([loss_of(rows[i:i + 1])[0] for i in rows])  # a row alone, with the KL rows of the batch
    grad, kl_grad = torch.autograd.grad(loss, [pol, kl_pol], allow_unused=True)
    assert kl_grad is None, "TRL detaches the KL estimate"

    ratios, kl_ratios = pol - batch["ref_logps"], batch["kl_policy_logps"] - batch["kl_ref_logps"]
    expected, kl = formula(*settings, labels, ratios, kl_ratios)
    assert loss.dtype == torch.float64 and torch.allclose(losses, expected, rtol=0, atol=1e-14)
    assert abs(float((loss - losses.mean()).detach())) < 1e-14 and abs(float(kl) - metrics["kl"]) < 1e-14
    rewards = (beta * ratios).detach()
    names = ["rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"]
    return dict(loss_type=loss_type, beta=beta, desirable_weight=desirable, undesirable_weight=undesirable, loss=loss,
                losses=losses, kl=metrics["kl"], rewards=rewards, grad_wrt_policy_logps=grad,
                grad_wrt_kl_policy_logps=torch.zeros_like(kl_pol), metrics={k: metrics.get(k) for k in names})


def algo_kto(out, seed):
    gen = torch.Generator().manual_seed(seed)
    randn = lambda n: torch.randn(n, generator=gen, dtype=torch.float64)

    def batch(name, labels, ratio, kl):
        """ratio: standard deviation of policy - reference; kl: the mean of the KL rows' log-ratios."""
        n = len(labels)
        pol, kl_pol = -40 + 12 * randn(n), -55 + 12 * randn(n)
        kl_ratios = 3 * randn(n)
        kl_ratios += kl - kl_ratios.mean()
        return dict(name=name, labels=torch.tensor([c == "+" for c in labels]), policy_logps=pol, ref_logps=pol - ratio * randn(n),
                    kl_policy_logps=kl_pol, kl_ref_logps=kl_pol - kl_ratios)

    batches = [batch("mixed_kl_positive", "+--+++-", 4.0, 1.7), batch("mixed_kl_negative", "-++-+", 4.0, -2.3),
               batch("desirable_only", "++++", 4.0, 0.9), batch("undesirable_only", "---", 4.0, 0.6),
               batch("one_desirable_of_two", "-+", 4.0, 3.1), batch("saturated", "+-+-", 300.0, 40.0),
               batch("policy_is_reference", "+-+", 0.0, 0.0)]
    batches[-1]["kl_ref_logps"] = batches[-1]["kl_policy_logps"].clone()
    for b in batches:
        b["cases"] = [sums_case(b, loss, *s) for loss in LOSSES for s in SETTINGS]
    g.dump(out / "algo/kto.json", dict(
        dtype="float64", seed=seed, source="TRL KTOTrainer._compute_loss", batches=batches,
        note="values are per row, in row order; losses carry the weights; apo_zero_unpaired does not read the KL rows",
        formula="r = policy_logps - ref_logps; kl = max(0, mean(kl_policy_logps - kl_ref_logps)), no gradient, 0 for apo_zero_unpaired; "
                "label true: desirable_weight * (1 - sigmoid(beta (r - kl))); false: undesirable_weight * (1 - sigmoid(beta (kl - r))); "
                "loss = mean(losses); rewards = beta r"))


def kto_model(out, seed):
    """KTO through a model: policy = models/llama2 in float64, reference sums given."""
    gen = torch.Generator().manual_seed(seed)
    m64 = g.to_f64(AutoModelForCausalLM.from_pretrained(out / "models/llama2", attn_implementation="sdpa", dtype=torch.float32).eval())
    desirable = [True, False, False, True, True, False]
    prompts = [torch.randint(3, 500, (n,), generator=gen).tolist() for n in (4, 6, 3, 5, 4, 7)]
    answers = [torch.randint(3, 500, (n,), generator=gen).tolist() for n in (9, 5, 8, 3, 6, 7)]
    kl_answers = answers[-1:] + answers[:-1]  # as KTOTrainer._prepare_dataset
    rows = [dict(prompt_ids=p, completion_ids=a, KL_completion_ids=k, label=d) for p, a, k, d in zip(prompts, answers, kl_answers, desirable)]
    inputs = DataCollatorForUnpairedPreference(pad_token_id=2, max_length=13)(rows)  # max_length cuts rows 5 and KL row 1
    assert (inputs["completion_mask"].sum(1) < torch.tensor([len(a) for a in answers])).tolist() == [False] * 5 + [True]
    assert (inputs["KL_completion_mask"].sum(1) < torch.tensor([len(a) for a in kl_answers])).tolist() == [False, True] + [False] * 4

    def model(input_ids, attention_mask, labels):
        logp = torch.log_softmax(m64(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits, -1)[:, :-1]
        return logp.gather(2, input_ids[:, 1:, None])[..., 0] * (labels[:, 1:] != -100)

    def token_logps(prefix):
        ids, mask, answer = (inputs[f"{prefix}{k}"] for k in ("input_ids", "attention_mask", "completion_mask"))
        return model(ids, mask, ids.masked_fill(answer == 0, -100))

    with torch.no_grad():
        tokens, kl_tokens = token_logps(""), token_logps("KL_")
    inputs["ref_logps"] = tokens.sum(1) + 6 * torch.randn(6, generator=gen, dtype=torch.float64)
    inputs["ref_KL_logps"] = kl_tokens.sum(1) - 4 + 3 * torch.randn(6, generator=gen, dtype=torch.float64)
    beta, up, down = 0.1, 1.2, 0.8
    m64.zero_grad(set_to_none=True)
    loss, metrics = trl_loss(model, inputs, "kto", beta, up, down)
    loss.backward()
    ratios, kl_ratios = tokens.sum(1) - inputs["ref_logps"], kl_tokens.sum(1) - inputs["ref_KL_logps"]
    expected, kl = formula("kto", beta, up, down, inputs["label"], ratios, kl_ratios)
    assert abs(float(loss.detach() - expected.mean())) < 1e-14 and kl > 0 and abs(float(kl) - metrics["kl"]) < 1e-14

    t = {k.replace("KL_", "kl_"): v for k, v in inputs.items() if k not in ("label", "ref_KL_logps")}
    t.update(labels=inputs["label"].long(), kl_ref_logps=inputs["ref_KL_logps"], beta=g.f64(beta), desirable_weight=g.f64(up),
             undesirable_weight=g.f64(down), token_logps=tokens, logps=tokens.sum(1), kl_token_logps=kl_tokens,
             kl_logps=kl_tokens.sum(1), kl=kl, losses=expected, loss=loss, rewards=beta * ratios)
    for name, p in m64.named_parameters():
        if "layers" in name or ".norm." in name:  # the two matrices of the vocabulary would double the file
            t["grad." + name] = p.grad
    g.st_save(out / "algo/kto_model.safetensors", t)
    (out / "algo/kto_model.safetensors").chmod(0o644)
    print("kto_model: loss", float(loss.detach()), "kl", float(kl))


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--seed", type=int, required=True)
    ap.add_argument("--out", required=True)
    a = ap.parse_args()
    algo_kto(Path(a.out), a.seed)
    kto_model(Path(a.out), a.seed + 1)


if __name__ == "__main__":
    main()
