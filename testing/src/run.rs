//! Trainings of a tiny model through the programs.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::compare::largest_relative;
use crate::folder::folder;
use crate::program::{Ended, Program, Running, corral, launch, read};
use crate::tolerance::{Quantity, allowed};

/// What stays in a run whatever interrupted it; times and memory do not.
const REPRODUCIBLE: [&str; 15] = [
    "kind",
    "step",
    "loss",
    "perplexity",
    "lr",
    "grad_norm",
    "tokens",
    "skipped_steps",
    "reward",
    "kl",
    "kl_coef",
    "entropy",
    "policy_loss",
    "value_loss",
    "explained_variance",
];

/// The built-in word problems with a tokenizer of 300 tokens and their shards (`tokens/{train,valid,tokenizer}`), made
/// once for all tests of this binary.
pub fn data() -> &'static Path {
    static DATA: OnceLock<PathBuf> = OnceLock::new();
    DATA.get_or_init(|| {
        let dir = folder("data");
        let at = |name: &str| dir.join(name).to_string_lossy().into_owned();
        let (text, tokenizer) = (at("pretrain.train.jsonl"), at("bpe"));
        let make = |name: &str, words: &[&str]| Program::corral(words).run(&dir, name).expect_code(0);
        make("synth", &["data", "synth", "--count", "150", "--output", &at("")]);
        make("bpe", &["tokenizer", "train", "--input", &text, "--vocab-size", "300", "--output", &tokenizer]);
        let words = ["tokenize", "--input", &text, "--tokenizer", &tokenizer, "--output", &at("tokens")];
        make("tokenize", &[&words[..], &["--valid-fraction", "0.1"]].concat());
        dir
    })
}

/// A tiny model that was fine-tuned for 60 steps on the questions and answers of [`data`], made once for all tests of this
/// binary.
pub fn answers() -> &'static Path {
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    MODEL.get_or_init(|| tuned("answers", 60))
}

/// The same after 10 steps.
pub fn beginner() -> &'static Path {
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    MODEL.get_or_init(|| tuned("beginner", 10))
}

fn tuned(name: &str, steps: u64) -> PathBuf {
    let run = Run::sft(name);
    run.train(1, &[&format!("train.steps={steps}"), "valid.every=100", "checkpoint.every=100"]);
    let model = folder(&format!("{name}-model"));
    fs::remove_dir(&model).and_then(|()| fs::rename(run.output().join("model"), &model)).expect("a model");
    model
}

/// The parameters of an exported model as one vector, in float64, in the order of their names.
pub fn parameters(model: &Path) -> Tensor {
    let mut tensors = Tensor::read_safetensors(model.join("model.safetensors")).expect("an exported model");
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let flat: Vec<Tensor> = tensors.iter().map(|(_, t)| t.to_kind(Kind::Double).view([-1])).collect();
    Tensor::cat(&flat, 0)
}

/// The lines of a JSONL file; of one that is being written, those that are complete.
pub fn json_lines(path: &Path) -> Vec<Value> {
    let text = read(path);
    let complete = text.rfind('\n').map_or(0, |end| end + 1);
    let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"));
    text[..complete].lines().map(parse).collect()
}

/// A training run of a tiny Llama (width 32, two blocks) in a folder of its own, which goes when the test has passed.
pub struct Run {
    /// The test's folder: `config.yaml`, the run's folder `run`, output of the programs.
    pub dir: PathBuf,
    subcommand: &'static str,
}

impl Run {
    /// 20 steps on the data of [`data`].
    pub fn new(name: &str) -> Run {
        let tokens = data().join("tokens");
        let tokens = tokens.display();
        let tokenizer = format!("{{path: {tokens}/tokenizer}}");
        let data = format!("train: [{tokens}/train]\n  valid: [{tokens}/valid]\n  sequence_length: 32");
        Run::tiny("pretrain", name, &tokenizer, &data)
    }

    /// 20 steps of fine-tuning of a new model on the questions and answers of [`data`].
    pub fn sft(name: &str) -> Run {
        let data = data().display();
        let tokenizer =
            format!("{{path: {data}/tokens/tokenizer, template: \"{{prompt}}\\n{{completion}}\"}}");
        let files = format!("train: [{data}/sft.train.jsonl]\n  valid: [{data}/sft.valid.jsonl]");
        let data = format!("{files}\n  sequence_length: 128\n  cache: {data}/cache");
        Run::tiny("sft", name, &tokenizer, &data)
    }

    fn tiny(subcommand: &'static str, name: &str, tokenizer: &str, data: &str) -> Run {
        let keys = format!(
            "tokenizer: {tokenizer}
model:
  init: {{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2}}
data:
  {data}
optim: {{lr: 1.0e-2}}
schedule: {{kind: cosine, warmup_steps: 4}}
train: {{steps: 20, batch_size: 8}}
valid: {{every: 10, batches: 3}}
"
        );
        Run::of(subcommand, name, &keys)
    }

    /// A run with these keys besides its folder.
    pub fn of(subcommand: &'static str, name: &str, keys: &str) -> Run {
        let dir = folder(name);
        let text = format!("output_dir: {}\nparallel: {{timeout_s: 100}}\n{keys}", dir.join("run").display());
        fs::write(dir.join("config.yaml"), text).expect("writable");
        Run { dir, subcommand }
    }

