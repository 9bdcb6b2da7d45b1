//! `corral init`: a commented configuration that fits a model, data and this machine.

mod draft;

use std::path::{Path, PathBuf};

use draft::{Draft, Method, is_of_responses};
use kernels::cuda;

use crate::algorithms::base::Base;
use crate::algorithms::recipe::{Recipe, Shown};
use crate::checkpoint::Weights;
use crate::commands::Global;
use crate::commands::check::size;
use crate::commands::convert::parse_size;
use crate::commands::plan::target;
use crate::commands::recipes::{NamedRecipe, RecipeArgs, with_maker};
use crate::config::Loaded;
use crate::config::Setting;
use crate::config::model::Model;
use crate::config::shape::Shape;
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
    let device = DeviceChoice::of(global.device.as_deref())?;
    let cuda = device != DeviceChoice::Cpu;
    // Ranks must come to the same: they share what the machine has.
    let there = match (args.device_memory, device, &place) {
        (Some(bytes), ..) => bytes,
        (None, DeviceChoice::CudaIndex(index), _) => memory_of_gpu(index)?,
        (None, DeviceChoice::Cuda, _) => memory_of_gpu(0)?,
        (None, DeviceChoice::Cpu, None) => free_bytes(),
        (None, DeviceChoice::Cpu, Some(place)) => total_bytes() / place.local_world_size as u64,
    };
    if R::SUBCOMMAND == "ppo" && args.reward_model.is_none() {
        info!("no --reward-model: rewards are by rule (kind gsm8k)");
    }
    let compute = if cuda || multiplies_bfloat16() { "bfloat16" } else { "float32" };
    let positions = positions::<R>(args)?;
    let mut draft = Draft {
        stage: R::SUBCOMMAND,
        args,
        // Prompts are kept where they leave room for a response.
        length: positions.min(if is_of_responses(R::SUBCOMMAND) { LONGEST } else { 512 }),
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
    fit::<R>(&mut draft, &target(global, ranks)?, there)?;
    // What is written must be what runs.
    draft.load::<R>()?;
    Ok(draft)
}

/// All memory of a GPU of this machine.
fn memory_of_gpu(index: usize) -> Result<u64> {
    let info = cuda::load().and_then(|cuda| cuda.device_info(index));
    let unknown = |e| {
        Error::config(format!("the memory of the GPU is not known ({e}): give it with --device-memory 24GiB"))
    };
    info.map(|info| info.memory_bytes as u64).map_err(unknown)
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

/// Whether an error says that some records cannot be used, at most a tenth of all: `2 of 634 records`.
fn few_are_odd(message: &str) -> bool {
    let number = |word: &str| word.trim_start_matches('(').replace(',', "").parse::<u64>().ok();
    let words: Vec<&str> = message.split_whitespace().collect();
    let counts = words.windows(4).find_map(|w| match (w[1], w[3].starts_with("records")) {
        ("of", true) => Some((number(w[0])?, number(w[2])?)),
        _ => None,
    });
    message.contains("data.on_error: skip") && counts.is_some_and(|(odd, all)| odd * 10 <= all)
}

/// What an error says of odd records, on a line.
fn without_advice(message: &str) -> String {
    let lines = message.lines().filter(|line| !line.contains("or set data.on_error") || line.contains(" ("));
    let lines: Vec<String> = lines
        .map(|line| match line.split_once("; fix it, or set data.on_error") {
            Some((what, _)) => format!("{what})"),
            None => line.trim().to_string(),
        })
        .collect();
    lines.join("; ")
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
            draft.facts.push(format!("data: {}; such records are left out", without_advice(&e.message)));
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
        while !draft.of_responses() && share % (draft.micro * 2) == 0 {
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
        let advice = "fix them, or set data.on_error: skip to leave out";
        assert_eq!(
            without_advice(&format!("2 of 9 records\n  a:1: bad\n{advice}")),
            "2 of 9 records; a:1: bad"
        );
        let one = "a:3: bad (1 of 31 records; fix it, or set data.on_error: skip to leave out)";
        assert_eq!(without_advice(one), "a:3: bad (1 of 31 records)");
        assert!(few_are_odd("a.jsonl:3: bad (1 of 31 records; fix it, or set data.on_error: skip)"));
        assert!(!few_are_odd(&message("101 of 1,000")) && !few_are_odd("2 of 634 records"));
    }
}
