//! Writing of models as GGUF files, which llama.cpp and what is built on it load.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tch::{Kind, Tensor};

use super::names::{self, OUTPUT, ROPE_FREQS, TOKEN_EMBEDDING};
use super::quants::{dequantize, quantize};
use super::shape;
use crate::checkpoint::convert::StoredAs;
use crate::checkpoint::families;
use crate::checkpoint::source::{RowOrder, TensorSource, for_chunks};
use crate::config::shape::Shape;
use crate::data::tokenizer::{Tokenizer, gguf};
use crate::error::{Error, Result};
use crate::files::AtomicFile;
use crate::gguf::{GgufDtype, GgufWriter, Metadata, MetadataValue};
use crate::model::layout::layouts;

/// ggml's number for the way in which blocks are laid out.
const QUANTIZATION_VERSION: i64 = 2;

/// A tensor of the file.
struct Planned {
    name: String,
    dtype: GgufDtype,
    shape: Vec<i64>,
    /// The model's tensors that lie in it, one after the other.
    from: Vec<String>,
    rotary: bool,
    plus_one: bool,
}

/// What a file will hold.
pub(in crate::checkpoint) struct Plan {
    shape: Shape,
    /// What it says about the shape.
    metadata: Metadata,
    tensors: Vec<Planned>,
    /// Where each tensor of the model lies in `tensors`.
    places: HashMap<String, usize>,
    file_type: i64,
}

impl Plan {
    /// `stored`: of the matrices; none: each as it is in `source`. Vectors and a router are float32, as ggml wants them; with
    /// 4 bits embedding and head have 8; rows that are no whole blocks are float16.
    ///
    /// # Errors
    /// Of kind Data: what the format, or llama.cpp, cannot express.
    pub fn new(shape: &Shape, source: &TensorSource, stored: Option<StoredAs>) -> Result<Plan> {
        shape.predicts().map_err(|e| e.context("GGUF has no place for a scalar head"))?;
        let refused = |what: String| Error::data(format!("GGUF cannot express this model: {what}"));
        let mut metadata = Metadata::default();
        shape::write(shape, &mut metadata).map_err(refused)?;
        let (mut tensors, mut places): (Vec<Planned>, _) = (Vec::new(), HashMap::new());
        for spec in layouts(shape).into_iter().flat_map(|l| l.specs) {
            let place = names::place(&spec.name, shape, false)
                .ok_or_else(|| refused(format!("it has no place for `{}`", spec.name)))?;
            let at = match tensors.iter().position(|t| t.name == place.tensor) {
                Some(at) => {
                    tensors[at].join(&spec.shape, place.expert.is_some());
                    at
                }
                None => {
                    let kind = source.view(&spec.name)?.kind;
                    tensors.push(Planned {
                        dtype: dtype(&place.tensor, &spec.shape, stored.unwrap_or(StoredAs::Kind(kind))),
                        name: place.tensor,
                        shape: match place.expert {
                            Some(_) => [&[1], spec.shape.as_slice()].concat(),
                            None => spec.shape.clone(),
                        },
                        from: Vec::new(),
                        rotary: place.rotary,
                        plus_one: place.plus_one,
                    });
                    tensors.len() - 1
                }
            };
            tensors[at].from.push(spec.name.clone());
            places.insert(spec.name, at);
        }
        let most = tensors
            .iter()
            .max_by_key(|t| tensors.iter().filter(|u| u.dtype == t.dtype).map(Planned::numel).sum::<i64>());
        let file_type = match most.map_or(GgufDtype::F32, |t| t.dtype) {
            GgufDtype::F16 => 1,
            GgufDtype::Q4_0 => 2,
            GgufDtype::Q4_1 => 3,
            GgufDtype::Q8_0 => 7,
            GgufDtype::BF16 => 32,
            _ => 0,
        };
        Ok(Plan { shape: shape.clone(), metadata, tensors, places, file_type })
    }

    /// What llama.cpp does not read of the file, as a sentence for the user.
    pub fn left_out(&self) -> Option<String> {
        (families::of(self.shape.family).gguf.left_out)(&self.shape)
    }

    /// Bytes of a tensor of the model.
    pub fn bytes_of(&self, name: &str, numel: i64) -> u64 {
        self.tensors[self.places[name]].dtype.bytes(numel)
    }

    /// A tensor of the model as it is read back.
    pub fn rounded(&self, name: &str, t: &Tensor) -> Result<Tensor> {
        let Planned { dtype, plus_one, .. } = self.tensors[self.places[name]];
        if plus_one {
            return Ok(add_one(t)? - 1.0);
        }
        if let Some(kind) = kind(dtype) {
            return Ok(t.f_to_kind(kind)?);
        }
        let mut numbers = vec![0f32; t.numel()];
        let mut at = 0;
        blocks(t, dtype, |part| {
            let n = part.len() / dtype.block_bytes() * dtype.block_len();
            dequantize(dtype, part, &mut numbers[at..at + n]);
            at += n;
            Ok(())
        })?;
        Ok(Tensor::from_slice(&numbers).f_view(t.size().as_slice())?)
    }

