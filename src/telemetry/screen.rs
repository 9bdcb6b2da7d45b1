//! The one writer of stdout and stderr: a progress bar, lines and text that grows share a terminal without wiping each other.

use std::io::{self, IsTerminal, Write};

use crate::env;

/// Codes of every terminal in use: to the first column and clear; do not wrap, so that a bar stays one line.
const CLEAR: &str = "\r\x1b[2K";
const NO_WRAP: &str = "\x1b[?7l";
const WRAP: &str = "\x1b[?7h";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputStream {
    Out,
    Err,
}

pub struct Screen {
    out: Box<dyn Write + Send>,
    err: Box<dyn Write + Send>,
    out_is: StreamKind,
    err_is: StreamKind,
    /// The bar that is to be seen; empty: none.
    bar: String,
    /// The bar stands in the terminal's last line.
    drawn: bool,
    /// Text without its line's end stands there: no bar may be drawn over it.
    open: bool,
}

/// Where a stream leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StreamKind {
    Terminal,
    Pipe,
    Other,
}

impl StreamKind {
    fn of(terminal: bool, fd: &str) -> StreamKind {
        use std::os::unix::fs::FileTypeExt;
        let pipe = || std::fs::metadata(fd).is_ok_and(|m| m.file_type().is_fifo());
        match terminal {
            true => StreamKind::Terminal,
            false if pipe() => StreamKind::Pipe,
            false => StreamKind::Other,
        }
    }
}

impl Screen {
    /// Over the streams of this process.
    pub fn of_process() -> Screen {
        let (out, err) = (io::stdout(), io::stderr());
        let out_is = StreamKind::of(out.is_terminal(), "/proc/self/fd/1");
        let err_is = StreamKind::of(err.is_terminal(), "/proc/self/fd/2");
        Screen::over(Box::new(out), Box::new(err), out_is, err_is)
    }

    fn over(
        out: Box<dyn Write + Send>,
        err: Box<dyn Write + Send>,
        out_is: StreamKind,
        err_is: StreamKind,
    ) -> Screen {
        Screen { out, err, out_is, err_is, bar: String::new(), drawn: false, open: false }
    }

    /// Whether a bar can be drawn, under a command that writes answers to stdout or none.
    pub fn has_room_for_bar(&self, answers: bool) -> bool {
        let dumb = env::variable("TERM").is_some_and(|term| term == "dumb");
        self.err_is == StreamKind::Terminal && !dumb && !(answers && self.out_is == StreamKind::Pipe)
    }

    /// Whether messages have colours: where CLICOLOR asks for them and stderr is a terminal, or CLICOLOR_FORCE does
    /// (<https://bixense.com/clicolors>), and NO_COLOR (<https://no-color.org>) does not forbid them.
    pub fn has_colours(&self) -> bool {
        let set = |name: &str| env::text(name).is_some_and(|value| value != "0");
        let dumb = env::variable("TERM").is_some_and(|term| term == "dumb");
        let on_terminal = set("CLICOLOR") && self.err_is == StreamKind::Terminal && !dumb;
        env::variable("NO_COLOR").is_none() && (on_terminal || set("CLICOLOR_FORCE"))
    }

    /// Columns of the terminal: COLUMNS, else what the terminal says, else 80.
    pub fn columns(&self) -> usize {
        let columns = env::parsed("COLUMNS").or_else(|| kernels::host::terminal_columns().map(usize::from));
        columns.filter(|columns| *columns > 0).unwrap_or(80)
    }

