//! What `generate`, `score` and `eval` share: a model on one device, and its tokenizer.

use std::path::{Path, PathBuf};

use kernels::c10d::Group;
use serde_json::Value;
use tch::Device;

use crate::algorithms::pretrain::compute_kind;
use crate::checkpoint::Weights;
use crate::config::sections::Compute;
use crate::data::tokenizer::Tokenizer;
use crate::distributed::sharded::Sharded;
use crate::error::{Error, Result};
use crate::model::{Llama, layout};

#[derive(Debug, clap::Args)]
pub struct ModelArgs {
    /// The model: a Hugging Face folder, a run's folder, or a checkpoint
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// What to compute in [default: float32 on a CPU, bfloat16 on a GPU]
    #[arg(long, value_enum)]
    pub dtype: Option<Compute>,
}

/// A model that is ready to compute.
pub struct Inference {
    pub model: Llama,
    dir: PathBuf,
    tokenizer: Option<Tokenizer>,
}

impl ModelArgs {
    /// Loads the model, and its tokenizer where it has one.
    pub fn load(&self, device: Device) -> Result<Inference> {
        let ranks = std::env::var("WORLD_SIZE").ok().and_then(|n| n.parse::<i64>().ok()).unwrap_or(1);
        if ranks > 1 {
            return Err(Error::config(format!(
                "this command runs as one process, and {ranks} were started: several are not built yet; start it \
                 without `launch`, or with --nproc 1"
            )));
        }
        let on_cpu = if device == Device::Cpu { Compute::Float32 } else { Compute::Bfloat16 };
        let compute = compute_kind(self.dtype.unwrap_or(on_cpu));
        let weights = Weights::open(&self.model)?;
        let shape = weights.shape().clone();
        let mut params = Sharded::new(layout::layouts(&shape), Group::solo(), Group::solo(), compute, device);
        weights.fill(&mut params)?;
        let tokenizer = weights.tokenizer_dir().map(Tokenizer::load).transpose()?;
        if let Some(tokenizer) = &tokenizer {
            tokenizer.check_fits(shape.vocab_size)?;
        }
        Ok(Inference { model: Llama::new(shape, params), dir: weights.dir().to_path_buf(), tokenizer })
    }
}

impl Inference {
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            Error::data(format!(
                "{}: the model has no tokenizer; put its tokenizer's files there",
                self.dir.display()
            ))
        })
    }

    /// The tokens that end a sequence: the tokenizer's, those of generation_config.json and of config.json.
    pub fn eos_ids(&self) -> Result<Vec<i64>> {
        let mut ids: Vec<i64> =
            self.tokenizer.iter().flat_map(|t| t.eos_ids()).map(|id| i64::from(*id)).collect();
        for name in ["generation_config.json", "config.json"] {
            ids.extend(eos_of(&self.dir.join(name))?);
        }
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }
}

/// `eos_token_id` of a JSON file: a number, a list, or none; a file may be missing.
fn eos_of(path: &Path) -> Result<Vec<i64>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::data(format!("cannot read {}: {e}", path.display()))),
    };
    let json: Value = serde_json::from_slice(&bytes)
        .map_err(|e| Error::data(format!("{}: not valid JSON: {e}", path.display())))?;
    let ids = match &json["eos_token_id"] {
        Value::Null => Some(Vec::new()),
        Value::Array(list) => list.iter().map(Value::as_i64).collect(),
        single => single.as_i64().map(|id| vec![id]),
    };
    ids.ok_or_else(|| {
        Error::data(format!("{}: eos_token_id is no token id, nor a list of them", path.display()))
    })
}

/// Token ids as the tokenizer gives them, as the model takes them; with what it adds, BOS is there once.
pub fn encode(tokenizer: &Tokenizer, text: &str, add_special: bool) -> Result<Vec<i64>> {
    let ids = if add_special { tokenizer.encode_prompt(text) } else { tokenizer.encode(text, false) };
    Ok(ids?.into_iter().map(i64::from).collect())
}

/// A bar on stderr, if that is a terminal, of `total` `unit`s.
pub fn bar(total: u64, unit: &str) -> indicatif::ProgressBar {
    let bar = indicatif::ProgressBar::new(total);
    match indicatif::ProgressStyle::with_template(&format!("{{wide_bar}} {{pos}}/{{len}} {unit} {{eta}}")) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
