//! The arguments of a call.

use super::tree::Name;
use super::value::Value;
use super::{Outcome, fail};

#[derive(Default)]
pub struct Args {
    pub positional: Vec<Value>,
    pub named: Vec<(Name, Value)>,
}

impl Args {
    pub fn is_empty(&self) -> bool {
        self.positional.is_empty() && self.named.is_empty()
    }

    /// The arguments of `what` by the names of its parameters.
    pub fn bind<const N: usize>(self, what: &str, params: [&str; N]) -> Outcome<[Option<Value>; N]> {
        let mut bound = [const { None }; N];
        if self.positional.len() > N {
            return fail(format!("{what} takes at most {N} arguments, not {}", self.positional.len()));
        }
        for (place, value) in bound.iter_mut().zip(self.positional) {
            *place = Some(value);
        }
        for (name, value) in self.named {
            let Some(i) = params.iter().position(|param| *param == &*name) else {
                return fail(format!("{what} has no argument '{name}'"));
            };
            if bound[i].replace(value).is_some() {
                return fail(format!("{what} has two values for the argument '{name}'"));
            }
        }
        Ok(bound)
    }

    /// Refuses arguments.
    pub fn none(&self, what: &str) -> Outcome<()> {
        if self.is_empty() { Ok(()) } else { fail(format!("{what} takes no arguments")) }
    }
}

/// An argument that must be there.
pub fn required(what: &str, name: &str, value: Option<Value>) -> Outcome<Value> {
    match value {
        Some(value) => Ok(value),
        None => fail(format!("{what} needs the argument '{name}'")),
    }
}

pub fn int(what: &str, value: &Value) -> Outcome<i128> {
    match value.as_int() {
        Some(n) => Ok(n),
        None => fail(format!("{what} needs a whole number, not '{}'", value.type_name())),
    }
}

pub fn text<'a>(what: &str, value: &'a Value) -> Outcome<&'a str> {
    match value.as_str() {
        Some(text) => Ok(text),
        None => fail(format!("{what} needs a text, not '{}'", value.type_name())),
    }
}
