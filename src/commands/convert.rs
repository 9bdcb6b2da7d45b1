//! `corral convert`: a model into another format, dtype or number of parts.

use std::path::PathBuf;
use std::sync::Arc;

use clap::ValueEnum;
use tch::{Device, Kind};

use crate::checkpoint::convert::{Conversion, ConvertTarget, StoredAs};
use crate::checkpoint::{PeftAdapter, Weights};
use crate::commands::check::size;
use crate::commands::merge;
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
    /// llama.cpp: one GGUF file
    Gguf,
    /// PEFT: adapter_config.json and adapter_model.safetensors, of an adapter alone
    Peft,
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
    let target = match (args.format, args.model_parallel, args.max_shard_size) {
        (TargetFormat::Hf | TargetFormat::Peft | TargetFormat::Gguf, Some(_), _) => {
            return Err(Error::config(
                "--model-parallel goes with --format meta: other formats have no parts",
            ));
        }
        (TargetFormat::Meta, _, Some(_)) => {
            return Err(Error::config(
                "--max-shard-size goes with --format hf; the files of Meta's format are its model-parallel parts",
            ));
        }
        (TargetFormat::Peft, _, Some(_)) => {
            return Err(Error::config("--max-shard-size goes with --format hf; an adapter is one file"));
        }
        (TargetFormat::Gguf, _, Some(_)) => {
            return Err(Error::config("--max-shard-size goes with --format hf; a GGUF model is one file"));
        }
        (TargetFormat::Gguf, None, None) => ConvertTarget::Gguf,
        (TargetFormat::Peft, None, None) => return adapter(&args),
        (TargetFormat::Hf, None, most) => ConvertTarget::Hf { max_shard_size: most.unwrap_or(5_000_000_000) },
        (TargetFormat::Meta, parts, None) => ConvertTarget::Meta { parts: parts.unwrap_or(1) },
    };
    let weights = Weights::open(&args.from)?;
    let from = weights.dirs().last().map_or_else(|| args.from.clone(), |dir| dir.to_path_buf());
    let conversion = Conversion::new(weights, target, args.dtype.map(As::stored), device)?;
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
