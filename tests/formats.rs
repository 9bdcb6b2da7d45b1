//! Models as `torch.save` writes them, and damaged files of every format. The models in `tests/fixtures/formats` are one
//! model, made by Python with the script beside them.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

mod common;

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use testing::compare::largest;
use testing::folder::{copy_files, folder};
use testing::golden::{fixture, golden, tensors};
use testing::program::Program;
use testing::tolerance::{Quantity, allowed};

use common::load;
use corral::checkpoint::{TensorSource, Weights};
use corral::model::ModelInput;
use tch::{Device, Kind, Tensor};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

const FORMATS: [&str; 4] = ["bin", "bin_parts", "meta2", "meta3"];

fn fixtures() -> PathBuf {
    fixture("formats")
}

fn expected() -> HashMap<String, Tensor> {
    tensors(&fixtures().join("expected.safetensors"))
}

fn source(name: &str) -> TensorSource {
    Weights::open(&fixtures().join(name)).unwrap().into_source().unwrap()
}

#[test]
fn every_format_gives_the_logits_of_transformers() {
    let expected = expected();
    for name in FORMATS {
        let mut model = load(&fixtures().join(name), Kind::Float);
        let hidden = model.hidden(&ModelInput::new(expected["input_ids"].shallow_clone())).unwrap();
        let logits = model.next_token_logits(&hidden).unwrap().view([2, 24, 40]);
        let right = &expected[if name == "meta3" { "logits_meta3" } else { "logits" }];
        assert!(
            largest(&logits, right) < allowed(Quantity::SingleReference, Kind::Float),
            "{name}: {}",
            largest(&logits, right)
        );
    }
    // The two differ by more than that.
    assert!(largest(&expected["logits"], &expected["logits_meta3"]) > 0.1);
}

#[test]
fn every_range_of_every_tensor_is_read_right() {
    let expected = expected();
    for name in FORMATS {
        let source = source(name);
        let mut read = 0;
        for (tensor, right) in expected.iter().filter(|(n, _)| n.ends_with(".weight")) {
            assert_eq!(source.view(tensor).unwrap().shape, right.size(), "{name}: {tensor}");
            let flat = right.contiguous().view([-1]).to_kind(Kind::Float);
            let numel = flat.size()[0];
            // Ranges of all lengths that begin and end anywhere in rows and heads.
            for (first, len) in
                (0..numel).step_by(13).map(|i| (i, (i * i % 97 + 1).min(numel - i))).chain([(0, numel)])
            {
                let values = Tensor::full([len], f64::NAN, (Kind::Float, Device::Cpu));
                source.read(tensor, first, &values).unwrap();
                assert!(values.equal(&flat.narrow(0, first, len)), "{name}: {tensor} {first} + {len}");
                read += 1;
            }
            let beyond = Tensor::zeros([2], (Kind::Float, Device::Cpu));
            assert!(source.read(tensor, numel - 1, &beyond).is_err());
        }
        assert!(read > 500, "{read}");
    }
}

#[test]
fn a_pickle_that_imports_is_refused_and_not_run() {
    let (dir, model) = (folder("imports"), fixtures().join("imports_os"));
    fs::write(dir.join("none.jsonl"), "").unwrap();
    let convert =
        Program::corral(&["convert", "--format", "hf", "--to"]).arg(dir.join("out")).args(&["--from"]);
    let score = Program::corral(&["score", "--input"]).arg(dir.join("none.jsonl"));
    let score = score.args(&["--output"]).arg(dir.join("out")).args(&["--model"]);
    for (name, program) in [("convert", convert), ("score", score)] {
        let ended = program.arg(&model).run(&dir, name);
        ended.expect_error(3, &["pytorch_model.bin", "its pickle is refused", "`posix.system`"]);
    }
    assert!(!dir.join("out").exists() && !Path::new("corral-was-here").exists());
}

/// A copy of a folder of the fixtures or the golden models, to be damaged.
fn copy(from: &Path, name: &str) -> PathBuf {
    let dir = folder(name);
    copy_files(from, &dir, |file| file.starts_with("golden"));
    dir
}

/// The model is refused as unusable data, with an error that has `parts`.
fn refused(model: &Path, parts: &[&str]) {
    let e = Weights::open(model).err().unwrap_or_else(|| panic!("accepted; expected {parts:?}"));
    assert_eq!(e.exit_code(), 3, "{e}");
    for part in parts {
        assert!(e.message.contains(part), "`{part}` is not in: {e}");
    }
}

/// The same through the binary, which leaves nothing.
fn refused_by_convert(model: &Path, parts: &[&str]) {
    let out = model.join("out/model");
    let program =
        Program::corral(&["convert", "--format", "hf", "--to"]).arg(&out).args(&["--from"]).arg(model);
    program.run(model, "convert").expect_error(3, parts);
    assert!(!out.exists() && !model.join("out/.tmp-model").exists());
}

