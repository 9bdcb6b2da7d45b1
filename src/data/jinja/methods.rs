//! Methods of texts, lists, dicts and numbers, as Python's.

use std::rc::Rc;

use super::arguments::{CallArguments, int, required, text};
use super::value::{Dict, JinjaValue};
use super::{RenderResult, fail, format, functions, operators, text as words};

const STR: [&str; 47] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "maketrans",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "translate",
    "upper",
    "zfill",
];
const LIST: [&str; 3] = ["copy", "count", "index"];
const DICT: [&str; 6] = ["copy", "fromkeys", "get", "items", "keys", "values"];
const INT: [&str; 5] = ["as_integer_ratio", "bit_count", "bit_length", "conjugate", "to_bytes"];
const FLOAT: [&str; 4] = ["as_integer_ratio", "conjugate", "hex", "is_integer"];

/// The methods that a value has.
pub fn names(value: &JinjaValue) -> &'static [&'static str] {
    match value {
        JinjaValue::Str(_) | JinjaValue::Markup(_) => &STR,
        JinjaValue::List(_) => &LIST,
        JinjaValue::Tuple(_) | JinjaValue::Group(_) | JinjaValue::Range(_) => &LIST[1..],
        JinjaValue::Dict(_) => &DICT,
        JinjaValue::Int(_) | JinjaValue::Bool(_) => &INT,
        JinjaValue::Float(_) => &FLOAT,
        JinjaValue::Cycler(_) => &["next", "reset"],
        _ => &[],
    }
}

/// Whether a method changes a list or dict, which the sandbox forbids.
pub fn changes(value: &JinjaValue, name: &str) -> bool {
    match value {
        JinjaValue::Dict(_) => ["clear", "pop", "popitem", "setdefault", "update"].contains(&name),
        JinjaValue::List(_) => {
            ["append", "clear", "pop", "reverse", "insert", "sort", "extend", "remove"].contains(&name)
        }
        _ => false,
    }
}

pub fn call(object: &JinjaValue, name: &str, args: CallArguments) -> RenderResult<JinjaValue> {
    match object {
        JinjaValue::Str(text) => of_text(text, name, args),
        JinjaValue::Markup(text) => {
            let plain = of_text(text, name, args)?;
            match plain {
                JinjaValue::Bool(_) | JinjaValue::Int(_) => Ok(plain),
                _ => fail(format!("the method '{name}' of text that is marked as HTML is not supported")),
            }
        }
        JinjaValue::Dict(dict) => of_dict(dict, name, args),
        JinjaValue::Loop(state) => state.call(name, args),
        JinjaValue::Cycler(state) => {
            args.none(name)?;
            let at = state.1.get();
            let reset = name == "reset";
            state.1.set(if reset { 0 } else { (at + 1) % state.0.len() });
            Ok(if reset { JinjaValue::None } else { state.0[at].clone() })
        }
        JinjaValue::Float(x) if name == "is_integer" => {
            args.none(name)?;
            Ok((x.is_finite() && x.fract() == 0.0).into())
        }
        _ if name == "count" || name == "index" || name == "copy" => of_list(object, name, args),
        _ => unsupported(object, name),
    }
}

fn unsupported(object: &JinjaValue, name: &str) -> RenderResult<JinjaValue> {
    fail(format!("the method '{name}' of '{}' is not supported in a chat template", object.type_name()))
}

fn of_list(object: &JinjaValue, name: &str, args: CallArguments) -> RenderResult<JinjaValue> {
    let items = object.items()?;
    if name == "copy" {
        args.none(name)?;
        return Ok(JinjaValue::list(items));
    }
    let [value, start, stop] = args.bind(name, ["value", "start", "stop"])?;
    let value = required(name, "value", value)?;
    if name == "count" {
        return Ok(items.iter().filter(|item| operators::equal(item, &value)).count().into());
    }
    let (start, stop) = bounds(name, items.len(), start, stop)?;
    let found = (start..stop).find(|i| operators::equal(&items[*i], &value));
    match found {
        Some(i) => Ok(i.into()),
        None => fail(format!("{} is not in {}", value.repr()?, object.type_name())),
    }
}

