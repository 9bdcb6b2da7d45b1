//! The stack machine.
//!
//! Objects lie in an arena and refer to one another by index, so that neither deep nesting nor cycles can exhaust the
//! stack, and memory stays within some hundred bytes for every byte of the pickle.

use std::collections::HashMap;

use tch::Kind;

use super::{Foreign, MAX_DIMENSIONS, MAX_NAME, TensorRef};

/// What may be imported.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum PickleGlobal {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Kind),
    /// Something else: its place among the names.
    Foreign(u32),
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum PickleValue<'a> {
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Bytes,
    /// A number of more than 64 bits.
    Large,
    Str(&'a str),
    Global(PickleGlobal),
    Object(u32),
}

#[derive(Debug)]
pub(super) enum Object<'a> {
    Tuple(Vec<PickleValue<'a>>),
    List(Vec<PickleValue<'a>>),
    Dict(Vec<(PickleValue<'a>, PickleValue<'a>)>),
    Storage {
        key: &'a str,
        kind: Kind,
        len: i64,
    },
    Tensor(Box<TensorRef>),
    /// An object of a foreign class; what is put into it besides its state is left out.
    Instance {
        class: u32,
        /// The tuple of what it was made of.
        args: Option<u32>,
        state: Option<PickleValue<'a>>,
    },
}

/// What a name means here. All that may be imported stands in this function.
fn global(module: &str, name: &str) -> Result<PickleGlobal, String> {
    Ok(match (module, name) {
        ("collections", "OrderedDict") => PickleGlobal::OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2") => PickleGlobal::RebuildTensor,
        ("torch._utils", "_rebuild_parameter") => PickleGlobal::RebuildParameter,
        ("torch", "DoubleStorage") => PickleGlobal::Storage(Kind::Double),
        ("torch", "FloatStorage") => PickleGlobal::Storage(Kind::Float),
        ("torch", "HalfStorage") => PickleGlobal::Storage(Kind::Half),
        ("torch", "BFloat16Storage") => PickleGlobal::Storage(Kind::BFloat16),
        ("torch", "LongStorage") => PickleGlobal::Storage(Kind::Int64),
        ("torch", "IntStorage") => PickleGlobal::Storage(Kind::Int),
        ("torch", "ShortStorage") => PickleGlobal::Storage(Kind::Int16),
        ("torch", "CharStorage") => PickleGlobal::Storage(Kind::Int8),
        ("torch", "ByteStorage") => PickleGlobal::Storage(Kind::Uint8),
        ("torch", "BoolStorage") => PickleGlobal::Storage(Kind::Bool),
        _ => {
            return Err(format!(
                "it imports `{}.{}`, which is not part of a tensor; pickles can run arbitrary code, so only tensors and plain \
                 containers are read",
                clean(module),
                clean(name)
            ));
        }
    })
}

/// Text of a file that may be anything, as one short line.
pub(super) fn clean(text: &str) -> String {
    text.chars().take(80).flat_map(char::escape_debug).collect()
}

/// What a value is, for errors.
pub(super) fn describe(objects: &[Object], names: &[(&str, &str)], value: PickleValue) -> String {
    let named = |i: u32| {
        let (module, name) = names.get(i as usize).copied().unwrap_or_default();
        format!("`{}.{}`", clean(module), clean(name))
    };
    match value {
        PickleValue::None => "None".into(),
        PickleValue::Bool(_) => "a truth value".into(),
        PickleValue::Int(i) => format!("the number {i}"),
        PickleValue::Float(_) | PickleValue::Large => "a number".into(),
        PickleValue::Bytes => "a string of bytes".into(),
        PickleValue::Str(s) => format!("the text \"{}\"", clean(s)),
        PickleValue::Global(PickleGlobal::Foreign(i)) => named(i),
        PickleValue::Global(_) => "a type".into(),
        PickleValue::Object(i) => match objects.get(i as usize) {
            Some(Object::Tuple(_)) => "a tuple".into(),
            Some(Object::List(_)) => "a list".into(),
            Some(Object::Dict(_)) => "a dictionary".into(),
            Some(Object::Storage { .. }) => "a storage".into(),
            Some(Object::Tensor(_)) => "a tensor".into(),
            Some(Object::Instance { class, .. }) => format!("an object of {}", named(*class)),
            None => "nothing".into(),
        },
    }
}

pub(super) struct PickleMachine<'a> {
    input: &'a [u8],
    foreign: Foreign,
    at: usize,
    stack: Vec<PickleValue<'a>>,
    /// Heights of the stack at which marks were set.
    marks: Vec<usize>,
    memo: HashMap<u32, PickleValue<'a>>,
    objects: Vec<Object<'a>>,
    /// Module and name of what is foreign.
    names: Vec<(&'a str, &'a str)>,
}

