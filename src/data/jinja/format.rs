//! `str.format` and `text % values`.

use super::access;
use super::arguments::CallArguments;
use super::value::{JinjaValue, defined};
use super::{RenderResult, fail, numbers, text};

/// `[[fill]align][sign][#][0][width][,][.precision][type]`
#[derive(Default)]
struct FormatSpec {
    fill: Option<char>,
    align: Option<char>,
    sign: Option<char>,
    alternate: bool,
    width: usize,
    separator: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

const WIDEST: usize = 1_000_000;

fn number(text: &str) -> Option<(usize, usize)> {
    let len = text.bytes().take_while(u8::is_ascii_digit).count();
    Some((text[..len].parse().ok().filter(|n| *n <= WIDEST)?, len))
}

impl FormatSpec {
    fn parse(source: &str) -> RenderResult<FormatSpec> {
        let bad = || fail(format!("Invalid format specifier '{source}'"));
        let mut spec = FormatSpec::default();
        let mut chars = source.chars();
        let is_align = |c: char| "<>=^".contains(c);
        let mut rest = source;
        match (chars.next(), chars.next()) {
            (Some(fill), Some(align)) if is_align(align) => {
                (spec.fill, spec.align) = (Some(fill), Some(align));
                rest = &source[fill.len_utf8() + 1..];
            }
            (Some(align), _) if is_align(align) => {
                spec.align = Some(align);
                rest = &source[1..];
            }
            _ => {}
        }
        let mut take = |set: &str| {
            let c = rest.chars().next().filter(|c| set.contains(*c))?;
            rest = &rest[1..];
            Some(c)
        };
        spec.sign = take("+- ");
        spec.alternate = take("#").is_some();
        if take("0").is_some() {
            spec.fill.get_or_insert('0');
            spec.align.get_or_insert('=');
        }
        if rest.starts_with(|c: char| c.is_ascii_digit()) {
            let Some((n, len)) = number(rest) else { return bad() };
            spec.width = n;
            rest = &rest[len..];
        }
        if let Some(c) = rest.chars().next().filter(|c| matches!(c, ',' | '_')) {
            spec.separator = Some(c);
            rest = &rest[1..];
        }
        if let Some(after) = rest.strip_prefix('.') {
            let Some((n, len)) = number(after) else { return bad() };
            spec.precision = Some(n);
            rest = &after[len..];
        }
        let mut chars = rest.chars();
        spec.kind = chars.next();
        if chars.next().is_some() {
            return bad();
        }
        Ok(spec)
    }

    /// The body within its width, the sign before the fill where that stands between them.
    fn pad(&self, sign: &str, body: &str, default: char) -> String {
        let len = sign.chars().count() + body.chars().count();
        let fill = |n: usize| self.fill.unwrap_or(' ').to_string().repeat(n);
        let missing = self.width.saturating_sub(len);
        match self.align.unwrap_or(default) {
            '<' => format!("{sign}{body}{}", fill(missing)),
            '^' => format!("{}{sign}{body}{}", fill(missing / 2), fill(missing - missing / 2)),
            '=' => format!("{sign}{}{body}", fill(missing)),
            _ => format!("{}{sign}{body}", fill(missing)),
        }
    }

    fn sign(&self, negative: bool) -> &'static str {
        match self.sign {
            _ if negative => "-",
            Some('+') => "+",
            Some(' ') => " ",
            _ => "",
        }
    }

    fn group(&self, digits: &str, every: usize) -> String {
        let Some(separator) = self.separator else { return digits.to_string() };
        let (whole, rest) =
            digits.split_at(digits.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(digits.len()));
        let mut out = String::new();
        for (i, c) in whole.chars().enumerate() {
            if i > 0 && (whole.len() - i) % every == 0 {
                out.push(separator);
            }
            out.push(c);
        }
        out + rest
    }
}

