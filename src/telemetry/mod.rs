//! What a run tells: console, metrics, TensorBoard, progress.

mod append;
pub mod console;
pub(crate) mod metrics;
pub(crate) mod progress;
mod screen;
mod shown;
pub mod tensorboard;
mod watch;

use std::fs::File;
use std::path::{Path, PathBuf};

pub(crate) use metrics::MetricsLine;

use crate::error::{Context, Result};
use crate::{info, warn};
use metrics::MetricsWriter;
use progress::Progress;
use tensorboard::EventWriter;
use watch::Watch;

const METRICS: &str = "metrics.jsonl";
/// Where generated samples go.
const SAMPLES: &str = "samples.jsonl";
/// Where every token of some samples goes.
const TRACE: &str = "trace.jsonl";

/// What a run that goes on from a checkpoint cuts off its log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogCut {
    /// All that is of later steps.
    pub after: u64,
    /// Of this step, too, what is not the training's: the validation is done anew.
    pub validation: bool,
}

impl LogCut {
    fn covers(self, of_training: bool, step: u64) -> bool {
        step > self.after || (self.validation && !of_training && step == self.after)
    }
}

/// The names of the files in a run's folder that its log has written.
pub fn log_files(dir: &Path) -> Result<Vec<String>> {
    let name = |path: PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut names: Vec<String> = tensorboard::event_files(dir)?.into_iter().map(name).collect();
    let there =
        [METRICS, SAMPLES, TRACE].into_iter().filter(|name| dir.join(name).symlink_metadata().is_ok());
    names.extend(there.map(str::to_string));
    Ok(names)
}

/// The log of a run in its folder: `metrics.jsonl`, the same scalars for TensorBoard, and progress on stderr. Only
/// rank 0 writes. Nothing that goes wrong after the start ends the run.
#[derive(Debug)]
pub struct RunLog(Option<Logs>);

#[derive(Debug)]
struct Logs {
    metrics: MetricsWriter,
    /// `samples.jsonl`, once there is one.
    samples: Option<MetricsWriter>,
    /// `trace.jsonl`, once there is one.
    trace: Option<MetricsWriter>,
    dir: PathBuf,
    events: EventWriter,
    progress: Progress,
    watch: Watch,
    /// The last validation, until it is told.
    validation: Option<MetricsLine>,
    /// The step of the last sample: one of each step is told.
    sampled: Option<u64>,
}

/// What a log knows of its run beforehand.
#[derive(Debug, Clone, Copy)]
pub struct LogPlan {
    /// Steps of the whole run.
    pub steps: u64,
    /// Steps between lines of metrics.
    pub every: u64,
    /// The norm at which gradients are clipped; 0: they are not.
    pub clip: f64,
}

impl RunLog {
    /// Opens the log in `dir`, which is made if it is missing. A run that goes on from a
    /// checkpoint says what is cut off first. Without a cut, all that is there is removed. What is cut or removed stays under
    /// the other names that a file has.
    ///
    /// # Errors
    /// The folder or its files cannot be made or rewritten.
    pub fn create(dir: &Path, rank: i64, cut: Option<LogCut>, plan: LogPlan) -> Result<Self> {
        if rank != 0 {
            return Ok(RunLog(None));
        }
        crate::files::create_dir(dir).with_context(|| format!("cannot make the folder {}", dir.display()))?;
        let metrics = MetricsWriter::open(&dir.join(METRICS), cut)?;
        tensorboard::truncate_after(dir, cut)?;
        let events = EventWriter::create(dir)?;
        let progress = Progress::start(cut.map_or(0, |cut| cut.after), plan.steps, plan.every);
        let further = |name: &str| -> Result<Option<MetricsWriter>> {
            let path = dir.join(name);
            if cut.is_none() {
                append::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
            }
            match crate::files::exists(&path)? {
                true => MetricsWriter::open(&path, cut).map(Some),
                false => Ok(None),
            }
        };
        let (samples, trace, dir) = (further(SAMPLES)?, further(TRACE)?, dir.to_path_buf());
        let watch = Watch::new(plan.clip);
        Ok(RunLog(Some(Logs {
            metrics,
            samples,
            trace,
            dir,
            events,
            progress,
            watch,
            validation: None,
            sampled: None,
        })))
    }

    /// The last step of the training that was there when the log was opened; none on a rank that does not write.
    pub fn last_step(&self) -> Option<u64> {
        self.0.as_ref().map(|logs| logs.metrics.last_step())
    }

