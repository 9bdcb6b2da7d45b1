//! TensorBoard event files: scalars and text, in the record framing of TFRecord.
//!
//! A record is the length of its data (u64), the masked CRC32C of the length, the data (an `Event`), and the masked
//! CRC32C of the data; integers are little-endian.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use protobuf::Message;
use tensorboard_proto::event::Event;
use tensorboard_proto::summary::{Summary, Summary_Value, SummaryMetadata, SummaryMetadata_PluginData};
use tensorboard_proto::tensor::TensorProto;
use tensorboard_proto::tensor_shape::{TensorShapeProto, TensorShapeProto_Dim};
use tensorboard_proto::types::DataType;

use super::append::{AppendFile, rewrite};
use crate::error::{Context, Error, Result};

const PREFIX: &str = "events.out.tfevents.";

/// Writes one event file. An event that cannot be written is lost, with one warning; the run goes on.
#[derive(Debug)]
pub struct EventWriter {
    file: AppendFile,
}

impl EventWriter {
    /// Starts `events.out.tfevents.SECONDS.HOST.PID` in `dir`.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn create(dir: &Path) -> Result<Self> {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host = match host.trim() {
            "" => "localhost",
            host => host,
        };
        let name = format!("{PREFIX}{}.{host}.{}", now() as u64, std::process::id());
        let mut path = dir.join(&name);
        let mut copies = 0;
        while let Err(e) = OpenOptions::new().write(true).create_new(true).open(&path) {
            if e.kind() != ErrorKind::AlreadyExists {
                return Err(Error::from(e).context(format!("cannot create {}", path.display())));
            }
            copies += 1;
            path = dir.join(format!("{name}.{copies}"));
        }
        let file = AppendFile::open(&path, 0).with_context(|| format!("cannot open {}", path.display()))?;
        let mut writer = EventWriter { file };
        let mut event = Event::new();
        event.set_file_version("brain.Event:2".into());
        writer.write(event, 0);
        Ok(writer)
    }

    /// Scalars of one step, stored in float32, as TensorBoard holds them.
    pub fn add_scalars(&mut self, scalars: impl IntoIterator<Item = (String, f64)>, step: u64) {
        let values = scalars.into_iter().map(|(tag, x)| {
            let mut value = Summary_Value::new();
            value.set_tag(tag);
            value.set_simple_value(x as f32);
            value
        });
        self.write_summary(values.collect(), step);
    }

    /// A text (Markdown) for the Text tab.
    pub fn add_text(&mut self, tag: &str, text: &str, step: u64) {
        let mut plugin = SummaryMetadata_PluginData::new();
        plugin.set_plugin_name("text".into());
        let mut metadata = SummaryMetadata::new();
        metadata.set_plugin_data(plugin);
        let mut dim = TensorShapeProto_Dim::new();
        dim.set_size(1);
        let mut shape = TensorShapeProto::new();
        shape.set_dim(vec![dim].into());
        let mut tensor = TensorProto::new();
        tensor.set_dtype(DataType::DT_STRING);
        tensor.set_tensor_shape(shape);
        tensor.set_string_val(vec![text.as_bytes().to_vec()].into());
        let mut value = Summary_Value::new();
        value.set_tag(tag.into());
        value.set_metadata(metadata);
        value.set_tensor(tensor);
        self.write_summary(vec![value], step);
    }

    /// Events lost so far.
    pub fn lost(&self) -> u64 {
        self.file.lost()
    }

    fn write_summary(&mut self, values: Vec<Summary_Value>, step: u64) {
        let mut summary = Summary::new();
        summary.set_value(values.into());
        let mut event = Event::new();
        event.set_summary(summary);
        self.write(event, step);
    }

    fn write(&mut self, mut event: Event, step: u64) {
        event.set_wall_time(now());
        event.set_step(step as i64);
        match event.write_to_bytes() {
            Ok(data) => self.file.append(&record(&data)),
            Err(e) => crate::warn!("an event for TensorBoard cannot be encoded: {e}"),
        }
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// Cuts all events with a step above `step` out of the event files in `dir`, and what follows a broken record; each
/// file is replaced in one move. `None`: all event files are removed.
pub fn truncate_after(dir: &Path, step: Option<u64>) -> Result<()> {
    for path in event_files(dir)? {
        let result = match step {
            Some(step) => truncate_file_after(&path, step),
            None => std::fs::remove_file(&path).map_err(Error::from),
        };
        result.with_context(|| format!("cannot cut {}", path.display()))?;
    }
    Ok(())
}

fn truncate_file_after(path: &Path, step: u64) -> Result<()> {
    rewrite(path, |input, output| {
        let mut left_out = false;
        loop {
            match read_event(input) {
                Ok(None) => return Ok(left_out),
                Ok(Some((_, event))) if event.get_step() > step as i64 => left_out = true,
                Ok(Some((data, _))) => output.put(&record(&data))?,
                // What a killed writer left: nothing after it can be read.
                Err(e) if matches!(e.kind(), ErrorKind::UnexpectedEof | ErrorKind::InvalidData) => {
                    return Ok(true);
                }
                Err(e) => return Err(e.into()),
            }
        }
    })
}

/// The event files in `dir`, by name.
pub fn event_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = vec![];
    for entry in std::fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(PREFIX.as_bytes()) {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

/// The next event and its bytes; `None` at the end of the file.
///
/// # Errors
/// `UnexpectedEof`: the file ends within a record; `InvalidData`: a checksum or the event's encoding is wrong.
pub fn read_event(input: &mut impl Read) -> io::Result<Option<(Vec<u8>, Event)>> {
    let invalid =
        |what: &str| io::Error::new(ErrorKind::InvalidData, format!("{what} of an event is damaged"));
    let mut header = [0; 12];
    if input.read(&mut header[..1])? == 0 {
        return Ok(None);
    }
    input.read_exact(&mut header[1..])?;
    let (len, check) = header.split_at(8);
    if check != masked_crc(len).to_le_bytes() {
        return Err(invalid("the length"));
    }
    let len = u64::from_le_bytes(len.try_into().map_err(|_| invalid("the length"))?);
    let mut data = vec![];
    input.take(len).read_to_end(&mut data)?;
    let mut check = [0; 4];
    input.read_exact(&mut check)?;
    if check != masked_crc(&data).to_le_bytes() {
        return Err(invalid("the data"));
    }
    let event = Event::parse_from_bytes(&data).map_err(|_| invalid("the encoding"))?;
    Ok(Some((data, event)))
}

fn record(data: &[u8]) -> Vec<u8> {
    let len = (data.len() as u64).to_le_bytes();
    [&len[..], &masked_crc(&len).to_le_bytes(), data, &masked_crc(data).to_le_bytes()].concat()
}

/// TFRecord masks its checksums, since one over data that holds checksums is weak.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC32C (Castagnoli), bits reflected; `crc32fast` has only the other polynomial.
fn crc32c(data: &[u8]) -> u32 {
    const TABLE: [u32; 256] = {
        let mut table = [0; 256];
        let mut i = 0;
        while i < 256 {
            let (mut crc, mut bit) = (i as u32, 0);
            while bit < 8 {
                crc = if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
                bit += 1;
            }
            table[i] = crc;
            i += 1;
        }
        table
    };
    !data.iter().fold(!0, |crc, byte| crc >> 8 ^ TABLE[((crc ^ u32::from(*byte)) & 0xff) as usize])
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::BufReader;

    use super::*;
    use crate::telemetry::tests::Folder;

    fn read_all(path: &Path) -> io::Result<Vec<Event>> {
        let mut input = BufReader::new(File::open(path)?);
        let mut events = vec![];
        while let Some((_, event)) = read_event(&mut input)? {
            events.push(event);
        }
        Ok(events)
    }

    fn scalars(events: &[Event]) -> Vec<(i64, String, f32)> {
        let values = |e: &Event| e.get_summary().get_value().to_vec();
        let all = events.iter().flat_map(|e| values(e).into_iter().map(|v| (e.get_step(), v)));
        all.filter(|(_, v)| v.has_simple_value())
            .map(|(step, v)| (step, v.get_tag().to_string(), v.get_simple_value()))
            .collect()
    }

    /// RFC 3720, B.4.
    #[test]
    fn crc32c_of_known_vectors() {
        assert_eq!(crc32c(b""), 0);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(&(0..32).collect::<Vec<u8>>()), 0x46dd_794e);
        // The first record of every event file of TensorFlow and PyTorch starts with these twelve bytes (length 24).
        assert_eq!(record(&[0; 24])[..12], *b"\x18\0\0\0\0\0\0\0\xa3\x7f\x4b\x22");
    }

    #[test]
    fn events_read_back() {
        let dir = Folder::new();
        let mut writer = EventWriter::create(&dir.path("")).unwrap();
        writer.add_scalars([("train/loss".into(), 2.5), ("train/lr".into(), 1e-3)], 7);
        writer.add_text("samples", "*hello*\nworld", 8);
        assert_eq!(writer.lost(), 0);
        let files = event_files(&dir.path("")).unwrap();
        assert_eq!(files.len(), 1);
        let events = read_all(&files[0]).unwrap();
        assert_eq!(events.len(), 3);
        assert_eq!(events[0].get_file_version(), "brain.Event:2");
        assert!(events[1].get_wall_time() > 1.6e9);
        assert_eq!(scalars(&events), [(7, "train/loss".into(), 2.5), (7, "train/lr".into(), 1e-3f32)]);
        let value = &events[2].get_summary().get_value()[0];
        assert_eq!((events[2].get_step(), value.get_tag()), (8, "samples"));
        assert_eq!(value.get_metadata().get_plugin_data().get_plugin_name(), "text");
        assert_eq!(value.get_tensor().get_dtype(), DataType::DT_STRING);
        assert_eq!(value.get_tensor().get_string_val(), [b"*hello*\nworld".to_vec()]);
        // Two files of one second and process have two names.
        EventWriter::create(&dir.path("")).unwrap();
        assert_eq!(event_files(&dir.path("")).unwrap().len(), 2);
    }

    #[test]
    fn resume_cuts_later_steps_and_broken_ends() {
        let dir = Folder::new();
        let mut writer = EventWriter::create(&dir.path("")).unwrap();
        for step in 1..=5 {
            writer.add_scalars([("a".into(), step as f64)], step);
        }
        let path = event_files(&dir.path("")).unwrap().remove(0);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        assert_eq!(read_all(&path).unwrap_err().kind(), ErrorKind::UnexpectedEof);

        truncate_after(&dir.path(""), Some(3)).unwrap();
        let events = read_all(&path).unwrap();
        assert_eq!(events[0].get_file_version(), "brain.Event:2");
        assert_eq!(scalars(&events), [(1, "a".into(), 1.0), (2, "a".into(), 2.0), (3, "a".into(), 3.0)]);
        assert_eq!(std::fs::read_dir(dir.path("")).unwrap().count(), 1);

        let mut damaged = std::fs::read(&path).unwrap();
        let last = damaged.len() - 6;
        damaged[last] ^= 1;
        std::fs::write(&path, &damaged).unwrap();
        assert_eq!(read_all(&path).unwrap_err().kind(), ErrorKind::InvalidData);
        truncate_after(&dir.path(""), Some(3)).unwrap();
        assert_eq!(scalars(&read_all(&path).unwrap()).len(), 2);

        truncate_after(&dir.path(""), None).unwrap();
        assert_eq!(event_files(&dir.path("")).unwrap().len(), 0);
    }
}
