//! What loading takes: each of four ranks reads a quarter of a model, and its memory grows by no more than that. The
//! model is 128 MB; CORRAL_LOAD_MB asks for another size. This binary starts itself once per rank.
//!
//! Files are read with positioned reads, so no page of them counts as memory of the process: the growth of its anonymous
//! memory (RssAnon) and of its peak (VmHWM) are compared with the bytes of the slices.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]
#![allow(clippy::disallowed_methods, reason = "the tests' own variables, CORRAL_TEST_* among them")]

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::time::Instant;
use testing::compare::relative_number;
use testing::folder::folder;
use testing::ranks::{free_port, start_as_rank};
use testing::tolerance::{Quantity, allowed};

use corral::checkpoint::convert::{Conversion, ConvertTarget};
use corral::checkpoint::safetensors::{self, TensorEntry};
use corral::checkpoint::{Weights, torch_file};
use corral::config::parallel::Parallel;
use corral::config::shape::Shape;
use corral::distributed::cut::Share;
use corral::distributed::plan::GroupPlan;
use corral::distributed::sharded::{Sharded, TensorSpec};
use corral::distributed::world::{BackendChoice, DeviceChoice, World};
use corral::model::cuts::cut_for;
use corral::model::layout::layouts;
use kernels::comm::ReduceOp;
use serde_json::json;
use tch::{Device, Kind, Tensor};

const RANKS: usize = 4;

/// What reading may take besides, whatever the model's size: a chunk of a file and its values (4 MiB each), what the
/// allocator keeps, and libtorch's code that is used for the first time.
const BESIDES: u64 = 24 << 20;

/// A number of /proc/self/status, in bytes.
fn status(key: &str) -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap_or_else(|| panic!("no {key}"));
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// One rank: loads its slices of the model in CORRAL_TEST_MODEL, and tells how much memory that took.
#[test]
fn as_rank() {
    let Ok(model) = std::env::var("CORRAL_TEST_MODEL") else { return };
    kernels::host::tune_allocator(false).unwrap();
    let tensor = std::env::var("CORRAL_TEST_TENSOR").unwrap().parse().unwrap();
    let parallel = Parallel { tensor, ..Parallel::default() };
    let world = World::from_env(BackendChoice::Auto, DeviceChoice::Cpu, &parallel).unwrap();
    let weights = Weights::open(Path::new(&model)).unwrap();
    let plans = layouts(weights.shape()).into_iter().map(GroupPlan::from).collect();
    let sharding = world.sharding();
    let plans = cut_for(plans, weights.shape(), &sharding).unwrap();
    world.group.barrier().unwrap();
    // Resets VmHWM.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let (anonymous, resident) = (status("RssAnon"), status("VmRSS"));
    let started = Instant::now();
    let mut params = Sharded::new(plans, sharding, Kind::Float, Device::Cpu);
    weights.fill(&mut params).unwrap();
    let seconds = started.elapsed().as_secs_f64();
    let slices: u64 = (0..params.len()).map(|i| params.slice(i).len as u64 * 4).sum();
    let (grown, peak) = (status("RssAnon") - anonymous, status("VmHWM") - resident);
    let sum: f64 = (0..params.len()).map(|i| counted_sum(&params, i)).sum();
    let sum = world.group.combine(&[sum], ReduceOp::Sum).unwrap()[0];
    println!(
        "RANK {}",
        json!({"slices": slices, "grown": grown, "peak": peak, "seconds": seconds, "sum": sum})
    );
    world.group.barrier().unwrap();
}

/// The sum of this rank's slice of a group; what several tensor-parallel ranks have counts on the first.
fn counted_sum(params: &Sharded, i: usize) -> f64 {
    let (slice, master, rank) = (params.slice(i), params.master(i), params.sharding().tensor.rank);
    let counts = |spec: &&TensorSpec| rank == 0 || matches!(spec.share, Share::Cut(_));
    let sum = |spec: &TensorSpec| {
        let first = slice.start.max(spec.offset);
        let end = (slice.start + slice.len).min(spec.offset + spec.numel());
        match first < end {
            true => master.narrow(0, first - slice.start, end - first).sum(Kind::Double).double_value(&[]),
            false => 0.0,
        }
    };
    params.layout(i).specs.iter().filter(counts).map(sum).sum()
}

