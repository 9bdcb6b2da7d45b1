//! The tensors of a model as Megatron's core has them: whole, over all ranks, with the rows of the model's own tensors that each
//! consists of. Readers and writers of both formats go by this list.

use crate::config::Setting;
use crate::config::shape::{Activation, Head, Norms, QkNorm, Shape};
use crate::error::{Error, Result};
use crate::model::layout::{EMBEDDING, FINAL_NORM, LM_HEAD, SCORE_LAYERS};

/// How the ranks of tensor parallelism divide a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RankDivision {
    /// Every rank has it whole.
    Copies,
    /// By rows.
    Rows,
    /// The upper and the lower half by rows each: gate and up.
    HalvesByRows,
    /// By columns.
    Columns,
}

/// The part of a pipeline that has a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StageHolder {
    First,
    /// That with this layer.
    Layer(i64),
    Last,
}

/// Rows of a tensor of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RowRun {
    pub tensor: String,
    pub first: i64,
    pub rows: i64,
}

/// A tensor of Megatron's.
#[derive(Debug, Clone)]
pub(super) struct CoreTensor {
    pub holder: StageHolder,
    /// Its name in the layer, or in the model, with layers of Megatron's own (the "local" implementation).
    pub local: String,
    /// The same with those of Transformer Engine, where a norm is in the product that it comes before.
    pub engine: String,
    /// Its name in the format torch_dist, where the experts of a layer are one tensor; some have there the one with Transformer
    /// Engine's layers.
    pub shared: String,
    /// Of an expert, its number.
    pub expert: Option<i64>,
    pub shape: Vec<i64>,
    pub division: RankDivision,
    /// From the top; what they leave out at the bottom is padding.
    pub runs: Vec<RowRun>,
}

impl CoreTensor {
    /// What each of `tensor` ranks has of it. An error (kind Config) where that does not divide it.
    pub fn shape_of_rank(&self, tensor: i64) -> Result<Vec<i64>> {
        let mut shape = self.shape.clone();
        let (dim, by) = match self.division {
            RankDivision::Copies => return Ok(shape),
            RankDivision::Rows => (0, tensor),
            RankDivision::HalvesByRows => (0, 2 * tensor),
            RankDivision::Columns => (1, tensor),
        };
        if shape[dim] % by != 0 {
            let of = ["rows", "columns"][dim];
            return Err(Error::config(format!(
                "`{}` has {} {of}, which {tensor} tensor-parallel ranks do not divide",
                self.shared, shape[dim]
            )));
        }
        shape[dim] /= tensor;
        Ok(shape)
    }
}

/// The whole tensor of this name, `shape` of it.
fn rows_of(tensor: &str, rows: i64) -> Vec<RowRun> {
    vec![RowRun { tensor: tensor.into(), first: 0, rows }]
}

/// Rows of the embedding and of the output projection, padding included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct VocabRows {
    pub embedding: i64,
    pub head: i64,
}

/// Names of the layers of ChatLearn's reward models, in the order of [`SCORE_LAYERS`].
pub(super) const POOLER_HEAD: [&str; 4] = [
    "pooler_head.dense1.weight",
    "pooler_head.dense2.weight",
    "pooler_head.dense1.bias",
    "pooler_head.dense2.bias",
];

/// Refuses what Megatron cannot express of a model. An error of kind Data.
pub(super) fn expressible(s: &Shape) -> Result<()> {
    let refused =
        |what: &str| Err(Error::data(format!("Megatron's format cannot express this model: {what}")));
    let f = &s.features;
    if s.head == Head::Score {
        return refused("a scalar head");
    }
    if f.norms != Norms::Before || f.norm_offset {
        return refused("norms after attention and MLP, or of weight 1 + w");
    }
    if f.qk_norm == QkNorm::Projection {
        return refused("norms of whole queries and keys");
    }
    if f.activation != Activation::Silu {
        return refused("another activation than SiLU");
    }
    if f.attention_softcap.is_some() || f.logit_softcap.is_some() {
        return refused("softcaps");
    }
    if f.scale_embeddings || f.query_pre_attn_scalar.is_some() {
        return refused("scaled embeddings, or scores scaled by another number than the width of a head");
    }
    if f.layer_types.is_some() || f.rope_local_theta.is_some() {
        return refused("layers with and without a window");
    }
    if f.rope_linear_factor.is_some() {
        return refused("rope_scaling of type linear");
    }
    if let Some(scaling) = &s.rope_scaling
        && (scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings)
            != (1.0, 4.0, 8192)
    {
        let constants =
            "there low_freq_factor is 1, high_freq_factor 4 and original_max_position_embeddings 8192";
        return refused(&format!("rope_scaling is {}; {constants}", scaling.write()));
    }
    if s.sliding_window.is_some() && s.max_window_layers > 0 {
        return refused("a sliding window in some of the layers");
    }
    Ok(())
}

