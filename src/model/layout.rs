//! The groups of a model's parameters, under Hugging Face's names, matrices before vectors.
//!
//! Group 0 is the embedding, 1 to L are the blocks (the last one carries the final norm), L + 1 is the LM head where it is
//! not tied to the embedding, or the scalar head. q, k, v lie one after the other, and gate and up, so that each is one
//! product. Experts lie in their block's group.

use std::cell::RefCell;
use std::ops::Range;

use kernels::ops::{self, Float8};
use tch::Tensor;

use crate::config::shape::{Head, Norms, Shape};
use crate::distributed::cut::Share;
use crate::distributed::mesh::Axis;
use crate::distributed::plan::{AdapterPlan, GroupPlan, Piece};
use crate::distributed::sharded::gathered::Form;
use crate::distributed::sharded::gradients::FlatGrad;
use crate::distributed::sharded::{Layout, Sharded};
use crate::error::{Error, Result};
use crate::model::attention::Attention;
use crate::model::linear::{self, Dropout, KeptInner, Linear, LinearGrad};
use crate::model::mixture::Mixture;
use crate::model::mlp::{Dense, Mlp};
use crate::random::hash;

/// The embedding, [V, C]; the LM head, too, where that is tied.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The weight of the norm after the last block, `[C]`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// The LM head where it is not tied, [V, C].
pub const LM_HEAD: &str = "lm_head.weight";
/// The scalar head, as transformers' sequence classification with one label has it.
pub const SCORE: &str = "score.weight";

/// A scalar head of two layers: weights [C, C] and [1, C], and biases `[C]` and `[1]`.
pub const SCORE_LAYERS: [&str; 4] =
    ["score.dense1.weight", "score.dense2.weight", "score.dense1.bias", "score.dense2.bias"];

/// The layouts of all groups, in the order of the forward.
pub fn layouts(s: &Shape) -> Vec<Layout> {
    let mut groups =
        vec![Layout::new("embedding", vec![(EMBEDDING.into(), vec![s.vocab_size, s.hidden_size])])];
    groups.extend((0..s.num_hidden_layers).map(|i| block(s, i)));
    if s.head == Head::Score && s.features.score_layers {
        let c = s.hidden_size;
        let shapes = [vec![c, c], vec![1, c], vec![c], vec![1]];
        let tensors = SCORE_LAYERS.into_iter().map(String::from).zip(shapes);
        groups.push(Layout::new("head", tensors.collect()));
    } else if !s.tie_word_embeddings {
        let name = match s.head {
            Head::Lm => LM_HEAD,
            Head::Score => SCORE,
        };
        groups.push(Layout::new("head", vec![(name.into(), vec![s.head_rows(), s.hidden_size])]));
    }
    groups
}

fn block(s: &Shape, i: i64) -> Layout {
    let (c, f, d) = (s.hidden_size, s.intermediate_size, s.head_dim);
    let (q, kv) = (s.num_attention_heads * d, s.num_key_value_heads * d);
    let name = |part: &str| format!("model.layers.{i}.{part}");
    let mut tensors = vec![
        (name("self_attn.q_proj.weight"), vec![q, c]),
        (name("self_attn.k_proj.weight"), vec![kv, c]),
        (name("self_attn.v_proj.weight"), vec![kv, c]),
        (name("self_attn.o_proj.weight"), vec![c, q]),
    ];
    match &s.experts {
        None => tensors.extend([
            (name("mlp.gate_proj.weight"), vec![f, c]),
            (name("mlp.up_proj.weight"), vec![f, c]),
            (name("mlp.down_proj.weight"), vec![c, f]),
        ]),
        // w1 is the gate, w3 is up, w2 is down.
        Some(e) => {
            let name = |part: &str| name(&format!("block_sparse_moe.{part}.weight"));
            tensors.push((name("gate"), vec![e.num_local_experts, c]));
            for e in 0..e.num_local_experts {
                tensors.push((name(&format!("experts.{e}.w1")), vec![f, c]));
                tensors.push((name(&format!("experts.{e}.w3")), vec![f, c]));
                tensors.push((name(&format!("experts.{e}.w2")), vec![c, f]));
            }
        }
    }
    if s.features.attention_bias {
        tensors.extend([
            (name("self_attn.q_proj.bias"), vec![q]),
            (name("self_attn.k_proj.bias"), vec![kv]),
            (name("self_attn.v_proj.bias"), vec![kv]),
        ]);
    }
    if let Some([q, k]) = s.qk_norm_sizes() {
        tensors.push((name("self_attn.q_norm.weight"), vec![q]));
        tensors.push((name("self_attn.k_norm.weight"), vec![k]));
    }
    tensors.extend(norms(s.features.norms).iter().map(|norm| (name(&format!("{norm}.weight")), vec![c])));
    if i + 1 == s.num_hidden_layers {
        tensors.push((FINAL_NORM.into(), vec![c]));
    }
    Layout::new(format!("block {i}"), tensors)
}

