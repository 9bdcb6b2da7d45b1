//! `corral generate`: continues a prompt, or every prompt of a file.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kernels::comm::ReduceOp;
use rayon::prelude::*;
use serde_json::{Map, Value, json};

use crate::commands::Global;
use crate::commands::answers::{self, Answers, KeptLines};
use crate::commands::inference::{self, ModelArgs, OpenedModel, RanksArgs, TemplateArgs};
use crate::commands::intake::{Intake, OnErrorArgs};
use crate::data::chat::Chat;
use crate::data::conversation::PromptForm;
use crate::data::odd::{Odd, OrOdd, Reason};
use crate::data::readers;
use crate::data::tokenizer::Tokenizer;
use crate::distributed::agree::agree;
use crate::distributed::exchange::gather_objects;
use crate::distributed::world::World;
use crate::error::{Context, Error, Result};
use crate::generate::{self, Completion, Engine, EngineOptions, Request, Sampling, Stop, TextStream};
use crate::info;
use crate::model::Llama;
use crate::telemetry::console;
use crate::telemetry::progress::Bar;

/// A line of the input, as it came.
type PromptLine = Map<String, Value>;

/// What an answer adds to its line.
const ADDED: [&str; 3] = ["completion", "finish_reason", "num_tokens"];
/// Forwards between two exchanges of results, where there are several ranks.
const EXCHANGE: usize = 64;
/// Prompts that are put before the engine at once, in batches: it begins with the longest of them.
const WINDOW: usize = 8;

/// `corral generate`
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["prompt", "input"])))]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    ranks: RanksArgs,
    /// Text to continue
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// JSON lines with a `prompt` or `messages` each; a last turn of the assistant is continued
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Treat a prompt as a user message and put it into the chat template, as `messages` always are; implied by
    /// --chat-template
    #[arg(long)]
    chat: bool,
    #[command(flatten)]
    template: TemplateArgs,
    #[command(flatten)]
    on_error: OnErrorArgs,
    /// File for the lines, in the input's order, each with `completion`, `num_tokens` and `finish_reason` (eos, stop or
    /// length; error for a skipped line, with the reason in `error`) added; an existing file with the same settings is
    /// continued [default: stdout]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Start the output over
    #[arg(long, requires = "output")]
    overwrite: bool,
    /// Maximum tokens of a completion
    #[arg(long, default_value_t = 256, value_name = "N")]
    max_new_tokens: usize,
    /// Minimum tokens of a completion, including one that ends the sequence; stop texts still end it earlier
    #[arg(long, default_value_t = 0, value_name = "N")]
    min_new_tokens: usize,
    /// 0 takes the most likely token [default: 1 if --top-k, --top-p or --seed is given, else 0]
    #[arg(long, value_name = "X")]
    temperature: Option<f64>,
    /// Draw from the K most likely tokens only; 0: from all
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Draw from the most likely tokens that together reach this probability
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Seed of the draws; a line's completion depends on it, its prompt and the line's number [default: 0]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Texts that end a completion, and are not part of it
    #[arg(long, num_args = 1.., value_name = "TEXT")]
    stop: Vec<String>,
    /// Prompts processed at once on each rank
    #[arg(long, default_value_t = 32, value_name = "N")]
    batch_size: usize,
}

impl Args {
    fn sampling(&self) -> Sampling {
        let draws = self.top_k.is_some() || self.top_p.is_some() || self.seed.is_some();
        Sampling {
            temperature: self.temperature.unwrap_or(if draws { 1.0 } else { 0.0 }),
            top_k: self.top_k.unwrap_or(0),
            top_p: self.top_p.unwrap_or(1.0),
            seed: self.seed.unwrap_or(0),
        }
    }
}