/// `format(value, spec)`
fn format_value(value: &JinjaValue, source: &str) -> RenderResult<String> {
    if source.is_empty() {
        return Ok(value.to_text()?.to_string());
    }
    let spec = FormatSpec::parse(source)?;
    let unknown =
        |kind: char| fail(format!("Unknown format code '{kind}' for object of type '{}'", value.type_name()));
    if spec.separator.is_some() && spec.fill == Some('0') && spec.align == Some('=') {
        return fail("zeros before a number with separators are not supported");
    }
    match value {
        JinjaValue::Str(own) | JinjaValue::Markup(own) => match spec.kind {
            None | Some('s') if spec.align != Some('=') || spec.fill == Some('0') => {
                let cut: String = own.chars().take(spec.precision.unwrap_or(usize::MAX)).collect();
                let spec = FormatSpec { align: spec.align.filter(|a| *a != '='), ..spec };
                Ok(spec.pad("", &cut, '<'))
            }
            kind => unknown(kind.unwrap_or('=')),
        },
        JinjaValue::Bool(b) if spec.kind.is_none() && !spec.alternate && spec.precision.is_none() => {
            // Python writes a bool with a width as a number.
            format_int(&spec, i128::from(*b))
        }
        JinjaValue::Int(_) | JinjaValue::Bool(_) => {
            let n = value.as_int().unwrap_or_default();
            match spec.kind {
                None | Some('d' | 'b' | 'o' | 'x' | 'X' | 'c' | 'n') => format_int(&spec, n),
                Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%') => format_float(&spec, n as f64),
                Some(kind) => unknown(kind),
            }
        }
        JinjaValue::Float(x) => match spec.kind {
            None | Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%') => format_float(&spec, *x),
            Some(kind) => unknown(kind),
        },
        _ => fail(format!("unsupported format string passed to {}.__format__", value.type_name())),
    }
}

fn format_int(spec: &FormatSpec, n: i128) -> RenderResult<String> {
    if spec.precision.is_some() {
        return fail("Precision not allowed in integer format specifier");
    }
    let abs = n.unsigned_abs();
    let (prefix, digits, every) = match spec.kind {
        Some('b') => ("0b", format!("{abs:b}"), 4),
        Some('o') => ("0o", format!("{abs:o}"), 4),
        Some('x') => ("0x", format!("{abs:x}"), 4),
        Some('X') => ("0X", format!("{abs:X}"), 4),
        Some('c') => {
            let c = u32::try_from(n).ok().and_then(char::from_u32);
            let Some(c) = c else { return fail("%c arg not in range(0x110000)") };
            return Ok(spec.pad("", &c.to_string(), '<'));
        }
        _ => ("", abs.to_string(), 3),
    };
    let sign = format!("{}{}", spec.sign(n < 0), if spec.alternate { prefix } else { "" });
    Ok(spec.pad(&sign, &spec.group(&digits, every), '>'))
}

fn format_float(spec: &FormatSpec, x: f64) -> RenderResult<String> {
    let abs = x.abs();
    let upper = matches!(spec.kind, Some('E' | 'F' | 'G'));
    let mut body = if !x.is_finite() {
        numbers::repr(abs)
    } else {
        match spec.kind {
            Some('f' | 'F') => format!("{abs:.*}", spec.precision.unwrap_or(6)),
            Some('%') => format!("{:.*}%", spec.precision.unwrap_or(6), abs * 100.0),
            Some('e' | 'E') => scientific(abs, spec.precision.unwrap_or(6)),
            Some(_) => general(abs, spec.precision.unwrap_or(6), spec.alternate),
            None => match spec.precision {
                None => numbers::repr(abs),
                Some(precision) => {
                    let general = general(abs, precision, spec.alternate);
                    let plain = general.bytes().all(|b| b.is_ascii_digit());
                    if plain { general + ".0" } else { general }
                }
            },
        }
    };
    if spec.kind == Some('%') && !x.is_finite() {
        body.push('%');
    }
    if upper {
        body = body.to_uppercase();
    }
    let negative = x.is_sign_negative() && !x.is_nan();
    Ok(spec.pad(spec.sign(negative), &spec.group(&body, 3), '>'))
}