/// The part of `len` items that optional bounds leave.
fn bounds(
    what: &str,
    len: usize,
    start: Option<JinjaValue>,
    stop: Option<JinjaValue>,
) -> RenderResult<(usize, usize)> {
    let place = |at: Option<JinjaValue>, default: usize| -> RenderResult<usize> {
        match at {
            None | Some(JinjaValue::None) => Ok(default),
            Some(at) => {
                let at = int(what, &at)?;
                let at = if at < 0 { at.saturating_add(len as i128).max(0) } else { at };
                Ok(usize::try_from(at).unwrap_or(usize::MAX).min(len.saturating_add(1)))
            }
        }
    };
    let (start, stop) = (place(start, 0)?, place(stop, len)?.min(len));
    Ok((start, stop))
}

fn of_dict(dict: &Rc<Dict>, name: &str, args: CallArguments) -> RenderResult<JinjaValue> {
    if name == "get" {
        if !args.named.is_empty() {
            return fail("dict.get() takes no keyword arguments");
        }
        let [key, default] = args.bind("get", ["key", "default"])?;
        let value = dict.get(&required("get", "key", key)?)?.cloned();
        return Ok(value.or(default).unwrap_or(JinjaValue::None));
    }
    if name == "fromkeys" {
        return functions::from_keys(args);
    }
    args.none(name)?;
    let keys = || dict.items.iter().map(|(key, _)| key.clone());
    let values = || dict.items.iter().map(|(_, value)| value.clone());
    Ok(match name {
        "items" => {
            let pairs = keys().zip(values()).map(|(key, value)| JinjaValue::tuple(vec![key, value]));
            JinjaValue::View("dict_items", Rc::new(pairs.collect()))
        }
        "keys" => JinjaValue::View("dict_keys", Rc::new(keys().collect())),
        "values" => JinjaValue::View("dict_values", Rc::new(values().collect())),
        _ => JinjaValue::Dict(dict.clone()),
    })
}

/// How often to split or replace: all where the number is negative or not given.
fn count(what: &str, value: Option<JinjaValue>) -> RenderResult<usize> {
    Ok(match value {
        None => usize::MAX,
        Some(n) => usize::try_from(int(what, &n)?).unwrap_or(usize::MAX),
    })
}

