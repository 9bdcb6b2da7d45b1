//! `meta.json` of a checkpoint: what lies in its other files, and what a run goes on with.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::model_record::ModelRecord;
use super::ours::Scoring;
use super::rectangles::{CutMeta, Divided};
use crate::config::shape::Shape;
use crate::config::template_date::TemplateDate;
use crate::distributed::sharded::{Layout, TensorSpec};
use crate::error::{Error, Result};
use crate::files::read_error;
use crate::model::Trainable;

/// The part of a shard that holds a group's values; its moments lie beside it.
pub const MASTER: &str = "master";

/// The file that makes a checkpoint complete: it is written last.
pub const META: &str = "meta.json";
const FORMAT: &str = "corral checkpoint";
const VERSION: u64 = 1;
/// Of checkpoints of which tensor-parallel ranks have parts: programs that do not know these must not read them.
const VERSION_WITH_TENSOR: u64 = 2;

/// `meta.json`, inside its envelope.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Meta {
    /// Updates before the checkpoint.
    pub step: u64,
    /// Ranks of the run that wrote it.
    pub world_size: i64,
    /// Updates that AdamW has made.
    pub optimizer_step: i64,
    /// Of the model, by which its tensors are known.
    pub shape: Shape,
    /// Hash of the resolved configuration, as the trainer gave it.
    pub config_hash: String,
    /// The trained tensors, in the order of the forward.
    pub groups: Vec<GroupMeta>,
    /// Ranks that shared every matrix.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub tensor: usize,
    /// First element and length of each slice of each group, by file: `[(stage * slices + slice) * tensor + tensor rank][group]`;
    /// empty where another stage of a pipeline has the group.
    pub slices: Vec<Vec<(i64, i64)>>,
    /// All files of the checkpoint but `meta.json`.
    pub files: Vec<FileMeta>,
    /// Where what was not trained comes from; none where all was trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseMeta>,
    /// Of a reward model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scoring: Option<Scoring>,
    /// The models that the run began with.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<ModelRecord>,
    /// Further models of the run, each a checkpoint in a folder of this name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parts: Vec<String>,
    /// The date that the chat template is told, which a resumed run keeps; none where it asks for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template_date: Option<TemplateDate>,
    /// What the trainer gave: data position, counters, randomness.
    pub state: Value,
}

/// The model that a run began with, of which a part was not trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BaseMeta {
    /// Its path, or its hub id.
    pub path: String,
    /// Which tensors were trained, and which adapters there are.
    pub trainable: Trainable,
}

/// A group's trained tensors in its flat buffer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupMeta {
    /// Such as `block 0`.
    pub name: String,
    /// In the order of the buffer.
    pub tensors: Vec<TensorMeta>,
}

/// A tensor in its group's flat buffer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorMeta {
    /// As in Hugging Face checkpoints.
    pub name: String,
    /// From the outermost dimension, of all ranks.
    pub shape: Vec<i64>,
    /// Its first element in the flat buffer.
    pub offset: i64,
    /// How it was divided among the ranks that shared every matrix; none: all had all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cut: Option<CutMeta>,
}

impl TensorMeta {
    pub(super) fn divided(&self) -> Divided<'_> {
        Divided { shape: &self.shape, cut: self.cut }
    }
}

fn one() -> usize {
    1
}

fn is_one(n: &usize) -> bool {
    *n == 1
}

/// A file, by which damage is found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileMeta {
    /// Relative to the checkpoint's folder.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// CRC-32 of its content.
    pub crc32: u32,
}

#[derive(Serialize, Deserialize)]
struct Envelope {
    format: String,
    version: u64,
    /// CRC-32 of `checkpoint` as serde_json prints it without blanks.
    crc32: u32,
    checkpoint: Value,
}

impl GroupMeta {
    /// Of the trained tensors of a group.
    pub fn of(layout: &Layout) -> GroupMeta {
        let tensor = |s: &TensorSpec| TensorMeta {
            name: s.name.clone(),
            shape: s.whole().shape,
            offset: s.offset,
            cut: CutMeta::of(s),
        };
        GroupMeta { name: layout.name.clone(), tensors: layout.specs.iter().map(tensor).collect() }
    }

