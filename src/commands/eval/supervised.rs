//! Loss of the supervised tokens of conversations, in nats a token, and perplexity.

use std::sync::Arc;

use serde_json::json;

use super::Args;
use crate::commands::Global;
use crate::commands::inference::{self, OpenedModel};
use crate::commands::intake::Intake;
use crate::commands::score::{self, Sequence};
use crate::data::fields::Leftovers;
use crate::data::odd::{Odd, OrOdd, Reason};
use crate::data::readers::{self, Record};
use crate::data::supervised;
use crate::error::{Error, Result};

/// Measures the records of `args.input`, each as `corral sft` trains on it, in one piece of at most `most` tokens.
pub(super) fn run(args: &Args, opened: &OpenedModel, most: usize, global: &Global) -> Result<()> {
    let chat = opened.chat(&args.template)?;
    let read = |record: Record| -> Result<(Sequence, Leftovers), Odd> {
        let mut example = supervised::example(&record, &chat, false)?;
        let encoded = example.sequences.remove(0);
        let n = encoded.ids.len();
        if n > most {
            let why = format!("{}: {n} tokens are more than --sequence-length, {most}", record.place);
            return Err(Error::data(why)).or_odd(Reason::TooLong);
        }
        Ok((Sequence::supervised(&encoded), example.leftovers))
    };
    let (mut intake, mut sequences, mut unsupervised) = (Intake::new(args.on_error), Vec::new(), 0u64);
    for path in &args.input {
        for record in readers::records_or_errors(path, None, &Arc::default())? {
            let Some((sequence, Leftovers { unread, unwritten })) = intake.take(record?, read)? else {
                continue;
            };
            intake.note(path, unread.iter().chain(&unwritten));
            match sequence.scored.is_empty() {
                true => unsupervised += 1,
                false => sequences.push(sequence),
            }
        }
    }
    intake.check()?;
    if sequences.is_empty() {
        return Err(Error::data(format!(
            "there is nothing to measure: {}, and {unsupervised} have no turn of the assistant",
            intake.why_nothing()
        )));
    }
    let world = inference::join(global, opened, args.ranks)?;
    intake.warn(&world);
    let mut model = opened.load(&world, args.ranks)?;
    let logprobs = score::score(&mut model, &world, &sequences)?.concat();
    let loss = -logprobs.iter().sum::<f64>() / logprobs.len() as f64;
    if !loss.is_finite() {
        return Err(Error::failed(
            "the loss is not finite: the model's weights may be damaged, or have diverged",
        ));
    }
    let result = json!({
        "task": "perplexity",
        "loss": loss,
        "perplexity": loss.exp(),
        "num_tokens": logprobs.len(),
        "counted": "supervised tokens",
        "sequences": sequences.len(),
        "unsupervised": unsupervised,
        "too_long": intake.too_long(),
        "skipped_records": intake.skipped(),
        "sequence_length": most,
    });
    super::tell(args, &world, &result)
}
