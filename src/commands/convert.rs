//! `corral convert`: a model into another format, dtype or number of parts.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::ValueEnum;
use tch::{Device, Kind};

use crate::checkpoint::convert::{Conversion, ConvertTarget, StoredAs};
use crate::checkpoint::{MegatronForm, PeftAdapter, Weights};
use crate::commands::check::size;
use crate::commands::merge;
use crate::config::shape::Shape;
use crate::data::tokenizer::Tokenizer;
use crate::data::tokenizer::gguf::GgufLimit;
use crate::error::{Error, Result};
use crate::gguf;
use crate::telemetry::progress::with_bytes_bar;
use crate::warn;

/// `corral convert`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model: a Hugging Face folder (safetensors or pytorch_model.bin), a GGUF file, a folder in Meta's or Megatron's format, a run's
    /// folder, a checkpoint, or an adapter, which is merged
    #[arg(long, value_name = "DIR")]
    from: PathBuf,
    /// Folder for the result, or with --format gguf the file (in a folder, model.gguf); a model of the same format there is
    /// replaced
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Output format
    #[arg(long, value_enum)]
    format: TargetFormat,
    /// Model-parallel parts, with --format meta [default: 1]
    #[arg(long, value_name = "N", aliases = ["shards", "parts", "tp"], value_parser = clap::value_parser!(i64).range(1..=100))]
    model_parallel: Option<i64>,
    /// Ranks of tensor parallelism, with --format megatron or megatron-dist [default: 1]
    #[arg(long, value_name = "T", value_parser = clap::value_parser!(i64).range(1..=1024))]
    tensor: Option<i64>,
    /// Stages of pipeline parallelism, with --format megatron or megatron-dist [default: 1]
    #[arg(long, value_name = "P", value_parser = clap::value_parser!(i64).range(1..=1024))]
    pipeline: Option<i64>,
    /// Pad the vocabulary to a multiple of this times --tensor, with --format megatron or megatron-dist [default: not padded]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i64).range(1..=1 << 20))]
    make_vocab_size_divisible_by: Option<i64>,
    /// Names of tensors as in models of Megatron's own layers, or of Transformer Engine's, with --format megatron or megatron-dist
    /// [default: local]
    #[arg(long, value_enum, value_name = "WHOSE")]
    transformer_impl: Option<TransformerImpl>,
    /// A tokenizer that goes along instead of the model's own; a padded vocabulary of Megatron's is cut to its size
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// Dtype of the tensors; the last three are for --format gguf only: blocks of 32 numbers share a scale [default: each
    /// unchanged, block formats as float32]
    #[arg(long, value_enum)]
    dtype: Option<As>,
    /// Maximum bytes of tensors in a file, such as 5GB or 500MiB, with --format hf [default: 5GB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    max_shard_size: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TargetFormat {
    /// Hugging Face: config.json and safetensors
    Hf,
    /// Meta: params.json and consolidated.NN.pth
    Meta,
    /// Megatron: a file for each rank (--ckpt-format torch)
    Megatron,
    /// Megatron: whole tensors, for any ranks (--ckpt-format torch_dist)
    MegatronDist,
    /// llama.cpp: one GGUF file
    Gguf,
    /// PEFT: adapter_config.json and adapter_model.safetensors, of an adapter alone
    Peft,
}

/// Megatron's argument of this name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TransformerImpl {
    /// Megatron's own layers
    Local,
    /// Transformer Engine's, Megatron's default
    #[value(name = "transformer_engine")]
    TransformerEngine,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OutputDtype {
    Float32,
    Bfloat16,
    Float16,
}

impl OutputDtype {
    /// As tch names it.
    pub(crate) fn kind(self) -> Kind {
        match self {
            OutputDtype::Float32 => Kind::Float,
            OutputDtype::Bfloat16 => Kind::BFloat16,
            OutputDtype::Float16 => Kind::Half,
        }
    }
}

/// What a conversion can write: a [`OutputDtype`], or blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum As {
    Float32,
    Bfloat16,
    Float16,
    #[value(name = "q8_0")]
    Q8,
    #[value(name = "q4_0")]
    Q4,
    #[value(name = "q4_1")]
    Q4WithMinimum,
}

