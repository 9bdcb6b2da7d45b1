//! Which part of every tensor a tensor-parallel rank has (Shoeybi et al. 2019): q, k, v, gate and up give a part of their outputs,
//! o and down read a part of their inputs, embedding and LM head have a part of the vocabulary.

use kernels::quant::Quantized;

use crate::config::parallel::Parallel;
use crate::config::shape::Shape;
use crate::distributed::cut::{Cut, Share};
use crate::distributed::frozen::Storage;
use crate::distributed::mesh::{Place, Sharding};
use crate::distributed::plan::{GroupPlan, Role};
use crate::distributed::sharded::{Layout, TensorSpec};
use crate::error::{Error, Result};
use crate::model::layout::{EMBEDDING, LM_HEAD};
use crate::model::stages::{check_order, on_stages};

/// The key that all this is about.
const KEY: &str = "parallel.tensor";

/// A model's groups as they are on the rank at this place. `sequence`: norms see a part of the rows on each rank.
///
/// # Errors
/// Of kind Config: a shape that is not divided by so many ranks.
pub fn cut(plans: Vec<GroupPlan>, shape: &Shape, tensor: Place, sequence: bool) -> Result<Vec<GroupPlan>> {
    if tensor.size == 1 {
        return Ok(plans);
    }
    check(shape, tensor.size)?;
    plans.into_iter().map(|plan| cut_group(plan, shape, tensor, sequence)).collect()
}

/// [`cut`] and [`on_stages`] for a rank of this sharding.
pub fn cut_for(plans: Vec<GroupPlan>, shape: &Shape, sharding: &Sharding) -> Result<Vec<GroupPlan>> {
    let plans = cut(plans, shape, sharding.tensor.place(), sharding.sequence)?;
    let pipeline = &sharding.pipeline;
    on_stages(plans, shape, pipeline.axis.place(), pipeline.blocks.as_deref())
}

/// What a number of ranks must divide.
fn check(s: &Shape, ranks: i64) -> Result<()> {
    let (heads, kv_heads) = (s.num_attention_heads, s.num_key_value_heads);
    let refuse = |why: String| Err(Error::key(KEY, why));
    if heads % ranks != 0 {
        return refuse(format!("{ranks} must divide the model's attention heads, {heads}"));
    }
    if kv_heads % ranks != 0 && ranks % kv_heads != 0 {
        return refuse(format!(
            "{ranks} must divide the model's key-value heads, {kv_heads}, or be a multiple of them"
        ));
    }
    if s.intermediate_size % ranks != 0 {
        return refuse(format!("{ranks} must divide the model's intermediate_size, {}", s.intermediate_size));
    }
    // A norm over one head is computed where the head is.
    if s.qk_norm_sizes().is_some_and(|sizes| sizes[0] != s.head_dim) {
        return refuse(format!(
            "{ranks} is not built for a model that normalizes all heads' queries together; set it to 1"
        ));
    }
    Ok(())
}

/// Refuses, before ranks meet, a model that `parallel` cannot divide.
///
/// # Errors
/// Those of [`cut`] and [`on_stages`].
pub fn check_mesh(plans: Vec<GroupPlan>, shape: &Shape, parallel: &Parallel) -> Result<()> {
    let first = |size| Place { rank: 0, size };
    let plans = cut(plans, shape, first(parallel.tensor), parallel.sequence)?;
    check_order(shape, parallel.schedule)?;
    on_stages(plans, shape, first(parallel.pipeline), parallel.stages.as_deref()).map(drop)
}

fn cut_group(plan: GroupPlan, shape: &Shape, tensor: Place, sequence: bool) -> Result<GroupPlan> {
    let specs = plan.layout.specs.iter().map(|spec| cut_tensor(spec, shape, tensor, sequence));
    let layout = Layout::of(plan.layout.name.clone(), specs);
    for ((spec, whole), role) in layout.specs.iter().zip(&plan.layout.specs).zip(&plan.roles) {
        let Role::Frozen(Storage::Quantized(scheme)) = role else { continue };
        if !Quantized::has_parts(*scheme, [whole.shape[0], whole.shape[1]], spec.shape[0], spec.shape[1]) {
            let name = &spec.name;
            let why = match spec.share {
                Share::Cut(Cut { dim: 1, .. }) => format!(
                    "`{name}` in nf4 cannot be cut into {} parts of {} columns: parts need a multiple of 64. Set it to 1, or \
                     lora.base to int8",
                    tensor.size, spec.shape[1]
                ),
                _ => format!(
                    "`{name}` in nf4 cannot be cut into {} parts of {} x {} values: parts need a multiple of 64. Set it to 1, or \
                     lora.base to int8",
                    tensor.size, spec.shape[0], spec.shape[1]
                ),
            };
            return Err(Error::key(KEY, why));
        }
    }
    Ok(GroupPlan { layout, ..plan })
}

