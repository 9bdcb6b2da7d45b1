//! Python's values.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::functions::Function;
use super::machine::{LoopState, MacroValue};
use super::{Failure, Outcome, fail, numbers, operators, text};

#[derive(Clone)]
pub enum Value {
    /// Why there is no value.
    Undefined(Rc<str>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Rc<str>),
    /// Text that counts as HTML (`safe`, `escape`).
    Markup(Rc<str>),
    List(Rc<Vec<Value>>),
    Tuple(Rc<Vec<Value>>),
    /// Of `groupby`: a pair whose items are called `grouper` and `list`.
    Group(Rc<Vec<Value>>),
    Dict(Rc<Dict>),
    Range(Range),
    /// `items()`, `keys()` or `values()` of a dict.
    View(&'static str, Rc<Vec<Value>>),
    /// What gives each of its values once; its type's name.
    Iterator(&'static str, Rc<RefCell<std::vec::IntoIter<Value>>>),
    Namespace(Rc<RefCell<Dict>>),
    Loop(Rc<LoopState>),
    Macro(Rc<MacroValue>),
    Function(Function),
    Method(Rc<(Value, Rc<str>)>),
    Cycler(Rc<(Vec<Value>, Cell<usize>)>),
    /// The separator, and whether it was called before.
    Joiner(Rc<(Value, Cell<bool>)>),
}

/// `range(start, stop, step)`
#[derive(Clone, Copy, PartialEq)]
pub struct Range {
    pub start: i128,
    pub stop: i128,
    pub step: i128,
}

impl Range {
    pub fn len(&self) -> i128 {
        let span = if self.step > 0 { self.stop - self.start } else { self.start - self.stop };
        if span <= 0 { 0 } else { (span - 1) / self.step.abs() + 1 }
    }

    pub fn numbers(self) -> impl Iterator<Item = i128> {
        (0..self.len()).map(move |i| self.start + i * self.step)
    }
}

/// A dict, in the order of its insertions.
#[derive(Clone, Default)]
pub struct Dict {
    pub items: Vec<(Value, Value)>,
}

impl Dict {
    /// By a name.
    pub fn name(&self, name: &str) -> Option<&Value> {
        self.items.iter().find(|(key, _)| key.as_str() == Some(name)).map(|(_, value)| value)
    }

    pub fn set_name(&mut self, name: &str, value: Value) {
        match self.items.iter_mut().find(|(key, _)| key.as_str() == Some(name)) {
            Some((_, old)) => *old = value,
            None => self.items.push((Value::from(name), value)),
        }
    }

    pub fn get(&self, key: &Value) -> Outcome<Option<&Value>> {
        hashable(key)?;
        if let Some(name) = key.as_str() {
            return Ok(self.name(name));
        }
        Ok(self.items.iter().find(|(k, _)| operators::equal(k, key)).map(|(_, value)| value))
    }

    pub fn set(&mut self, key: Value, value: Value) -> Outcome<()> {
        hashable(&key)?;
        match self.items.iter_mut().find(|(k, _)| operators::equal(k, &key)) {
            Some((_, old)) => *old = value,
            None => self.items.push((key, value)),
        }
        Ok(())
    }
}

/// Refuses what Python cannot have as a key.
pub fn hashable(value: &Value) -> Outcome<()> {
    match value {
        Value::List(_) | Value::Dict(_) => fail(format!("unhashable type: '{}'", value.type_name())),
        Value::Tuple(items) | Value::Group(items) => items.iter().try_for_each(hashable),
        _ => Ok(()),
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::Str(text.into())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Value {
        Value::Str(text.into())
    }
}

impl From<&Arc<str>> for Value {
    fn from(text: &Arc<str>) -> Value {
        Value::Str(Rc::from(&**text))
    }
}

impl From<Dict> for Value {
    fn from(dict: Dict) -> Value {
        Value::Dict(Rc::new(dict))
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Value {
        Value::Bool(value)
    }
}

impl From<usize> for Value {
    fn from(n: usize) -> Value {
        Value::Int(n as i128)
    }
}

impl From<&serde_json::Value> for Value {
    fn from(value: &serde_json::Value) -> Value {
        use serde_json::Value as Json;
        match value {
            Json::Null => Value::None,
            Json::Bool(b) => Value::Bool(*b),
            Json::Number(n) => match (n.as_i64(), n.as_u64()) {
                (Some(n), _) => Value::Int(n.into()),
                (_, Some(n)) => Value::Int(n.into()),
                _ => Value::Float(n.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(text) => text.as_str().into(),
            Json::Array(items) => Value::list(items.iter().map(Value::from).collect()),
            Json::Object(map) => {
                let items = map.iter().map(|(key, value)| (Value::from(key.as_str()), Value::from(value)));
                Value::Dict(Rc::new(Dict { items: items.collect() }))
            }
        }
    }
}

impl Value {
    pub fn list(items: Vec<Value>) -> Value {
        Value::List(Rc::new(items))
    }

    pub fn tuple(items: Vec<Value>) -> Value {
        Value::Tuple(Rc::new(items))
    }

    pub fn generator(items: Vec<Value>) -> Value {
        Value::iterator("generator", items)
    }

    pub fn iterator(kind: &'static str, items: Vec<Value>) -> Value {
        Value::Iterator(kind, Rc::new(RefCell::new(items.into_iter())))
    }

    pub fn undefined(why: impl AsRef<str>) -> Value {
        Value::Undefined(why.as_ref().into())
    }

    pub fn is_undefined(&self) -> bool {
        matches!(self, Value::Undefined(_))
    }

    /// A text, marked as HTML or not.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Value::Str(text) | Value::Markup(text) => Some(text),
            _ => None,
        }
    }

    /// A whole number; true and false are 1 and 0.
    pub fn as_int(&self) -> Option<i128> {
        match self {
            Value::Int(n) => Some(*n),
            Value::Bool(b) => Some(i128::from(*b)),
            _ => None,
        }
    }

    /// The items of a list or tuple.
    pub fn as_items(&self) -> Option<&Rc<Vec<Value>>> {
        match self {
            Value::List(items) | Value::Tuple(items) | Value::Group(items) => Some(items),
            _ => None,
        }
    }

    pub fn is_true(&self) -> bool {
        match self {
            Value::Undefined(_) | Value::None => false,
            Value::Bool(b) => *b,
            Value::Int(n) => *n != 0,
            Value::Float(x) => *x != 0.0,
            Value::Str(text) | Value::Markup(text) => !text.is_empty(),
            Value::List(items) | Value::Tuple(items) | Value::Group(items) | Value::View(_, items) => {
                !items.is_empty()
            }
            Value::Dict(dict) => !dict.items.is_empty(),
            Value::Range(range) => range.len() > 0,
            _ => true,
        }
    }

    /// The name of its type in Python.
    pub fn type_name(&self) -> &'static str {
        match self {
            Value::Undefined(_) => "Undefined",
            Value::None => "NoneType",
            Value::Bool(_) => "bool",
            Value::Int(_) => "int",
            Value::Float(_) => "float",
            Value::Str(_) => "str",
            Value::Markup(_) => "Markup",
            Value::List(_) => "list",
            Value::Tuple(_) => "tuple",
            Value::Group(_) => "_GroupTuple",
            Value::Dict(_) => "dict",
            Value::Range(_) => "range",
            Value::View(kind, _) | Value::Iterator(kind, _) => kind,
            Value::Namespace(_) => "Namespace",
            Value::Loop(_) => "LoopContext",
            Value::Macro(_) => "Macro",
            Value::Function(_) => "function",
            Value::Method(_) => "builtin_function_or_method",
            Value::Cycler(_) => "Cycler",
            Value::Joiner(_) => "Joiner",
        }
    }

    /// `len(value)`
    pub fn len(&self) -> Outcome<usize> {
        Ok(match self {
            Value::Undefined(_) => 0,
            Value::Str(text) | Value::Markup(text) => text.chars().count(),
            Value::List(items) | Value::Tuple(items) | Value::Group(items) | Value::View(_, items) => {
                items.len()
            }
            Value::Dict(dict) => dict.items.len(),
            Value::Range(range) => range.len() as usize,
            Value::Loop(state) => state.length(),
            _ => return fail(format!("object of type '{}' has no len()", self.type_name())),
        })
    }

    /// Whether it can be iterated over.
    pub fn is_iterable(&self) -> bool {
        use Value::*;
        matches!(
            self,
            Undefined(_)
                | Str(_)
                | Markup(_)
                | List(_)
                | Tuple(_)
                | Group(_)
                | Dict(_)
                | Range(_)
                | View(..)
                | Iterator(..)
        )
    }

    /// All that it iterates over; an iterator has nothing left then.
    pub fn items(&self) -> Outcome<Vec<Value>> {
        Ok(match self {
            Value::Undefined(_) => Vec::new(),
            Value::Str(text) | Value::Markup(text) => {
                text.chars().map(|c| Value::from(c.encode_utf8(&mut [0; 4]) as &str)).collect()
            }
            Value::List(items) | Value::Tuple(items) | Value::Group(items) | Value::View(_, items) => {
                items.to_vec()
            }
            Value::Dict(dict) => dict.items.iter().map(|(key, _)| key.clone()).collect(),
            Value::Range(range) => range.numbers().map(Value::Int).collect(),
            Value::Iterator(_, rest) => rest.borrow_mut().by_ref().collect(),
            _ => return fail(format!("'{}' object is not iterable", self.type_name())),
        })
    }

    /// Whether lists and dicts in it lie at most so deep.
    pub fn is_within(&self, depth: usize) -> bool {
        let all = |items: &[Value]| depth > 0 && items.iter().all(|item| item.is_within(depth - 1));
        match self {
            Value::List(items) | Value::Tuple(items) | Value::Group(items) | Value::View(_, items) => {
                all(items)
            }
            Value::Dict(dict) => depth > 0 && dict.items.iter().all(|(_, value)| value.is_within(depth - 1)),
            _ => true,
        }
    }

    /// `str(value)`
    pub fn to_text(&self) -> Outcome<Rc<str>> {
        Ok(match self {
            Value::Str(text) | Value::Markup(text) => text.clone(),
            Value::Undefined(_) => "".into(),
            _ => self.repr()?.into(),
        })
    }

    /// `repr(value)`
    pub fn repr(&self) -> Outcome<String> {
        let mut out = String::new();
        self.write_repr(&mut out, 0)?;
        Ok(out)
    }

    fn write_repr(&self, out: &mut String, depth: usize) -> Outcome<()> {
        if depth > 100 {
            return fail("a value is nested too deeply to be written");
        }
        let list = |out: &mut String, items: &[Value], brackets: [&str; 2]| -> Outcome<()> {
            *out += brackets[0];
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    *out += ", ";
                }
                item.write_repr(out, depth + 1)?;
            }
            *out += brackets[1];
            Ok(())
        };
        match self {
            Value::Undefined(_) => *out += "Undefined",
            Value::None => *out += "None",
            Value::Bool(b) => *out += if *b { "True" } else { "False" },
            Value::Int(n) => *out += &n.to_string(),
            Value::Float(x) => *out += &numbers::repr(*x),
            Value::Str(text) => *out += &text::repr(text),
            Value::Markup(text) => *out += &format!("Markup({})", text::repr(text)),
            Value::List(items) => list(out, items, ["[", "]"])?,
            Value::Tuple(items) | Value::Group(items) if items.len() == 1 => list(out, items, ["(", ",)"])?,
            Value::Tuple(items) | Value::Group(items) => list(out, items, ["(", ")"])?,
            Value::Dict(dict) => dict.write_repr(out, depth)?,
            Value::Range(Range { start, stop, step: 1 }) => *out += &format!("range({start}, {stop})"),
            Value::Range(Range { start, stop, step }) => *out += &format!("range({start}, {stop}, {step})"),
            Value::View(kind, items) => {
                *out += kind;
                list(out, items, ["([", "])"])?;
            }
            Value::Namespace(dict) => {
                *out += "<Namespace ";
                dict.borrow().write_repr(out, depth)?;
                out.push('>');
            }
            Value::Loop(state) => {
                *out += &format!("<LoopContext {}/{}>", state.index.get() + 1, state.length())
            }
            Value::Macro(value) => *out += &format!("<Macro {}>", text::repr(&value.node.name)),
            _ => {
                let hint = if matches!(self, Value::Iterator(..)) { "; put `| list` behind it" } else { "" };
                return fail(format!("a {} cannot be written as text{hint}", self.type_name()));
            }
        }
        Ok(())
    }
}

impl Dict {
    fn write_repr(&self, out: &mut String, depth: usize) -> Outcome<()> {
        out.push('{');
        for (i, (key, value)) in self.items.iter().enumerate() {
            if i > 0 {
                *out += ", ";
            }
            key.write_repr(out, depth + 1)?;
            *out += ": ";
            value.write_repr(out, depth + 1)?;
        }
        out.push('}');
        Ok(())
    }
}

/// Refuses what has no value.
pub fn defined(value: &Value) -> Outcome<()> {
    match value {
        Value::Undefined(why) => Err(Failure::new(&**why)),
        _ => Ok(()),
    }
}