/// Continues the prompts on all ranks; rank 0 writes the completions.
pub fn run(args: Args, global: &Global) -> Result<()> {
    args.sampling().check()?;
    if args.stop.iter().any(String::is_empty) {
        return Err(Error::config("--stop: an empty text would end everything"));
    }
    let (lines, prompts) = match (&args.prompt, &args.input) {
        (Some(prompt), _) => (
            vec![Map::from_iter([("prompt".into(), json!(prompt))])],
            vec![Ok(PromptForm::Text(prompt.clone()))],
        ),
        (None, Some(path)) => read_lines(path)?,
        (None, None) => return Err(Error::config("give --prompt or --input: the text to continue")),
    };
    let opened = args.model.open()?;
    let messages = prompts.iter().flatten().any(|p| matches!(p, PromptForm::Messages(_)));
    let chat = if args.chats() || messages { Some(opened.chat(&args.template)?) } else { None };
    let (requests, intake) = requests(&args, prompts, &opened, chat.as_ref())?;
    let settings = settings(&args)?;
    let kept = match &args.output {
        Some(path) if !args.overwrite => answers::find(path, &lines, &ADDED, &settings)?,
        _ => KeptLines::default(),
    };
    let world = inference::join(global, &opened, args.ranks)?;
    intake.warn(&world);
    let known = if world.is_main() { kept.lines } else { 0 };
    let kept_lines = world.group.combine(&[known as f64], ReduceOp::Max)?[0] as usize;
    if kept_lines > 0 {
        let (all, path) = (lines.len(), args.output.as_deref().unwrap_or(Path::new("")).display());
        info!("{path}: {kept_lines} of {all} lines are there already (--overwrite starts anew)");
    }
    let model = if kept_lines < lines.len() { Some(opened.load(&world, args.ranks)?) } else { None };
    let answers = match &args.output {
        _ if !world.is_main() => Ok(None),
        Some(path) => Answers::write(path, kept, &settings).map(Some),
        None => Ok((!args.streams()).then(Answers::print)),
    };
    let answers = agree(&world.group, answers)?;
    let mut eos = opened.eos_ids()?;
    eos.extend(chat.iter().flat_map(Chat::stop_ids).map(i64::from));
    let job = GenerateJob { args: &args, tokenizer: opened.tokenizer()?, eos, world: &world };
    match model {
        Some(mut model) => job.run(&mut model, lines, &requests, kept_lines, answers),
        None => answers.map_or(Ok(()), Answers::finish),
    }
}

impl Args {
    /// Whether a text is a message for the chat template.
    fn chats(&self) -> bool {
        self.chat || self.template.chat_template.is_some() || self.template.template_date.is_some()
    }

    /// Whether the completion is shown as text, instead of lines of JSON.
    fn streams(&self) -> bool {
        self.prompt.is_some() && self.output.is_none()
    }
}

/// What the answers depend on besides their lines.
fn settings(args: &Args) -> Result<Value> {
    let Sampling { temperature, top_k, top_p, seed } = args.sampling();
    let model = std::fs::canonicalize(&args.model.model).unwrap_or_else(|_| args.model.model.clone());
    Ok(json!({
        "model": model, "dtype": args.model.dtype, "max_new_tokens": args.max_new_tokens,
        "min_new_tokens": args.min_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p,
        "seed": seed, "stop": args.stop, "chat": args.chats(), "chat_template": args.template.chat_template,
        "template_date": args.template.template_date,
    }))
}

/// Completions for lines of an input, on all ranks.
struct GenerateJob<'a> {
    args: &'a Args,
    tokenizer: &'a Tokenizer,
    eos: Vec<i64>,
    world: &'a World,
}

