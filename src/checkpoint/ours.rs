//! What neither Hugging Face's format nor PEFT's has a place for: `corral.json`, beside a model's `config.json`.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::hf_config::read_object;
use crate::config::reward::Score;
use crate::config::trainable::BaseFormat;
use crate::error::{Context, Error, Result};
use crate::files::{is_file, write_file};

pub const OURS: &str = "corral.json";

/// The file's contents.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ours {
    /// How the base of an adapter was kept in training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseFormat>,
    /// Of a reward model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward: Option<Scoring>,
}

/// How the values of a scalar head become a reward: gain * score + bias.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scoring {
    /// How the values of a completion's tokens become its score.
    #[serde(default)]
    pub score: Score,
    /// Multiplies the score; 1 where nothing was measured.
    #[serde(default = "one")]
    pub gain: f64,
    /// Added to it; 0 where nothing was measured.
    #[serde(default)]
    pub bias: f64,
    /// What gain and bias were measured on; none where they were not, and are 1 and 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
}

/// Scores before normalisation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// The files, and which of their completions.
    pub on: String,
    /// Completions that were scored.
    pub samples: u64,
    /// Of their scores.
    pub mean: f64,
    /// Of the sample (n - 1).
    pub std: f64,
}

fn one() -> f64 {
    1.0
}

impl Scoring {
    /// Not normalised.
    pub fn raw(score: Score) -> Scoring {
        Scoring { score, gain: 1.0, bias: 0.0, measured: None }
    }

    /// Normalised to mean 0 and standard deviation 1 on what was measured (Ziegler et al. 2019).
    pub fn normalized(score: Score, measured: Measured) -> Scoring {
        let gain = 1.0 / measured.std;
        Scoring { score, gain, bias: -gain * measured.mean, measured: Some(measured) }
    }

    /// The reward that a score is.
    pub fn reward(&self, score: f64) -> f64 {
        self.gain * score + self.bias
    }
}

impl Ours {
    /// What a model's folder says; nothing where there is no such file.
    pub fn read(dir: &Path) -> Result<Ours> {
        let path = dir.join(OURS);
        if !is_file(&path)? {
            return Ok(Ours::default());
        }
        let object = serde_json::Value::Object(read_object(&path)?);
        let ours: Ours =
            serde_json::from_value(object).map_err(|e| Error::data(e.to_string())).context(path.display())?;
        match &ours.reward {
            Some(r) if !(r.gain.is_finite() && r.gain > 0.0 && r.bias.is_finite()) => Err(Error::data(
                format!("{}: reward: gain must be a number above 0, and bias a number", path.display()),
            )),
            _ => Ok(ours),
        }
    }

    /// Writes the file, if there is anything to say.
    pub fn write(&self, dir: &Path) -> Result<()> {
        if *self == Ours::default() {
            return Ok(());
        }
        let text = serde_json::to_string_pretty(self).map_err(|e| Error::failed(format!("{OURS}: {e}")))?;
        write_file(&dir.join(OURS), format!("{text}\n").as_bytes())
    }
}
