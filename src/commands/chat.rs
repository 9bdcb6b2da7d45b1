//! `corral chat`: talks with a model. Answers go to stdout as they come, all else to stderr.

use std::io::{BufRead, IsTerminal};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kernels::comm::ReduceOp;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;
use signal_hook::consts::SIGINT;

use crate::commands::Global;
use crate::commands::inference::{ModelArgs, OpenedModel, RanksArgs, Spread, TemplateArgs, join};
use crate::data::chat::Chat;
use crate::data::conversation::Message;
use crate::distributed::environment::RankEnvironment;
use crate::distributed::exchange::Words;
use crate::distributed::world::World;
use crate::error::{Context, Error, Result};
use crate::generate::{self, CachedSession, EngineOptions, Finish, Request, Sampling, TextStream};
use crate::model::Llama;
use crate::telemetry::console;
use crate::{detail, info, warn};

/// `corral chat`
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    template: TemplateArgs,
    /// Ranks of `launch --nproc RANKS chat` that share every matrix (tensor parallelism)
    #[arg(long, value_name = "RANKS", default_value_t = 1, value_parser = clap::value_parser!(i64).range(1..))]
    tensor: i64,
    /// The system message to begin with
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Maximum tokens of an answer
    #[arg(long, default_value_t = 1024, value_name = "N")]
    max_new_tokens: usize,
    /// 0 takes the most likely token
    #[arg(long, default_value_t = 0.7, value_name = "X")]
    temperature: f64,
    /// Draw from the K most likely tokens only; 0: from all
    #[arg(long, default_value_t = 0, value_name = "K")]
    top_k: usize,
    /// Draw from the most likely tokens that together reach this probability
    #[arg(long, default_value_t = 0.95, value_name = "P")]
    top_p: f64,
    /// Seed of the draws
    #[arg(long, default_value_t = 0, value_name = "S")]
    seed: u64,
}

const HELP: &str = "\
/reset                 forget the conversation (the system message stays)
/system [TEXT]         set the system message, or remove it
/params [NAME=X ...]   show or set temperature, top_k, top_p, seed, max_new_tokens
/help                  show this help
/exit                  quit, like Ctrl-D
Ctrl-C stops an answer; twice at the prompt, it quits";

/// Opens the model, then reads turns from the terminal or from stdin until it ends.
pub fn run(args: Args, global: &Global) -> Result<()> {
    let (ranks, tensor) = (RankEnvironment::from_env()?.map_or(1, |place| place.world_size), args.tensor);
    if ranks != tensor {
        return Err(Error::config(format!(
            "chat --tensor {tensor} takes {tensor} ranks, and there are {ranks}: all ranks compute every answer together, as in \
             `launch --nproc 2 chat --tensor 2`; one needs no `launch`"
        )));
    }
    let params = Params {
        sampling: Sampling {
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            seed: args.seed,
        },
        max_new_tokens: args.max_new_tokens,
    };
    params.check()?;
    let opened = args.model.open()?;
    let chat = opened.chat(&args.template)?;
    let ranks = RanksArgs { mode: Spread::Replicate, tensor };
    let world = join(global, &opened, ranks)?;
    let model = opened.load(&world, ranks)?;
    let mut talk = Talk::new(&opened, chat, model, params, &world)?;
    talk.set_system(args.system.as_deref().unwrap_or_default());
    // Rank 0 reads, the others hear of it.
    let mut input = world.is_main().then(ChatInput::open).transpose()?;
    if input.as_ref().is_some_and(ChatInput::is_terminal) {
        info!("{}: /help lists commands, Ctrl-D ends", opened.dir().display());
    }
    let mut words = Words::default();
    loop {
        let line = words.next(&world, || match &mut input {
            Some(input) => Ok(input.line()?.unwrap_or_else(|| "/exit".into()).into_bytes()),
            None => Err(Error::failed("only rank 0 reads lines")),
        })?;
        match String::from_utf8_lossy(&line).trim() {
            "" => {}
            "/exit" | "/quit" => break,
            text if text.starts_with('/') => talk.command(text),
            text => talk.answer(text)?,
        }
    }
    Ok(())
}

/// What `/params` sets.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Params {
    sampling: Sampling,
    max_new_tokens: usize,
}

impl Params {
    fn check(&self) -> Result<()> {
        self.sampling.check()?;
        if self.max_new_tokens == 0 {
            return Err(Error::config("max_new_tokens must be at least 1"));
        }
        Ok(())
    }

