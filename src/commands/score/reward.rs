//! Rewards of completions, by a reward model.

use serde_json::{Value, json};

use super::{Args, check, input_ids};
use crate::algorithms::scorer;
use crate::checkpoint::{Scoring, agree};
use crate::commands::Global;
use crate::commands::inference::{self, Opened};
use crate::config::reward::Score;
use crate::data::chat::Chat;
use crate::data::conversation::answered;
use crate::data::examples::Encoded;
use crate::data::preferences::Preference;
use crate::data::readers::Record;
use crate::error::{Error, Result};
use crate::files::AtomicFile;

pub(super) fn run(
    args: &Args,
    lines: Vec<Record>,
    opened: &Opened,
    scoring: &Scoring,
    global: &Global,
) -> Result<()> {
    // Lines of tokens and plain texts need no template.
    let templated = |line: &Record| !["input_ids", "text"].iter().any(|key| line.fields.contains_key(*key));
    let chat = lines.iter().any(templated).then(|| opened.chat(&args.template)).transpose()?;
    let sequence = |line: &Record| sequence(line, opened, chat.as_ref(), scoring.score);
    let sequences = lines.iter().map(sequence).collect::<Result<Vec<_>>>()?;
    let world = inference::join(global)?;
    let mut model = opened.load(&world, args.ranks.mode)?;
    let scores = scorer::scores_of_all(&mut model, &world, scoring.score, &sequences)?;
    let write = || {
        let mut file = AtomicFile::create(&args.output)?;
        for ((mut line, sequence), score) in lines.into_iter().zip(&sequences).zip(scores) {
            line.fields.insert("token_ids".into(), json!(sequence.ids));
            line.fields.insert("score".into(), json!(score));
            line.fields.insert("reward".into(), json!(scoring.reward(score)));
            file.put(format!("{}\n", Value::Object(line.fields)).as_bytes())?;
        }
        file.commit()
    };
    agree(&world.group, if world.rank == 0 { write() } else { Ok(()) })
}

/// A line's tokens; supervised are the completion's.
fn sequence(line: &Record, opened: &Opened, chat: Option<&Chat>, score: Score) -> Result<Encoded> {
    let plain = match input_ids(line)? {
        Some(ids) => Some(ids),
        None if line.fields.contains_key("text") => {
            Some(inference::encode(opened.tokenizer()?, line.text("text")?, true)?)
        }
        None => None,
    };
    let Some(ids) = plain else {
        let chat = chat.ok_or_else(|| Error::failed("a conversation needs a template"))?;
        let (prompt, completion) = answered(line)?;
        let preference = Preference { prompt, completions: vec![completion], ranks: vec![0] };
        let mut example = preference.encode(chat).map_err(|e| e.context(&line.place))?;
        let encoded = example.sequences.remove(0);
        let ids: Vec<i64> = encoded.ids.iter().map(|id| i64::from(*id)).collect();
        check(line, &ids, opened.shape())?;
        return Ok(encoded);
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
    check(line, &ids, opened.shape())?;
    let supervised = vec![false; ids.len()];
    Ok(Encoded { ids: ids.into_iter().map(|id| id as u32).collect(), supervised })
}
