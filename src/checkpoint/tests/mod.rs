//! Round trips through files, at several world sizes (ranks are threads here, over Gloo), and damaged files.

use std::fs::{self, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kernels::c10d::{Backend, Group, Store};
use kernels::watch::Watch;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::safetensors::{Entry, Reader, Writer};
use super::sharded::{Piece, list, pieces};
use super::source::TensorFile;
use super::*;
use crate::config::sections::{MomentsIn, Optim};
use crate::config::shape::{Experts, Family, Shape};
use crate::data::tokenizer::Tokenizer;
use crate::distributed::sharded::{Sharded, Slice};
use crate::error::{Error, Kind as ErrorKind, Result};
use crate::model::{init, layout::layouts};
use crate::optim::AdamW;

/// A folder of its own for a test, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("corral-checkpoint-{}-{n}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn golden(name: &str) -> PathBuf {
    let root = std::env::var_os("CORRAL_GOLDEN")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"), PathBuf::from);
    root.join("models").join(name)
}

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
    let window = |family, sliding_window, max_window_layers| Shape {
        family,
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

/// Runs `f` on `n` ranks, threads of this process; returns what they return, by rank.
fn on_ranks<T: Send>(n: i64, f: impl Fn(Group) -> T + Sync) -> Vec<T> {
    if n == 1 {
        return vec![f(Group::solo())];
    }
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

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Full,
    Replicate,
}

fn params(shape: &Shape, world: &Group, mode: Mode, compute: Kind) -> Sharded {
    let (shard, replica) = match mode {
        Mode::Full => (world.clone(), Group::solo()),
        Mode::Replicate => (Group::solo(), world.clone()),
    };
    Sharded::new(layouts(shape), shard, replica, compute, Device::Cpu)
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
fn trained(shape: &Shape, world: &Group, mode: Mode, compute: Kind) -> (Sharded, AdamW) {
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
fn assert_trained(params: &Sharded, optim: &AdamW, shape: &Shape, world: &Group, mode: Mode, compute: Kind) {
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
    Tokenizer::load(golden(name)).unwrap()
}

fn run_info() -> RunInfo {
    RunInfo { config_hash: "abc".into(), tokenizer: Some(tokenizer("llama2")) }
}

/// A checkpoint of one model.
fn only<'a>(shape: &'a Shape, params: &'a Sharded, optim: &'a AdamW) -> [Part<'a>; 1] {
    [Part { name: "", shape, base: None, scoring: None, params, optim: Some(optim) }]
}

/// Saves the state of [`trained`] on `n` ranks as each of `steps`.
fn save(dir: &Path, shape: &Shape, n: i64, mode: Mode, compute: Kind, steps: &[u64]) {
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
    let mut params = params(shape, &Group::solo(), Mode::Full, Kind::Float);
    let mut optim = optimizer(&params);
    checkpoint.load(&mut params, &mut optim).unwrap_err()
}

#[test]
fn pieces_cover_a_range_exactly() {
    // Every way to cut 23 elements into slices of `size`, every range.
    for size in 1..=24 {
        let slices: Vec<Slice> = (0..24)
            .map(|r| (r * size).min(23))
            .map(|start| Slice { start, len: size.min(23 - start) })
            .collect();
        for first in 0..23 {
            for len in 0..=23 - first {
                let found = pieces(slices.iter().copied(), first, len);
                let elements: Vec<(i64, i64)> = found
                    .iter()
                    .flat_map(|p| (0..p.len).map(|k| (p.to + k, slices[p.rank].start + p.from + k)))
                    .collect();
                let right: Vec<(i64, i64)> = (0..len).map(|k| (k, first + k)).collect();
                assert_eq!(elements, right, "slices of {size}, {first} + {len}");
            }
        }
    }
    let two = [Slice { start: 0, len: 5 }, Slice { start: 5, len: 2 }];
    let right = [Piece { rank: 0, from: 3, to: 0, len: 2 }, Piece { rank: 1, from: 0, to: 2, len: 1 }];
    assert_eq!(pieces(two.into_iter(), 3, 3), right);
}

#[test]
fn tensors_survive_files_in_every_dtype() {
    let folder = Folder::new();
    let path = folder.0.join("x.safetensors");
    let values = Tensor::randn([7, 300], (Kind::Double, Device::Cpu));
    for kind in [Kind::Double, Kind::Float, Kind::BFloat16, Kind::Half] {
        let entry = |name: &str, shape: &[i64]| Entry { name: name.into(), kind, shape: shape.to_vec() };
        let entries = [entry("a", &[7, 300]), entry("empty", &[0]), entry("b", &[300, 7])];
        let mut writer = Writer::create(&path, &entries).unwrap();
        writer.write(&values).unwrap();
        writer.write(&values.narrow(0, 0, 0)).unwrap();
        writer.write(&values.tr()).unwrap();
        let written = writer.finish().unwrap();
        assert_eq!(written.bytes, fs::metadata(&path).unwrap().len());
        assert_eq!(written.crc32, crate::files::crc32(&path).unwrap());

        let reader = Reader::open(&path).unwrap();
        assert_eq!(reader.metadata()["format"], "pt");
        assert_eq!(reader.info("b").unwrap(), (vec![300, 7], kind));
        for into in [Kind::Double, Kind::Float, Kind::BFloat16, Kind::Half] {
            let dst = Tensor::zeros([900], (into, Device::Cpu));
            reader.read("a", 450, &dst).unwrap();
            let right = values.view([-1]).narrow(0, 450, 900).to_kind(kind).to_kind(into);
            assert!(dst.equal(&right), "{kind:?} read as {into:?}");
        }
        // libtorch's own reader agrees.
        let theirs = Tensor::read_safetensors(&path).unwrap();
        let b = &theirs.iter().find(|(name, _)| name == "b").unwrap().1;
        assert!(b.equal(&values.tr().to_kind(kind)));
        assert!(reader.read("a", 2000, &Tensor::zeros([101], (Kind::Float, Device::Cpu))).is_err());
    }
}

#[test]
fn damaged_safetensors_are_refused_by_name() {
    let folder = Folder::new();
    let path = folder.0.join("x.safetensors");
    let entry = Entry { name: "weight".into(), kind: Kind::Float, shape: vec![4, 4] };
    let mut writer = Writer::create(&path, &[entry]).unwrap();
    writer.write(&Tensor::ones([4, 4], (Kind::Float, Device::Cpu))).unwrap();
    writer.finish().unwrap();
    let good = fs::read(&path).unwrap();
    let header = String::from_utf8(good[8..good.len() - 64].to_vec()).unwrap();
    let with_header = |text: &str| {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.as_bytes());
        bytes.extend([0; 64]);
        bytes
    };
    let cases: [(&str, Vec<u8>, &str); 8] = [
        ("empty", vec![], "0 bytes"),
        ("cut in the header", good[..40].to_vec(), "header"),
        ("cut in the data", good[..good.len() - 1].to_vec(), "its header describes"),
        ("longer", [good.clone(), vec![0]].concat(), "its header describes"),
        ("huge header", [&u64::MAX.to_le_bytes(), &good[8..]].concat(), "header"),
        ("no JSON", with_header(&header.replace('{', "[")), "header not usable"),
        ("offsets", with_header(&header.replace("[0,64]", "[4,64]")), "weight"),
        ("shape", with_header(&header.replace("[4,4]", "[4,5]")), "header not usable"),
    ];
    for (what, bytes, part) in cases {
        fs::write(&path, bytes).unwrap();
        let e = Reader::open(&path).err().unwrap_or_else(|| panic!("{what} was accepted"));
        assert_eq!(e.kind, ErrorKind::Data, "{what}");
        assert!(e.message.contains("x.safetensors") && e.message.contains(part), "{what}: {e}");
    }
    fs::write(&path, with_header(&header.replace("F32", "I32"))).unwrap();
    let dst = Tensor::zeros([16], (Kind::Float, Device::Cpu));
    let e = Reader::open(&path).unwrap().read("weight", 0, &dst).unwrap_err();
    assert!(e.message.contains("`weight` has dtype I32"), "{e}");
}

#[test]
fn a_full_disk_is_one_clear_message() {
    let folder = Folder::new();
    let path = folder.0.join("x.safetensors");
    std::os::unix::fs::symlink("/dev/full", folder.0.join(".tmp-x.safetensors")).unwrap();
    let entry = Entry { name: "weight".into(), kind: Kind::Float, shape: vec![1 << 20] };
    let mut writer = Writer::create(&path, &[entry]).unwrap();
    let e = writer.write(&Tensor::ones([1 << 20], (Kind::Float, Device::Cpu))).unwrap_err();
    assert_eq!(e.exit_code(), 1);
    assert!(e.message.contains("x.safetensors") && e.message.contains("GB are free"), "{e}");
    drop(writer);
    assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 0, "nothing is left");
}

