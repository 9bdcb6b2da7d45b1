//! Jinja as chat templates use it, rendered as transformers renders them (`utils/chat_template_utils.py`).

use std::fmt::Write;
use std::ops::Range;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error as JinjaError, ErrorKind, State};

use crate::data::conversation::Message;
use crate::data::tokenizer::ChatTemplate;
use crate::error::{Error, Result};

/// What stands around the text of a `{% generation %}` block while it is rendered: no character of any text.
const OPEN: &str = "\u{fdd0}generation\u{fdd1}";
const CLOSE: &str = "\u{fdd0}endgeneration\u{fdd1}";

/// The name of the template in the environment, and of the filter that stands for `{% generation %}`.
const NAME: &str = "chat_template";
const FILTER: &str = "mark_generation";

/// A compiled template.
pub(super) struct Jinja {
    environment: Environment<'static>,
    /// Names and texts of the special tokens that a template may write.
    tokens: Vec<(&'static str, String)>,
    pub place: String,
    /// Whether it marks the assistant's turns.
    pub marks: bool,
}

/// A rendered conversation, and the byte ranges that `{% generation %}` marks.
pub(super) struct Rendered {
    pub text: String,
    pub marked: Vec<Range<usize>>,
}

impl Jinja {
    pub fn new(template: &ChatTemplate, tokens: Vec<(&'static str, String)>) -> Result<Jinja> {
        let (source, marks) = with_filter_blocks(&template.source);
        let mut environment = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        environment.set_syntax(
            syntax.trim_blocks(true).lstrip_blocks(true).build().map_err(|e| error("Jinja", &e))?,
        );
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(method);
        environment.add_filter(FILTER, |text: String| format!("{OPEN}{text}{CLOSE}"));
        environment.add_filter("trim", trim);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |text: String| -> Result<Value, JinjaError> {
            Err(JinjaError::new(ErrorKind::InvalidOperation, text))
        });
        environment.add_function("strftime_now", strftime_now);
        let place = template.place.clone();
        environment.add_template_owned(NAME, source).map_err(|e| error(&place, &e))?;
        Ok(Jinja { environment, tokens, place, marks })
    }

    /// Renders messages; `add_generation_prompt`: with the beginning of the answer to them.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Rendered> {
        if messages.iter().any(|m| m.content.contains('\u{fdd0}') && self.marks) {
            return Err(Error::data("a message has the code point U+FDD0, which is no character"));
        }
        let mut variables: Vec<(&str, Value)> =
            self.tokens.iter().map(|(name, text)| (*name, Value::from(text.as_str()))).collect();
        let message =
            |m: &Message| Value::from_pairs([("role", m.role.as_str()), ("content", m.content.as_str())]);
        variables.push(("messages", messages.iter().map(message).collect()));
        variables.push(("add_generation_prompt", add_generation_prompt.into()));
        variables.extend([("tools", ().into()), ("documents", ().into())]);
        let rendered = self
            .environment
            .get_template(NAME)
            .and_then(|template| template.render(Value::from_pairs(variables)))
            .map_err(|e| error(&self.place, &e))?;
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
        Ok(Rendered { text, marked })
    }
}

/// What went wrong, with the template's place and line.
fn error(place: &str, e: &JinjaError) -> Error {
    let line = e.line().map_or(String::new(), |line| format!(", line {line}"));
    let what = match (e.kind(), e.detail()) {
        (ErrorKind::InvalidOperation, Some(detail)) => detail.to_string(),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    Error::data(format!("{place}{line}: {what}"))
}

/// `{% generation %}` and `{% endgeneration %}`, which Jinja does not know, as a filter block around the same text;
/// and whether there are such.
fn with_filter_blocks(source: &str) -> (String, bool) {
    let (mut out, mut rest, mut found) = (String::with_capacity(source.len()), source, false);
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out += before;
        rest = tag;
        let Some(end) = tag.find("%}") else { break };
        let word = tag[..end].trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let new = match word {
            "generation" => format!("filter {FILTER}"),
            "endgeneration" => "endfilter".into(),
            _ => continue,
        };
        found = true;
        out += &tag[..end].replacen(word, &new, 1);
        rest = &tag[end..];
    }
    out += rest;
    (out, found)
}

