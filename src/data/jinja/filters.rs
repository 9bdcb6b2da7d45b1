//! Jinja's filters of single values; those of lists are in `lists`.

use super::arguments::{CallArguments, int, required, text};
use super::machine::Machine;
use super::value::{JinjaValue, defined};
use super::{RenderResult, access, fail, format, json, lists, numbers, operators, text as words};

/// All that jinja2 has.
pub const NAMES: [&str; 54] = [
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "filesizeformat",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "items",
    "map",
    "min",
    "max",
    "pprint",
    "random",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "striptags",
    "sum",
    "title",
    "trim",
    "truncate",
    "unique",
    "upper",
    "urlencode",
    "urlize",
    "wordcount",
    "wordwrap",
    "xmlattr",
    "tojson",
];

/// Those of them that are not built.
const MISSING: [&str; 8] =
    ["filesizeformat", "pprint", "random", "striptags", "urlencode", "urlize", "wordwrap", "xmlattr"];

pub fn apply(
    machine: &mut Machine,
    name: &str,
    value: JinjaValue,
    args: CallArguments,
) -> RenderResult<JinjaValue> {
    if !NAMES.contains(&name) {
        return fail(format!("unknown filter '{name}'"));
    }
    if MISSING.contains(&name) {
        return fail(format!("the filter '{name}' is not supported in a chat template"));
    }
    let what = format!("the filter '{name}'");
    match lists::apply(machine, name, &what, value, args)? {
        lists::Applied::Done(value) => Ok(value),
        lists::Applied::Other(value, args) => single(name, &what, value, args),
    }
}

/// `str(value)`; text that is marked as HTML would have to stay so.
fn plain(what: &str, value: &JinjaValue) -> RenderResult<std::rc::Rc<str>> {
    if matches!(value, JinjaValue::Markup(_)) {
        return fail(format!("{what} of text that is marked as HTML is not supported"));
    }
    value.to_text()
}

#[expect(clippy::too_many_lines, reason = "an arm for each filter")]
fn single(name: &str, what: &str, value: JinjaValue, args: CallArguments) -> RenderResult<JinjaValue> {
    Ok(match name {
        "d" | "default" => {
            let [default, boolean] = args.bind(what, ["default_value", "boolean"])?;
            let replace = value.is_undefined() || boolean.is_some_and(|b| b.is_true()) && !value.is_true();
            if replace { default.unwrap_or_else(|| "".into()) } else { value }
        }
        "tojson" => json::dumps(&value, args)?.into(),
        "attr" => {
            let [attribute] = args.bind(what, ["name"])?;
            let attribute = required(what, "name", attribute)?;
            let name = text(what, &attribute)?;
            // Items do not count.
            let hidden = matches!(&value, JinjaValue::Dict(dict) if dict.name(name).is_some());
            match hidden && !super::methods::names(&value).contains(&name) {
                true => {
                    JinjaValue::undefined(format!("'dict object' has no attribute {}", words::repr(name)))
                }
                false => access::attribute(&value, name)?,
            }
        }
        "format" => {
            if !args.positional.is_empty() && !args.named.is_empty() {
                return fail("can't handle positional and keyword arguments at the same time");
            }
            let values = match args.named.is_empty() {
                true => JinjaValue::tuple(args.positional),
                false => {
                    let items = args.named.iter().map(|(k, v)| (JinjaValue::from(k), v.clone())).collect();
                    JinjaValue::Dict(std::rc::Rc::new(super::Dict { items }))
                }
            };
            format::printf(&plain(what, &value)?, &values)?.into()
        }
        "int" => to_int(what, &value, args)?,
        "float" => {
            let [default] = args.bind(what, ["default"])?;
            defined(&value)?;
            let number = match &value {
                JinjaValue::Float(x) => Some(*x),
                JinjaValue::Str(text) | JinjaValue::Markup(text) => numbers::parse_float(text),
                other => other.as_int().map(|n| n as f64),
            };
            number.map(JinjaValue::Float).or(default).unwrap_or(JinjaValue::Float(0.0))
        }
        "round" => round(what, &value, args)?,
        "abs" => {
            args.none(what)?;
            defined(&value)?;
            match (&value, value.as_int()) {
                (JinjaValue::Float(x), _) => JinjaValue::Float(x.abs()),
                (_, Some(n)) => JinjaValue::Int(n.abs()),
                _ => return fail(format!("bad operand type for abs(): '{}'", value.type_name())),
            }
        }
        "replace" => {
            let [old, new, count] = args.bind(what, ["old", "new", "count"])?;
            let (old, new) = (required(what, "old", old)?, required(what, "new", new)?);
            let count = match count {
                None | Some(JinjaValue::None) => usize::MAX,
                Some(n) => usize::try_from(int(what, &n)?).unwrap_or(usize::MAX),
            };
            value.to_text()?.replacen(&*old.to_text()?, &new.to_text()?, count).into()
        }
        "trim" => {
            let [chars] = args.bind(what, ["chars"])?;
            let own = plain(what, &value)?;
            match chars {
                None | Some(JinjaValue::None) => own.trim_matches(words::is_space).into(),
                Some(chars) => {
                    let chars = text(what, &chars)?;
                    own.trim_matches(|c| chars.contains(c)).into()
                }
            }
        }
        "indent" => indent(what, &value, args)?,
        "truncate" => truncate(what, &value, args)?,
        "center" => {
            let [width] = args.bind(what, ["width"])?;
            let args =
                CallArguments { positional: vec![width.unwrap_or(JinjaValue::Int(80))], named: Vec::new() };
            super::methods::call(&JinjaValue::Str(plain(what, &value)?), "center", args)?
        }
        _ => {
            args.none(what)?;
            match name {
                "upper" => plain(what, &value)?.to_uppercase().into(),
                "lower" => plain(what, &value)?.to_lowercase().into(),
                "capitalize" => words::capitalize(&plain(what, &value)?).into(),
                "title" => words::title_words(&plain(what, &value)?).into(),
                "string" if matches!(value, JinjaValue::Markup(_)) => value,
                "string" => JinjaValue::Str(value.to_text()?),
                "safe" => JinjaValue::Markup(value.to_text()?),
                "e" | "escape" => JinjaValue::Markup(operators::escaped(&value)?),
                "forceescape" => JinjaValue::Markup(words::escape(&value.to_text()?).into()),
                "wordcount" => {
                    let text = value.to_text()?;
                    text.split(|c| !words::is_word(c)).filter(|word| !word.is_empty()).count().into()
                }
                _ => return fail(format!("the filter '{name}' is not supported in a chat template")),
            }
        }
    })
}

