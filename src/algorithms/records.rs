//! What a run tells of the records that it trains on: those that are skipped, files that give no example, answers without an end.

use crate::algorithms::base::RunLength;
use crate::config::sections::OnError;
use crate::data::chat::Chat;
use crate::data::odd::{OddRecords, Reason};
use crate::data::rows::RowLoader;
use crate::distributed::world::World;
use crate::telemetry::MetricsLine;
use crate::warn;

/// Warns of what a run on `train` and `valid` is to be told of before its first step, on rank 0.
pub fn announce(train: &RowLoader, valid: Option<&RowLoader>, chat: &Chat, world: &World) {
    if world.is_main() {
        warnings(train, valid, chat).iter().for_each(|warning| warn!("{warning}"));
    }
}

/// Warns of `odd` records that are skipped, on rank 0.
pub fn announce_skipped(key: &str, odd: &OddRecords, world: &World) {
    if world.is_main()
        && let Some(warning) = skipped(key, odd)
    {
        warn!("{warning}");
    }
}

/// The warnings of [`announce`].
pub fn warnings(train: &RowLoader, valid: Option<&RowLoader>, chat: &Chat) -> Vec<String> {
    let mut warnings: Vec<String> = skipped("data.train", &train.odd()).into_iter().collect();
    warnings.extend(valid.and_then(|valid| skipped("data.valid", &valid.odd())));
    warnings.extend(train.empty_sources().chain(valid.iter().flat_map(|valid| valid.empty_sources())));
    warnings.extend(never_ends(train, chat));
    warnings
}

/// The warning of `odd` records that are skipped, if there are any. `key`: what names their files.
pub fn skipped(key: &str, odd: &OddRecords) -> Option<String> {
    (odd.total() > 0).then(|| format!("{key}: {}", odd.skipped()))
}

/// A model that sees no end of an answer does not learn to stop.
fn never_ends(train: &RowLoader, chat: &Chat) -> Option<String> {
    let counts = train.counts();
    if counts.ends_in_eos > 0 {
        return None;
    }
    let tokens: Vec<String> =
        chat.stop_ids().iter().filter_map(|id| chat.tokenizer().id_to_token(*id)).collect();
    let why = match counts.truncated {
        0 => "the chat template writes none after an answer, or does not count it among the assistant's tokens; set \
              tokenizer.chat_template"
            .to_string(),
        n => format!("{n} of {} are cut at data.sequence_length", counts.examples),
    };
    Some(format!(
        "none of {} training sequences ends in a supervised end of sequence ({}): a model that is trained on them does not \
         learn to stop ({why})",
        counts.sequences,
        if tokens.is_empty() { "the tokenizer has none".into() } else { tokens.join(", ") }
    ))
}

/// What ranked completions are as training data, in a line.
pub fn ranked_line(train: &RowLoader, length: &RunLength) -> String {
    let counts = train.counts();
    format!(
        "{} prompts with {} completions, {} tokens; {} were truncated, {}; {} completions are another's copy; {} steps \
         are {:.2} epochs",
        counts.examples,
        counts.sequences,
        counts.tokens,
        counts.truncated,
        counts.dropped_and_why(),
        counts.duplicates,
        length.steps,
        length.epochs(length.steps),
    )
}

/// Adds the counters of what was cut, left out or skipped of training data.
pub fn counted(record: MetricsLine, train: &RowLoader, on_error: OnError) -> MetricsLine {
    let counts = train.counts();
    let record = record.count("truncated", counts.truncated).count("dropped", counts.dropped());
    count(record, &train.odd(), on_error)
}

/// Adds the counters of skipped records, where records may be skipped.
pub fn count(record: MetricsLine, odd: &OddRecords, on_error: OnError) -> MetricsLine {
    match on_error {
        OnError::Refuse => record,
        OnError::Skip => {
            Reason::TRAINING.into_iter().fold(record.count("skipped_records", odd.total()), |r, reason| {
                r.count(reason.key(), odd.count(reason))
            })
        }
    }
}
