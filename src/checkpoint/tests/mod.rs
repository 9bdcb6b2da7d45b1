//! Round trips through files, at several world sizes (ranks are threads here, over Gloo), and damaged files.

mod checkpoints;
mod models;

use std::fs::{self, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kernels::comm::Group;
use serde_json::json;
use tch::{Device, Kind, Tensor};
use testing::folder::TestFolder;
use testing::golden::golden_model;
use testing::ranks::on_ranks;
use testing::tolerance::{Quantity, allowed};

use super::hf::HfModel;
use super::saver::Saved;
use super::sharded::TrainerState;
use super::*;
use crate::config::sections::{MomentsIn, Optim};
use crate::config::shape::{Experts, Family, Shape};
use crate::data::tokenizer::Tokenizer;
use crate::distributed::mesh::Sharding;
use crate::distributed::sharded::Sharded;
use crate::error::Error;
use crate::model::{init, layout::layouts};
use crate::optim::AdamW;

fn tiny(tied: bool) -> Shape {
    Shape {
        vocab_size: 37,
        hidden_size: 24,
        intermediate_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 6,
        tie_word_embeddings: tied,
        ..Shape::preset("llama-15m").unwrap()
    }
}

/// One small shape a family, with all that it may have.
fn one_a_family() -> Vec<Shape> {
    let tiny = tiny(false);
    let window = |family: Family, sliding_window, max_window_layers| Shape {
        family,
        features: family.features(),
        sliding_window,
        max_window_layers,
        head_dim: 8,
        ..tiny.clone()
    };
    let experts = Experts { num_local_experts: 3, num_experts_per_tok: 2, router_aux_loss_coef: 0.01 };
    vec![
        tiny.clone(),
        window(Family::Mistral, Some(9), 0),
        window(Family::Mistral, None, 0),
        window(Family::Qwen2, None, 0),
        window(Family::Qwen2, Some(5), 1),
        window(Family::Qwen3, None, 0),
        window(Family::Qwen3, Some(5), 0),
        Shape { experts: Some(experts), ..window(Family::Mixtral, Some(7), 0) },
    ]
}

#[derive(Clone, Copy, PartialEq)]
enum StorageMode {
    Full,
    Replicate,
}

fn params(shape: &Shape, world: &Group, mode: StorageMode, compute: Kind) -> Sharded {
    let sharding = match mode {
        StorageMode::Full => Sharding::over(world.clone()),
        StorageMode::Replicate => Sharding::replicated(world.clone()),
    };
    Sharded::new(layouts(shape), sharding, compute, Device::Cpu)
}

/// Its moments are in 8 bits where the model computes in bfloat16.
fn optimizer(params: &Sharded) -> AdamW {
    let moments = match params.compute() {
        Kind::BFloat16 => MomentsIn::EightBit,
        _ => MomentsIn::Float32,
    };
    AdamW::configured(params, &Optim { moments, ..Optim::default() }).unwrap()
}

/// Parameters and moments whose every element depends on its place only, so that any slice can be checked.
fn trained(shape: &Shape, world: &Group, mode: StorageMode, compute: Kind) -> (Sharded, AdamW) {
    let mut params = params(shape, world, mode, compute);
    init::init(&mut params, shape, 5).unwrap();
    let mut optim = optimizer(&params);
    optim.step = 41;
    for i in 0..params.len() {
        let slice = params.slice(i);
        for (k, (_, moments)) in optim.moments[i].tensors().into_iter().enumerate() {
            // A number for each element of the group, or for each 256.
            let n = moments.numel() as i64;
            let first = if n == slice.len { slice.start } else { slice.start / 256 };
            let place = Tensor::arange_start(first, first + n, (Kind::Double, Device::Cpu)) + i as f64;
            moments.shallow_clone().copy_(&match moments.kind() {
                Kind::Uint8 => (place * (7 + k as i64)).remainder(251.0),
                _ => place.sin() + k as f64,
            });
        }
    }
    (params, optim)
}

/// Whether a rank has exactly the state of [`trained`].
fn assert_trained(
    params: &Sharded,
    optim: &AdamW,
    shape: &Shape,
    world: &Group,
    mode: StorageMode,
    compute: Kind,
) {
    let (right, right_optim) = trained(shape, world, mode, compute);
    assert_eq!(optim.step, 41);
    for i in 0..params.len() {
        assert!(params.master(i).equal(&right.master(i)), "master of group {i}");
        for ((part, a), (_, b)) in optim.moments[i].tensors().iter().zip(right_optim.moments[i].tensors()) {
            assert!(a.equal(b), "{part} of group {i}");
        }
        if let (Some(copy), Some(right)) = (params.copy(i), right.copy(i)) {
            assert!(copy.equal(&right), "compute copy of group {i}");
        }
    }
}

fn tokenizer(name: &str) -> Tokenizer {
    Tokenizer::load(golden_model(name)).unwrap()
}

fn run_info() -> RunInfo {
    RunInfo { config_hash: "abc".into(), tokenizer: Some(tokenizer("llama2")) }
}

/// A checkpoint of one model.
fn only<'a>(shape: &'a Shape, params: &'a Sharded, optim: &'a AdamW) -> [SavedPart<'a>; 1] {
    [SavedPart { name: "", shape, base: None, scoring: None, params, optim: Some(optim) }]
}

/// Saves the state of [`trained`] on `n` ranks as each of `steps`.
fn save(dir: &Path, shape: &Shape, n: i64, mode: StorageMode, compute: Kind, steps: &[u64]) {
    on_ranks(n, |world| {
        let (params, optim) = trained(shape, &world, mode, compute);
        let mut saver = Saver::new(dir, 2, run_info(), &world).unwrap();
        for &step in steps {
            saver.begin(step, &only(shape, &params, &optim), json!({"tokens": 7, "x": 0.1})).unwrap();
            while saver.poll().unwrap().is_none() {
                assert_eq!(saver.failed_saves(), 0);
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
}

fn step_dir(run: &Path, step: u64) -> PathBuf {
    run.join("checkpoints").join(format!("step-{step:08}"))
}

fn flip(path: &Path, at: u64) {
    let mut byte = fs::read(path).unwrap()[at as usize];
    byte ^= 0x10;
    let mut file = OpenOptions::new().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(&[byte]).unwrap();
}

fn load_error(checkpoint: &Checkpoint, shape: &Shape) -> Error {
    let mut params = params(shape, &Group::solo(), StorageMode::Full, Kind::Float);
    let mut optim = optimizer(&params);
    checkpoint.load(&mut params, &mut optim).unwrap_err()
}
