//! A template's text as tokens: data, and what stands inside tags.

use super::text::is_space;
use super::{Failure, RenderResult};

#[derive(Debug, Clone, PartialEq)]
pub enum Token {
    Data(String),
    VariableBegin,
    VariableEnd,
    BlockBegin,
    BlockEnd,
    Name(String),
    Str(String),
    Int(i128),
    Float(f64),
    Op(&'static str),
}

/// Longest first.
const OPERATORS: [&str; 26] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<",
    "=", ".", ":", "|", ",", ";",
];

/// All tokens, each with its line.
pub fn tokens(source: &str) -> RenderResult<Vec<(usize, Token)>> {
    // As jinja2 reads text: any line end is `\n`, and the last one is left out.
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let source = source.strip_suffix('\n').unwrap_or(&source);
    let mut lexer = Lexer { source, at: 0, line: 1, line_starting: true, out: Vec::new() };
    lexer.root()?;
    Ok(lexer.out)
}

struct Lexer<'a> {
    source: &'a str,
    at: usize,
    line: usize,
    /// Whether a line begins where the last tag ended.
    line_starting: bool,
    out: Vec<(usize, Token)>,
}

impl<'a> Lexer<'a> {
    fn rest(&self) -> &'a str {
        &self.source[self.at..]
    }

    fn skip(&mut self, bytes: usize) {
        let passed = &self.source[self.at..self.at + bytes];
        self.line += passed.matches('\n').count();
        self.line_starting = passed.ends_with('\n');
        self.at += bytes;
    }

    fn push(&mut self, token: Token) {
        self.out.push((self.line, token));
    }

    fn fail<T>(&self, message: impl std::fmt::Display) -> RenderResult<T> {
        Err(Failure::at(self.line, format!("syntax error: {message}")))
    }

    fn root(&mut self) -> RenderResult<()> {
        loop {
            let rest = self.rest();
            let Some(at) = ["{{", "{%", "{#"].iter().filter_map(|mark| rest.find(mark)).min() else {
                if !rest.is_empty() {
                    self.push(Token::Data(rest.into()));
                }
                return Ok(());
            };
            let mark = &rest[at..at + 2];
            let sign = rest[at + 2..].chars().next().filter(|c| matches!(c, '-' | '+'));
            self.data(at, sign, mark != "{{");
            if mark == "{%" && raw_begin(self.rest()).is_some() {
                self.raw()?;
                continue;
            }
            self.skip(2 + usize::from(sign.is_some()));
            match mark {
                "{#" => self.comment()?,
                "{%" => {
                    self.push(Token::BlockBegin);
                    self.inside("%}")?;
                    self.push(Token::BlockEnd);
                }
                _ => {
                    self.push(Token::VariableBegin);
                    self.inside("}}")?;
                    self.push(Token::VariableEnd);
                }
            }
        }
    }

    /// The data up to a tag: without the white space that the tag's sign takes away, or, before a `block` alone on its line,
    /// without that line's indent.
    fn data(&mut self, len: usize, sign: Option<char>, block: bool) {
        let text = &self.rest()[..len];
        let kept = match sign {
            Some('-') => text.trim_end_matches(is_space),
            None if block => {
                let line = text.rfind('\n').map_or(0, |at| at + 1);
                let alone = (line > 0 || self.line_starting) && text[line..].chars().all(is_space);
                if alone { &text[..line] } else { text }
            }
            _ => text,
        };
        if !kept.is_empty() {
            self.push(Token::Data(kept.into()));
        }
        self.skip(len);
    }

    fn comment(&mut self) -> RenderResult<()> {
        let Some(end) = self.rest().find("#}") else { return self.fail("a comment has no end") };
        let sign = self.rest()[..end].chars().next_back().filter(|c| matches!(c, '-' | '+'));
        self.skip(end);
        self.end_of_tag(sign, true);
        Ok(())
    }

    /// Takes the two characters that end a tag, and the white space after them that goes with it.
    fn end_of_tag(&mut self, sign: Option<char>, block: bool) {
        self.skip(2);
        let rest = self.rest();
        let more = match sign {
            Some('-') => rest.len() - rest.trim_start_matches(is_space).len(),
            None if block && rest.starts_with('\n') => 1,
            _ => 0,
        };
        if more > 0 {
            self.skip(more);
        }
    }

    fn raw(&mut self) -> RenderResult<()> {
        let Some((len, minus)) = raw_begin(self.rest()) else { return Ok(()) };
        self.skip(len);
        if minus {
            let rest = self.rest();
            let spaces = rest.len() - rest.trim_start_matches(is_space).len();
            self.skip(spaces);
        }
        let rest = self.rest();
        let end = rest.match_indices("{%").find_map(|(at, _)| raw_end(&rest[at..]).map(|end| (at, end)));
        let Some((at, (before, inside, after))) = end else { return self.fail("{% raw %} has no end") };
        self.data(at, before, true);
        self.skip(inside);
        self.end_of_tag(after, true);
        Ok(())
    }

    /// The tokens of a tag, up to its end.
    fn inside(&mut self, end: &str) -> RenderResult<()> {
        let mut open: Vec<&str> = Vec::new();
        loop {
            let rest = self.rest();
            let spaces = rest.len() - rest.trim_start_matches(is_space).len();
            if spaces > 0 {
                self.skip(spaces);
                continue;
            }
            if open.is_empty() {
                let sign = rest.chars().next().filter(|c| *c == '-' || *c == '+' && end == "%}");
                let after = &rest[usize::from(sign.is_some())..];
                if after.starts_with(end) {
                    self.at += usize::from(sign.is_some());
                    self.end_of_tag(sign, end == "%}");
                    return Ok(());
                }
            }
            let Some(first) = rest.chars().next() else {
                return self.fail(format!("a tag has no end: `{end}` is missing"));
            };
            if first.is_ascii_digit() {
                self.number()?;
            } else if first == '_' || first.is_alphabetic() {
                let len = rest.find(|c: char| !(c == '_' || c.is_alphanumeric())).unwrap_or(rest.len());
                self.push(Token::Name(rest[..len].into()));
                self.skip(len);
            } else if first == '\'' || first == '"' {
                self.string(first)?;
            } else if let Some(op) = OPERATORS.iter().find(|op| rest.starts_with(**op)) {
                match *op {
                    "(" => open.push(")"),
                    "[" => open.push("]"),
                    "{" => open.push("}"),
                    ")" | "]" | "}" => match open.pop() {
                        Some(wanted) if wanted == *op => {}
                        Some(wanted) => return self.fail(format!("unexpected '{op}', expected '{wanted}'")),
                        None => return self.fail(format!("unexpected '{op}'")),
                    },
                    _ => {}
                }
                self.push(Token::Op(op));
                self.skip(op.len());
            } else {
                return self.fail(format!("unexpected character {first:?}"));
            }
        }
    }

    fn number(&mut self) -> RenderResult<()> {
        let rest = self.rest();
        let after_dot = self.source[..self.at].ends_with('.');
        if let Some(len) = float_len(rest).filter(|_| !after_dot) {
            let value = rest[..len].replace('_', "").parse();
            self.push(Token::Float(value.unwrap_or(f64::INFINITY)));
            self.skip(len);
            return Ok(());
        }
        let lower = rest.get(..2).unwrap_or_default().to_ascii_lowercase();
        let (radix, prefix) = match lower.as_str() {
            "0x" => (16, 2),
            "0o" => (8, 2),
            "0b" => (2, 2),
            _ => (10, 0),
        };
        let after_prefix = usize::from(prefix > 0 && rest[prefix..].starts_with('_')) + prefix;
        let mut len = after_prefix + digits_len(&rest[after_prefix..], radix);
        if radix == 10 && rest.starts_with('0') {
            len = rest.find(|c| c != '0').unwrap_or(rest.len());
        }
        let text = rest[prefix..len].replace('_', "");
        let value = i128::from_str_radix(&text, radix);
        let Ok(value) = value else {
            return self.fail(format!("the number {} is not supported", &rest[..len]));
        };
        self.push(Token::Int(value));
        self.skip(len);
        Ok(())
    }

    fn string(&mut self, quote: char) -> RenderResult<()> {
        let rest = self.rest();
        let mut escaped = false;
        let end = rest.char_indices().skip(1).find(|(_, c)| {
            let ends = *c == quote && !escaped;
            escaped = *c == '\\' && !escaped;
            ends
        });
        let Some((end, _)) = end else {
            return self.fail(format!("a text that begins with {quote} has no end"));
        };
        match unescape(&rest[1..end]) {
            Ok(text) => self.push(Token::Str(text)),
            Err(what) => return self.fail(what),
        }
        self.skip(end + 1);
        Ok(())
    }
}

