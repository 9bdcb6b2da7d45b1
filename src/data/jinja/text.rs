//! What Python does with texts.

use std::sync::OnceLock;

use regex::Regex;

/// White space as `str.isspace` knows it.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Whether the character has this property of Unicode's, such as `L`.
fn has(cell: &'static OnceLock<Option<Regex>>, class: &str, c: char) -> bool {
    let regex = cell.get_or_init(|| Regex::new(&format!(r"^[{class}]$")).ok());
    regex.as_ref().is_some_and(|r| r.is_match(c.encode_utf8(&mut [0; 4])))
}

pub fn is_alpha(c: char) -> bool {
    static LETTER: OnceLock<Option<Regex>> = OnceLock::new();
    if c.is_ascii() { c.is_ascii_alphabetic() } else { has(&LETTER, r"\p{L}", c) }
}

pub fn is_decimal(c: char) -> bool {
    static DECIMAL: OnceLock<Option<Regex>> = OnceLock::new();
    if c.is_ascii() { c.is_ascii_digit() } else { has(&DECIMAL, r"\p{Nd}", c) }
}

pub fn is_numeric(c: char) -> bool {
    static NUMBER: OnceLock<Option<Regex>> = OnceLock::new();
    if c.is_ascii() { c.is_ascii_digit() } else { has(&NUMBER, r"\p{N}", c) }
}

/// Decimals, and digits in circles, above or below the line.
pub fn is_digit(c: char) -> bool {
    let other = matches!(
        c,
        '²' | '³' | '¹' | '⁰' | '⁴'..='⁹' | '₀'..='₉' | '①'..='⑨' | '⑴'..='⑼' | '⒈'..='⒐' | '⓪' | '⓵'..='⓽'
            | '⓿' | '❶'..='❾' | '➀'..='➈' | '➊'..='➒'
    );
    is_decimal(c) || other
}

/// Whether it may stand in a word, as `\w` of Python's regular expressions has it.
pub fn is_word(c: char) -> bool {
    c == '_' || is_alpha(c) || is_numeric(c)
}

pub fn is_cased(c: char) -> bool {
    c.is_lowercase() || c.is_uppercase() || title_pair(c).is_some_and(|title| title == c)
}

/// `repr` of a text.
pub fn repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::with_capacity(text.len() + 2);
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out += "\\n",
            '\r' => out += "\\r",
            '\t' => out += "\\t",
            '\\' => out += "\\\\",
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if is_printable(c) => out.push(c),
            c if (c as u32) < 0x100 => out += &format!("\\x{:02x}", c as u32),
            c if (c as u32) < 0x10000 => out += &format!("\\u{:04x}", c as u32),
            c => out += &format!("\\U{:08x}", c as u32),
        }
    }
    out.push(quote);
    out
}

pub fn is_printable(c: char) -> bool {
    static OTHER: OnceLock<Option<Regex>> = OnceLock::new();
    if c.is_ascii() { (' '..='~').contains(&c) } else { !has(&OTHER, r"\p{C}\p{Z}", c) }
}

/// Text of HTML.
pub fn escape(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    text.replace('"', "&#34;").replace('\'', "&#39;")
}

/// The title case of the Latin digraphs, which is neither upper nor lower case.
fn title_pair(c: char) -> Option<char> {
    match c {
        'Ǆ'..='ǆ' => Some('ǅ'),
        'Ǉ'..='ǉ' => Some('ǈ'),
        'Ǌ'..='ǌ' => Some('ǋ'),
        'Ǳ'..='ǳ' => Some('ǲ'),
        // Greek with an iota: the capital has it beside the letter.
        '\u{1f80}'..='\u{1f87}' | '\u{1f90}'..='\u{1f97}' | '\u{1fa0}'..='\u{1fa7}' => {
            char::from_u32(c as u32 + 8)
        }
        '\u{1f88}'..='\u{1f8f}' | '\u{1f98}'..='\u{1f9f}' | '\u{1fa8}'..='\u{1faf}' => Some(c),
        'ᾳ' | 'ῃ' | 'ῳ' => char::from_u32(c as u32 + 9),
        'ᾼ' | 'ῌ' | 'ῼ' => Some(c),
        // Georgian has capitals, and no titles.
        '\u{10d0}'..='\u{10fa}' | '\u{10fd}'..='\u{10ff}' => Some(c),
        _ => None,
    }
}

