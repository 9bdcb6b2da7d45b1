//! Models in Meta's format: `params.json` and `consolidated.00.pth`, `consolidated.01.pth`, ..., one for each
//! model-parallel part.
//!
//! The parts are cut where Meta's `ColumnParallelLinear` and `RowParallelLinear` cut: wq, wk, wv, w1, w3 and output by
//! rows, wo and w2 by columns; norms are in every part. Embeddings are cut along the hidden size in Llama 1 and 2
//! (`ParallelEmbedding`), along the vocabulary from Llama 3 on (`VocabParallelEmbedding`): the shapes tell which. The
//! rows of wq and wk are in another order than Hugging Face's ([`RowOrder::MetaRotary`]).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::hf_config::read_object;
use super::source::{RowOrder, TensorBlock, TensorFile, TensorSource, View};
use super::torch_file::TorchReader;
use super::unfit::{Unfit, common_prefix};
use crate::config::shape::{Family, Head, Llama3RopeScaling, Shape};
use crate::error::{Context, Error, Result};
use crate::files::read_error;
use crate::model::layout::{EMBEDDING, FINAL_NORM, LM_HEAD, layouts};

mod write;

pub(super) use write::MetaParts;

pub(super) const PARAMS: &str = "params.json";

/// Keys of `params.json` that are read, or say nothing about the mathematics.
const KNOWN: [&str; 12] = [
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "ffn_dim_multiplier",
    "norm_eps",
    "rope_theta",
    "use_scaled_rope",
    "max_seq_len",
    "max_batch_size",
];

/// Models of smaller `dim` that use scaled rotary positions are Llama 3.2 (1B: 2048, 3B: 3072; 3.1 and 3.3 begin at
/// 4096): the factor, which `params.json` does not say, is 32 there and 8 in the others.
const LLAMA_3_1_DIM: i64 = 4096;

/// The base of the rotary angles from Llama 3 on.
const LLAMA_3_THETA: f64 = 500000.0;

/// Where a tensor is cut into parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TensorCut {
    Rows,
    Columns,
    /// In every part whole.
    Copy,
    /// Of embeddings: by columns in Llama 1 and 2, by rows from Llama 3 on.
    Embedding,
}

/// A tensor of the model in Meta's files.
struct MetaTensor {
    name: String,
    cut: TensorCut,
    /// Whether its rows are rotated pairs.
    rotary: bool,
}

/// Meta's name for a tensor of the model; none where the format has no place for it.
fn named(model_name: &str) -> Option<MetaTensor> {
    let (name, cut) = match model_name {
        EMBEDDING => ("tok_embeddings.weight".to_string(), TensorCut::Embedding),
        FINAL_NORM => ("norm.weight".to_string(), TensorCut::Copy),
        LM_HEAD => ("output.weight".to_string(), TensorCut::Rows),
        _ => {
            let (layer, part) = model_name.strip_prefix("model.layers.")?.split_once('.')?;
            let (part, cut) = match part {
                "self_attn.q_proj.weight" => ("attention.wq", TensorCut::Rows),
                "self_attn.k_proj.weight" => ("attention.wk", TensorCut::Rows),
                "self_attn.v_proj.weight" => ("attention.wv", TensorCut::Rows),
                "self_attn.o_proj.weight" => ("attention.wo", TensorCut::Columns),
                "mlp.gate_proj.weight" => ("feed_forward.w1", TensorCut::Rows),
                "mlp.down_proj.weight" => ("feed_forward.w2", TensorCut::Columns),
                "mlp.up_proj.weight" => ("feed_forward.w3", TensorCut::Rows),
                "input_layernorm.weight" => ("attention_norm", TensorCut::Copy),
                "post_attention_layernorm.weight" => ("ffn_norm", TensorCut::Copy),
                _ => return None,
            };
            (format!("layers.{layer}.{part}.weight"), cut)
        }
    };
    let rotary = name.ends_with("attention.wq.weight") || name.ends_with("attention.wk.weight");
    Some(MetaTensor { name, cut, rotary })
}

/// A model in Meta's format, checked and ready to be read.
pub struct MetaModel {
    dir: PathBuf,
    shape: Shape,
    source: TensorSource,
}

