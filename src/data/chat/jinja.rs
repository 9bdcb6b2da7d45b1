//! A chat template, rendered as transformers renders it (`utils/chat_template_utils.py`).

use std::ops::Range;

use chrono::NaiveTime;
use serde_json::{Map, Value as Json};

use crate::config::template_date::TemplateDate;
use crate::data::jinja::{CLOSE, Dict, Failure, JinjaValue, OPEN, Template};
use crate::data::tokenizer::ChatTemplate;
use crate::error::{Error, Result};

/// A template that was read, and what it may write besides messages.
pub(super) struct Jinja {
    template: Template,
    /// Names and texts of the special tokens.
    tokens: Vec<(&'static str, String)>,
    pub place: String,
    /// Whether it marks the assistant's turns.
    pub marks: bool,
    date: TemplateDate,
}

/// A rendered conversation, and the byte ranges that `{% generation %}` marks.
pub(super) struct Rendered {
    pub text: String,
    pub marked: Vec<Range<usize>>,
}

impl Jinja {
    /// `date` is what `strftime_now` tells, at midnight, and, where the user gave it, what `date_string` is.
    pub fn new(
        template: &ChatTemplate,
        tokens: Vec<(&'static str, String)>,
        date: TemplateDate,
    ) -> Result<Jinja> {
        let place = template.place.clone();
        let read = Template::new(&template.source).map_err(|e| error(&place, e))?;
        Ok(Jinja { marks: read.marks, template: read, tokens, place, date })
    }

    /// Renders with the variables that a dialogue gives; `add_generation_prompt`: with the beginning of the answer to it.
    pub fn render(&self, dialogue: Map<String, Json>, add_generation_prompt: bool) -> Result<Rendered> {
        if self.marks && dialogue.values().any(has_mark) {
            return Err(Error::data("a message has the code point U+FDD0, which is not a character"));
        }
        let mut variables = Dict::default();
        for (name, text) in &self.tokens {
            variables.set_name(name, text.as_str().into());
        }
        variables.set_name("add_generation_prompt", add_generation_prompt.into());
        let TemplateDate { date, given } = self.date;
        if given {
            // As Llama's templates write it.
            variables.set_name("date_string", date.format("%d %b %Y").to_string().into());
        }
        // After the special tokens and the date, as what a record gives counts.
        for (name, value) in &dialogue {
            variables.set_name(name, JinjaValue::from(value));
        }
        let rendered = self.template.render(variables, date.and_time(NaiveTime::MIN));
        let rendered = rendered.map_err(|e| error(&self.place, e))?;
        Ok(unmarked(&rendered))
    }
}

/// Whether a text within the value has the first code point of the marks.
fn has_mark(value: &Json) -> bool {
    match value {
        Json::String(text) => text.contains('\u{fdd0}'),
        Json::Array(list) => list.iter().any(has_mark),
        Json::Object(fields) => fields.iter().any(|(key, v)| key.contains('\u{fdd0}') || has_mark(v)),
        _ => false,
    }
}

/// The text without its marks, and where they were.
fn unmarked(rendered: &str) -> Rendered {
    let mut text = String::with_capacity(rendered.len());
    let mut marked = Vec::new();
    for (i, part) in rendered.split(OPEN).enumerate() {
        let Some((inside, after)) = part.split_once(CLOSE).filter(|_| i > 0) else {
            text += part;
            continue;
        };
        marked.push(text.len()..text.len() + inside.len());
        text += inside;
        text += after;
    }
    Rendered { text, marked }
}

/// What went wrong, with the template's place and line.
fn error(place: &str, e: Failure) -> Error {
    let line = e.line.map_or(String::new(), |line| format!(", line {line}"));
    Error::data(format!("{place}{line}: {}", e.message))
}