#[test]
fn golden_models_load_as_they_are() {
    for name in ["llama2", "llama3", "tied", "llama3_sharded", "mistral", "mixtral", "qwen2"] {
        let model = HfModel::load(&golden(name)).unwrap();
        assert!(model.unknown_keys().is_empty(), "{:?}", model.unknown_keys());
        let mut tensors = std::collections::HashMap::new();
        for entry in fs::read_dir(golden(name)).unwrap() {
            let path = entry.unwrap().path();
            let file = path.file_name().unwrap().to_str().unwrap();
            if file.starts_with("model") && file.ends_with(".safetensors") {
                tensors.extend(Tensor::read_safetensors(&path).unwrap());
            }
        }
        let tensors = std::sync::Mutex::new(tensors);
        on_ranks(3, |world| {
            let mut params = params(model.shape(), &world, Mode::Full, Kind::Double);
            model.source().fill(&mut params).unwrap();
            for i in 0..params.len() {
                let full = params.gather_master(i).unwrap();
                for spec in &params.layout(i).specs {
                    let right = tensors.lock().unwrap()[&spec.name].to_kind(Kind::Double);
                    assert!(spec.view(&full).equal(&right), "{}", spec.name);
                }
            }
        });
    }
}

#[test]
fn other_families_and_unfit_tensors_are_refused() {
    let folder = Folder::new();
    let copy = |from: &str, to: &str| {
        fs::copy(golden("llama3_sharded").join(from), folder.0.join(to)).unwrap();
    };
    let config = fs::read_to_string(golden("llama3_sharded").join("config.json")).unwrap();
    fs::write(folder.0.join("config.json"), &config).unwrap();
    copy("model.safetensors.index.json", "model.safetensors.index.json");
    for part in 1..=3 {
        let name = format!("model-{part:05}-of-00004.safetensors");
        copy(&name, &name);
    }
    let error = || HfModel::load(&folder.0).err().unwrap();
    assert!(error().message.contains("model-00004-of-00004.safetensors"), "{}", error());
    copy("model-00004-of-00004.safetensors", "model-00004-of-00004.safetensors");
    HfModel::load(&folder.0).unwrap();

    fs::write(folder.0.join("config.json"), config.replace("LlamaFor", "GemmaFor")).unwrap();
    assert_eq!(error().exit_code(), 3);
    let known = "known are: LlamaForCausalLM, MistralForCausalLM, MixtralForCausalLM, QWenLMHeadModel, \
                 Qwen2ForCausalLM, Qwen3ForCausalLM";
    assert!(error().message.contains("config.json") && error().message.contains(known), "{}", error());
    let other = config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
    fs::write(folder.0.join("config.json"), other).unwrap();
    assert!(
        error().message.contains("`model.layers.2.input_layernorm.weight` [64] is missing"),
        "{}",
        error()
    );
    fs::write(
        folder.0.join("config.json"),
        config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1"),
    )
    .unwrap();
    assert!(
        error().message.contains("`model.layers.1.mlp.up_proj.weight` belongs to no LlamaForCausalLM"),
        "{}",
        error()
    );
    fs::write(folder.0.join("config.json"), config.replace("\"vocab_size\": 600", "\"vocab_size\": 601"))
        .unwrap();
    assert!(error().message.contains("is [600, 64] and should be [601, 64]"), "{}", error());
    assert_eq!(error().exit_code(), 3);

    let index = folder.0.join("model.safetensors.index.json");
    fs::write(folder.0.join("config.json"), config).unwrap();
    let text = fs::read_to_string(&index).unwrap();
    fs::write(&index, text.replace("model-00001-of", "../model-00001-of")).unwrap();
    assert!(error().message.contains("names no file of its folder"), "{}", error());
}

