//! Files that were changed at random: a reader gives an error or a model, never a panic, and allocates no more than
//! the file justifies. The changes are the same in every run.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use testing::folder::folder;
use testing::golden::{fixture, golden, golden_megatron};
use testing::run::data;

use corral::Result;
use corral::checkpoint::source::TensorFile;
use corral::checkpoint::{Weights, safetensors, torch_file};
use corral::data::shards::TokenSet;
use corral::data::tokenizer::Tokenizer;
use corral::gguf::Gguf;
use kernels::counting;
use tch::{Device, Kind, Tensor};
use zip::CompressionMethod;
use zip::write::{SimpleFileOptions, ZipWriter};

#[global_allocator]
static ALLOCATOR: counting::Counting = counting::Counting;

/// Changed files for every reader.
const FILES: u64 = 10_000;

/// What a reader may allocate: a fixed part (buffers, paths, messages), and so many bytes for each byte of the files.
const FIXED: usize = 64 << 10;
const PER_BYTE: usize = 8;

/// A byte of a pickle may stand for a container of its own; so many bytes, then.
const PER_BYTE_OF_PICKLE: usize = 100;

/// Bytes are counted over all threads, so one test runs at a time, from its first line on.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// Numbers that lengths, offsets and shapes go wrong at.
const NUMBERS: [u64; 14] = [
    0,
    1,
    2,
    0x7f,
    0xff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_ffff,
    0x2000_0000_0000_0001,
];

/// Changes a file in one to four places; mostly within `hot`, where its structure is.
fn mutate(bytes: &mut Vec<u8>, hot: &[std::ops::Range<usize>], random: &mut Random) {
    for _ in 0..1 + random.below(4) {
        let at = match random.below(8) {
            0 => random.below(bytes.len()),
            _ => {
                let range = hot[random.below(hot.len())].clone();
                (range.start + random.below(range.len())).min(bytes.len().saturating_sub(1))
            }
        };
        if bytes.is_empty() {
            return;
        }
        let span = 1 + random.below(24);
        match random.below(10) {
            0 | 1 => bytes[at] ^= 1 << random.below(8),
            2 => bytes[at] = random.next() as u8,
            3 | 4 => {
                let width = [1, 2, 4, 8][random.below(4)];
                let number = match random.below(3) {
                    0 => bytes.len() as u64 + random.below(3) as u64 - 1,
                    _ => NUMBERS[random.below(NUMBERS.len())],
                };
                let end = (at + width).min(bytes.len());
                bytes[at..end].copy_from_slice(&number.to_le_bytes()[..end - at]);
            }
            5 => {
                // A number in text.
                let digits = bytes[at..].iter().position(u8::is_ascii_digit).map(|i| at + i);
                if let Some(start) = digits {
                    let len = bytes[start..].iter().take_while(|b| b.is_ascii_digit()).count();
                    let number = NUMBERS[random.below(NUMBERS.len())].to_string();
                    bytes.splice(start..start + len, number.bytes());
                }
            }
            6 => {
                let part = bytes[at..(at + span).min(bytes.len())].to_vec();
                let to = random.below(bytes.len());
                let end = (to + part.len()).min(bytes.len());
                bytes[to..end].copy_from_slice(&part[..end - to]);
            }
            7 => {
                let part = bytes[at..(at + span).min(bytes.len())].repeat(1 + random.below(4));
                bytes.splice(at..at, part);
            }
            8 => drop(bytes.drain(at..(at + span).min(bytes.len()))),
            _ if random.below(4) == 0 => bytes.truncate(at),
            _ => bytes.insert(at, random.next() as u8),
        }
    }
}

/// A file to change, and where in it the structure lies.
struct Seed {
    path: PathBuf,
    bytes: Vec<u8>,
    hot: Vec<std::ops::Range<usize>>,
}

/// Gives a file these contents in place: truncating it first would make some file systems write it to the disk at once.
fn put(path: &Path, bytes: &[u8]) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
}