impl MetaModel {
    /// Opens a folder with `params.json` and the parts of a model. Reads and checks all headers; of the tensors only the
    /// embedding and the output projection, as far as they are equal, which tells whether they are tied.
    ///
    /// Errors (kind Data): keys of `params.json` that are not known, files that are missing or damaged, and in one
    /// message all tensors that are missing, superfluous or of another shape.
    pub fn load(dir: &Path) -> Result<MetaModel> {
        let path = dir.join(PARAMS);
        let params = read_object(&path)?;
        let files = open_parts(dir)?;
        require(&files, "output.weight").context(dir.display())?;
        let rows = |name: &str| -> Result<i64> {
            files.iter().map(|f| Ok(f.info(name)?.0.first().copied().unwrap_or(0))).sum()
        };
        let mut shape = shape_of(&params, rows("output.weight")?, rows("layers.0.feed_forward.w1.weight")?)
            .context(path.display())?;
        let mut source = TensorSource::default();
        source.files = files;
        find_tensors(&mut source, &shape).context(dir.display())?;
        shape.tie_word_embeddings = source.equal(EMBEDDING, LM_HEAD)?;
        Ok(MetaModel { dir: dir.to_path_buf(), shape, source })
    }

    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The tensors, under the model's names and in its order.
    pub fn source(&self) -> &TensorSource {
        &self.source
    }

    pub fn into_source(self) -> TensorSource {
        self.source
    }
}

/// Refuses files without this tensor, with the names that they have.
fn require(files: &[Box<dyn TensorFile>], name: &str) -> Result<()> {
    let found: BTreeSet<String> = files.iter().flat_map(|file| file.names()).collect();
    if found.contains(name) {
        return Ok(());
    }
    let some = ["tok_embeddings.weight", "norm.weight", name];
    let unfit = Unfit {
        missing: vec![format!("`{name}` is missing")],
        extra: found.iter().map(|name| format!("`{name}` is there")).collect(),
        hint: common_prefix(&BTreeSet::from(some), &found.iter().map(String::as_str).collect()),
        ..Unfit::default()
    };
    unfit.into_result(&format!("the tensors do not fit its {PARAMS}"))
}

/// Opens `consolidated.00.pth` and so on; there must be no gap.
fn open_parts(dir: &Path) -> Result<Vec<Box<dyn TensorFile>>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(dir).map_err(|e| read_error(dir, &e))? {
        let name = entry.map_err(|e| read_error(dir, &e))?.file_name().to_string_lossy().into_owned();
        if name.starts_with("consolidated.") && name.ends_with(".pth") {
            names.insert(name);
        }
    }
    if names.is_empty() {
        return Err(Error::data(format!("{}: there is {PARAMS}, and no {}", dir.display(), part_name(0))));
    }
    for (i, name) in names.iter().enumerate() {
        if *name != part_name(i) {
            return Err(Error::data(format!("{}: there is {name}, and no {}", dir.display(), part_name(i))));
        }
    }
    let open = |name: &String| Ok(Box::new(TorchReader::open(&dir.join(name))?) as Box<dyn TensorFile>);
    names.iter().map(open).collect()
}

/// The file of a model-parallel part.
fn part_name(part: usize) -> String {
    format!("consolidated.{part:02}.pth")
}

/// The shape that `params.json` describes, with the rows that the output projection and the feed-forward have in the
/// files.
fn shape_of(params: &Map<String, Value>, output_rows: i64, ffn_rows: i64) -> Result<Shape> {
    let unknown: Vec<String> = params
        .iter()
        .filter(|(key, value)| !KNOWN.contains(&key.as_str()) && !value.is_null())
        .map(|(key, value)| format!("{key} = {value}"))
        .collect();
    if !unknown.is_empty() {
        return Err(Error::data(format!(
            "{}: not known, and may change the mathematics; known are: {}",
            unknown.join(", "),
            KNOWN.join(", ")
        )));
    }
    let get = |key: &str| params.get(key).filter(|v| !v.is_null());
    let integer = |key: &str, default: Option<i64>| match (get(key), default) {
        (Some(v), _) => match v.as_i64().filter(|i| i.abs() <= i64::from(i32::MAX)) {
            Some(i) => Ok(i),
            None => Err(Error::data(format!("{key} is {v}; it must be an integer below 2^31"))),
        },
        (None, Some(default)) => Ok(default),
        (None, None) => Err(Error::data(format!("{key} is missing"))),
    };
    let number = |key: &str, default: Option<f64>| match get(key) {
        Some(v) => {
            v.as_f64().map(Some).ok_or_else(|| Error::data(format!("{key} is {v}; it must be a number")))
        }
        None => Ok(default),
    };
    let (dim, heads) = (integer("dim", None)?, integer("n_heads", None)?);
    if dim < 1 || heads < 1 || dim % heads != 0 {
        return Err(Error::data(format!("dim ({dim}) is not divisible by n_heads ({heads})")));
    }
    let vocab_size = match integer("vocab_size", Some(-1))? {
        // Meta's programs take it from the tokenizer.
        -1 => output_rows,
        size if size == output_rows => size,
        size => {
            return Err(Error::data(format!(
                "vocab_size is {size}, but output.weight has {output_rows} rows"
            )));
        }
    };
    let (multiple_of, multiplier) = (integer("multiple_of", Some(256))?, number("ffn_dim_multiplier", None)?);
    let intermediate_size = ffn_size(dim, multiplier, multiple_of.max(1));
    if intermediate_size != ffn_rows {
        return Err(Error::data(format!(
            "the feed-forward size is {intermediate_size} by dim, multiple_of and ffn_dim_multiplier, and w1 has \
             {ffn_rows} rows; is a part of the model missing?"
        )));
    }
    let theta = number("rope_theta", None)?;
    let scaled = match get("use_scaled_rope") {
        None => false,
        Some(v) => v
            .as_bool()
            .ok_or_else(|| Error::data(format!("use_scaled_rope is {v}; it must be true or false")))?,
    };
    let norm_eps = number("norm_eps", Some(1e-5))?.unwrap_or(1e-5);
    let shape = Shape {
        family: Family::Llama,
        head: Head::Lm,
        vocab_size,
        hidden_size: dim,
        intermediate_size,
        num_hidden_layers: integer("n_layers", None)?,
        num_attention_heads: heads,
        num_key_value_heads: integer("n_kv_heads", Some(heads))?,
        head_dim: dim / heads,
        max_position_embeddings: positions(theta, scaled, norm_eps),
        rms_norm_eps: norm_eps,
        rope_theta: theta.unwrap_or(10000.0),
        rope_scaling: scaled.then(|| rope_scaling(dim)),
        tie_word_embeddings: false,
        initializer_range: 0.02,
        sliding_window: None,
        max_window_layers: 0,
        experts: None,
        features: Default::default(),
    };
    shape.check().map_err(|e| Error::data(e.message))?;
    Ok(shape)
}