#[test]
fn an_export_is_an_import() {
    let mut cases = vec![(tiny(false), 1, u64::MAX), (tiny(true), 2, 9000)];
    cases.extend(one_a_family().into_iter().map(|shape| (shape, 2, 9000)));
    for (shape, ranks, max_shard_size) in cases {
        let folder = Folder::new();
        let dir = folder.0.join("model");
        let tokenizer = tokenizer("llama3");
        // The second export replaces the first.
        for _ in 0..2 {
            on_ranks(ranks, |world| {
                let (params, _) = trained(&shape, &world, Mode::Full, Kind::Float);
                let how =
                    Export { dtype: Kind::Float, max_shard_size, tokenizer: Some(&tokenizer), scoring: None };
                export(&dir, &shape, &params, &how, &world).unwrap();
            });
        }
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1, "temporary folders are left");
        assert_eq!(dir.join("model.safetensors").exists(), max_shard_size == u64::MAX);
        assert!(dir.join("tokenizer.json").is_file());
        let model = HfModel::load(&dir).unwrap();
        assert_eq!(model.shape(), &shape);
        let config: serde_json::Value =
            serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["eos_token_id"], json!([593, 598]));
        assert_eq!(config["torch_dtype"], "float32");
        let mut loaded = params(&shape, &Group::solo(), Mode::Full, Kind::Float);
        Weights::open(&folder.0).unwrap().fill(&mut loaded).unwrap();
        let (right, _) = trained(&shape, &Group::solo(), Mode::Full, Kind::Float);
        for i in 0..loaded.len() {
            assert!(loaded.master(i).equal(&right.master(i)));
        }
    }
}

