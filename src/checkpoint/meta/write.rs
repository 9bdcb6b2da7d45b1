//! Models in Meta's format, written.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde_json::{Map, Value, json};
use tch::Kind;

use super::{LLAMA_3_THETA, PARAMS, TensorCut, ffn_size, named, part_name, rope_scaling};
use crate::checkpoint::hf::write_tokenizer;
use crate::checkpoint::safetensors::TensorEntry;
use crate::checkpoint::source::{RowOrder, TensorSource};
use crate::checkpoint::torch_file::TorchWriter;
use crate::config::Setting;
use crate::config::shape::Shape;
use crate::data::tokenizer::{Tokenizer, is_tokenizer_file};
use crate::distributed::sharded::TensorSpec;
use crate::error::{Error, Result};
use crate::files::{AtomicFolder, write_file};
use crate::model::layout::{EMBEDDING, LM_HEAD, layouts};

/// A model to be written in Meta's format, in so many model-parallel parts.
pub(in crate::checkpoint) struct MetaParts {
    shape: Shape,
    params: Value,
    parts: i64,
    /// Of all tensors; none: each as it is.
    kind: Option<Kind>,
}

/// A tensor as it is written.
struct MetaPart {
    /// Of a part.
    entry: TensorEntry,
    /// The model's tensor.
    from: String,
    cut: TensorCut,
    rotary: bool,
}

impl MetaParts {
    /// # Errors
    /// What the format cannot express (kind Data), a number of parts that does not divide the model (kind Config).
    pub fn new(shape: &Shape, parts: i64, kind: Option<Kind>) -> Result<MetaParts> {
        // A tied output projection has a copy of its own there.
        let untied = Shape { tie_word_embeddings: false, ..shape.clone() };
        let params = write_params(&untied)?;
        check_parts(shape, parts)?;
        Ok(MetaParts { shape: shape.clone(), params, parts, kind })
    }

    pub fn count(&self) -> usize {
        self.parts as usize
    }

    /// Writes a folder that has no name yet, and tells which files of the tokenizer went along. `done` counts bytes.
    pub fn write(
        &self,
        to: &Path,
        source: &TensorSource,
        tokenizer: Option<&Tokenizer>,
        done: &AtomicU64,
    ) -> Result<(AtomicFolder, Vec<String>)> {
        let ours = |name: &str| {
            name == PARAMS
                || (name.starts_with("consolidated.") && name.ends_with(".pth"))
                || is_tokenizer_file(name)
        };
        let untied = Shape { tie_word_embeddings: false, ..self.shape.clone() };
        let specs = layouts(&untied).into_iter().flat_map(|l| l.specs);
        let tensors = specs.map(|spec| self.tensor(spec, source)).collect::<Result<Vec<_>>>()?;
        let folder = AtomicFolder::create(to, ours)?;
        let temp = folder.temporary();
        write_file(&temp.join(PARAMS), format!("{}\n", self.params).as_bytes())?;
        let copied = tokenizer.map_or(Ok(Vec::new()), |t| write_tokenizer(t, temp))?;
        let entries: Vec<TensorEntry> = tensors.iter().map(|tensor| tensor.entry.clone()).collect();
        let mut files = (0..self.count())
            .map(|i| TorchWriter::create(&temp.join(part_name(i)), &entries))
            .collect::<Result<Vec<_>>>()?;
        for MetaPart { entry, from, cut, rotary } in &tensors {
            let whole = source.tensor(from)?;
            for (i, file) in files.iter_mut().enumerate() {
                let part = match cut {
                    TensorCut::Rows => whole.f_narrow(0, i as i64 * entry.shape[0], entry.shape[0])?,
                    TensorCut::Columns => whole.f_narrow(1, i as i64 * entry.shape[1], entry.shape[1])?,
                    TensorCut::Copy | TensorCut::Embedding => whole.shallow_clone(),
                };
                let order = RowOrder::MetaRotary { head_dim: self.shape.head_dim };
                file.write(&if *rotary { order.of_file(&part)? } else { part })?;
            }
            done.fetch_add(entry.bytes() * self.parts as u64, Relaxed);
        }
        files.into_iter().try_for_each(TorchWriter::finish)?;
        Ok((folder, copied.into_iter().map(|(name, ..)| name).collect()))
    }

