//! Reward models at work: sequences of tokens in, scores out.

use kernels::comm::ReduceOp;
use tch::{Device, Kind, Tensor};

use crate::checkpoint::Scoring;
use crate::config::reward::Score;
use crate::data::examples::{Encoded, Example};
use crate::data::loader::IGNORE;
use crate::data::preferences::SequenceBatch;
use crate::distributed::agree::agree;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::model::{Llama, ModelInput, ScoreHead};

/// Tokens that one forward reads at most (one sequence may be longer).
pub const BATCH_TOKENS: usize = 8192;

/// Which tokens' values are a sequence's score, [S, N]: the scores are its product with the values. The dtype and the
/// device are those of the values.
pub fn pooling(batch: &SequenceBatch, score: Score, kind: Kind, device: Device) -> Tensor {
    let (sequences, n) = (batch.num_sequences(), batch.sequence.len());
    let mut weights = vec![0f32; sequences * n];
    match score {
        Score::Last => {
            for (i, last) in batch.last.iter().enumerate() {
                weights[i * n + *last as usize] = 1.0;
            }
        }
        Score::Sum | Score::Mean => {
            // A label is the next token where that is the completion's; a sequence's last one has none.
            for at in (1..n).filter(|at| batch.rows.labels[at - 1] != IGNORE) {
                weights[batch.sequence[at] as usize * n + at] = 1.0;
            }
        }
    }
    let weights = Tensor::from_slice(&weights).view([sequences as i64, n as i64]).to_kind(kind);
    let weights = match score {
        Score::Mean => &weights / weights.sum_dim_intlist([1].as_slice(), true, kind).clamp_min(1.0),
        Score::Last | Score::Sum => weights,
    };
    weights.to_device(device)
}

/// The batch as a model reads it.
pub fn input(batch: &SequenceBatch) -> ModelInput {
    let rows = &batch.rows;
    let mut input = ModelInput::new(Tensor::from_slice(&rows.input_ids).view([-1, rows.columns as i64]));
    // Rows of one sequence each begin at position 0.
    if batch.num_sequences() > rows.rows {
        input.positions = Some(Tensor::from_slice(&rows.positions));
        input.start = Some(Tensor::from_slice(&rows.starts));
    }
    input
}

/// The scores of the sequences, before normalisation, in their order. A sequence's `supervised` tokens are its completion's,
/// which sum and mean ask for. Each rank gives its own sequences, any number of them; collective where the parameters are
/// gathered from other ranks.
///
/// # Errors
/// A sequence without tokens, or, for sum and mean, without a completion; scores that are not finite.
pub fn scores(model: &mut Llama, score: Score, sequences: &[Encoded]) -> Result<Vec<f64>> {
    let mut checked = check(score, sequences);
    if model.params.gathers() {
        // A rank must not leave the others alone in the forwards.
        checked = agree(model.params.shard_group(), checked);
    }
    checked?;
    let mut batches: Vec<&[Encoded]> = Vec::new();
    let mut rest = sequences;
    while !rest.is_empty() {
        let mut tokens = 0;
        let fits = |s: &&Encoded| {
            tokens += s.ids.len();
            tokens <= BATCH_TOKENS
        };
        let (batch, later) = rest.split_at(rest.iter().take_while(fits).count().max(1));
        batches.push(batch);
        rest = later;
    }
    let mut rounds = batches.len();
    if model.params.gathers() {
        rounds = model.params.shard_group().combine(&[rounds as f64], ReduceOp::Max)?[0] as usize;
    }
    let mut all = Vec::with_capacity(sequences.len());
    for round in 0..rounds {
        let Some(batch) = batches.get(round) else {
            let hidden = model.hidden(&ModelInput::new(Tensor::from_slice(&[0i64]).view([1, 1])))?;
            let _ = ScoreHead::values(model, &hidden)?;
            continue;
        };
        let example =
            Example { sequences: batch.to_vec(), ranks: vec![0; batch.len()], leftovers: Default::default() };
        let batch = SequenceBatch::new(&[example], true);
        let hidden = model.hidden(&input(&batch))?;
        let values = ScoreHead::values(model, &hidden)?;
        let scores = pooling(&batch, score, values.kind(), values.device()).f_mv(&values)?;
        all.extend(Vec::<f64>::try_from(scores.to_device(Device::Cpu).to_kind(Kind::Double))?);
    }
    match all.iter().all(|x| x.is_finite()) {
        true => Ok(all),
        false => Err(Error::failed("a score is not finite: the reward model is damaged, or has diverged")),
    }
}

fn check(score: Score, sequences: &[Encoded]) -> Result<()> {
    let needs = score != Score::Last;
    for (i, sequence) in sequences.iter().enumerate() {
        if sequence.ids.is_empty() || (needs && !sequence.supervised.iter().skip(1).any(|s| *s)) {
            let what = if needs { "no completion after a prompt" } else { "no tokens" };
            return Err(Error::data(format!("sequence {} has {what}: there is nothing to score", i + 1)));
        }
    }
    Ok(())
}

/// The rewards of the sequences: their [`scores`], normalised as the model says.
pub fn rewards(model: &mut Llama, scoring: &Scoring, sequences: &[Encoded]) -> Result<Vec<f64>> {
    let scores = scores(model, scoring.score, sequences)?;
    Ok(scores.into_iter().map(|score| scoring.reward(score)).collect())
}

/// [`scores`] of sequences that all ranks know, which divide the work. Collective.
pub fn scores_of_all(
    model: &mut Llama,
    world: &World,
    score: Score,
    sequences: &[Encoded],
) -> Result<Vec<f64>> {
    let mine = world.mesh.data.share(sequences.len());
    let mut all = vec![0.0; sequences.len()];
    let scored = agree(&world.group, scores(model, score, &sequences[mine.clone()]))?;
    all[mine].copy_from_slice(&scored);
    world.sum_rows(&all)
}
