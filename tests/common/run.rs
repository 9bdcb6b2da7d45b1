//! Runs of the real binaries on tiny data, each with a time limit, so that a hang is a failure that shows its output.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

pub const CORRAL: &str = env!("CARGO_BIN_EXE_corral");
pub const LAUNCH: &str = env!("CARGO_BIN_EXE_launch");

/// Far more than any of these programs takes, also on a machine that does other work.
const TIME_LIMIT: Duration = Duration::from_secs(180);

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

/// An empty folder of this test, under `target/tmp`.
pub fn folder(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(env!("CARGO_CRATE_NAME")).join(name);
    let _ = fs::remove_dir_all(&path);
    fs::create_dir_all(&path).expect("a folder for the test");
    path
}

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

/// A tiny model that was fine-tuned on the questions and answers of [`data`], made once for all tests of this binary.
pub fn answers() -> &'static Path {
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    MODEL.get_or_init(|| {
        let run = Run::sft("answers");
        run.train(1, &["train.steps=60", "valid.every=100", "checkpoint.every=100"]);
        let model = folder("answers-model");
        fs::remove_dir(&model)
            .and_then(|()| fs::rename(run.output().join("model"), &model))
            .expect("a model");
        model
    })
}

/// A program to run, away from what the environment of the tests may ask of it.
pub struct Program(Command);

impl Program {
    pub fn new(program: &str) -> Program {
        let mut command = Command::new(program);
        for inherited in ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CORRAL_BACKEND", "CORRAL_BIN"]
        {
            command.env_remove(inherited);
        }
        // One thread a rank; no GPU, where there is one, so that all machines test the same.
        command.env("OMP_NUM_THREADS", "1").env("CUDA_VISIBLE_DEVICES", "");
        // A wish for backtraces is one for panics of the tests.
        command.env_remove("RUST_BACKTRACE").stdin(Stdio::null());
        Program(command)
    }

    pub fn corral(words: &[&str]) -> Program {
        let mut program = Program::new(CORRAL);
        program.0.args(["--device", "cpu"]).args(words);
        program
    }

    pub fn arg(mut self, word: impl Into<OsString>) -> Program {
        self.0.arg(word.into());
        self
    }

    pub fn args(mut self, words: &[&str]) -> Program {
        self.0.args(words);
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Program {
        self.0.env(name, value);
        self
    }

    /// Starts it; its output goes to `dir/NAME.{out,err}`.
    pub fn start(mut self, dir: &Path, name: &str) -> Running {
        let (out, err) = (dir.join(format!("{name}.out")), dir.join(format!("{name}.err")));
        let child = self
            .0
            .stdout(File::create(&out).expect("a file for its output"))
            .stderr(File::create(&err).expect("a file for its output"))
            .spawn()
            .expect("the program starts");
        Running { what: format!("{:?}", self.0), child, out, err, ended: None, started: Instant::now() }
    }

    pub fn run(self, dir: &Path, name: &str) -> Ended {
        self.start(dir, name).wait()
    }
}

/// A program that runs; killed when it is dropped.
pub struct Running {
    what: String,
    child: Child,
    out: PathBuf,
    err: PathBuf,
    ended: Option<ExitStatus>,
    started: Instant,
}

impl Running {
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("it is there until it is waited for");
    }

    pub fn has_ended(&mut self) -> bool {
        self.ended = self.ended.or_else(|| self.child.try_wait().expect("a child"));
        self.ended.is_some()
    }

    /// Waits until `condition` holds, looking every `pause`; it must come before the end of the program.
    pub fn wait_for(&mut self, what: &str, pause: Duration, mut condition: impl FnMut() -> bool) {
        while !condition() {
            assert!(!self.has_ended(), "ended before {what}\n{}", self.story());
            self.check_time(what);
            std::thread::sleep(pause);
        }
    }