/// White space as Python's `str.strip` knows it.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn trim(text: String, chars: Option<String>) -> String {
    match chars {
        Some(chars) => text.trim_matches(|c| chars.contains(c)).to_string(),
        None => text.trim_matches(is_space).to_string(),
    }
}

/// Python's methods of strings, lists and dictionaries.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, JinjaError> {
    if let (Some(text), []) = (value.as_str(), args) {
        match name {
            "strip" => return Ok(text.trim_matches(is_space).into()),
            "lstrip" => return Ok(text.trim_start_matches(is_space).into()),
            "split" => {
                let words = text.split(is_space).filter(|word| !word.is_empty());
                return Ok(words.map(Value::from).collect());
            }
            "rstrip" => return Ok(text.trim_end_matches(is_space).into()),
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

fn strftime_now(format: String) -> Result<String, JinjaError> {
    let mut text = String::new();
    write!(text, "{}", chrono::Local::now().format(&format)).map_err(|_| {
        JinjaError::new(ErrorKind::InvalidOperation, format!("strftime_now: bad format {format:?}"))
    })?;
    Ok(text)
}

/// Python's `json.dumps` with the options that transformers gives its filter.
fn to_json(value: Value, options: Kwargs) -> Result<String, JinjaError> {
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let indent = options.get::<Option<usize>>("indent")?;
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    options.assert_all_used()?;
    let [item, key] = match separators.as_deref() {
        Some([item, key]) => [item.clone(), key.clone()],
        None if indent.is_some() => [",".into(), ": ".into()],
        _ => [", ".into(), ": ".into()],
    };
    let mut json = JsonWriter { out: String::new(), ascii, indent, sort_keys, item, key };
    json.write(&value, 1)?;
    Ok(json.out)
}

struct JsonWriter {
    out: String,
    ascii: bool,
    indent: Option<usize>,
    sort_keys: bool,
    /// Between items, and between a key and its value.
    item: String,
    key: String,
}

impl JsonWriter {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), JinjaError> {
        match value.kind() {
            ValueKind::None => self.out += "null",
            ValueKind::Bool => self.out += if value.is_true() { "true" } else { "false" },
            ValueKind::Number => self.out += &value.to_string(),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.items(['[', ']'], depth, &items, |json, item| json.write(item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.items(['{', '}'], depth, &keys, |json, key| {
                    json.string(&key.to_string());
                    json.out += &json.key.clone();
                    json.write(&value.get_item(key)?, depth + 1)
                })?;
            }
            kind => {
                let what = format!("tojson: {kind} cannot be written as JSON");
                return Err(JinjaError::new(ErrorKind::InvalidOperation, what));
            }
        }
        Ok(())
    }

    fn items(
        &mut self,
        brackets: [char; 2],
        depth: usize,
        items: &[Value],
        mut write: impl FnMut(&mut Self, &Value) -> Result<(), JinjaError>,
    ) -> Result<(), JinjaError> {
        let newline = |json: &mut Self, depth: usize| {
            if let Some(indent) = json.indent.filter(|_| !items.is_empty()) {
                json.out.push('\n');
                json.out += &" ".repeat(indent * depth);
            }
        };
        self.out.push(brackets[0]);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                self.out += &self.item.clone();
            }
            newline(self, depth);
            write(self, item)?;
        }
        newline(self, depth - 1);
        self.out.push(brackets[1]);
        Ok(())
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out += "\\\"",
                '\\' => self.out += "\\\\",
                '\n' => self.out += "\\n",
                '\r' => self.out += "\\r",
                '\t' => self.out += "\\t",
                '\u{8}' => self.out += "\\b",
                '\u{c}' => self.out += "\\f",
                c if c < ' ' || self.ascii && !c.is_ascii() => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out += &format!("\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}