/// Reads [`FILES`] changed copies of the seeds, each put in its seed's place beside what else lies there.
fn fuzz(name: &str, seeds: Vec<Seed>, fix: impl Fn(&mut [u8]), read: impl Fn(&Path) -> Result<()>) {
    let size: usize = seeds.iter().map(|s| s.bytes.len()).sum();
    for seed in &seeds {
        read(&seed.path).unwrap_or_else(|e| panic!("{name}: the seed is refused: {e}"));
    }
    std::panic::set_hook(Box::new(|_| {}));
    let (mut refused, mut most, started) = (0, 0, Instant::now());
    let mut wrong = Vec::new();
    for i in 0..FILES {
        let seed = &seeds[i as usize % seeds.len()];
        let mut bytes = seed.bytes.clone();
        mutate(&mut bytes, &seed.hot, &mut Random(i));
        fix(&mut bytes);
        put(&seed.path, &bytes);
        let measure = || {
            let before = counting::live();
            counting::reset_peak();
            let result = catch_unwind(AssertUnwindSafe(|| read(&seed.path).is_err()));
            (result, counting::peak() - before)
        };
        let may = FIXED + PER_BYTE * (size + bytes.len());
        let (result, mut allocated) = measure();
        if allocated > may {
            // The test harness allocates too, when another test ends; what the reader takes, it takes every time.
            allocated = allocated.min(measure().1);
        }
        match result {
            Ok(err) => refused += u64::from(err),
            Err(_) => wrong.push(format!("file {i} of {}: a panic", seed.path.display())),
        }
        most = most.max(allocated);
        if allocated > may {
            wrong.push(format!("file {i} of {}: {allocated} bytes allocated", seed.path.display()));
        }
        // The next file of another seed finds this one whole.
        if seeds.len() > 1 {
            put(&seed.path, &seed.bytes);
        }
    }
    let _ = std::panic::take_hook();
    assert!(wrong.is_empty(), "{name}: {}\n{}", wrong.len(), wrong[..wrong.len().min(10)].join("\n"));
    let seconds = started.elapsed().as_secs_f64();
    println!(
        "{name}: {FILES} files of some {size} bytes, {refused} refused, at most {most} bytes allocated, {seconds:.1} s"
    );
    // Most changes are to structure; some to values, or none at all.
    assert!(refused > FILES / 4 && refused < FILES, "{name}: {refused} refused");
}

/// Reads a little of every tensor.
fn read_all(file: &dyn TensorFile) -> Result<()> {
    for name in file.names() {
        let (shape, kind) = file.info(&name)?;
        let n = shape.iter().product::<i64>().clamp(0, 64);
        let mut bytes = vec![0; n as usize * kind.elt_size_in_bytes()];
        file.read_bytes(&name, 0, &mut bytes)?;
    }
    Ok(())
}

fn seed(path: PathBuf, from: &Path, hot: impl Fn(&[u8]) -> Vec<std::ops::Range<usize>>) -> Seed {
    let bytes = fs::read(from).unwrap();
    fs::write(&path, &bytes).unwrap();
    let hot = hot(&bytes);
    Seed { path, bytes, hot }
}

fn fixtures() -> PathBuf {
    fixture("formats")
}

#[test]
fn safetensors_files() {
    let _alone = alone();
    let dir = folder("safetensors");
    let header =
        |bytes: &[u8]| vec![0..8, 8..8 + u64::from_le_bytes(std::array::from_fn(|i| bytes[i])) as usize];
    let seeds = vec![seed(dir.join("x.safetensors"), &fixtures().join("expected.safetensors"), header)];
    fuzz(
        "safetensors",
        seeds,
        |_| {},
        |path| {
            let file = safetensors::SafetensorsReader::open(path)?;
            for name in file.names().into_iter().filter(|name| name.ends_with(".weight")) {
                let dst = Tensor::zeros([8], (Kind::Float, Device::Cpu));
                file.read(&name, 0, &dst)?;
            }
            Ok(())
        },
    );
}

/// Of a torch file: the pickle, which is the first entry, and the archive's directory.
fn pickle_and_directory(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let find = |what: &[u8]| bytes.windows(what.len()).position(|w| w == what).unwrap();
    let (pickle, directory) = (0..find(b".PK\x07\x08"), find(b"PK\x01\x02")..bytes.len());
    vec![pickle.clone(), pickle, directory]
}

#[test]
fn torch_files() {
    let _alone = alone();
    let dir = folder("torch");
    let seeds =
        ["bin/pytorch_model.bin", "bin_parts/pytorch_model-00001-of-00002.bin", "meta3/consolidated.01.pth"];
    let seeds = seeds
        .iter()
        .enumerate()
        .map(|(i, from)| seed(dir.join(format!("{i}.bin")), &fixtures().join(from), pickle_and_directory));
    fuzz("torch", seeds.collect(), |_| {}, |path| read_all(&torch_file::TorchReader::open(path)?));
}

/// A file of `torch.save` with this pickle and no tensors.
fn write_torch_file(path: &Path, pickle: &[u8]) {
    let mut zip = ZipWriter::new(fs::File::create(path).unwrap());
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    zip.start_file("x/data.pkl", stored).unwrap();
    zip.write_all(pickle).unwrap();
    zip.finish().unwrap();
}

