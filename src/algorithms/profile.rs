//! A timeline of some steps, which browsers show: `profile.steps`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kernels::comm::Group;
use kernels::trace::{self, Lane, TraceSpan};
use serde_json::{Value, json};

use crate::distributed::agree::agree;
use crate::error::Result;
use crate::files::{create_dir, read_error, write_file};
use crate::{info, warn};

/// The folder of a run's timeline.
const FOLDER: &str = "profile";
const FILE: &str = "trace.json";

/// Records the steps of a run that its configuration asks for.
pub struct Profile {
    /// Steps to be recorded, after the first, which prepares what the others use.
    steps: i64,
    state: State,
    dir: PathBuf,
    ranks: Group,
}

enum State {
    /// No step is done.
    Begins,
    /// So many steps are recorded.
    Records(i64),
    /// There is nothing more to do.
    Over,
}

impl Profile {
    /// Of `steps` steps (0: none) of a run in this folder, on these ranks.
    pub fn new(steps: i64, run_dir: &Path, ranks: &Group) -> Profile {
        let state = if steps > 0 { State::Begins } else { State::Over };
        Profile { steps, state, dir: run_dir.join(FOLDER), ranks: ranks.clone() }
    }

    /// Notes that a step is done. Returns whether the timeline was written, which takes time. Collective then.
    pub fn stepped(&mut self) -> Result<bool> {
        match self.state {
            State::Begins => {
                self.state = State::Records(0);
                trace::start();
            }
            State::Records(steps) => {
                self.state = State::Records(steps + 1);
                if steps + 1 == self.steps {
                    self.end()?;
                    return Ok(true);
                }
            }
            State::Over => {}
        }
        Ok(false)
    }

    /// Writes what is recorded so far, if that was not done: the run ends. A timeline that cannot be written is a warning. Collective.
    pub fn end(&mut self) -> Result<()> {
        let State::Records(steps) = std::mem::replace(&mut self.state, State::Over) else { return Ok(()) };
        let spans = trace::stop();
        let written = agree(&self.ranks, self.write_part(spans));
        let joined = match (written, self.ranks.rank()) {
            (Ok(()), 0) => self.join().map(Some),
            (written, _) => written.map(|()| None),
        };
        match agree(&self.ranks, joined) {
            Ok(Some(path)) => info!(
                "a timeline of {steps} steps is in {}: open it in chrome://tracing or ui.perfetto.dev",
                path.display()
            ),
            Ok(None) => {}
            Err(e) if self.ranks.rank() == 0 => warn!("the timeline could not be written: {e}"),
            Err(_) => {}
        }
        Ok(())
    }

    fn part(&self, rank: i64) -> PathBuf {
        self.dir.join(format!("rank-{rank:05}.json"))
    }

    /// This rank's events, one a line.
    fn write_part(&self, spans: Vec<TraceSpan>) -> Result<()> {
        create_dir(&self.dir)?;
        let events = events(spans, self.ranks.rank());
        let lines: Vec<String> = events.iter().map(Value::to_string).collect();
        write_file(&self.part(self.ranks.rank()), lines.join(",\n").as_bytes())
    }

    /// All ranks' events in one file.
    fn join(&self) -> Result<PathBuf> {
        let mut all = String::from("{\"traceEvents\": [\n");
        for rank in 0..self.ranks.size() {
            let path = self.part(rank);
            all += &fs::read_to_string(&path).map_err(|e| read_error(&path, &e))?;
            all += if rank + 1 < self.ranks.size() { ",\n" } else { "\n]}\n" };
            fs::remove_file(&path).map_err(|e| read_error(&path, &e))?;
        }
        let path = self.dir.join(FILE);
        write_file(&path, all.as_bytes())?;
        Ok(path)
    }
}

/// Chrome's events: a process for each rank, a thread for each lane, and more of them for spans of a group that overlap;
/// microseconds.
fn events(mut spans: Vec<TraceSpan>, rank: i64) -> Vec<Value> {
    spans.sort_by_key(|span| span.start);
    // Of each lane when its threads are free.
    let mut free: BTreeMap<Lane, Vec<Duration>> = BTreeMap::new();
    let places: Vec<usize> = spans
        .iter()
        .map(|span| {
            let threads = free.entry(span.lane.clone()).or_default();
            // What is computed and waited for is nested.
            let nested = !matches!(span.lane, Lane::Group(_));
            let place = threads.iter().position(|end| nested || *end <= span.start).unwrap_or(threads.len());
            threads.resize(threads.len().max(place + 1), Duration::ZERO);
            threads[place] = span.start + span.took;
            place
        })
        .collect();
    let mut first = 0;
    let mut threads: BTreeMap<Lane, usize> = BTreeMap::new();
    let mut events = vec![meta("process_name", rank, 0, &format!("rank {rank}"))];
    for (lane, ends) in free {
        for place in 0..ends.len() {
            let name = match &lane {
                Lane::Computing => "computes".to_string(),
                Lane::Waiting => "waits".to_string(),
                Lane::Group(name) if place == 0 => format!("sends: {name}"),
                Lane::Group(name) => format!("sends: {name} ({})", place + 1),
            };
            events.push(meta("thread_name", rank, first + place, &name));
        }
        threads.insert(lane, first);
        first += ends.len();
    }
    events.extend(spans.into_iter().zip(places).map(|(span, place)| {
        let mut event = json!({
            "ph": "X", "name": span.name, "pid": rank, "tid": threads[&span.lane] + place,
            "ts": span.start.as_micros() as u64, "dur": span.took.as_secs_f64() * 1e6,
        });
        if let Some(bytes) = span.bytes {
            event["args"] = json!({"bytes": bytes});
        }
        event
    }));
    events
}

/// What a process or thread is called.
fn meta(what: &str, rank: i64, thread: usize, name: &str) -> Value {
    json!({"ph": "M", "name": what, "pid": rank, "tid": thread, "args": {"name": name}})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_that_overlap_have_threads_of_their_own() {
        let span = |lane: Lane, start: u64, took: u64| TraceSpan {
            name: "a".into(),
            lane,
            start: Duration::from_millis(start),
            took: Duration::from_millis(took),
            bytes: None,
        };
        let group = || Lane::Group("data/0".into());
        let spans = vec![
            span(group(), 5, 10),
            span(group(), 0, 10),
            span(group(), 12, 2),
            span(Lane::Computing, 0, 9),
            span(Lane::Computing, 1, 2),
        ];
        let events = events(spans, 3);
        let threads: Vec<u64> =
            events.iter().filter(|e| e["ph"] == "X").map(|e| e["tid"].as_u64().unwrap()).collect();
        assert_eq!(threads, [1, 0, 0, 2, 1]);
        let names: Vec<&str> = events[1..4].iter().map(|e| e["args"]["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["computes", "sends: data/0", "sends: data/0 (2)"]);
        assert!(events.iter().all(|e| e["pid"] == 3));
    }
}
