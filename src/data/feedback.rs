//! Feedback: completions that were found good or bad, each for itself.

use serde_json::Value;

use super::chat::Chat;
use super::conversation::labelled;
use super::examples::{Encoded, Example};
use super::odd::{Odd, OrOdd, Reason};
use super::preferences::{self, Preference};
use super::readers::Record;
use super::rows::RowLoader;
use crate::config::preferences::PreferenceData;
use crate::error::Result;

/// Ranks of completions in an [`Example`]: good ones are best, all others bad.
pub const DESIRABLE: u32 = 0;
pub const UNDESIRABLE: u32 = 1;

/// A record's completions in tokens, with [`DESIRABLE`] or another rank, or why there are none. Read are a conversation or a
/// prompt with a completion and `label` (true or false), and all that [`Preference::read`] reads: the best completions are good
/// ones, the others bad.
fn read_and_encode(record: &Record, chat: &Chat) -> Result<Example, Odd> {
    read(record)
        .or_odd(Reason::Format)?
        .encode(chat)
        .map_err(|e| e.context(&record.place))
        .or_odd(Reason::Template)
}

fn read(record: &Record) -> Result<Preference> {
    match record.fields.get("label") {
        None | Some(Value::Null) => Preference::read(record).map_err(|e| {
            e.context(
                "no `label` (true: a good completion, false: a bad one), and no ranked completions either",
            )
        }),
        Some(_) => {
            let (prompt, completion, good) = labelled(record)?;
            let unused = prompt.unused.clone();
            let ranks = vec![if good { DESIRABLE } else { UNDESIRABLE }];
            Ok(Preference { ranks, unused, ..Preference::new(prompt, vec![completion]) })
        }
    }
}

/// The feedback of `data.train`, shuffled by `seed`, and of `data.valid`, where there is any; rows are records.
pub fn open(data: &PreferenceData, chat: &Chat, seed: u64) -> Result<(RowLoader, Option<RowLoader>)> {
    preferences::open_as(data, chat, seed, "feedback", &|record| read_and_encode(record, chat), false)
}

/// A prompt with the completion of another: of `example`'s sequence `number` what comes before its first supervised token, and
/// the rest of a sequence of `other`. The completion's end is cut off where both have more than `longest` tokens.
pub fn mismatched(example: &Example, number: usize, other: &Example, longest: usize) -> Encoded {
    let begin = |s: &Encoded| s.supervised.iter().position(|s| *s).unwrap_or(s.ids.len());
    let (of, with) = (&example.sequences[number], &other.sequences[number % other.sequences.len()]);
    let (end, from) = (begin(of), begin(with));
    let ids = of.ids[..end].iter().chain(&with.ids[from..]).take(longest).copied().collect();
    let supervised =
        of.supervised[..end].iter().chain(&with.supervised[from..]).take(longest).copied().collect();
    Encoded { ids, supervised }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(ids: &[u32], prompt: usize) -> Encoded {
        Encoded { ids: ids.to_vec(), supervised: (0..ids.len()).map(|i| i >= prompt).collect() }
    }

    #[test]
    fn another_completion_stands_behind_the_prompt() {
        let one = Example::from(encoded(&[1, 2, 3, 4, 5], 3));
        let other = Example::from(encoded(&[6, 7, 8, 9], 1));
        assert_eq!(mismatched(&one, 0, &other, 10), encoded(&[1, 2, 3, 7, 8, 9], 3));
        assert_eq!(mismatched(&one, 0, &other, 4), encoded(&[1, 2, 3, 7], 3));
        assert_eq!(mismatched(&other, 0, &one, 10), encoded(&[6, 4, 5], 1));
    }
}
