//! The configuration of `corral kto`.

use super::algorithm::{Algorithm, BuiltInConfig, built_in};
use super::common::{Common, configuration, conflicts_of_pretrained};
use super::conflict::Conflicts;
use super::dpo::ReferencePath;
use super::model::Model;
use super::preferences::PreferenceData;
use super::section::{choice, section};
use super::sections::{TokenizerSection, Valid};
use super::template_date::TemplateDate;
use super::trainable::{self, Freeze, Lora};

configuration! {
    /// Kahneman-Tversky optimization; `train.batch_size` counts records.
    pub struct Kto {
        /// Where the model comes from.
        model: Model;
        /// The tokenizer, and how conversations are rendered.
        tokenizer: Option<TokenizerSection> = None;
        /// Training and validation data.
        data: PreferenceData;
        /// Parameters that are not trained.
        freeze: Freeze = Freeze::default();
        /// Adapters; without them the model itself is trained.
        lora: Option<Lora> = None;
        /// The loss.
        kto: KtoSection = KtoSection::default();
        /// The reference model. Default: the model's initial weights.
        reference: Option<ReferencePath> = None;
        /// Validation on `data.valid`.
        valid: Valid = Valid::default();
    }
}

section! {
    /// The loss of a completion that is labelled good or bad.
    pub struct KtoSection {
        /// The loss function.
        loss: KtoLoss = KtoLoss::Kto => Mathematics;
        /// How strongly the policy is held to the reference.
        beta: f64 = 0.1, POSITIVE => Mathematics;
        /// The weight of good completions; weight times number should be similar for good and bad ones.
        desirable_weight: f64 = 1.0, NOT_NEGATIVE => Mathematics;
        /// The weight of bad completions.
        undesirable_weight: f64 = 1.0, NOT_NEGATIVE => Mathematics;
    }
}

choice! {
    /// The loss of a completion.
    pub enum KtoLoss {
        /// KTO (Ethayarajh et al. 2024): rewards are compared with the KL to the reference.
        Kto = "kto",
        /// APO-zero of unpaired completions (D'Oosterlinck et al. 2024): rewards are compared with 0.
        ApoZeroUnpaired = "apo_zero_unpaired",
    }
}

impl Algorithm for Kto {
    const SUBCOMMAND: &'static str = "kto";
    const BUILT_IN: &'static [BuiltInConfig] = built_in!("kto": "default", "smollm2-hh");

    fn common(&self) -> Common<'_> {
        self.sections()
    }

    fn template_date(&mut self) -> Option<&mut TemplateDate> {
        Some(&mut self.data.template_date)
    }

    fn conflicts(&self, world_size: i64, found: &mut Conflicts) {
        if self.kto.loss == KtoLoss::Kto && self.train.batch_size < 2 {
            let why = "must be at least 2: the KL is estimated on prompts with the completion of another record of the step";
            found.add("train.batch_size", why);
        }
        if self.kto.desirable_weight == 0.0 && self.kto.undesirable_weight == 0.0 {
            let why = "one of kto.desirable_weight and kto.undesirable_weight must be above 0";
            found.add("kto.desirable_weight", why);
        }
        conflicts_of_pretrained(&self.model, self.tokenizer.as_ref(), &self.data.train, found);
        self.data.conflicts(self.lora.as_ref(), found);
        self.common().conflicts(world_size, found);
        self.valid.conflicts(&self.data.valid, found);
        trainable::conflicts(&self.freeze, self.lora.as_ref(), self.precision.compute, found);
    }
}
