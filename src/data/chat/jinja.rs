//! A chat template, rendered as transformers renders it (`utils/chat_template_utils.py`).

use std::ops::Range;

use chrono::NaiveTime;

use crate::config::template_date::TemplateDate;
use crate::data::conversation::Message;
use crate::data::jinja::{CLOSE, Dict, Failure, OPEN, Template, Value};
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

    /// Renders messages; `add_generation_prompt`: with the beginning of the answer to them.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Rendered> {
        if messages.iter().any(|m| m.content.contains('\u{fdd0}') && self.marks) {
            return Err(Error::data("a message has the code point U+FDD0, which is no character"));
        }
        let mut variables = Dict::default();
        for (name, text) in &self.tokens {
            variables.set_name(name, text.as_str().into());
        }
        let message = |m: &Message| {
            let mut message = Dict::default();
            message.set_name("role", m.role.as_str().into());
            message.set_name("content", m.content.as_str().into());
            Value::from(message)
        };
        variables.set_name("messages", Value::list(messages.iter().map(message).collect()));
        variables.set_name("add_generation_prompt", add_generation_prompt.into());
        variables.set_name("tools", Value::None);
        variables.set_name("documents", Value::None);
        let TemplateDate { date, given } = self.date;
        if given {
            // As Llama's templates write it.
            variables.set_name("date_string", date.format("%d %b %Y").to_string().into());
        }
        let rendered = self.template.render(variables, date.and_time(NaiveTime::MIN));
        let rendered = rendered.map_err(|e| error(&self.place, e))?;
        Ok(unmarked(&rendered))
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