/// The character as the first of a title.
fn push_title(out: &mut String, c: char) {
    if let Some(title) = title_pair(c) {
        out.push(title);
        return;
    }
    let mut upper = c.to_uppercase();
    let first = upper.next().unwrap_or(c);
    out.push(first);
    // Of a ligature only the first letter is a capital; an apostrophe is none.
    if is_cased(first) {
        out.extend(upper.flat_map(char::to_lowercase));
    } else {
        out.extend(upper);
    }
}

pub fn capitalize(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    if let Some(first) = chars.next() {
        push_title(&mut out, first);
        // The lower case of a sigma depends on what stands before it.
        let lower = text.to_lowercase();
        let len: usize = first.to_lowercase().map(char::len_utf8).sum();
        out += &lower[len..];
    }
    out
}

/// `str.title`: every run of letters begins with a capital.
pub fn title(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut inside = false;
    let lower = text.to_lowercase();
    let mut lower = lower.chars();
    for c in text.chars() {
        let lower: String = lower.by_ref().take(c.to_lowercase().count()).collect();
        if inside {
            out += &lower;
        } else {
            push_title(&mut out, c);
        }
        inside = is_cased(c);
    }
    out
}

/// Jinja's filter `title`: every word begins with a capital.
pub fn title_words(text: &str) -> String {
    let separates = |c: char| is_space(c) || "-({[<".contains(c);
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let kind = separates(first);
        let end = rest.find(|c| separates(c) != kind).unwrap_or(rest.len());
        out.extend(first.to_uppercase());
        out += &rest[first.len_utf8()..end].to_lowercase();
        rest = &rest[end..];
    }
    out
}

pub fn swap_case(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let lower = text.to_lowercase();
    let mut lower = lower.chars();
    for c in text.chars() {
        let lower = lower.by_ref().take(c.to_lowercase().count());
        if c.is_uppercase() {
            out.extend(lower);
        } else {
            lower.for_each(drop);
            out.extend(c.to_uppercase());
        }
    }
    out
}

/// The lines of a text, by all that Python takes for a line's end.
pub fn lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let ends = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let (mut lines, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let (line, end) = match rest.find(ends) {
            Some(at) if rest[at..].starts_with("\r\n") => (at, at + 2),
            Some(at) => (at, at + rest[at..].chars().next().map_or(1, char::len_utf8)),
            None => (rest.len(), rest.len()),
        };
        lines.push(&rest[..if keep_ends { end } else { line }]);
        rest = &rest[end..];
    }
    lines
}

/// `str.split`: at white space, or at a separator; at most `most` times.
pub fn split(text: &str, separator: Option<&str>, most: usize) -> Vec<String> {
    let mut parts = Vec::new();
    let Some(separator) = separator else {
        let mut rest = text.trim_start_matches(is_space);
        while !rest.is_empty() {
            let end = rest.find(is_space).filter(|_| parts.len() < most).unwrap_or(rest.len());
            // The last part keeps white space inside, and, where splits are counted, at its end.
            parts.push(rest[..end].to_string());
            rest = rest[end..].trim_start_matches(is_space);
        }
        return parts;
    };
    parts.extend(text.splitn(most.saturating_add(1), separator).map(str::to_string));
    parts
}

/// `str.rsplit`
pub fn rsplit(text: &str, separator: Option<&str>, most: usize) -> Vec<String> {
    let mut parts = Vec::new();
    match separator {
        None => {
            let mut rest = text.trim_end_matches(is_space);
            while !rest.is_empty() {
                let cut = rest.rfind(is_space).filter(|_| parts.len() < most);
                let begin = cut.map_or(0, |at| at + rest[at..].chars().next().map_or(1, char::len_utf8));
                parts.push(rest[begin..].to_string());
                rest = rest[..begin].trim_end_matches(is_space);
            }
        }
        Some(separator) => parts.extend(text.rsplitn(most.saturating_add(1), separator).map(str::to_string)),
    }
    parts.reverse();
    parts
}
