//! The way of a rank's output: from its pipes to the log files as it came, and to the screen line by line.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Lines of standard error kept for the report of a failure, and the most bytes kept of one.
const TAIL_LINES: usize = 20;
const TAIL_LINE_BYTES: usize = 2000;
/// A line without an end is shown in pieces of this size, so that it does not fill the memory.
const MAX_LINE_BYTES: usize = 1 << 20;

/// Escape codes of every terminal in use: to the first column and clear; do not wrap, so that a bar stays one line.
const CLEAR: &[u8] = b"\r\x1b[2K";
const NO_WRAP: &[u8] = b"\x1b[?7l";
const WRAP: &[u8] = b"\x1b[?7h";

#[derive(Clone, Copy, PartialEq)]
pub enum Stream {
    Out,
    Err,
}

/// Standard output and error of `launch`, whole lines at a time. Where they cannot be written (a closed pipe), the
/// ranks are worth more than their output: nothing is said and nothing stops.
pub struct Screen {
    state: Mutex<State>,
    /// Is there a terminal to draw a bar on?
    pub live: bool,
}

struct State {
    out: Box<dyn Write + Send>,
    err: Box<dyn Write + Send>,
    /// Rank 0's progress bar; empty while none is drawn.
    bar: Vec<u8>,
}

impl Screen {
    pub fn new() -> Self {
        Self::over(Box::new(io::stdout()), Box::new(io::stderr()), io::stderr().is_terminal())
    }

    fn over(out: Box<dyn Write + Send>, err: Box<dyn Write + Send>, live: bool) -> Self {
        Self { state: Mutex::new(State { out, err, bar: Vec::new() }), live }
    }

    /// A message of `launch` itself.
    pub fn say(&self, message: &str) {
        self.lines(Stream::Err, format!("launch: {message}\n").as_bytes());
    }

    /// `lines` ends in a line feed. A bar moves below them.
    fn lines(&self, stream: Stream, lines: &[u8]) {
        let State { out, err, bar } = &mut *lock(&self.state);
        if !bar.is_empty() {
            write_quietly(err, CLEAR);
        }
        write_quietly(if stream == Stream::Out { out } else { err }, lines);
        if !bar.is_empty() {
            write_quietly(err, &[NO_WRAP, bar, WRAP].concat());
        }
    }

    /// Draws the bar; an empty one takes it away.
    fn draw(&self, new: &[u8]) {
        let State { err, bar, .. } = &mut *lock(&self.state);
        if !(bar.is_empty() && new.is_empty()) {
            *bar = new.to_vec();
            write_quietly(err, &[CLEAR, NO_WRAP, new, WRAP].concat());
        }
    }

    /// Leaves the bar on the screen as a line.
    fn settle(&self) {
        let State { err, bar, .. } = &mut *lock(&self.state);
        if !bar.is_empty() {
            bar.clear();
            write_quietly(err, b"\n");
        }
    }
}

fn write_quietly(to: &mut dyn Write, bytes: &[u8]) {
    let _ = to.write_all(bytes).and_then(|()| to.flush());
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What to do with the output of one rank.
pub struct Route {
    pub shown: bool,
    /// `[3] `, or nothing in a world of one.
    pub prefix: String,
    /// May the rank draw a progress bar?
    pub bar: bool,
    /// Folder of stdout.log and stderr.log.
    pub log_dir: Option<PathBuf>,
}

/// The two threads that read one rank's output.
pub struct Capture {
    tail: Arc<Mutex<VecDeque<String>>>,
    /// Disconnected once both have seen the end.
    ended: Receiver<()>,
    /// How many of them hold bytes that are not yet written.
    writing: Arc<AtomicU32>,
}

impl Capture {
    pub fn start(
        out: impl Read + Send + 'static,
        err: impl Read + Send + 'static,
        route: Route,
        screen: &Arc<Screen>,
    ) -> io::Result<Self> {
        let (alive, ended) = mpsc::channel();
        let (tail, writing) = (Arc::default(), Arc::default());
        let reader = |stream| -> io::Result<Reader> {
            let name = if stream == Stream::Out { "stdout.log" } else { "stderr.log" };
            let log = route.log_dir.as_ref().map(|dir| Log::open(&dir.join(name))).transpose()?;
            Ok(Reader {
                stream,
                shown: route.shown,
                prefix: route.prefix.clone().into_bytes(),
                bar: route.bar && stream == Stream::Err,
                log,
                tail: (stream == Stream::Err).then(|| Arc::clone(&tail)),
                screen: Arc::clone(screen),
                writing: Arc::clone(&writing),
                line: Vec::new(),
                after_return: false,
                _alive: alive.clone(),
            })
        };
        let (out_reader, err_reader) = (reader(Stream::Out)?, reader(Stream::Err)?);
        std::thread::Builder::new().spawn(move || out_reader.run(out))?;
        std::thread::Builder::new().spawn(move || err_reader.run(err))?;
        Ok(Self { tail, ended, writing })
    }

    /// Waits for the end of a dead rank's output: as long as what it wrote is still being shown, but only for
    /// `patience` where a process that left its group keeps the pipe open, and not beyond what `give_up` allows.
    pub fn finish(&self, patience: Duration, give_up: impl Fn() -> bool) {
        while self.ended.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
            if self.writing.load(Ordering::Relaxed) == 0 || give_up() {
                return;
            }
        }
    }

    /// The last lines of standard error.
    pub fn last_lines(&self) -> Vec<String> {
        lock(&self.tail).iter().cloned().collect()
    }
}