#[test]
fn an_export_spares_what_is_not_its_own_and_fails_on_all_ranks() {
    let (folder, shape) = (Folder::new(), tiny(false));
    fs::write(folder.0.join("thesis.txt"), "precious").unwrap();
    let errors = on_ranks(2, |world| {
        let (params, _) = trained(&shape, &world, Mode::Replicate, Kind::Float);
        let how = Export { dtype: Kind::BFloat16, max_shard_size: u64::MAX, tokenizer: None, scoring: None };
        let e = export(Path::new("."), &shape, &params, &how, &world).unwrap_err();
        assert!(e.message.contains("no name for a file or folder"), "{e}");
        export(&folder.0, &shape, &params, &how, &world).unwrap_err()
    });
    for e in errors {
        assert_eq!(e.exit_code(), 2);
        assert!(e.message.contains("`thesis.txt`"), "{e}");
    }
    assert!(folder.0.join("thesis.txt").exists());
}

#[test]
fn checkpoints_load_at_every_world_size() {
    let cases = [
        (1, Mode::Full, Kind::Float, true),
        (2, Mode::Full, Kind::BFloat16, false),
        (3, Mode::Full, Kind::Double, true),
        (2, Mode::Replicate, Kind::Float, false),
    ];
    for (n, mode, compute, tied) in cases {
        let (folder, shape) = (Folder::new(), tiny(tied));
        save(&folder.0, &shape, n, mode, compute, &[3, 10]);
        let checkpoint = latest(&folder.0).unwrap().unwrap();
        assert_eq!(checkpoint.dir(), step_dir(&folder.0, 10));
        assert_eq!(checkpoint.meta().world_size, n);
        assert_eq!(checkpoint.meta().slices.len() as i64, if mode == Mode::Full { n } else { 1 });
        for (ranks, mode) in [(1, Mode::Full), (2, Mode::Full), (2, Mode::Replicate), (5, Mode::Full)] {
            on_ranks(ranks, |world| {
                let mut params = params(&shape, &world, mode, compute);
                let mut optim = optimizer(&params);
                let state = checkpoint.load(&mut params, &mut optim).unwrap();
                assert_eq!(state, State { step: 10, state: json!({"tokens": 7, "x": 0.1}) });
                assert_trained(&params, &optim, &shape, &world, mode, compute);
            });
        }
        // The newest, the run's folder and the checkpoint itself are models to start from.
        for path in [folder.0.clone(), step_dir(&folder.0, 3)] {
            let weights = Weights::open(&path).unwrap();
            assert_eq!(weights.shape(), &shape);
            assert!(weights.tokenizer_dir().is_some());
            let mut params = params(&shape, &Group::solo(), Mode::Full, compute);
            weights.fill(&mut params).unwrap();
            assert!(
                params.master(0).equal(&trained(&shape, &Group::solo(), Mode::Full, compute).0.master(0))
            );
        }
    }
}

