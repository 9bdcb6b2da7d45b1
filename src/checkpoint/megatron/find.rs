//! Where in the ranks' files every tensor of the model lies.

use std::collections::BTreeSet;

use tch::Kind;

use crate::checkpoint::source::{RowOrder, TensorBlock, TensorFile, TensorSource, View};
use crate::checkpoint::unfit::Unfit;
use crate::config::shape::Shape;
use crate::error::{Error, Result};
use crate::model::layout::{EMBEDDING, FINAL_NORM, LM_HEAD, layouts};

/// How the files divide a model.
pub(super) struct Places {
    pub tensor: i64,
    pub pipeline: i64,
    /// A stage's parts of the model, by their keys.
    pub chunks: Vec<String>,
}

/// A tensor of the files: the stage that has it, and its names, of which one is there.
struct Stored {
    stage: i64,
    names: Vec<String>,
    part: Part,
}

/// What of a stored tensor a tensor of the model is.
#[derive(Clone, Copy)]
enum Part {
    /// Of all ranks the same.
    Whole,
    /// Ranks have rows.
    Rows,
    /// Ranks have columns.
    Columns,
    /// Of every key-value group rows `first..first + rows` (in heads), of as many as a group has.
    Group { first: i64, rows: i64 },
    /// Of every rank's rows the first or second half.
    Half(i64),
}

impl Places {
    fn file(&self, stage: i64, rank: i64) -> usize {
        (stage * self.tensor + rank) as usize
    }

    /// Rows of the embedding, over all ranks.
    pub fn vocab_size(&self, files: &[Box<dyn TensorFile>]) -> Result<i64> {
        let name = format!("{}.embedding.word_embeddings.weight", self.chunks[0]);
        let rows = |rank: i64| -> Result<i64> {
            Ok(files[self.file(0, rank)].info(&name)?.0.first().copied().unwrap_or(0))
        };
        (0..self.tensor).map(rows).sum()
    }

    /// The stage, the chunk and the number there of a layer: chunk by chunk the stages have equally many each.
    fn layer(&self, layer: i64, s: &Shape) -> (i64, &str, i64) {
        let each = (s.num_hidden_layers / (self.pipeline * self.chunks.len() as i64)).max(1);
        let (part, number) = (layer / each, layer % each);
        let chunk = (part / self.pipeline).min(self.chunks.len() as i64 - 1);
        (part % self.pipeline, &self.chunks[chunk as usize], number)
    }

    fn stored(&self, name: &str, s: &Shape) -> Option<Stored> {
        let (first, last) = (&self.chunks[0], &self.chunks[self.chunks.len() - 1]);
        let ends = |chunk: &str, stage: i64, name: &str, part: Part| {
            Some(Stored { stage, names: vec![format!("{chunk}.{name}")], part })
        };
        match name {
            EMBEDDING => return ends(first, 0, "embedding.word_embeddings.weight", Part::Rows),
            FINAL_NORM => {
                return ends(last, self.pipeline - 1, "decoder.final_layernorm.weight", Part::Whole);
            }
            LM_HEAD => return ends(last, self.pipeline - 1, "output_layer.weight", Part::Rows),
            _ => {}
        }
        let (layer, name) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let (stage, chunk, number) = self.layer(layer.parse().ok()?, s);
        let queries = s.num_attention_heads / s.num_key_value_heads;
        let (module, kind) = name.rsplit_once('.')?;
        let qkv = format!("self_attention.linear_qkv.{kind}");
        // With Transformer Engine a norm is in the product that it comes before.
        let (names, part) = match module {
            "self_attn.q_proj" => (vec![qkv], Part::Group { first: 0, rows: queries }),
            "self_attn.k_proj" => (vec![qkv], Part::Group { first: queries, rows: 1 }),
            "self_attn.v_proj" => (vec![qkv], Part::Group { first: queries + 1, rows: 1 }),
            "self_attn.o_proj" => (vec!["self_attention.linear_proj.weight".into()], Part::Columns),
            "mlp.gate_proj" => (vec!["mlp.linear_fc1.weight".into()], Part::Half(0)),
            "mlp.up_proj" => (vec!["mlp.linear_fc1.weight".into()], Part::Half(1)),
            "mlp.down_proj" => (vec!["mlp.linear_fc2.weight".into()], Part::Columns),
            "input_layernorm" => {
                let names = ["input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"];
                (names.map(String::from).to_vec(), Part::Whole)
            }
            "post_attention_layernorm" => {
                let names = ["pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"];
                (names.map(String::from).to_vec(), Part::Whole)
            }
            _ => return None,
        };
        let names = names.iter().map(|name| format!("{chunk}.decoder.layers.{number}.{name}")).collect();
        Some(Stored { stage, names, part })
    }

