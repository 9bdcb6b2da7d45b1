//! `corral init`: a commented configuration that fits a model, data and this machine.

use std::path::{Path, PathBuf};

use crate::algorithms::base::Base;
use crate::algorithms::recipe::{Recipe, Shown};
use crate::checkpoint::Weights;
use crate::commands::Global;
use crate::commands::check::size;
use crate::commands::convert::parse_size;
use crate::commands::plan::target;
use crate::commands::recipes::{NamedRecipe, RecipeArgs, with_maker};
use crate::config::Setting;
use crate::config::changes::show;
use crate::config::model::Model;
use crate::config::shape::Shape;
use crate::config::{self, Loaded, defaults};
use crate::data::examples::{Examples, Lengths};
use crate::distributed::environment::RankEnvironment;
use crate::distributed::world::DeviceChoice;
use crate::error::{Error, Result};
use crate::plan::PlanTarget;
use crate::telemetry::{console, free_bytes, total_bytes};
use crate::{files, info};

/// `corral init`
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: NamedRecipe<InitArgs>,
}

/// The arguments for every stage.
#[derive(Debug, Clone, clap::Args)]
pub struct InitArgs {
    /// The model to train: a folder, a GGUF file, a hub id in the local cache, a name of corral get; pretrain: a preset
    #[arg(long, value_name = "DIR|ID|PRESET")]
    pub model: String,
    /// Training data: files in any format of docs/formats.md; pretrain: folders of token shards
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    pub data: Vec<PathBuf>,
    /// Held-out data, to validate on
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub valid: Vec<PathBuf>,
    /// The reward model that scores responses; without one, grpo and online-dpo compare answers by rule
    #[arg(long, value_name = "DIR")]
    pub reward_model: Option<PathBuf>,
    /// Memory of the device of a rank, such as 24GiB [default: what this machine has free]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub device_memory: Option<u64>,
    /// The configuration [default: STAGE.yaml]
    #[arg(long, value_name = "FILE.yaml")]
    pub output: Option<PathBuf>,
}

impl RecipeArgs for InitArgs {}

/// Writes a configuration, and says what to type next.
pub fn run(args: Args, global: &Global) -> Result<()> {
    args.what.recipe.init(args.what.args, global)
}

/// Tokens of an answer in the stages that sample.
const MAX_NEW_TOKENS: i64 = 256;
/// Tokens of a row while lengths are looked at, where the model has room for so many.
const LONGEST: i64 = 8192;
/// Memory of a process besides its tensors, and the share of the rest that a plan may take.
const PROCESS: i64 = 500 << 20;
const USABLE: f64 = 0.9;

/// How weights are trained, the most exact first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Full,
    Lora,
    Nf4,
}

/// A configuration before it is text.
#[derive(Debug, Clone)]
struct Draft<'a> {
    stage: &'static str,
    args: &'a InitArgs,
    length: i64,
    method: Method,
    micro: i64,
    recompute: bool,
    compute: &'static str,
    epochs: i64,
    /// Parameters of the model.
    parameters: i64,
    /// Ranks of the run.
    ranks: i64,
    /// The longest response.
    max_new_tokens: i64,
    /// The token that pads, where the tokenizer's own one ends texts, too.
    pad_token: Option<&'static str>,
    /// The adapter of the reward model, which the critic begins as.
    lora_of_critic: Option<String>,
    /// Some records cannot be used, and are left out.
    skips: bool,
    /// What was found of model, data and machine, for the header.
    facts: Vec<String>,
}

