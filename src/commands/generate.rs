//! `corral generate`: continues a prompt, or every prompt of a file.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value, json};
use tch::Device;

use crate::commands::inference::{self, ModelArgs};
use crate::data::readers;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Context, Error, Result};
use crate::files::AtomicFile;
use crate::generate::engine::{self, Generation, Options, Stop};
use crate::generate::sampler::Sampling;

#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("what").required(true).args(["prompt", "input"])))]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to continue
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// JSON lines with a `prompt` each
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Where the lines go, each with `completion`, `num_tokens` and `finish_reason` (eos, stop or length) added
    /// [default: stdout]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Tokens a completion may have
    #[arg(long, default_value_t = 256, value_name = "N")]
    max_new_tokens: usize,
    /// 0 takes the most likely token [default: 1 if --top-k, --top-p or --seed is given, else 0]
    #[arg(long, value_name = "X")]
    temperature: Option<f64>,
    /// Draw from the K most likely tokens only; 0: from all
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Draw from the most likely tokens that together reach this probability
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Of the draws; a line's completion depends on it, its prompt and the line's number [default: 0]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Texts that end a completion, and do not belong to it
    #[arg(long, num_args = 1.., value_name = "TEXT")]
    stop: Vec<String>,
    /// Prompts in work at once
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

pub fn run(args: Args, device: Device) -> Result<()> {
    args.sampling().check()?;
    if args.stop.iter().any(String::is_empty) {
        return Err(Error::config("--stop: an empty text would end everything"));
    }
    let lines = match (&args.prompt, &args.input) {
        (Some(prompt), _) => vec![Map::from_iter([("prompt".into(), json!(prompt))])],
        (None, Some(path)) => read_lines(path)?,
        (None, None) => return Err(Error::config("--prompt or --input says what to continue")),
    };
    let mut inference = args.model.load(device)?;
    let tokenizer = inference.tokenizer()?.clone();
    let prompts = encode(&lines, args.input.as_deref(), &tokenizer)?;
    let eos = inference.eos_ids()?;
    let options = Options {
        sampling: args.sampling(),
        max_new_tokens: args.max_new_tokens,
        batch_size: args.batch_size,
        eos: &eos,
        stop: (!args.stop.is_empty()).then_some(Stop { texts: &args.stop, tokenizer: &tokenizer }),
    };
    let text = |i: usize, ids: &[i64]| engine::text(&tokenizer, &prompts[i].prompt, ids, &args.stop);

    if args.prompt.is_some() && args.output.is_none() {
        let mut stream = Stream::new(&args.stop);
        engine::generate(&mut inference.model, &prompts, &options, |p| {
            if stream.live || p.finish.is_some() {
                stream.show(&text(p.index, p.ids)?, p.finish.is_some())
            } else {
                Ok(())
            }
        })?;
        return Ok(());
    }
    let bar = inference::bar(prompts.len() as u64, "completions");
    let completions = engine::generate(&mut inference.model, &prompts, &options, |p| {
        bar.inc(u64::from(p.finish.is_some()));
        Ok(())
    })?;
    bar.finish_and_clear();
    let mut out = String::new();
    for (i, (mut line, completion)) in lines.into_iter().zip(&completions).enumerate() {
        line.insert("completion".into(), json!(text(i, &completion.ids)?));
        line.insert("num_tokens".into(), json!(completion.ids.len()));
        line.insert("finish_reason".into(), json!(completion.finish));
        out += &format!("{}\n", Value::Object(line));
    }
    match &args.output {
        Some(path) => {
            let mut file = AtomicFile::create(path)?;
            file.put(out.as_bytes())?;
            file.commit()
        }
        None => std::io::stdout().write_all(out.as_bytes()).context("cannot write to stdout"),
    }
}

fn read_lines(path: &Path) -> Result<Vec<Map<String, Value>>> {
    let records = readers::records(path, None, &Arc::default())?;
    let lines = records.map(|record| {
        let record = record?;
        record.text("prompt")?;
        Ok(record.fields)
    });
    lines.collect()
}

fn encode(
    lines: &[Map<String, Value>],
    input: Option<&Path>,
    tokenizer: &Tokenizer,
) -> Result<Vec<Generation>> {
    let prompts = lines.iter().enumerate().map(|(i, line)| {
        let text = line["prompt"].as_str().unwrap_or_default();
        let prompt = inference::encode(tokenizer, text, true)?;
        if prompt.is_empty() {
            let place = input.map_or("--prompt".into(), |path| format!("{}, line {}", path.display(), i + 1));
            return Err(Error::data(format!(
                "{place}: the prompt is empty, and the tokenizer adds nothing to it"
            )));
        }
        Ok(Generation { prompt, sample: i as u64 })
    });
    prompts.collect()
}

/// A completion on stdout: as it comes if that is a terminal, at its end otherwise.
struct Stream {
    live: bool,
    shown: usize,
    /// Bytes that may yet turn out to begin a stop text.
    held_back: usize,
}

impl Stream {
    fn new(stop: &[String]) -> Stream {
        let held_back = stop.iter().map(|s| s.len() - 1).max().unwrap_or(0);
        Stream { live: std::io::stdout().is_terminal(), shown: 0, held_back }
    }

    /// Shows what is new of `text`, but characters that are not complete yet.
    fn show(&mut self, text: &str, finished: bool) -> Result<()> {
        let settled = text.trim_end_matches(char::REPLACEMENT_CHARACTER).len().saturating_sub(self.held_back);
        let end = if finished { text.len() } else { text.floor_char_boundary(settled) };
        let mut stdout = std::io::stdout();
        let mut write = || {
            if let Some(new) = text.get(self.shown..end) {
                stdout.write_all(new.as_bytes())?;
                self.shown = end;
            }
            if finished {
                stdout.write_all(b"\n")?;
            }
            stdout.flush()
        };
        write().context("cannot write to stdout")
    }
}