    /// How a tensor of the model, or of its copy of a tied embedding, is written.
    fn tensor(&self, spec: TensorSpec, source: &TensorSource) -> Result<MetaPart> {
        let tied = self.shape.tie_word_embeddings && spec.name == LM_HEAD;
        let from = if tied { EMBEDDING.to_string() } else { spec.name.clone() };
        let named = named(&spec.name)
            .ok_or_else(|| Error::failed(format!("Meta's format has no place for `{}`", spec.name)))?;
        let cut = match named.cut {
            TensorCut::Embedding if is_llama3(&self.shape) => TensorCut::Rows,
            TensorCut::Embedding => TensorCut::Columns,
            cut => cut,
        };
        let mut shape = spec.shape;
        match cut {
            TensorCut::Columns => shape[1] /= self.parts,
            TensorCut::Rows => shape[0] /= self.parts,
            TensorCut::Copy | TensorCut::Embedding => {}
        }
        let kind = self.kind.map_or_else(|| source.view(&from).map(|view| view.kind), Ok)?;
        let entry = TensorEntry { name: named.name, kind, shape };
        Ok(MetaPart { entry, from, cut, rotary: named.rotary })
    }
}

/// Whether Meta's programs would take a model for a Llama 3, and cut its embeddings along the vocabulary.
fn is_llama3(s: &Shape) -> bool {
    s.rope_scaling.is_some() || s.rope_theta == LLAMA_3_THETA || s.vocab_size >= 128_000
}

/// The `params.json` of a model. An error (kind Data) says what Meta's format cannot express.
fn write_params(s: &Shape) -> Result<Value> {
    let refused = |what: String| Err(Error::data(format!("Meta's format cannot express this model: {what}")));
    for spec in layouts(s).iter().flat_map(|l| &l.specs) {
        if named(&spec.name).is_none() {
            return refused(format!("it has no place for `{}`", spec.name));
        }
    }
    if let Some(window) = s.sliding_window {
        return refused(format!("a sliding window (of {window} positions)"));
    }
    if s.head_dim * s.num_attention_heads != s.hidden_size {
        return refused(format!(
            "heads of {} channels; there they have hidden_size / num_attention_heads ({} / {})",
            s.head_dim, s.hidden_size, s.num_attention_heads
        ));
    }
    if s.features.rope_linear_factor.is_some() {
        return refused("rope_scaling of type linear".into());
    }
    let fixed = rope_scaling(s.hidden_size);
    if let Some(scaling) = s.rope_scaling.as_ref().filter(|scaling| **scaling != fixed) {
        return refused(format!(
            "rope_scaling is {}; Meta's programs have constants, for a hidden_size of {} {}",
            scaling.write(),
            s.hidden_size,
            fixed.write()
        ));
    }
    let (multiple_of, multiplier) = ffn_rule(s.hidden_size, s.intermediate_size);
    let mut params = Map::new();
    params.insert("dim".into(), json!(s.hidden_size));
    params.insert("n_layers".into(), json!(s.num_hidden_layers));
    params.insert("n_heads".into(), json!(s.num_attention_heads));
    if is_llama3(s) || s.num_key_value_heads != s.num_attention_heads {
        params.insert("n_kv_heads".into(), json!(s.num_key_value_heads));
    }
    params.insert("vocab_size".into(), json!(s.vocab_size));
    params.insert("multiple_of".into(), json!(multiple_of));
    if let Some(multiplier) = multiplier {
        params.insert("ffn_dim_multiplier".into(), json!(multiplier));
    }
    params.insert("norm_eps".into(), json!(s.rms_norm_eps));
    // Programs of Llama 1 and 2 do not know the key.
    if is_llama3(s) || s.rope_theta != 10000.0 {
        params.insert("rope_theta".into(), json!(s.rope_theta));
    }
    if s.rope_scaling.is_some() {
        params.insert("use_scaled_rope".into(), json!(true));
    }
    Ok(Value::Object(params))
}

