//! Jinja as chat templates use it, with the values and operators of Python: what `jinja2`'s immutable sandbox renders with
//! `trim_blocks`, `lstrip_blocks` and loop controls. A construct that is not built is refused by its name.
//!
//! `lexer` makes tokens, `parser` and `expressions` the tree of `tree`, `machine` and `evaluation` run it; `value` has
//! Python's values, `operators` what can be computed with them, `methods`, `filters`, `checks` (Jinja's tests) and
//! `functions` what can be called.

mod access;
mod arguments;
mod checks;
mod evaluation;
mod expressions;
mod filters;
mod format;
mod functions;
mod json;
mod lexer;
mod lists;
mod machine;
mod methods;
mod numbers;
mod operators;
mod parser;
mod text;
mod tree;
mod value;

use std::sync::Arc;

pub use functions::Clock;
pub use value::{Dict, JinjaValue};

/// What stands around the text of a `{% generation %}` block while it is rendered: no character of any text.
pub const OPEN: &str = "\u{fdd0}generation\u{fdd1}";
pub const CLOSE: &str = "\u{fdd0}endgeneration\u{fdd1}";

/// Why a template cannot be read or rendered, and at which of its lines.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    pub line: Option<usize>,
    pub message: String,
}

impl Failure {
    fn new(message: impl Into<String>) -> Failure {
        Failure { line: None, message: message.into() }
    }

    fn at(line: usize, message: impl Into<String>) -> Failure {
        Failure { line: Some(line), message: message.into() }
    }
}

type RenderResult<T> = Result<T, Failure>;

/// Shorthand for an error.
fn fail<T>(message: impl Into<String>) -> RenderResult<T> {
    Err(Failure::new(message))
}

/// A template that was read.
#[derive(Debug, Clone)]
pub struct Template {
    body: Arc<tree::Body>,
    /// Whether it has `{% generation %}` blocks.
    pub marks: bool,
}

impl Template {
    /// # Errors
    /// The text is no Jinja, or uses a statement that is not built (`include`, `extends`, ...).
    pub fn new(source: &str) -> Result<Template, Failure> {
        let parsed = parser::parse(source)?;
        Ok(Template { body: Arc::new(parsed.body), marks: parsed.marks })
    }

    /// The text that the template makes of these variables. `clock` is what `strftime_now` tells.
    pub fn render(&self, variables: Dict, clock: Clock) -> Result<String, Failure> {
        machine::run(&self.body, variables, clock)
    }
}

#[cfg(test)]
mod tests;
