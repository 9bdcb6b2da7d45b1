//! What an algorithm tells the commands: [`Recipe`] is all that one must be for `corral NAME`, `corral check NAME` and
//! `corral plan NAME` to know it. It is written for the algorithm's configuration; the list of all is
//! `commands/recipes.rs`.

use crate::algorithms::base::Base;
use crate::algorithms::rl::policy::Samplers;
use crate::algorithms::run::Start;
use crate::config::parallel::Parallel;
use crate::config::shape::Shape;
use crate::config::{Algorithm, Loaded};
use crate::data::chat::Chat;
use crate::data::loader::Loader;
use crate::data::rows::RowLoader;
use crate::data::tokenizer::Tokenizer;
use crate::distributed::agreement::Facts;
use crate::distributed::world::World;
use crate::error::Result;
use crate::model::Trainable;
use crate::plan::{MemoryPlan, PlanTarget};

/// An algorithm that trains models.
pub trait Recipe: Algorithm {
    /// What it does, in a line of `corral --help`.
    const ABOUT: &'static str;

    /// The flags of `corral plan` that mean something for it, of those that not all have.
    const PLAN_FLAGS: &'static [&'static str] = &[];

    /// What a run reads before any rank talks to another: files are checked and tokenized, and errors told, before a group
    /// could hang.
    type Inputs;

    /// Opens, checks and tokenizes all that the configuration names.
    fn open(&self) -> Result<Self::Inputs>;

    /// Adds fingerprints of all that was opened, which all ranks must have alike: models, tokenizers, data.
    fn add_facts(inputs: &Self::Inputs, facts: &mut Facts) -> Result<()>;

    /// Runs the training that `loaded` describes, in `world`. Collective.
    fn train(loaded: &Loaded<Self>, inputs: Self::Inputs, world: &World, start: &Start) -> Result<()>;

    /// The models that are trained: name in the run, shape, and what of it.
    fn trained(inputs: &Self::Inputs) -> Vec<(&'static str, &Shape, &Trainable)>;

    /// How ranks divide a model that is trained, by its name in the run.
    fn parallel_of(&self, _model: &str) -> Parallel {
        self.common().parallel.clone()
    }

    /// References and reward models that lie over the run's ranks, by their sections.
    fn frozen_models<'a>(&self, _inputs: &'a Self::Inputs) -> Vec<(&'static str, &'a Base)> {
        Vec::new()
    }

    /// The steps of a run over these data.
    fn steps(inputs: &Self::Inputs) -> u64;

    /// What the training data are, in a line.
    fn data_line(&self, inputs: &Self::Inputs) -> String;

    /// The training data, for `corral check` to show.
    fn shown<'a>(&self, inputs: &'a Self::Inputs) -> Shown<'a>;

    /// Whether a model's path is the name of a preset, which has a shape and no weights: it can be planned, not opened.
    fn names_preset(&self) -> bool {
        false
    }

    /// The models of a run, and what they take of memory.
    fn plan(&self, target: &PlanTarget) -> Result<MemoryPlan>;
}

/// Training data as `corral check` shows them.
pub enum Shown<'a> {
    /// Windows of token shards.
    Windows { train: &'a Loader, valid: Option<&'a Loader>, tokenizer: &'a Tokenizer },
    /// Examples of at most `longest` tokens.
    Examples { train: &'a RowLoader, valid: Option<&'a RowLoader>, chat: &'a Chat, longest: i64 },
    /// Prompts that the model answers.
    Prompts(&'a Samplers),
}