/// The context that the models were trained for, which `params.json` does not say: Llama 1 (`norm_eps` 1e-6) 2048,
/// Llama 2 4096, Code Llama (another `rope_theta`) 16384, Llama 3 8192, with scaled positions (3.1 and later) 131072.
fn positions(theta: Option<f64>, scaled: bool, norm_eps: f64) -> i64 {
    match theta {
        _ if scaled => 131072,
        Some(LLAMA_3_THETA) => 8192,
        Some(theta) if theta != 10000.0 => 16384,
        _ if norm_eps == 1e-6 => 2048,
        _ => 4096,
    }
}

/// What `use_scaled_rope` means: constants in Meta's programs.
fn rope_scaling(dim: i64) -> Llama3RopeScaling {
    Llama3RopeScaling {
        factor: if dim < LLAMA_3_1_DIM { 32.0 } else { 8.0 },
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192,
    }
}

/// Channels of the feed-forward (Meta's `FeedForward.__init__`): two thirds of 4 `dim`, times the multiplier, rounded up.
fn ffn_size(dim: i64, multiplier: Option<f64>, multiple_of: i64) -> i64 {
    let mut size = 8 * dim / 3;
    if let Some(multiplier) = multiplier {
        size = (multiplier * size as f64) as i64;
    }
    match size % multiple_of {
        0 => size,
        over => size.saturating_add(multiple_of - over),
    }
}

/// Finds every tensor of the model in the parts.
fn find_tensors(source: &mut TensorSource, shape: &Shape) -> Result<()> {
    let files = &source.files;
    if shape.num_hidden_layers > files[0].names().len() as i64 {
        let (layers, tensors) = (shape.num_hidden_layers, files[0].names().len());
        return Err(Error::data(format!("n_layers is {layers}, but there are {tensors} tensors")));
    }
    const FREQS: &str = "rope.freqs";
    let (mut known, mut unfit) = (BTreeSet::new(), Unfit::default());
    let found: BTreeSet<String> = files.iter().flat_map(|file| file.names()).collect();
    for spec in layouts(shape).into_iter().flat_map(|l| l.specs) {
        let Some(named) = named(&spec.name) else {
            return Err(Error::failed(format!("Meta's format has no place for `{}`", spec.name)));
        };
        match find(files, &named, &spec.shape, shape.head_dim) {
            Ok(view) => {
                source.views.insert(spec.name, view);
            }
            Err(e) if found.contains(&named.name) => unfit.wrong.push(e.message),
            Err(e) => unfit.missing.push(e.message),
        }
        known.insert(named.name);
    }
    for file in files {
        let extra = file.names().into_iter().filter(|name| !known.contains(name) && name != FREQS);
        unfit.extra.extend(extra.map(|name| format!("`{name}` belongs to no Llama")));
    }
    unfit.hint = common_prefix(
        &known.iter().map(String::as_str).collect(),
        &found.iter().map(String::as_str).collect(),
    );
    unfit.into_result(&format!("the tensors do not fit its {PARAMS}"))?;
    source.left_out.extend(found.contains(FREQS).then(|| FREQS.to_string()));
    Ok(())
}