/// `multiple_of` and `ffn_dim_multiplier` that give this size: those of a published model if they do.
fn ffn_rule(dim: i64, size: i64) -> (i64, Option<f64>) {
    for multiplier in [None, Some(1.3), Some(1.5)] {
        for multiple_of in [256, 1024, 4096] {
            if ffn_size(dim, multiplier, multiple_of) == size {
                return (multiple_of, multiplier);
            }
        }
    }
    let multiple_of = 1 << size.trailing_zeros().min(8);
    match ffn_size(dim, None, multiple_of) == size {
        true => (multiple_of, None),
        // Half a channel more, so that rounding down does not lose one.
        false => (multiple_of, Some((size as f64 + 0.5) / (8 * dim / 3) as f64)),
    }
}

/// Refuses a number of parts that does not divide what is cut.
fn check_parts(s: &Shape, parts: i64) -> Result<()> {
    let embedding = match is_llama3(s) {
        true => ("vocab_size", s.vocab_size),
        false => ("hidden_size", s.hidden_size),
    };
    let cut = [
        ("num_attention_heads", s.num_attention_heads),
        ("num_key_value_heads", s.num_key_value_heads),
        ("intermediate_size", s.intermediate_size),
        ("vocab_size", s.vocab_size),
        embedding,
    ];
    match cut.iter().find(|(_, n)| n % parts != 0) {
        None => Ok(()),
        Some((name, n)) => {
            let fit = |parts: &i64| cut.iter().all(|(_, n)| n % parts == 0);
            let fitting: Vec<String> = (1..=64).filter(fit).map(|n| n.to_string()).collect();
            Err(Error::config(format!(
                "--model-parallel {parts}: {name} ({n}) is not divisible by it; {} would do",
                fitting.join(", ")
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::shape_of;
    use super::*;
    use crate::config::shape::Llama3RopeScaling;

    #[test]
    fn any_feed_forward_size_can_be_said() {
        for dim in [6, 64, 288, 512, 2048, 4096, 5120, 8192] {
            for size in (1..2000).chain([11008, 13824, 14336, 28672, 28671]) {
                let (multiple_of, multiplier) = ffn_rule(dim, size);
                assert_eq!(
                    ffn_size(dim, multiplier, multiple_of),
                    size,
                    "{dim} {multiplier:?} {multiple_of}"
                );
            }
        }
    }

    #[test]
    fn shapes_survive_params() {
        let base = Shape::preset("llama-1b").unwrap();
        let small = Shape::preset("llama-15m").unwrap();
        let llama2 = Shape {
            hidden_size: 8192,
            head_dim: 128,
            num_attention_heads: 64,
            num_key_value_heads: 8,
            intermediate_size: 28672,
            max_position_embeddings: 4096,
            ..small.clone()
        };
        for s in [base, Shape { max_position_embeddings: 4096, ..small }, llama2] {
            let params = write_params(&s).unwrap();
            let read = shape_of(params.as_object().unwrap(), s.vocab_size, s.intermediate_size).unwrap();
            assert_eq!(read, Shape { tie_word_embeddings: false, ..s });
        }
    }

    #[test]
    fn what_meta_cannot_express_is_refused() {
        let base = Shape { max_position_embeddings: 4096, ..Shape::preset("llama-1b").unwrap() };
        let linear = Llama3RopeScaling { factor: 4.0, ..base.rope_scaling.clone().unwrap() };
        let cases = [
            (Shape { head_dim: 128, ..base.clone() }, "heads of 128 channels"),
            (Shape { rope_scaling: Some(linear), ..base.clone() }, "rope_scaling is {\"factor\":4.0"),
            // The factor of a model of this size is 32, so that 3.1's would be read as another.
            (Shape { rope_scaling: Some(rope_scaling(8192)), ..base.clone() }, "\"factor\":8.0"),
        ];
        for (shape, part) in cases {
            let e = write_params(&shape).unwrap_err();
            assert!(e.message.contains(part) && e.exit_code() == 3, "{e}");
        }
        let e = check_parts(&base, 3).unwrap_err();
        assert!(
            e.message.ends_with("num_attention_heads (32) is not divisible by it; 1, 2, 4, 8 would do"),
            "{e}"
        );
    }
}