#[expect(clippy::too_many_lines, reason = "an arm for each method")]
fn of_text(own: &Rc<str>, name: &str, args: CallArguments) -> RenderResult<JinjaValue> {
    let strings = |parts: Vec<String>| JinjaValue::list(parts.into_iter().map(JinjaValue::from).collect());
    Ok(match name {
        "strip" | "lstrip" | "rstrip" => {
            let [chars] = args.bind(name, ["chars"])?;
            let own = &**own;
            match chars {
                None | Some(JinjaValue::None) => strip(own, name, words::is_space).into(),
                Some(chars) => {
                    let chars = text(name, &chars)?;
                    strip(own, name, |c| chars.contains(c)).into()
                }
            }
        }
        "split" | "rsplit" => {
            let [separator, most] = args.bind(name, ["sep", "maxsplit"])?;
            let separator = separator.filter(|s| !matches!(s, JinjaValue::None));
            let separator = separator.as_ref().map(|s| text(name, s)).transpose()?;
            if separator == Some("") {
                return fail("empty separator");
            }
            let most = count(name, most)?;
            strings(match name {
                "split" => words::split(own, separator, most),
                _ => words::rsplit(own, separator, most),
            })
        }
        "splitlines" => {
            let [keep_ends] = args.bind(name, ["keepends"])?;
            let lines = words::lines(own, keep_ends.is_some_and(|k| k.is_true()));
            JinjaValue::list(lines.into_iter().map(JinjaValue::from).collect())
        }
        "partition" | "rpartition" => {
            let [separator] = args.bind(name, ["sep"])?;
            let separator = required(name, "sep", separator)?;
            let separator = text(name, &separator)?;
            if separator.is_empty() {
                return fail("empty separator");
            }
            let parts = match name {
                "partition" => {
                    own.split_once(separator).map(|(a, b)| [a, separator, b]).unwrap_or([own, "", ""])
                }
                _ => own.rsplit_once(separator).map(|(a, b)| [a, separator, b]).unwrap_or(["", "", own]),
            };
            JinjaValue::tuple(parts.map(JinjaValue::from).to_vec())
        }
        "startswith" | "endswith" => affix(own, name, args)?.into(),
        "removeprefix" | "removesuffix" => {
            let [affix] = args.bind(name, [&name[6..]])?;
            let affix = required(name, &name[6..], affix)?;
            let affix = text(name, &affix)?;
            let rest = if name == "removeprefix" { own.strip_prefix(affix) } else { own.strip_suffix(affix) };
            rest.unwrap_or(own).into()
        }
        "find" | "rfind" | "index" | "rindex" | "count" => find(own, name, args)?,
        "replace" => {
            let [old, new, most] = args.bind(name, ["old", "new", "count"])?;
            let (old, new) = (required(name, "old", old)?, required(name, "new", new)?);
            own.replacen(text(name, &old)?, text(name, &new)?, count(name, most)?).into()
        }
        "join" => {
            let [items] = args.bind(name, ["iterable"])?;
            let mut parts = Vec::new();
            for (i, item) in required(name, "iterable", items)?.items()?.iter().enumerate() {
                match item.as_str() {
                    Some(part) => parts.push(part.to_string()),
                    None => {
                        let kind = item.type_name();
                        return fail(format!("sequence item {i}: expected str instance, {kind} found"));
                    }
                }
            }
            parts.join(own).into()
        }
        "center" | "ljust" | "rjust" | "zfill" => pad(own, name, args)?.into(),
        "format" => format::format(own, &args)?.into(),
        "format_map" => {
            let [map] = args.bind(name, ["mapping"])?;
            let JinjaValue::Dict(dict) = required(name, "mapping", map)? else {
                return fail("format_map needs a dict");
            };
            let named =
                dict.items.iter().filter_map(|(k, v)| Some((k.as_str()?.into(), v.clone()))).collect();
            format::format(own, &CallArguments { positional: Vec::new(), named })?.into()
        }
        _ => {
            if !name.starts_with("is")
                && !["upper", "lower", "title", "capitalize", "swapcase"].contains(&name)
            {
                return unsupported(&JinjaValue::Str(own.clone()), name);
            }
            args.none(name)?;
            match name {
                "upper" => own.to_uppercase().into(),
                "lower" => own.to_lowercase().into(),
                "title" => words::title(own).into(),
                "capitalize" => words::capitalize(own).into(),
                "swapcase" => words::swap_case(own).into(),
                _ => property(own, name).into(),
            }
        }
    })
}

fn strip(own: &str, name: &str, matches: impl Fn(char) -> bool) -> String {
    match name {
        "lstrip" => own.trim_start_matches(matches),
        "rstrip" => own.trim_end_matches(matches),
        _ => own.trim_matches(matches),
    }
    .to_string()
}

/// `isalpha` and the like.
fn property(own: &str, name: &str) -> bool {
    let all = |is: fn(char) -> bool| !own.is_empty() && own.chars().all(is);
    match name {
        "isascii" => own.is_ascii(),
        "isprintable" => own.chars().all(words::is_printable),
        "isspace" => all(words::is_space),
        "isalpha" => all(words::is_alpha),
        "isdecimal" => all(words::is_decimal),
        "isdigit" => all(words::is_digit),
        "isnumeric" => all(words::is_numeric),
        "isalnum" => all(|c| words::is_alpha(c) || words::is_numeric(c)),
        "isidentifier" => !own.starts_with(|c: char| c.is_numeric()) && all(words::is_word),
        "istitle" => {
            let mut inside = false;
            let mut any = false;
            for c in own.chars() {
                if c.is_uppercase() && inside || c.is_lowercase() && !inside {
                    return false;
                }
                inside = words::is_cased(c);
                any |= inside;
            }
            any
        }
        _ => {
            let mut cased = own.chars().filter(|c| words::is_cased(*c)).peekable();
            let right = |c: char| if name == "islower" { c.is_lowercase() } else { c.is_uppercase() };
            cased.peek().is_some() && cased.all(right)
        }
    }
}

