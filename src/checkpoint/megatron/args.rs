//! The arguments of the training that a checkpoint is of: what Megatron knows of a model's shape.

use std::collections::BTreeMap;

use super::names::VocabRows;
use crate::checkpoint::pickle::PickleNode;
use crate::config::shape::{Experts, Family, Head, Llama3RopeScaling, Shape};
use crate::error::{Error, Result};

/// A value of an argument.
#[derive(Debug, Clone, PartialEq)]
enum ArgValue {
    None,
    Integer(i64),
    Number(f64),
    Truth(bool),
    Text(String),
    /// A tuple or a list of them.
    Integers(Vec<i64>),
    /// Something else, such as an object of a class, described.
    Other(String),
}

impl std::fmt::Display for ArgValue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ArgValue::None => f.write_str("None"),
            ArgValue::Integer(i) => i.fmt(f),
            ArgValue::Number(x) => x.fmt(f),
            ArgValue::Truth(b) => f.write_str(if *b { "True" } else { "False" }),
            ArgValue::Integers(integers) => write!(f, "{integers:?}"),
            ArgValue::Text(text) | ArgValue::Other(text) => f.write_str(text),
        }
    }
}

/// Numbers of a list, and bytes of a text, that any argument here needs.
const MOST: usize = 512;

/// The fields of `args`.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Args(BTreeMap<String, ArgValue>);

