//! What several tests do with Corral's own types. What needs none of them is the package `testing`.

#![allow(dead_code)] // every test binary uses its part
#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]
#![allow(clippy::disallowed_methods, reason = "the tests' own variables, CORRAL_TEST_* among them")]

use std::collections::HashMap;
use std::path::Path;

use corral::checkpoint::Weights;
use corral::distributed::mesh::Sharding;
use corral::distributed::sharded::Sharded;
use corral::model::{Llama, layout};
use kernels::comm::Group;
use tch::{Device, Kind, Tensor};
use testing::device::device;

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