impl GenerateJob<'_> {
    /// Answers the lines from `first` on; every rank takes its part of them, and rank 0, which has `answers`, writes all.
    fn run(
        &self,
        model: &mut Llama,
        lines: Vec<PromptLine>,
        requests: &[Result<Request, String>],
        first: usize,
        mut answers: Option<Answers>,
    ) -> Result<()> {
        let mine: Vec<(usize, &Request)> = self
            .world
            .mesh
            .data
            .turns(requests.len())
            .filter(|i| *i >= first)
            .filter_map(|i| Some((i, requests[i].as_ref().ok()?)))
            .collect();
        let stop = (!self.args.stop.is_empty())
            .then_some(Stop { texts: &self.args.stop, tokenizer: self.tokenizer });
        let options = EngineOptions {
            sampling: self.args.sampling(),
            batch_size: self.args.batch_size.min(mine.len().max(1)),
            eos: &self.eos,
            stop,
        };
        let mut engine = Engine::new(model, options)?;
        let prompt = mine.first().map_or(&[][..], |(_, request)| &request.prompt);
        let (mut stream, mut held) =
            (TextStream::new(self.tokenizer, prompt, &self.args.stop), String::new());
        // A single answer that is shown as it comes is its own progress.
        let bar = (!self.args.streams())
            .then(|| Bar::new(lines.len() as u64, "completions", self.args.output.is_none()));
        bar.iter().for_each(|bar| bar.begin_at(first as u64));
        let (mut added, mut finished) = (0, 0);
        if let Some(answers) = &mut answers {
            for (i, request) in requests.iter().enumerate().skip(first) {
                let Err(why) = request else { continue };
                answers.put(i, skipped(&lines[i], why))?;
                bar.iter().for_each(|bar| bar.inc(1));
            }
        }
        loop {
            let mut done = Vec::new();
            for _ in 0..if self.world.world_size == 1 { 1 } else { EXCHANGE } {
                if engine.num_waiting() == 0 && added < mine.len() {
                    let window = &mine[added..mine.len().min(added + WINDOW * self.args.batch_size)];
                    engine.add(model, window.iter().map(|(_, request)| (*request).clone()))?;
                    added += window.len();
                }
                // Ranks that share every matrix all have it.
                let shows = self.args.streams() && self.world.is_main();
                let stepped = engine.step(model, |completion, ended| match shows {
                    true => show(&mut stream, &mut held, completion, ended),
                    false => Ok(()),
                })?;
                for completion in engine.take_finished() {
                    let (index, request) = mine[completion.request];
                    done.push((index, self.answer(&lines[index], request, &completion)?));
                }
                if !stepped {
                    break;
                }
            }
            finished += done.len();
            let (done, left) = self.exchange(done, mine.len() - finished)?;
            bar.iter().for_each(|bar| bar.inc(done.len() as u64));
            if let Some(answers) = &mut answers {
                done.into_iter().try_for_each(|(index, line)| answers.put(index, line))?;
            }
            if left == 0 {
                break;
            }
        }
        drop(bar);
        agree(&self.world.group, answers.map_or(Ok(()), Answers::finish))
    }

    fn text(&self, request: &Request, completion: &Completion) -> Result<String> {
        generate::text(self.tokenizer, &request.prompt, &completion.ids, &self.args.stop)
    }

    fn answer(&self, line: &PromptLine, request: &Request, completion: &Completion) -> Result<String> {
        let mut line = line.clone();
        line.insert("completion".into(), json!(self.text(request, completion)?));
        line.insert("num_tokens".into(), json!(completion.ids.len()));
        line.insert("finish_reason".into(), json!(completion.finish));
        Ok(Value::Object(line).to_string())
    }

    /// What all ranks have done since the last exchange, and how many lines are left on all of them.
    fn exchange(&self, done: Vec<(usize, String)>, left: usize) -> Result<(Vec<(usize, String)>, usize)> {
        if self.world.world_size == 1 {
            return Ok((done, left));
        }
        let left = self.world.sum_rows(&[left as f64])?[0] as usize;
        Ok((gather_objects(self.world, &done)?, left))
    }
}