#[test]
fn a_checkpoint_takes_the_space_that_was_estimated() {
    let (folder, shape) = (Folder::new(), tiny(false));
    save(&folder.0, &shape, 2, Mode::Full, Kind::Float, &[1]);
    let shards: u64 = latest(&folder.0).unwrap().unwrap().meta().files[..2].iter().map(|f| f.bytes).sum();
    let estimate = bytes_per_checkpoint(&layouts(&shape), Kind::Float, MomentsIn::Float32);
    assert_eq!(estimate, shape.num_parameters() as u64 * 12);
    assert!(estimate <= shards && shards < estimate + 8000, "{estimate} {shards}");

    let folder = Folder::new();
    save(&folder.0, &shape, 2, Mode::Full, Kind::BFloat16, &[1]);
    let shards: u64 = latest(&folder.0).unwrap().unwrap().meta().files[..2].iter().map(|f| f.bytes).sum();
    let estimate = bytes_per_checkpoint(&layouts(&shape), Kind::Float, MomentsIn::EightBit);
    assert!(estimate < shape.num_parameters() as u64 * 61 / 10, "6 bytes and 8 for each 256");
    assert!(estimate <= shards && shards < estimate + 12000, "{estimate} {shards}");
}

#[test]
fn old_checkpoints_go_and_leftovers_of_killed_runs_too() {
    let (folder, shape) = (Folder::new(), tiny(true));
    let dir = folder.0.join("checkpoints");
    let steps = || list(&dir).unwrap().into_iter().map(|(s, _)| s).collect::<Vec<_>>();
    save(&folder.0, &shape, 1, Mode::Full, Kind::Float, &[10, 20, 30, 40]);
    assert_eq!(steps(), [30, 40]);
    // Killed while saving, while removing, and while replacing a checkpoint.
    fs::create_dir(dir.join(".tmp-step-00000050")).unwrap();
    fs::write(dir.join(".tmp-step-00000050/shard"), "x").unwrap();
    fs::create_dir(dir.join(".trash-step-00000020")).unwrap();
    fs::rename(dir.join("step-00000040"), dir.join(".old-step-00000040")).unwrap();
    Saver::new(&folder.0, 2, run_info(), &Group::solo()).unwrap();
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
    assert_eq!(steps(), [30, 40]);
    assert_eq!(latest(&folder.0).unwrap().unwrap().meta().step, 40);
    // The same step once more; then a history that begins anew at an older step.
    save(&folder.0, &shape, 1, Mode::Full, Kind::Float, &[40]);
    assert_eq!(steps(), [30, 40]);
    save(&folder.0, &shape, 1, Mode::Full, Kind::Float, &[35]);
    assert_eq!(steps(), [30, 35]);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 2);
}

#[test]
fn a_damaged_newest_checkpoint_is_named_and_never_passed_over() {
    let (folder, shape) = (Folder::new(), tiny(true));
    let fresh = || {
        let _ = fs::remove_dir_all(folder.0.join("checkpoints"));
        save(&folder.0, &shape, 1, Mode::Full, Kind::Float, &[1, 2]);
        step_dir(&folder.0, 2)
    };
    let advice = format!("--resume {}", step_dir(&folder.0, 1).display());
    let expect = |e: Error, file: &str| {
        assert_eq!(e.exit_code(), 3, "{e}");
        assert!(e.message.contains(file) && e.message.contains(&advice), "{e}");
    };
    let shard = "shard-00000-of-00001.safetensors";

    let dir = fresh();
    let bytes = fs::metadata(dir.join(shard)).unwrap().len();
    flip(&dir.join(shard), bytes - 1000);
    expect(load_error(&latest(&folder.0).unwrap().unwrap(), &shape), shard);

    OpenOptions::new().write(true).open(dir.join(shard)).unwrap().set_len(bytes - 1).unwrap();
    expect(latest(&folder.0).unwrap_err(), shard);
    fs::remove_file(dir.join(shard)).unwrap();
    expect(latest(&folder.0).unwrap_err(), shard);

    let dir = fresh();
    let text = fs::read_to_string(dir.join("meta.json")).unwrap();
    fs::write(dir.join("meta.json"), text.replace("\"tokens\": 7", "\"tokens\": 8")).unwrap();
    expect(latest(&folder.0).unwrap_err(), "meta.json");
    fs::write(dir.join("meta.json"), text.replace("\"version\": 1", "\"version\": 9")).unwrap();
    expect(latest(&folder.0).unwrap_err(), "version 9");
    fs::write(dir.join("meta.json"), &text[..text.len() / 2]).unwrap();
    expect(latest(&folder.0).unwrap_err(), "meta.json");
    fs::remove_file(dir.join("meta.json")).unwrap();
    expect(latest(&folder.0).unwrap_err(), "meta.json");

    fresh();
    let other = Shape { hidden_size: 32, ..shape.clone() };
    let e = load_error(&latest(&folder.0).unwrap().unwrap(), &other);
    assert!(
        e.message
            .contains("`model.embed_tokens.weight` is [37, 24] in the checkpoint, [37, 32] in the model")
    );
    fs::remove_dir_all(step_dir(&folder.0, 1)).unwrap();
    fs::remove_file(step_dir(&folder.0, 2).join("meta.json")).unwrap();
    assert!(latest(&folder.0).unwrap_err().message.contains("no older checkpoint is complete"));
    assert!(latest(&folder.0.join("nothing")).unwrap().is_none());
}

