//! The arguments of a call.

use super::tree::Name;
use super::value::JinjaValue;
use super::{RenderResult, fail};

#[derive(Default)]
pub struct CallArguments {
    pub positional: Vec<JinjaValue>,
    pub named: Vec<(Name, JinjaValue)>,
}

impl CallArguments {
    pub fn is_empty(&self) -> bool {
        self.positional.is_empty() && self.named.is_empty()
    }

    /// The arguments of `what` by the names of its parameters.
    pub fn bind<const N: usize>(
        self,
        what: &str,
        params: [&str; N],
    ) -> RenderResult<[Option<JinjaValue>; N]> {
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
    pub fn none(&self, what: &str) -> RenderResult<()> {
        if self.is_empty() { Ok(()) } else { fail(format!("{what} takes no arguments")) }
    }
}

/// An argument that must be there.
pub fn required(what: &str, name: &str, value: Option<JinjaValue>) -> RenderResult<JinjaValue> {
    match value {
        Some(value) => Ok(value),
        None => fail(format!("{what} needs the argument '{name}'")),
    }
}

pub fn int(what: &str, value: &JinjaValue) -> RenderResult<i128> {
    match value.as_int() {
        Some(n) => Ok(n),
        None => fail(format!("{what} needs a whole number, not '{}'", value.type_name())),
    }
}

pub fn text<'a>(what: &str, value: &'a JinjaValue) -> RenderResult<&'a str> {
    match value.as_str() {
        Some(text) => Ok(text),
        None => fail(format!("{what} needs a text, not '{}'", value.type_name())),
    }
}
