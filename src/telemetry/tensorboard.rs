//! TensorBoard event files: scalars and text, in the record framing of TFRecord.
//!
//! A record is the length of its data (u64), the masked CRC32C of the length, the data (an `Event`), and the masked
//! CRC32C of the data; integers are little-endian.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use super::LogCut;
use super::append::{AppendFile, rewrite};
use crate::error::{Context, Error, Result};

const PREFIX: &str = "events.out.tfevents.";

/// The fields that are written and read of TensorBoard's `Event` (tensorboard/compat/proto/event.proto). A file that is cut
/// keeps the bytes of its events, with whatever fields other writers gave them.
#[derive(Clone, PartialEq, Message)]
pub struct Event {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    pub wall_time: f64,
    /// The update that the values are of.
    #[prost(int64, tag = "2")]
    pub step: i64,
    /// Of the first event of a file.
    #[prost(string, optional, tag = "3")]
    pub file_version: Option<String>,
    /// Values, for all events but the first of a file.
    #[prost(message, optional, tag = "5")]
    pub summary: Option<Summary>,
}

/// Values of one step (summary.proto).
#[derive(Clone, PartialEq, Message)]
pub struct Summary {
    /// One a tag.
    #[prost(message, repeated, tag = "1")]
    pub values: Vec<SummaryValue>,
}

/// `Summary.Value`: a scalar, or a tensor with metadata that names the plugin which shows it.
#[derive(Clone, PartialEq, Message)]
pub struct SummaryValue {
    /// The name of the chart.
    #[prost(string, tag = "1")]
    pub tag: String,
    /// A scalar.
    #[prost(float, optional, tag = "2")]
    pub simple_value: Option<f32>,
    /// A text, as a tensor of strings.
    #[prost(message, optional, tag = "8")]
    pub tensor: Option<TensorProto>,
    /// The plugin that shows the value; none for scalars.
    #[prost(message, optional, tag = "9")]
    pub metadata: Option<SummaryMetadata>,
}

/// How a tag is shown.
#[derive(Clone, PartialEq, Message)]
pub struct SummaryMetadata {
    /// The plugin.
    #[prost(message, optional, tag = "1")]
    pub plugin_data: Option<PluginData>,
}

/// A plugin of TensorBoard's.
#[derive(Clone, PartialEq, Message)]
pub struct PluginData {
    /// `text`, the only one that is named.
    #[prost(string, tag = "1")]
    pub plugin_name: String,
}

/// A tensor of texts (tensor.proto).
#[derive(Clone, PartialEq, Message)]
pub struct TensorProto {
    /// [`DT_STRING`].
    #[prost(int32, tag = "1")]
    pub dtype: i32,
    /// None: a scalar.
    #[prost(message, optional, tag = "2")]
    pub tensor_shape: Option<TensorShape>,
    /// The strings, one an element.
    #[prost(bytes = "vec", repeated, tag = "8")]
    pub string_val: Vec<Vec<u8>>,
}

/// The shape of a tensor.
#[derive(Clone, PartialEq, Message)]
pub struct TensorShape {
    /// From the outermost dimension.
    #[prost(message, repeated, tag = "2")]
    pub dims: Vec<TensorDim>,
}

/// A dimension of a tensor.
#[derive(Clone, PartialEq, Message)]
pub struct TensorDim {
    /// Its size.
    #[prost(int64, tag = "1")]
    pub size: i64,
}

