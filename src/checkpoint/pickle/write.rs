//! Pickles, written: protocol 2, as `torch.save` writes it, but without references to what was said before.

use tch::Kind;

/// A value to be pickled.
#[derive(Debug, Clone, PartialEq)]
pub enum Pickled {
    None,
    Truth(bool),
    Integer(i64),
    Number(f64),
    Text(String),
    Tuple(Vec<Pickled>),
    List(Vec<Pickled>),
    Dict(Vec<(Pickled, Pickled)>),
    /// A contiguous tensor with a storage of its own.
    Tensor {
        kind: Kind,
        shape: Vec<i64>,
    },
    /// A class, a function or another name of a module.
    Name(&'static str, &'static str),
    /// What a name of a module gives when it is called.
    Call(&'static str, &'static str, Vec<Pickled>),
    /// An object of a class, by its state.
    Object(&'static str, &'static str, Box<Pickled>),
}

impl Pickled {
    pub fn text(text: impl Into<String>) -> Pickled {
        Pickled::Text(text.into())
    }

    /// A dictionary whose keys are texts.
    pub fn dict<K: Into<String>>(entries: impl IntoIterator<Item = (K, Pickled)>) -> Pickled {
        Pickled::Dict(entries.into_iter().map(|(key, value)| (Pickled::text(key), value)).collect())
    }

    /// A tuple of integers.
    pub fn integers(integers: &[i64]) -> Pickled {
        Pickled::Tuple(integers.iter().map(|i| Pickled::Integer(*i)).collect())
    }

    /// The pickle. The storages of its tensors are named `0`, `1`, ... in their order. An error for tensors of other dtypes
    /// than floating-point ones.
    pub fn write(&self) -> Result<Vec<u8>, String> {
        let mut out = PickleOutput { bytes: vec![0x80, 2], storages: 0 };
        out.put(self)?;
        out.bytes.push(b'.');
        Ok(out.bytes)
    }
}

struct PickleOutput {
    bytes: Vec<u8>,
    storages: usize,
}

impl PickleOutput {
    fn put(&mut self, value: &Pickled) -> Result<(), String> {
        match value {
            Pickled::None => self.bytes.push(b'N'),
            Pickled::Truth(b) => self.bytes.push(if *b { 0x88 } else { 0x89 }),
            Pickled::Integer(i) => self.integer(*i),
            Pickled::Number(x) => {
                self.bytes.push(b'G');
                self.bytes.extend(x.to_be_bytes());
            }
            Pickled::Text(text) => self.text(text),
            Pickled::Tuple(items) => self.tuple(items)?,
            Pickled::List(items) => {
                self.bytes.extend(b"](");
                items.iter().try_for_each(|item| self.put(item))?;
                self.bytes.push(b'e');
            }
            Pickled::Dict(entries) => {
                self.bytes.extend(b"}(");
                for (key, value) in entries {
                    self.put(key)?;
                    self.put(value)?;
                }
                self.bytes.push(b'u');
            }
            Pickled::Tensor { kind, shape } => self.tensor(*kind, shape)?,
            Pickled::Name(module, name) => self.name(module, name),
            Pickled::Call(module, name, args) => {
                self.name(module, name);
                self.tuple(args)?;
                self.bytes.push(b'R');
            }
            Pickled::Object(module, name, state) => {
                self.name(module, name);
                self.bytes.extend(b")\x81");
                self.put(state)?;
                self.bytes.push(b'b');
            }
        }
        Ok(())
    }

    fn tuple(&mut self, items: &[Pickled]) -> Result<(), String> {
        self.bytes.push(b'(');
        items.iter().try_for_each(|item| self.put(item))?;
        self.bytes.push(b't');
        Ok(())
    }

    fn name(&mut self, module: &str, name: &str) {
        self.bytes.extend(format!("c{module}\n{name}\n").bytes());
    }

    fn text(&mut self, text: &str) {
        self.bytes.push(b'X');
        self.bytes.extend((text.len() as u32).to_le_bytes());
        self.bytes.extend(text.bytes());
    }

    fn integer(&mut self, i: i64) {
        match i32::try_from(i) {
            Ok(i) => {
                self.bytes.push(b'J');
                self.bytes.extend(i.to_le_bytes());
            }
            Err(_) => {
                self.bytes.extend([0x8a, 8]);
                self.bytes.extend(i.to_le_bytes());
            }
        }
    }

    fn tensor(&mut self, kind: Kind, shape: &[i64]) -> Result<(), String> {
        let storage = match kind {
            Kind::Double => "DoubleStorage",
            Kind::Float => "FloatStorage",
            Kind::Half => "HalfStorage",
            Kind::BFloat16 => "BFloat16Storage",
            other => return Err(format!("cannot write {other:?}")),
        };
        self.name("torch._utils", "_rebuild_tensor_v2");
        self.bytes.extend(b"((");
        self.text("storage");
        self.name("torch", storage);
        self.text(&self.storages.to_string());
        self.text("cpu");
        self.integer(shape.iter().product());
        self.bytes.extend(b"tQ");
        self.integer(0);
        self.bytes.push(b'(');
        shape.iter().for_each(|d| self.integer(*d));
        self.bytes.extend(b"t(");
        (1..=shape.len()).for_each(|d| self.integer(shape[d..].iter().product()));
        // Not requiring gradients, no hooks.
        self.bytes.extend(b"t\x89ccollections\nOrderedDict\n)RtR");
        self.storages += 1;
        Ok(())
    }
}
