//! What the tests share: golden data, comparisons, runs of the real binaries.

#![allow(dead_code)] // every test binary uses its part
#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]
#![allow(clippy::disallowed_methods, reason = "the tests' own variables, CORRAL_TEST_* among them")]

pub mod run;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use corral::checkpoint::Weights;
use corral::distributed::mesh::Sharding;
use corral::distributed::sharded::Sharded;
use corral::model::{Llama, layout};
use kernels::c10d::{Backend, Group, Store};
use kernels::watch::Watch;
use tch::{Device, Kind, Tensor};

/// The root of the golden data: `CORRAL_GOLDEN`, else the copy beside the tests.
pub fn golden() -> PathBuf {
    match std::env::var_os("CORRAL_GOLDEN") {
        Some(root) => root.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"),
    }
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
            Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models").join(family)
        }
        _ => dir,
    }
}

/// Where the models under test compute: CORRAL_TEST_DEVICE, cpu (the default) or cuda.
pub fn device() -> Device {
    match std::env::var("CORRAL_TEST_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => Device::Cpu,
        Ok("cuda") => {
            kernels::cuda::load()
                .and_then(|c| c.device_count())
                .expect("CORRAL_TEST_DEVICE=cuda needs a GPU");
            Device::Cuda(0)
        }
        Ok(other) => panic!("CORRAL_TEST_DEVICE={other}: it must be cpu or cuda"),
    }
}

/// All tensors of a safetensors file.
pub fn tensors(path: &Path) -> HashMap<String, Tensor> {
    Tensor::read_safetensors(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).into_iter().collect()
}

pub fn json(path: &Path) -> serde_json::Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A model folder on one rank.
pub fn load(dir: &Path, compute: Kind) -> Llama {
    load_sharded(dir, compute, Group::solo(), device())
}

/// A model folder with its parameters sharded over a group.
pub fn load_sharded(dir: &Path, compute: Kind, shard: Group, device: Device) -> Llama {
    let weights = Weights::open(dir).unwrap();
    let shape = weights.shape().clone();
    let mut params = Sharded::new(layout::layouts(&shape), Sharding::over(shard), compute, device);
    weights.fill(&mut params).unwrap();
    Llama::new(shape, params)
}

/// Runs `f` on `n` ranks, threads of this process on the CPU; returns what they return, by rank.
pub fn on_ranks<T: Send>(n: i64, f: impl Fn(Group) -> T + Sync) -> Vec<T> {
    let timeout = Duration::from_secs(30);
    let server = Store::tcp("127.0.0.1", 0, true, timeout).unwrap();
    let stores: Vec<Store> = (0..n).map(|_| server.reconnect().unwrap()).collect();
    let ranks: Vec<i64> = (0..n).collect();
    std::thread::scope(|scope| {
        let threads: Vec<_> = stores
            .into_iter()
            .enumerate()
            .map(|(rank, store)| {
                let (ranks, f) = (&ranks, &f);
                scope.spawn(move || {
                    let watch = Watch::start(store, rank as i64, n, rank == 0).unwrap();
                    let group =
                        Group::new(&watch, Backend::Gloo, "world", ranks, timeout, Device::Cpu).unwrap();
                    f(group)
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// The largest absolute difference.
pub fn largest(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let exact = |t: &Tensor| t.to_device(Device::Cpu).to_kind(Kind::Double);
    (exact(a) - exact(b)).abs().max().double_value(&[])
}

/// The distance of a from b relative to b, in 2-norms.
pub fn relative(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    let exact = |t: &Tensor| t.to_device(Device::Cpu).to_kind(Kind::Double);
    let (a, b) = (exact(a), exact(b));
    (&a - &b).norm().double_value(&[]) / b.norm().double_value(&[]).max(1e-300)
}

/// The token that every position predicts, int64 [B * T]: the labels moved to the left.
pub fn shifted(labels: &Tensor) -> Tensor {
    let rows = labels.size()[0];
    let none = Tensor::full([rows, 1], -100i64, (Kind::Int64, Device::Cpu));
    Tensor::cat(&[labels.narrow(1, 1, labels.size()[1] - 1), none], 1).contiguous().view([-1])
}

/// Gradients by name, of a model on one rank.
pub fn gradients(model: &Llama) -> HashMap<String, Tensor> {
    let mut all = HashMap::new();
    for i in 0..model.params.len() {
        let grad = model.params.slice_grad(i).expect("every group has a gradient");
        for spec in &model.params.layout(i).specs {
            all.insert(spec.name.clone(), spec.view(&grad).copy());
        }
    }
    all
}
