//! `corral report` and `corral runs`: pictures and a table of runs.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::files;
use crate::report::page::page;
use crate::report::run::RunRecord;
use crate::report::summary::row;
use crate::telemetry::console;
use crate::{info, warn};

/// `corral report`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Run folders, whose curves are overlaid
    #[arg(value_name = "RUN", required = true)]
    runs: Vec<PathBuf>,
    /// The page [default: report.html in the first run's folder]
    #[arg(long, value_name = "FILE.html")]
    output: Option<PathBuf>,
    /// Serve the page at http://127.0.0.1:PORT, with the current state of the runs
    #[arg(long, conflicts_with = "output")]
    serve: bool,
    /// With --serve: the port; 0: any free one
    #[arg(long, value_name = "PORT", default_value_t = 0, requires = "serve")]
    port: u16,
}

/// `corral runs`
#[derive(Debug, clap::Args)]
pub struct RunsArgs {
    /// The folder to search for runs
    #[arg(value_name = "DIR", default_value = "runs")]
    dir: PathBuf,
    /// One JSON object a run
    #[arg(long)]
    json: bool,
}

/// Writes or serves the page of some runs.
pub fn report(args: &Args) -> Result<()> {
    let read = || args.runs.iter().map(|dir| RunRecord::read(dir)).collect::<Result<Vec<RunRecord>>>();
    let runs = read()?;
    if args.serve {
        return serve(args.port, || page(&read()?, None, true));
    }
    let output = args.output.clone().unwrap_or_else(|| args.runs[0].join(REPORT));
    files::write_file(&output, page(&runs, None, false)?.as_bytes())?;
    info!("{} is written; open it in a browser", output.display());
    Ok(())
}

/// The page in a run's folder.
pub const REPORT: &str = "report.html";

/// Serves a page until the process is ended. One request at a time is enough for one person.
fn serve(port: u16, page: impl Fn() -> Result<String>) -> Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", port))
        .with_context(|| format!("cannot listen at 127.0.0.1:{port}; choose another --port"))?;
    let address = listener.local_addr().context("the address of the server")?;
    console::write_out(format!("http://{address}\n").as_bytes()).context("cannot write to stdout")?;
    info!("Ctrl-C ends");
    for stream in listener.incoming() {
        let answered = stream.map_err(Error::from).and_then(|stream| answer(stream, &page));
        if let Err(e) = answered {
            warn!("a request failed: {e}");
        }
    }
    Ok(())
}

fn answer(mut stream: TcpStream, page: &impl Fn() -> Result<String>) -> Result<()> {
    stream.set_read_timeout(Some(std::time::Duration::from_secs(5)))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    // The rest of the request's head.
    for line in lines {
        if line?.is_empty() {
            break;
        }
    }
    let found = request.starts_with("GET / ");
    let (status, body) = match found.then(page) {
        None => ("404 Not Found", "there is only /\n".to_string()),
        Some(Ok(page)) => ("200 OK", page),
        Some(Err(e)) => ("500 Internal Server Error", format!("{e}\n")),
    };
    let kind = if status == "200 OK" { "text/html" } else { "text/plain" };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}; charset=utf-8\r\nContent-Length: {}\r\nCache-Control: no-store\r\nConnection: \
         close\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes())?;
    Ok(stream.write_all(body.as_bytes())?)
}

/// Lists the runs below a folder, the newest last.
pub fn runs(args: &RunsArgs) -> Result<()> {
    let mut found = Vec::new();
    find(&args.dir, 4, &mut found)?;
    let mut runs = Vec::new();
    for dir in found {
        match RunRecord::read(&dir) {
            Ok(run) => runs.push(run),
            Err(e) => warn!("{e}"),
        }
    }
    if runs.is_empty() {
        return Err(Error::data(format!("{}: no run is in it", args.dir.display())));
    }
    runs.sort_by_key(|run| run.changed);
    let write = |text: String| console::write_out(text.as_bytes()).context("cannot write to stdout");
    if args.json {
        for run in &runs {
            let (key, _) = run.aim();
            let line = serde_json::json!({
                "path": run.dir, "stage": run.stage, "state": run.state.name(), "step": run.step(), "steps": run.steps(),
                "metric": key, "last": run.last("train", key), "best": run.best(),
            });
            write(format!("{line}\n"))?;
        }
        return Ok(());
    }
    let head = ["run", "stage", "state", "step", "last", "best", "age"].map(str::to_string);
    let rows: Vec<[String; 7]> =
        [head].into_iter().chain(runs.iter().map(|run| row(run, &args.dir))).collect();
    for cells in &rows {
        let width = |i: usize| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0);
        let line: Vec<String> =
            cells.iter().enumerate().map(|(i, cell)| format!("{cell:0$}", width(i))).collect();
        write(format!("{}\n", line.join("  ").trim_end()))?;
    }
    Ok(())
}

/// The folders of runs in a folder and, to a depth, below it; what is in a run's folder is no further run.
fn find(dir: &Path, depth: usize, found: &mut Vec<PathBuf>) -> Result<()> {
    if RunRecord::is_run(dir) {
        found.push(dir.to_path_buf());
        return Ok(());
    }
    let entries = std::fs::read_dir(dir).map_err(|e| files::read_error(dir, &e))?;
    for entry in entries {
        let path = entry.map_err(|e| files::read_error(dir, &e))?.path();
        if path.is_dir() && !path.is_symlink() && depth > 0 {
            find(&path, depth - 1, found)?;
        }
    }
    Ok(())
}