    pub fn wait(mut self) -> Ended {
        while !self.has_ended() {
            self.check_time("its end");
            std::thread::sleep(Duration::from_millis(5));
        }
        use std::os::unix::process::ExitStatusExt;
        let status = self.ended.expect("ended");
        let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).expect("a code");
        Ended { what: self.what.clone(), code, out: read(&self.out), err: read(&self.err) }
    }

    fn check_time(&mut self, what: &str) {
        if self.started.elapsed() > TIME_LIMIT {
            let _ = self.child.kill();
            panic!("no sign of {what} within {TIME_LIMIT:?}\n{}", self.story());
        }
    }

    fn story(&self) -> String {
        format!("{}\n{}{}", self.what, read(&self.out), read(&self.err))
    }

    /// The process of a rank of this `launch`.
    pub fn rank(&mut self, rank: usize) -> Pid {
        let (launch, mut found) = (self.pid().to_string(), None);
        self.wait_for("the start of a rank", Duration::from_millis(2), || {
            found = processes().find(|pid| {
                let of = |file: &str| fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
                let stat = String::from_utf8_lossy(&of("stat")).into_owned();
                let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1));
                let variable = format!("RANK={rank}");
                parent == Some(launch.as_str())
                    && of("comm") == b"corral\n"
                    && of("environ").split(|byte| *byte == 0).any(|v| v == variable.as_bytes())
            });
            found.is_some()
        });
        Pid::from_raw(found.expect("found above"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.ended.is_none() {
            // SIGTERM first: a killed `launch` could not end its ranks.
            let _ = kill(self.pid(), Signal::SIGTERM);
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn processes() -> impl Iterator<Item = i32> {
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Waits until a process that is not our child is gone.
pub fn wait_until_gone(pid: Pid) {
    let started = Instant::now();
    while fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
        assert!(started.elapsed() < TIME_LIMIT, "process {pid} stays");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What a program left.
pub struct Ended {
    what: String,
    /// As a shell tells it: 128 + N where signal N ended it.
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ended {
    pub fn expect_code(self, code: i32) -> Ended {
        assert_eq!(self.code, code, "{self}");
        assert!(!self.err.contains("panicked") && !self.err.contains("internal error"), "{self}");
        assert!(!self.err.contains("stack backtrace") && !self.err.contains("frame #"), "{self}");
        self
    }

    /// Ended with `code` and exactly one line of error, which holds all of `parts`.
    pub fn expect_error(self, code: i32, parts: &[&str]) -> Ended {
        let ended = self.expect_code(code);
        let errors: Vec<_> = ended.err.lines().filter(|l| l.starts_with("error")).collect();
        assert_eq!(errors.len(), 1, "one line of error\n{ended}");
        for part in parts {
            assert!(errors[0].contains(part), "`{part}` is not in the error\n{ended}");
        }
        ended
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} ended with {}\n{}{}", self.what, self.code, self.out, self.err)
    }
}

fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
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
        let (dir, tokens) = (folder(name), data().join("tokens"));
        let tokens = tokens.display();
        let text = format!(
            "output_dir: {}
tokenizer: {{path: {tokens}/tokenizer}}
model:
  init: {{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2}}
data:
  train: [{tokens}/train]
  valid: [{tokens}/valid]
  sequence_length: 32
parallel: {{timeout_s: 100}}
optim: {{lr: 1.0e-2}}
schedule: {{kind: cosine, warmup_steps: 4}}
train: {{steps: 20, batch_size: 8}}
valid: {{every: 10, batches: 3}}
",
            dir.join("run").display()
        );
        fs::write(dir.join("config.yaml"), text).expect("writable");
        Run { dir, subcommand: "pretrain" }
    }

    /// 20 steps of fine-tuning of a new model on the questions and answers of [`data`].
    pub fn sft(name: &str) -> Run {
        let (dir, data) = (folder(name), data().display());
        let text = format!(
            "output_dir: {}
tokenizer: {{path: {data}/tokens/tokenizer, template: \"{{prompt}}\\n{{completion}}\"}}
model:
  init: {{hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2}}
data:
  train: [{data}/sft.train.jsonl]
  valid: [{data}/sft.valid.jsonl]
  sequence_length: 128
  cache: {data}/cache
parallel: {{timeout_s: 100}}
optim: {{lr: 1.0e-2}}
schedule: {{kind: cosine, warmup_steps: 4}}
train: {{steps: 20, batch_size: 8}}
valid: {{every: 10, batches: 3}}
",
            dir.join("run").display()
        );
        fs::write(dir.join("config.yaml"), text).expect("writable");
        Run { dir, subcommand: "sft" }
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
            Program::new(CORRAL)
        } else {
            Program::new(LAUNCH).args(&["--nproc", &ranks.to_string()]).args(options)
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

    /// The lines of `metrics.jsonl`; of a running program, those that are whole.
    pub fn metrics(&self) -> Vec<Value> {
        let text = read(&self.output().join("metrics.jsonl"));
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|e| panic!("{line}: {e}"));
        text[..whole].lines().map(parse).collect()
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
        corral::checkpoint::sharded::list(&self.output().join("checkpoints")).expect("readable")
    }

    /// The parameters of the exported model as one vector, in float64.
    pub fn parameters(&self) -> tch::Tensor {
        let path = self.output().join("model/model.safetensors");
        let mut tensors = tch::Tensor::read_safetensors(path).expect("an exported model");
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let flat: Vec<tch::Tensor> =
            tensors.iter().map(|(_, t)| t.to_kind(tch::Kind::Double).view([-1])).collect();
        tch::Tensor::cat(&flat, 0)
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

/// The largest relative difference of two series of equal length.
pub fn largest_relative(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs() / b.abs().max(1e-300)).fold(0.0, f64::max)
}