fn to_int(what: &str, value: &JinjaValue, args: CallArguments) -> RenderResult<JinjaValue> {
    let [default, base] = args.bind(what, ["default", "base"])?;
    defined(value)?;
    let base = base.map_or(Ok(10), |b| int(what, &b))?;
    let number = match value {
        JinjaValue::Float(x) => numbers::truncate(*x),
        JinjaValue::Str(text) | JinjaValue::Markup(text) => {
            let whole = u32::try_from(base).ok().and_then(|base| numbers::parse_int(text, base));
            whole.or_else(|| numbers::parse_float(text).and_then(numbers::truncate))
        }
        other => other.as_int(),
    };
    Ok(number.map(JinjaValue::Int).or(default).unwrap_or(JinjaValue::Int(0)))
}

fn round(what: &str, value: &JinjaValue, args: CallArguments) -> RenderResult<JinjaValue> {
    let [precision, method] = args.bind(what, ["precision", "method"])?;
    defined(value)?;
    let precision = precision.map_or(Ok(0), |p| int(what, &p))?;
    let method = method.unwrap_or_else(|| "common".into());
    let float = match (value, value.as_int()) {
        (JinjaValue::Float(x), _) => *x,
        (_, Some(n)) => n as f64,
        _ => return fail(format!("type {} doesn't define __round__ method", value.type_name())),
    };
    Ok(match (text(what, &method)?, value.as_int()) {
        ("common", Some(n)) => JinjaValue::Int(numbers::round_int(n, precision)),
        ("common", None) => JinjaValue::Float(numbers::round(float, precision)),
        (method @ ("ceil" | "floor"), _) => {
            let unit = 10f64.powi(precision.clamp(-400, 400) as i32);
            let scaled = float * unit;
            JinjaValue::Float(if method == "ceil" { scaled.ceil() } else { scaled.floor() } / unit)
        }
        _ => return fail("method must be common, ceil or floor"),
    })
}

fn indent(what: &str, value: &JinjaValue, args: CallArguments) -> RenderResult<JinjaValue> {
    let [width, first, blank] = args.bind(what, ["width", "first", "blank"])?;
    defined(value)?;
    let (JinjaValue::Str(own), flag) = (value, |v: Option<JinjaValue>| v.is_some_and(|v| v.is_true())) else {
        return fail(format!("{what} needs a text, not '{}'", value.type_name()));
    };
    let indent = match width {
        None => " ".repeat(4),
        Some(JinjaValue::Str(text)) => text.to_string(),
        Some(n) => " ".repeat(int(what, &n)?.clamp(0, 10_000) as usize),
    };
    let (first, blank) = (flag(first), flag(blank));
    let own = format!("{own}\n");
    let mut out = if first { indent.clone() } else { String::new() };
    for (i, line) in words::lines(&own, false).into_iter().enumerate() {
        if i > 0 {
            out.push('\n');
            if blank || !line.is_empty() {
                out += &indent;
            }
        }
        out += line;
    }
    Ok(out.into())
}

fn truncate(what: &str, value: &JinjaValue, args: CallArguments) -> RenderResult<JinjaValue> {
    let [length, kill_words, end, leeway] = args.bind(what, ["length", "killwords", "end", "leeway"])?;
    defined(value)?;
    let own = text(what, value)?;
    let end = end.unwrap_or_else(|| "...".into());
    let end = text(what, &end)?;
    let number = |value: Option<JinjaValue>, default: i128| match value {
        None | Some(JinjaValue::None) => Ok(default),
        Some(n) => int(what, &n),
    };
    let (length, leeway) = (number(length, 255)?, number(leeway, 5)?);
    let end_len = end.chars().count() as i128;
    if length < end_len || leeway < 0 {
        return fail(format!("expected length >= {end_len} and leeway >= 0, got {length} and {leeway}"));
    }
    if own.chars().count() as i128 <= length + leeway {
        return Ok(value.clone());
    }
    let cut: String = own.chars().take((length - end_len) as usize).collect();
    if kill_words.is_some_and(|k| k.is_true()) {
        return Ok(format!("{cut}{end}").into());
    }
    Ok(format!("{}{end}", cut.rsplit_once(' ').map_or(cut.as_str(), |(words, _)| words)).into())
}
