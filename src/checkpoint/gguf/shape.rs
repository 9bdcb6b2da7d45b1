//! A model's shape as the metadata has it: what it says about the mathematics is taken or refused, never passed over.

use super::form::{GgufForm, WINDOW};
use super::keys::Keys;
use super::names::{LONGROPE, OUTPUT, ROPE_FREQS, TOKEN_EMBEDDING};
use crate::checkpoint::families::{self, FAMILIES};
use crate::checkpoint::source::TensorSource;
use crate::config::shape::{Experts, Family, Head, Llama3RopeScaling, Shape};
use crate::error::{Error, Result};
use crate::gguf::{Metadata, MetadataValue};
use crate::model::rotary::inverse_frequencies;

pub(super) struct GgufShape {
    pub shape: Shape,
    pub warnings: Vec<String>,
}

/// The family and its shape. `files` has the tensors under their names in the files.
pub(super) fn read(metadata: &Metadata, files: &TensorSource) -> Result<GgufShape> {
    let form = form(metadata)?;
    if let Some(name) = LONGROPE.iter().find(|name| files.views.contains_key(**name)) {
        return Err(Error::data(format!("`{name}`: rotary positions of type longrope are not built")));
    }
    let mut keys = Keys::new(metadata, form.architecture);
    let vocab_size = vocab_size(&mut keys, files)?;
    let (hidden_size, heads) = (keys.needed("embedding_length")?, keys.needed("attention.head_count")?);
    let head_dim = head_dim(&mut keys, hidden_size, heads)?;
    let rms_norm_eps = keys.number("attention.layer_norm_rms_epsilon")?;
    let mut shape = Shape {
        family: form.family,
        head: Head::Lm,
        vocab_size,
        hidden_size,
        intermediate_size: keys.needed("feed_forward_length")?,
        num_hidden_layers: keys.needed("block_count")?,
        num_attention_heads: heads,
        num_key_value_heads: keys.integer("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        max_position_embeddings: keys.needed("context_length")?,
        rms_norm_eps: rms_norm_eps.ok_or_else(|| keys.missing("attention.layer_norm_rms_epsilon"))?,
        rope_theta: keys.number("rope.freq_base")?.unwrap_or(10000.0),
        rope_scaling: None,
        tie_word_embeddings: !files.views.contains_key(OUTPUT),
        initializer_range: 0.02,
        sliding_window: None,
        max_window_layers: 0,
        experts: experts(&mut keys)?,
        features: form.family.features(),
    };
    shape.features.rope_linear_factor = linear_factor(&mut keys)?;
    shape.check().map_err(|e| Error::data(e.message))?;
    check_counts(&shape, files)?;
    (form.read)(&mut keys, &mut shape)?;
    shape.check().map_err(|e| Error::data(e.message))?;
    if files.views.contains_key(ROPE_FREQS) {
        let original = keys.integer("rope.scaling.original_context_length")?;
        shape.rope_scaling = scaling_of(files, &shape, original)?;
    }
    Ok(GgufShape { warnings: keys.rest()?.into_iter().collect(), shape })
}

/// The form of the file. llama.cpp writes Mistral and Mixtral as llama: a sliding window is Mistral's, and transformers tells
/// it by its name.
fn form(metadata: &Metadata) -> Result<&'static GgufForm> {
    let Some(architecture) = metadata.text("general.architecture")? else {
        return Err(Error::data("`general.architecture` is missing in the metadata"));
    };
    let mut forms =
        FAMILIES.iter().map(|family| family.gguf).filter(|form| form.architecture == architecture);
    let Some(first) = forms.next() else {
        let mut known: Vec<&str> = FAMILIES.iter().map(|family| family.gguf.architecture).collect();
        known.dedup();
        return Err(Error::data(format!(
            "architecture \"{architecture}\" is not known; known are: {}",
            known.join(", ")
        )));
    };
    if first.family != Family::Llama {
        return Ok(first);
    }
    let mut keys = Keys::new(metadata, architecture);
    let experts = keys.integer("expert_count")?.is_some_and(|n| n > 0);
    let window = keys.integer(WINDOW)?.is_some_and(|n| n > 0);
    let named = metadata.text("general.name")?.is_some_and(|name| name.to_lowercase().contains("mistral"));
    Ok(families::of(match (experts, window || named) {
        (true, _) => Family::Mixtral,
        (false, true) => Family::Mistral,
        (false, false) => Family::Llama,
    })
    .gguf)
}

/// The rows of the embedding, and what the metadata says of them.
fn vocab_size(keys: &mut Keys, files: &TensorSource) -> Result<i64> {
    let rows = files.view(TOKEN_EMBEDDING)?.shape.first().copied().unwrap_or(0);
    match keys.integer("vocab_size")?.filter(|n| *n != rows) {
        Some(n) => Err(Error::data(format!(
            "`{}` is {n}, and `{TOKEN_EMBEDDING}` has {rows} rows",
            keys.key("vocab_size")
        ))),
        None => Ok(rows),
    }
}

/// The numbers of a head, all of which are rotated.
fn head_dim(keys: &mut Keys, hidden_size: i64, heads: i64) -> Result<i64> {
    if heads < 1 {
        return Err(Error::data(format!("`{}` is {heads}", keys.key("attention.head_count"))));
    }
    let (key, value) = (keys.integer("attention.key_length")?, keys.integer("attention.value_length")?);
    let rotary = keys.integer("rope.dimension_count")?;
    let head_dim = key.unwrap_or(hidden_size / heads);
    for (name, said) in [("attention.value_length", value), ("rope.dimension_count", rotary)] {
        if let Some(said) = said.filter(|said| *said != head_dim) {
            return Err(keys.refused(name, said, &format!("{head_dim}, a head's size,")));
        }
    }
    Ok(head_dim)
}