    /// With one `NAME=X` changed.
    fn with(mut self, assignment: &str) -> Result<Params> {
        let (name, value) = assignment.split_once('=').unwrap_or((assignment, ""));
        fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<T> {
            value.parse().map_err(|_| Error::config(format!("{name}: '{value}' is not a valid number")))
        }
        match name {
            "temperature" => self.sampling.temperature = number(name, value)?,
            "top_k" => self.sampling.top_k = number(name, value)?,
            "top_p" => self.sampling.top_p = number(name, value)?,
            "seed" => self.sampling.seed = number(name, value)?,
            "max_new_tokens" => self.max_new_tokens = number(name, value)?,
            _ => {
                return Err(Error::config(format!(
                    "no parameter '{name}'; there are temperature, top_k, top_p, seed, max_new_tokens"
                )));
            }
        }
        self.check()?;
        Ok(self)
    }
}

impl std::fmt::Display for Params {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Sampling { temperature, top_k, top_p, seed } = self.sampling;
        let most = self.max_new_tokens;
        write!(f, "temperature={temperature} top_k={top_k} top_p={top_p} seed={seed} max_new_tokens={most}")
    }
}

/// A conversation under way.
struct Talk<'a> {
    world: &'a World,
    chat: Chat,
    model: Llama,
    session: CachedSession,
    params: Params,
    eos: Vec<i64>,
    /// A system message may come first; then the user and the assistant in turn.
    messages: Vec<Message>,
    /// Answers so far: keys their draws.
    answers: u64,
    /// Set by SIGINT. A second one while it is set, also while nothing is answered, ends the process.
    interrupted: Arc<AtomicBool>,
}

