//! Python's values.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use super::functions::Function;
use super::machine::{LoopState, MacroValue};
use super::{Failure, RenderResult, fail, numbers, operators, text};

#[derive(Clone)]
pub enum JinjaValue {
    /// Why there is no value.
    Undefined(Rc<str>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Rc<str>),
    /// Text that counts as HTML (`safe`, `escape`).
    Markup(Rc<str>),
    List(Rc<Vec<JinjaValue>>),
    Tuple(Rc<Vec<JinjaValue>>),
    /// Of `groupby`: a pair whose items are called `grouper` and `list`.
    Group(Rc<Vec<JinjaValue>>),
    Dict(Rc<Dict>),
    Range(Range),
    /// `items()`, `keys()` or `values()` of a dict.
    View(&'static str, Rc<Vec<JinjaValue>>),
    /// What gives each of its values once; its type's name.
    Iterator(&'static str, Rc<RefCell<std::vec::IntoIter<JinjaValue>>>),
    Namespace(Rc<RefCell<Dict>>),
    Loop(Rc<LoopState>),
    Macro(Rc<MacroValue>),
    Function(Function),
    Method(Rc<(JinjaValue, Rc<str>)>),
    Cycler(Rc<(Vec<JinjaValue>, Cell<usize>)>),
    /// The separator, and whether it was called before.
    Joiner(Rc<(JinjaValue, Cell<bool>)>),
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
    pub items: Vec<(JinjaValue, JinjaValue)>,
}

impl Dict {
    /// By a name.
    pub fn name(&self, name: &str) -> Option<&JinjaValue> {
        self.items.iter().find(|(key, _)| key.as_str() == Some(name)).map(|(_, value)| value)
    }

    pub fn set_name(&mut self, name: &str, value: JinjaValue) {
        match self.items.iter_mut().find(|(key, _)| key.as_str() == Some(name)) {
            Some((_, old)) => *old = value,
            None => self.items.push((JinjaValue::from(name), value)),
        }
    }

    pub fn get(&self, key: &JinjaValue) -> RenderResult<Option<&JinjaValue>> {
        hashable(key)?;
        if let Some(name) = key.as_str() {
            return Ok(self.name(name));
        }
        Ok(self.items.iter().find(|(k, _)| operators::equal(k, key)).map(|(_, value)| value))
    }

    pub fn set(&mut self, key: JinjaValue, value: JinjaValue) -> RenderResult<()> {
        hashable(&key)?;
        match self.items.iter_mut().find(|(k, _)| operators::equal(k, &key)) {
            Some((_, old)) => *old = value,
            None => self.items.push((key, value)),
        }
        Ok(())
    }
}

/// Refuses what Python cannot have as a key.
pub fn hashable(value: &JinjaValue) -> RenderResult<()> {
    match value {
        JinjaValue::List(_) | JinjaValue::Dict(_) => {
            fail(format!("unhashable type: '{}'", value.type_name()))
        }
        JinjaValue::Tuple(items) | JinjaValue::Group(items) => items.iter().try_for_each(hashable),
        _ => Ok(()),
    }
}

impl From<&str> for JinjaValue {
    fn from(text: &str) -> JinjaValue {
        JinjaValue::Str(text.into())
    }
}

impl From<String> for JinjaValue {
    fn from(text: String) -> JinjaValue {
        JinjaValue::Str(text.into())
    }
}

impl From<&Arc<str>> for JinjaValue {
    fn from(text: &Arc<str>) -> JinjaValue {
        JinjaValue::Str(Rc::from(&**text))
    }
}

impl From<Dict> for JinjaValue {
    fn from(dict: Dict) -> JinjaValue {
        JinjaValue::Dict(Rc::new(dict))
    }
}

impl From<bool> for JinjaValue {
    fn from(value: bool) -> JinjaValue {
        JinjaValue::Bool(value)
    }
}

impl From<usize> for JinjaValue {
    fn from(n: usize) -> JinjaValue {
        JinjaValue::Int(n as i128)
    }
}

impl From<&serde_json::Value> for JinjaValue {
    fn from(value: &serde_json::Value) -> JinjaValue {
        use serde_json::Value as Json;
        match value {
            Json::Null => JinjaValue::None,
            Json::Bool(b) => JinjaValue::Bool(*b),
            Json::Number(n) => match (n.as_i64(), n.as_u64()) {
                (Some(n), _) => JinjaValue::Int(n.into()),
                (_, Some(n)) => JinjaValue::Int(n.into()),
                _ => JinjaValue::Float(n.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(text) => text.as_str().into(),
            Json::Array(items) => JinjaValue::list(items.iter().map(JinjaValue::from).collect()),
            Json::Object(map) => {
                let items =
                    map.iter().map(|(key, value)| (JinjaValue::from(key.as_str()), JinjaValue::from(value)));
                JinjaValue::Dict(Rc::new(Dict { items: items.collect() }))
            }
        }
    }
}

impl JinjaValue {
    pub fn list(items: Vec<JinjaValue>) -> JinjaValue {
        JinjaValue::List(Rc::new(items))
    }

    pub fn tuple(items: Vec<JinjaValue>) -> JinjaValue {
        JinjaValue::Tuple(Rc::new(items))
    }

    pub fn generator(items: Vec<JinjaValue>) -> JinjaValue {
        JinjaValue::iterator("generator", items)
    }

    pub fn iterator(kind: &'static str, items: Vec<JinjaValue>) -> JinjaValue {
        JinjaValue::Iterator(kind, Rc::new(RefCell::new(items.into_iter())))
    }

    pub fn undefined(why: impl AsRef<str>) -> JinjaValue {
        JinjaValue::Undefined(why.as_ref().into())
    }

    pub fn is_undefined(&self) -> bool {
        matches!(self, JinjaValue::Undefined(_))
    }

    /// A text, marked as HTML or not.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            JinjaValue::Str(text) | JinjaValue::Markup(text) => Some(text),
            _ => None,
        }
    }

    /// A whole number; true and false are 1 and 0.
    pub fn as_int(&self) -> Option<i128> {
        match self {
            JinjaValue::Int(n) => Some(*n),
            JinjaValue::Bool(b) => Some(i128::from(*b)),
            _ => None,
        }
    }

    /// The items of a list or tuple.
    pub fn as_items(&self) -> Option<&Rc<Vec<JinjaValue>>> {
        match self {
            JinjaValue::List(items) | JinjaValue::Tuple(items) | JinjaValue::Group(items) => Some(items),
            _ => None,
        }
    }

    pub fn is_true(&self) -> bool {
        match self {
            JinjaValue::Undefined(_) | JinjaValue::None => false,
            JinjaValue::Bool(b) => *b,
            JinjaValue::Int(n) => *n != 0,
            JinjaValue::Float(x) => *x != 0.0,
            JinjaValue::Str(text) | JinjaValue::Markup(text) => !text.is_empty(),
            JinjaValue::List(items)
            | JinjaValue::Tuple(items)
            | JinjaValue::Group(items)
            | JinjaValue::View(_, items) => !items.is_empty(),
            JinjaValue::Dict(dict) => !dict.items.is_empty(),
            JinjaValue::Range(range) => range.len() > 0,
            _ => true,
        }
    }

    /// The name of its type in Python.
    pub fn type_name(&self) -> &'static str {
        match self {
            JinjaValue::Undefined(_) => "Undefined",
            JinjaValue::None => "NoneType",
            JinjaValue::Bool(_) => "bool",
            JinjaValue::Int(_) => "int",
            JinjaValue::Float(_) => "float",
            JinjaValue::Str(_) => "str",
            JinjaValue::Markup(_) => "Markup",
            JinjaValue::List(_) => "list",
            JinjaValue::Tuple(_) => "tuple",
            JinjaValue::Group(_) => "_GroupTuple",
            JinjaValue::Dict(_) => "dict",
            JinjaValue::Range(_) => "range",
            JinjaValue::View(kind, _) | JinjaValue::Iterator(kind, _) => kind,
            JinjaValue::Namespace(_) => "Namespace",
            JinjaValue::Loop(_) => "LoopContext",
            JinjaValue::Macro(_) => "Macro",
            JinjaValue::Function(_) => "function",
            JinjaValue::Method(_) => "builtin_function_or_method",
            JinjaValue::Cycler(_) => "Cycler",
            JinjaValue::Joiner(_) => "Joiner",
        }
    }

    /// `len(value)`
    pub fn len(&self) -> RenderResult<usize> {
        Ok(match self {
            JinjaValue::Undefined(_) => 0,
            JinjaValue::Str(text) | JinjaValue::Markup(text) => text.chars().count(),
            JinjaValue::List(items)
            | JinjaValue::Tuple(items)
            | JinjaValue::Group(items)
            | JinjaValue::View(_, items) => items.len(),
            JinjaValue::Dict(dict) => dict.items.len(),
            JinjaValue::Range(range) => range.len() as usize,
            JinjaValue::Loop(state) => state.length(),
            _ => return fail(format!("object of type '{}' has no len()", self.type_name())),
        })
    }

    /// Whether it can be iterated over.
    pub fn is_iterable(&self) -> bool {
        use JinjaValue::*;
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
    pub fn items(&self) -> RenderResult<Vec<JinjaValue>> {
        Ok(match self {
            JinjaValue::Undefined(_) => Vec::new(),
            JinjaValue::Str(text) | JinjaValue::Markup(text) => {
                text.chars().map(|c| JinjaValue::from(c.encode_utf8(&mut [0; 4]) as &str)).collect()
            }
            JinjaValue::List(items)
            | JinjaValue::Tuple(items)
            | JinjaValue::Group(items)
            | JinjaValue::View(_, items) => items.to_vec(),
            JinjaValue::Dict(dict) => dict.items.iter().map(|(key, _)| key.clone()).collect(),
            JinjaValue::Range(range) => range.numbers().map(JinjaValue::Int).collect(),
            JinjaValue::Iterator(_, rest) => rest.borrow_mut().by_ref().collect(),
            _ => return fail(format!("'{}' object is not iterable", self.type_name())),
        })
    }

    /// Whether lists and dicts in it lie at most so deep.
    pub fn is_within(&self, depth: usize) -> bool {
        let all = |items: &[JinjaValue]| depth > 0 && items.iter().all(|item| item.is_within(depth - 1));
        match self {
            JinjaValue::List(items)
            | JinjaValue::Tuple(items)
            | JinjaValue::Group(items)
            | JinjaValue::View(_, items) => all(items),
            JinjaValue::Dict(dict) => {
                depth > 0 && dict.items.iter().all(|(_, value)| value.is_within(depth - 1))
            }
            _ => true,
        }
    }

    /// `str(value)`
    pub fn to_text(&self) -> RenderResult<Rc<str>> {
        Ok(match self {
            JinjaValue::Str(text) | JinjaValue::Markup(text) => text.clone(),
            JinjaValue::Undefined(_) => "".into(),
            _ => self.repr()?.into(),
        })
    }

    /// `repr(value)`
    pub fn repr(&self) -> RenderResult<String> {
        let mut out = String::new();
        self.write_repr(&mut out, 0)?;
        Ok(out)
    }

    fn write_repr(&self, out: &mut String, depth: usize) -> RenderResult<()> {
        if depth > 100 {
            return fail("a value is nested too deeply to be written");
        }
        let list = |out: &mut String, items: &[JinjaValue], brackets: [&str; 2]| -> RenderResult<()> {
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
            JinjaValue::Undefined(_) => *out += "Undefined",
            JinjaValue::None => *out += "None",
            JinjaValue::Bool(b) => *out += if *b { "True" } else { "False" },
            JinjaValue::Int(n) => *out += &n.to_string(),
            JinjaValue::Float(x) => *out += &numbers::repr(*x),
            JinjaValue::Str(text) => *out += &text::repr(text),
            JinjaValue::Markup(text) => *out += &format!("Markup({})", text::repr(text)),
            JinjaValue::List(items) => list(out, items, ["[", "]"])?,
            JinjaValue::Tuple(items) | JinjaValue::Group(items) if items.len() == 1 => {
                list(out, items, ["(", ",)"])?
            }
            JinjaValue::Tuple(items) | JinjaValue::Group(items) => list(out, items, ["(", ")"])?,
            JinjaValue::Dict(dict) => dict.write_repr(out, depth)?,
            JinjaValue::Range(Range { start, stop, step: 1 }) => *out += &format!("range({start}, {stop})"),
            JinjaValue::Range(Range { start, stop, step }) => {
                *out += &format!("range({start}, {stop}, {step})")
            }
            JinjaValue::View(kind, items) => {
                *out += kind;
                list(out, items, ["([", "])"])?;
            }
            JinjaValue::Namespace(dict) => {
                *out += "<Namespace ";
                dict.borrow().write_repr(out, depth)?;
                out.push('>');
            }
            JinjaValue::Loop(state) => {
                *out += &format!("<LoopContext {}/{}>", state.index.get() + 1, state.length())
            }
            JinjaValue::Macro(value) => *out += &format!("<Macro {}>", text::repr(&value.node.name)),
            _ => {
                let hint =
                    if matches!(self, JinjaValue::Iterator(..)) { "; put `| list` behind it" } else { "" };
                return fail(format!("a {} cannot be written as text{hint}", self.type_name()));
            }
        }
        Ok(())
    }
}

impl Dict {
    fn write_repr(&self, out: &mut String, depth: usize) -> RenderResult<()> {
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
pub fn defined(value: &JinjaValue) -> RenderResult<()> {
    match value {
        JinjaValue::Undefined(why) => Err(Failure::new(&**why)),
        _ => Ok(()),
    }
}
