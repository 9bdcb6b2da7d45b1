//! What a file holds where that is not what its name says: a pointer instead of the file, a page of a web server, another encoding.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::Error;

/// As many bytes of a file's beginning as [`mistaken`] looks at.
const START: usize = 256;

/// What a file is that begins with these bytes, and what to do, where it is of a kind that often stands under another's name.
/// `text`: the file may hold any text, so that only what is no text of its own is told.
pub fn mistaken(start: &[u8], text: bool) -> Option<&'static str> {
    let start = &start[..start.len().min(START)];
    if start.starts_with(b"version https://git-lfs.github.com/spec/") {
        return Some("a Git LFS pointer and not the file itself: fetch it with `git lfs pull`");
    }
    if let Some(encoding) = wide_encoding(start) {
        return Some(encoding);
    }
    let compressed: [(&[u8], &'static str); 4] = [
        (b"\x1f\x8b", "gzip data: give its name the ending .gz, or unpack it with `gunzip`"),
        (b"\x28\xb5\x2f\xfd", "Zstandard data: give its name the ending .zst, or unpack it with `zstd -d`"),
        (b"BZh", "bzip2 data: unpack it with `bunzip2`"),
        (b"\xfd7zXZ\0", "xz data: unpack it with `unxz`"),
    ];
    if let Some((_, what)) = compressed.iter().find(|(magic, _)| start.starts_with(magic)) {
        return Some(what);
    }
    if text {
        return None;
    }
    let begin = start.strip_prefix(b"\xef\xbb\xbf").unwrap_or(start).trim_ascii_start();
    let begins =
        |word: &str| begin.get(..word.len()).is_some_and(|b| b.eq_ignore_ascii_case(word.as_bytes()));
    if ["<!doctype", "<html", "<head", "<?xml"].into_iter().any(begins) {
        return Some(
            "a web page (HTML) and not the file itself: the download gave an error or a login page; download it again",
        );
    }
    let others: [(&[u8], &'static str); 4] = [
        (b"PAR1", "a Parquet file: give its name the ending .parquet"),
        (b"ARROW1", "an Arrow file (ending .arrow): name the folder that `save_to_disk` wrote"),
        (b"PK\x03\x04", "a zip archive (ending .zip): unpack it"),
        (b"GGUF", "a GGUF file (ending .gguf)"),
    ];
    others.iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, what)| *what)
}

/// UTF-16 and UTF-32, by their byte order mark or by the zeros beside ASCII.
fn wide_encoding(start: &[u8]) -> Option<&'static str> {
    const UTF_16: &str = "UTF-16 text: convert it with `iconv -f UTF-16 -t UTF-8`";
    const UTF_32: &str = "UTF-32 text: convert it with `iconv -f UTF-32 -t UTF-8`";
    if start.starts_with(b"\xff\xfe\0\0") || start.starts_with(b"\0\0\xfe\xff") {
        return Some(UTF_32);
    }
    if start.starts_with(b"\xff\xfe") || start.starts_with(b"\xfe\xff") {
        return Some(UTF_16);
    }
    let (pairs, _) = start.as_chunks::<2>();
    let ascii =
        |high: usize| pairs.iter().all(|p| p[high] == 0 && p[1 - high] != 0 && p[1 - high].is_ascii());
    match pairs.len() >= 2 {
        true if ascii(1) => Some("UTF-16 text: convert it with `iconv -f UTF-16LE -t UTF-8`"),
        true if ascii(0) => Some("UTF-16 text: convert it with `iconv -f UTF-16BE -t UTF-8`"),
        _ => None,
    }
}

/// An error of a file that could not be understood: what it is, where its beginning tells that, else `e`.
pub fn unusable(path: &Path, e: Error) -> Error {
    let mut start = Vec::new();
    let read = File::open(path).and_then(|file| file.take(START as u64).read_to_end(&mut start));
    // A file that is what its name says may be damaged.
    let ending = path.extension().map(|e| format!("ending .{}", e.to_string_lossy()));
    let named = |what: &str| ending.as_ref().is_some_and(|ending| what.contains(ending.as_str()));
    match read.ok().and_then(|_| mistaken(&start, false)).filter(|what| !named(what)) {
        Some(what) => Error { message: format!("{} is {what}", path.display()), ..e },
        None => e,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use testing::folder::TestFolder;

    fn utf16(text: &str, big: bool) -> Vec<u8> {
        text.encode_utf16().flat_map(|u| if big { u.to_be_bytes() } else { u.to_le_bytes() }).collect()
    }

    #[test]
    fn kinds_are_told_by_their_beginning() {
        let cases: Vec<(Vec<u8>, &str)> = vec![
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0".to_vec(), "Git LFS pointer"),
            (utf16("\u{feff}{\"a\": 1}", false), "UTF-16 text"),
            (utf16("\u{feff}{\"a\": 1}", true), "UTF-16 text"),
            (utf16("{\"a\": 1}", false), "UTF-16LE"),
            (utf16("{\"a\": 1}", true), "UTF-16BE"),
            (b"\xff\xfe\0\0{\0\0\0".to_vec(), "UTF-32 text"),
            (b"\n <!DOCTYPE html><html>".to_vec(), "web page"),
            (b"\xef\xbb\xbf<HTML lang=\"en\">".to_vec(), "web page"),
            (b"\x1f\x8b\x08\0".to_vec(), "gzip data"),
            (b"\x28\xb5\x2f\xfd\0".to_vec(), "Zstandard data"),
            (b"PAR1\x15\0".to_vec(), "a Parquet file"),
        ];
        for (start, what) in cases {
            let got = mistaken(&start, false).unwrap_or_else(|| panic!("{what}"));
            assert!(got.contains(what), "{got}");
        }
        for plain in ["{\"a\": 1}", "", "[", "model:\n", "\u{feff}{}", "ab", "日本語"] {
            assert_eq!(mistaken(plain.as_bytes(), false), None, "{plain}");
        }
        // Text may be about anything.
        assert_eq!(mistaken(b"<html>", true), None);
        assert!(mistaken(&utf16("\u{feff}ab", false), true).is_some());
    }

    #[test]
    fn an_error_is_replaced_only_where_the_file_is_something_else() {
        let folder = TestFolder::new("content");
        let pointer = folder.file("a.safetensors", "version https://git-lfs.github.com/spec/v1\n");
        let e = unusable(&pointer, Error::data("header not usable"));
        assert_eq!(e.exit_code(), 3);
        assert!(e.message.ends_with(
            "a.safetensors is a Git LFS pointer and not the file itself: fetch it with `git lfs pull`"
        ));
        let damaged = unusable(&folder.file("a.gz", b"\x1f\x8b"), Error::data("cut off"));
        assert_eq!(damaged.message, "cut off");
        let other = unusable(&folder.file("b", "xyz"), Error::data("header not usable"));
        assert_eq!(other.message, "header not usable");
    }
}