/// Length of a `{% raw %}` tag that a text begins with, and whether it takes the white space behind it.
fn raw_begin(text: &str) -> Option<(usize, bool)> {
    let inner = text.strip_prefix("{%")?;
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_start_matches(is_space);
    let inner = inner.strip_prefix("raw")?.trim_start_matches(is_space);
    let minus = inner.starts_with('-');
    let after = inner.strip_prefix('-').unwrap_or(inner).strip_prefix("%}")?;
    Some((text.len() - after.len(), minus))
}

/// Of an `{% endraw %}` tag that a text begins with: its first sign, its length up to the last sign's end, and that sign.
fn raw_end(text: &str) -> Option<(Option<char>, usize, Option<char>)> {
    let inner = text.strip_prefix("{%")?;
    let before = inner.chars().next().filter(|c| matches!(c, '-' | '+'));
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_start_matches(is_space);
    let inner = inner.strip_prefix("endraw")?.trim_start_matches(is_space);
    let sign = inner.chars().next().filter(|c| matches!(c, '-' | '+'));
    let end = &inner[usize::from(sign.is_some())..];
    end.starts_with("%}").then(|| (before, text.len() - end.len(), sign))
}

/// Length of the digits (with single `_` between them) that a text begins with.
fn digits_len(text: &str, radix: u32) -> usize {
    let digit = |at: usize| text.as_bytes().get(at).is_some_and(|b| char::from(*b).is_digit(radix));
    let mut len = 0;
    while digit(len) || len > 0 && text[len..].starts_with('_') && digit(len + 1) {
        len += 1;
    }
    len
}

