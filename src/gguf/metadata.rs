//! The metadata of a GGUF file: keys with typed values.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};

use super::damaged;
use crate::error::{Context, Error, Result};

/// Most bytes of a key (the format's own limit).
const MAX_KEY: u64 = 65535;

/// The value of a key.
#[derive(Debug, Clone, PartialEq)]
pub enum MetadataValue {
    /// Of any width. Those of 64 bits without a sign that do not fit are read as floating-point numbers.
    Integer(i64),
    /// float32 or float64 in the file.
    Float(f64),
    /// One byte, 0 or 1.
    Bool(bool),
    /// UTF-8.
    Text(String),
    /// Values of one type.
    Array(MetadataArray),
}

/// A list of values of one type.
#[derive(Debug, Clone, PartialEq)]
pub enum MetadataArray {
    /// Of any width.
    Integers(Vec<i64>),
    /// Those of 64 bits are rounded to float32.
    Floats(Vec<f32>),
    /// One byte each, 0 or 1.
    Bools(Vec<bool>),
    /// UTF-8.
    Texts(Vec<String>),
    /// Of arrays: what is in them is left out.
    Arrays(usize),
}

/// Ids of types in files.
const BOOL: u32 = 7;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// All keys with their values.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata(BTreeMap<String, MetadataValue>);

impl Metadata {
    /// # Errors
    /// Of kind Data, with the key: a damaged or unknown value, or a key that is there twice.
    pub(super) fn read(cursor: &mut Cursor, num_keys: u64) -> Result<Metadata> {
        // Length of the name, type and value of each take 13 bytes at least.
        cursor.count(num_keys, 13, "keys")?;
        let mut all = BTreeMap::new();
        for _ in 0..num_keys {
            let length = cursor.u64()?;
            if length > MAX_KEY {
                return Err(damaged(format!("a key has {length} bytes")));
            }
            let key = cursor.text_of(length)?;
            let value = cursor
                .u32()
                .and_then(|of| cursor.value(of, false))
                .with_context(|| format!("key `{key}`"))?;
            if all.contains_key(&key) {
                return Err(Error::data(format!("the key `{key}` appears twice")));
            }
            all.insert(key, value);
        }
        Ok(Metadata(all))
    }

    /// The value of a key; none where the key is missing.
    pub fn get(&self, key: &str) -> Option<&MetadataValue> {
        self.0.get(key)
    }

    /// All keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Sets a key; a value that it had is replaced.
    pub fn set(&mut self, key: impl Into<String>, value: MetadataValue) {
        self.0.insert(key.into(), value);
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&String, &MetadataValue)> {
        self.0.iter()
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// An integer; none where the key is missing.
    ///
    /// # Errors
    /// Of kind Data: a value of another type.
    pub fn integer(&self, key: &str) -> Result<Option<i64>> {
        self.as_a(key, "an integer", |value| match value {
            MetadataValue::Integer(n) => Some(*n),
            _ => None,
        })
    }

    /// A number, which may be an integer.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.as_a(key, "a number", |value| match value {
            MetadataValue::Integer(n) => Some(*n as f64),
            MetadataValue::Float(x) => Some(*x),
            _ => None,
        })
    }

    /// True or false; none where the key is missing.
    ///
    /// # Errors
    /// Of kind Data: a value of another type.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.as_a(key, "true or false", |value| match value {
            MetadataValue::Bool(b) => Some(*b),
            _ => None,
        })
    }

    /// A text; none where the key is missing.
    ///
    /// # Errors
    /// Of kind Data: a value of another type.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.as_a(key, "a text", |value| match value {
            MetadataValue::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// A list of texts; none where the key is missing.
    ///
    /// # Errors
    /// Of kind Data: a value of another type.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>> {
        self.as_a(key, "a list of texts", |value| match value {
            MetadataValue::Array(MetadataArray::Texts(list)) => Some(list.as_slice()),
            _ => None,
        })
    }

    /// A list of integers; none where the key is missing.
    ///
    /// # Errors
    /// Of kind Data: a value of another type.
    pub fn integers(&self, key: &str) -> Result<Option<&[i64]>> {
        self.as_a(key, "a list of integers", |value| match value {
            MetadataValue::Array(MetadataArray::Integers(list)) => Some(list.as_slice()),
            _ => None,
        })
    }

    /// A list of numbers; none where the key is missing.
    ///
    /// # Errors
    /// Of kind Data: a value of another type.
    pub fn floats(&self, key: &str) -> Result<Option<&[f32]>> {
        self.as_a(key, "a list of floating-point numbers", |value| match value {
            MetadataValue::Array(MetadataArray::Floats(list)) => Some(list.as_slice()),
            _ => None,
        })
    }

    fn as_a<'a, T>(
        &'a self,
        key: &str,
        what: &str,
        of: impl Fn(&'a MetadataValue) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        of(value).map(Some).ok_or_else(|| Error::data(format!("`{key}` is {value}; it must be {what}")))
    }
}

impl std::fmt::Display for MetadataValue {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            MetadataValue::Integer(n) => write!(f, "{n}"),
            MetadataValue::Float(x) => write!(f, "{x:?}"),
            MetadataValue::Bool(b) => write!(f, "{b}"),
            MetadataValue::Text(text) => write!(f, "{:?}", text.chars().take(40).collect::<String>()),
            MetadataValue::Array(array) => {
                let (n, of) = match array {
                    MetadataArray::Integers(list) => (list.len(), "integers"),
                    MetadataArray::Floats(list) => (list.len(), "floating-point numbers"),
                    MetadataArray::Bools(list) => (list.len(), "truth values"),
                    MetadataArray::Texts(list) => (list.len(), "texts"),
                    MetadataArray::Arrays(n) => (*n, "lists"),
                };
                write!(f, "a list of {n} {of}")
            }
        }
    }
}