/// Rewrites an archive: `f` gives an entry's new contents, by its name; none: it is left out.
fn rewrite(path: &Path, archive: &[u8], f: impl Fn(&str, Vec<u8>) -> Option<Vec<u8>>) {
    let mut archive = ZipArchive::new(std::io::Cursor::new(archive)).unwrap();
    let mut out = ZipWriter::new(fs::File::create(path).unwrap());
    for i in 0..archive.len() {
        let mut entry = archive.by_index(i).unwrap();
        let (name, mut bytes) = (entry.name().unwrap().to_string(), Vec::new());
        std::io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
        if let Some(bytes) = f(&name, bytes) {
            let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
            out.start_file(name, stored).unwrap();
            out.write_all(&bytes).unwrap();
        }
    }
    out.finish().unwrap();
}

#[test]
fn damaged_torch_files_are_refused() {
    let dir = copy(&fixtures().join("bin"), "damaged-bin");
    let path = dir.join("pytorch_model.bin");
    let good = fs::read(&path).unwrap();
    let find = |what: &[u8]| good.windows(what.len()).position(|w| w == what).unwrap();

    fs::write(&path, &good[..good.len() / 2]).unwrap();
    refused(&dir, &["pytorch_model.bin", "the file is damaged"]);
    fs::write(&path, b"").unwrap();
    refused(&dir, &["pytorch_model.bin", "not a zip archive"]);
    fs::write(&path, b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x02").unwrap();
    refused(&dir, &["pytorch_model.bin", "torch before version 1.6"]);

    // The archive's directory puts one storage into another, then beyond the end.
    let directory = find(b"PK\x01\x02");
    let entries: Vec<usize> =
        (directory..good.len() - 46).filter(|i| good[*i..].starts_with(b"PK\x01\x02")).collect();
    let mut overlap = good.clone();
    let (from, to) = (entries[entries.len() - 4] + 42, entries[entries.len() - 5] + 42);
    overlap.copy_within(from..from + 4, to);
    fs::write(&path, &overlap).unwrap();
    refused(&dir, &["pytorch_model.bin", "entries of the archive overlap"]);
    let mut beyond = good.clone();
    beyond[to..to + 4].copy_from_slice(&(good.len() as u32 * 2).to_le_bytes());
    fs::write(&path, &beyond).unwrap();
    refused(&dir, &["pytorch_model.bin", "invalid Zip archive"]);

    // An entry that is compressed: the method in the directory and in the entry itself.
    let mut deflated = good.clone();
    let header = u32::from_le_bytes(std::array::from_fn(|i| good[to + i])) as usize;
    (deflated[to - 32], deflated[header + 8]) = (8, 8);
    fs::write(&path, &deflated).unwrap();
    refused_by_convert(&dir, &["pytorch_model.bin", "is compressed"]);

    // A pickle that ends early, storages that are missing or short, another order of bytes.
    rewrite(&path, &good, |_, bytes| Some(bytes));
    assert_eq!(source("bin").names().count(), source_of(&dir).names().count());
    let is = |name: &str, end: &str| name.ends_with(end);
    let cut = |mut bytes: Vec<u8>, n: usize| {
        bytes.truncate(bytes.len() - n);
        Some(bytes)
    };
    rewrite(&path, &good, |name, bytes| if is(name, "data.pkl") { cut(bytes, 500) } else { Some(bytes) });
    refused(&dir, &["its pickle is refused", "ends in the middle"]);
    rewrite(&path, &good, |name, bytes| if is(name, "data/7") { cut(bytes, 4) } else { Some(bytes) });
    refused(&dir, &["pytorch_model.bin", "its storage should have", "the file is damaged"]);
    rewrite(&path, &good, |name, bytes| (!is(name, "data/7")).then_some(bytes));
    refused(&dir, &["pytorch_model.bin", "there is no storage 7"]);
    rewrite(&path, &good, |name, bytes| (!is(name, "data.pkl")).then_some(bytes));
    refused(&dir, &["pytorch_model.bin", "not have one data.pkl"]);
    rewrite(&path, &good, |name, bytes| Some(if is(name, "byteorder") { b"big".to_vec() } else { bytes }));
    refused(&dir, &["pytorch_model.bin", "not little-endian"]);
}

fn source_of(dir: &Path) -> TensorSource {
    Weights::open(dir).unwrap().into_source().unwrap()
}

#[test]
fn damaged_folders_of_hugging_face_are_refused() {
    let dir = copy(&fixtures().join("bin_parts"), "damaged-parts");
    let part = dir.join("pytorch_model-00002-of-00002.bin");
    let bytes = fs::read(&part).unwrap();
    fs::remove_file(&part).unwrap();
    refused(&dir, &["pytorch_model.bin.index.json names pytorch_model-00002-of-00002.bin", "cannot read"]);
    fs::write(&part, &bytes).unwrap();
    let index = dir.join("pytorch_model.bin.index.json");
    let text = fs::read_to_string(&index).unwrap();
    fs::write(&index, text.replace("lm_head.weight", "lm_tail.weight")).unwrap();
    refused(&dir, &["index.json", "there is no tensor `lm_tail.weight` in pytorch_model-00002"]);
    fs::write(&index, text.replace("\"pytorch_model-00001", "\"/etc/pytorch_model-00001")).unwrap();
    refused(&dir, &["index.json", "names no file of its folder"]);
    fs::write(&index, "{\"weight_map\": 3}").unwrap();
    refused(&dir, &["index.json", "there is no weight_map"]);

    let dir = copy(&golden().join("models/llama2"), "damaged-safetensors");
    let path = dir.join("model.safetensors");
    let good = fs::read(&path).unwrap();
    fs::write(&path, &good[..good.len() - 1000]).unwrap();
    refused_by_convert(&dir, &["model.safetensors", "its header describes"]);
    let header = u64::from_le_bytes(std::array::from_fn(|i| good[i])) as usize;
    let text = String::from_utf8(good[8..8 + header].to_vec()).unwrap();
    // A tensor that lies outside the file: the last one, moved.
    let end = (good.len() - 8 - header).to_string();
    let moved = text.replace(&format!(",{end}]"), &format!(",{}]", end.parse::<usize>().unwrap() + 4096));
    assert_ne!(moved, text);
    let mut outside = (moved.len() as u64).to_le_bytes().to_vec();
    outside.extend(moved.bytes());
    outside.extend(&good[8 + header..]);
    fs::write(&path, &outside).unwrap();
    refused(&dir, &["model.safetensors", "header not usable"]);
    fs::write(&path, &good).unwrap();
    let config = fs::read_to_string(dir.join("config.json")).unwrap();
    let other = config.replace("\"intermediate_size\": 160", "\"intermediate_size\": 192");
    fs::write(dir.join("config.json"), other).unwrap();
    refused_by_convert(&dir, &["the tensors do not fit its config.json"]);
    let other = config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 2000000000");
    fs::write(dir.join("config.json"), other).unwrap();
    refused(&dir, &["num_hidden_layers 2000000000, but there are 21 tensors"]);
}

#[test]
fn damaged_models_of_meta_are_refused() {
    let dir = copy(&fixtures().join("meta3"), "damaged-meta");
    let (params, last) = (dir.join("params.json"), dir.join("consolidated.01.pth"));
    let (text, bytes) = (fs::read_to_string(&params).unwrap(), fs::read(&last).unwrap());
    fs::remove_file(&last).unwrap();
    refused(
        &dir,
        &["params.json", "the feed-forward size is 48", "w1 has 24 rows; is a part of the model missing?"],
    );
    fs::write(dir.join("consolidated.02.pth"), &bytes).unwrap();
    refused_by_convert(&dir, &["there is consolidated.02.pth, and no consolidated.01.pth"]);
    fs::rename(dir.join("consolidated.02.pth"), &last).unwrap();
    for (from, to, part) in [
        ("\"n_layers\": 2", "\"n_layers\": 1", "`layers.1.attention.wk.weight` belongs to no Llama"),
        ("\"n_layers\": 2", "\"n_layers\": 3", "there is no tensor `layers.2.attention.wq.weight`"),
        ("\"n_layers\": 2", "\"n_layers\": 2000000000", "n_layers is 2000000000, but there are"),
        (
            "\"n_kv_heads\": 2",
            "\"n_kv_heads\": 4",
            "`layers.0.attention.wk.weight` is [4, 16], [4, 16] and should be [16, 16]",
        ),
        ("\"vocab_size\": -1", "\"vocab_size\": 41", "vocab_size is 41, but output.weight has 40 rows"),
        ("\"dim\": 16", "\"dim\": 16, \"sliding_window\": 4096", "sliding_window = 4096: not known"),
    ] {
        assert!(text.contains(from), "{text}");
        fs::write(&params, text.replace(from, to)).unwrap();
        refused(&dir, &[part]);
    }
    fs::write(&params, &text).unwrap();
    fs::copy(fixtures().join("meta2/consolidated.01.pth"), &last).unwrap();
    refused(&dir, &["`tok_embeddings.weight` is [20, 16], [40, 8] and should be [40, 16], in 2 part(s)"]);
}