    /// The folder of the run itself.
    pub fn output(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// `corral SUBCOMMAND` for one rank, `launch --nproc RANKS SUBCOMMAND` for more; `words`: overrides and flags.
    pub fn program(&self, ranks: usize, words: &[&str]) -> Program {
        self.launched(ranks, &[], words)
    }

    /// The same, with options of `launch`.
    pub fn launched(&self, ranks: usize, options: &[&str], words: &[&str]) -> Program {
        let program = if ranks == 1 && options.is_empty() {
            Program::new(corral())
        } else {
            Program::new(launch()).args(&["--nproc", &ranks.to_string()]).args(options)
        };
        let program = program.args(&[self.subcommand, "--device", "cpu", "--config"]);
        program.arg(self.dir.join("config.yaml")).args(words)
    }

    pub fn start(&self, ranks: usize, words: &[&str]) -> Running {
        self.program(ranks, words).start(&self.dir, self.subcommand)
    }

    /// Trains to the end.
    pub fn train(&self, ranks: usize, words: &[&str]) -> Ended {
        self.start(ranks, words).wait().expect_code(0)
    }

    /// Trains on one rank until the metrics have `step`, then sends the signal.
    pub fn stop_at(&self, step: u64, signal: Signal, words: &[&str]) -> Ended {
        let mut running = self.start(1, words);
        running.wait_for(&format!("step {step}"), Duration::from_millis(1), || self.step() >= step);
        running.signal(signal);
        running.wait()
    }

    /// A start that ends with this code and one line of error, and begins no folder.
    pub fn expect_refused(&self, words: &[&str], code: i32, part: &str) {
        self.start(1, words).wait().expect_error(code, &[part]);
        assert!(!self.output().exists(), "{words:?}: nothing is begun");
    }

    /// The lines of `metrics.jsonl`.
    pub fn metrics(&self) -> Vec<Value> {
        json_lines(&self.output().join("metrics.jsonl"))
    }

    /// The last training step that is in the metrics; 0 if there is none.
    pub fn step(&self) -> u64 {
        self.metrics().iter().rfind(|line| line["kind"] == "train").map_or(0, |line| uint(line, "step"))
    }

    /// The metrics without what no two runs share.
    pub fn curve(&self) -> Vec<Value> {
        let keep = |line: Value| {
            let Value::Object(line) = line else { panic!("{line}") };
            line.into_iter().filter(|(key, _)| REPRODUCIBLE.contains(&key.as_str())).collect()
        };
        self.metrics().into_iter().map(keep).collect()
    }

    /// A number of every line of one kind.
    pub fn numbers(&self, kind: &str, key: &str) -> Vec<f64> {
        let lines = self.metrics().into_iter().filter(|line| line["kind"] == kind);
        lines.map(|line| line[key].as_f64().unwrap_or_else(|| panic!("{key} of {line}"))).collect()
    }

    /// The complete checkpoints by step, ascending.
    pub fn checkpoints(&self) -> Vec<(u64, PathBuf)> {
        let folder = fs::read_dir(self.output().join("checkpoints")).into_iter().flatten();
        let step = |path: &Path| path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok();
        let mut found: Vec<_> = folder
            .filter_map(|entry| {
                let path = entry.expect("an entry of the checkpoints").path();
                step(&path).map(|step| (step, path))
            })
            .collect();
        found.sort();
        found
    }

    /// The parameters of the exported model as one vector, in float64.
    pub fn parameters(&self) -> Tensor {
        parameters(&self.output().join("model"))
    }

    /// The parameters of the exported model, byte by byte.
    pub fn model(&self) -> Vec<u8> {
        fs::read(self.output().join("model/model.safetensors")).expect("an exported model")
    }

    /// Equal to another run in everything but time.
    pub fn expect_equal(&self, reference: &Run) {
        let (here, there) = (self.curve(), reference.curve());
        for (a, b) in here.iter().zip(&there) {
            assert_eq!(a, b, "{} differs from {}", self.dir.display(), reference.dir.display());
        }
        assert_eq!(here.len(), there.len(), "lines of metrics of {}", self.dir.display());
        assert!(self.model() == reference.model(), "{}: another model", self.dir.display());
    }
}

/// One epoch whose last step has few rows, of runs that `make` makes: however it is divided, also where a rank or a micro-batch
/// has none of them, `keys` of training are equal.
pub fn check_small_last_step(make: impl Fn(&str) -> Run, keys: &[&str]) {
    let epoch = |name: &str, ranks: usize, words: &[&str]| {
        let run = make(name);
        let of_an_epoch = ["train.steps=null", "train.epochs=1", "train.batch_size=64", "valid.every=0"];
        let exact = ["precision.compute=float64", "schedule.warmup_steps=0"];
        run.train(ranks, &[&of_an_epoch[..], &exact, words].concat());
        run
    };
    let whole = epoch("epoch-whole", 1, &[]);
    assert_eq!(whole.numbers("train", "epoch").last(), Some(&1.0));
    let tokens = whole.numbers("train", "tokens");
    let last = tokens.len() - 1;
    assert!(tokens[last] - tokens[last - 1] < 0.6 * tokens[0], "the last step must be small: {tokens:?}");
    for (ranks, micro) in [(1, 8), (2, 16), (4, 16)] {
        let run = epoch(&format!("epoch-{ranks}"), ranks, &[&format!("train.micro_batch_size={micro}")]);
        for key in keys {
            let apart = largest_relative(&run.numbers("train", key), &whole.numbers("train", key));
            assert!(apart <= allowed(Quantity::SameLosses, Kind::Double), "{key}, {ranks} ranks: {apart:e}");
        }
        assert_eq!(run.numbers("train", "tokens"), tokens, "{ranks} ranks");
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

pub fn uint(line: &Value, key: &str) -> u64 {
    line[key].as_u64().unwrap_or_else(|| panic!("{key} of {line}"))
}
