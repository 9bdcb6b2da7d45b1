//! Questions with a number as their answer: the share that a model answers exactly.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{Args, tell, write_answers};
use crate::algorithms::interval::wilson;
use crate::commands::Global;
use crate::commands::inference;
use crate::commands::intake::Intake;
use crate::data::chat::Chat;
use crate::data::conversation::{PromptForm, conversation};
use crate::data::odd::{Odd, OrOdd, Reason};
use crate::data::readers::{self, Record};
use crate::distributed::exchange::gather_objects;
use crate::error::{Error, Result};
use crate::generate::{self as generation, Sampling};
use crate::generate::{EngineOptions, Request, generate};
use crate::rewards::gsm8k::{self, AnswerForm, NumberAnswer, answer};
use crate::telemetry::progress::Bar;

/// A question and the number that answers it.
struct Question {
    line: Map<String, Value>,
    prompt: Vec<i64>,
    /// What the template is given and does not write.
    unwritten: Vec<String>,
    /// None: the reference has no number, so that nothing can be compared with it.
    gold: Option<NumberAnswer>,
}

#[expect(clippy::too_many_lines, reason = "the steps of a measurement")]
pub(super) fn run(args: Args, global: &Global) -> Result<()> {
    let sampling = Sampling { temperature: args.temperature, top_k: 0, top_p: 1.0, seed: args.seed };
    sampling.check()?;
    let opened = args.model.open()?;
    let chat = opened.chat(&args.template)?;
    let (mut questions, mut intake) = (Vec::new(), Intake::new(args.on_error));
    'files: for path in &args.input {
        for record in readers::records_or_errors(path, None, &Arc::default())? {
            if args.limit.is_some_and(|limit| questions.len() == limit) {
                break 'files;
            }
            let read =
                |record: Record| question(record, &chat, opened.shape().max_position_embeddings as usize);
            let Some(question) = intake.take(record?, read)? else { continue };
            intake.note(path, &question.unwritten);
            questions.push(question);
        }
    }
    intake.check()?;
    if questions.is_empty() {
        return Err(Error::data(format!("there are no questions: {}", intake.why_nothing())));
    }
    if !questions.iter().any(|q| q.gold.is_some()) {
        return Err(Error::data(
            "no line of the input has an answer that is a number, or has one after `####`",
        ));
    }
    let requests: Vec<Request> = questions
        .iter()
        .enumerate()
        .map(|(i, q)| Request::new(q.prompt.clone(), i as u64, args.max_new_tokens))
        .collect();
    requests.iter().try_for_each(|r| r.check(opened.shape()))?;
    let world = inference::join(global, &opened, args.ranks)?;
    intake.warn(&world);
    let mut model = opened.load(&world, args.ranks)?;
    let mut eos = opened.eos_ids()?;
    eos.extend(chat.stop_ids().into_iter().map(i64::from));
    let options = EngineOptions { sampling, batch_size: args.batch_size, eos: &eos, stop: None };

    let mine: Vec<usize> = world.mesh.data.turns(requests.len()).collect();
    let my_requests: Vec<Request> = mine.iter().map(|i| requests[*i].clone()).collect();
    let bar = Bar::new(mine.len() as u64, "answers", false);
    let completions = generate(&mut model, &my_requests, options, |_, ended| {
        bar.inc(u64::from(ended));
        Ok(())
    })?;
    drop(bar);
    let texts = completions.iter().zip(&mine).map(|(completion, i)| {
        let text = generation::text(opened.tokenizer()?, &requests[*i].prompt, &completion.ids, &[])?;
        Ok((*i, (text, completion.ids.len(), json!(completion.finish))))
    });
    let texts: Vec<(usize, (String, usize, Value))> = texts.collect::<Result<_>>()?;
    let all: BTreeMap<usize, (String, usize, Value)> = gather_objects(&world, &texts)?.into_iter().collect();

    let (mut total, mut groups) = (Gsm8kTally::default(), BTreeMap::<String, Gsm8kTally>::new());
    let mut lines = String::new();
    for (question, (text, num_tokens, finish)) in questions.into_iter().zip(all.into_values()) {
        let found = answer(&text, AnswerForm::Strict);
        let correct =
            question.gold.as_ref().map(|gold| found.as_ref().is_some_and(|a| a.number == gold.number));
        let ended = finish == "eos";
        total.count(correct, found.is_some(), ended);
        if let Some(key) = &args.by {
            let value = question.line.get(key).map_or("null".to_string(), Value::to_string);
            groups.entry(value).or_default().count(correct, found.is_some(), ended);
        }
        let mut line = question.line;
        line.insert("completion".into(), json!(text));
        line.insert("num_tokens".into(), json!(num_tokens));
        line.insert("finish_reason".into(), finish);
        line.insert("parsed".into(), json!(found.map(|a| a.number)));
        line.insert("gold".into(), json!(question.gold.map(|a| a.number)));
        line.insert("correct".into(), json!(correct));
        lines += &format!("{}\n", Value::Object(line));
    }
    let mut result = total.to_json();
    result.insert("task".into(), json!("gsm8k"));
    result.insert("temperature".into(), json!(args.temperature));
    result.insert("too_long".into(), json!(intake.too_long()));
    result.insert("skipped_records".into(), json!(intake.skipped()));
    if let Some(key) = &args.by {
        let groups: Map<String, Value> =
            groups.into_iter().map(|(value, tally)| (value, Value::Object(tally.to_json()))).collect();
        result.insert(format!("by_{key}"), Value::Object(groups));
    }
    write_answers(&args, &world, &lines)?;
    tell(&args, &world, &Value::Object(result))
}