impl Draft<'_> {
    fn of_responses(&self) -> bool {
        ["online-dpo", "grpo", "ppo"].contains(&self.stage)
    }

    fn batch(&self) -> i64 {
        // Whole shares for all ranks.
        let rows = if self.of_responses() { 8 } else { 16 };
        (rows + self.ranks - 1) / self.ranks * self.ranks
    }

    /// The learning rate of the stage, the method and the size.
    fn lr(&self) -> f64 {
        let row = defaults::of(self.stage);
        row.map_or(1e-5, |row| defaults::lr_of_size(row, self.method != Method::Full, self.parameters))
    }

    fn output_dir(&self) -> String {
        format!("runs/{}", self.stage)
    }

    fn yaml(&self) -> String {
        let list = |paths: &[PathBuf]| {
            let quoted: Vec<String> = paths.iter().map(|path| quoted(&path.to_string_lossy())).collect();
            format!("[{}]", quoted.join(", "))
        };
        let stage = self.stage;
        let mut text = format!("# {stage}, written by corral init.\n#\n");
        self.facts.iter().for_each(|fact| text += &format!("#   {fact}\n"));
        text += &format!("\noutput_dir: {}\n", self.output_dir());
        let lora = match self.method {
            Method::Full => None,
            Method::Lora => Some("{rank: 16, alpha: 32, dropout: 0.0}"),
            Method::Nf4 => Some("{rank: 16, alpha: 32, dropout: 0.0, base: nf4}"),
        };
        let model = quoted(&self.args.model);
        if self.of_responses() {
            text += &format!("actor:\n  path: {model}\n");
            lora.iter().for_each(|lora| text += &format!("  lora: {lora}\n"));
            if let Some(path) = &self.args.reward_model {
                text += &format!("reward_model: {{path: {}}}\n", quoted(&path.to_string_lossy()));
            } else {
                text += "rewards: [{kind: gsm8k, form: flexible}]   # 1 where the answer has the data's number; corral help rewards.kind\n";
            }
            if stage == "ppo"
                && let Some(lora) = self.lora_of_critic.as_deref().or(lora)
            {
                text += &format!("critic: {{lora: {lora}}}\n");
            }
        } else if stage == "pretrain" {
            text += &format!("model: {{preset: {model}}}\n");
            text += &format!(
                "tokenizer: {{path: {}}}\n",
                quoted(&tokenizer_beside(&self.args.data).to_string_lossy())
            );
        } else {
            text += &format!("model: {{path: {model}}}\n");
            if let Some(token) = self.pad_token {
                text +=
                    &format!("tokenizer: {{pad_token: {token:?}}}   # the model's own one ends texts, too\n");
            }
            lora.iter().for_each(|lora| text += &format!("lora: {lora}\n"));
        }
        text += &format!("data:\n  train: {}\n", list(&self.args.data));
        match self.args.valid.is_empty() {
            false => text += &format!("  valid: {}\n", list(&self.args.valid)),
            true => text += "  # valid: [FILE]          # held-out data; with it the run validates\n",
        }
        text += &format!("  sequence_length: {}\n", self.length);
        if self.skips {
            text += "  on_error: skip   # records that cannot be used are left out and counted\n";
        }
        if self.of_responses() {
            text += &format!("generation: {{max_new_tokens: {}, temperature: 1.0}}\n", self.max_new_tokens);
        }
        let ppo = format!("ppo: {{epochs: 2, minibatch_size: {}, kl_coef: 0.05}}\n", self.batch());
        text += match stage {
            "grpo" => "grpo: {group_size: 8}\n",
            "ppo" => &ppo,
            "dpo" => "dpo: {beta: 0.1}\n",
            "kto" => "kto: {beta: 0.1}\n",
            "online-dpo" => "dpo: {beta: 0.1}\n",
            _ => "",
        };
        text += &format!("precision: {{compute: {}}}\n", self.compute);
        let lr = show(&Some(self.lr().into()));
        let decay = defaults::of(stage).map_or(0.0, |row| row.weight_decay);
        text += &format!("optim: {{lr: {lr}, weight_decay: {decay:?}, clip: 1.0}}\n");
        text += "schedule: {kind: cosine, warmup_ratio: 0.03, min_lr_ratio: 0.1}\n";
        let length =
            if stage == "pretrain" { "steps: 1000".to_string() } else { format!("epochs: {}", self.epochs) };
        let micro =
            if self.of_responses() { String::new() } else { format!(", micro_batch_size: {}", self.micro) };
        let recompute = if self.recompute { ", recompute: full" } else { "" };
        text += &format!("train: {{{length}, batch_size: {}{micro}{recompute}}}\n", self.batch());
        text += "checkpoint: {every: 100, keep: 2}\n";
        if !self.args.valid.is_empty() {
            text += "valid: {every: 50, batches: 20}\n";
        }
        if self.of_responses() {
            text += "samples: {every: 10, count: 4}\n";
        }
        text + "log: {every: 1}\nseed: 1\n"
    }

    fn load<R: Recipe>(&self) -> Result<Loaded<R>> {
        let loaded = config::load_text::<R>(&self.yaml(), &[])?;
        loaded.validate(self.ranks).map(|()| loaded)
    }

    /// What the run takes of memory, in bytes of the device.
    fn bytes<R: Recipe>(&self, target: &PlanTarget) -> Result<i64> {
        Ok(self.load::<R>()?.config.plan(target)?.bytes())
    }
}

/// A text as YAML has it in a list.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+".contains(c);
    if !text.is_empty() && text.chars().all(plain) { text.into() } else { format!("{text:?}") }
}