#[test]
fn damage_that_one_rank_sees_stops_all_ranks() {
    let (folder, shape) = (Folder::new(), tiny(false));
    save(&folder.0, &shape, 2, Mode::Full, Kind::Float, &[1]);
    let shard = "shard-00001-of-00002.safetensors";
    let path = step_dir(&folder.0, 1).join(shard);
    flip(&path, fs::metadata(&path).unwrap().len() - 1);
    let errors = on_ranks(2, |world| {
        let checkpoint = latest(&folder.0).unwrap().unwrap();
        let mut params = params(&shape, &world, Mode::Full, Kind::Float);
        let mut optim = optimizer(&params);
        checkpoint.load(&mut params, &mut optim).unwrap_err()
    });
    for e in errors {
        assert!(e.exit_code() == 3 && e.message.contains(shard), "{e}");
    }
}

#[test]
fn a_failed_save_leaves_nothing_and_is_known_to_all_ranks() {
    let (folder, shape) = (Folder::new(), tiny(false));
    let dir = folder.0.join("checkpoints");
    let results: Vec<(Error, Result<Option<Saved>>)> = on_ranks(2, |world| {
        let (params, optim) = trained(&shape, &world, Mode::Full, Kind::Float);
        let mut saver = Saver::new(&folder.0, 3, run_info(), &world).unwrap();
        // The disk is full for rank 1 alone.
        if world.rank() == 1 {
            let temp = dir.join(".tmp-step-00000007");
            fs::create_dir_all(&temp).unwrap();
            let shard = temp.join(".tmp-shard-00001-of-00002.safetensors");
            std::os::unix::fs::symlink("/dev/full", shard).unwrap();
        }
        world.barrier().unwrap();
        saver.begin(7, &only(&shape, &params, &optim), json!(null)).unwrap();
        while saver.failed_saves() == 0 {
            assert!(saver.poll().unwrap().is_none());
        }
        assert_eq!(saver.failed_saves(), 1);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        world.barrier().unwrap();
        if world.rank() == 1 {
            let temp = dir.join(".tmp-step-00000008");
            fs::create_dir_all(&temp).unwrap();
            let shard = temp.join(".tmp-shard-00001-of-00002.safetensors");
            std::os::unix::fs::symlink("/dev/full", shard).unwrap();
        }
        world.barrier().unwrap();
        saver.begin(8, &only(&shape, &params, &optim), json!(null)).unwrap();
        let last = saver.finish().unwrap_err();
        saver.begin(9, &only(&shape, &params, &optim), json!(null)).unwrap();
        (last, saver.finish())
    });
    for (error, after) in results {
        assert_eq!(error.exit_code(), 1);
        assert!(
            error.message.contains("step 8") && error.message.contains("shard-00001-of-00002"),
            "{error}"
        );
        assert_eq!(after.unwrap().unwrap().step, 9);
    }
    assert_eq!(latest(&folder.0).unwrap().unwrap().meta().step, 9);
}

#[test]
fn a_path_without_a_model_is_told_what_a_model_is() {
    let folder = Folder::new();
    let error = |path: &Path| Weights::open(path).err().unwrap();
    assert!(error(&folder.0).message.contains("config.json"));
    assert!(error(&folder.0.join("nowhere")).message.contains("no such folder"));
    fs::create_dir(folder.0.join("checkpoints")).unwrap();
    assert_eq!(error(&folder.0).exit_code(), 3);
    fs::write(folder.0.join("params.json"), "{}").unwrap();
    assert!(error(&folder.0).message.contains("there is params.json, and no consolidated.00.pth"));
}