fn scientific(abs: f64, precision: usize) -> String {
    let text = format!("{abs:.precision$e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    format!("{mantissa}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
}

/// `g`: so many digits, the exponent only where it is needed.
fn general(abs: f64, precision: usize, keep_zeros: bool) -> String {
    let precision = precision.max(1);
    let text = scientific(abs, precision - 1);
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let power: i32 = exponent.parse().unwrap_or(0);
    let trim = |digits: &str| match digits.contains('.') && !keep_zeros {
        true => digits.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => digits.to_string(),
    };
    if power < -4 || power >= precision as i32 {
        return format!("{}e{exponent}", trim(mantissa));
    }
    trim(&format!("{abs:.*}", (precision as i32 - 1 - power).max(0) as usize))
}

/// `pattern.format(...)`
pub fn format(pattern: &str, args: &CallArguments) -> RenderResult<String> {
    let mut automatic = 0;
    fill(pattern, args, &mut automatic, 2)
}

fn fill(pattern: &str, args: &CallArguments, automatic: &mut usize, depth: usize) -> RenderResult<String> {
    let mut out = String::new();
    let mut rest = pattern;
    while let Some(at) = rest.find(['{', '}']) {
        out += &rest[..at];
        let brace = &rest[at..at + 1];
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix(brace) {
            out += brace;
            rest = after;
            continue;
        }
        if brace == "}" {
            return fail("Single '}' encountered in format string");
        }
        let mut open = 1;
        let end = rest.char_indices().find(|(_, c)| {
            open += i32::from(*c == '{') - i32::from(*c == '}');
            open == 0
        });
        let Some((end, _)) = end else { return fail("expected '}' before end of string") };
        let field = &rest[..end];
        rest = &rest[end + 1..];
        if depth == 0 {
            return fail("Max string recursion exceeded");
        }
        let (head, spec) = field.split_once(':').unwrap_or((field, ""));
        let (name, conversion) = match head.split_once('!') {
            Some((name, conversion)) => (name, Some(conversion)),
            None => (head, None),
        };
        let value = field_value(name, args, automatic)?;
        let value = match conversion {
            None => value,
            Some("s") => JinjaValue::Str(value.to_text()?),
            Some("r") => value.repr()?.into(),
            Some(other) => return fail(format!("the conversion '!{other}' is not supported")),
        };
        let spec = fill(spec, args, automatic, depth - 1)?;
        out += &format_value(&value, &spec)?;
    }
    Ok(out + rest)
}

/// `name`, `0`, or neither, with `.attribute` and `[item]` behind it.
fn field_value(name: &str, args: &CallArguments, automatic: &mut usize) -> RenderResult<JinjaValue> {
    let end = name.find(['.', '[']).unwrap_or(name.len());
    let (first, mut rest) = name.split_at(end);
    let index = match first {
        "" => {
            *automatic += 1;
            Some(*automatic - 1)
        }
        _ => first.parse::<usize>().ok(),
    };
    let found = match index {
        Some(i) => args.positional.get(i),
        None => args.named.iter().find(|(n, _)| &**n == first).map(|(_, value)| value),
    };
    let Some(found) = found else {
        return match index {
            Some(i) => fail(format!("Replacement index {i} out of range for positional args tuple")),
            None => fail(text::repr(first)),
        };
    };
    let mut value = found.clone();
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix('.') {
            let end = after.find(['.', '[']).unwrap_or(after.len());
            value = access::attribute(&value, &after[..end])?;
            rest = &after[end..];
        } else {
            let inside = rest.strip_prefix('[').and_then(|r| r.split_once(']'));
            let Some((key, after)) = inside else { return fail("Missing ']' in format string") };
            let key = key.parse::<i128>().map_or_else(|_| JinjaValue::from(key), JinjaValue::Int);
            value = access::item(&value, &key)?;
            rest = after;
        }
    }
    Ok(value)
}