#[test]
fn pickles_that_make_as_much_as_they_can() {
    let _alone = alone();
    let path = folder("pickles").join("x.bin");
    let memo = |i: u32| [&b"]r"[..], &i.to_le_bytes()].concat();
    let patterns: [(&str, Vec<u8>); 8] = [
        ("lists", b"]".to_vec()),
        ("marks", b"(".to_vec()),
        ("nested tuples", b")\x85".to_vec()),
        ("dictionaries with items", b"}K\x01Ns".to_vec()),
        ("a long list", b"](NNNNNNNNNNNNNNe".to_vec()),
        ("copies", b"N2222222".to_vec()),
        ("empty texts", b"X\0\0\0\0".to_vec()),
        ("calls", b"ccollections\nOrderedDict\n)R".to_vec()),
    ];
    let memos: Vec<u8> = (0..1 << 16).flat_map(memo).collect();
    let repeated = patterns.map(|(what, pattern)| (what, pattern.repeat((1 << 20) / pattern.len())));
    for (what, pickle) in repeated.into_iter().chain([("memos", memos)]) {
        write_torch_file(&path, &[b"(", &pickle[..], b"."].concat());
        let before = counting::live();
        counting::reset_peak();
        // An error or an empty dictionary.
        let _ = torch_file::TorchReader::open(&path);
        let allocated = counting::peak() - before;
        println!("{what}: {:.1} bytes for a byte", allocated as f64 / pickle.len() as f64);
        assert!(
            allocated <= FIXED + PER_BYTE_OF_PICKLE * pickle.len(),
            "{what}: {allocated} of {}",
            pickle.len()
        );
    }
}

#[test]
fn configurations_and_indices() {
    let _alone = alone();
    let whole = |bytes: &[u8]| std::iter::once(0..bytes.len()).collect();
    for (name, from, files) in [
        (
            "config.json and index",
            golden().join("models/llama3_sharded"),
            &["config.json", "model.safetensors.index.json"][..],
        ),
        ("config.json of experts", golden().join("models/mixtral"), &["config.json"]),
        ("params.json", fixtures().join("meta2"), &["params.json"]),
    ] {
        let dir = folder(name);
        for entry in fs::read_dir(&from).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
        }
        let seeds = files.iter().map(|file| seed(dir.join(file), &from.join(file), whole)).collect();
        fuzz(name, seeds, |_| {}, |path| Weights::open(path.parent().unwrap()).map(drop));
    }
}

/// A copy of a folder and of those in it.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path()) {
        let to = to.join(entry.file_name().unwrap());
        match entry.is_dir() {
            true => copy(&entry, &to),
            false => drop(fs::copy(&entry, &to).unwrap()),
        }
    }
}

/// Files of ranks, with experts in two tensors a layer and with legacy names, and whole tensors of a distributed checkpoint.
#[test]
fn megatron_folders() {
    let _alone = alone();
    let models = golden_megatron();
    let rank = "iter_0000001/mp_rank_00/model_optim_rng.pt";
    let stage = "iter_0000001/mp_rank_00_000/model_optim_rng.pt";
    let shared = ["iter_0000001/.metadata", "iter_0000001/common.pt", "iter_0000001/__0_0.distcp"];
    for (model, checkpoint, files) in [
        ("llama", "torch-tp1-pp1", &["latest_checkpointed_iteration.txt", rank][..]),
        ("tied", "torch-tp2-pp2", &[stage]),
        ("llama", "torch-legacy-tp2-pp2", &[stage]),
        ("mixtral", "torch-grouped-tp2-pp1", &[rank]),
        ("bias", "torch_dist-tp2-pp1", &shared),
        ("mixtral", "torch_dist-tp2-pp2", &shared[..1]),
    ] {
        let Some(from) = models.get(model).map(|dir| dir.join(checkpoint)).filter(|dir| dir.exists()) else {
            println!("{model}/{checkpoint} is not among this golden data");
            continue;
        };
        let dir = folder(&format!("megatron-{model}-{checkpoint}"));
        copy(&from, &dir);
        let hot = |bytes: &[u8]| match bytes.starts_with(b"PK") {
            true => pickle_and_directory(bytes),
            false => std::iter::once(0..bytes.len()).collect(),
        };
        let seeds = files.iter().map(|file| seed(dir.join(file), &from.join(file), hot)).collect();
        fuzz(
            &format!("{model}/{checkpoint}"),
            seeds,
            |_| {},
            |_| {
                let source = Weights::open(&dir)?.into_source()?;
                for name in source.views.keys() {
                    source.read(name, 0, &Tensor::zeros([8], (Kind::Float, Device::Cpu)))?;
                }
                Ok(())
            },
        );
    }
}