/// The line of a prompt that is skipped.
fn skipped(line: &PromptLine, why: &str) -> String {
    let mut line = line.clone();
    line.insert("completion".into(), Value::Null);
    line.insert("num_tokens".into(), json!(0));
    line.insert("finish_reason".into(), json!("error"));
    line.insert("error".into(), json!(why));
    Value::Object(line).to_string()
}

type PromptLines = Vec<Result<PromptForm, Odd>>;

fn read_lines(path: &Path) -> Result<(Vec<PromptLine>, PromptLines)> {
    let records = readers::records_or_errors(path, None, &Arc::default())?;
    let lines = records.map(|record| {
        let record = match record? {
            Ok(record) => record,
            Err(e) => return Ok((PromptLine::new(), Err(e).or_odd(Reason::Unreadable))),
        };
        let prompt = PromptForm::read_with_prefill(&record).or_odd(Reason::Format);
        Ok((record.fields, prompt))
    });
    lines.collect()
}

/// The prompts in tokens, on all cores, or why a line has none.
fn requests(
    args: &Args,
    prompts: PromptLines,
    opened: &OpenedModel,
    chat: Option<&Chat>,
) -> Result<(Vec<Result<Request, String>>, Intake)> {
    let (tokenizer, shape) = (opened.tokenizer()?, opened.shape());
    let encode = |prompt: PromptForm| match (prompt, chat) {
        (PromptForm::Text(text), chat) if chat.is_none() || !args.chats() => {
            Ok((inference::encode(tokenizer, &text, true)?, Vec::new()))
        }
        (prompt, Some(chat)) => {
            let messages = prompt.into_messages();
            let ids = chat.prompt_or_prefill(&messages)?.into_iter().map(i64::from).collect();
            Ok((ids, chat.unwritten(&messages)))
        }
        (_, None) => Err(Error::failed("messages need a chat template")),
    };
    let place = |i: usize, e: Error| match &args.input {
        Some(path) if e.exit_code() == 3 => e.context(format!("{}, line {}", path.display(), i + 1)),
        _ => e,
    };
    let request = |(i, prompt): (usize, Result<PromptForm, Odd>)| {
        let (prompt, unwritten) = encode(prompt?).map_err(|e| place(i, e)).or_odd(Reason::Template)?;
        let (min_new_tokens, max_new_tokens) = (args.min_new_tokens, args.max_new_tokens);
        let request = Request { prompt, samples: vec![i as u64], min_new_tokens, max_new_tokens };
        request.check(shape).map_err(|e| place(i, e)).or_odd(Reason::TooLong)?;
        Ok((request, unwritten))
    };
    let read: Vec<Result<(Request, Vec<String>), Odd>> =
        prompts.into_par_iter().enumerate().map(request).collect();
    let mut intake = Intake::of_lines(args.on_error);
    let mut requests = Vec::new();
    for request in read {
        let request = intake.read(request)?.map(|(request, unwritten)| {
            args.input.iter().for_each(|path| intake.note(path, &unwritten));
            request
        });
        requests.push(request);
    }
    match &args.input {
        Some(_) => intake.check()?,
        // The one prompt of the command line has no line that could be left out.
        None => requests.iter().try_for_each(|r| r.as_ref().map(drop).map_err(Error::data))?,
    }
    if requests.iter().all(Result::is_err) && !requests.is_empty() {
        return Err(Error::data(format!("there is nothing to continue: {}", intake.why_nothing())));
    }
    Ok((requests, intake))
}

/// Shows the newest token of the only completion: as it comes where stdout is a terminal, else all at its end.
fn show(stream: &mut TextStream, held: &mut String, completion: &Completion, ended: bool) -> Result<()> {
    if let Some(id) = completion.ids.last() {
        *held += stream.push(*id, ended)?;
    }
    if ended {
        held.push('\n');
    } else if !std::io::stdout().is_terminal() {
        return Ok(());
    }
    console::write_out(held.as_bytes()).context("cannot write to stdout")?;
    held.clear();
    Ok(())
}
