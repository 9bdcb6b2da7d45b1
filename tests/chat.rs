//! `corral chat` through a pipe, as users type, on the golden models.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::io::Write;
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use std::time::Duration;
use testing::folder::{copy_files, folder};
use testing::golden::golden_model;
use testing::program::{Program, corral, launch};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// A copy of a golden model that may be changed; without its chat template where `template` is false.
fn copy_of(family: &str, to: &Path, template: bool) {
    std::fs::create_dir_all(to).unwrap();
    copy_files(&golden_model(family), to, |file| !template && file == "chat_template.jinja");
}

fn command(model: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(corral());
    command.args(["--device", "cpu", "--threads", "1", "-v", "chat", "--model"]).arg(model).args(words);
    command.env_remove("WORLD_SIZE").env_remove("RANK");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Types lines and returns what comes: exit code, stdout, stderr.
fn chat(model: &Path, words: &[&str], lines: &[&str]) -> (i32, String, String) {
    let mut child = command(model, words).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // Who refuses to talk may be gone by now.
    let _ = stdin.write_all((lines.join("\n") + "\n").as_bytes());
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).expect("whole characters");
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

/// The completion that `generate` writes for messages.
fn answer(model: &Path, dir: &Path, messages: &[(&str, &str)], words: &[&str]) -> String {
    let messages: Vec<Value> =
        messages.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
    let input = dir.join("messages.jsonl");
    std::fs::write(&input, format!("{}\n", json!({"messages": messages}))).unwrap();
    let program = Program::corral(&["generate", "--model"]).arg(model).args(&["--input"]).arg(input);
    let out = program.args(words).run(dir, "generate").expect_code(0).out;
    let line: Value = serde_json::from_str(&out).unwrap();
    line["completion"].as_str().unwrap().trim_start().to_string()
}

/// An answer is what `generate` makes of all messages so far, although only what is new of them is read.
#[test]
fn answers_are_those_to_the_whole_conversation() {
    let dir = folder("conversation");
    for family in ["llama3", "mistral"] {
        let model = golden_model(family);
        let words = ["--temperature", "0", "--max-new-tokens", "12", "--dtype", "float64"];
        let (code, out, err) = chat(&model, &words, &["Hello there", "/reset", "", "And you?", "/exit", "x"]);
        assert_eq!(code, 0, "{err}");
        let first = answer(&model, &dir, &[("user", "Hello there")], &words);
        let other = answer(&model, &dir, &[("user", "And you?")], &words);
        assert_eq!(out, format!("{first}\n{other}\n"), "{family}: after /reset nothing is left");

        let (code, out, err) = chat(&model, &words, &["Hello there", "And you?"]);
        assert_eq!(code, 0, "{err}");
        let turns = [("user", "Hello there"), ("assistant", first.trim()), ("user", "And you?")];
        let second = answer(&model, &dir, &turns, &words);
        assert_eq!(out, format!("{first}\n{second}\n"), "{family}");
        // The second prompt begins as the first, which need not be read again.
        let known: Vec<usize> =
            err.lines().filter_map(|l| l.split_once(" known")?.0.rsplit(' ').next()?.parse().ok()).collect();
        assert!(known.len() == 2 && known[0] == 0 && known[1] >= 20, "{err}");
        let one = answer(&model, &dir, &[("user", "Hello there")], &words);
        let chatted = ["--prompt", "Hello there", "--chat"];
        let program = Program::corral(&["generate", "--model"]).arg(&model).args(&words).args(&chatted);
        assert_eq!(program.run(&dir, "chat").expect_code(0).out.trim_start(), format!("{one}\n"));
    }
}

#[test]
fn commands_change_what_follows() {
    let dir = folder("commands");
    let model = golden_model("llama3");
    let words = ["--temperature", "0", "--max-new-tokens", "8", "--system", "Be brief."];
    let lines = [
        "Hello",
        "/params",
        "/params top_k=x",
        "/params max_new_tokens=5 temperature=0",
        "/params size=3",
        "/system",
        "/reset",
        "Hello",
        "/help",
        "/nothing",
        "/params temperature=-1",
    ];
    let (code, out, err) = chat(&model, &words, &lines);
    assert_eq!(code, 0, "{err}");
    let with_system = answer(&model, &dir, &[("system", "Be brief."), ("user", "Hello")], &words[..4]);
    let without =
        answer(&model, &dir, &[("user", "Hello")], &["--temperature", "0", "--max-new-tokens", "5"]);
    assert_eq!(out, format!("{with_system}\n{without}\n"));
    for told in [
        "temperature=0 top_k=0 top_p=0.95 seed=0 max_new_tokens=8\n",
        "top_k: 'x' is not a valid number",
        "temperature=0 top_k=0 top_p=0.95 seed=0 max_new_tokens=5\n",
        "no parameter 'size'; there are temperature",
        "/reset   ",
        "no command '/nothing'; /help lists them",
        "temperature is -1",
        "(cut after 8 tokens",
    ] {
        assert!(err.contains(told), "{told}: {err}");
    }
}

#[test]
fn a_model_without_a_chat_template_needs_one() {
    let dir = folder("template");
    let bare = dir.join("bare");
    copy_of("tied", &bare, false);
    let (code, out, err) = chat(&bare, &[], &["Hello"]);
    assert_eq!((code, out.as_str()), (2, ""), "{err}");
    assert!(err.contains("no chat template") && err.contains("llama-2, llama-3, chatml"), "{err}");
    let generate = Program::corral(&["generate", "--prompt", "a", "--chat", "--model"]).arg(&bare);
    generate.run(&dir, "generate").expect_error(2, &["no chat template", "human-assistant"]);
    let words = ["--chat-template", "human-assistant", "--max-new-tokens", "4"];
    let (code, out, err) = chat(&bare, &words, &["Hello"]);
    assert!(code == 0 && out.ends_with('\n'), "{err}");
    let (code, _, err) = chat(&bare, &["--chat-template", "chatml"], &["Hello"]);
    assert!(code != 0 && err.contains("<|im_start|>"), "{err}");
    let launch =
        Program::new(launch()).args(&["--nproc", "2", "chat", "--device", "cpu", "--model"]).arg(&bare);
    let refused = launch.run(&dir, "launch").expect_code(2);
    assert!(refused.err.contains("chat --tensor 1 takes 1 ranks, and there are 2"), "{refused}");
}

/// Ranks that share every matrix answer as one does. Rank 0 reads what `launch` is given, and only it writes.
#[test]
fn ranks_answer_together() {
    let words = ["--temperature", "0", "--max-new-tokens", "12", "--dtype", "float64"];
    let lines = ["Hello there", "/params temperature=0.8", "And you?", "/nothing", "/reset", "Once more"];
    for family in ["llama3", "mistral"] {
        let model = golden_model(family);
        let (code, alone, err) = chat(&model, &words, &lines);
        assert_eq!(code, 0, "{err}");
        let mut command = Command::new(launch());
        command
            .args(["--nproc", "2", "chat", "--tensor", "2", "--device", "cpu", "--model"])
            .arg(&model)
            .args(words);
        command.env_remove("WORLD_SIZE").env_remove("RANK").env("OMP_NUM_THREADS", "1");
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all((lines.join("\n") + "\n").as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{told}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), alone, "{family}: {told}");
        assert_eq!(told.matches("no command '/nothing'").count(), 1, "{told}");
    }
}