/// Small files that would make much of little: what a pickle says once and has in many places.
#[test]
fn megatron_files_that_repeat_themselves() {
    let _alone = alone();
    let text = |text: &str| [&b"X"[..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
    let int = |i: i32| [&b"J"[..], &i.to_le_bytes()].concat();
    let put = |i: u32| [&b"r"[..], &i.to_le_bytes()].concat();
    let get = |i: u32| [&b"j"[..], &i.to_le_bytes()].concat();
    let namespace =
        |fields: Vec<u8>| [b"cargparse\nNamespace\n)\x81}(".to_vec(), fields, b"ub".to_vec()].concat();
    let file = |args: Vec<u8>, model: Vec<u8>| {
        let version = [text("checkpoint_version"), int(3)].concat();
        [b"}(".to_vec(), version, text("args"), args, text("model"), model, b"u.".to_vec()].concat()
    };
    // Dictionaries of twelve keys for the one below.
    let mut nested = [b"}".to_vec(), put(0)].concat();
    for level in 0..8 {
        let keys = (0..12).flat_map(|key| [text(&format!("k{key}")), get(level)].concat());
        nested = [nested, b"0}(".to_vec(), keys.collect(), b"u".to_vec(), put(level + 1)].concat();
    }
    // A text, and a list, under very many keys.
    let fields = |value: Vec<u8>| {
        let mut bytes = [text("a"), value, put(0)].concat();
        (0..20_000).for_each(|key| bytes.extend([text(&format!("{key}")), get(0)].concat()));
        namespace(bytes)
    };
    let long_list = [b"](".to_vec(), b"K\x01".repeat(100_000), b"e".to_vec()].concat();
    let dir = folder("megatron-repeats");
    fs::create_dir_all(dir.join("mp_rank_00")).unwrap();
    let path = dir.join("mp_rank_00/model_optim_rng.pt");
    for (what, pickle) in [
        ("dictionaries", file(namespace(vec![]), nested)),
        ("texts", file(fields(text(&"x".repeat(200_000))), b"}".to_vec())),
        ("lists", file(fields(long_list), b"}".to_vec())),
    ] {
        write_torch_file(&path, &pickle);
        let before = counting::live();
        counting::reset_peak();
        assert!(Weights::open(&dir).is_err(), "{what}");
        let allocated = counting::peak() - before;
        println!("{what}: {:.1} bytes for a byte", allocated as f64 / pickle.len() as f64);
        assert!(
            allocated <= FIXED + PER_BYTE_OF_PICKLE * pickle.len(),
            "{what}: {allocated} of {}",
            pickle.len()
        );
    }
}

/// Header and metadata, of which three of four files keep the magic and the counts before.
#[test]
fn gguf_files() {
    let _alone = alone();
    let dir = folder("gguf");
    let fixture = |name: &str| fixture("gguf").join(name);
    for (name, header) in [("llama3.gguf", 24..24_000), ("qwen2.gguf", 24..24_000), ("quants.gguf", 0..700)] {
        let whole = seed(dir.join(name), &fixture(name), |_| vec![header.clone()]);
        let (magic, hot) = (whole.bytes[..24].to_vec(), header.start > 0);
        let fix = move |bytes: &mut [u8]| {
            if bytes.len() >= 24 && hot && !bytes[bytes.len() - 1].is_multiple_of(4) {
                bytes[..24].copy_from_slice(&magic);
            }
        };
        fuzz(name, vec![whole], fix, |path| match name {
            "quants.gguf" => Gguf::open(path).map(drop),
            _ => {
                let source = Weights::open(path)?.into_source()?;
                for tensor in source.views.keys().filter(|tensor| tensor.ends_with("norm.weight")) {
                    source.read(tensor, 0, &Tensor::zeros([8], (Kind::Float, Device::Cpu)))?;
                }
                Tokenizer::load(path).map(drop)
            }
        });
    }
}

#[test]
fn token_shards() {
    let _alone = alone();
    let dir = folder("tokens");
    let shard = data().join("tokens/valid/shard-00000.tokens");
    let seeds = vec![seed(dir.join("shard-00000.tokens"), &shard, |_| std::iter::once(0..128).collect())];
    // The header's checksum is made right for three of four, so that what comes after it is reached.
    let fix = |bytes: &mut [u8]| {
        if bytes.len() >= 88 && !bytes[bytes.len() - 1].is_multiple_of(4) {
            let crc = crc32fast::hash(&bytes[..84]);
            bytes[84..88].copy_from_slice(&crc.to_le_bytes());
        }
    };
    fuzz("token shards", seeds, fix, |path| {
        let set = TokenSet::open(path.parent().unwrap())?;
        set.check(None, 1 << 20)?;
        let mut ids = Vec::new();
        set.read(0, set.num_tokens(), &mut ids)?;
        set.verify()
    });
}
