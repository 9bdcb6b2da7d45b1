//! A program and all that it starts, which end with this process: also where this process is killed.

use std::io;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use kernels::process::as_from_a_shell;

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
}

impl KeptProcess {
    /// Starts `sh -c run` in a process group of its own: a Ctrl-C is not for it.
    pub fn start(run: &str) -> io::Result<KeptProcess> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let (pid, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        // A name of its own: programs that start programs of this kind are found by each of theirs.
        let mark = format!("CORRAL_STARTED_BY_{pid}_{count}_{now}");
        let mut command = Command::new("sh");
        command.args(["-c", run]).env(&mark, "1").stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = as_from_a_shell(&mut command).spawn()?;
        let mut command = Command::new("sh");
        command.args(["-c", KEEPER, "keeper", &child.id().to_string(), &mark]).current_dir("/");
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        match as_from_a_shell(&mut command).spawn() {
            Ok(keeper) => Ok(KeptProcess { child, keeper }),
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(e)
            }
        }
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