impl As {
    fn stored(self) -> StoredAs {
        match self {
            As::Float32 => StoredAs::Kind(Kind::Float),
            As::Bfloat16 => StoredAs::Kind(Kind::BFloat16),
            As::Float16 => StoredAs::Kind(Kind::Half),
            As::Q8 => StoredAs::Blocks(gguf::GgufDtype::Q8_0),
            As::Q4 => StoredAs::Blocks(gguf::GgufDtype::Q4_0),
            As::Q4WithMinimum => StoredAs::Blocks(gguf::GgufDtype::Q4_1),
        }
    }

    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
    }
}

/// Converts, compares the result with the model, and prints what was written.
pub fn run(args: Args, device: Device) -> Result<()> {
    fitting(&args)?;
    let target = match args.format {
        TargetFormat::Peft => return adapter(&args),
        TargetFormat::Hf => {
            ConvertTarget::Hf { max_shard_size: args.max_shard_size.unwrap_or(5_000_000_000) }
        }
        TargetFormat::Meta => ConvertTarget::Meta { parts: args.model_parallel.unwrap_or(1) },
        TargetFormat::Gguf => ConvertTarget::Gguf,
        TargetFormat::Megatron | TargetFormat::MegatronDist => ConvertTarget::Megatron(MegatronForm {
            shared: args.format == TargetFormat::MegatronDist,
            tensor: args.tensor.unwrap_or(1),
            pipeline: args.pipeline.unwrap_or(1),
            vocab_multiple: args.make_vocab_size_divisible_by,
            engine: args.transformer_impl == Some(TransformerImpl::TransformerEngine),
        }),
    };
    let tokenizer = args.tokenizer.as_ref().map(Tokenizer::load).transpose()?;
    let weights = Weights::open_for(&args.from, tokenizer.as_ref().map(Tokenizer::vocab_size))?;
    if matches!(weights, Weights::Megatron(_)) {
        doubt_rotary_base(&args.from, weights.shape());
    }
    let from = weights.dirs().last().map_or_else(|| args.from.clone(), |dir| dir.to_path_buf());
    let conversion = Conversion::new(weights, target, args.dtype.map(As::stored), tokenizer, device)?;
    let (total, done) = (2 * conversion.bytes()?, Arc::default());
    let to = match target {
        ConvertTarget::Gguf if !gguf::is_gguf(&args.to) => args.to.join("model.gguf"),
        _ => args.to.clone(),
    };
    let report = with_bytes_bar("converting", total, &done, || conversion.write(&to, &done))?;
    println!(
        "{}: {} tensors, {} in {} file(s); copied: {}",
        to.display(),
        report.num_tensors,
        size(report.bytes),
        report.num_files,
        if report.copied.is_empty() { "nothing".into() } else { report.copied.join(", ") },
    );
    let rounded = match (args.dtype, report.rounding) {
        (Some(dtype), Some(_)) => format!(", converted to {}", dtype.name()),
        (None, Some(_)) => ", rounded as the file keeps it".to_string(),
        (_, None) => String::new(),
    };
    let compared = match report.left_out.as_slice() {
        [] => "every tensor equals".to_string(),
        _ => format!("the model's {} tensors equal", report.num_tensors),
    };
    println!(
        "checked: {compared} the source's{rounded}; logits of {} tokens in float32, largest difference: 0",
        report.num_tokens
    );
    if let [first, ..] = report.left_out.as_slice() {
        println!(
            "left out, and not compared: {} tensors that do not belong to the model, such as {first}",
            report.left_out.len()
        );
    }
    if let Some(difference) = report.rounding {
        println!("largest difference of a logit to the source as it is: {difference:.3e}");
    }
    if let Some(merged) = &report.merged {
        merge::tell(merged, &from);
    }
    if let Some(unread) = &report.unread {
        warn!("{unread}");
    }
    if report.loss == Some(GgufLimit::SpaceBefore) {
        warn!(
            "GGUF cannot say that this tokenizer puts no space before a text that begins with one, or after a special token: \
             llama.cpp reads such texts with one more space"
        );
    }
    if let Some(positions) = report.positions {
        warn!("Meta's format has no max_position_embeddings: readers assume {positions}");
    }
    if args.format == TargetFormat::Meta && !report.copied.iter().any(|name| name == "tokenizer.model") {
        warn!("{} has no tokenizer.model, which Meta's own programs need", args.from.display());
    }
    Ok(())
}