    /// Finds every tensor of the model.
    pub fn find(&self, source: &mut TensorSource, s: &Shape) -> Result<()> {
        let parts = self.pipeline * self.chunks.len() as i64;
        for (what, n, by) in [
            ("num_layers", s.num_hidden_layers, parts),
            ("num_query_groups", s.num_key_value_heads, self.tensor),
            ("ffn_hidden_size", s.intermediate_size, self.tensor),
            ("the rows of the embedding", s.vocab_size, self.tensor),
        ] {
            if n % by != 0 {
                return Err(Error::data(format!(
                    "{what}, {n}, does not divide over {by} parts, as is read here"
                )));
            }
        }
        let (mut known, mut unfit) = (BTreeSet::new(), Unfit::default());
        for spec in layouts(s).into_iter().flat_map(|layout| layout.specs) {
            let Some(stored) = self.stored(&spec.name, s) else {
                return Err(Error::failed(format!("Megatron's names have no place for `{}`", spec.name)));
            };
            let first = &source.files[self.file(stored.stage, 0)];
            let Some(name) = stored.names.iter().find(|name| first.info(name).is_ok()) else {
                unfit.missing.push(format!("`{}` is missing", stored.names[0]));
                continue;
            };
            known.insert((stored.stage, name.clone()));
            match self.view(&source.files, &stored, name, &spec.shape, s) {
                Ok(view) => drop(source.views.insert(spec.name, view)),
                Err(e) => unfit.wrong.push(e.message),
            }
        }
        // A tied embedding is on the last stage once more.
        let tied = format!("{}.output_layer.weight", self.chunks[self.chunks.len() - 1]);
        for stage in 0..self.pipeline {
            for name in source.files[self.file(stage, 0)].names() {
                let again = s.tie_word_embeddings && stage + 1 == self.pipeline && name == tied;
                if !again && !known.contains(&(stage, name.clone())) {
                    unfit.extra.push(format!("`{name}` belongs to no such model"));
                }
            }
        }
        unfit.into_result("the tensors do not fit its args")
    }

    fn view(
        &self,
        files: &[Box<dyn TensorFile>],
        stored: &Stored,
        name: &str,
        shape: &[i64],
        s: &Shape,
    ) -> Result<View> {
        let width = shape.get(1).copied().unwrap_or(1);
        let heads = s.num_attention_heads / s.num_key_value_heads + 2;
        // What a rank's file has.
        let mut wanted = shape.to_vec();
        match stored.part {
            Part::Whole => {}
            Part::Rows => wanted[0] /= self.tensor,
            Part::Columns => wanted[1] /= self.tensor,
            Part::Group { .. } => wanted[0] = s.num_key_value_heads / self.tensor * heads * s.head_dim,
            Part::Half(_) => wanted[0] = 2 * shape[0] / self.tensor,
        }
        let ranks = if matches!(stored.part, Part::Whole) { 1 } else { self.tensor };
        let mut kind: Option<Kind> = None;
        let mut blocks = Vec::new();
        for rank in 0..ranks {
            let file = self.file(stored.stage, rank);
            let (found, found_kind) = files[file].info(name)?;
            if found != wanted || kind.is_some_and(|kind| kind != found_kind) {
                return Err(Error::data(format!(
                    "`{name}` of tensor rank {rank} is {found:?} in {found_kind:?} and should be {wanted:?}, in one dtype"
                )));
            }
            kind = Some(found_kind);
            let stride = wanted.get(1).copied().unwrap_or(1);
            // Rows and columns of the model's tensor, and the row of the file that they begin with.
            let mut block = |rows: std::ops::Range<i64>, cols: std::ops::Range<i64>, row: i64| {
                let (tensor, first) = (name.to_string(), row * stride);
                blocks.push(TensorBlock { file, tensor, rows, cols, first, stride, order: RowOrder::Same });
            };
            match stored.part {
                Part::Whole => block(0..shape[0], 0..width, 0),
                Part::Rows => block(rank * wanted[0]..(rank + 1) * wanted[0], 0..width, 0),
                Part::Columns => block(0..shape[0], rank * stride..(rank + 1) * stride, 0),
                Part::Half(half) => {
                    let rows = wanted[0] / 2;
                    block(rank * rows..(rank + 1) * rows, 0..width, half * rows);
                }
                Part::Group { first, rows } => {
                    let groups = s.num_key_value_heads / self.tensor;
                    for group in 0..groups {
                        let (of_model, d) = (rank * groups + group, s.head_dim);
                        let at = of_model * rows * d;
                        block(at..at + rows * d, 0..width, (group * heads + first) * d);
                    }
                }
            }
        }
        let kind = kind.ok_or_else(|| Error::failed("a tensor on no rank"))?;
        Ok(View { shape: shape.to_vec(), kind, width, blocks })
    }
}