/// The model has 128 positions.
#[test]
fn what_does_not_fit_is_given_up_and_told() {
    let model = golden_model("tied");
    let long = "one two three four five six seven eight nine ten";
    let lines = [long, long, long, &"word ".repeat(200), "Hello"];
    let (code, out, err) = chat(&model, &["--temperature", "0", "--max-new-tokens", "10"], &lines);
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("128 positions: its oldest"), "{err}");
    assert!(err.contains("warning: the message has") && err.contains("shorten it"), "{err}");
    assert_eq!(out.lines().count(), out.matches('\n').count());
    assert_eq!(err.matches(" answered in ").count(), 4, "{err}");
}

/// A chat that writes to pipes which the test reads.
struct Typed {
    child: Child,
    out: Reader<ChildStdout>,
    err: Reader<ChildStderr>,
}

struct Reader<R>(R, String);

impl<R: std::io::Read> Reader<R> {
    /// Reads until `text` has come; the program must not end before.
    fn until(&mut self, text: &str) {
        let mut bytes = [0; 4096];
        while !self.1.contains(text) {
            let n = self.0.read(&mut bytes).unwrap();
            assert!(n > 0, "ended before {text:?}: {}", self.1);
            self.1 += &String::from_utf8_lossy(&bytes[..n]);
        }
    }
}

impl Typed {
    fn start(model: &Path, words: &[&str]) -> Typed {
        let mut child = command(model, words).spawn().unwrap();
        let out = Reader(child.stdout.take().unwrap(), String::new());
        let err = Reader(child.stderr.take().unwrap(), String::new());
        Typed { child, out, err }
    }

    fn say(&mut self, line: &str) {
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    fn interrupt(&self) {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGINT).unwrap();
    }
}

impl Drop for Typed {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ctrl-C stops the answer, not the program; while nothing is answered it ends the program.
#[test]
fn an_interrupt_stops_the_answer() {
    let dir = folder("interrupt");
    let endless = dir.join("endless");
    copy_of("tied", &endless, true);
    // Its greedy answers go in circles: with more positions they do not end for many seconds.
    let config = std::fs::read_to_string(endless.join("config.json")).unwrap();
    let config = config.replace("\"max_position_embeddings\": 128", "\"max_position_embeddings\": 60000");
    std::fs::write(endless.join("config.json"), config).unwrap();
    let mut chat = Typed::start(&endless, &["--temperature", "0", "--max-new-tokens", "30000"]);
    for _ in 0..2 {
        chat.say("Hello there");
        let shown = chat.out.1.len();
        while chat.out.1.len() == shown {
            let mut bytes = [0; 64];
            let n = std::io::Read::read(&mut chat.out.0, &mut bytes).unwrap();
            assert!(n > 0, "it answers");
            chat.out.1 += &String::from_utf8_lossy(&bytes[..n]);
        }
        chat.interrupt();
        chat.err.until("(stopped)\n");
        chat.err.1.clear();
        chat.out.until("\n");
    }
    chat.say("/params");
    chat.err.until("max_new_tokens=30000");
    // It waits for a line now, or will in a moment.
    std::thread::sleep(Duration::from_millis(50));
    chat.interrupt();
    assert_eq!(chat.child.wait().unwrap().code(), Some(130));
}
