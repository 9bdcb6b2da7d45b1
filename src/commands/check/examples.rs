//! Training examples as the model will see them.

use std::io::IsTerminal;
use std::ops::Range;

use crate::data::chat::Chat;
use crate::data::examples::{Encoded, Example, Examples, Lengths};
use crate::data::loader::Loader;
use crate::data::prompts::Prompts;
use crate::data::rows::RowLoader;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// Shows training example `number` (from 1) with its supervised tokens marked, the lengths of all, and how they end. `most`:
/// what longer sequences are cut at, or left out for.
///
/// # Errors
/// Of kind Data: examples that begin with two BOS, or in which nothing is supervised.
pub fn show(chat: &Chat, data: &RowLoader, number: usize, most: i64) -> Result<()> {
    let tokenizer = chat.tokenizer();
    let all = || data.sources().iter().flat_map(|s| (0..s.len()).map(move |i| s.get(i)));
    let total = data.sources().iter().map(Examples::len).sum::<usize>();
    let Some(shown) = number.checked_sub(1).and_then(|i| all().nth(i)) else {
        return Err(Error::config(format!("--example {number}: there are {total} training examples")));
    };
    println!("\n# example {number} of {total}; {}:", legend());
    match shown.sequences.as_slice() {
        [only] => println!("{}", marked(tokenizer, only)?),
        _ => completions(tokenizer, &shown)?,
    }
    all().enumerate().try_for_each(|(i, example)| one_bos(tokenizer, i + 1, &example))?;
    if data.counts().supervised_tokens == 0 {
        return Err(Error::data("no token is supervised: the loss would be empty"));
    }
    quality(chat, data, most);
    Ok(())
}

/// A prompt once, and its completions, best first.
fn completions(tokenizer: &Tokenizer, example: &Example) -> Result<()> {
    let first = &example.sequences[0];
    let common = |s: &Encoded| s.ids.iter().zip(&first.ids).take_while(|(a, b)| a == b).count();
    let before = |s: &Encoded| s.supervised.iter().position(|s| *s).unwrap_or(s.ids.len());
    let prompt = example.sequences.iter().map(|s| common(s).min(before(s))).min().unwrap_or(0);
    let part = |s: &Encoded, range: Range<usize>| Encoded {
        ids: s.ids[range.clone()].to_vec(),
        supervised: s.supervised[range].to_vec(),
    };
    whole_lines(&marked(tokenizer, &part(first, 0..prompt))?);
    for (i, (sequence, rank)) in example.sequences.iter().zip(&example.ranks).enumerate() {
        match (example.ranks.as_slice(), rank) {
            ([0, 1], 0) => println!("# chosen:"),
            ([0, 1], _) => println!("# rejected:"),
            (all, rank) => {
                println!("# completion {} of {}, rank {} (1 is the best):", i + 1, all.len(), rank + 1)
            }
        }
        whole_lines(&marked(tokenizer, &part(sequence, prompt..sequence.ids.len()))?);
    }
    Ok(())
}

/// Prints a text that ends with a line break in any case.
fn whole_lines(text: &str) {
    match text.ends_with('\n') {
        true => print!("{text}"),
        false => println!("{text}"),
    }
}

/// Shows prompt `number` (from 1) as the model gets it, and the answer that rewards compare with.
pub fn prompt(chat: &Chat, prompts: &Prompts, number: usize) -> Result<()> {
    let Some(shown) = number.checked_sub(1).and_then(|i| prompts.iter().nth(i)) else {
        return Err(Error::config(format!("--example {number}: there are {} prompts", prompts.len())));
    };
    let ids: Vec<u32> = shown.ids.iter().map(|id| *id as u32).collect();
    println!("\n# prompt {number} of {}, as the model gets it ({} tokens):", prompts.len(), ids.len());
    whole_lines(&chat.tokenizer().decode(&ids, false)?);
    match &shown.reference {
        Some(answer) => {
            println!("# the answer that rewards compare with:");
            answer.lines().for_each(|line| println!("  {line}"));
        }
        None => println!("# the record has no answer that rewards could compare with"),
    }
    let mut lengths = Lengths::new();
    prompts.iter().for_each(|p| *lengths.entry(p.ids.len()).or_default() += 1);
    histogram("prompt", &lengths);
    let without = prompts.iter().filter(|p| p.reference.is_none()).count();
    println!(
        "# {} prompts, {without} of them without an answer; left out as too long: {}, skipped: {}",
        prompts.len(),
        prompts.dropped,
        prompts.odd.total()
    );
    Ok(())
}