    /// The open files, to be brought to the disk with a checkpoint.
    pub fn files(&self) -> Vec<File> {
        let Some(Logs { metrics, samples, trace, events, .. }) = &self.0 else { return Vec::new() };
        let further = [samples, trace].into_iter().flatten().filter_map(|writer| writer.file());
        [metrics.file(), events.file()].into_iter().flatten().chain(further).collect()
    }

    /// Writes a line of metrics with its time and, as `KIND/KEY`, its finite numbers; a record of kind `train` also moves the
    /// progress. Warns of what looks wrong.
    pub fn log(&mut self, record: &MetricsLine) {
        let Some(Logs { metrics, events, progress, watch, validation, .. }) = &mut self.0 else { return };
        metrics.append(&record.clone().text("time", &now()));
        let tagged = record.numbers().map(|(key, x)| (format!("{}/{key}", record.kind()), x));
        events.add_scalars(tagged, record.step());
        match record.kind() {
            "train" => progress.update(record),
            "valid" => *validation = Some(record.clone()),
            _ => {}
        }
        watch.note(record).iter().for_each(|warning| warn!("{warning}"));
    }

    /// Tells the validation that was logged last; `best`: it is the best so far.
    pub fn report_validation(&mut self, best: bool) {
        let Some(line) = self.0.as_mut().and_then(|logs| logs.validation.take()) else { return };
        let mark = if best { console::coloured(console::Colour::Green, " (best)") } else { String::new() };
        info!("valid step {}: {}{mark}", line.step(), shown::metrics(&line));
    }

    /// A line that stays above the bar of a terminal, and is left out where lines are counted.
    pub fn report_on_terminal(&self, text: impl FnOnce() -> String) {
        if self.0.as_ref().is_some_and(|logs| logs.progress.is_on_terminal()) {
            info!("{}", text());
        }
    }

    /// A generated sample: a line of `samples.jsonl`, and a text for TensorBoard under `tag`.
    pub fn log_sample(&mut self, record: &MetricsLine, tag: &str, text: &str) {
        let Some(logs) = &mut self.0 else { return };
        append(&mut logs.samples, &logs.dir, SAMPLES, record);
        if logs.sampled != Some(record.step()) && logs.progress.is_on_terminal() {
            info!("sample step {}: {}", record.step(), shown::sample(record));
        }
        logs.sampled = Some(record.step());
        logs.events.add_text(tag, text, record.step());
    }

    /// A token of a sample: a line of `trace.jsonl`.
    pub fn log_trace(&mut self, record: &MetricsLine) {
        let Some(logs) = &mut self.0 else { return };
        append(&mut logs.trace, &logs.dir, TRACE, record);
    }
}

/// The time of day, as RFC 3339 has it.
fn now() -> String {
    chrono::Local::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, false)
}

/// The day here, such as 2026-11-28.
pub fn today() -> String {
    chrono::Local::now().date_naive().to_string()
}

/// Adds a line to a file of the run, which is opened for the first one.
fn append(writer: &mut Option<MetricsWriter>, dir: &Path, name: &str, record: &MetricsLine) {
    if writer.is_none() {
        match MetricsWriter::open(&dir.join(name), None) {
            Ok(opened) => *writer = Some(opened),
            Err(e) => warn!("{e}; the run goes on without {name}"),
        }
    }
    writer.iter_mut().for_each(|writer| writer.append(record));
}

/// The end of the run, also a bad one: the progress ends, and what could not be written is told.
impl Drop for RunLog {
    fn drop(&mut self) {
        let Some(Logs { metrics, samples, trace, events, progress, .. }) = self.0.take() else { return };
        drop(progress);
        let samples = samples.map_or(0, |s| s.lost());
        let trace = trace.map_or(0, |t| t.lost());
        for (lost, what) in [
            (metrics.lost(), "lines of metrics.jsonl"),
            (samples, "lines of samples.jsonl"),
            (trace, "lines of trace.jsonl"),
            (events.lost(), "TensorBoard events"),
        ] {
            if lost > 0 {
                warn!("{lost} {what} could not be written");
            }
        }
    }
}

/// Memory that the machine can still give, in bytes; 0 where the system does not tell.
pub fn free_bytes() -> u64 {
    meminfo("MemAvailable:")
}

/// All memory of the machine, in bytes; 0 where the system does not tell.
pub fn total_bytes() -> u64 {
    meminfo("MemTotal:")
}

