//! Files of tensors: what they hold, read from their headers alone.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};
use tch::Kind;

use super::InspectReport;
use crate::checkpoint::safetensors::SafetensorsReader;
use crate::checkpoint::torch_file;
use crate::error::Result;
use crate::gguf::{self, Gguf, is_gguf};

/// A tensor as a file describes it.
pub struct TensorLine {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: u64,
}

impl TensorLine {
    pub fn numel(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64
    }
}

/// What a file of tensors describes: `torch.save`'s and GGUF by their names, else safetensors.
fn open(path: &Path) -> Result<Vec<TensorLine>> {
    if is_gguf(path) {
        let file = Gguf::open(path)?;
        let describe = |info: &gguf::Info| TensorLine {
            name: info.name.clone(),
            dtype: info.dtype.to_string(),
            shape: info.shape.iter().map(|d| *d as usize).collect(),
            bytes: info.dtype.bytes(info.numel()),
        };
        return Ok(file.tensors().iter().map(describe).collect());
    }
    if is_torch_file(path) {
        let reader = torch_file::TorchReader::open(path)?;
        let describe = |(name, kind, shape): (&str, Kind, &[i64])| {
            let shape: Vec<usize> = shape.iter().map(|d| *d as usize).collect();
            let bytes = (shape.iter().product::<usize>() * kind.elt_size_in_bytes()) as u64;
            TensorLine { name: name.to_string(), dtype: dtype_name(kind), shape, bytes }
        };
        return Ok(reader.tensors().map(describe).collect());
    }
    let tensors = SafetensorsReader::open(path)?.tensors().into_iter();
    Ok(tensors
        .map(|(name, dtype, shape, bytes)| TensorLine { name, dtype: dtype.to_string(), shape, bytes })
        .collect())
}

/// Whether a file of this name is one of `torch.save`.
pub fn is_torch_file(path: &Path) -> bool {
    path.extension().is_some_and(|e| ["pth", "pt", "bin"].iter().any(|known| e == *known))
}

/// A dtype as safetensors spells it.
pub fn dtype_name(kind: Kind) -> String {
    match kind {
        Kind::Double => "F64".into(),
        Kind::Float => "F32".into(),
        Kind::BFloat16 => "BF16".into(),
        Kind::Half => "F16".into(),
        Kind::Int64 => "I64".into(),
        Kind::Int => "I32".into(),
        Kind::Int16 => "I16".into(),
        Kind::Int8 => "I8".into(),
        Kind::Uint8 => "U8".into(),
        Kind::Bool => "BOOL".into(),
        other => format!("{other:?}"),
    }
}

/// Reads the headers of files of `dir`. Notes the files, their sum and their dtypes; those that are damaged are problems.
pub fn describe(report: &mut InspectReport, dir: &Path, names: &[String]) -> Vec<TensorLine> {
    let (mut files, mut tensors) = (Vec::new(), Vec::new());
    let mut total = 0;
    for name in names {
        let path = dir.join(name);
        let bytes = path.metadata().map_or(0, |m| m.len());
        total += bytes;
        let mut file = json!({"name": name, "bytes": bytes});
        if let Some(found) = report.noted(open(&path)) {
            file["num_tensors"] = json!(found.len());
            tensors.extend(found);
        }
        files.push(file);
    }
    let mut dtypes: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for tensor in &tensors {
        let (count, bytes) = dtypes.entry(&tensor.dtype).or_default();
        (*count, *bytes) = (*count + 1, *bytes + tensor.bytes);
    }
    let dtypes: Map<String, Value> = dtypes
        .into_iter()
        .map(|(dtype, (count, bytes))| (dtype.to_string(), json!({"num_tensors": count, "bytes": bytes})))
        .collect();
    report.fact("dtypes", dtypes);
    report.fact("bytes", total);
    report.fact("files", files);
    tensors
}

/// Notes every tensor.
pub fn list(report: &mut InspectReport, tensors: &[TensorLine]) {
    let list: Vec<Value> =
        tensors.iter().map(|t| json!({"name": t.name, "dtype": t.dtype, "shape": t.shape})).collect();
    report.fact("tensors", list);
}

