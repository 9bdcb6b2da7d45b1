//! Answers of MATH's form (Hendrycks et al. 2021): the last `\boxed{}` of a text, compared as exact numbers where both are
//! such, else as LaTeX without what does not matter.

use std::cmp::Ordering;

/// What stands in the last balanced `\boxed{}` (or `\fbox{}`) of a text.
pub fn boxed(text: &str) -> Option<&str> {
    let marks = ["\\boxed", "\\fbox"];
    let mut places: Vec<usize> =
        marks.iter().flat_map(|m| text.match_indices(m).map(|(i, m)| i + m.len())).collect();
    places.sort_unstable();
    places.into_iter().rev().find_map(|at| {
        let rest = text[at..].trim_start();
        braced(rest).map(|(inside, _)| inside.trim())
    })
}

/// What stands in the braces that a text begins with, and what follows them.
fn braced(text: &str) -> Option<(&str, &str)> {
    let inside = text.strip_prefix('{')?;
    let (mut depth, mut escaped) = (1, false);
    for (i, c) in inside.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some((&inside[..i], &inside[i + 1..]));
        }
    }
    None
}

/// The answer that a reference gives: its last box, or, without one, what follows its last `####`, or all of it. None
/// where nothing is left.
pub fn reference(text: &str) -> Option<String> {
    let answer = match boxed(text) {
        Some(answer) => answer,
        None if text.contains("\\boxed") => return None,
        None => text.rsplit("####").next().unwrap_or(text),
    };
    let answer = answer.trim();
    (!normalized(answer).is_empty()).then(|| answer.to_string())
}

/// Whether two answers are equal.
pub fn equal(a: &str, b: &str) -> bool {
    let (a, b) = (normalized(a), normalized(b));
    match (rational(&a), rational(&b)) {
        (Some(a), Some(b)) => a.cmp(&b) == Ordering::Equal,
        (None, None) => a == b,
        _ => false,
    }
}

/// LaTeX without signs of spacing, size and currency, without units in text, and with one kind of fraction.
fn normalized(answer: &str) -> String {
    let mut text = answer.trim().trim_end_matches('.').to_string();
    for (from, to) in [
        ("\\dfrac", "\\frac"),
        ("\\tfrac", "\\frac"),
        ("\\left", ""),
        ("\\right", ""),
        ("\\!", ""),
        ("\\,", ""),
        ("\\;", ""),
        ("\\ ", ""),
        ("\\$", ""),
        ("$", ""),
        ("\\%", ""),
        ("%", ""),
        ("^{\\circ}", ""),
        ("^\\circ", ""),
        ("\\(", ""),
        ("\\)", ""),
    ] {
        text = text.replace(from, to);
    }
    // `12 \text{ miles}` is 12; `\text{yes}` is yes.
    for command in ["\\text", "\\mbox", "\\textbf", "\\mathrm"] {
        while let Some(at) = text.find(&format!("{command}{{")) {
            let Some((inside, rest)) = braced(&text[at + command.len()..]) else { break };
            let before = &text[..at];
            text = match before.trim().is_empty() {
                true => format!("{inside}{rest}"),
                false => format!("{before}{rest}"),
            };
        }
    }
    text.chars().filter(|c| !c.is_whitespace()).collect()
}

/// A fraction in lowest terms, with a positive denominator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rational {
    over: i128,
    under: i128,
}

impl Rational {
    /// None where it does not fit.
    fn new(over: i128, under: i128) -> Option<Rational> {
        if under == 0 {
            return None;
        }
        let (mut a, mut b) = (over.checked_abs()?, under.checked_abs()?);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        let sign = if under < 0 { -1 } else { 1 };
        Some(Rational { over: over / a.max(1) * sign, under: under / a.max(1) * sign })
    }

    fn cmp(&self, other: &Rational) -> Ordering {
        // In lowest terms equal numbers are equal pairs.
        (self.over, self.under).cmp(&(other.over, other.under))
    }

    fn divided_by(self, other: Rational) -> Option<Rational> {
        Rational::new(self.over.checked_mul(other.under)?, self.under.checked_mul(other.over)?)
    }
}