/// Loads a model on four ranks, of which so many share every matrix.
fn load(what: &str, model: &Path, tensor: i64, bytes: u64, sum: f64) {
    let (port, tensor) = (free_port(), tensor.to_string());
    let what = format!("{what}, tensor {tensor}");
    let more = [("CORRAL_TEST_MODEL", model.to_str().unwrap()), ("CORRAL_TEST_TENSOR", tensor.as_str())];
    let rank = |rank: usize| start_as_rank(rank as i64, RANKS as i64, port, &more);
    let ranks: Vec<_> = (0..RANKS).map(rank).collect();
    for rank in ranks {
        let output = rank.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let line = text.lines().find_map(|line| line.strip_prefix("RANK "));
        let line = line.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&output.stderr)));
        println!("{what}, {} MB: {line}", bytes / 1_000_000);
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let number = |key: &str| line[key].as_u64().unwrap();
        let slices = number("slices");
        assert!(slices.abs_diff(bytes / RANKS as u64) < 1 << 16, "{slices} of {bytes}");
        // Touched at all, and not more of it.
        for key in ["grown", "peak"] {
            let bytes = number(key);
            assert!(
                bytes >= slices - (1 << 20) && bytes <= slices + BESIDES,
                "{what}: {key} {bytes} of {slices}"
            );
        }
        let found = line["sum"].as_f64().unwrap();
        assert!(
            relative_number(found, sum) < allowed(Quantity::Reduction, Kind::Float),
            "{what}: {found} is not {sum}"
        );
    }
}

#[test]
fn each_rank_holds_its_quarter_of_a_model() {
    let dir = folder("models");
    let megabytes = std::env::var("CORRAL_LOAD_MB").map_or(128, |mb| mb.parse::<i64>().expect("megabytes"));
    // Two blocks of 6.4 million parameters, and embeddings that fill it up.
    let mut shape = Shape {
        hidden_size: 1024,
        intermediate_size: 2816,
        num_attention_heads: 16,
        num_key_value_heads: 4,
        head_dim: 64,
        num_hidden_layers: 2,
        vocab_size: 512,
        max_position_embeddings: 4096,
        ..Shape::preset("llama-15m").unwrap()
    };
    let rest = (megabytes * 250_000 - shape.num_parameters()).max(0);
    shape.vocab_size += rest / (2 * shape.hidden_size) / 16 * 16;
    let bytes = shape.num_parameters() as u64 * 4;
    let specs: Vec<_> = layouts(&shape).into_iter().flat_map(|l| l.specs).collect();
    let entry = |s: &corral::distributed::sharded::TensorSpec| TensorEntry {
        name: s.name.clone(),
        kind: Kind::Float,
        shape: s.shape.clone(),
    };
    let entries: Vec<TensorEntry> = specs.iter().map(entry).collect();
    let (hf, bin, meta) = (dir.join("hf"), dir.join("bin"), dir.join("meta"));
    for model in [&hf, &bin] {
        fs::create_dir(model).unwrap();
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "vocab_size": shape.vocab_size, "hidden_size": 1024, "intermediate_size": 2816,
            "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4, "rms_norm_eps": shape.rms_norm_eps,
            "max_position_embeddings": 4096,
        });
        fs::write(model.join("config.json"), config.to_string()).unwrap();
    }
    let mut safetensors =
        safetensors::SafetensorsWriter::create(&hf.join("model.safetensors"), &entries).unwrap();
    let mut torch = torch_file::TorchWriter::create(&bin.join("pytorch_model.bin"), &entries).unwrap();
    let mut sum = 0.0;
    for spec in &specs {
        let values = Tensor::rand(spec.shape.as_slice(), (Kind::Float, Device::Cpu));
        sum += values.sum(Kind::Double).double_value(&[]);
        safetensors.write(&values).unwrap();
        torch.write(&values).unwrap();
    }
    safetensors.finish().unwrap();
    torch.finish().unwrap();
    for tensor in [1, 2, 4] {
        load("safetensors", &hf, tensor, bytes, sum);
    }
    load("pytorch_model.bin", &bin, 1, bytes, sum);
    fs::remove_dir_all(&bin).unwrap();
    let target = ConvertTarget::Meta { parts: 4 };
    let conversion = Conversion::new(Weights::open(&hf).unwrap(), target, None, None, Device::Cpu).unwrap();
    conversion.write(&meta, &AtomicU64::new(0)).unwrap();
    for tensor in [1, 4] {
        load("four parts of Meta's format", &meta, tensor, bytes, sum);
    }
    fs::remove_dir_all(&dir).unwrap();
}
