//! What the models say about an iteration's responses, and what is written of them.

use kernels::comm::Group;
use tch::{Kind, Tensor};

use super::{PpoExperience, PpoModels, Session};
use crate::algorithms::losses::advantages::explained_variance;
use crate::algorithms::losses::{MaskedMoments, gae, token_rewards, whiten};
use crate::algorithms::rl::checks;
use crate::algorithms::rl::experience::SamplerDistance;
use crate::algorithms::rl::place::at_work;
use crate::algorithms::rl::policy::{describe, share_of};
use crate::algorithms::rl::sampling::{ResponseBatch, Sampled, Sampler};
use crate::config::ppo::{Baseline, KlIn, MissingEos, Ppo};
use crate::distributed::exchange::gather_rows;
use crate::distributed::world::World;
use crate::error::Result;
use crate::telemetry::MetricsLine;

/// What the models say about the responses; scores become rewards, rewards advantages. The record has what is to be told.
pub fn experience(
    c: &Ppo,
    models: &mut PpoModels,
    batch: &ResponseBatch,
    kl_coef: f64,
    step: u64,
    world: &World,
) -> Result<(PpoExperience, MetricsLine)> {
    let (ppo, temperature) = (&c.ppo, c.generation.temperature);
    let (sequences, micro) = (&batch.sequences, c.micro_batch_size(world.mesh.data.size));
    let share = share_of(sequences, micro as usize, world);
    let [logprobs, entropies] = models
        .policy
        .on_device(|policy| share.logprobs_and_entropies(&mut policy.actor.model, temperature))?;
    // Its ranks may have other rows.
    let critics = &models.critic_world;
    let its_share = share_of(sequences, c.micro_batch_size(critics.mesh.data.size) as usize, critics);
    let critic = &mut models.critic.model;
    let values = at_work(critic, c.critic().offload, |critic| its_share.values(critic))?;
    let values = gather_rows(critics, &values.to_kind(logprobs.kind()))?;
    let reference = models.policy.with_reference(|reference| share.logprobs(reference, temperature))?;
    let kind = logprobs.kind();
    let gather = |t: Tensor| gather_rows(world, &t.to_kind(kind));
    let (logprobs, entropies) = (gather(logprobs)?, gather(entropies)?);
    let reference = gather(reference)?;

    // From here on all ranks compute the same.
    let alone = Group::solo();
    let all = batch.sequences.mask(kind);
    let scores = scores(c, batch);
    let rows: Vec<f64> = scores.iter().map(|s| f64::from(s.is_some())).collect();
    let mask = &all * Tensor::from_slice(&rows).to_kind(kind).unsqueeze(1);
    let scores: Vec<f64> = scores.iter().map(|s| s.unwrap_or(0.0)).collect();
    let penalty = match ppo.kl_in {
        KlIn::Reward => ppo.kl_estimator().estimate(&logprobs, &reference),
        KlIn::Loss => logprobs.zeros_like(),
    };
    let mut rewards = token_rewards(&Tensor::from_slice(&scores).to_kind(kind), &penalty, kl_coef, &mask);
    if ppo.whiten_rewards {
        rewards = whiten(&rewards, &mask, true, &alone)?;
    }
    let values = values * &mask;
    let (advantages, returns) = gae(&rewards, &values, &mask, None, ppo.gamma, ppo.lambda);
    let advantages = match ppo.whiten_advantages {
        true => whiten(&advantages, &mask, false, &alone)?,
        false => advantages,
    };

    let distance = (&logprobs - &reference) * &all;
    let kl = distance.sum(Kind::Double).double_value(&[]) / batch.samples.len() as f64;
    if step == 0 && ppo.self_check && models.policy.begins_as_reference {
        let apart = MaskedMoments::of(&distance.abs(), &all, &alone)?.mean;
        checks::kl_is_zero(apart, models.policy.actor.model.params.compute())?;
    }
    let mut apart = SamplerDistance::default();
    apart.add(&batch.sequences, batch.samples.iter().map(|s| &s.response).enumerate(), &logprobs);
    let record = describe(&batch.samples)
        .float("kl", kl)
        .float("entropy", MaskedMoments::of(&entropies, &all, &alone)?.mean)
        .float("explained_variance", explained_variance(&values, &returns, &mask, &alone)?)
        .float("return", MaskedMoments::of(&returns, &mask, &alone)?.mean);
    let record = apart.describe(record);
    let sequences = batch.sequences.clone();
    let experience =
        PpoExperience { sequences, mask, logprobs, reference, values, rewards, advantages, returns };
    Ok((experience, record))
}

/// The score that each response is trained with; none where it is left out.
fn scores(c: &Ppo, batch: &ResponseBatch) -> Vec<Option<f64>> {
    let ppo = &c.ppo;
    let score = |s: &Sampled| {
        let score = s.judgement.reward?;
        let penalty = ppo.missing_eos_penalty;
        Some(match (s.ended(), ppo.missing_eos) {
            (true, _) | (false, MissingEos::Keep) => score,
            (false, MissingEos::Replace) => -penalty,
            (false, MissingEos::Subtract) => score - penalty,
            (false, MissingEos::Mask) => return None,
        })
    };
    let scores: Vec<Option<f64>> = batch.samples.iter().map(score).collect();
    let there: Vec<f64> = scores.iter().flatten().copied().collect();
    let baseline = match ppo.reward_baseline {
        Baseline::Number(x) => x,
        Baseline::Batch => there.iter().sum::<f64>() / there.len().max(1) as f64,
    };
    let clip = ppo.reward_clip.unwrap_or(f64::INFINITY);
    scores.into_iter().map(|s| s.map(|s| (s - baseline).clamp(-clip, clip))).collect()
}

/// The first responses of an iteration, where they are due, into samples.jsonl and TensorBoard, their tokens into trace.jsonl.
/// Collective.
pub fn log_samples(
    c: &Ppo,
    sampler: &Sampler,
    batch: &ResponseBatch,
    e: &PpoExperience,
    session: &mut Session,
) -> Result<()> {
    let (models, run) = (&mut session.models, &mut session.run);
    if c.samples.every == 0 || !run.progress.step.is_multiple_of(c.samples.every) {
        return Ok(());
    }
    let new = c.samples.trace.then(|| models.logprobs(c, e, session.world)).transpose()?;
    let step = run.progress.step + 1;
    let tokenizer = sampler.chat.tokenizer();
    for (i, sample) in batch.samples.iter().take(c.samples.count as usize).enumerate() {
        let (record, text) = sampler.record(sample, step)?;
        run.log_sample(&record, &format!("samples/{i}"), &text);
        let Some(new) = &new else { continue };
        for (position, (place, id)) in e.sequences.range(i).zip(&sample.response.ids).enumerate() {
            let at = |t: &Tensor| t.double_value(&[i as i64, place as i64]);
            run.log_trace(
                &MetricsLine::new("token", step)
                    .count("sample", i as u64)
                    .count("position", position as u64)
                    .text("token", &tokenizer.decode(&[*id as u32], false)?)
                    .count("id", *id as u64)
                    .float("logprob_old", at(&e.logprobs))
                    .float("logprob_new", at(new))
                    .float("logprob_reference", at(&e.reference))
                    .float("kl", at(&e.logprobs) - at(&e.reference))
                    .float("value", at(&e.values))
                    .float("reward", at(&e.rewards))
                    .float("advantage", at(&e.advantages))
                    .float("return", at(&e.returns)),
            );
        }
    }
    Ok(())
}