fn experts(keys: &mut Keys) -> Result<Option<Experts>> {
    let per_token = keys.integer("expert_used_count")?;
    let Some(num_local_experts) = keys.integer("expert_count")?.filter(|n| *n > 0) else { return Ok(None) };
    let num_experts_per_tok = per_token.ok_or_else(|| keys.missing("expert_used_count"))?;
    Ok(Some(Experts { num_local_experts, num_experts_per_tok, router_aux_loss_coef: 0.001 }))
}

/// What rotary positions are divided by. Without a type llama.cpp takes `linear`.
fn linear_factor(keys: &mut Keys) -> Result<Option<f64>> {
    let (new, old) = (keys.number("rope.scaling.factor")?, keys.number("rope.scale_linear")?);
    let named = match keys.value("rope.scaling.type") {
        None => false,
        Some(MetadataValue::Text(kind)) if kind == "linear" => true,
        Some(MetadataValue::Text(kind)) if kind == "none" => return Ok(None),
        Some(other) => {
            return Err(keys.refused(
                "rope.scaling.type",
                other,
                "none, linear, and the table of a Llama 3,",
            ));
        }
    };
    match new.or(old).filter(|factor| *factor != 0.0 && (named || *factor != 1.0)) {
        Some(factor) if !(factor > 0.0 && factor.is_finite()) => {
            Err(keys.refused("rope.scaling.factor", factor, "a number above 0"))
        }
        factor => Ok(factor),
    }
}

/// Refuses more blocks and experts than there can be, before anything is made for each.
fn check_counts(shape: &Shape, files: &TensorSource) -> Result<()> {
    let experts = shape.experts.as_ref().map_or(1, |e| e.num_local_experts);
    let tensors = files.names().count();
    if shape.num_hidden_layers <= tensors as i64 && experts <= 1 << 16 {
        return Ok(());
    }
    Err(Error::data(format!(
        "block_count is {} and expert_count {experts}, but there are {tensors} tensors",
        shape.num_hidden_layers
    )))
}

/// What a model's rotary frequencies are divided by, float32 `[head_dim / 2]`; none where they are as they are.
pub(super) fn rope_factors(shape: &Shape) -> Option<Vec<f32>> {
    let plain = Shape { rope_scaling: None, ..shape.clone() };
    shape.rope_scaling.as_ref()?;
    let pairs = inverse_frequencies(&plain).into_iter().zip(inverse_frequencies(shape));
    Some(pairs.map(|(plain, scaled)| (plain / scaled) as f32).collect())
}

/// The scaling that the table of factors stands for: the file does not say how it was computed. All of Meta's models have
/// the same bounds.
fn scaling_of(
    files: &TensorSource,
    shape: &Shape,
    original: Option<i64>,
) -> Result<Option<Llama3RopeScaling>> {
    let table: Vec<f32> = Vec::try_from(files.tensor(ROPE_FREQS)?.to_kind(tch::Kind::Float).view(-1))?;
    if table.iter().all(|factor| *factor == 1.0) {
        return Ok(None);
    }
    let factor = table.iter().fold(1f32, |most, factor| most.max(*factor));
    for original_max_position_embeddings in original.into_iter().chain([8192]) {
        let scaling = Llama3RopeScaling {
            factor: factor.into(),
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings,
        };
        let scaled = Shape { rope_scaling: Some(scaling), ..shape.clone() };
        let factors = rope_factors(&scaled).unwrap_or_default();
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-4 * b.abs();
        if scaled.check().is_ok() && factors.len() == table.len() && factors.iter().zip(&table).all(near) {
            return Ok(scaled.rope_scaling);
        }
    }
    Err(Error::data(format!(
        "`{ROPE_FREQS}` is another table of rotary factors than that of a Llama 3 (factor {factor}, bounds 1 and 4, 8192 \
         positions), which is not built"
    )))
}

/// Adds a shape to the metadata.
///
/// # Errors
/// What of it the format, or llama.cpp, cannot express.
pub(super) fn write(shape: &Shape, metadata: &mut Metadata) -> Result<(), String> {
    let form = families::of(shape.family).gguf;
    let mut set =
        |key: &str, value: MetadataValue| metadata.set(format!("{}.{key}", form.architecture), value);
    for (key, n) in [
        ("block_count", shape.num_hidden_layers),
        ("context_length", shape.max_position_embeddings),
        ("embedding_length", shape.hidden_size),
        ("feed_forward_length", shape.intermediate_size),
        ("attention.head_count", shape.num_attention_heads),
        ("attention.head_count_kv", shape.num_key_value_heads),
        ("attention.key_length", shape.head_dim),
        ("attention.value_length", shape.head_dim),
        ("rope.dimension_count", shape.head_dim),
        ("vocab_size", shape.vocab_size),
    ] {
        set(key, MetadataValue::Integer(n));
    }
    set("attention.layer_norm_rms_epsilon", MetadataValue::Float(shape.rms_norm_eps));
    set("rope.freq_base", MetadataValue::Float(shape.rope_theta));
    if let Some(experts) = &shape.experts {
        set("expert_count", MetadataValue::Integer(experts.num_local_experts));
        set("expert_used_count", MetadataValue::Integer(experts.num_experts_per_tok));
    }
    if let Some(scaling) = &shape.rope_scaling {
        set(
            "rope.scaling.original_context_length",
            MetadataValue::Integer(scaling.original_max_position_embeddings),
        );
    }
    if let Some(factor) = shape.features.rope_linear_factor {
        set("rope.scaling.type", MetadataValue::Text("linear".into()));
        set("rope.scaling.factor", MetadataValue::Float(factor));
    }
    (form.write)(shape)?.into_iter().for_each(|(key, value)| set(key, value));
    Ok(())
}
