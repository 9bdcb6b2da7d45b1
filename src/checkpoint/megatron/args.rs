//! The arguments of the training that a checkpoint is of: what Megatron knows of a model's shape.

use std::collections::BTreeMap;

use crate::checkpoint::pickle::PickleNode;
use crate::config::shape::{Family, Head, Llama3RopeScaling, Shape};
use crate::error::{Error, Result};

/// A value of an argument.
#[derive(Debug, Clone, PartialEq)]
enum ArgValue {
    None,
    Integer(i64),
    Number(f64),
    Truth(bool),
    Text(String),
    /// What else it is, such as an object of a class.
    Other(String),
}

impl std::fmt::Display for ArgValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ArgValue::None => f.write_str("None"),
            ArgValue::Integer(i) => i.fmt(f),
            ArgValue::Number(x) => x.fmt(f),
            ArgValue::Truth(b) => f.write_str(if *b { "True" } else { "False" }),
            ArgValue::Text(text) | ArgValue::Other(text) => f.write_str(text),
        }
    }
}

/// The fields of `args`.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Args(BTreeMap<String, ArgValue>);

impl Args {
    /// Of an `argparse.Namespace`; none of anything else.
    pub fn read(args: PickleNode) -> Option<Args> {
        let value = |node: PickleNode| match (node.integer(), node.number(), node.truth(), node.text()) {
            _ if node.is_none() => ArgValue::None,
            (Some(i), ..) => ArgValue::Integer(i),
            (_, Some(x), ..) => ArgValue::Number(x),
            (_, _, Some(b), _) => ArgValue::Truth(b),
            (.., Some(text)) => ArgValue::Text(text.into()),
            _ => ArgValue::Other(node.describe()),
        };
        let fields = args.state()?.entries();
        Some(Args(fields.filter_map(|(key, node)| Some((key.text()?.to_string(), value(node)))).collect()))
    }

    fn get(&self, name: &str) -> Option<&ArgValue> {
        self.0.get(name).filter(|value| **value != ArgValue::None)
    }

    /// A whole number; `default` where it is not there or None.
    pub fn integer(&self, name: &str, default: Option<i64>) -> Result<i64> {
        match (self.get(name), default) {
            (Some(ArgValue::Integer(i)), _) if i.abs() <= i64::from(i32::MAX) => Ok(*i),
            (Some(other), _) => {
                Err(Error::data(format!("{name} is {other}; it must be an integer below 2^31")))
            }
            (None, Some(default)) => Ok(default),
            (None, None) => Err(Error::data(format!("{name} is missing"))),
        }
    }

    fn number(&self, name: &str, default: f64) -> Result<f64> {
        match self.get(name) {
            Some(ArgValue::Number(x)) => Ok(*x),
            Some(ArgValue::Integer(i)) => Ok(*i as f64),
            Some(other) => Err(Error::data(format!("{name} is {other}; it must be a number"))),
            None => Ok(default),
        }
    }

    fn truth(&self, name: &str, default: bool) -> Result<bool> {
        match self.get(name) {
            Some(ArgValue::Truth(b)) => Ok(*b),
            Some(other) => Err(Error::data(format!("{name} is {other}; it must be True or False"))),
            None => Ok(default),
        }
    }

    /// Refuses a value that means another model than is read here.
    fn only(&self, name: &str, wanted: ArgValue, missing: bool) -> Result<()> {
        match self.get(name) {
            Some(value) if *value != wanted => {
                Err(Error::data(format!("{name} is {value}: only models with {wanted} are read")))
            }
            None if missing => Err(Error::data(format!("{name} is missing; it must be {wanted}"))),
            _ => Ok(()),
        }
    }