/// The part of a model that a tensor belongs to, by its name in any of the usual conventions.
pub fn group_of(name: &str) -> &'static str {
    let has = |parts: &[&str]| parts.iter().any(|part| name.contains(part));
    match () {
        () if has(&["rotary_emb", "rope.freqs", "rope_freqs"]) => "other",
        () if has(&["norm", "ln_1", "ln_2", "ln_f"]) => "norms",
        () if has(&["embed_tokens", "tok_embeddings", "wte", "token_embd"]) => "embedding",
        () if has(&["lm_head", "score."]) || name.starts_with("output.") => "head",
        () if has(&["block_sparse_moe.gate.", "mlp.gate.", "ffn_gate_inp."]) => "router",
        () if has(&[".experts.", "_exps."]) => "experts",
        () if has(&["attn", "attention"]) => "attention",
        () if has(&["mlp", "feed_forward", "ffn_"]) => "mlp",
        () => "other",
    }
}

/// Parameters by group, and their sum.
pub fn parameters<'a>(tensors: impl Iterator<Item = (&'a str, u64)>) -> Value {
    const GROUPS: [&str; 8] =
        ["embedding", "attention", "mlp", "router", "experts", "norms", "head", "other"];
    let mut sums = [0; GROUPS.len()];
    for (name, numel) in tensors {
        let group = group_of(name);
        sums.iter_mut().zip(GROUPS).filter(|(_, g)| *g == group).for_each(|(sum, _)| *sum += numel);
    }
    let mut object = Map::from_iter([("total".to_string(), json!(sums.iter().sum::<u64>()))]);
    object.extend(GROUPS.iter().zip(sums).filter(|(_, n)| *n > 0).map(|(g, n)| (g.to_string(), json!(n))));
    Value::Object(object)
}

/// A file by itself.
pub fn file(path: &Path) -> InspectReport {
    let mut report =
        InspectReport::new(if is_torch_file(path) { "torch file" } else { "safetensors file" }, path);
    if !is_torch_file(path)
        && let Ok(reader) = SafetensorsReader::open(path)
    {
        report.fact("metadata", json!(reader.metadata().into_iter().collect::<BTreeMap<_, _>>()));
    }
    let dir = path.parent().unwrap_or(Path::new(""));
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let tensors = describe(&mut report, dir, &[name]);
    report.fact("num_elements", tensors.iter().map(TensorLine::numel).sum::<u64>());
    list(&mut report, &tensors);
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_of_all_conventions_have_a_group() {
        for (name, group) in [
            ("model.embed_tokens.weight", "embedding"),
            ("tok_embeddings.weight", "embedding"),
            ("transformer.wte.weight", "embedding"),
            ("model.layers.0.self_attn.q_proj.weight", "attention"),
            ("model.layers.0.self_attn.q_norm.weight", "norms"),
            ("layers.3.attention.wo.weight", "attention"),
            ("layers.3.attention_norm.weight", "norms"),
            ("transformer.h.0.attn.c_attn.bias", "attention"),
            ("transformer.h.0.ln_1.weight", "norms"),
            ("model.layers.0.mlp.gate_proj.weight", "mlp"),
            ("layers.3.feed_forward.w1.weight", "mlp"),
            ("model.layers.0.block_sparse_moe.gate.weight", "router"),
            ("model.layers.0.block_sparse_moe.experts.7.w1.weight", "experts"),
            ("token_embd.weight", "embedding"),
            ("blk.0.attn_q.weight", "attention"),
            ("blk.0.attn_norm.weight", "norms"),
            ("blk.0.ffn_norm.weight", "norms"),
            ("blk.0.ffn_down.weight", "mlp"),
            ("blk.0.ffn_gate_inp.weight", "router"),
            ("blk.0.ffn_down_exps.weight", "experts"),
            ("rope_freqs.weight", "other"),
            ("model.norm.weight", "norms"),
            ("lm_head.weight", "head"),
            ("output.weight", "head"),
            ("score.weight", "head"),
            ("model.layers.0.self_attn.rotary_emb.inv_freq", "other"),
        ] {
            assert_eq!(group_of(name), group, "{name}");
        }
        let sums =
            parameters([("lm_head.weight", 3), ("model.norm.weight", 4), ("score.weight", 5)].into_iter());
        assert_eq!(sums, json!({"total": 12, "norms": 4, "head": 8}));
    }
}