struct Reader {
    stream: Stream,
    shown: bool,
    prefix: Vec<u8>,
    bar: bool,
    log: Option<Log>,
    tail: Option<Arc<Mutex<VecDeque<String>>>>,
    screen: Arc<Screen>,
    writing: Arc<AtomicU32>,
    /// The line that has no end yet.
    line: Vec<u8>,
    /// The last byte was a carriage return: a line feed right after it belongs to it.
    after_return: bool,
    _alive: mpsc::Sender<()>,
}

impl Reader {
    fn run(mut self, mut pipe: impl Read) {
        let mut buffer = vec![0; 1 << 16];
        loop {
            match pipe.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => break,
                Ok(size) => {
                    self.writing.fetch_add(1, Ordering::Relaxed);
                    self.log(&buffer[..size]);
                    self.take(&buffer[..size]);
                    self.writing.fetch_sub(1, Ordering::Relaxed);
                }
            }
        }
        if !self.line.is_empty() {
            self.take(b"\n");
        }
        if self.bar {
            self.screen.settle();
        }
    }

    fn log(&mut self, bytes: &[u8]) {
        if let Some(Err(message)) = self.log.as_mut().map(|log| log.write(bytes)) {
            self.log = None;
            self.screen.say(&message);
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        // Lines of one read go out in one write; of several bars only the last one is ever seen.
        let (mut lines, mut bar) = (Vec::new(), None);
        for piece in bytes.split_inclusive(|byte| matches!(byte, b'\n' | b'\r')) {
            let (text, end) = match piece {
                [text @ .., end @ (b'\n' | b'\r')] => (text, Some(*end)),
                text => (text, None),
            };
            self.line.extend_from_slice(text);
            let closes_return = end == Some(b'\n') && self.after_return && self.line.is_empty();
            self.after_return = end == Some(b'\r');
            match end {
                Some(b'\r') if self.bar => bar = Some(self.take_bar()),
                Some(b'\n') if closes_return && self.bar => {
                    bar.take().into_iter().for_each(|bar| self.screen.draw(&bar));
                    self.screen.settle();
                }
                Some(b'\n') if closes_return => {}
                Some(b'\r') if self.line.is_empty() => {}
                Some(_) => self.end_line(&mut lines),
                None if self.line.len() >= MAX_LINE_BYTES => self.end_line(&mut lines),
                None => {}
            }
        }
        if !lines.is_empty() {
            self.screen.lines(self.stream, &lines);
        }
        if let Some(bar) = bar {
            self.screen.draw(&bar);
        }
    }

    /// Takes the line out as a bar to draw; a blank one is no bar.
    fn take_bar(&mut self) -> Vec<u8> {
        let line = std::mem::take(&mut self.line);
        if line.iter().all(u8::is_ascii_whitespace) { Vec::new() } else { [&self.prefix[..], &line].concat() }
    }

    fn end_line(&mut self, lines: &mut Vec<u8>) {
        if let Some(tail) = &self.tail {
            let mut tail = lock(tail);
            if tail.len() == TAIL_LINES {
                tail.pop_front();
            }
            let kept = &self.line[..self.line.len().min(TAIL_LINE_BYTES)];
            tail.push_back(String::from_utf8_lossy(kept).into_owned());
        }
        if self.shown {
            lines.extend_from_slice(&self.prefix);
            lines.extend_from_slice(&self.line);
            lines.push(b'\n');
        }
        self.line.clear();
    }
}