/// Where `corral tokenize` puts the tokenizer of the shards.
fn tokenizer_beside(shards: &[PathBuf]) -> PathBuf {
    shards.first().and_then(|path| path.parent()).unwrap_or(Path::new(".")).join("tokenizer")
}

/// Writes the configuration of a stage.
pub fn init<R: Recipe>(args: InitArgs, global: &Global) -> Result<()> {
    let output = args.output.clone().unwrap_or_else(|| format!("{}.yaml", R::SUBCOMMAND).into());
    if output.exists() {
        return Err(Error::config(format!("{} exists already; name another --output", output.display())));
    }
    let draft = draft::<R>(&args, global)?;
    files::write_file(&output, draft.yaml().as_bytes())?;
    draft.facts.iter().for_each(|fact| info!("{fact}"));
    let (stage, file, dir) = (R::SUBCOMMAND, output.display(), draft.output_dir());
    let mut text = format!(
        "{file} is written\n\nlook    corral check {stage} --config {file}\nrun     corral {stage} --config {file}\n"
    );
    if draft.method != Method::Full {
        text += &format!("merge   corral merge --adapter {dir} --output {dir}-merged\n");
    }
    text += &match stage {
        "pretrain" => format!("try     corral generate --model {dir} --prompt \"...\"\n"),
        "reward" => format!("use     corral init ppo --model MODEL --reward-model {dir} --data FILE\n"),
        _ => format!("try     corral chat --model {dir}\n"),
    };
    console::write_out(text.as_bytes()).map_err(|e| Error::failed(format!("cannot write to stdout: {e}")))
}

/// The text of a configuration, for a run without a file.
pub fn text<R: Recipe>(args: &InitArgs, global: &Global) -> Result<String> {
    Ok(draft::<R>(args, global)?.yaml())
}

/// Looks at model, data and machine.
fn draft<'a, R: Recipe>(args: &'a InitArgs, global: &Global) -> Result<Draft<'a>> {
    let place = RankEnvironment::from_env()?;
    let ranks = place.as_ref().map_or(1, |place| place.world_size);
    let cuda = DeviceChoice::of(global.device.as_deref())? != DeviceChoice::Cpu;
    if cuda && args.device_memory.is_none() {
        return Err(Error::config(
            "give the memory of the GPU, which is not detected: --device-memory 24GiB",
        ));
    }
    if R::SUBCOMMAND == "ppo" && args.reward_model.is_none() {
        info!("no --reward-model: rewards are by rule (kind gsm8k)");
    }
    let compute = if cuda || multiplies_bfloat16() { "bfloat16" } else { "float32" };
    let positions = positions::<R>(args)?;
    let mut draft = Draft {
        stage: R::SUBCOMMAND,
        args,
        length: positions.min(512),
        // A prompt needs room, too.
        max_new_tokens: MAX_NEW_TOKENS.min(positions / 2),
        method: Method::Full,
        micro: 1,
        recompute: false,
        compute,
        epochs: 1,
        parameters: 0,
        ranks,
        pad_token: None,
        lora_of_critic: args.reward_model.as_deref().map(lora_of).transpose()?.flatten(),
        skips: false,
        facts: Vec::new(),
    };
    look_at_data::<R>(&mut draft)?;
    // Ranks must come to the same: they share what the machine has.
    let there = args.device_memory.unwrap_or_else(|| match place {
        None => free_bytes(),
        Some(place) => total_bytes() / place.local_world_size as u64,
    });
    fit::<R>(&mut draft, &target(global, ranks)?, there)?;
    // What is written must be what runs.
    draft.load::<R>()?;
    Ok(draft)
}

/// The positions of the model, at which a sequence ends.
fn positions<R: Recipe>(args: &InitArgs) -> Result<i64> {
    if R::SUBCOMMAND != "pretrain" {
        let model = Model::Path(args.model.clone().into());
        let base = Base::open(&model, None, 1).map_err(|e| Error { key: None, ..with_maker(e) })?;
        return Ok(base.shape.max_position_embeddings);
    }
    check_shards(&args.data)?;
    let shape = Shape::preset(&args.model);
    let unknown = || {
        let names = Shape::PRESETS.join(", ");
        Error::config(format!("--model {}: a new model has the shape of a preset: {names}", args.model))
    };
    shape.map(|shape| shape.max_position_embeddings).ok_or_else(unknown)
}

/// Whether the processor has instructions that make products in bfloat16 faster than in float32.
fn multiplies_bfloat16() -> bool {
    std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("amx_bf16"))
}

