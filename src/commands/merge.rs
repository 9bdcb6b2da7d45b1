//! `corral merge`: an adapter into its model.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tch::Device;

use crate::checkpoint::merge::{Merge, Merged};
use crate::checkpoint::{PeftAdapter, Weights};
use crate::commands::check::size;
use crate::commands::convert::{OutputDtype, parse_size};
use crate::config::trainable::BaseFormat;
use crate::error::{Error, Result};
use crate::telemetry::progress::with_bytes_bar;
use crate::warn;

/// `corral merge`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model that the adapter is for: a Hugging Face folder, a GGUF file, a folder in Meta's or Megatron's format, a run's folder, or a checkpoint
    /// [default: the one that the adapter names]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// The adapter: in PEFT's format, a run that trained it (its model/, else its best or newest checkpoint), or a checkpoint
    /// of one
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Folder for the merged model, in Hugging Face's format; a model in it is replaced
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Dtype of the tensors [default: each as it is in the model]
    #[arg(long, value_enum)]
    dtype: Option<OutputDtype>,
    /// Maximum bytes of tensors in a file, such as 5GB or 500MiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "5GB")]
    max_shard_size: u64,
}

/// Merges, compares the result with the model and its adapter, and prints what was written.
pub fn run(args: Args, device: Device) -> Result<()> {
    let adapter = PeftAdapter::find(&args.adapter)?;
    let base = args.model.as_deref().map_or_else(|| adapter.open_base(), Weights::open)?;
    let from = base.dir().to_path_buf();
    for read in [&from, adapter.dir()] {
        if let (Ok(a), Ok(b)) = (read.canonicalize(), args.output.canonicalize())
            && a == b
        {
            return Err(Error::config(format!("--output: {} is read for the merge", b.display())));
        }
    }
    let merge = Merge::new(base, adapter, args.dtype.map(OutputDtype::kind))?;
    let (total, done) = (merge.bytes()?, Arc::default());
    let report = with_bytes_bar("merging", total, &done, || {
        merge.write(&args.output, args.max_shard_size, device, &done)
    })?;
    println!(
        "{}: {} tensors, {} of them changed by the adapter; {} in {} file(s)",
        args.output.display(),
        report.num_tensors,
        report.num_merged,
        size(report.bytes),
        report.num_files
    );
    tell(&report, &from);
    Ok(())
}

/// Tells how far a merged model is from its adapter and the model in `from`.
pub fn tell(merged: &Merged, from: &Path) {
    if merged.base != BaseFormat::None {
        warn!(
            "the adapter was trained on weights in {}: it is merged into those weights, dequantized, not into those of {}",
            format!("{:?}", merged.base).to_lowercase(),
            from.display()
        );
    }
    let (tokens, distance) = (merged.num_tokens, merged.distance);
    match merged.scored {
        false => println!(
            "checked on {tokens} tokens in float32: KL(with adapter || merged) = {distance:.3e} nats a token"
        ),
        true => println!(
            "checked on {tokens} tokens in float32: values differ by {distance:.3e} on average from those with the adapter"
        ),
    }
}