#[test]
fn new_rows_are_the_mean_of_the_old_ones() {
    for tied in [false, true] {
        let (folder, shape) = (Folder::new(), tiny(tied));
        save(&folder.0, &shape, 2, Mode::Full, Kind::Float, &[1]);
        let (old, _) = trained(&shape, &Group::solo(), Mode::Full, Kind::Float);
        let how = Export { dtype: Kind::Float, max_shard_size: u64::MAX, tokenizer: None, scoring: None };
        let model = folder.0.join("exported");
        export(&model, &shape, &old, &how, &Group::solo()).unwrap();
        let larger = Shape { vocab_size: 64, ..shape.clone() };
        for path in [model, step_dir(&folder.0, 1)] {
            for (ranks, mode) in [(1, Mode::Full), (3, Mode::Full), (2, Mode::Replicate)] {
                on_ranks(ranks, |world| {
                    let (old, _) = trained(&shape, &Group::solo(), Mode::Full, Kind::Float);
                    let mut grown = params(&larger, &world, mode, Kind::Float);
                    Weights::open(&path).unwrap().fill(&mut grown).unwrap();
                    for i in 0..grown.len() {
                        let (now, before) = (grown.gather_master(i).unwrap(), old.gather_master(i).unwrap());
                        if !["embedding", "head"].contains(&grown.layout(i).name.as_str()) {
                            assert!(now.equal(&before));
                            continue;
                        }
                        let (now, before) = (now.view([64, 24]), before.view([37, 24]));
                        assert!(now.narrow(0, 0, 37).equal(&before));
                        let mean = before.to_kind(Kind::Double).mean_dim(0, true, Kind::Double);
                        let mean = mean.to_kind(Kind::Float).expand([27, 24], false);
                        let off = (now.narrow(0, 37, 27) - mean).abs().max().double_value(&[]);
                        assert!(off < 1e-8, "{off}");
                    }
                });
            }
        }
        // A run that goes on must have the model that it had.
        let e = load_error(&Checkpoint::open(&step_dir(&folder.0, 1)).unwrap(), &larger);
        assert!(e.message.contains("is [37, 24] in the checkpoint, [64, 24] in the model"), "{e}");
    }
}

#[test]
fn further_models_lie_in_folders_of_their_own() {
    let (folder, shape) = (Folder::new(), tiny(false));
    let other = Shape { hidden_size: 2 * shape.hidden_size, ..shape.clone() };
    on_ranks(2, |world| {
        let (params, optim) = trained(&shape, &world, Mode::Full, Kind::Float);
        let (critic, of_critic) = trained(&other, &world, Mode::Full, Kind::Float);
        let mut saver = Saver::new(&folder.0, 3, run_info(), &world).unwrap();
        let part =
            |name, shape, params, optim| Part { name, shape, base: None, scoring: None, params, optim };
        let models = [
            part("", &shape, &params, Some(&optim)),
            part("critic", &other, &critic, Some(&of_critic)),
            part("ema", &shape, &params, None),
        ];
        saver.begin(4, &models, json!({"tokens": 7})).unwrap();
        saver.finish().unwrap().unwrap();
    });
    let checkpoint = latest(&folder.0).unwrap().unwrap();
    for (name, shape, moments) in [("critic", &other, true), ("ema", &shape, false)] {
        let part = checkpoint.part(name).unwrap();
        let world = Group::solo();
        let (expected, of_expected) = trained(shape, &world, Mode::Full, Kind::Float);
        let mut params = Sharded::new(layouts(shape), world.clone(), world, Kind::Float, Device::Cpu);
        let mut optim = AdamW::new(&params, of_expected.hyper);
        match moments {
            true => drop(part.load(&mut params, &mut optim).unwrap()),
            false => part.fill_weights(&mut params).unwrap(),
        }
        for i in 0..params.len() {
            assert!(params.master(i).equal(&expected.master(i)), "{name}");
            let pairs = optim.moments[i].tensors().into_iter().zip(of_expected.moments[i].tensors());
            assert!(!moments || pairs.into_iter().all(|((_, a), (_, b))| a.equal(b)), "{name}");
        }
        assert_eq!(optim.step, if moments { of_expected.step } else { 0 });
    }
    assert!(checkpoint.part("actor").unwrap_err().message.contains("has no actor"));

    // What a part lacks, the whole lacks.
    let shard = checkpoint.dir().join("critic/shard-00001-of-00002.safetensors");
    fs::remove_file(&shard).unwrap();
    let e = latest(&folder.0).unwrap_err();
    assert!(e.exit_code() == 3 && e.message.contains("critic/shard-00001"), "{e}");
}