/// How the name of a router's weight ends.
const ROUTER: &str = "block_sparse_moe.gate.weight";

/// Hugging Face's names of a block's norms: those before attention and MLP, then those after them. What Llama calls the norm
/// after the attention is the one before the MLP.
fn norms(norms: Norms) -> &'static [&'static str] {
    match norms {
        Norms::Before => &["input_layernorm", "post_attention_layernorm"],
        Norms::After => &["post_attention_layernorm", "post_feedforward_layernorm"],
        Norms::Both => &[
            "input_layernorm",
            "pre_feedforward_layernorm",
            "post_attention_layernorm",
            "post_feedforward_layernorm",
        ],
    }
}

/// A block's parts as views of its group's buffers: of its weights ([`Linear`]s) or of their gradients ([`LinearGrad`]s).
pub struct BlockParts<L> {
    /// Norms and projections of the attention.
    pub attention: Attention<L>,
    /// The MLP, or the experts of a mixture and their router.
    pub mlp: Mlp<L>,
    /// Of the norms before attention and MLP, `[C]`.
    norms_before: Option<[Tensor; 2]>,
    /// Of the norms after them, `[C]`.
    norms_after: Option<[Tensor; 2]>,
    /// `[C]`, in the last block
    pub final_norm: Option<Tensor>,
}

/// What dropout draws from, besides the place of what it leaves out.
pub struct Draws {
    /// Of a run's seed and the step.
    pub key: u64,
    /// int64 `[N]`, a number for each token
    pub rows: Tensor,
}

impl BlockParts<Linear> {
    /// The weights of block group `i`, T, with their adapters, if they are to act. Dropout acts where there are `draws`.
    /// Routers never use 8-bit floats. `inner`: where each adapter of the group keeps what its backward needs; empty:
    /// nowhere.
    pub fn weights(
        params: &mut Sharded,
        i: usize,
        s: &Shape,
        adapters: bool,
        draws: Option<&Draws>,
        float8: Option<Float8>,
        inner: &[KeptInner],
    ) -> Result<Self> {
        let form = if float8.is_some() { Form::Float8 } else { Form::Compute };
        let full = params.full_as(i, form)?;
        let params = &*params;
        let joined = |tensors: Range<usize>| -> Result<Tensor> {
            let pieces = params.pieces(i, tensors);
            let mut parts: Vec<Tensor> =
                pieces.iter().map(|p| params.dense(i, &full, p)).collect::<Result<_>>()?;
            Ok(if parts.len() == 1 { parts.remove(0) } else { Tensor::f_cat(&parts, 0)? })
        };
        let adapter = |k: usize, first: i64| -> Result<linear::Adapter> {
            let spec = &params.plan(i).adapters[k];
            let [a, b] = params.adapter_pieces(i, k);
            let dropout = draws.filter(|_| spec.dropout > 0.0).map(|d| Dropout {
                p: spec.dropout,
                key: hash(d.key ^ hash((i as u64) << 32 | k as u64)),
                rows: d.rows.shallow_clone(),
                first: match params.plan(i).layout.specs[spec.target].share {
                    Share::Cut(cut) if cut.dim == 1 => cut.first as u32,
                    _ => 0,
                },
            });
            let (a, b) = (params.dense(i, &full, &a)?, params.dense(i, &full, &b)?);
            Ok(linear::Adapter { first, a, b, scale: spec.scale, dropout, inner: inner.get(k).cloned() })
        };
        let mut block = Self::of(
            s,
            params.plan(i).layout.specs.len(),
            |weights, bias| {
                let pieces = params.pieces(i, weights.clone());
                let parts = pieces.iter().map(|p| params.value(i, &full, p)).collect::<Result<_>>()?;
                let adapters = match adapters {
                    true => adapters_of(params.plan(i), &weights),
                    false => Vec::new(),
                };
                let adapters = adapters.into_iter().map(|(k, first)| adapter(k, first));
                let bias = bias.map(joined).transpose()?;
                let name = &params.plan(i).layout.specs[weights.start].name;
                let linear = Linear::new(parts, bias, adapters.collect::<Result<_>>()?);
                Ok(linear.in_float8(float8.filter(|_| !name.ends_with(ROUTER))))
            },
            joined,
        )?;
        if let Mlp::Mixture(mixture) = &mut block.mlp {
            mixture.tensor = params.sharding().tensor.clone();
        }
        Ok(block)
    }
}