/// Byte places of the characters from `start` to `stop`; none where the part begins behind the text.
fn part<'a>(
    what: &str,
    own: &'a str,
    start: Option<JinjaValue>,
    stop: Option<JinjaValue>,
) -> RenderResult<Option<(usize, &'a str)>> {
    if start.is_none() && stop.is_none() {
        return Ok(Some((0, own)));
    }
    let len = own.chars().count();
    let (start, stop) = bounds(what, len, start, stop)?;
    if start > stop {
        return Ok(None);
    }
    let byte = |at: usize| own.char_indices().nth(at).map_or(own.len(), |(i, _)| i);
    Ok(Some((start, &own[byte(start)..byte(stop)])))
}

fn affix(own: &str, name: &str, args: CallArguments) -> RenderResult<bool> {
    let [affix, start, stop] = args.bind(name, ["prefix", "start", "end"])?;
    let affix = required(name, "prefix", affix)?;
    let affixes = match &affix {
        JinjaValue::Tuple(items) => items.to_vec(),
        other => vec![other.clone()],
    };
    let part = part(name, own, start, stop)?;
    for affix in &affixes {
        let Some(affix) = affix.as_str() else {
            let kind = affix.type_name();
            return fail(format!("{name} first arg must be str or a tuple of str, not {kind}"));
        };
        let has =
            |part: &str| if name == "startswith" { part.starts_with(affix) } else { part.ends_with(affix) };
        if part.is_some_and(|(_, part)| has(part)) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn find(own: &str, name: &str, args: CallArguments) -> RenderResult<JinjaValue> {
    let [sub, start, stop] = args.bind(name, ["sub", "start", "end"])?;
    let sub = required(name, "sub", sub)?;
    let sub = text(name, &sub)?;
    let part = part(name, own, start, stop)?;
    if name == "count" {
        return Ok(part.map_or(0, |(_, part)| part.matches(sub).count()).into());
    }
    let found = part.and_then(|(start, part)| {
        let at = if name.starts_with('r') { part.rfind(sub) } else { part.find(sub) };
        at.map(|at| start + part[..at].chars().count())
    });
    match found {
        Some(at) => Ok(at.into()),
        None if name.ends_with("find") => Ok(JinjaValue::Int(-1)),
        None => fail("substring not found"),
    }
}

fn pad(own: &str, name: &str, args: CallArguments) -> RenderResult<String> {
    let [width, fill] = args.bind(name, ["width", "fillchar"])?;
    let width = int(name, &required(name, "width", width)?)?.clamp(0, 1_000_000) as usize;
    let fill = match &fill {
        Some(_) if name == "zfill" => return fail("zfill takes one argument"),
        Some(fill) => text(name, fill)?.to_string(),
        None => " ".into(),
    };
    if fill.chars().count() != 1 {
        return fail("The fill character must be exactly one character long");
    }
    let len = own.chars().count();
    let missing = width.saturating_sub(len);
    Ok(match name {
        "ljust" => format!("{own}{}", fill.repeat(missing)),
        "rjust" => format!("{}{own}", fill.repeat(missing)),
        "zfill" => {
            let sign = if own.starts_with(['+', '-']) { 1 } else { 0 };
            format!("{}{}{}", &own[..sign], "0".repeat(missing), &own[sign..])
        }
        _ => {
            // As CPython divides an odd number.
            let left = missing / 2 + (missing & width & 1);
            format!("{}{own}{}", fill.repeat(left), fill.repeat(missing - left))
        }
    })
}