/// Opens the model and the data; takes the length of a sequence from them, and the epochs.
fn look_at_data<R: Recipe>(draft: &mut Draft) -> Result<()> {
    let (first, inputs) = open::<R>(draft)?;
    let Some((_, shape, _)) = R::trained(&inputs).into_iter().next() else {
        return Err(Error::failed("no model is trained"));
    };
    draft.parameters = shape.num_parameters();
    let (parameters, most) = (draft.parameters as f64 / 1e6, shape.max_position_embeddings);
    draft.facts.push(format!(
        "model: {}, {} of {parameters:.1}M parameters",
        draft.args.model,
        shape.family.name()
    ));
    // Lengths of whole examples: where the first look cut some, once more with all the room that there is.
    let lengths = lengths::<R>(&first.config, &inputs);
    let inputs = match lengths.keys().last() {
        Some(longest) if *longest as i64 >= draft.length && most > draft.length => {
            draft.length = most.min(LONGEST);
            open::<R>(draft)?.1
        }
        _ => inputs,
    };
    let lengths = self::lengths::<R>(&first.config, &inputs);
    let count: u64 = lengths.values().sum();
    if R::SUBCOMMAND == "pretrain" {
        draft.length = most.min(1024);
        draft.facts.push(format!("data: {}", first.config.data_line(&inputs)));
        return Ok(());
    }
    let (median, high, longest) =
        (percentile(&lengths, 0.5), percentile(&lengths, 0.95), percentile(&lengths, 1.0));
    let room = if draft.of_responses() { draft.max_new_tokens } else { 0 };
    draft.length = ((high as i64 + room).max(64) as u64).next_multiple_of(64) as i64;
    draft.length = draft.length.min(most);
    draft.epochs = if count < 2000 && !draft.of_responses() { 3 } else { 1 };
    let what = if draft.of_responses() { "prompts" } else { "sequences" };
    draft.facts.push(format!(
        "data: {count} {what} of {median} tokens (median), {high} (95 % are at most this long), {longest} (longest)"
    ));
    Ok(())
}

/// The section `lora` of a model that has an adapter.
fn lora_of(model: &Path) -> Result<Option<String>> {
    let weights = Weights::open(model).map_err(with_maker)?;
    let lora = weights.lora().and_then(|trainable| trainable.lora.clone());
    Ok(lora.map(|lora| lora.write().to_string()))
}

/// Whether an error says that some records cannot be used, at most a tenth of all: `2 of 634 records cannot be used: ...`.
fn few_are_odd(message: &str) -> bool {
    let count = |text: Option<&str>| text.and_then(|text| text.replace(',', "").parse::<u64>().ok());
    let mut words = message.split_whitespace();
    let (odd, all) = (count(words.next()), count(words.nth(1)));
    let few = matches!((odd, all), (Some(odd), Some(all)) if odd * 10 <= all);
    few && message.contains("data.on_error: skip")
}

/// Opens what a draft names. Where the tokenizer has no token that only pads, one of its unused ones is taken.
fn open<R: Recipe>(draft: &mut Draft) -> Result<(Loaded<R>, R::Inputs)> {
    /// Tokens that tokenizers have and texts do not: of Llama, Llama 3, Qwen, SmolLM.
    const UNUSED: [&str; 6] = [
        "<pad>",
        "<|finetune_right_pad_id|>",
        "<|fim_pad|>",
        "<empty_output>",
        "<unk>",
        "<|reserved_special_token_0|>",
    ];
    let mut tokens = UNUSED.into_iter();
    let path = Model::Path(draft.args.model.clone().into());
    let has = |token: &&str| {
        Base::open(&path, None, 1).is_ok_and(|base| base.tokenizer.token_to_id(token).is_some())
    };
    loop {
        let loaded = draft.load::<R>()?;
        let e = match loaded.config.open() {
            Ok(inputs) => return Ok((loaded, inputs)),
            Err(e) => e,
        };
        if e.message.contains("tokenizer.pad_token") {
            draft.pad_token = Some(tokens.find(has).ok_or(e)?);
        } else if !draft.skips && few_are_odd(&e.message) {
            draft.skips = true;
            let which: Vec<&str> = e.message.lines().filter(|line| !line.contains("data.on_error")).collect();
            draft.facts.push(format!("data: {}; they are left out", which.join("; ").replace("  ", " ")));
        } else {
            return Err(with_maker(loaded.locate(e)));
        }
    }
}

