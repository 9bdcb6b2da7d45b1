//! What `generate`, `chat`, `score` and `eval` share: a model that is opened before the ranks meet, and loaded after.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tch::Device;

use crate::checkpoint::{Scoring, Weights};
use crate::commands::Global;
use crate::config::parallel::Parallel;
use crate::config::sections::Compute;
use crate::config::shape::Shape;
use crate::config::template_date::TemplateDate;
use crate::data::chat::{self, Chat};
use crate::data::tokenizer::Tokenizer;
use crate::distributed::environment::RankEnvironment;
use crate::distributed::mesh::Sharding;
use crate::distributed::sharded::Sharded;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::files::{self, identity};
use crate::model::compute_kind;
use crate::model::cuts::cut_for;
use crate::model::{Llama, Trainable};
use crate::{detail, warn};

/// How long ranks wait for each other: longer than any of them reads weights, or computes between two exchanges.
const TIMEOUT_S: f64 = 1800.0;

#[derive(Debug, clap::Args)]
pub struct ModelArgs {
    /// The model: a Hugging Face folder, a GGUF file, a folder in Meta's or Megatron's format, an adapter, a run's folder, a checkpoint, or a
    /// name that `corral get` fetched
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Compute dtype [default: float32 on a CPU, bfloat16 on a GPU]
    #[arg(long, value_enum)]
    pub dtype: Option<Compute>,
}

/// How the ranks of a `launch` hold the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Spread {
    /// A full copy on each rank (with --tensor on each of its groups), which computes on its own
    Replicate,
    /// A part on each rank, as in training; a block is gathered when it is used
    Full,
}

#[derive(Debug, Clone, Copy, clap::Args)]
pub struct RanksArgs {
    /// How the ranks of `launch` hold the model; either way they divide the input among themselves (see --tensor)
    #[arg(long, value_enum, default_value = "replicate")]
    pub mode: Spread,
    /// Neighbouring ranks that share every matrix and have the same input (tensor parallelism)
    #[arg(long, value_name = "RANKS", default_value_t = 1, value_parser = clap::value_parser!(i64).range(1..))]
    pub tensor: i64,
}

impl RanksArgs {
    /// A copy on each rank.
    pub const REPLICATE: RanksArgs = RanksArgs { mode: Spread::Replicate, tensor: 1 };
}

#[derive(Debug, clap::Args)]
pub struct TemplateArgs {
    /// The chat template to use instead of the model's: the name of a built-in one, a file, or Jinja itself
    #[arg(long, value_name = "NAME|FILE")]
    pub chat_template: Option<String>,
    /// The date for the chat template, if it asks for one [default: today's]
    #[arg(long, value_name = "YYYY-MM-DD")]
    pub template_date: Option<TemplateDate>,
}

/// A model of which only headers were read, and its tokenizer.
pub struct OpenedModel {
    weights: Weights,
    dtype: Option<Compute>,
    tokenizer: Option<Tokenizer>,
}

impl ModelArgs {
    /// A model with an LM head.
    pub fn open(&self) -> Result<OpenedModel> {
        let opened = self.open_any()?;
        opened.shape().predicts().map_err(|e| e.context(opened.dir().display()))?;
        Ok(opened)
    }

    /// Another model with an LM head, computed with in the same dtype.
    pub fn open_beside(&self, model: &Path) -> Result<OpenedModel> {
        ModelArgs { model: model.to_path_buf(), dtype: self.dtype }.open()
    }

    /// A model with either head.
    pub fn open_any(&self) -> Result<OpenedModel> {
        let weights = Weights::open(&self.model)?;
        let tokenizer = weights.tokenizer_dir()?.map(Tokenizer::load).transpose()?;
        if let Some(tokenizer) = &tokenizer {
            tokenizer.check_fits(weights.shape().vocab_size)?;
        }
        Ok(OpenedModel { weights, dtype: self.dtype, tokenizer })
    }
}

impl OpenedModel {
    pub fn shape(&self) -> &Shape {
        self.weights.shape()
    }

    /// Of a model with a scalar head.
    pub fn scoring(&self) -> Result<Option<Scoring>> {
        self.weights.scoring()
    }

