//! What the tests share: golden data, comparisons, runs of the real binaries.

#![allow(dead_code)] // every test binary uses its part

pub mod run;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use corral::checkpoint::Weights;
use corral::distributed::sharded::Sharded;
use corral::model::{Llama, layout};
use kernels::c10d::Group;
use tch::{Device, Kind, Tensor};

/// The root of the golden data: `CORRAL_GOLDEN`, else the copy beside the tests.
pub fn golden() -> PathBuf {
    match std::env::var_os("CORRAL_GOLDEN") {
        Some(root) => root.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"),
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
    let weights = Weights::open(dir).unwrap();
    let shape = weights.shape().clone();
    let mut params = Sharded::new(layout::layouts(&shape), Group::solo(), Group::solo(), compute, device());
    weights.fill(&mut params).unwrap();
    Llama::new(shape, params)
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