/// The tensors of a model, in the order of the forward.
pub(super) fn core_tensors(s: &Shape, padded: VocabRows) -> Vec<CoreTensor> {
    let outer = |holder, name: &str, shape: Vec<i64>, division, runs| CoreTensor {
        holder,
        local: name.into(),
        engine: name.into(),
        shared: name.into(),
        expert: None,
        shape,
        division,
        runs,
    };
    let (c, v) = (s.hidden_size, s.vocab_size);
    let mut tensors = vec![outer(
        StageHolder::First,
        "embedding.word_embeddings.weight",
        vec![padded.embedding, c],
        RankDivision::Rows,
        rows_of(EMBEDDING, v),
    )];
    (0..s.num_hidden_layers).for_each(|layer| tensors.extend(of_layer(s, layer)));
    let norm = "decoder.final_layernorm.weight";
    tensors.push(outer(StageHolder::Last, norm, vec![c], RankDivision::Copies, rows_of(FINAL_NORM, c)));
    if s.head == Head::Score {
        let shapes = [vec![c, c], vec![1, c], vec![c], vec![1]];
        for ((name, ours), shape) in POOLER_HEAD.into_iter().zip(SCORE_LAYERS).zip(shapes) {
            let runs = rows_of(ours, shape[0]);
            tensors.push(outer(StageHolder::Last, name, shape, RankDivision::Copies, runs));
        }
    } else if !s.tie_word_embeddings {
        let head = rows_of(LM_HEAD, v);
        let shape = vec![padded.head, c];
        tensors.push(outer(StageHolder::Last, "output_layer.weight", shape, RankDivision::Rows, head));
    }
    tensors
}

/// The tensors of a layer.
fn of_layer(s: &Shape, layer: i64) -> Vec<CoreTensor> {
    let (c, d, f) = (s.hidden_size, s.head_dim, s.intermediate_size);
    let ours = |name: &str| format!("model.layers.{layer}.{name}");
    let tensor = |local: &str, engine: &str, shape: Vec<i64>, division, runs| CoreTensor {
        holder: StageHolder::Layer(layer),
        local: local.into(),
        engine: engine.into(),
        shared: engine.into(),
        expert: None,
        shape,
        division,
        runs,
    };
    let norm = |local: &str, engine: &str, name: &str, size: i64| {
        tensor(local, engine, vec![size], RankDivision::Copies, rows_of(&ours(name), size))
    };
    let qkv_rows = (s.num_attention_heads + 2 * s.num_key_value_heads) * d;
    let same = |name: &str, shape, division, runs| tensor(name, name, shape, division, runs);
    let qkv = "self_attention.linear_qkv";
    let mut tensors = vec![
        norm("input_layernorm.weight", &format!("{qkv}.layer_norm_weight"), "input_layernorm.weight", c),
        same(&format!("{qkv}.weight"), vec![qkv_rows, c], RankDivision::Rows, groups(s, layer, "weight")),
    ];
    if s.features.attention_bias {
        let runs = groups(s, layer, "bias");
        tensors.push(same(&format!("{qkv}.bias"), vec![qkv_rows], RankDivision::Rows, runs));
    }
    if s.features.qk_norm == QkNorm::Head {
        for of in ["q", "k"] {
            let name = format!("self_attention.{of}_layernorm.weight");
            tensors.push(norm(&name, &name, &format!("self_attn.{of}_norm.weight"), d));
        }
    }
    let o = rows_of(&ours("self_attn.o_proj.weight"), c);
    let heads = s.num_attention_heads * d;
    tensors.push(same("self_attention.linear_proj.weight", vec![c, heads], RankDivision::Columns, o));
    let before_mlp = "pre_mlp_layernorm.weight";
    let after_attention = "post_attention_layernorm.weight";
    let Some(experts) = &s.experts else {
        tensors.push(norm(before_mlp, "mlp.linear_fc1.layer_norm_weight", after_attention, c));
        let halves = [ours("mlp.gate_proj.weight"), ours("mlp.up_proj.weight")];
        let halves = halves.iter().flat_map(|half| rows_of(half, f)).collect();
        tensors.push(same("mlp.linear_fc1.weight", vec![2 * f, c], RankDivision::HalvesByRows, halves));
        let down = rows_of(&ours("mlp.down_proj.weight"), c);
        tensors.push(same("mlp.linear_fc2.weight", vec![c, f], RankDivision::Columns, down));
        return tensors;
    };
    // A mixture saved from Megatron's own layers has this norm in torch_dist where one MLP would have it.
    let shared = "mlp.linear_fc1.layer_norm_weight".to_string();
    tensors.push(CoreTensor { shared, ..norm(before_mlp, before_mlp, after_attention, c) });
    let e = experts.num_local_experts;
    let router = rows_of(&ours("block_sparse_moe.gate.weight"), e);
    tensors.push(same("mlp.router.weight", vec![e, c], RankDivision::Copies, router));
    for expert in 0..e {
        let ours = |name: &str| ours(&format!("block_sparse_moe.experts.{expert}.{name}.weight"));
        let of_expert = |module: &str, shape, division, runs| CoreTensor {
            expert: Some(expert),
            shared: format!("mlp.experts.experts.{module}.weight"),
            ..tensor(
                &format!("mlp.experts.local_experts.{expert}.{module}.weight"),
                &format!("mlp.experts.{module}.weight{expert}"),
                shape,
                division,
                runs,
            )
        };
        let halves = [rows_of(&ours("w1"), f), rows_of(&ours("w3"), f)].concat();
        tensors.push(of_expert("linear_fc1", vec![2 * f, c], RankDivision::HalvesByRows, halves));
        tensors.push(of_expert("linear_fc2", vec![c, f], RankDivision::Columns, rows_of(&ours("w2"), c)));
    }
    tensors
}

/// Rows of q, k and v by key-value group: the queries of the group, its key, its value.
fn groups(s: &Shape, layer: i64, kind: &str) -> Vec<RowRun> {
    let (d, groups) = (s.head_dim, s.num_key_value_heads);
    let queries = s.num_attention_heads / groups * d;
    let run = |of: &str, group: i64, rows: i64| RowRun {
        tensor: format!("model.layers.{layer}.self_attn.{of}_proj.{kind}"),
        first: group * rows,
        rows,
    };
    (0..groups).flat_map(|g| [run("q", g, queries), run("k", g, d), run("v", g, d)]).collect()
}