/// A record's question in tokens, and its answer. A last turn of the assistant in `messages` or `prompt` is the answer, or,
/// beside `answer`, the beginning of the model's.
fn question(record: Record, chat: &Chat, positions: usize) -> Result<Question, Odd> {
    let (reference, prompt) = reference_and_prompt(&record).or_odd(Reason::Format)?;
    let messages = prompt.into_messages();
    let prompt = chat.prompt_or_prefill(&messages);
    let prompt = prompt.map_err(|e| e.context(&record.place)).or_odd(Reason::Template)?;
    let n = prompt.len();
    if n >= positions {
        return Err(Error::data(format!(
            "{}: {n} tokens; the model's {positions} positions (max_position_embeddings) leave no room for an answer",
            record.place
        )))
        .or_odd(Reason::TooLong);
    }
    let prompt = prompt.into_iter().map(i64::from).collect();
    let unwritten = chat.unwritten(&messages);
    Ok(Question { line: record.fields, prompt, unwritten, gold: gsm8k::reference(&reference) })
}

fn reference_and_prompt(record: &Record) -> Result<(String, PromptForm)> {
    let reference = match record.fields.get("answer") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Number(number)) => format!("#### {number}"),
        _ => match conversation(record)?.pop() {
            Some(last) if last.role == "assistant" => {
                return Ok((last.text().into_owned(), PromptForm::read(record)?));
            }
            _ => return Err(Error::data(format!("{}: no key `answer`", record.place))),
        },
    };
    Ok((reference, PromptForm::read_with_prefill(record)?))
}

#[derive(Debug, Default, Clone, Copy)]
struct Gsm8kTally {
    scored: u64,
    correct: u64,
    /// References without a number: left out of the accuracy.
    unscored: u64,
    /// Answers without a number: wrong.
    unparsed: u64,
    ended: u64,
    all: u64,
}

impl Gsm8kTally {
    fn count(&mut self, correct: Option<bool>, parsed: bool, ended: bool) {
        self.all += 1;
        self.ended += u64::from(ended);
        match correct {
            None => self.unscored += 1,
            Some(correct) => {
                self.scored += 1;
                self.correct += u64::from(correct);
                self.unparsed += u64::from(!parsed);
            }
        }
    }

    fn to_json(self) -> Map<String, Value> {
        let interval = wilson(self.correct, self.scored);
        let fields = json!({
            "accuracy": (self.scored > 0).then(|| self.correct as f64 / self.scored as f64),
            "accuracy_95": interval,
            "correct": self.correct,
            "scored": self.scored,
            "unscored": self.unscored,
            "unparsed": self.unparsed,
            "eos_fraction": self.ended as f64 / self.all.max(1) as f64,
        });
        match fields {
            Value::Object(fields) => fields,
            _ => Map::new(),
        }
    }
}
