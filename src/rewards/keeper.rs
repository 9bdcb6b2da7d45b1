//! A program and all that it starts, which end with this process: also where this process is killed.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kernels::process::as_from_a_shell;

use crate::telemetry::console;

/// Waits for the end of its input, which is the end of the process that holds the other end, killed or not. Then what is
/// left of the program has a second to end by itself, and is killed. `$1`: the program's process group. `$2`: the variable in
/// the environment of all that the program started, by which those are found that left the group (`setsid`, daemons).
const KEEPER: &str = r#"
trap "" HUP INT QUIT TERM
read -r line
found() { grep -ls "$1=" /proc/[0-9]*/environ; }
n=0
while [ $n -lt 10 ] && [ -n "$(found "$2")" ]; do n=$((n+1)); sleep 0.1; done
kill -KILL "-$1"
n=0
while [ $n -lt 50 ]; do
  left=$(found "$2")
  [ -n "$left" ] || exit 0
  for file in $left; do file=${file#/proc/}; kill -KILL "${file%/environ}"; done
  n=$((n+1))
done
"#;

/// A program whose standard input and output are pipes, and the process that ends it.
pub struct KeptProcess {
    pub child: Child,
    keeper: Child,
    /// Its last lines on stderr, which are passed on as they come.
    errors: Arc<Mutex<VecDeque<String>>>,
}

/// Lines of stderr that are kept.
const ERRORS: usize = 10;

impl KeptProcess {
    /// Starts `sh -c run` in a process group of its own: a Ctrl-C is not for it.
    pub fn start(run: &str) -> io::Result<KeptProcess> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let (pid, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        // A name of its own: programs that start programs of this kind are found by each of theirs.
        let mark = format!("CORRAL_STARTED_BY_{pid}_{count}_{now}");
        let mut command = Command::new("sh");
        command.args(["-c", run]).env(&mark, "1");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = as_from_a_shell(&mut command).spawn()?;
        let mut command = Command::new("sh");
        command.args(["-c", KEEPER, "keeper", &child.id().to_string(), &mark]).current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        match as_from_a_shell(&mut command).spawn() {
            Ok(keeper) => {
                let errors = Arc::default();
                if let Some(stderr) = child.stderr.take() {
                    let errors = Arc::clone(&errors);
                    std::thread::spawn(move || pass_on(stderr, &errors));
                }
                Ok(KeptProcess { child, keeper, errors })
            }
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(e)
            }
        }
    }
}

impl KeptProcess {
    /// The last lines that it wrote to stderr.
    pub fn last_errors(&self) -> String {
        // What an ended program wrote last may still be on its way.
        std::thread::sleep(Duration::from_millis(50));
        let errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        errors.iter().map(|line| format!("  {line}")).collect::<Vec<_>>().join("\n")
    }
}

/// Writes a program's stderr to ours, and keeps its last lines.
fn pass_on(stderr: ChildStderr, errors: &Mutex<VecDeque<String>>) {
    let mut lines = BufReader::new(stderr);
    let mut line = Vec::new();
    while lines.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
        let text = String::from_utf8_lossy(&line).trim_end().to_string();
        console::write_error(&text);
        let mut errors = errors.lock().unwrap_or_else(PoisonError::into_inner);
        errors.push_back(text);
        if errors.len() > ERRORS {
            errors.pop_front();
        }
        line.clear();
    }
}

impl Drop for KeptProcess {
    fn drop(&mut self) {
        // The end of this pipe is what the keeper waits for.
        drop(self.keeper.stdin.take());
        let _ = self.keeper.wait();
        let _ = self.child.wait();
    }
}