    /// Writes `text`, whose last line may go on with the next text for the same stream. A bar moves below it.
    pub fn write(&mut self, to: OutputStream, text: &[u8]) -> io::Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        self.hide();
        let is = if to == OutputStream::Out { self.out_is } else { self.err_is };
        if to == OutputStream::Err
            && is == StreamKind::Terminal
            && self.open
            && self.out_is == StreamKind::Terminal
        {
            // A message never ends an answer's line.
            let _ = self.err.write_all(b"\n");
            self.open = false;
        }
        let stream = if to == OutputStream::Out { &mut self.out } else { &mut self.err };
        let written = stream.write_all(text).and_then(|()| stream.flush());
        if is == StreamKind::Terminal {
            self.open = !text.ends_with(b"\n");
        }
        self.show();
        written
    }

    /// Draws the bar; an empty one takes it away.
    pub fn draw(&mut self, bar: &str) {
        if bar.is_empty() {
            self.hide();
        }
        self.bar = bar.into();
        self.show();
    }

    fn hide(&mut self) {
        if std::mem::take(&mut self.drawn) {
            let _ = self.err.write_all(CLEAR.as_bytes()).and_then(|()| self.err.flush());
        }
    }

    fn show(&mut self) {
        if !self.bar.is_empty() && !self.open {
            let drawn = format!("{CLEAR}{NO_WRAP}{}{WRAP}", self.bar);
            let _ = self.err.write_all(drawn.as_bytes()).and_then(|()| self.err.flush());
            self.drawn = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// What both streams write, in order, and the lines that a terminal shows of it.
    #[derive(Clone, Default)]
    struct Terminal(Arc<Mutex<Vec<u8>>>);

    impl Write for Terminal {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Terminal {
        fn lines(&self) -> Vec<String> {
            let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
            let text = text.replace(NO_WRAP, "").replace(WRAP, "");
            let mut lines = vec![String::new()];
            let mut rest = text.as_str();
            while let Some(c) = rest.chars().next() {
                let last = lines.len() - 1;
                rest = match (rest.strip_prefix(CLEAR), c) {
                    (Some(rest), _) => {
                        lines[last].clear();
                        rest
                    }
                    (None, '\n') => {
                        lines.push(String::new());
                        &rest[1..]
                    }
                    (None, c) => {
                        lines[last].push(c);
                        &rest[c.len_utf8()..]
                    }
                };
            }
            lines
        }
    }

    fn screen(out_is: StreamKind) -> (Screen, Terminal, Terminal) {
        let (terminal, out) = (Terminal::default(), Terminal::default());
        let stdout = if out_is == StreamKind::Terminal { terminal.clone() } else { out.clone() };
        (
            Screen::over(Box::new(stdout), Box::new(terminal.clone()), out_is, StreamKind::Terminal),
            terminal,
            out,
        )
    }

    #[test]
    fn a_bar_wipes_nothing() {
        let (mut screen, terminal, _) = screen(StreamKind::Terminal);
        screen.draw("10%");
        screen.write(OutputStream::Out, b"first\n").unwrap();
        assert_eq!(terminal.lines(), ["first", "10%"]);
        // An answer that grows: the bar waits for the end of its line, a message makes a line of its own.
        screen.write(OutputStream::Out, b"an an").unwrap();
        screen.draw("20%");
        screen.write(OutputStream::Out, b"swer").unwrap();
        assert_eq!(terminal.lines(), ["first", "an answer"]);
        screen.write(OutputStream::Err, b"warning: w\n").unwrap();
        screen.write(OutputStream::Out, b" goes on\n").unwrap();
        assert_eq!(terminal.lines(), ["first", "an answer", "warning: w", " goes on", "20%"]);
        screen.draw("");
        assert_eq!(terminal.lines(), ["first", "an answer", "warning: w", " goes on", ""]);
        // Without a bar nothing is cleared: what somebody else wrote stays.
        let before = terminal.0.lock().unwrap().len();
        screen.draw("");
        screen.write(OutputStream::Err, b"x\n").unwrap();
        assert_eq!(&terminal.0.lock().unwrap()[before..], b"x\n");
    }

    #[test]
    fn answers_that_go_elsewhere_keep_the_bar() {
        let (mut screen, terminal, out) = screen(StreamKind::Other);
        assert!(screen.has_room_for_bar(true));
        screen.draw("10%");
        screen.write(OutputStream::Out, b"no end").unwrap();
        screen.write(OutputStream::Err, b"note\n").unwrap();
        assert_eq!(terminal.lines(), ["note", "10%"]);
        assert_eq!(out.lines(), ["no end"]);
        let (screen, ..) = self::screen(StreamKind::Pipe);
        assert!(screen.has_room_for_bar(false) && !screen.has_room_for_bar(true));
    }
}
