//! Training examples as the model will see them.

use std::io::IsTerminal;

use crate::data::chat::Chat;
use crate::data::examples::{Counts, Encoded, Examples, Lengths};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// Shows training example `number` (from 1) with its supervised tokens marked, the lengths of all, and how they end.
///
/// # Errors
/// Of kind Data: examples that begin with two BOS, or in which nothing is supervised.
///
/// `most`: what longer sequences are cut at, or left out for.
pub fn show(chat: &Chat, sources: &[Examples], number: usize, most: i64) -> Result<()> {
    let tokenizer = chat.tokenizer();
    let mut counts = Counts::default();
    sources.iter().for_each(|s| counts.add(s.counts()));
    let all = || sources.iter().flat_map(|s| (0..s.len()).map(move |i| s.get(i)));
    let total = sources.iter().map(Examples::len).sum::<usize>();
    let Some(shown) = number.checked_sub(1).and_then(|i| all().nth(i)) else {
        return Err(Error::config(format!("--example {number}: there are {total} training examples")));
    };

    println!("\n# example {number} of {total}; {}:", legend());
    for sequence in &shown.sequences {
        println!("{}", marked(tokenizer, sequence)?);
    }
    let bos = tokenizer.bos_id();
    for (i, example) in all().enumerate() {
        for sequence in &example.sequences {
            if bos.is_some()
                && sequence.ids.iter().take(2).all(|id| Some(*id) == bos)
                && sequence.ids.len() > 1
            {
                return Err(Error::data(format!(
                    "example {} begins with two BOS tokens ({}): the chat template writes one, and another comes \
                     before it",
                    i + 1,
                    bos.and_then(|id| tokenizer.id_to_token(id)).unwrap_or_default()
                )));
            }
        }
    }
    if counts.supervised_tokens == 0 {
        return Err(Error::data("no token is supervised: the loss would count nothing"));
    }
    let mut lengths = Lengths::new();
    for (length, count) in sources.iter().flat_map(Examples::lengths) {
        *lengths.entry(*length).or_default() += count;
    }
    histogram(&lengths);
    let longer: u64 = lengths.range(most as usize + 1..).map(|(_, count)| count).sum();
    let all: u64 = lengths.values().sum();
    println!("# {longer} of {all} sequences are longer than data.sequence_length, {most} tokens");
    let share = |n: u64| 100.0 * n as f64 / counts.sequences.max(1) as f64;
    println!(
        "# {} of {} sequences ({:.1} %) end in a supervised end of sequence",
        counts.ends_in_eos,
        counts.sequences,
        share(counts.ends_in_eos)
    );
    println!(
        "# {} tokens, {} of them supervised ({:.1} %); cut: {}, left out as too long: {}, left out with nothing \
         supervised: {}",
        counts.tokens,
        counts.supervised_tokens,
        100.0 * counts.supervised_tokens as f64 / counts.tokens.max(1) as f64,
        counts.truncated,
        counts.too_long,
        counts.unsupervised
    );
    if let Some(pad) = tokenizer.pad_id().filter(|pad| chat.stop_ids().contains(pad)) {
        println!(
            "# the pad token ({}) also ends a sequence; that does no harm here: what is padding is told by lengths, \
             never by token ids",
            tokenizer.id_to_token(pad).unwrap_or_default()
        );
    }
    Ok(())
}

fn legend() -> &'static str {
    match std::io::stdout().is_terminal() {
        true => "what is supervised is green",
        false => "what is supervised stands between ⟦ and ⟧",
    }
}

/// The text of a sequence, with its supervised tokens marked.
fn marked(tokenizer: &Tokenizer, sequence: &Encoded) -> Result<String> {
    let (begin, end) = match std::io::stdout().is_terminal() {
        true => ("\x1b[32m", "\x1b[0m"),
        false => ("⟦", "⟧"),
    };
    let (mut text, mut at) = (String::new(), 0);
    for run in sequence.supervised.chunk_by(|a, b| a == b) {
        let part = tokenizer.decode(&sequence.ids[at..at + run.len()], false)?;
        match run[0] {
            true => text.extend([begin, &part, end]),
            false => text.push_str(&part),
        }
        at += run.len();
    }
    Ok(text)
}

/// Bars of the tool's histograms, and their most characters.
const BARS: usize = 8;
const WIDTH: usize = 40;

/// Prints how lengths are spread.
fn histogram(lengths: &Lengths) {
    let (Some((shortest, _)), Some((longest, _))) = (lengths.first_key_value(), lengths.last_key_value())
    else {
        return;
    };
    let total: u64 = lengths.values().sum();
    let at = |share: f64| {
        let mut rest = ((total - 1) as f64 * share) as u64;
        let found = lengths.iter().find(|(_, count)| {
            let here = rest < **count;
            rest = rest.saturating_sub(**count);
            here
        });
        found.map_or(*longest, |(length, _)| *length)
    };
    println!(
        "# tokens a sequence: {shortest} to {longest}, median {}, 95 % have at most {}",
        at(0.5),
        at(0.95)
    );
    let width = (longest - shortest + 1).div_ceil(BARS);
    let bins: Vec<u64> = (0..BARS)
        .map(|b| {
            let from = shortest + b * width;
            lengths.range(from..from + width).map(|(_, count)| count).sum()
        })
        .collect();
    let most = bins.iter().max().copied().unwrap_or(1).max(1);
    for (b, count) in bins.iter().enumerate().filter(|(b, _)| shortest + b * width <= *longest) {
        let from = shortest + b * width;
        let bar = "#".repeat((count * WIDTH as u64).div_ceil(most) as usize);
        println!("#   {:>6} to {:>6} {count:>9} {bar}", from, (from + width - 1).min(*longest));
    }
}