/// Warns of a base that Megatron's converters leave at its default, where models of such a vocabulary have others.
fn doubt_rotary_base(from: &Path, shape: &Shape) {
    if shape.rope_theta == 10000.0 && shape.vocab_size >= 100_000 {
        warn!(
            "{}: its args say rotary_base 10000, Megatron's default, which its converters do not set: if the model was trained \
             with another, correct rope_theta in config.json (Llama 3: 500000, Qwen 2: 1000000)",
            from.display()
        );
    }
}

/// Refuses options that do not go with the format.
fn fitting(args: &Args) -> Result<()> {
    use TargetFormat::{Gguf, Hf, Megatron, MegatronDist, Meta, Peft};
    let megatron = [Megatron, MegatronDist];
    let options: [(&str, bool, &[TargetFormat]); 7] = [
        ("--model-parallel", args.model_parallel.is_some(), &[Meta]),
        ("--max-shard-size", args.max_shard_size.is_some(), &[Hf]),
        ("--tensor", args.tensor.is_some(), &megatron),
        ("--pipeline", args.pipeline.is_some(), &megatron),
        ("--make-vocab-size-divisible-by", args.make_vocab_size_divisible_by.is_some(), &megatron),
        ("--transformer-impl", args.transformer_impl.is_some(), &megatron),
        ("--tokenizer", args.tokenizer.is_some(), &[Hf, Meta, Gguf, Megatron, MegatronDist]),
    ];
    let name = |format: &TargetFormat| {
        format.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
    };
    for (option, given, formats) in options {
        if given && !formats.contains(&args.format) {
            let hint = match (option, args.format) {
                ("--model-parallel", Megatron | MegatronDist) => "; Megatron's ranks are --tensor",
                ("--tensor", Meta) => "; Meta's parts are --model-parallel",
                (_, Peft) => "; an adapter is one file, and has no tokenizer",
                _ => "",
            };
            let formats: Vec<String> = formats.iter().map(name).collect();
            return Err(Error::config(format!("{option} goes with --format {}{hint}", formats.join(" or "))));
        }
    }
    Ok(())
}

/// Writes the adapter of a checkpoint, a run or another folder in PEFT's format.
fn adapter(args: &Args) -> Result<()> {
    let mut adapter = PeftAdapter::find(&args.from)?;
    let shape = adapter.shape(adapter.open_base()?.shape());
    let kind = match args.dtype.map(As::stored) {
        Some(StoredAs::Blocks(blocks)) => {
            return Err(Error::config(format!(
                "{blocks} goes with --format gguf; an adapter has no such blocks"
            )));
        }
        Some(StoredAs::Kind(kind)) => Some(kind),
        None => None,
    };
    let written = adapter.write(&args.to, &shape, kind)?;
    println!(
        "{}: an adapter for {}, {} tensors, {}; checked: every tensor equals the source's",
        args.to.display(),
        written.base,
        written.num_tensors,
        size(written.bytes)
    );
    Ok(())
}

/// Bytes: a number, with B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024).
pub fn parse_size(text: &str) -> Result<u64, String> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return Err(format!("`{unit}` is no unit of bytes: B, kB, MB, GB, TB, KiB, MiB, GiB, TiB")),
    };
    match number.parse::<f64>() {
        // Nobody means 24 bytes.
        Ok(n) if unit.is_empty() && n < 4096.0 => {
            Err(format!("give a unit of bytes: {text}GiB, {text}GB or {text}MiB"))
        }
        Ok(n) if n * factor >= 1.0 => Ok((n * factor) as u64),
        _ => Err("it must be a number of bytes, such as 5GB".into()),
    }
}