/// The file from its beginning on.
pub(super) struct Cursor<'a> {
    file: BufReader<&'a File>,
    size: u64,
    at: u64,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(file: &'a File, size: u64) -> Self {
        Cursor { file: BufReader::with_capacity(1 << 14, file), size, at: 0 }
    }

    pub(super) fn position(&self) -> u64 {
        self.at
    }

    fn left(&self) -> u64 {
        self.size - self.at
    }

    /// `n` as a number of things of at least `bytes` each, which the rest of the file must hold.
    pub(super) fn count(&self, n: u64, bytes: u64, what: &str) -> Result<usize> {
        match n.checked_mul(bytes) {
            Some(needed) if needed <= self.left() => Ok(n as usize),
            _ => Err(damaged(format!("{n} {what} are announced, more than the file can hold"))),
        }
    }

    fn fill(&mut self, to: &mut [u8]) -> Result<()> {
        if to.len() as u64 > self.left() {
            return Err(damaged("the header is cut off"));
        }
        self.file.read_exact(to).map_err(|e| Error::data(format!("cannot read it: {e}")))?;
        self.at += to.len() as u64;
        Ok(())
    }

    pub(super) fn bytes(&mut self, n: u64) -> Result<Vec<u8>> {
        if n > self.left() {
            return Err(damaged("the header is cut off"));
        }
        let mut bytes = vec![0; n as usize];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(super) fn text(&mut self) -> Result<String> {
        let length = self.u64()?;
        self.text_of(length)
    }

    fn text_of(&mut self, length: u64) -> Result<String> {
        String::from_utf8(self.bytes(length)?).map_err(|_| damaged("a text that is not UTF-8"))
    }

    /// A value of the type with this id.
    fn value(&mut self, of: u32, nested: bool) -> Result<MetadataValue> {
        Ok(match of {
            BOOL => MetadataValue::Bool(self.flag()?),
            TEXT => MetadataValue::Text(self.text()?),
            ARRAY => {
                let (of, n) = (self.u32()?, self.u64()?);
                MetadataValue::Array(self.array_of(of, n, nested)?)
            }
            _ => self.number(of)?,
        })
    }

    fn flag(&mut self) -> Result<bool> {
        match self.array()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [n] => Err(damaged(format!("a truth value of {n}"))),
        }
    }

    fn number(&mut self, of: u32) -> Result<MetadataValue> {
        Ok(match of {
            0 => MetadataValue::Integer(u8::from_le_bytes(self.array()?).into()),
            1 => MetadataValue::Integer(i8::from_le_bytes(self.array()?).into()),
            2 => MetadataValue::Integer(u16::from_le_bytes(self.array()?).into()),
            3 => MetadataValue::Integer(i16::from_le_bytes(self.array()?).into()),
            4 => MetadataValue::Integer(u32::from_le_bytes(self.array()?).into()),
            5 => MetadataValue::Integer(i32::from_le_bytes(self.array()?).into()),
            6 => MetadataValue::Float(decimal(f32::from_le_bytes(self.array()?))),
            10 => {
                let n = u64::from_le_bytes(self.array()?);
                i64::try_from(n).map_or(MetadataValue::Float(n as f64), MetadataValue::Integer)
            }
            11 => MetadataValue::Integer(i64::from_le_bytes(self.array()?)),
            12 => MetadataValue::Float(f64::from_le_bytes(self.array()?)),
            _ => return Err(damaged(format!("type {of} of a value is not known"))),
        })
    }

    fn array_of(&mut self, of: u32, n: u64, nested: bool) -> Result<MetadataArray> {
        let bytes = match of {
            0 | 1 | BOOL => 1,
            2 | 3 => 2,
            4..=6 => 4,
            TEXT | 10..=12 => 8,
            ARRAY if !nested => 12,
            ARRAY => return Err(damaged("lists of lists of lists")),
            _ => return Err(damaged(format!("type {of} of a list's values is not known"))),
        };
        let n = self.count(n, bytes, "values of a list")?;
        Ok(match of {
            BOOL => MetadataArray::Bools((0..n).map(|_| self.flag()).collect::<Result<_>>()?),
            TEXT => MetadataArray::Texts((0..n).map(|_| self.text()).collect::<Result<_>>()?),
            ARRAY => {
                (0..n).try_for_each(|_| self.value(ARRAY, true).map(drop))?;
                MetadataArray::Arrays(n)
            }
            6 => MetadataArray::Floats(
                (0..n).map(|_| Ok(f32::from_le_bytes(self.array()?))).collect::<Result<_>>()?,
            ),
            12 => {
                let float = |c: &mut Self| Ok(f64::from_le_bytes(c.array()?) as f32);
                MetadataArray::Floats((0..n).map(|_| float(self)).collect::<Result<_>>()?)
            }
            _ => {
                let integer = |c: &mut Self| match c.number(of)? {
                    MetadataValue::Integer(n) => Ok(n),
                    other => Err(damaged(format!("{other} in a list of integers"))),
                };
                MetadataArray::Integers((0..n).map(|_| integer(self)).collect::<Result<_>>()?)
            }
        })
    }
}

/// The shortest decimal number that is `x` in float32, which is what was written: 1e-5 and not 9.999999747378752e-6.
fn decimal(x: f32) -> f64 {
    x.to_string().parse().unwrap_or(x.into())
}
