//! Pickles, as `torch.save` writes them: a reader that runs nothing.
//!
//! A pickle is a program for a small stack machine, and Python's runs whatever functions it names. This one
//! ([`machine`]) calls nothing: the few names that tensors are made of each have a meaning here. Any other is refused as soon
//! as it is named ([`Foreign::Refused`]), or stands for data that nobody calls: an object is then the name of its class, what it was
//! made of and its state ([`Foreign::Kept`]). The result holds positions of tensors in the archive's storages, no values.

mod machine;
mod write;

use tch::Kind;

use machine::{Object, PickleGlobal, PickleMachine, PickleValue, clean};
pub use write::Pickled;

/// A tensor's place in a storage, as the pickle says it; not checked against the storage.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorRef {
    /// Name of the storage in the archive's `data/`.
    pub storage: String,
    pub kind: Kind,
    /// Elements of the storage.
    pub storage_len: i64,
    /// First element in the storage.
    pub offset: i64,
    pub shape: Vec<i64>,
    /// Elements from one index to the next, for each dimension.
    pub stride: Vec<i64>,
}

/// A name is at most so long: what a pickle says once and repeats by reference stays small.
pub const MAX_NAME: usize = 1024;

/// More dimensions than any tensor of a model has.
pub const MAX_DIMENSIONS: usize = 16;

/// Classes and functions that tensors are not made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Foreign {
    /// An error as soon as one is named.
    Refused,
    /// Data: the names of classes, and what their objects were made of. Nothing is called.
    Kept,
}

/// A pickle that was read.
pub struct Pickle<'a> {
    objects: Vec<Object<'a>>,
    names: Vec<(&'a str, &'a str)>,
    top: PickleValue<'a>,
}

impl<'a> Pickle<'a> {
    /// Reads a pickle. The error says what is wrong, and at which byte.
    pub fn read(pickle: &'a [u8], foreign: Foreign) -> Result<Pickle<'a>, String> {
        let mut machine = PickleMachine::new(pickle, foreign);
        let top = machine.run()?;
        let (objects, names) = machine.into_parts();
        Ok(Pickle { objects, names, top })
    }

    /// What it holds.
    pub fn top(&self) -> PickleNode<'_> {
        PickleNode { pickle: self, value: self.top }
    }
}

/// A value of a pickle.
#[derive(Clone, Copy)]
pub struct PickleNode<'p> {
    pickle: &'p Pickle<'p>,
    value: PickleValue<'p>,
}

impl<'p> PickleNode<'p> {
    fn at(self, value: PickleValue<'p>) -> PickleNode<'p> {
        PickleNode { value, ..self }
    }

    fn object(self) -> Option<&'p Object<'p>> {
        match self.value {
            PickleValue::Object(i) => self.pickle.objects.get(i as usize),
            _ => None,
        }
    }

    /// Tells the object apart from others, where the value is one: several places may have the same.
    pub fn object_id(self) -> Option<u32> {
        match self.value {
            PickleValue::Object(i) => Some(i),
            _ => None,
        }
    }

    pub fn is_none(self) -> bool {
        self.value == PickleValue::None
    }

    pub fn integer(self) -> Option<i64> {
        match self.value {
            PickleValue::Int(i) => Some(i),
            _ => None,
        }
    }

    /// A floating-point number, or an integer.
    pub fn number(self) -> Option<f64> {
        match self.value {
            PickleValue::Float(x) => Some(x),
            PickleValue::Int(i) => Some(i as f64),
            _ => None,
        }
    }

    pub fn truth(self) -> Option<bool> {
        match self.value {
            PickleValue::Bool(b) => Some(b),
            _ => None,
        }
    }

    pub fn text(self) -> Option<&'p str> {
        match self.value {
            PickleValue::Str(text) => Some(text),
            _ => None,
        }
    }

    pub fn tensor(self) -> Option<&'p TensorRef> {
        match self.object() {
            Some(Object::Tensor(tensor)) => Some(tensor),
            _ => None,
        }
    }

    /// Whether it is a dictionary.
    pub fn is_dict(self) -> bool {
        matches!(self.object(), Some(Object::Dict(_)))
    }

    /// Keys and values of a dictionary, in its order; none of anything else.
    pub fn entries(self) -> impl Iterator<Item = (PickleNode<'p>, PickleNode<'p>)> {
        let entries: &'p [(PickleValue<'p>, PickleValue<'p>)] = match self.object() {
            Some(Object::Dict(entries)) => entries,
            _ => &[],
        };
        entries.iter().map(move |(key, value)| (self.at(*key), self.at(*value)))
    }

    /// The last value under this key of a dictionary.
    pub fn get(self, key: &str) -> Option<PickleNode<'p>> {
        self.entries().filter(|(k, _)| k.text() == Some(key)).last().map(|(_, value)| value)
    }

    /// The items of a tuple or a list; none of anything else.
    pub fn items(self) -> impl Iterator<Item = PickleNode<'p>> {
        let items: &'p [PickleValue<'p>] = match self.object() {
            Some(Object::Tuple(items) | Object::List(items)) => items,
            _ => &[],
        };
        items.iter().map(move |item| self.at(*item))
    }

    /// Module and name of a foreign class or function, or of the class of a foreign object.
    pub fn foreign_name(self) -> Option<(&'p str, &'p str)> {
        let class = match (self.value, self.object()) {
            (PickleValue::Global(PickleGlobal::Foreign(class)), _) => class,
            (_, Some(Object::Instance { class, .. })) => *class,
            _ => return None,
        };
        self.pickle.names.get(class as usize).copied()
    }

    /// What a foreign object was made of: the arguments of its class.
    pub fn args(self) -> impl Iterator<Item = PickleNode<'p>> {
        let args = match self.object() {
            Some(Object::Instance { args: Some(args), .. }) => PickleValue::Object(*args),
            _ => PickleValue::None,
        };
        self.at(args).items()
    }

    /// The state of a foreign object: mostly a dictionary of its fields.
    pub fn state(self) -> Option<PickleNode<'p>> {
        match self.object() {
            Some(Object::Instance { state: Some(state), .. }) => Some(self.at(*state)),
            _ => None,
        }
    }

    /// What it is, for errors.
    pub fn describe(self) -> String {
        machine::describe(&self.pickle.objects, &self.pickle.names, self.value)
    }
}

/// Reads the pickle of a state dict: a dictionary of tensors by name, in its order. The error says what is wrong.
pub fn state_dict(pickle: &[u8]) -> Result<Vec<(String, TensorRef)>, String> {
    let read = Pickle::read(pickle, Foreign::Refused)?;
    let top = read.top();
    if !top.is_dict() {
        return Err(format!("holds {}, not a dictionary of tensors", top.describe()));
    }
    let mut tensors = Vec::new();
    for (key, value) in top.entries() {
        let name = match key.text() {
            Some(name) if name.len() <= MAX_NAME => name,
            _ => return Err(format!("a key of its dictionary is {}, not a name", key.describe())),
        };
        match value.tensor() {
            Some(tensor) => tensors.push((name.to_string(), tensor.clone())),
            None => {
                return Err(format!(
                    "`{}` is {}, not a tensor; save the plain state dict of the model",
                    clean(name),
                    value.describe()
                ));
            }
        }
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests;
