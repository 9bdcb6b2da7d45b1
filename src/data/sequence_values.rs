//! A number for each sequence of a loader's files, kept in the cache: what costs a forward to know.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::rows::RowLoader;
use super::tokenizer::hex;
use crate::error::Result;
use crate::files::{AtomicFile, exists, read_error};

/// Of how the numbers are computed: part of every file's name.
const VERSION: u32 = 1;

/// A number for each sequence of a loader's files; NaN where it is not known. A file in the cache for each of theirs: the
/// numbers in float64, little-endian, and their CRC-32.
pub struct SequenceValues {
    files: Vec<PathBuf>,
    /// By source and sequence.
    pub values: Vec<Vec<f64>>,
}

impl SequenceValues {
    /// What the cache holds. `key` tells apart what the numbers are of.
    pub fn open(rows: &RowLoader, key: &str, cache: &Path) -> Result<SequenceValues> {
        let file = |data: &str| {
            let hash = Sha256::digest(format!("{VERSION} {data} {key}"));
            cache.join(format!("{}.reference", hex(&hash[..16])))
        };
        let files: Vec<PathBuf> = rows.sources().iter().map(|s| file(s.key())).collect();
        let read = files.iter().zip(rows.sources()).map(|(f, s)| read(f, s.counts().sequences as usize));
        let values = read.collect::<Result<_>>()?;
        Ok(SequenceValues { files, values })
    }

    /// The first of the loader's rows 0 to `count` with each example that is not known.
    pub fn missing(&self, rows: &RowLoader, count: u64) -> Vec<u64> {
        let mut seen = HashSet::new();
        let unknown = |(s, i): (usize, usize)| {
            let n = rows.sources()[s].sequences(i);
            self.values[s][n].iter().any(|x| x.is_nan())
        };
        (0..count).filter(|row| unknown(rows.place(*row)) && seen.insert(rows.place(*row))).collect()
    }

    /// Keeps all in the cache.
    pub fn write(&self) -> Result<()> {
        self.files.iter().zip(&self.values).try_for_each(|(file, values)| write(file, values))
    }
}

/// NaN where nothing is known: there is no such file, or it is damaged.
fn read(path: &Path, len: usize) -> Result<Vec<f64>> {
    let unknown = vec![f64::NAN; len];
    if !exists(path)? {
        return Ok(unknown);
    }
    let bytes = std::fs::read(path).map_err(|e| read_error(path, &e))?;
    let Some((values, crc)) = bytes.split_last_chunk::<4>() else { return Ok(unknown) };
    if values.len() != 8 * len || crc32fast::hash(values) != u32::from_le_bytes(*crc) {
        return Ok(unknown);
    }
    Ok(values.chunks_exact(8).map(|b| f64::from_le_bytes(std::array::from_fn(|i| b[i]))).collect())
}

fn write(path: &Path, values: &[f64]) -> Result<()> {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut file = AtomicFile::create(path)?;
    file.put(&bytes)?;
    file.put(&crc32fast::hash(&bytes).to_le_bytes())?;
    file.commit()
}

#[cfg(test)]
mod tests {
    use super::*;
    use testing::folder::TestFolder;

    #[test]
    fn what_is_damaged_is_not_known() {
        let folder = TestFolder::new("sequence-values");
        let path = folder.0.join("a.reference");
        let unknown = |values: Vec<f64>| values.iter().all(|x| x.is_nan());
        assert!(unknown(read(&path, 3).unwrap()));
        write(&path, &[-1.5, f64::NAN, -1e300]).unwrap();
        let values = read(&path, 3).unwrap();
        assert!(values[0] == -1.5 && values[1].is_nan() && values[2] == -1e300);
        assert!(unknown(read(&path, 2).unwrap()));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[3] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(unknown(read(&path, 3).unwrap()));
        std::fs::write(&path, b"xy").unwrap();
        assert!(unknown(read(&path, 3).unwrap()));
    }
}