    /// The shape of the model; `vocab_size`: the rows of its embedding, padding included.
    pub fn shape(&self, vocab_size: i64) -> Result<Shape> {
        let truth = ArgValue::Truth;
        self.only("swiglu", truth(true), true)?;
        self.only("normalization", ArgValue::Text("RMSNorm".into()), true)?;
        self.only("position_embedding_type", ArgValue::Text("rope".into()), false)?;
        let rotated = self.number("rotary_percent", 1.0)?;
        if rotated != 1.0 {
            return Err(Error::data(format!("rotary_percent is {rotated}: only models with 1 are read")));
        }
        self.only("expert_model_parallel_size", ArgValue::Integer(1), false)?;
        for name in [
            "add_bias_linear",
            "apply_layernorm_1p",
            "rotary_interleaved",
            "qk_layernorm",
            "multi_latent_attention",
        ] {
            self.only(name, truth(false), name == "add_bias_linear")?;
        }
        for name in ["num_experts", "window_size", "mtp_num_layers", "rotary_scaling_factor"] {
            if let Some(value) = self.get(name) {
                return Err(Error::data(format!("{name} is {value}: such models are not read")));
            }
        }
        let (hidden_size, heads) =
            (self.integer("hidden_size", None)?, self.integer("num_attention_heads", None)?);
        let kv_heads = match self.truth("group_query_attention", false)? {
            true => self.integer("num_query_groups", None)?,
            false => heads,
        };
        if hidden_size < 1 || heads < 1 || kv_heads < 1 {
            return Err(Error::data(
                "hidden_size, num_attention_heads and num_query_groups must be at least 1",
            ));
        }
        let scaled = self.truth("use_rope_scaling", false)?;
        let rope_scaling = Llama3RopeScaling {
            factor: self.number("rope_scaling_factor", 8.0)?,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        };
        let bias = self.truth("add_qkv_bias", false)?;
        let family = if bias { Family::Qwen2 } else { Family::Llama };
        let shape = Shape {
            family,
            head: Head::Lm,
            vocab_size,
            hidden_size,
            intermediate_size: self.integer("ffn_hidden_size", None)?,
            num_hidden_layers: self.integer("num_layers", None)?,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim: self.integer("kv_channels", Some(hidden_size / heads))?,
            max_position_embeddings: self.integer("max_position_embeddings", None)?,
            rms_norm_eps: self.number("norm_epsilon", 1e-5)?,
            rope_theta: self.number("rotary_base", 10000.0)?,
            rope_scaling: scaled.then_some(rope_scaling),
            tie_word_embeddings: !self.truth("untie_embeddings_and_output_weights", false)?,
            initializer_range: self.number("init_method_std", 0.02)?,
            sliding_window: None,
            max_window_layers: 0,
            experts: None,
            features: family.features(),
        };
        shape.check().map_err(|e| Error::data(e.message))?;
        Ok(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(more: &[(&str, ArgValue)]) -> Args {
        let integers = [
            ("hidden_size", 32),
            ("num_attention_heads", 4),
            ("ffn_hidden_size", 48),
            ("num_layers", 2),
            ("max_position_embeddings", 128),
        ];
        let mut fields: BTreeMap<String, ArgValue> =
            integers.map(|(name, i)| (name.to_string(), ArgValue::Integer(i))).into();
        fields.insert("swiglu".into(), ArgValue::Truth(true));
        fields.insert("add_bias_linear".into(), ArgValue::Truth(false));
        fields.insert("normalization".into(), ArgValue::Text("RMSNorm".into()));
        fields.extend(more.iter().map(|(name, value)| (name.to_string(), value.clone())));
        Args(fields)
    }

    /// What means another model is refused by its name; what says the same in another way is not.
    #[test]
    fn other_models_are_refused() {
        let same =
            [("rotary_percent", ArgValue::Integer(1)), ("expert_model_parallel_size", ArgValue::Integer(1))];
        assert_eq!(args(&same).shape(64).unwrap(), args(&[]).shape(64).unwrap());
        for (name, value) in [
            ("rotary_percent", ArgValue::Number(0.5)),
            ("expert_model_parallel_size", ArgValue::Integer(2)),
            ("num_experts", ArgValue::Integer(8)),
            ("qk_layernorm", ArgValue::Truth(true)),
            ("swiglu", ArgValue::Truth(false)),
            ("normalization", ArgValue::Text("LayerNorm".into())),
            ("hidden_size", ArgValue::Text("32".into())),
        ] {
            let e = args(&[(name, value)]).shape(64).unwrap_err();
            assert!(e.message.starts_with(name), "{e}");
        }
    }
}
