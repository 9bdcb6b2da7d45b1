use super::*;
use crate::config::sections::OnError;
use crate::data::texts::Texts;
use std::io::Write;
use std::sync::atomic::Ordering::Relaxed;
use testing::folder::TestFolder;

fn read(path: &Path) -> Result<Vec<Record>> {
    records(path, None, &Arc::default())?.collect()
}

fn read_texts(paths: &[PathBuf], key: &str) -> Result<Vec<String>> {
    Texts::open(paths, key, OnError::Refuse, &Arc::default()).collect()
}

fn error(path: &Path) -> String {
    let e = read(path).expect_err("must be refused");
    assert_eq!(e.exit_code(), 3);
    e.message.replace(&path.display().to_string(), "FILE")
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn parquet_file(path: &Path, column: &str, texts: &[&str], rows_per_group: usize) {
    compressed_parquet_file(path, column, texts, rows_per_group, parquet::basic::Compression::UNCOMPRESSED);
}

fn compressed_parquet_file(
    path: &Path,
    column: &str,
    texts: &[&str],
    rows_per_group: usize,
    compression: parquet::basic::Compression,
) {
    use parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
    let schema = format!("message m {{ REQUIRED INT32 id; REQUIRED BYTE_ARRAY {column} (UTF8); }}");
    let schema = Arc::new(parquet::schema::parser::parse_message_type(&schema).unwrap());
    let file = File::create(path).unwrap();
    let properties = parquet::file::properties::WriterProperties::builder();
    let properties = Arc::new(properties.set_compression(compression).build());
    let mut writer = parquet::file::writer::SerializedFileWriter::new(file, schema, properties).unwrap();
    for group in texts.chunks(rows_per_group) {
        let mut row_group = writer.next_row_group().unwrap();
        let ids: Vec<i32> = (0..group.len() as i32).collect();
        let mut column = row_group.next_column().unwrap().unwrap();
        column.typed::<Int32Type>().write_batch(&ids, None, None).unwrap();
        column.close().unwrap();
        let values: Vec<ByteArray> = group.iter().map(|t| ByteArray::from(*t)).collect();
        let mut column = row_group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
        row_group.close().unwrap();
    }
    writer.close().unwrap();
}

const LINES: &str = "{\"text\": \"a\"}\n\n{\"text\": \"b\\nc\", \"n\": 2}\n{\"text\": \"d\"}";
const TEXTS: [&str; 3] = ["a", "b\nc", "d"];

#[test]
fn every_kind_of_file_gives_the_same_texts() {
    let folder = TestFolder::new("readers");
    let array = format!("  [{}]\n", LINES.replace("\n\n", ",").replace("}\n{", "},{"));
    let plain = [("a.jsonl", LINES.as_bytes()), ("b.json", array.as_bytes()), ("c.json", LINES.as_bytes())];
    let mut paths = Vec::new();
    for (name, content) in plain {
        paths.push(folder.file(name, content));
        paths.push(folder.file(&format!("{name}.gz"), gzip(content)));
        paths.push(folder.file(&format!("{name}.zst"), zstd::encode_all(content, 3).unwrap()));
    }
    use parquet::basic::Compression as Codec;
    let codecs = [
        Codec::UNCOMPRESSED,
        Codec::SNAPPY,
        Codec::GZIP(Default::default()),
        Codec::ZSTD(Default::default()),
        Codec::BROTLI(Default::default()),
        Codec::LZ4,
        Codec::LZ4_RAW,
    ];
    for (i, codec) in codecs.into_iter().enumerate() {
        let path = folder.0.join(format!("d{i}.parquet"));
        compressed_parquet_file(&path, "text", &TEXTS, 2, codec);
        paths.push(path);
    }
    // A frame that says that it needs a window of 1 GiB, as `zstd --long=30` writes it: magic, descriptor, window, one block.
    let block = (((LINES.len() as u32) << 3) | 1).to_le_bytes();
    let frame = [b"\x28\xb5\x2f\xfd\0\xa0", &block[..3], LINES.as_bytes()].concat();
    paths.push(folder.file("w.jsonl.zst", frame));
    // Padding after a member and between members.
    let (first, second) = LINES.split_at(LINES.find("\n\n").unwrap() + 2);
    let members = [gzip(first.as_bytes()), vec![0; 300], gzip(second.as_bytes()), vec![0; 70_000]].concat();
    paths.push(folder.file("p.jsonl.gz", members));
    for path in &paths {
        assert_eq!(read_texts(std::slice::from_ref(path), "text").unwrap(), TEXTS, "{}", path.display());
    }
    assert_eq!(read_texts(&paths, "text").unwrap().len(), 3 * paths.len());
    let text = folder.file("e.txt.gz", gzip("\u{feff}whole\nfile\n".as_bytes()));
    assert_eq!(read_texts(&[text], "whatever").unwrap(), ["whole\nfile\n"]);
}

#[test]
fn bytes_read_reach_the_size_of_the_files() {
    let folder = TestFolder::new("reader-bytes");
    let parquet = folder.0.join("p.parquet");
    parquet_file(&parquet, "text", &TEXTS, 1);
    let paths = [folder.file("a.jsonl", LINES), folder.file("b.jsonl.gz", gzip(LINES.as_bytes())), parquet];
    let bytes = Arc::default();
    Texts::open(&paths, "text", OnError::Refuse, &bytes).for_each(|t| drop(t.unwrap()));
    assert_eq!(bytes.load(Relaxed), total_bytes(&paths));
}

#[test]
fn errors_name_the_place_and_what_is_wrong() {
    let folder = TestFolder::new("reader-errors");
    let file = |name: &str, content: &[u8]| folder.file(name, content);
    assert_eq!(
        error(&file("a.jsonl", b"{\"text\": 1}\n\n{\"text\": }\n")),
        "FILE:3:10: not valid JSON: expected value"
    );
    assert_eq!(error(&file("b.jsonl", b"[1]\n")), "FILE:1: a record must be an object, this is a list");
    assert_eq!(
        error(&file("c.json", b"[{},\n {\"a\": 1},\n7]")),
        "FILE, record 3: a record must be an object, this is a number"
    );
    assert_eq!(error(&file("d.json", b"[{},\n {\"a\" 1}]")), "FILE:2:7: not valid JSON: expected `:`");
    assert_eq!(error(&file("e.json", b"[{}] x")), "FILE:1:6: not valid JSON: trailing characters");
    assert_eq!(
        error(&file("f.json", b"{\"a\": 1}\n{\"a\":")),
        "FILE:2:5: not valid JSON: EOF while parsing a value"
    );
    assert_eq!(error(&file("g.json", b" \n")), "FILE is empty");
    assert!(error(&file("h.txt", b"a\nb\xff")).starts_with("FILE:2: not UTF-8 text (byte 3 of the file)"));
    assert!(error(&file("i.csv", b"")).starts_with("FILE: unknown kind of file; known are .txt"));
    assert!(error(&file("j.parquet", b"PAR1")).starts_with("cannot read FILE: "));
    assert!(error(&folder.0.join("missing.jsonl")).starts_with("cannot read FILE: No such file"));
    let none = folder.0.join("none");
    std::fs::create_dir(&none).unwrap();
    assert!(error(&none).starts_with("FILE is a folder, but not a data set"));
    folder.file("state.json", r#"{"_data_files": [{"filename": "a.arrow"}]}"#);
    assert!(error(&folder.0).contains("a.arrow: No such file"));
    folder.file("a.arrow", b"no Arrow at all");
    assert!(error(&folder.0).starts_with("cannot read FILE/a.arrow: "));
    folder.file("state.json", r#"{"_data_files": [{"filename": "../a.arrow"}]}"#);
    assert!(error(&folder.0).contains("`../a.arrow` is not the name of a file"));
    folder.file("dataset_dict.json", r#"{"splits": ["train", "test"]}"#);
    assert_eq!(error(&folder.0), "FILE holds the splits train, test; name the folder of one");
    let whole = gzip(format!("{LINES}\n").repeat(1000).as_bytes());
    assert!(error(&file("k.jsonl.gz", &whole[..whole.len() / 2])).starts_with("cannot read FILE:"));
    assert!(error(&file("l.jsonl.zst", b"no zstd at all")).starts_with("cannot read FILE:"));

    let missing = |path: PathBuf| {
        let e = read_texts(std::slice::from_ref(&path), "text").expect_err("must be refused");
        let message = e.message.replace(&path.display().to_string(), "FILE");
        // Of records; what is wrong with the whole file has no such end.
        message.split(" (1 of").next().unwrap_or_default().to_string()
    };
    assert_eq!(
        missing(file("m.jsonl", b"{\"text\": \"a\"}\n{\"question\": \"\", \"answer\": \"\"}\n")),
        "FILE:2: no key `text`; keys here: question, answer; name the right one with --text-key"
    );
    assert_eq!(missing(file("n.jsonl", b"{\"text\": null}")), "FILE:1: `text` is null, not a text");
    let path = folder.0.join("o.parquet");
    parquet_file(&path, "body", &TEXTS, 3);
    assert_eq!(missing(path), "FILE: no key `text`; keys here: id, body; name the right one with --text-key");
}

#[test]
fn records_go_on_after_one_that_is_none() {
    let folder = TestFolder::new("reader-goes-on");
    let read = |name: &str, content: &[u8]| -> Result<Vec<bool>> {
        let path = folder.file(name, content);
        records_or_errors(&path, None, &Arc::default())?.map(|r| r.map(|r| r.is_ok())).collect()
    };
    assert_eq!(
        read("a.jsonl", b"{}\n{oops\n[1]\n{\"a\": \"\xff\"}\n{}\n").unwrap(),
        [true, false, false, false, true]
    );
    assert_eq!(read("a.json", b"[{}, 3, {}]").unwrap(), [true, false, true]);
    // Where a file breaks off, nothing can follow.
    assert!(read("b.json", b"[{}, {\"a\"").is_err());
}

/// tests/fixtures/arrow: written by datasets 5.2.0, see make_arrow.py there.
#[test]
fn what_save_to_disk_wrote() {
    let dir = testing::golden::fixture("arrow");
    let rows = read(&dir).unwrap();
    let expected = std::fs::read_to_string(dir.join("expected.jsonl")).unwrap();
    let expected: Vec<Map<String, Value>> =
        expected.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.iter().map(|r| r.fields.clone()).collect::<Vec<_>>(), expected);
    assert_eq!(rows.len(), 5);
    assert!(rows[4].place.to_string().ends_with("arrow, row 5"));
    let bytes = Arc::default();
    assert_eq!(records(&dir, Some(&["text"]), &bytes).unwrap().count(), 5);
    assert_eq!(bytes.load(Relaxed), total_bytes(std::slice::from_ref(&dir)));
    // The fourth text is null.
    let null = read_texts(std::slice::from_ref(&dir), "text").unwrap_err().message;
    assert!(null.contains("arrow, row 4: `text` is null, not a text (1 of 5 records; "), "{null}");
    let missing = read_texts(&[dir], "body").unwrap_err().message;
    assert!(missing.contains("no key `body`; keys here: text, messages, score"), "{missing}");
}

#[test]
fn a_corrupt_parquet_file_is_an_error_and_no_panic() {
    let folder = TestFolder::new("reader-parquet");
    let path = folder.0.join("a.parquet");
    let texts: Vec<String> = (0..200).map(|i| format!("text number {i}")).collect();
    parquet_file(&path, "text", &texts.iter().map(String::as_str).collect::<Vec<_>>(), 64);
    let whole = std::fs::read(&path).unwrap();
    let mut refused = 0;
    for at in (4..whole.len()).step_by(7) {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        refused += read(&folder.file("b.parquet", bytes)).is_err() as usize;
    }
    assert!(refused > 20, "{refused} corruptions were noticed");
}

#[test]
fn a_folder_is_read_file_by_file() {
    let folder = TestFolder::new("readers-folder");
    let dir = folder.path("many");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("b.jsonl"), "{\"text\": \"2\"}\n{\"text\": \"3\"}\n").unwrap();
    std::fs::write(dir.join("a.txt"), "1").unwrap();
    std::fs::write(dir.join("notes.bin"), b"\x00\x01").unwrap();
    let read = |path: &Path| -> Vec<String> {
        let records = records(path, Some(&["text"]), &Arc::default()).unwrap();
        records.map(|record| record.unwrap().fields["text"].as_str().unwrap().to_string()).collect()
    };
    assert_eq!(read(&dir), ["1", "2", "3"]);
    assert_eq!(files(&dir).unwrap(), [dir.join("a.txt"), dir.join("b.jsonl")]);
    assert_eq!(total_bytes(std::slice::from_ref(&dir)), 1 + 28);
    // The first file that cannot be read ends them.
    std::fs::write(dir.join("aa.jsonl"), "{\"text\": \n").unwrap();
    let all: Vec<_> = records(&dir, None, &Arc::default()).unwrap().collect();
    assert!(
        all.len() == 2 && all[1].as_ref().is_err_and(|e| e.message.contains("aa.jsonl:1")),
        "{}",
        all.len()
    );
    // Without a file that can be read it is no data.
    std::fs::remove_dir_all(&dir).unwrap();
    std::fs::create_dir(&dir).unwrap();
    assert!(
        records(&dir, None, &Arc::default()).map(drop).unwrap_err().message.contains("name the files in it")
    );
}