/// `pattern % values`
pub fn printf(pattern: &str, values: &JinjaValue) -> RenderResult<String> {
    let mut out = String::new();
    let single = [values.clone()];
    let list = match values {
        JinjaValue::Tuple(items) | JinjaValue::Group(items) => items.as_slice(),
        _ => &single[..],
    };
    let mut next = 0;
    let mut rest = pattern;
    while let Some(at) = rest.find('%') {
        out += &rest[..at];
        rest = &rest[at + 1..];
        let mut key = None;
        if let Some(inner) = rest.strip_prefix('(') {
            let Some((name, after)) = inner.split_once(')') else { return fail("incomplete format key") };
            key = Some(name);
            rest = after;
        }
        let flags = rest.len() - rest.trim_start_matches(['-', '+', ' ', '#', '0']).len();
        let (flags, after) = rest.split_at(flags);
        rest = after;
        let mut spec = FormatSpec { alternate: flags.contains('#'), ..FormatSpec::default() };
        spec.sign = ['+', ' '].into_iter().find(|c| flags.contains(*c));
        if rest.starts_with('*') || rest.starts_with(".*") {
            return fail("'*' in a format is not supported");
        }
        if let Some((n, len)) = number(rest) {
            spec.width = n;
            rest = &rest[len..];
        }
        if let Some(after) = rest.strip_prefix('.') {
            let (n, len) = number(after).unwrap_or((0, 0));
            spec.precision = Some(n);
            rest = &after[len..];
        }
        rest = rest.strip_prefix(['h', 'l', 'L']).unwrap_or(rest);
        let Some(kind) = rest.chars().next() else { return fail("incomplete format") };
        rest = &rest[kind.len_utf8()..];
        if kind == '%' {
            out.push('%');
            continue;
        }
        let value = match (key, values) {
            (Some(key), JinjaValue::Dict(dict)) => match dict.name(key) {
                Some(value) => value.clone(),
                None => return fail(text::repr(key)),
            },
            (Some(_), _) => return fail("format requires a mapping"),
            (None, _) => match list.get(next) {
                Some(value) => value.clone(),
                None => return fail("not enough arguments for format string"),
            },
        };
        next += 1;
        (spec.fill, spec.align) = match flags {
            _ if flags.contains('-') => (None, Some('<')),
            _ if flags.contains('0') && !matches!(kind, 's' | 'r' | 'c') => (Some('0'), Some('=')),
            _ => (None, Some('>')),
        };
        out += &printf_value(kind, spec, &value)?;
    }
    // A dict or list that no field took is no error.
    let all_taken = next >= list.len()
        || matches!(
            values,
            JinjaValue::Dict(_) | JinjaValue::List(_) | JinjaValue::Range(_) | JinjaValue::Undefined(_)
        ) && next == 0;
    if !all_taken {
        return fail("not all arguments converted during string formatting");
    }
    Ok(out + rest)
}

fn printf_value(kind: char, mut spec: FormatSpec, value: &JinjaValue) -> RenderResult<String> {
    spec.kind = Some(kind);
    match kind {
        's' | 'r' => {
            let whole = if kind == 's' { value.to_text()?.to_string() } else { value.repr()? };
            let cut: String = whole.chars().take(spec.precision.unwrap_or(usize::MAX)).collect();
            Ok(spec.pad("", &cut, '>'))
        }
        'd' | 'i' | 'u' | 'x' | 'X' | 'o' => {
            defined(value)?;
            let whole = match value {
                JinjaValue::Float(x) if "diu".contains(kind) => numbers::truncate(*x),
                other => other.as_int(),
            };
            let Some(n) = whole else {
                let wanted = if "diu".contains(kind) { "a real number" } else { "an integer" };
                return fail(format!("%{kind} format: {wanted} is required, not {}", value.type_name()));
            };
            let digits = spec.precision.take().unwrap_or(0);
            spec.kind = Some(if "iu".contains(kind) { 'd' } else { kind });
            if digits > 0 {
                return fail(format!("a precision of %{kind} is not supported"));
            }
            format_int(&spec, n)
        }
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
            defined(value)?;
            let x = match value {
                JinjaValue::Float(x) => Some(*x),
                other => other.as_int().map(|n| n as f64),
            };
            match x {
                Some(x) => format_float(&spec, x),
                None => fail(format!("must be real number, not {}", value.type_name())),
            }
        }
        'c' => match value {
            JinjaValue::Str(one) if one.chars().count() == 1 => Ok(spec.pad("", one, '>')),
            JinjaValue::Int(n) => format_int(&spec, *n),
            _ => fail("%c requires int or char"),
        },
        _ => fail(format!("unsupported format character '{kind}'")),
    }
}
