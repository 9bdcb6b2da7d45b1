//! The configuration of `corral online-dpo`.

use super::algorithm::{Algorithm, BuiltInConfig, built_in};
use super::common::Common;
use super::conflict::Conflicts;
use super::dpo::{self, ComparedPairs, DpoLoss, ReferenceFrom};
use super::grpo::{Truncated, samples};
use super::policy::policy_configuration;
use super::rewards::RewardTerm;
use super::section::section;
use super::sft::PromptSamples;
use super::template_date::TemplateDate;

policy_configuration! {
    /// DPO on the model's own responses; `train.batch_size` counts prompts per iteration, `train.steps` counts iterations.
    pub struct OnlineDpo {
        /// The loss, and which responses are compared.
        dpo: OnlineDpoSection = OnlineDpoSection::default();
        /// Responses that are written to samples.jsonl and TensorBoard.
        samples: PromptSamples = samples();
    }
}

section! {
    /// The loss of a pair of responses, and which pairs are formed.
    pub struct OnlineDpoSection {
        /// The loss function, as in `corral dpo`.
        loss: DpoLoss = DpoLoss::Sigmoid => Mathematics;
        /// How strongly the policy is held to the reference.
        beta: f64 = 0.1, POSITIVE => Mathematics;
        /// Label smoothing, as in `corral dpo`.
        label_smoothing: f64 = 0.0, NOT_NEGATIVE => Mathematics;
        /// Responses to each prompt; the best and the worst form a pair.
        group_size: i64 = 2, COUNT => Mathematics;
        /// Treatment of truncated responses (without a stop token).
        truncated: Truncated = Truncated::Keep => Mathematics;
        /// The penalty that `truncated: penalize` subtracts from the reward.
        truncated_penalty: f64 = 1.0, NOT_NEGATIVE => Mathematics;
        /// A reference that follows the policy (Gorbatovski et al. 2024); none: it is fixed.
        moving_reference: Option<MovingReference> = None;
    }
}

section! {
    /// How the reference follows the policy.
    pub struct MovingReference {
        /// Iterations between updates of the reference.
        every: i64, COUNT => Mathematics;
        /// The weight of the policy in an update; 1: the reference becomes the policy.
        rate: f64, RATIO => Mathematics;
    }
}

impl OnlineDpoSection {
    /// The loss of a pair.
    pub fn of_pairs(&self) -> dpo::DpoSection {
        dpo::DpoSection {
            loss: self.loss,
            beta: self.beta,
            label_smoothing: self.label_smoothing,
            sft_weight: 0.0,
            pairs: ComparedPairs::All,
            reference: ReferenceFrom::Online,
        }
    }
}

impl OnlineDpo {
    /// What responses are rewarded for.
    pub fn rewards(&self) -> Vec<RewardTerm> {
        self.rewards.clone()
    }
}

impl Algorithm for OnlineDpo {
    const SUBCOMMAND: &'static str = "online-dpo";
    const MODEL: &'static str = "actor";
    const BUILT_IN: &'static [BuiltInConfig] = built_in!("online_dpo": "default");

    fn common(&self) -> Common<'_> {
        self.sections()
    }

    fn template_date(&mut self) -> Option<&mut TemplateDate> {
        Some(&mut self.data.template_date)
    }

    fn conflicts(&self, world_size: i64, found: &mut Conflicts) {
        if self.dpo.group_size < 2 {
            found.add("dpo.group_size", "a pair takes 2 responses at least");
        }
        if self.dpo.moving_reference.is_some() && self.reference.is_some() {
            let why =
                "the moving reference begins as the actor; leave out reference, or dpo.moving_reference";
            found.add("reference", why);
        }
        self.dpo.of_pairs().conflicts(found);
        self.sections_of_responses().conflicts(world_size, found);
        self.valid.conflicts(&self.data.valid, found);
    }
}