impl Args {
    /// Of an `argparse.Namespace`; none of anything else.
    pub fn read(args: PickleNode) -> Option<Args> {
        let integers = |node: PickleNode| {
            let integers: Option<Vec<i64>> = node.items().take(MOST + 1).map(PickleNode::integer).collect();
            integers.filter(|integers| !integers.is_empty() && integers.len() <= MOST)
        };
        let value = |node: PickleNode| match (node.integer(), node.number(), node.truth(), node.text()) {
            _ if node.is_none() => ArgValue::None,
            (Some(i), ..) => ArgValue::Integer(i),
            (_, Some(x), ..) => ArgValue::Number(x),
            (_, _, Some(b), _) => ArgValue::Truth(b),
            (.., Some(text)) if text.len() <= MOST => ArgValue::Text(text.into()),
            _ => integers(node).map_or_else(|| ArgValue::Other(node.describe()), ArgValue::Integers),
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
            (Some(ArgValue::Integer(i)), _) if i.unsigned_abs() <= i32::MAX as u64 => Ok(*i),
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

    /// Refuses ranks that divide the experts otherwise than tensor parallelism divides the rest. Converters leave other values in the
    /// args of models without experts.
    pub fn divided_by_tensor_alone(&self) -> Result<()> {
        if self.get("num_experts").is_none() {
            return Ok(());
        }
        let only = || {
            self.only("expert_model_parallel_size", ArgValue::Integer(1), false)?;
            let tensor = self.integer("tensor_model_parallel_size", None)?;
            self.only("expert_tensor_parallel_size", ArgValue::Integer(tensor), false)
        };
        only().map_err(|e| Error::data(format!("{}; the format torch_dist is read with any", e.message)))
    }

    /// The size of the vocabulary without padding, of which the tensors have `rows`: the one that is stated, else the tokenizer's, where
    /// padding it gives these rows; else all of them. Converters state sizes of other tokenizers, and users too small ones: no token
    /// of a tokenizer that is known is cut.
    pub fn vocab_size(&self, rows: VocabRows, tokenizer: Option<usize>) -> Result<i64> {
        let least = rows.embedding.min(rows.head);
        let ranks = self.integer("tensor_model_parallel_size", Some(1))?;
        let multiple = self.integer("make_vocab_size_divisible_by", Some(128))?.saturating_mul(ranks);
        let padded = |size: i64| size.saturating_add(multiple - 1) / multiple * multiple;
        let explains = |size: &i64| {
            let to_rows = *size == rows.embedding || multiple >= 1 && padded(*size) == rows.embedding;
            (1..=least).contains(size) && to_rows
        };
        let tokenizer = tokenizer.and_then(|size| i64::try_from(size).ok());
        // This tokenizer adds a token of its own to the size that is stated.
        let adds = self.get("tokenizer_type") == Some(&ArgValue::Text("NullTokenizer".into()));
        let stated = match self.get("vocab_size") {
            Some(ArgValue::Integer(size)) if !adds => Some(*size),
            _ => None,
        };
        let stated = stated.filter(|size| tokenizer.is_none_or(|tokens| tokens <= *size));
        Ok(stated.filter(explains).or(tokenizer.filter(explains)).unwrap_or(least))
    }

    /// Refuses what computes something else than the models that are read here.
    fn known_mathematics(&self) -> Result<()> {
        let (truth, text) = (ArgValue::Truth, |text: &str| ArgValue::Text(text.into()));
        self.only("swiglu", truth(true), true)?;
        self.only("normalization", text("RMSNorm"), true)?;
        self.only("position_embedding_type", text("rope"), false)?;
        for name in ["rotary_percent", "rotary_seq_len_interpolation_factor"] {
            let x = self.number(name, 1.0)?;
            if x != 1.0 {
                return Err(Error::data(format!("{name} is {x}: only models with 1 are read")));
            }
        }
        self.only("add_bias_linear", truth(false), true)?;
        for name in [
            "apply_layernorm_1p",
            "apply_residual_connection_post_layernorm",
            "rotary_interleaved",
            "qk_l2_norm",
            "multi_latent_attention",
            "attention_output_gate",
            "is_hybrid_model",
            "use_mup",
        ] {
            self.only(name, truth(false), false)?;
        }
        self.only("softmax_type", text("vanilla"), false)?;
        if self.number("glu_linear_offset", 0.0)? != 0.0 {
            return Err(Error::data("glu_linear_offset is not 0: such models are not read"));
        }
        self.none_of(&[
            "mtp_num_layers",
            "no_rope_freq",
            "heterogeneous_layers_config_path",
            "heterogeneous_layers_config_encoded_json",
            "linear_attention_freq",
            "experimental_attention_variant",
            "activation_func_clamp_value",
            "softmax_scale",
            "spec",
        ])
    }

    /// Refuses arguments that are set, to anything but zero or nothing.
    fn none_of(&self, names: &[&str]) -> Result<()> {
        let off = |value: &ArgValue| match value {
            ArgValue::Integer(0) | ArgValue::Truth(false) => true,
            ArgValue::Text(text) => text.is_empty(),
            _ => false,
        };
        match names.iter().find_map(|name| Some((name, self.get(name).filter(|value| !off(value))?))) {
            Some((name, value)) => Err(Error::data(format!("{name} is {value}: such models are not read"))),
            None => Ok(()),
        }
    }

    /// The experts of a mixture, and the width of one.
    fn experts(&self) -> Result<Option<(Experts, i64)>> {
        let Some(count) = self.get("num_experts").map(|_| self.integer("num_experts", None)).transpose()?
        else {
            return Ok(None);
        };
        let (truth, text) = (ArgValue::Truth, |text: &str| ArgValue::Text(text.into()));
        self.only("moe_router_pre_softmax", truth(false), false)?;
        self.only("moe_router_score_function", text("softmax"), false)?;
        self.only("moe_router_enable_expert_bias", truth(false), false)?;
        self.only("moe_apply_probs_on_input", truth(false), false)?;
        if self.get("moe_router_load_balancing_type") == Some(&text("sinkhorn")) {
            return Err(Error::data(
                "moe_router_load_balancing_type is sinkhorn: such mixtures are not read",
            ));
        }
        let in_all_layers = |value: &ArgValue| match value {
            ArgValue::Integer(every) => *every == 1,
            ArgValue::Integers(layers) => layers.iter().all(|layer| *layer == 1),
            _ => false,
        };
        if let Some(layers) = self.get("moe_layer_freq").filter(|layers| !in_all_layers(layers)) {
            return Err(Error::data(format!(
                "moe_layer_freq is {layers}: layers without experts are not read"
            )));
        }
        if self.number("moe_router_topk_scaling_factor", 1.0)? != 1.0 {
            return Err(Error::data("moe_router_topk_scaling_factor is not 1: such mixtures are not read"));
        }
        self.none_of(&[
            "moe_shared_expert_intermediate_size",
            "moe_expert_capacity_factor",
            "moe_router_num_groups",
            "moe_router_group_topk",
            "moe_router_topk_limited_devices",
            "moe_latent_size",
        ])?;
        let experts = Experts {
            num_local_experts: count,
            num_experts_per_tok: self.integer("moe_router_topk", Some(2))?,
            router_aux_loss_coef: self.number("moe_aux_loss_coeff", 0.0)?,
        };
        let width = self.integer("ffn_hidden_size", Some(0))?;
        Ok(Some((experts, self.integer("moe_ffn_hidden_size", Some(width))?)))
    }

    /// Positions that a position sees, itself included: Megatron says how many to the left and to the right are seen besides.
    fn sliding_window(&self) -> Result<Option<i64>> {
        match self.get("window_size") {
            None => Ok(None),
            Some(ArgValue::Integers(sides)) if sides.len() == 2 && sides[0] >= 0 && sides[1] == 0 => {
                self.none_of(&["window_attn_skip_freq"])?;
                Ok(Some(sides[0].saturating_add(1)))
            }
            Some(ArgValue::Integers(sides)) if matches!(sides.as_slice(), [-1, 0 | -1]) => Ok(None),
            Some(other) => {
                Err(Error::data(format!("window_size is {other}; a causal window (left, 0) is read")))
            }
        }
    }

    /// The shape of the model with a vocabulary of this size.
    pub fn shape(&self, vocab_size: i64) -> Result<Shape> {
        self.known_mathematics()?;
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
        let (experts, bias, qk_norm) =
            (self.experts()?, self.truth("add_qkv_bias", false)?, self.truth("qk_layernorm", false)?);
        let sliding_window = self.sliding_window()?;
        let family = match (&experts, bias, qk_norm, sliding_window) {
            (Some(_), false, false, _) => Family::Mixtral,
            (None, true, false, _) => Family::Qwen2,
            (None, false, true, _) => Family::Qwen3,
            (None, false, false, Some(_)) => Family::Mistral,
            (None, false, false, None) => Family::Llama,
            _ => {
                return Err(Error::data(
                    "a model with two of num_experts, add_qkv_bias and qk_layernorm is not read",
                ));
            }
        };
        let (experts, intermediate_size) = match experts {
            Some((experts, width)) => (Some(experts), width),
            None => (None, self.integer("ffn_hidden_size", None)?),
        };
        let eps = self.number("layernorm_epsilon", 1e-5)?;
        let shape = Shape {
            family,
            head: Head::Lm,
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers: self.integer("num_layers", None)?,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim: self.integer("kv_channels", Some(hidden_size / heads))?,
            max_position_embeddings: self.integer("max_position_embeddings", None)?,
            rms_norm_eps: self.number("norm_epsilon", eps)?,
            rope_theta: self.number("rotary_base", 10000.0)?,
            rope_scaling: scaled.then_some(rope_scaling),
            tie_word_embeddings: !self.truth("untie_embeddings_and_output_weights", false)?,
            initializer_range: self.number("init_method_std", 0.02)?,
            sliding_window,
            max_window_layers: 0,
            experts,
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

    /// Arguments of other models are refused by name; other spellings of a model that is read are not.
    #[test]
    fn other_models_are_refused() {
        let same = [
            ("rotary_percent", ArgValue::Integer(1)),
            ("rotary_scaling_factor", ArgValue::Number(1.0)),
            ("window_size", ArgValue::Integers(vec![-1, -1])),
            ("mtp_num_layers", ArgValue::Integer(0)),
            ("window_attn_skip_freq", ArgValue::Integer(2)),
        ];
        assert_eq!(args(&same).shape(64).unwrap(), args(&[]).shape(64).unwrap());
        let (truth, integer) = (ArgValue::Truth, ArgValue::Integer);
        for (name, value) in [
            ("rotary_percent", ArgValue::Number(0.5)),
            ("qk_l2_norm", truth(true)),
            ("swiglu", truth(false)),
            ("normalization", ArgValue::Text("LayerNorm".into())),
            ("hidden_size", ArgValue::Text("32".into())),
            ("window_size", ArgValue::Integers(vec![4, 4])),
            ("mtp_num_layers", integer(1)),
            ("no_rope_freq", integer(4)),
            ("glu_linear_offset", ArgValue::Number(1.0)),
            ("use_mup", truth(true)),
        ] {
            let e = args(&[(name, value)]).shape(64).unwrap_err();
            assert!(e.message.starts_with(name), "{e}");
        }
        let experts = ("num_experts", integer(8));
        for (name, value) in [
            ("moe_router_pre_softmax", truth(true)),
            ("moe_shared_expert_intermediate_size", integer(16)),
            ("moe_layer_freq", integer(2)),
            ("moe_expert_capacity_factor", ArgValue::Number(1.25)),
            ("moe_router_load_balancing_type", ArgValue::Text("sinkhorn".into())),
        ] {
            let e = args(&[experts.clone(), (name, value)]).shape(64).unwrap_err();
            assert!(e.message.starts_with(name), "{e}");
        }
        let e = args(&[experts, ("add_qkv_bias", truth(true))]).shape(64).unwrap_err();
        assert!(e.message.contains("add_qkv_bias"), "{e}");
        for (name, value) in
            [("expert_model_parallel_size", integer(2)), ("expert_tensor_parallel_size", integer(2))]
        {
            let one = ("tensor_model_parallel_size", integer(1));
            let dense = args(&[one.clone(), (name, value.clone())]);
            assert!(dense.divided_by_tensor_alone().is_ok(), "without experts it says nothing");
            let mixture = args(&[("num_experts", integer(8)), one, (name, value)]);
            assert!(mixture.divided_by_tensor_alone().unwrap_err().message.starts_with(name));
        }
    }

    /// Padding is cut where its size is known: by a statement, or by a tokenizer that explains it.
    #[test]
    fn padding_is_cut_where_it_is_known() {
        let rows = VocabRows { embedding: 256, head: 256 };
        let size = |more: &[(&str, ArgValue)], tokenizer| args(more).vocab_size(rows, tokenizer).unwrap();
        assert_eq!(size(&[], None), 256);
        assert_eq!(size(&[], Some(200)), 200, "200 is padded to 256, two times 128");
        assert_eq!(size(&[], Some(100)), 256, "100 would be padded to 128");
        assert_eq!(size(&[], Some(300)), 256, "a tokenizer may have more than the model");
        let two = ("tensor_model_parallel_size", ArgValue::Integer(2));
        assert_eq!(size(std::slice::from_ref(&two), Some(100)), 100, "by two ranks to 256");
        let stated = ("vocab_size", ArgValue::Integer(250));
        assert_eq!(size(std::slice::from_ref(&stated), Some(200)), 250);
        let null = ("tokenizer_type", ArgValue::Text("NullTokenizer".into()));
        assert_eq!(size(&[stated, null], None), 256, "it adds a token to the size that is stated");
        let unpadded = VocabRows { embedding: 256, head: 250 };
        assert_eq!(args(&[]).vocab_size(unpadded, None).unwrap(), 250);
        let large = ("vocab_size", ArgValue::Integer(300));
        assert_eq!(size(std::slice::from_ref(&large), None), 256, "another tokenizer's");
        assert_eq!(size(&[large], Some(200)), 200);
        let small = ("vocab_size", ArgValue::Integer(130));
        assert_eq!(size(std::slice::from_ref(&small), Some(200)), 200, "no token is cut");
        assert_eq!(size(&[small], None), 130);
    }
}