    /// Writes the file, which has no name yet, and tells what gets lost of the tokenizer; `done` counts the bytes.
    pub fn write(
        &self,
        to: &Path,
        source: &TensorSource,
        tokenizer: Option<&Tokenizer>,
        name: &str,
        done: &AtomicU64,
    ) -> Result<(AtomicFile, Option<gguf::GgufLimit>)> {
        let mut metadata = self.metadata.clone();
        let form = families::of(self.shape.family).gguf;
        for (key, value) in [
            ("general.architecture", MetadataValue::Text(form.architecture.into())),
            ("general.type", MetadataValue::Text("model".into())),
            ("general.name", MetadataValue::Text(name.into())),
            ("general.file_type", MetadataValue::Integer(self.file_type)),
            ("general.quantization_version", MetadataValue::Integer(QUANTIZATION_VERSION)),
        ] {
            metadata.set(key, value);
        }
        let loss = match tokenizer {
            Some(tokenizer) => gguf::write(tokenizer, self.shape.vocab_size, &mut metadata)?,
            None => {
                metadata.set("tokenizer.ggml.model", MetadataValue::Text("none".into()));
                None
            }
        };
        let factors = shape::rope_factors(&self.shape).map(|factors| (vec![factors.len() as i64], factors));
        let table = factors.iter().map(|(shape, _)| (ROPE_FREQS, GgufDtype::F32, shape.as_slice()));
        let tensors = self.tensors.iter().map(|t| (t.name.as_str(), t.dtype, t.shape.as_slice()));
        let mut writer = GgufWriter::create(to, &metadata, table.chain(tensors))?;
        if let Some((_, factors)) = &factors {
            let bytes: Vec<u8> = factors.iter().flat_map(|x| x.to_le_bytes()).collect();
            writer.tensor(|put| put(&bytes))?;
        }
        for planned in &self.tensors {
            writer.tensor(|put| {
                for name in &planned.from {
                    let t = source.tensor(name)?;
                    let order = RowOrder::MetaRotary { head_dim: self.shape.head_dim };
                    let t = if planned.rotary { order.of_file(&t)? } else { t };
                    let t = if planned.plus_one { add_one(&t)? } else { t };
                    match kind(planned.dtype) {
                        Some(kind) => for_chunks(&t, kind, &mut *put)?,
                        None => blocks(&t, planned.dtype, &mut *put)?,
                    }
                }
                Ok(())
            })?;
            done.fetch_add(planned.dtype.bytes(planned.numel()), Relaxed);
        }
        Ok((writer.finish()?, loss))
    }
}

impl Planned {
    fn numel(&self) -> i64 {
        self.shape.iter().product()
    }

    /// Makes room for another tensor: as one more of equal ones, or as further rows.
    fn join(&mut self, shape: &[i64], stacked: bool) {
        self.shape[0] += if stacked { 1 } else { shape[0] };
    }
}

/// The weights of a norm as llama.cpp multiplies by them.
fn add_one(t: &Tensor) -> Result<Tensor> {
    Ok(t.f_to_kind(Kind::Float)? + 1.0)
}

/// What a tensor of this name and shape is stored as.
fn dtype(name: &str, shape: &[i64], stored: StoredAs) -> GgufDtype {
    if shape.len() < 2 || name.ends_with(".ffn_gate_inp.weight") {
        return GgufDtype::F32;
    }
    match stored {
        StoredAs::Kind(Kind::Half) => GgufDtype::F16,
        StoredAs::Kind(Kind::BFloat16) => GgufDtype::BF16,
        StoredAs::Kind(_) => GgufDtype::F32,
        StoredAs::Blocks(_) if shape[1] % GgufDtype::Q8_0.block_len() as i64 != 0 => GgufDtype::F16,
        StoredAs::Blocks(_) if [OUTPUT, TOKEN_EMBEDDING].contains(&name) => GgufDtype::Q8_0,
        StoredAs::Blocks(blocks) => blocks,
    }
}

/// The dtype of libtorch's that is the same; none for blocks.
fn kind(dtype: GgufDtype) -> Option<Kind> {
    match dtype {
        GgufDtype::F32 => Some(Kind::Float),
        GgufDtype::F16 => Some(Kind::Half),
        GgufDtype::BF16 => Some(Kind::BFloat16),
        _ => None,
    }
}

/// Gives a tensor as blocks, in the order of its elements, a few megabytes at a time.
fn blocks(t: &Tensor, dtype: GgufDtype, mut put: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let mut bytes = Vec::new();
    for_chunks(t, Kind::Float, |part| {
        let numbers: Vec<f32> = part.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
        bytes.clear();
        quantize(dtype, &numbers, &mut bytes);
        put(&bytes)
    })
}