fn cut_tensor(spec: &TensorSpec, s: &Shape, tensor: Place, sequence: bool) -> TensorSpec {
    let Place { rank, size } = tensor;
    // `n` rows (0) or columns (1), the `at`-th part of them, of which `copies` ranks have each.
    let part = |dim: usize, n: i64, at: i64, copies: i64| {
        let mut shape = spec.shape.clone();
        let whole = std::mem::replace(&mut shape[dim], n);
        TensorSpec { shape, share: Share::Cut(Cut { dim, first: at * n, whole, copies }), ..spec.clone() }
    };
    let even = |dim: usize| part(dim, spec.shape[dim] / size, rank, 1);
    if spec.name == EMBEDDING || spec.name == LM_HEAD {
        return part(0, (spec.shape[0] + size - 1) / size, rank, 1);
    }
    let mut words = spec.name.rsplit('.').skip(1); // without `weight` or `bias`
    match words.next() {
        Some("q_proj" | "gate_proj" | "up_proj" | "w1" | "w3") => even(0),
        Some("o_proj" | "down_proj" | "w2") => even(1),
        Some("k_proj" | "v_proj") => {
            let copies = (size / s.num_key_value_heads).max(1);
            part(0, spec.shape[0] * copies / size, rank / copies, copies)
        }
        // Each rank's heads are a part of what the gradient is a sum over.
        Some("q_norm" | "k_norm") => TensorSpec { share: Share::Summed, ..spec.clone() },
        // The other vectors are norms of the stream.
        _ if sequence && spec.shape.len() == 1 => TensorSpec { share: Share::Summed, ..spec.clone() },
        _ => spec.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::layout::layouts;

    fn rows(shape: &Shape, ranks: i64, rank: i64, name: &str) -> (Vec<i64>, Share) {
        let plans = layouts(shape).into_iter().map(GroupPlan::from).collect();
        let plans = cut(plans, shape, Place { rank, size: ranks }, false).unwrap();
        let mut specs = plans.iter().flat_map(|p| &p.layout.specs);
        let spec = specs.find(|s| s.name.ends_with(name)).unwrap();
        (spec.shape.clone(), spec.share)
    }

    #[test]
    fn heads_and_vocabulary_are_divided() {
        let shape = Shape { vocab_size: 101, ..Shape::preset("llama-15m").unwrap() };
        let shape = Shape { num_attention_heads: 8, num_key_value_heads: 2, head_dim: 4, ..shape };
        let cut = |dim, first, whole, copies| Share::Cut(Cut { dim, first, whole, copies });
        let c = shape.hidden_size;
        assert_eq!(rows(&shape, 4, 3, "q_proj.weight"), (vec![8, c], cut(0, 24, 32, 1)));
        assert_eq!(rows(&shape, 4, 1, "k_proj.weight"), (vec![4, c], cut(0, 0, 8, 2)));
        assert_eq!(rows(&shape, 4, 3, "v_proj.weight"), (vec![4, c], cut(0, 4, 8, 2)));
        assert_eq!(rows(&shape, 2, 1, "v_proj.weight"), (vec![4, c], cut(0, 4, 8, 1)));
        assert_eq!(rows(&shape, 4, 1, "o_proj.weight"), (vec![c, 8], cut(1, 8, 32, 1)));
        assert_eq!(rows(&shape, 4, 3, "embed_tokens.weight"), (vec![26, c], cut(0, 78, 101, 1)));
        assert_eq!(rows(&shape, 4, 3, "input_layernorm.weight"), (vec![c], Share::Whole));
    }

    #[test]
    fn what_does_not_divide_is_refused() {
        let shape = Shape::preset("llama-15m").unwrap();
        let refused = |shape: Shape, ranks| check(&shape, ranks).unwrap_err().to_string();
        let heads = |heads, kv_heads| Shape {
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            ..shape.clone()
        };
        assert!(refused(heads(6, 6), 4).contains("attention heads, 6"));
        assert!(refused(heads(12, 3), 4).contains("key-value heads, 3"));
        assert!(
            refused(Shape { intermediate_size: 101, ..heads(4, 4) }, 2).contains("intermediate_size, 101")
        );
        check(&heads(12, 3), 6).unwrap();
        check(&heads(8, 1), 8).unwrap();
    }
}