    fn numel(&self) -> i64 {
        self.tensors.iter().map(|t| t.offset + t.divided().rectangle_numel()).max().unwrap_or(0)
    }
}

impl Meta {
    /// As the text of `meta.json`.
    pub fn to_text(&self) -> Result<String> {
        let describe = |e: serde_json::Error| Error::failed(format!("{META}: {e}"));
        let checkpoint = serde_json::to_value(self).map_err(describe)?;
        let crc32 = crc32fast::hash(checkpoint.to_string().as_bytes());
        let version = if self.tensor == 1 { VERSION } else { VERSION_WITH_TENSOR };
        let envelope = Envelope { format: FORMAT.into(), version, crc32, checkpoint };
        serde_json::to_string_pretty(&envelope).map_err(describe)
    }

    /// Reads `meta.json`; the error says what is wrong with it.
    fn parse(text: &str) -> Result<Meta, String> {
        let envelope: Envelope = serde_json::from_str(text).map_err(|e| e.to_string())?;
        if envelope.format != FORMAT {
            return Err(format!("format is `{}`, not `{FORMAT}`", envelope.format));
        }
        if ![VERSION, VERSION_WITH_TENSOR].contains(&envelope.version) {
            return Err(format!(
                "version {} of the format; this program reads versions {VERSION} and {VERSION_WITH_TENSOR}",
                envelope.version
            ));
        }
        if crc32fast::hash(envelope.checkpoint.to_string().as_bytes()) != envelope.crc32 {
            return Err("its contents do not match its checksum".into());
        }
        let mut meta: Meta = serde_json::from_value(envelope.checkpoint).map_err(|e| e.to_string())?;
        meta.shape.complete();
        for rank in &meta.slices {
            if rank.len() != meta.groups.len() {
                return Err("slices and groups do not match".into());
            }
        }
        meta.check_slices()?;
        Ok(meta)
    }

    /// Says what is wrong with slices that are not all of every group.
    fn check_slices(&self) -> Result<(), String> {
        if self.tensor == 0 || !self.slices.len().is_multiple_of(self.tensor) {
            return Err(format!("{} files of slices of {} ranks each", self.slices.len(), self.tensor));
        }
        for tensor in self.groups.iter().flat_map(|g| &g.tensors) {
            let Some(cut) = tensor.cut else { continue };
            let fits = tensor.shape.get(cut.dim).is_some_and(|n| *n > 0)
                && cut.size > 0
                && cut.copies > 0
                && tensor.divided().tensor_ranks().all(|rank| rank < self.tensor);
            if !fits {
                return Err(format!("`{}` cannot be divided as it says: {cut:?}", tensor.name));
            }
        }
        for (g, group) in self.groups.iter().enumerate() {
            for tensor_rank in 0..self.tensor {
                let mut next = 0;
                for slices in self.slices.iter().skip(tensor_rank).step_by(self.tensor) {
                    let (start, len) = slices[g];
                    if start != next || len < 0 {
                        return Err(format!(
                            "the slices of group `{}` have a gap or overlap at {next}",
                            group.name
                        ));
                    }
                    next += len;
                }
                if next != group.numel() {
                    return Err(format!(
                        "the slices of group `{}` end at {next} of {}",
                        group.name,
                        group.numel()
                    ));
                }
            }
        }
        Ok(())
    }
}

/// The file of one slice.
pub fn shard_name(rank: usize, size: usize) -> String {
    format!("shard-{rank:05}-of-{size:05}.safetensors")
}

/// The name of a tensor in a shard.
pub fn tensor_name(group: &str, part: &str) -> String {
    format!("{group}.{part}")
}

/// Reads and checks a checkpoint's `meta.json`, and no other file.
pub fn read_meta(dir: &Path) -> Result<Meta> {
    let path = dir.join(META);
    let text = fs::read_to_string(&path).map_err(|e| read_error(&path, &e))?;
    Meta::parse(&text).map_err(|e| Error::data(format!("{}: {e}", path.display())))
}
