//! A timeline of some steps, which browsers show: `profile.steps`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use kernels::c10d::Group;
use kernels::trace::{self, Lane, TraceSpan};
use serde_json::{Value, json};

use crate::distributed::agree::agree;
use crate::error::{Error, Result};
use crate::files::{create_dir, read_error, write_file};
use crate::info;

/// The folder of a run's timeline.
const FOLDER: &str = "profile";
const FILE: &str = "trace.json";

/// Records the steps of a run that its configuration asks for.
pub struct Profile {
    /// Steps to be recorded, after the first, which prepares what the others use.
    steps: i64,
    /// Of this process.
    done: i64,
    dir: PathBuf,
    ranks: Group,
}

impl Profile {
    /// Of `steps` steps (0: none) of a run in this folder, on these ranks.
    pub fn new(steps: i64, run_dir: &Path, ranks: &Group) -> Profile {
        Profile { steps, done: 0, dir: run_dir.join(FOLDER), ranks: ranks.clone() }
    }

    /// Notes that a step is done, which is the run's `last` or not. The timeline is written after the last step that is recorded.
    /// Collective then.
    pub fn stepped(&mut self, last: bool) -> Result<()> {
        if self.done > self.steps || self.steps == 0 {
            return Ok(());
        }
        self.done += 1;
        match self.done {
            n if n > self.steps || last => {
                self.steps = 0;
                self.write(n - 1)
            }
            1 => {
                trace::start();
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn write(&self, recorded: i64) -> Result<()> {
        let events = events(trace::stop(), self.ranks.rank());
        let part = |rank: i64| self.dir.join(format!("rank-{rank:05}.json"));
        let mine = || {
            create_dir(&self.dir)?;
            write_file(&part(self.ranks.rank()), json!(events).to_string().as_bytes())
        };
        agree(&self.ranks, mine())?;
        let joined = || {
            let mut all = Vec::new();
            for rank in 0..self.ranks.size() {
                let path = part(rank);
                let text = fs::read_to_string(&path).map_err(|e| read_error(&path, &e))?;
                let events: Vec<Value> = serde_json::from_str(&text)
                    .map_err(|e| Error::failed(format!("{}: {e}", path.display())))?;
                all.extend(events);
                fs::remove_file(&path).map_err(|e| read_error(&path, &e))?;
            }
            let path = self.dir.join(FILE);
            write_file(&path, json!({"traceEvents": all}).to_string().as_bytes())?;
            info!(
                "a timeline of {recorded} steps is in {}: open it in chrome://tracing or ui.perfetto.dev",
                path.display()
            );
            Ok(())
        };
        agree(&self.ranks, if self.ranks.rank() == 0 { joined() } else { Ok(()) })
    }
}

/// Chrome's events: a process for each rank, a thread for each lane; microseconds.
fn events(spans: Vec<TraceSpan>, rank: i64) -> Vec<Value> {
    let mut lanes: BTreeMap<Lane, usize> = [(Lane::Computing, 0), (Lane::Waiting, 1)].into();
    let mut groups: Vec<Lane> = spans.iter().map(|span| span.lane.clone()).collect();
    groups.sort();
    for lane in groups {
        let next = lanes.len();
        lanes.entry(lane).or_insert(next);
    }
    let named = |what: &str, thread: usize, name: String| json!({"ph": "M", "name": what, "pid": rank, "tid": thread, "args": {"name": name}});
    let mut events = vec![named("process_name", 0, format!("rank {rank}"))];
    events.extend(lanes.iter().map(|(lane, thread)| {
        let name = match lane {
            Lane::Computing => "computes".into(),
            Lane::Waiting => "waits".into(),
            Lane::Group(name) => format!("sends: {name}"),
        };
        named("thread_name", *thread, name)
    }));
    events.extend(spans.into_iter().map(|span| {
        let mut event = json!({
            "ph": "X", "name": span.name, "pid": rank, "tid": lanes[&span.lane],
            "ts": span.start.as_micros() as u64, "dur": span.took.as_secs_f64() * 1e6,
        });
        if let Some(bytes) = span.bytes {
            event["args"] = json!({"bytes": bytes});
        }
        event
    }));
    events
}