/// The number that normalized LaTeX is: digits with commas and a point, `a/b`, `\frac{a}{b}`, `\frac12`, a sign.
fn rational(text: &str) -> Option<Rational> {
    if let Some(rest) = text.strip_prefix('-') {
        let positive = rational(rest)?;
        return (!rest.starts_with(['-', '+']))
            .then_some(())
            .and_then(|()| Rational::new(positive.over.checked_neg()?, positive.under));
    }
    if let Some(rest) = text.strip_prefix("\\frac") {
        let (over, rest) = argument(rest)?;
        let (under, rest) = argument(rest)?;
        return if rest.is_empty() { rational(over)?.divided_by(rational(under)?) } else { None };
    }
    if let Some((over, under)) = text.split_once('/') {
        return decimal(over)?.divided_by(decimal(under)?);
    }
    match braced(text) {
        Some((inside, "")) => rational(inside),
        _ => decimal(text),
    }
}

/// An argument of a LaTeX command, braced or one character, and what follows.
fn argument(text: &str) -> Option<(&str, &str)> {
    braced(text).or_else(|| {
        let first = text.chars().next().filter(char::is_ascii_digit)?;
        Some(text.split_at(first.len_utf8()))
    })
}

fn decimal(text: &str) -> Option<Rational> {
    let digits: String = text.chars().filter(|c| *c != ',').collect();
    let (whole, fraction) = digits.split_once('.').unwrap_or((&digits, ""));
    let all_digits = |s: &str| s.bytes().all(|c| c.is_ascii_digit());
    if !all_digits(whole) || !all_digits(fraction) || (whole.is_empty() && fraction.is_empty()) {
        return None;
    }
    let fraction = fraction.trim_end_matches('0');
    let over = format!("{whole}{fraction}").parse().ok()?;
    Rational::new(over, 10i128.checked_pow(fraction.len() as u32)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_balanced_box_counts() {
        let cases = [
            (r"so \boxed{3} or \boxed{\frac{1}{2}}.", Some(r"\frac{1}{2}")),
            (r"\boxed{a \{ b} c}", Some(r"a \{ b")),
            (r"\boxed{4} and then \boxed{5", Some("4")),
            (r"\fbox{7}", Some("7")),
            (r"\boxed 5", None),
            (r"\boxed{ 1,234 }", Some("1,234")),
            ("no box", None),
            (r"\boxed{}", Some("")),
        ];
        for (text, wanted) in cases {
            assert_eq!(boxed(text), wanted, "{text}");
        }
    }

    #[test]
    fn numbers_are_compared_exactly() {
        let equal_pairs = [
            ("0.5", r"\frac{1}{2}"),
            (r"\dfrac12", "1/2"),
            (r"-\frac{3}{6}", "-0.50"),
            (r"\frac{-1}{2}", "-1/2"),
            ("1,234.0", "1234"),
            (r"\$18", "18"),
            (r"50\%", "50"),
            (r"12\text{ miles}", "12"),
            (r"\text{yes}", "yes"),
            (r"90^\circ", "90"),
            (r"\left( 1, 2 \right)", "(1,2)"),
            ("x + 1", "x+1"),
            ("{7}", "7"),
            ("0", "-0"),
            (r"\frac{0.5}{2}", "1/4"),
        ];
        for (a, b) in equal_pairs {
            assert!(equal(a, b) && equal(b, a), "{a} {b}");
        }
        let different = [
            ("0.333", r"\frac{1}{3}"),
            ("1/0", "0/0"),
            ("3", "x"),
            ("3", "-3"),
            ("", "0"),
            ("x", "y"),
            ("12345678901234567890123456789012345678901", "12345678901234567890123456789012345678902"),
            (r"\frac{1}{2", r"\frac{1}{3"),
        ];
        for (a, b) in different {
            assert!(!equal(a, b), "{a} {b}");
        }
    }

    #[test]
    fn references_come_in_several_forms() {
        let cases = [
            (r"We get \boxed{5}.", Some("5")),
            ("steps\n#### 42", Some("42")),
            (r"\frac{1}{2}", Some(r"\frac{1}{2}")),
            (" ", None),
            ("#### ", None),
            (r"\boxed{", None),
        ];
        for (text, wanted) in cases {
            assert_eq!(reference(text).as_deref(), wanted, "{text}");
        }
    }
}