/// A log file, added to where an earlier run left one.
struct Log {
    path: PathBuf,
    file: File,
}

impl Log {
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().create(true).append(true).open(path);
        let file =
            file.map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        Ok(Self { path: path.into(), file })
    }

    /// A full disk ends the log, not the run: the pipe must be read on, or the rank would stand still.
    fn write(&mut self, bytes: &[u8]) -> Result<(), String> {
        let path = self.path.display();
        self.file
            .write_all(bytes)
            .map_err(|error| format!("{path}: {error}; this log ends here, the run goes on"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pipe or a screen to write into and to look at.
    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            lock(&self.0).extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Buffer {
        fn text(&self) -> String {
            String::from_utf8(lock(&self.0).clone()).expect("text")
        }
    }

    /// Gives a rank's stdout and stderr in chunks of each size; returns what was shown of both, and the tail.
    fn show(out: &str, err: &str, route: impl Fn() -> Route, chunk: usize) -> (String, String, Vec<String>) {
        struct Chunks(Vec<u8>, usize);
        impl Read for Chunks {
            fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
                let size = self.1.min(self.0.len());
                into[..size].copy_from_slice(&self.0[..size]);
                self.0.drain(..size);
                Ok(size)
            }
        }
        let (shown_out, shown_err) = (Buffer::default(), Buffer::default());
        let screen = Screen::over(Box::new(shown_out.clone()), Box::new(shown_err.clone()), true);
        let pipe = |text: &str| Chunks(text.into(), chunk);
        let capture = Capture::start(pipe(out), pipe(err), route(), &Arc::new(screen)).expect("threads");
        capture.finish(Duration::from_secs(20), || false);
        (shown_out.text(), shown_err.text(), capture.last_lines())
    }

    #[test]
    fn lines_are_prefixed_whatever_the_chunks() {
        let route = || Route { shown: true, prefix: "[3] ".into(), bar: false, log_dir: None };
        for chunk in [1, 2, 3, 1000] {
            let (out, err, tail) = show("a\n\nb\r\nc\rd", "x\n10%\r20%\r", route, chunk);
            assert_eq!(out, "[3] a\n[3] \n[3] b\n[3] c\n[3] d\n", "chunks of {chunk}");
            assert_eq!(err, "[3] x\n[3] 10%\n[3] 20%\n", "chunks of {chunk}");
            assert_eq!(tail, ["x", "10%", "20%"]);
        }
    }

    #[test]
    fn a_bar_stays_below_the_lines_and_is_left_at_the_end() {
        let route = || Route { shown: true, prefix: "[0] ".into(), bar: true, log_dir: None };
        let draw = |bar: &str| format!("\r\x1b[2K\x1b[?7l{bar}\x1b[?7h");
        let (_, err, tail) = show("", "10%\rnote\n20%\r", route, 1);
        let expected =
            format!("{}\r\x1b[2K[0] note\n\x1b[?7l[0] 10%\x1b[?7h{}\n", draw("[0] 10%"), draw("[0] 20%"));
        assert_eq!(err, expected);
        assert_eq!(tail, ["note"]);
        // A blank bar takes it away: nothing is left to settle.
        let (_, err, _) = show("", "10%\r   \rdone\n", route, 1);
        assert_eq!(err, format!("{}{}[0] done\n", draw("[0] 10%"), draw("")));
    }

    #[test]
    fn the_tail_is_kept_of_what_is_not_shown_and_bounded() {
        let route = || Route { shown: false, prefix: String::new(), bar: false, log_dir: None };
        let err = (0..50).map(|line| format!("line {line}\n")).collect::<String>() + &"y".repeat(3 << 20);
        let (_, shown, tail) = show("", &err, route, 1 << 16);
        assert_eq!(shown, "");
        assert_eq!(tail.len(), TAIL_LINES);
        assert!(tail.iter().all(|line| line.len() <= TAIL_LINE_BYTES));
        assert!(tail[0].starts_with("line "), "{}", tail[0]);
    }
}