/// The matrices of a model laid out in `plans` that ranks may send each other in 8-bit floats: of each group, elements of
/// its flat buffer of what is trained, a range for each factor of a product, in order.
pub fn float8_runs<'a>(
    s: &Shape,
    plans: impl Iterator<Item = &'a GroupPlan>,
    float8: Float8,
) -> Result<Vec<Vec<Range<i64>>>> {
    let blocks = 1..=s.num_hidden_layers as usize;
    let of = |(i, plan)| match blocks.contains(&i) {
        true => block_float8_runs(s, plan, float8),
        false => Ok(Vec::new()),
    };
    plans.enumerate().map(of).collect()
}

fn block_float8_runs(s: &Shape, plan: &GroupPlan, float8: Float8) -> Result<Vec<Range<i64>>> {
    let trained = plan.trained();
    let (specs, roles) = (&plan.layout.specs, &plan.roles);
    let runs = RefCell::new(Vec::new());
    let linear = |weights: Range<usize>, _| {
        if specs[weights.start].name.ends_with(ROUTER) {
            return Ok(());
        }
        // Trained tensors that follow each other are one factor.
        for tensors in weights.collect::<Vec<_>>().chunk_by(|a, b| roles[*a] == roles[*b]) {
            let Some(first) = trained.specs.iter().find(|t| t.name == specs[tensors[0]].name) else {
                continue;
            };
            let (rows, columns) = (tensors.iter().map(|k| specs[*k].shape[0]).sum::<i64>(), first.shape[1]);
            if float8.gathers([rows, columns]) {
                runs.borrow_mut().push(first.offset..first.offset + rows * columns);
            }
        }
        Ok(())
    };
    BlockParts::of(s, specs.len(), linear, |_| Ok(Tensor::new()))?;
    let mut runs = runs.into_inner();
    runs.sort_by_key(|run| run.start);
    Ok(runs)
}

