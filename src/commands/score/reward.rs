//! Rewards of completions, by a reward model.

use serde_json::json;

use super::lines::{check, input_ids};
use super::{Args, ScoreLine, read, write_lines};
use crate::algorithms::scorer;
use crate::checkpoint::Scoring;
use crate::commands::Global;
use crate::commands::inference::{self, OpenedModel};
use crate::config::reward::Score;
use crate::data::chat::Chat;
use crate::data::conversation::answered;
use crate::data::examples::Encoded;
use crate::data::odd::{Odd, OrOdd, Reason};
use crate::data::readers::Record;
use crate::distributed::agree::agree;
use crate::error::{Error, Result};

pub(super) fn run(
    args: &Args,
    lines: Vec<Result<Record>>,
    opened: &OpenedModel,
    scoring: &Scoring,
    global: &Global,
) -> Result<()> {
    // Lines of tokens and plain texts need no template.
    let templated = |line: &Record| !["input_ids", "text"].iter().any(|key| line.fields.contains_key(*key));
    let templated = lines.iter().flatten().any(templated);
    let chat = templated.then(|| opened.chat(&args.template)).transpose()?;
    let sequence = |line: &Record| sequence(line, opened, chat.as_ref(), scoring.score);
    let (lines, sequences, intake) = read(args, lines, sequence)?;
    let world = inference::join(global, opened, args.ranks)?;
    intake.warn(&world);
    let mut model = opened.load(&world, args.ranks)?;
    let scores = scorer::scores_of_all(&mut model, &world, scoring.score, &sequences)?;
    let mut scored = scores.into_iter().zip(&sequences);
    let write = |line: &mut ScoreLine| {
        let Some((score, sequence)) = scored.next() else { return Ok(()) };
        line.fields.insert("token_ids".into(), json!(sequence.ids));
        line.fields.insert("score".into(), json!(score));
        line.fields.insert("reward".into(), json!(scoring.reward(score)));
        Ok(())
    };
    agree(&world.group, if world.is_main() { write_lines(&args.output, lines, write) } else { Ok(()) })
}

/// A line's tokens, of which the completion's are supervised, and what it gives to the template and the text lacks.
fn sequence(
    line: &Record,
    opened: &OpenedModel,
    chat: Option<&Chat>,
    score: Score,
) -> Result<(Encoded, Vec<String>), Odd> {
    let (encoded, unwritten) = match plain(line, opened, score).or_odd(Reason::Format)? {
        Some(ids) => (Encoded { supervised: vec![false; ids.len()], ids }, Vec::new()),
        None => conversation(line, chat)?,
    };
    let ids: Vec<i64> = encoded.ids.iter().map(|id| i64::from(*id)).collect();
    check(line, &ids, opened.shape())?;
    Ok((encoded, unwritten))
}

/// The ids of a line of tokens or of a plain text.
fn plain(line: &Record, opened: &OpenedModel, score: Score) -> Result<Option<Vec<u32>>> {
    let ids = match input_ids(line)? {
        Some(ids) => ids,
        None if line.fields.contains_key("text") => {
            inference::encode(opened.tokenizer()?, line.text("text")?, true)?
        }
        None => return Ok(None),
    };
    if score != Score::Last {
        return Err(Error::data(format!(
            "{}: this model's score is of a completion's tokens: give `prompt` and `completion`",
            line.place
        )));
    }
    if ids.is_empty() {
        return Err(Error::data(format!("{}: there are no tokens to score", line.place)));
    }
    let ids: Option<Vec<u32>> = ids.into_iter().map(|id| u32::try_from(id).ok()).collect();
    ids.map(Some).ok_or_else(|| Error::data(format!("{}: input_ids has a negative token id", line.place)))
}

fn conversation(line: &Record, chat: Option<&Chat>) -> Result<(Encoded, Vec<String>), Odd> {
    let chat = chat.ok_or_else(|| Error::failed("a conversation needs a template")).or_odd(Reason::Format)?;
    let (mut prompt, completion) = answered(line).or_odd(Reason::Format)?;
    let encoding =
        chat.answer(&prompt, &completion).map_err(|e| e.context(&line.place)).or_odd(Reason::Template)?;
    prompt.extend(completion);
    let encoded = Encoded { supervised: encoding.mask(), ids: encoding.ids }.cut_after_the_last_turn();
    Ok((encoded, chat.unwritten(&prompt)))
}
