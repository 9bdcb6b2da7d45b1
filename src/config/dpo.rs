//! The configuration of `corral dpo`.

use std::path::PathBuf;

use super::algorithm::{Algorithm, BuiltInConfig, built_in};
use super::common::{Common, configuration, conflicts_of_pretrained};
use super::conflict::Conflicts;
use super::model::Model;
use super::preferences::PreferenceData;
use super::section::{choice, section};
use super::sections::{TokenizerSection, Valid};
use super::template_date::TemplateDate;
use super::trainable::{self, Freeze, Lora};

configuration! {
    /// Direct preference optimization; `train.batch_size` counts prompts.
    pub struct Dpo {
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
        dpo: DpoSection = DpoSection::default();
        /// The reference model. Default: the model's initial weights.
        reference: Option<ReferencePath> = None;
        /// Validation on `data.valid`.
        valid: Valid = Valid::default();
    }
}

section! {
    /// The loss of a pair of completions, and which pairs are formed.
    pub struct DpoSection {
        /// The loss function.
        loss: DpoLoss = DpoLoss::Sigmoid => Mathematics;
        /// How strongly the policy is held to the reference.
        beta: f64 = 0.1, POSITIVE => Mathematics;
        /// The probability that a pair's labels are swapped (`sigmoid`, `robust`), or the target share of the rejected completion
        /// (`exo_pair`).
        label_smoothing: f64 = 0.0, NOT_NEGATIVE => Mathematics;
        /// Weight of an additional cross-entropy on the best completions' tokens.
        sft_weight: f64 = 0.0, NOT_NEGATIVE => Mathematics;
        /// Which completions of a prompt are compared.
        pairs: ComparedPairs = ComparedPairs::All => Mathematics;
        /// How the reference's log-probabilities are computed.
        reference: ReferenceFrom = ReferenceFrom::Cached => Mathematics;
    }
}

choice! {
    /// The loss of a pair.
    pub enum DpoLoss {
        /// DPO (Rafailov et al. 2023); with `label_smoothing` cDPO (Mitchell 2023).
        Sigmoid = "sigmoid",
        /// DPO on means over tokens.
        SigmoidNorm = "sigmoid_norm",
        /// IPO (Azar et al. 2023) on means over tokens, as its authors do.
        Ipo = "ipo",
        /// IPO on sums over tokens.
        IpoSum = "ipo_sum",
        /// SLiC (Zhao et al. 2023).
        Hinge = "hinge",
        /// Unbiased if a share `label_smoothing` of the pairs has swapped labels (Chowdhury et al. 2024).
        Robust = "robust",
        /// APO-zero (D'Oosterlinck et al. 2024).
        ApoZero = "apo_zero",
        /// EXO (Ji et al. 2024).
        ExoPair = "exo_pair",
        /// NCA (Chen et al. 2024).
        NcaPair = "nca_pair",
        /// BCO (Jung et al. 2024) without its shift, as in TRL.
        BcoPair = "bco_pair",
        /// SPPO (Wu et al. 2024).
        SppoHard = "sppo_hard",
    }
}

choice! {
    /// Which completions of a prompt are compared.
    pub enum ComparedPairs {
        /// Each completion with every worse one; a prompt's loss is the mean.
        All = "all",
        /// The best with every worse one.
        Best = "best",
    }
}

choice! {
    /// How the reference's log-probabilities are computed.
    pub enum ReferenceFrom {
        /// Computed once before the training, and cached in `data.cache`.
        Cached = "cached",
        /// Computed in every step: by the model without its adapters, else by a frozen copy of it.
        Online = "online",
    }
}

section! {
    /// A frozen model.
    pub struct ReferencePath {
        /// Hugging Face folder, run folder, checkpoint of a run, adapter, or folder in Meta's or Megatron's format.
        path: PathBuf => Path;
    }
}

impl DpoSection {
    /// What does not fit.
    pub fn conflicts(&self, found: &mut Conflicts) {
        const KEY: &str = "dpo.label_smoothing";
        let smoothing = self.label_smoothing;
        match self.loss {
            DpoLoss::Sigmoid | DpoLoss::Robust if smoothing >= 0.5 => {
                found.add(KEY, "below 0.5: at most half of the pairs may be in the wrong order");
            }
            DpoLoss::ExoPair if !(smoothing > 0.0 && smoothing < 0.5) => {
                found.add(KEY, "exo_pair needs a number above 0 and below 0.5");
            }
            DpoLoss::Sigmoid | DpoLoss::Robust | DpoLoss::ExoPair => {}
            _ if smoothing > 0.0 => {
                found.add(KEY, "only sigmoid, robust and exo_pair have it; leave it out");
            }
            _ => {}
        }
    }
}

impl Algorithm for Dpo {
    const SUBCOMMAND: &'static str = "dpo";
    const BUILT_IN: &'static [BuiltInConfig] = built_in!("dpo": "default", "smollm2-hh", "ultrafeedback");

    fn common(&self) -> Common<'_> {
        self.sections()
    }

    fn template_date(&mut self) -> Option<&mut TemplateDate> {
        Some(&mut self.data.template_date)
    }

    fn conflicts(&self, world_size: i64, found: &mut Conflicts) {
        conflicts_of_pretrained(&self.model, self.tokenizer.as_ref(), &self.data.train, found);
        self.data.conflicts(self.lora.as_ref(), found);
        self.dpo.conflicts(found);
        self.common().conflicts(world_size, found);
        self.valid.conflicts(&self.data.valid, found);
        trainable::conflicts(&self.freeze, self.lora.as_ref(), self.precision.compute, found);
    }
}