/// Puts a tensor together from the parts.
fn find(files: &[Box<dyn TensorFile>], named: &MetaTensor, shape: &[i64], head_dim: i64) -> Result<View> {
    let parts = files.len() as i64;
    let infos = files.iter().map(|f| f.info(&named.name)).collect::<Result<Vec<_>>>()?;
    let (found, kind) = &infos[0];
    let cut = match named.cut {
        TensorCut::Embedding if found.get(1) == shape.get(1) => TensorCut::Rows,
        TensorCut::Embedding => TensorCut::Columns,
        cut => cut,
    };
    let mut wanted = shape.to_vec();
    match cut {
        TensorCut::Rows | TensorCut::Embedding => wanted[0] /= parts,
        TensorCut::Columns => wanted[1] /= parts,
        TensorCut::Copy => {}
    }
    let whole = match cut {
        TensorCut::Rows | TensorCut::Embedding => wanted[0] * parts == shape[0],
        TensorCut::Columns => wanted[1] * parts == shape[1],
        TensorCut::Copy => true,
    };
    if !whole || infos.iter().any(|(found, _)| *found != wanted) {
        let found: Vec<_> = infos.iter().map(|(shape, _)| format!("{shape:?}")).collect();
        return Err(Error::data(format!(
            "`{}` is {} and should be {shape:?}, in {parts} part(s)",
            named.name,
            found.join(", ")
        )));
    }
    if infos.iter().any(|(_, k)| k != kind) {
        return Err(Error::data(format!("`{}` has another dtype in each part", named.name)));
    }
    let (rows, cols) = (wanted[0], wanted.get(1).copied().unwrap_or(1));
    let order = match named.rotary {
        true if rows % head_dim == 0 => RowOrder::MetaRotary { head_dim },
        true => return Err(Error::data(format!("`{}` is cut within a head", named.name))),
        false => RowOrder::Same,
    };
    let block = |part: i64| {
        let (row, col) = match cut {
            TensorCut::Rows | TensorCut::Embedding => (part * rows, 0),
            TensorCut::Columns => (0, part * cols),
            TensorCut::Copy => (0, 0),
        };
        TensorBlock {
            file: part as usize,
            tensor: named.name.clone(),
            rows: row..row + rows,
            cols: col..col + cols,
            first: 0,
            stride: cols,
            order,
        }
    };
    let blocks = match cut {
        TensorCut::Copy => vec![block(0)],
        _ => (0..parts).map(block).collect(),
    };
    let width = shape.get(1).copied().unwrap_or(1);
    Ok(View { shape: shape.to_vec(), kind: *kind, width, blocks })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn published_feed_forward_sizes_come_out() {
        // dim, multiplier, multiple_of, size: Llama 1 and 2 7B, 13B, 33B, 65B; Llama 2 70B; Llama 3 8B, 70B, 405B; 3.2 1B, 3B.
        let published = [
            (4096, None, 256, 11008),
            (5120, None, 256, 13824),
            (6656, None, 256, 17920),
            (8192, None, 256, 22016),
            (8192, Some(1.3), 4096, 28672),
            (4096, Some(1.3), 1024, 14336),
            (16384, Some(1.2), 4096, 53248),
            (2048, Some(1.5), 256, 8192),
            (3072, Some(1.0), 256, 8192),
        ];
        for (dim, multiplier, multiple_of, size) in published {
            assert_eq!(ffn_size(dim, multiplier, multiple_of), size, "{dim}");
        }
    }

    #[test]
    fn what_params_say_is_checked() {
        let good = json!({"dim": 64, "n_layers": 2, "n_heads": 4, "norm_eps": 1e-6, "multiple_of": 32, "vocab_size": -1});
        let shape = shape_of(good.as_object().unwrap(), 600, 192).unwrap();
        assert_eq!((shape.vocab_size, shape.max_position_embeddings), (600, 2048));
        let cases = [
            ("moe", json!({"num_experts": 8}), "moe = {\"num_experts\":8}: not known"),
            ("vision_chunk_size", json!(560), "vision_chunk_size = 560"),
            ("n_heads", json!(3), "is not divisible by n_heads (3)"),
            ("vocab_size", json!(601), "vocab_size is 601, but output.weight has 600 rows"),
            ("multiple_of", json!(256), "the feed-forward size is 256 by dim"),
            ("ffn_dim_multiplier", json!(1e300), "and w1 has 192 rows"),
            ("dim", json!(1u64 << 40), "dim is 1099511627776"),
            ("n_layers", json!(0), "num_hidden_layers is 0"),
            ("n_layers", Value::Null, "n_layers is missing"),
            ("use_scaled_rope", json!("yes"), "use_scaled_rope is \"yes\""),
        ];
        for (key, value, part) in cases {
            let mut params = good.as_object().unwrap().clone();
            params.insert(key.into(), value);
            let e = shape_of(&params, 600, 192).unwrap_err();
            assert!(e.message.contains(part) && e.exit_code() == 3, "{e}");
        }
    }
}