/// Shows window `number` (from 1) of token shards, in their order.
pub fn window(tokenizer: &Tokenizer, data: &Loader, number: usize) -> Result<()> {
    let total = data.num_windows();
    let Some(index) = (number as u64).checked_sub(1).filter(|i| *i < total) else {
        return Err(Error::config(format!("--example {number}: there are {total} windows of training data")));
    };
    let ids: Vec<u32> = data.sample(index)?.into_iter().filter_map(|id| u32::try_from(id).ok()).collect();
    println!("\n# window {number} of {total}, in the order of the run:");
    whole_lines(&tokenizer.decode(&ids, false)?);
    Ok(())
}

fn one_bos(tokenizer: &Tokenizer, number: usize, example: &Example) -> Result<()> {
    let bos = tokenizer.bos_id();
    let twice = |s: &&Encoded| s.ids.len() > 1 && s.ids[..2].iter().all(|id| Some(*id) == bos);
    match bos.is_some() && example.sequences.iter().any(|s| twice(&s)) {
        false => Ok(()),
        true => Err(Error::data(format!(
            "example {number} begins with two BOS tokens ({}): the chat template writes one, and another comes before it",
            bos.and_then(|id| tokenizer.id_to_token(id)).unwrap_or_default()
        ))),
    }
}

/// Tells lengths and ends of all sequences, and what was cut or left out.
fn quality(chat: &Chat, data: &RowLoader, most: i64) {
    let (counts, odd) = (data.counts(), data.odd());
    let mut lengths = Lengths::new();
    for (length, count) in data.sources().iter().flat_map(Examples::lengths) {
        *lengths.entry(*length).or_default() += count;
    }
    histogram("sequence", &lengths);
    let longer: u64 = lengths.range(most as usize + 1..).map(|(_, count)| count).sum();
    let all: u64 = lengths.values().sum();
    println!("# {longer} of {all} sequences are longer than data.sequence_length, {most} tokens");
    let share = |n: u64, all: u64| 100.0 * n as f64 / all.max(1) as f64;
    println!(
        "# {} of {} sequences ({:.1} %) end in a supervised end of sequence",
        counts.ends_in_eos,
        counts.sequences,
        share(counts.ends_in_eos, counts.sequences)
    );
    println!(
        "# {} tokens, {} of them supervised ({:.1} %); cut: {}, left out as too long: {}, left out with nothing \
         supervised: {}",
        counts.tokens,
        counts.supervised_tokens,
        share(counts.supervised_tokens, counts.tokens),
        counts.truncated,
        counts.too_long,
        counts.unsupervised
    );
    if odd.total() > 0 {
        println!("# {} of {} records are skipped: {}", odd.total(), odd.records, odd.reasons());
    }
    let tokenizer = chat.tokenizer();
    if let Some(pad) = tokenizer.pad_id().filter(|pad| chat.stop_ids().contains(pad)) {
        println!(
            "# the pad token ({}) also ends a sequence; this does no harm here: padding is found by lengths, \
             never by token ids",
            tokenizer.id_to_token(pad).unwrap_or_default()
        );
    }
}

fn legend() -> &'static str {
    match std::io::stdout().is_terminal() {
        true => "supervised tokens are green",
        false => "supervised tokens are between ⟦ and ⟧",
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

/// Prints how the lengths of `what` are spread.
fn histogram(what: &str, lengths: &Lengths) {
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
        "# tokens a {what}: {shortest} to {longest}, median {}, 95 % have at most {}",
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
