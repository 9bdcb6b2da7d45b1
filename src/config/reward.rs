//! The configuration of `corral reward`.

use std::path::PathBuf;

use super::algorithm::{Algorithm, BuiltInConfig, built_in};
use super::common::{Common, configuration, conflicts_of_inputs};
use super::conflict::Conflicts;
use super::model::Model;
use super::preferences::PreferenceData;
use super::section::{choice, section};
use super::sections::{TokenizerSection, Valid};
use super::template_date::TemplateDate;
use super::trainable::{self, Freeze, Lora};

configuration! {
    /// Reward models from ranked completions; `train.batch_size` and `train.micro_batch_size` count prompts, each with all of its
    /// completions.
    pub struct Reward {
        /// Where the model comes from.
        model: Model;
        /// The tokenizer, and how conversations are rendered.
        tokenizer: Option<TokenizerSection> = None;
        /// Training and validation data.
        data: PreferenceData;
        /// The loss, the score and its normalisation.
        reward: RewardSection = RewardSection::default();
        /// Parameters that are not trained.
        freeze: Freeze = Freeze::default();
        /// Adapters; without them the model itself is trained. The head is trained in either case.
        lora: Option<Lora> = None;
        /// Validation on `data.valid`.
        valid: Valid = Valid::default();
    }
}

section! {
    /// The loss, the score and its normalisation.
    pub struct RewardSection {
        /// The loss on ranked completions.
        loss: RewardLoss = RewardLoss::Pairs => Mathematics;
        /// How token values become a score. Default: as in the model, if it is a reward model; else `last`.
        score: Option<Score> = None => Mathematics;
        /// How much higher the better score must be (loss `pairs`).
        margin: f64 = 0.0, NOT_NEGATIVE => Mathematics;
        /// Weight of the squared sum of each compared pair's scores, which keeps scores around 0.
        center: f64 = 0.0, NOT_NEGATIVE => Mathematics;
        /// Standard deviation of a new head's weights. Default: 1 / sqrt(hidden_size + 1).
        init_std: Option<f64> = None, NOT_NEGATIVE => Mathematics;
        /// Data on which scores are normalised after the training.
        normalize: Normalize = Normalize::default();
    }
}

choice! {
    /// The loss on ranked completions.
    pub enum RewardLoss {
        /// In every pair of different rank the better completion gets the higher score.
        Pairs = "pairs",
        /// The best has the highest score.
        Best = "best",
        /// The scores are in the order of the ranking.
        Order = "order",
    }
}

choice! {
    /// How token values become the score of a completion.
    pub enum Score {
        /// The value of the last token, as in transformers.
        Last = "last",
        /// The sum over the completion's tokens.
        Sum = "sum",
        /// The mean over the completion's tokens.
        Mean = "mean",
    }
}

section! {
    /// Data on which the trained model's scores are measured, to normalise them to mean 0 and standard deviation 1.
    pub struct Normalize {
        /// Number of completions to score, from the first; 0: no normalisation.
        samples: u64 = 1000 => Output;
        /// Files of conversations or of ranked completions. Default: the validation data, else the training data.
        data: Vec<PathBuf> = Vec::new() => Output;
        /// Which ranked completions are scored.
        of: Which = Which::All => Output;
    }
}

choice! {
    /// Which of ranked completions.
    pub enum Which {
        /// All of them.
        All = "all",
        /// Those of the best rank.
        Best = "best",
    }
}

impl Algorithm for Reward {
    const SUBCOMMAND: &'static str = "reward";
    const BUILT_IN: &'static [BuiltInConfig] = built_in!("reward": "default", "gsm8k", "smollm2-hh");

    fn common(&self) -> Common<'_> {
        self.sections()
    }

    fn template_date(&mut self) -> Option<&mut TemplateDate> {
        Some(&mut self.data.template_date)
    }

    fn conflicts(&self, world_size: i64, found: &mut Conflicts) {
        if self.reward.margin > 0.0 && self.reward.loss != RewardLoss::Pairs {
            found.add("reward.margin", "only the loss `pairs` has a margin");
        }
        if self.reward.normalize.samples == 1 {
            found.add("reward.normalize.samples", "one score has no standard deviation");
        }
        conflicts_of_inputs(&self.model, self.tokenizer.as_ref(), &self.data.train, found);
        self.data.conflicts(self.lora.as_ref(), found);
        self.valid.conflicts(&self.data.valid, found);
        trainable::conflicts(&self.freeze, self.lora.as_ref(), self.precision.compute, found);
        self.common().conflicts(world_size, found);
    }
}
