//! The filter `tojson`: Python's `json.dumps` with the options that transformers gives it.

use super::arguments::{CallArguments, int, text};
use super::value::{Dict, JinjaValue};
use super::{RenderResult, fail, numbers};

pub fn dumps(value: &JinjaValue, args: CallArguments) -> RenderResult<String> {
    let what = "tojson";
    let [ascii, indent, separators, sort_keys] =
        args.bind(what, ["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let flag = |value: Option<JinjaValue>| value.is_some_and(|v| v.is_true());
    let indent = match indent {
        None | Some(JinjaValue::None) => None,
        Some(JinjaValue::Str(text)) => Some(text.to_string()),
        Some(n) => Some(" ".repeat(int(what, &n)?.clamp(0, 1000) as usize)),
    };
    let (item, key) = match separators {
        None | Some(JinjaValue::None) if indent.is_some() => (",".into(), ": ".into()),
        None | Some(JinjaValue::None) => (", ".into(), ": ".into()),
        Some(pair) => match &pair.items()?[..] {
            [item, key] => (text(what, item)?.to_string(), text(what, key)?.to_string()),
            _ => return fail("tojson: separators are two texts"),
        },
    };
    let mut json =
        JsonWriter { out: String::new(), ascii: flag(ascii), indent, sort_keys: flag(sort_keys), item, key };
    json.write(value, 1)?;
    Ok(json.out)
}

struct JsonWriter {
    out: String,
    ascii: bool,
    indent: Option<String>,
    sort_keys: bool,
    /// Between items, and between a key and its value.
    item: String,
    key: String,
}

impl JsonWriter {
    fn write(&mut self, value: &JinjaValue, depth: usize) -> RenderResult<()> {
        if depth > 100 {
            return fail("tojson: a value is nested too deeply");
        }
        match value {
            JinjaValue::None => self.out += "null",
            JinjaValue::Bool(b) => self.out += if *b { "true" } else { "false" },
            JinjaValue::Int(n) => self.out += &n.to_string(),
            JinjaValue::Float(x) => self.out += &float(*x),
            JinjaValue::Str(text) | JinjaValue::Markup(text) => self.string(text),
            JinjaValue::List(items) | JinjaValue::Tuple(items) | JinjaValue::Group(items) => {
                self.items(['[', ']'], depth, items, |json, item| json.write(item, depth + 1))?;
            }
            JinjaValue::Dict(dict) => self.dict(dict, depth)?,
            other => return fail(format!("Object of type {} is not JSON serializable", other.type_name())),
        }
        Ok(())
    }

    fn dict(&mut self, dict: &Dict, depth: usize) -> RenderResult<()> {
        let mut items: Vec<(String, &JinjaValue)> = Vec::with_capacity(dict.items.len());
        let mut keys: Vec<&JinjaValue> = dict.items.iter().map(|(key, _)| key).collect();
        if self.sort_keys {
            let mut failed = None;
            keys.sort_by(|a, b| {
                super::operators::order("<", a, b)
                    .unwrap_or_else(|e| {
                        failed.get_or_insert(e);
                        None
                    })
                    .unwrap_or(std::cmp::Ordering::Equal)
            });
            if let Some(e) = failed {
                return Err(e);
            }
        }
        for key in keys {
            let name = match key {
                JinjaValue::Str(text) | JinjaValue::Markup(text) => text.to_string(),
                JinjaValue::None => "null".into(),
                JinjaValue::Bool(b) => b.to_string(),
                JinjaValue::Int(n) => n.to_string(),
                JinjaValue::Float(x) => float(*x),
                other => {
                    let kind = other.type_name();
                    return fail(format!("keys must be str, int, float, bool or None, not {kind}"));
                }
            };
            if let Some(value) = dict.get(key)? {
                items.push((name, value));
            }
        }
        self.items(['{', '}'], depth, &items, |json, (name, value)| {
            json.string(name);
            json.out += &json.key.clone();
            json.write(value, depth + 1)
        })
    }

    fn items<T>(
        &mut self,
        brackets: [char; 2],
        depth: usize,
        items: &[T],
        mut write: impl FnMut(&mut Self, &T) -> RenderResult<()>,
    ) -> RenderResult<()> {
        let newline = |json: &mut Self, depth: usize| {
            if let Some(indent) = json.indent.as_ref().filter(|_| !items.is_empty()) {
                json.out.push('\n');
                json.out += &indent.repeat(depth);
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
                c if c < ' ' || self.ascii && !(' '..='~').contains(&c) => {
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

fn float(x: f64) -> String {
    match x {
        _ if x.is_nan() => "NaN".into(),
        f64::INFINITY => "Infinity".into(),
        f64::NEG_INFINITY => "-Infinity".into(),
        _ => numbers::repr(x),
    }
}