/// Length of a float that a text begins with.
fn float_len(text: &str) -> Option<usize> {
    let decimals = |text| digits_len(text, 10);
    let whole = decimals(text);
    let fraction = text[whole..].strip_prefix('.').map_or(0, decimals);
    let mantissa = if fraction > 0 { whole + 1 + fraction } else { whole };
    let exponent = text[mantissa..].strip_prefix(['e', 'E']).map_or(0, |rest| {
        let sign = usize::from(rest.starts_with(['+', '-']));
        match decimals(&rest[sign..]) {
            0 => 0,
            digits => 1 + sign + digits,
        }
    });
    (whole > 0 && (fraction > 0 || exponent > 0)).then_some(mantissa + exponent)
}

/// What a text between quotes says, by Python's escapes; an unknown one stays as it is.
fn unescape(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out += &rest[..at];
        let escape = &rest[at + 1..];
        let Some(c) = escape.chars().next() else { return Err("a text ends in a lone backslash".into()) };
        rest = &escape[c.len_utf8()..];
        let mut hex = |digits: usize| -> Result<char, String> {
            let text = rest.get(..digits).filter(|t| t.bytes().all(|b| b.is_ascii_hexdigit()));
            let code = text.and_then(|t| u32::from_str_radix(t, 16).ok());
            let Some(code) = code else { return Err(format!("truncated \\{c} escape")) };
            rest = &rest[digits..];
            char::from_u32(code).ok_or_else(|| format!("\\{c}{code:x} is no character"))
        };
        match c {
            '\n' => {}
            '\\' | '\'' | '"' => out.push(c),
            'n' => out.push('\n'),
            't' => out.push('\t'),
            'r' => out.push('\r'),
            'a' => out.push('\u{7}'),
            'b' => out.push('\u{8}'),
            'f' => out.push('\u{c}'),
            'v' => out.push('\u{b}'),
            'x' => out.push(hex(2)?),
            'u' => out.push(hex(4)?),
            'U' => out.push(hex(8)?),
            'N' => return Err("\\N escapes are not supported; write the character".into()),
            '0'..='7' => {
                let len = escape.bytes().take(3).take_while(|b| (b'0'..=b'7').contains(b)).count();
                let code = u32::from_str_radix(&escape[..len], 8).unwrap_or_default();
                out.extend(char::from_u32(code));
                rest = &escape[len..];
            }
            // Python escapes it once more before it looks for escapes.
            c if !c.is_ascii() => {
                let (code, out) = (c as u32, &mut out);
                *out += &match code {
                    0..0x100 => format!("\\x{code:02x}"),
                    0x100..0x10000 => format!("\\u{code:04x}"),
                    _ => format!("\\U{code:08x}"),
                };
            }
            c => {
                out.push('\\');
                out.push(c);
            }
        }
    }
    out += rest;
    Ok(out)
}