/// `DataType.DT_STRING` (types.proto).
const DT_STRING: i32 = 7;

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
        writer.write(Event { file_version: Some("brain.Event:2".into()), ..Event::default() }, 0);
        Ok(writer)
    }

    /// Scalars of one step, stored in float32, as TensorBoard holds them.
    pub fn add_scalars(&mut self, scalars: impl IntoIterator<Item = (String, f64)>, step: u64) {
        let value = |(tag, x): (String, f64)| SummaryValue {
            tag,
            simple_value: Some(x as f32),
            ..SummaryValue::default()
        };
        self.write_summary(scalars.into_iter().map(value).collect(), step);
    }

    /// A text (Markdown) for the Text tab.
    pub fn add_text(&mut self, tag: &str, text: &str, step: u64) {
        let plugin_data = Some(PluginData { plugin_name: "text".into() });
        let tensor = TensorProto {
            dtype: DT_STRING,
            tensor_shape: Some(TensorShape { dims: vec![TensorDim { size: 1 }] }),
            string_val: vec![text.as_bytes().to_vec()],
        };
        let value = SummaryValue {
            tag: tag.into(),
            tensor: Some(tensor),
            metadata: Some(SummaryMetadata { plugin_data }),
            ..SummaryValue::default()
        };
        self.write_summary(vec![value], step);
    }

    /// Events lost so far.
    pub fn lost(&self) -> u64 {
        self.file.lost()
    }

    /// The open file, to sync it; none where nothing is written.
    pub fn file(&self) -> Option<File> {
        self.file.file()
    }

    fn write_summary(&mut self, values: Vec<SummaryValue>, step: u64) {
        self.write(Event { summary: Some(Summary { values }), ..Event::default() }, step);
    }

    fn write(&mut self, event: Event, step: u64) {
        let event = Event { wall_time: now(), step: step as i64, ..event };
        self.file.append(&record(&event.encode_to_vec()));
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// Cuts all events that `cut` covers out of the event files in `dir`, and what follows a broken record; each file is replaced
/// in one move. `None`: all event files are removed.
pub fn truncate_after(dir: &Path, cut: Option<LogCut>) -> Result<()> {
    for path in event_files(dir)? {
        let result = match cut {
            Some(cut) => truncate_file_after(&path, cut),
            None => std::fs::remove_file(&path).map_err(Error::from),
        };
        result.with_context(|| format!("cannot cut {}", path.display()))?;
    }
    Ok(())
}

fn truncate_file_after(path: &Path, cut: LogCut) -> Result<()> {
    rewrite(path, |input, output| {
        let mut left_out = false;
        loop {
            match read_event(input) {
                Ok(None) => return Ok(left_out),
                Ok(Some((_, event))) if covers(cut, &event) => left_out = true,
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

fn covers(cut: LogCut, event: &Event) -> bool {
    let values = event.summary.iter().flat_map(|summary| &summary.values);
    let of_training = values.into_iter().all(|value| value.tag.starts_with("train/"));
    cut.covers(of_training, event.step as u64)
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

/// When each start of a run in `dir` opened its file, in seconds since 1970, in order.
pub fn starts(dir: &Path) -> Vec<i64> {
    let second = |path: PathBuf| {
        let name = path.file_name()?.to_str()?.strip_prefix(PREFIX)?.to_string();
        name.split('.').next()?.parse().ok()
    };
    let mut starts: Vec<i64> = event_files(dir).unwrap_or_default().into_iter().filter_map(second).collect();
    starts.sort_unstable();
    starts
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
    let event = Event::decode(&data[..]).map_err(|_| invalid("the encoding"))?;
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
    use std::io::BufReader;

    use super::*;
    use testing::folder::TestFolder;

    fn read_all(path: &Path) -> io::Result<Vec<Event>> {
        let mut input = BufReader::new(File::open(path)?);
        let mut events = vec![];
        while let Some((_, event)) = read_event(&mut input)? {
            events.push(event);
        }
        Ok(events)
    }

    fn scalars(events: &[Event]) -> Vec<(i64, String, f32)> {
        let values = |e: &Event| e.summary.iter().flat_map(|s| s.values.clone()).collect::<Vec<_>>();
        let all = events.iter().flat_map(|e| values(e).into_iter().map(|v| (e.step, v)));
        all.filter_map(|(step, v)| Some((step, v.tag.clone(), v.simple_value?))).collect()
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
        let dir = TestFolder::new("telemetry");
        let mut writer = EventWriter::create(&dir.path("")).unwrap();
        writer.add_scalars([("train/loss".into(), 2.5), ("train/lr".into(), 1e-3)], 7);
        writer.add_text("samples", "*hello*\nworld", 8);
        assert_eq!(writer.lost(), 0);
        let files = event_files(&dir.path("")).unwrap();
        assert_eq!(files.len(), 1);
        let events = read_all(&files[0]).unwrap();
        assert_eq!(events.len(), 3);
        assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
        assert!(events[1].wall_time > 1.6e9);
        assert_eq!(scalars(&events), [(7, "train/loss".into(), 2.5), (7, "train/lr".into(), 1e-3f32)]);
        let value = &events[2].summary.as_ref().unwrap().values[0];
        assert_eq!((events[2].step, value.tag.as_str()), (8, "samples"));
        let plugin = value.metadata.as_ref().unwrap().plugin_data.as_ref().unwrap();
        assert_eq!(plugin.plugin_name, "text");
        let tensor = value.tensor.as_ref().unwrap();
        assert_eq!((tensor.dtype, &tensor.string_val), (DT_STRING, &vec![b"*hello*\nworld".to_vec()]));
        // Two files of one second and process have two names.
        EventWriter::create(&dir.path("")).unwrap();
        assert_eq!(event_files(&dir.path("")).unwrap().len(), 2);
    }

    #[test]
    fn resume_cuts_later_steps_and_broken_ends() {
        let dir = TestFolder::new("telemetry");
        let mut writer = EventWriter::create(&dir.path("")).unwrap();
        for step in 1..=5 {
            writer.add_scalars([("a".into(), step as f64)], step);
        }
        let path = event_files(&dir.path("")).unwrap().remove(0);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        assert_eq!(read_all(&path).unwrap_err().kind(), ErrorKind::UnexpectedEof);

        truncate_after(&dir.path(""), Some(LogCut { after: 3, validation: false })).unwrap();
        let events = read_all(&path).unwrap();
        assert_eq!(events[0].file_version.as_deref(), Some("brain.Event:2"));
        assert_eq!(scalars(&events), [(1, "a".into(), 1.0), (2, "a".into(), 2.0), (3, "a".into(), 3.0)]);
        assert_eq!(std::fs::read_dir(dir.path("")).unwrap().count(), 1);

        let mut damaged = std::fs::read(&path).unwrap();
        let last = damaged.len() - 6;
        damaged[last] ^= 1;
        std::fs::write(&path, &damaged).unwrap();
        assert_eq!(read_all(&path).unwrap_err().kind(), ErrorKind::InvalidData);
        truncate_after(&dir.path(""), Some(LogCut { after: 3, validation: false })).unwrap();
        assert_eq!(scalars(&read_all(&path).unwrap()).len(), 2);

        truncate_after(&dir.path(""), None).unwrap();
        assert_eq!(event_files(&dir.path("")).unwrap().len(), 0);
    }
}