    pub fn dir(&self) -> &Path {
        self.weights.dir()
    }

    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            Error::data(format!(
                "{}: the model has no tokenizer; put its tokenizer's files there",
                self.dir().display()
            ))
        })
    }

    /// The chat template that was asked for, else the model's own.
    ///
    /// # Errors
    /// There is none; the names of the built-in ones are told.
    pub fn chat(&self, args: &TemplateArgs) -> Result<Chat> {
        let tokenizer = self.tokenizer()?;
        let dated = |tokenizer: &Tokenizer| match args.template_date {
            None => tokenizer.clone(),
            Some(date) => {
                let dated = tokenizer.clone().with_template_date(date);
                if dated.told_date().is_none() {
                    warn!("--template-date {} is not used: the chat template asks for no date", date.date);
                }
                dated
            }
        };
        match &args.chat_template {
            Some(what) => Chat::new(&dated(&chat::with_chat_template(tokenizer.clone(), what)?)),
            None if tokenizer.chat_template().is_none() => Err(Error::config(format!(
                "{}: the model has no chat template; choose one with --chat-template: {}, or a file with one",
                self.dir().display(),
                chat::built_in_names()
            ))),
            None => Chat::new(&dated(tokenizer)),
        }
    }

    /// The tokens that end a sequence: the tokenizer's, those of generation_config.json and of config.json.
    pub fn eos_ids(&self) -> Result<Vec<i64>> {
        let mut ids: Vec<i64> =
            self.tokenizer.iter().flat_map(|t| t.eos_ids()).map(|id| i64::from(*id)).collect();
        for dir in self.weights.dirs() {
            for name in ["generation_config.json", "config.json"] {
                ids.extend(eos_of(&dir.join(name))?);
            }
        }
        // Such as -1, which says that there is none.
        ids.retain(|id| (0..self.shape().vocab_size).contains(id));
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// Loads the model, each rank what it holds. A collective call.
    pub fn load(&self, world: &World, ranks: RanksArgs) -> Result<Llama> {
        let on_cpu = if world.device == Device::Cpu { Compute::Float32 } else { Compute::Bfloat16 };
        let compute = match self.dtype {
            Some(Compute::Float8) => {
                return Err(Error::config("--dtype float8: 8-bit floats are for training; choose bfloat16"));
            }
            other => compute_kind(other.unwrap_or(on_cpu)),
        };
        let (data, tensor) = (world.mesh.data.group.clone(), world.mesh.tensor.clone());
        let sharding = match ranks.mode {
            Spread::Replicate => Sharding::replicated(data),
            Spread::Full => Sharding::over(data),
        };
        let sharding = Sharding { tensor, sequence: true, ..sharding };
        let shape = self.shape().clone();
        let plans = match self.weights.lora() {
            Some(trainable) => trainable.plans_for_inference(&shape)?,
            None => Trainable::default().plans_for_inference(&shape)?,
        };
        let plans = cut_for(plans, &shape, &sharding)
            .map_err(|e| Error::config(format!("--tensor: {}", e.message)))?;
        let mut params = Sharded::new(plans, sharding, compute, world.device);
        self.weights.fill(&mut params)?;
        Ok(Llama::new(shape, params))
    }
}

/// Meets the other ranks, which must have the same model and inputs: what can be refused must have been refused before.
pub fn join(global: &Global, opened: &OpenedModel, ranks: RanksArgs) -> Result<World> {
    join_with(global, &[("--model", opened)], ranks)
}

/// [`join`] with several models, each with the option that names it.
pub fn join_with(global: &Global, models: &[(&str, &OpenedModel)], ranks: RanksArgs) -> Result<World> {
    let mut facts = global.facts();
    let world_size = RankEnvironment::from_env()?.map_or(1, |place| place.world_size);
    if world_size % ranks.tensor != 0 {
        let why = format!("--tensor {}: it must divide the number of ranks, {world_size}", ranks.tensor);
        return Err(Error::config(why));
    }
    if world_size > 1 {
        for (option, opened) in models {
            facts.add_contents(option, &opened.weights.identity()?);
        }
        for path in global.inputs() {
            facts.add_contents("--input", &identity(Path::new(path))?);
        }
    }
    let parallel = Parallel { timeout_s: TIMEOUT_S, tensor: ranks.tensor, ..Parallel::default() };
    let world = World::from_global(global.backend.as_deref(), global.device.as_deref(), &parallel, &facts)?;
    detail!("{}", world.choice);
    Ok(world)
}

/// `eos_token_id` of a JSON file: a number, a list, or none; a file may be missing.
fn eos_of(path: &Path) -> Result<Vec<i64>> {
    if !files::exists(path)? {
        return Ok(Vec::new());
    }
    let bytes = std::fs::read(path).map_err(|e| files::read_error(path, &e))?;
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