fn meminfo(name: &str) -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_suffix("kB"));
    line.and_then(|kib| kib.trim().parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Peak resident memory of this process, in bytes; 0 where the system does not tell.
pub fn peak_bytes() -> u64 {
    // VmHWM is of this program alone; getrusage's ru_maxrss starts with that of the process that started it.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let high =
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.strip_suffix("kB")?.trim().parse().ok());
    let kib = high.or_else(|| {
        let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF).ok()?;
        u64::try_from(usage.max_rss()).ok()
    });
    kib.unwrap_or(0) * 1024
}

/// Seconds since this process was started, to a hundredth.
pub fn since_process_start_s() -> f64 {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let number = |text: Option<&str>| text.and_then(|t| t.parse::<f64>().ok()).unwrap_or(f64::NAN);
    // Field 22, in ticks of 1/100 s after boot; the name before it may hold spaces, so count from its closing parenthesis.
    let stat = read("/proc/self/stat");
    let ticks = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(19));
    number(read("/proc/uptime").split_whitespace().next()) - number(ticks) / 100.0
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use testing::folder::TestFolder;

    use super::*;

    const PLAN: LogPlan = LogPlan { steps: 4, every: 1, clip: 0.0 };

    fn train(step: u64) -> MetricsLine {
        MetricsLine::new("train", step)
            .float32("loss", 1.0 / step as f32)
            .float("lr", f64::NAN)
            .count("tokens", 10 * step)
    }

    /// (step, tag, value) of all events in `dir`, in order.
    fn scalars(dir: &Path) -> Vec<(i64, String, f32)> {
        let mut all = vec![];
        for path in tensorboard::event_files(dir).unwrap() {
            let mut file = File::open(path).unwrap();
            while let Some((_, event)) = tensorboard::read_event(&mut file).unwrap() {
                let values = event.summary.iter().flat_map(|s| &s.values);
                all.extend(values.map(|v| (event.step, v.tag.clone(), v.simple_value.unwrap_or_default())));
            }
        }
        all.sort_by(|a, b| a.partial_cmp(b).unwrap());
        all
    }

    #[test]
    fn a_run_and_its_resumption() {
        let dir = TestFolder::new("telemetry");
        let run = dir.path("new/run");
        let mut log = RunLog::create(&run, 0, None, PLAN).unwrap();
        (1..=3).for_each(|step| log.log(&train(step)));
        log.log(&MetricsLine::new("valid", 3).float("loss", 0.5));
        drop(log);

        let mut log = RunLog::create(&run, 0, Some(LogCut { after: 2, validation: false }), PLAN).unwrap();
        log.log(&train(3));
        drop(log);
        let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), 3);
        for (step, mut line) in (1..).zip(lines) {
            let time = line.as_object_mut().unwrap().remove("time").unwrap();
            chrono::DateTime::parse_from_rfc3339(time.as_str().unwrap()).unwrap();
            assert_eq!(line, serde_json::from_str::<serde_json::Value>(&train(step).to_json()).unwrap());
        }
        let expected: Vec<_> = (1..=3)
            .flat_map(|step: u64| {
                let loss = (step as i64, "train/loss".to_string(), 1.0 / step as f32);
                [loss, (step as i64, "train/tokens".to_string(), 10.0 * step as f32)]
            })
            .collect();
        assert_eq!(scalars(&run), expected);

        RunLog::create(&run, 0, None, PLAN).unwrap();
        assert_eq!(std::fs::read(run.join("metrics.jsonl")).unwrap(), b"");
        assert_eq!(scalars(&run), []);
    }

    #[test]
    fn other_ranks_write_nothing() {
        let dir = TestFolder::new("telemetry");
        let run = dir.path("run");
        RunLog::create(&run, 1, None, PLAN).unwrap().log(&train(1));
        assert!(!run.exists());
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_told() {
        let dir = TestFolder::new("telemetry");
        std::fs::write(dir.path("file"), b"").unwrap();
        let e = RunLog::create(&dir.path("file/run"), 0, None, PLAN).unwrap_err();
        assert!(e.message.starts_with("cannot make the folder "), "{}", e.message);
    }

    #[test]
    fn peak_covers_what_was_touched() {
        let block = vec![1u8; 64 << 20];
        let sum: u64 = block.iter().map(|b| u64::from(*b)).sum();
        assert_eq!(sum, 64 << 20);
        assert!(peak_bytes() >= 64 << 20, "{}", peak_bytes());
        assert!(peak_bytes() < 1 << 40);
    }
}
