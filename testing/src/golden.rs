//! Golden data (tests/golden/README.md) and fixtures (tests/fixtures).

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde_json::Value;
use tch::Tensor;

/// The root of the repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("testing lies in the repository")
}

/// The root of the golden data: `CORRAL_GOLDEN`, else the copy beside the tests.
pub fn golden() -> PathBuf {
    std::env::var_os("CORRAL_GOLDEN").map_or_else(|| repository().join("tests/golden"), PathBuf::from)
}

/// The models among the golden data, one a family or a variant of it.
pub const FAMILIES: [&str; 12] = [
    "llama2",
    "llama3",
    "tied",
    "mistral",
    "qwen2",
    "qwen3",
    "mixtral",
    "gemma2",
    "gemma3",
    "gemma3_new",
    "olmo2",
    "phi3",
];

/// The folder of a golden model. `make_golden.py` knows not all: where a root has none, the one beside the tests serves.
pub fn golden_model(family: &str) -> PathBuf {
    let dir = golden().join("models").join(family);
    match family {
        "qwen3" | "gemma2" | "gemma3" | "gemma3_new" | "olmo2" | "phi3" if !dir.exists() => {
            repository().join("tests/golden/models").join(family)
        }
        _ => dir,
    }
}

/// Models in checkpoints that megatron-core wrote, by their names. Of a model that a root of golden data does not have, the one
/// beside the tests serves.
pub fn golden_megatron() -> BTreeMap<String, PathBuf> {
    let mut found = BTreeMap::new();
    for root in [repository().join("tests/golden"), golden()] {
        for model in std::fs::read_dir(root.join("megatron")).into_iter().flatten().flatten() {
            if model.path().join("hf").is_dir() {
                found.insert(model.file_name().to_string_lossy().into_owned(), model.path());
            }
        }
    }
    found
}

/// A JSON file of the golden data's folder `algo`.
pub fn golden_algorithm(name: &str) -> Value {
    json(&golden().join("algo").join(name))
}

/// A file or folder of tests/fixtures.
pub fn fixture(name: &str) -> PathBuf {
    repository().join("tests/fixtures").join(name)
}

/// All tensors of a safetensors file.
pub fn tensors(path: &Path) -> HashMap<String, Tensor> {
    Tensor::read_safetensors(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).into_iter().collect()
}

/// A JSON file.
pub fn json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The token that every position predicts, int64 [B * T]: the labels moved to the left, -100 in the last column.
pub fn shifted(labels: &Tensor) -> Tensor {
    let (rows, columns) = labels.size2().expect("[B, T]");
    let none = Tensor::full([rows, 1], -100i64, (labels.kind(), labels.device()));
    Tensor::cat(&[labels.narrow(1, 1, columns - 1), none], 1).contiguous().view([-1])
}