impl<'a> Talk<'a> {
    fn new(
        opened: &OpenedModel,
        chat: Chat,
        model: Llama,
        params: Params,
        world: &'a World,
    ) -> Result<Talk<'a>> {
        let interrupted = Arc::new(AtomicBool::new(true));
        signal_hook::flag::register_conditional_shutdown(SIGINT, 128 + SIGINT, interrupted.clone())
            .and_then(|_| signal_hook::flag::register(SIGINT, interrupted.clone()))
            .context("cannot watch for Ctrl-C")?;
        let mut eos = opened.eos_ids()?;
        eos.extend(chat.stop_ids().into_iter().map(i64::from));
        let session = CachedSession::new(&model);
        let messages = Vec::new();
        Ok(Talk { world, chat, model, session, params, eos, messages, answers: 0, interrupted })
    }

    /// A warning, from one rank: all of them have the same conversation.
    fn warn(&self, text: impl std::fmt::Display) {
        if self.world.is_main() {
            warn!("{text}");
        }
    }

    fn has_system(&self) -> bool {
        self.messages.first().is_some_and(|m| m.role == "system")
    }

    /// Sets the system message, or removes it where the text is empty.
    fn set_system(&mut self, text: &str) {
        if self.has_system() {
            self.messages.remove(0);
        }
        if !text.is_empty() {
            self.messages.insert(0, Message::new("system", text));
        }
    }

    fn command(&mut self, line: &str) {
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        match name {
            "/help" => info!("{HELP}"),
            "/reset" => self.messages.truncate(usize::from(self.has_system())),
            "/system" => self.set_system(rest.trim()),
            "/params" => {
                let changed = rest.split_whitespace().try_fold(self.params, |params, one| params.with(one));
                match changed {
                    Ok(params) => {
                        self.params = params;
                        info!("{params}");
                    }
                    Err(e) => self.warn(e),
                }
            }
            _ => self.warn(format_args!("no command '{name}'; /help lists them")),
        }
    }

    /// Answers a message of the user. What is wrong with the message is told, and the conversation goes on without it.
    fn answer(&mut self, text: &str) -> Result<()> {
        self.messages.push(Message::new("user", text));
        let prompt = match self.prompt() {
            Ok(prompt) => prompt,
            Err(e) => {
                self.messages.pop();
                self.warn(e);
                return Ok(());
            }
        };
        let known = self.session.known(&prompt);
        let request = Request::new(prompt, self.answers, self.params.max_new_tokens);
        let options =
            EngineOptions { sampling: self.params.sampling, batch_size: 1, eos: &self.eos, stop: None };
        let tokenizer = self.chat.tokenizer().clone();
        let (mut stream, mut begins) = (TextStream::new(&tokenizer, &request.prompt, &[]), true);
        let world = self.world;
        let mut show = |id: i64, last: bool| -> Result<()> {
            if !world.is_main() {
                return Ok(());
            }
            let part = stream.push(id, last)?;
            // Some templates leave the space before an answer to the answer.
            let part = if begins { part.trim_start() } else { part };
            begins &= part.is_empty();
            let end = if last { "\n" } else { "" };
            console::write_out(format!("{part}{end}").as_bytes()).context("cannot write to stdout")
        };
        self.interrupted.store(false, Ordering::Relaxed);
        let interrupted = self.interrupted.clone();
        let begun = std::time::Instant::now();
        let mut stopped = false;
        let completion = self.session.generate(&mut self.model, &request, &options, |completion, last| {
            stopped = !last && interrupted.load(Ordering::Relaxed);
            // Ranks stop at the same token.
            if world.world_size > 1 {
                stopped = world.group.combine(&[f64::from(u8::from(stopped))], ReduceOp::Max)?[0] > 0.0;
            }
            completion.ids.last().map_or(Ok(()), |id| show(*id, last || stopped))?;
            Ok(if stopped { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        });
        self.interrupted.store(true, Ordering::Relaxed);
        let completion = completion?;
        self.answers += 1;
        let answer = generate::text(&tokenizer, &request.prompt, &completion.ids, &[])?;
        self.messages.push(Message::new("assistant", answer.trim()));
        let (read, said) = (request.prompt.len() - known, completion.ids.len());
        let seconds = begun.elapsed().as_secs_f64();
        detail!("{read} tokens read, {known} known, {said} answered in {seconds:.2} s");
        if stopped {
            info!("(stopped)");
        } else if completion.finish == Finish::Length {
            info!(
                "(cut after {said} tokens; /params max_new_tokens=N allows more, up to the model's positions)"
            );
        }
        Ok(())
    }

    /// The conversation in tokens. Where it leaves less room than an answer may need, up to a quarter of the model's
    /// positions, the oldest turns are given up, and told.
    fn prompt(&mut self) -> Result<Vec<i64>> {
        let positions = self.model.shape.max_position_embeddings as usize;
        let room = self.params.max_new_tokens.min(positions / 4).max(1);
        let first = usize::from(self.has_system());
        let mut given_up = 0;
        loop {
            let ids: Vec<i64> = self.chat.prompt(&self.messages)?.into_iter().map(i64::from).collect();
            if ids.len() + room <= positions {
                if given_up > 0 {
                    self.warn(format_args!(
                        "the conversation is too long for the model's {positions} positions: its oldest {given_up} \
                         messages are forgotten"
                    ));
                }
                return Ok(ids);
            }
            if self.messages.len() <= first + 1 {
                return Err(Error::data(format!(
                    "the message has {} tokens with what the chat template adds; the model has {positions} positions, \
                     of which {room} are kept for the answer: shorten it",
                    ids.len()
                )));
            }
            // The user's oldest message with its answer.
            let turn = self.messages[first..].iter().skip(1).position(|m| m.role == "user");
            let count = turn.map_or(1, |i| i + 1);
            self.messages.drain(first..first + count);
            given_up += count;
        }
    }
}

/// Where the user's lines come from.
enum ChatInput {
    Terminal(Box<DefaultEditor>),
    Lines(std::io::StdinLock<'static>),
}

impl ChatInput {
    fn open() -> Result<ChatInput> {
        if !std::io::stdin().is_terminal() {
            return Ok(ChatInput::Lines(std::io::stdin().lock()));
        }
        let editor = DefaultEditor::new();
        Ok(ChatInput::Terminal(Box::new(
            editor.map_err(|e| Error::failed(format!("cannot edit lines: {e}")))?,
        )))
    }

    fn is_terminal(&self) -> bool {
        matches!(self, ChatInput::Terminal(_))
    }

    /// The next line; none where the input ends.
    fn line(&mut self) -> Result<Option<String>> {
        let editor = match self {
            ChatInput::Terminal(editor) => editor,
            ChatInput::Lines(stdin) => {
                let mut line = String::new();
                let read = stdin.read_line(&mut line).context("cannot read from stdin")?;
                return Ok((read > 0).then_some(line));
            }
        };
        let mut interrupts = 0;
        loop {
            match editor.readline("> ") {
                Ok(line) => {
                    // A line that cannot be kept for later is no loss.
                    let _ = editor.add_history_entry(line.as_str());
                    return Ok(Some(line));
                }
                Err(ReadlineError::Interrupted) if interrupts == 0 => {
                    interrupts += 1;
                    info!("(Ctrl-C again, or Ctrl-D, ends)");
                }
                Err(ReadlineError::Interrupted | ReadlineError::Eof) => return Ok(None),
                Err(e) => return Err(Error::failed(format!("cannot read from the terminal: {e}"))),
            }
        }
    }
}