impl<'a> PickleMachine<'a> {
    pub(super) fn new(input: &'a [u8], foreign: Foreign) -> PickleMachine<'a> {
        let (stack, marks, memo, objects) = (vec![], vec![], HashMap::new(), vec![]);
        PickleMachine { input, foreign, at: 0, stack, marks, memo, objects, names: vec![] }
    }

    /// The objects, and the names of what is foreign.
    pub(super) fn into_parts(self) -> (Vec<Object<'a>>, Vec<(&'a str, &'a str)>) {
        (self.objects, self.names)
    }

    fn global(&mut self, module: &'a str, name: &'a str) -> Result<PickleValue<'a>, String> {
        let global = match (global(module, name), self.foreign) {
            (Err(_), Foreign::Kept) => self.foreign(module, name)?,
            (known, _) => known?,
        };
        Ok(PickleValue::Global(global))
    }

    fn foreign(&mut self, module: &'a str, name: &'a str) -> Result<PickleGlobal, String> {
        let i = u32::try_from(self.names.len()).map_err(|_| "too many names")?;
        self.names.push((module, name));
        Ok(PickleGlobal::Foreign(i))
    }

    /// Runs to the end; returns the value that is left.
    pub(super) fn run(&mut self) -> Result<PickleValue<'a>, String> {
        loop {
            let (at, opcode) = (self.at, self.byte()?);
            if opcode == b'.' {
                return self.pop();
            }
            self.step(opcode).map_err(|e| format!("{e} (byte {at} of data.pkl)"))?;
        }
    }

    #[expect(clippy::too_many_lines, reason = "an arm for each opcode")]
    fn step(&mut self, opcode: u8) -> Result<(), String> {
        let value = match opcode {
            // PROTO, FRAME
            0x80 => return self.take(1).map(drop),
            0x95 => return self.take(8).map(drop),
            b'(' => {
                self.marks.push(self.stack.len());
                return Ok(());
            }
            // POP, POP_MARK, DUP
            b'0' => return self.pop().map(drop),
            b'1' => return self.pop_mark().map(drop),
            b'2' => *self.stack.last().ok_or("the stack is empty")?,
            // Atoms
            b'N' => PickleValue::None,
            0x88 | 0x89 => PickleValue::Bool(opcode == 0x88),
            b'K' => PickleValue::Int(i64::from(self.byte()?)),
            b'M' => PickleValue::Int(i64::from(u16::from_le_bytes(self.array()?))),
            b'J' => PickleValue::Int(i64::from(i32::from_le_bytes(self.array()?))),
            0x8a => {
                let len = usize::from(self.byte()?);
                self.long(len)?
            }
            0x8b => {
                let len = self.length4()?;
                self.long(len)?
            }
            b'G' => PickleValue::Float(f64::from_be_bytes(self.array()?)),
            // Text: SHORT_BINUNICODE, BINUNICODE, BINUNICODE8
            0x8c => {
                let len = usize::from(self.byte()?);
                self.text(len)?
            }
            b'X' => {
                let len = self.length4()?;
                self.text(len)?
            }
            0x8d => {
                let len = self.length8()?;
                self.text(len)?
            }
            // Bytes: SHORT_BINBYTES and SHORT_BINSTRING, BINBYTES and BINSTRING, BINBYTES8 and BYTEARRAY8
            b'C' | b'U' => {
                let len = usize::from(self.byte()?);
                self.take(len)?;
                PickleValue::Bytes
            }
            b'B' | b'T' => {
                let len = self.length4()?;
                self.take(len)?;
                PickleValue::Bytes
            }
            0x8e | 0x96 => {
                let len = self.length8()?;
                self.take(len)?;
                PickleValue::Bytes
            }
            // Containers
            b'}' => self.new_object(Object::Dict(vec![]))?,
            b']' => self.new_object(Object::List(vec![]))?,
            b')' => self.new_object(Object::Tuple(vec![]))?,
            b't' => {
                let items = self.pop_mark()?;
                self.new_object(Object::Tuple(items))?
            }
            b'l' => {
                let items = self.pop_mark()?;
                self.new_object(Object::List(items))?
            }
            b'd' => {
                let items = pairs(self.pop_mark()?)?;
                self.new_object(Object::Dict(items))?
            }
            0x85..=0x87 => {
                let items = self.pop_many(usize::from(opcode - 0x84))?;
                self.new_object(Object::Tuple(items))?
            }
            b'a' => {
                let item = self.pop()?;
                return self.append(vec![item]);
            }
            b'e' => {
                let items = self.pop_mark()?;
                return self.append(items);
            }
            b's' => {
                let items = self.pop_many(2)?;
                return self.set_items(items);
            }
            b'u' => {
                let items = self.pop_mark()?;
                return self.set_items(items);
            }
            // Memo: BINPUT, LONG_BINPUT, MEMOIZE, BINGET, LONG_BINGET
            b'q' => {
                let key = u32::from(self.byte()?);
                return self.remember(key);
            }
            b'r' => {
                let key = u32::from_le_bytes(self.array()?);
                return self.remember(key);
            }
            0x94 => return self.remember(self.memo.len() as u32),
            b'h' => {
                let key = u32::from(self.byte()?);
                self.recall(key)?
            }
            b'j' => {
                let key = u32::from_le_bytes(self.array()?);
                self.recall(key)?
            }
            // Names: GLOBAL, INST, STACK_GLOBAL
            b'c' | b'i' => {
                let (module, name) = (self.line()?, self.line()?);
                let global = self.global(module, name)?;
                if opcode == b'i' {
                    return Err("it makes an object of a class".into());
                }
                global
            }
            0x93 => match self.pop_many(2)?.as_slice() {
                [PickleValue::Str(module), PickleValue::Str(name)] => self.global(module, name)?,
                _ => return Err("a name to import is not text".into()),
            },
            // BINPERSID, REDUCE, BUILD
            b'Q' => {
                let id = self.pop()?;
                self.storage(id).or_else(|e| self.opaque(e))?
            }
            b'R' => {
                let (args, callable) = (self.pop()?, self.pop()?);
                self.reduce(callable, args).or_else(|e| self.opaque(e))?
            }
            b'b' => {
                let state = self.pop()?;
                return self.build(state);
            }
            // NEWOBJ, NEWOBJ_EX; EMPTY_SET, ADDITEMS, FROZENSET
            0x81 | 0x92 if self.foreign == Foreign::Kept => {
                let parts = self.pop_many(if opcode == 0x81 { 2 } else { 3 })?;
                self.instance(parts[0], parts[1]).or_else(|e| self.opaque(e))?
            }
            0x8f if self.foreign == Foreign::Kept => self.set()?,
            0x90 if self.foreign == Foreign::Kept => return self.pop_mark().map(drop),
            0x91 if self.foreign == Foreign::Kept => {
                self.pop_mark()?;
                self.set()?
            }
            other => {
                return Err(format!("instruction 0x{other:02x} is not used for tensors"));
            }
        };
        self.stack.push(value);
        Ok(())
    }

    /// An object of a foreign class.
    fn instance(&mut self, class: PickleValue<'a>, args: PickleValue<'a>) -> Result<PickleValue<'a>, String> {
        let args = match args {
            PickleValue::Object(args) => Some(args),
            _ => None,
        };
        match class {
            PickleValue::Global(PickleGlobal::Foreign(class)) => {
                self.new_object(Object::Instance { class, args, state: None })
            }
            PickleValue::Global(PickleGlobal::OrderedDict) => self.new_object(Object::Dict(vec![])),
            other => Err(format!("it makes an object of {}", self.describe(other))),
        }
    }

    /// An object in the place of what was refused: only a value that is asked for must be one that is known.
    fn opaque(&mut self, refused: String) -> Result<PickleValue<'a>, String> {
        if self.foreign == Foreign::Refused {
            return Err(refused);
        }
        let PickleGlobal::Foreign(class) = self.foreign("torch", "object that is not read here")? else {
            return Err(refused);
        };
        self.new_object(Object::Instance { class, args: None, state: None })
    }

    /// A set, of which nothing is kept.
    fn set(&mut self) -> Result<PickleValue<'a>, String> {
        let PickleGlobal::Foreign(class) = self.foreign("builtins", "set")? else {
            return Err("a set has no name".into());
        };
        self.new_object(Object::Instance { class, args: None, state: None })
    }

    /// Sets the state of the object on top of the stack.
    fn build(&mut self, of: PickleValue<'a>) -> Result<(), String> {
        match self.stack.last() {
            Some(PickleValue::Object(i)) => match &mut self.objects[*i as usize] {
                // The attributes of an ordered dictionary, such as `_metadata`, hold no tensors.
                Object::Dict(_) => Ok(()),
                Object::Instance { state, .. } => {
                    *state = Some(of);
                    Ok(())
                }
                _ => Err("it sets the state of an object that is not a dictionary".into()),
            },
            _ => Err("it sets the state of an object that is not a dictionary".into()),
        }
    }

    /// Makes a storage out of its persistent id: ("storage", type, key, device, number of elements).
    fn storage(&mut self, id: PickleValue<'a>) -> Result<PickleValue<'a>, String> {
        let parts = self.tuple(id)?;
        match parts {
            [
                PickleValue::Str("storage"),
                PickleValue::Global(PickleGlobal::Storage(kind)),
                PickleValue::Str(key),
                PickleValue::Str(_),
                PickleValue::Int(len),
            ] if *len >= 0 && key.len() <= MAX_NAME => {
                let storage = Object::Storage { key, kind: *kind, len: *len };
                self.new_object(storage)
            }
            _ => Err("a persistent id is not a storage".into()),
        }
    }

    /// What a call means: nothing is called.
    fn reduce(
        &mut self,
        callable: PickleValue<'a>,
        args: PickleValue<'a>,
    ) -> Result<PickleValue<'a>, String> {
        if let PickleValue::Global(PickleGlobal::Foreign(..)) = callable {
            return self.instance(callable, args);
        }
        let args = self.tuple(args)?;
        match (callable, args) {
            (PickleValue::Global(PickleGlobal::OrderedDict), []) => self.new_object(Object::Dict(vec![])),
            // (data, requires_grad, hooks)
            (PickleValue::Global(PickleGlobal::RebuildParameter), [data, ..]) => match self.object(*data) {
                Some(Object::Tensor(_)) => Ok(*data),
                _ => Err("a parameter is not a tensor".into()),
            },
            // (storage, offset, shape, stride, requires_grad, hooks, and from torch 2.1 on metadata)
            (
                PickleValue::Global(PickleGlobal::RebuildTensor),
                [storage, PickleValue::Int(offset), shape, stride, ..],
            ) => {
                let Some(Object::Storage { key, kind, len }) = self.object(*storage) else {
                    return Err("a tensor has no storage".into());
                };
                let tensor = TensorRef {
                    storage: key.to_string(),
                    kind: *kind,
                    storage_len: *len,
                    offset: *offset,
                    shape: self.integers(*shape)?,
                    stride: self.integers(*stride)?,
                };
                self.new_object(Object::Tensor(Box::new(tensor)))
            }
            _ => Err("a call does not make a tensor or a container".into()),
        }
    }

    fn integers(&self, tuple: PickleValue<'a>) -> Result<Vec<i64>, String> {
        let integer = |v: &PickleValue| match v {
            PickleValue::Int(i) => Ok(*i),
            other => Err(format!("a tensor's shape has {}", self.describe(*other))),
        };
        match self.tuple(tuple)? {
            items if items.len() > MAX_DIMENSIONS => Err(format!("a tensor has {} dimensions", items.len())),
            items => items.iter().map(integer).collect(),
        }
    }

    fn object(&self, value: PickleValue<'a>) -> Option<&Object<'a>> {
        match value {
            PickleValue::Object(i) => self.objects.get(i as usize),
            _ => None,
        }
    }

    fn tuple(&self, value: PickleValue<'a>) -> Result<&[PickleValue<'a>], String> {
        match self.object(value) {
            Some(Object::Tuple(items)) => Ok(items),
            _ => Err(format!("{} stands where a tuple should", self.describe(value))),
        }
    }

    fn describe(&self, value: PickleValue<'a>) -> String {
        describe(&self.objects, &self.names, value)
    }

    fn new_object(&mut self, object: Object<'a>) -> Result<PickleValue<'a>, String> {
        let i = u32::try_from(self.objects.len()).map_err(|_| "too many objects")?;
        self.objects.push(object);
        Ok(PickleValue::Object(i))
    }

    fn append(&mut self, items: Vec<PickleValue<'a>>) -> Result<(), String> {
        match self.stack.last() {
            Some(PickleValue::Object(i)) => match &mut self.objects[*i as usize] {
                Object::List(list) => {
                    list.extend(items);
                    Ok(())
                }
                Object::Instance { .. } => Ok(()),
                _ => Err("it appends to an object that is not a list".into()),
            },
            _ => Err("it appends to an object that is not a list".into()),
        }
    }

    fn set_items(&mut self, items: Vec<PickleValue<'a>>) -> Result<(), String> {
        let items = pairs(items)?;
        match self.stack.last() {
            Some(PickleValue::Object(i)) => match &mut self.objects[*i as usize] {
                Object::Dict(dict) => {
                    dict.extend(items);
                    Ok(())
                }
                Object::Instance { .. } => Ok(()),
                _ => Err("it sets items of an object that is not a dictionary".into()),
            },
            _ => Err("it sets items of an object that is not a dictionary".into()),
        }
    }

    fn remember(&mut self, key: u32) -> Result<(), String> {
        let top = *self.stack.last().ok_or("the stack is empty")?;
        self.memo.insert(key, top);
        Ok(())
    }

    fn recall(&self, key: u32) -> Result<PickleValue<'a>, String> {
        self.memo.get(&key).copied().ok_or_else(|| format!("there is no memo {key}"))
    }

    /// The lowest height that the stack may be popped to.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Result<PickleValue<'a>, String> {
        match self.stack.len() > self.floor() {
            true => self.stack.pop().ok_or_else(|| "the stack is empty".into()),
            false => Err("the stack is empty".into()),
        }
    }

    fn pop_many(&mut self, n: usize) -> Result<Vec<PickleValue<'a>>, String> {
        match self.stack.len() - self.floor() >= n {
            true => Ok(self.stack.split_off(self.stack.len() - n)),
            false => Err("the stack is empty".into()),
        }
    }

    fn pop_mark(&mut self) -> Result<Vec<PickleValue<'a>>, String> {
        let mark = self.marks.pop().ok_or("there is no mark")?;
        Ok(self.stack.split_off(mark))
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let bytes = self.at.checked_add(n).and_then(|end| self.input.get(self.at..end));
        let bytes = bytes.ok_or("it ends in the middle of an instruction")?;
        self.at += n;
        Ok(bytes)
    }

    fn byte(&mut self) -> Result<u8, String> {
        Ok(self.take(1)?[0])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let bytes = self.take(N)?;
        Ok(std::array::from_fn(|i| bytes[i]))
    }

    fn length4(&mut self) -> Result<usize, String> {
        Ok(u32::from_le_bytes(self.array()?) as usize)
    }

    fn length8(&mut self) -> Result<usize, String> {
        usize::try_from(u64::from_le_bytes(self.array()?)).map_err(|e| e.to_string())
    }

    /// A number of `len` bytes, little-endian, two's complement.
    fn long(&mut self, len: usize) -> Result<PickleValue<'a>, String> {
        let bytes = self.take(len)?;
        if len > 8 && self.foreign == Foreign::Kept {
            return Ok(PickleValue::Large);
        }
        if len > 8 {
            return Err("a number has more than 64 bits".into());
        }
        let sign = bytes.last().map_or(0, |b| if b & 0x80 != 0 { 0xff } else { 0 });
        Ok(PickleValue::Int(i64::from_le_bytes(std::array::from_fn(|i| {
            bytes.get(i).copied().unwrap_or(sign)
        }))))
    }

    fn text(&mut self, len: usize) -> Result<PickleValue<'a>, String> {
        let text = std::str::from_utf8(self.take(len)?).map_err(|_| "a text is not UTF-8")?;
        Ok(PickleValue::Str(text))
    }

    /// Text up to the end of the line.
    fn line(&mut self) -> Result<&'a str, String> {
        let rest = &self.input[self.at..];
        let len = rest.iter().position(|b| *b == b'\n').ok_or("a name has no end")?;
        let line = self.take(len + 1)?;
        std::str::from_utf8(&line[..len]).map_err(|_| "a name is not UTF-8".into())
    }
}

fn pairs(items: Vec<PickleValue>) -> Result<Vec<(PickleValue, PickleValue)>, String> {
    match items.len() % 2 {
        0 => Ok(items.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect()),
        _ => Err("a dictionary has a key without a value".into()),
    }
}