/// Refuses text files where token shards are read.
fn check_shards(data: &[PathBuf]) -> Result<()> {
    if !data.iter().any(|path| path.is_file() && path.extension().is_none_or(|e| e != "tokens")) {
        return Ok(());
    }
    let files: Vec<String> = data.iter().map(|path| path.display().to_string()).collect();
    Err(Error::config(format!(
        "pretraining reads token shards: make them with\n  corral tokenizer train --input {0} --vocab-size 32000 --output \
         tokenizer\n  corral tokenize --input {0} --tokenizer tokenizer --output tokens\nand name --data tokens/train",
        files.join(" ")
    )))
}

/// How many examples or prompts have how many tokens.
fn lengths<R: Recipe>(config: &R, inputs: &R::Inputs) -> Lengths {
    let mut all = Lengths::new();
    match config.shown(inputs) {
        Shown::Windows { .. } => {}
        Shown::Examples { train, .. } => {
            for (length, count) in train.sources().iter().flat_map(Examples::lengths) {
                *all.entry(*length).or_default() += count;
            }
        }
        Shown::Prompts(samplers) => {
            samplers.train.prompts.iter().for_each(|p| *all.entry(p.ids.len()).or_default() += 1);
        }
    }
    all
}

/// The length that this share of the examples does not pass.
fn percentile(lengths: &Lengths, share: f64) -> usize {
    let total: u64 = lengths.values().sum();
    let mut seen = 0;
    let mut at = lengths.iter().map(|(length, count)| {
        seen += count;
        (*length, seen)
    });
    at.find(|(_, seen)| *seen as f64 >= share * total as f64).map_or(0, |(length, _)| length)
}

/// Takes the first method that fits the memory, and the largest micro-batch.
fn fit<R: Recipe>(draft: &mut Draft, target: &PlanTarget, there: u64) -> Result<()> {
    let there = there as i64;
    let budget = ((there - PROCESS) as f64 * USABLE) as i64;
    let methods: &[Method] = if R::SUBCOMMAND == "pretrain" {
        &[Method::Full]
    } else {
        &[Method::Full, Method::Lora, Method::Nf4]
    };
    let mut least = i64::MAX;
    for (method, recompute) in methods.iter().flat_map(|method| [(*method, false), (*method, true)]) {
        let tried = Draft { method, recompute, micro: 1, ..draft.clone() };
        let bytes = tried.bytes::<R>(target)?;
        least = least.min(bytes);
        if bytes > budget {
            continue;
        }
        *draft = tried;
        let mut bytes = bytes;
        let share = draft.batch() / draft.ranks;
        while !draft.of_responses() && draft.micro * 2 <= 8 && share % (draft.micro * 2) == 0 {
            let larger = Draft { micro: draft.micro * 2, ..draft.clone() };
            let more = larger.bytes::<R>(target)?;
            if more > budget {
                break;
            }
            (*draft, bytes) = (larger, more);
        }
        let how = match draft.method {
            Method::Full => "all parameters are trained",
            Method::Lora => "LoRA: the whole model does not fit",
            Method::Nf4 => "LoRA over 4-bit weights: 16-bit ones do not fit",
        };
        draft.facts.push(format!(
            "memory: {} by plan, {} available; {how}",
            size(bytes.max(0) as u64),
            size(there.max(0) as u64)
        ));
        return Ok(());
    }
    Err(Error::config(format!(
        "it does not fit: the least is {} by plan, and {} are available; use more ranks (corral plan {} --nproc N), or a smaller model",
        size(least.max(0) as u64),
        size(there.max(0) as u64),
        R::SUBCOMMAND
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_lengths_that_occur() {
        let lengths: Lengths = [(10, 90), (20, 9), (500, 1)].into();
        assert_eq!([0.5, 0.95, 1.0].map(|share| percentile(&lengths, share)), [10, 20, 500]);
        assert_eq!(percentile(&Lengths::new(), 0.5), 0);
    }

    #[test]
    fn few_odd_records_are_left_out() {
        let message =
            |what: &str| format!("{what} records cannot be used: 2 unreadable\nset data.on_error: skip");
        assert!(few_are_odd(&message("2 of 634")) && few_are_odd(&message("100 of 1,000")));
        assert!(!few_are_odd(&message("101 of 1,000")) && !few_are_odd("2 of 634 records"));
    }

    #[test]
    fn texts_are_quoted_where_yaml_needs_it() {
        assert_eq!(quoted("a/b-c_1.jsonl"), "a/b-c_1.jsonl");
        assert_eq!(quoted("a b: {c}"), "\"a b: {c}\"");
    }
}