impl BlockParts<LinearGrad> {
    /// Where the gradients of the weights of block group `i` go: into `flat`; none where nothing of it is trained. Frozen
    /// matrices and biases have none, frozen norms one that nobody reads.
    pub fn gradients(params: &Sharded, i: usize, flat: Option<&FlatGrad>, s: &Shape) -> Result<Self> {
        let matrix = |p: &Piece| flat?.matrix(p);
        let vector = |p: &Piece| flat?.vector(p);
        let plan = params.plan(i);
        Self::of(
            s,
            plan.layout.specs.len(),
            |weights, bias| {
                let mut first = 0;
                let mut placed = |p: Piece| {
                    first += p.size[0];
                    vector(&p).map(|g| (first - p.size[0], g))
                };
                let biases = bias.into_iter().flat_map(|tensors| params.pieces(i, tensors));
                let adapters = adapters_of(plan, &weights).into_iter().map(|(k, _)| {
                    let [a, b] = params.adapter_pieces(i, k);
                    Some([matrix(&a)?, matrix(&b)?])
                });
                Ok(LinearGrad {
                    adapters: adapters.collect(),
                    weight: params.pieces(i, weights).iter().map(matrix).collect(),
                    bias: biases.filter_map(&mut placed).collect(),
                })
            },
            |tensors| {
                let size = plan.layout.specs[tensors.start].shape.as_slice();
                let unread = || Tensor::zeros(size, (ops::accumulator(params.compute()), params.device()));
                Ok(params.pieces(i, tensors).iter().find_map(vector).unwrap_or_else(unread))
            },
        )
    }
}

/// The adapters on some tensors of a group, each with its first row among theirs.
pub(crate) fn adapters_of(plan: &GroupPlan, tensors: &Range<usize>) -> Vec<(usize, i64)> {
    let rows = |k: usize| plan.layout.specs[k].shape[0];
    let on = |(k, a): (usize, &AdapterPlan)| {
        tensors.contains(&a.target).then(|| (k, (tensors.start..a.target).map(rows).sum()))
    };
    plan.adapters.iter().enumerate().filter_map(on).collect()
}

impl<L> BlockParts<L> {
    /// The weight of the norm before the attention (`k` = 0) or the MLP (1), `[C]`, where there is one.
    pub(super) fn before(&self, k: usize) -> Option<&Tensor> {
        self.norms_before.as_ref().map(|norms| &norms[k])
    }

    /// The weight of the norm on what the attention (`k` = 0) or the MLP (1) gives, `[C]`, where there is one.
    pub(super) fn after(&self, k: usize) -> Option<&Tensor> {
        self.norms_after.as_ref().map(|norms| &norms[k])
    }

    /// Takes the tensors in the order of `block`, of which there are `count`: layers of `linear(weights, biases)`, and
    /// vectors.
    pub(crate) fn of(
        s: &Shape,
        count: usize,
        linear: impl Fn(Range<usize>, Option<Range<usize>>) -> Result<L>,
        vector: impl Fn(Range<usize>) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut next = 0;
        let mut take = |n: usize| {
            next += n;
            next - n..next
        };
        let (qkv, o) = (take(3), take(1));
        let dense = |gate_up: Range<usize>, down: Range<usize>| -> Result<Dense<L>> {
            Ok(Dense {
                gate_up: linear(gate_up, None)?,
                down: linear(down, None)?,
                activation: s.features.activation,
            })
        };
        let mlp = match &s.experts {
            None => Mlp::Dense(dense(take(2), take(1))?),
            Some(e) => {
                let router = linear(take(1), None)?;
                let experts =
                    (0..e.num_local_experts).map(|_| dense(take(2), take(1))).collect::<Result<_>>()?;
                Mlp::Mixture(Mixture {
                    router,
                    experts,
                    per_token: e.num_experts_per_tok,
                    tensor: Axis::solo(),
                })
            }
        };
        let bias = s.features.attention_bias.then(|| take(3));
        let attention = Attention {
            qkv: linear(qkv, bias)?,
            o: linear(o, None)?,
            qk_norm: match s.qk_norm_sizes() {
                Some(_) => Some([vector(take(1))?, vector(take(1))?]),
                None => None,
            },
        };
        let norms = s.features.norms;
        let mut pair = |there: bool| match there {
            true => Ok::<_, Error>(Some([vector(take(1))?, vector(take(1))?])),
            false => Ok(None),
        };
        Ok(BlockParts {
            attention,
            mlp,
            norms_before: pair(norms != Norms::After)?,
            norms_after: pair(norms != Norms::Before)?,
            final_norm: if take(0).start < count { Some(vector(take(1))?) } else { None },
        })
    }
}
