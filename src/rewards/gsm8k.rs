//! Answers of GSM8K's form: steps, then a last line `#### number` (Cobbe et al. 2021).

use serde::Serialize;

pub use crate::config::rewards::AnswerForm;

/// What a text says its answer is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NumberAnswer {
    /// As it is written.
    pub text: String,
    /// In one form for equal numbers: no separators, no superfluous zeros.
    pub number: String,
}

/// The answer that a text gives, if it gives one.
pub fn answer(text: &str, form: AnswerForm) -> Option<NumberAnswer> {
    match form {
        AnswerForm::Strict => text.rmatch_indices("####").find_map(|(at, mark)| {
            let rest = text[at + mark.len()..].trim_start_matches([' ', '$']);
            number_at_start(rest)
        }),
        AnswerForm::Flexible => {
            let (mut last, mut at) = (None, 0);
            while let Some(c) = text[at..].chars().next() {
                // Digits within a word (`b2`) are no number.
                let begins = (c.is_ascii_digit() || c == '.') && !text[..at].ends_with(char::is_alphanumeric);
                match begins.then(|| number_at_start(&text[at..])).flatten() {
                    Some(answer) => {
                        let end = at + answer.text.len();
                        last = Some(signed(&text[..at], answer));
                        at = end;
                    }
                    None => at += c.len_utf8(),
                }
            }
            last
        }
    }
}

/// The answer that a reference gives: the number after its last `####`; without that mark, the number that it is. Of what
/// is more than a number (`3 apples and 4`, `1/2`) none is taken for the answer.
pub fn reference(text: &str) -> Option<NumberAnswer> {
    let text = text.trim();
    if text.contains("####") {
        return answer(text, AnswerForm::Strict);
    }
    let text = text.trim_start_matches([' ', '$']);
    number_at_start(text).filter(|answer| answer.text == text.trim_end_matches([',', '.']))
}

/// A minus right before a number belongs to it, unless it stands after an operand.
fn signed(before: &str, answer: NumberAnswer) -> NumberAnswer {
    let operand = |c: char| c.is_alphanumeric() || c == ')';
    match before.strip_suffix('-') {
        Some(rest) if answer.number != "0" && !rest.trim_end().ends_with(operand) => {
            NumberAnswer { text: format!("-{}", answer.text), number: format!("-{}", answer.number) }
        }
        _ => answer,
    }
}

/// The number that a text begins with: a sign, digits with commas in them, a fraction.
fn number_at_start(text: &str) -> Option<NumberAnswer> {
    let end = text
        .char_indices()
        .find(|(i, c)| !(c.is_ascii_digit() || *c == ',' || *c == '.' || (*i == 0 && *c == '-')))
        .map_or(text.len(), |(i, _)| i);
    // A comma or a full stop at the end belongs to the sentence.
    let written = text[..end].trim_end_matches([',', '.']);
    Some(NumberAnswer { text: written.to_string(), number: canonical(written)? })
}

/// One form for equal decimal numbers; none for what is no number.
pub fn canonical(written: &str) -> Option<String> {
    let (negative, digits) = match written.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, written),
    };
    let digits: String = digits.chars().filter(|c| *c != ',').collect();
    let (whole, fraction) = digits.split_once('.').unwrap_or((&digits, ""));
    let all_digits = |s: &str| s.chars().all(|c| c.is_ascii_digit());
    if !all_digits(whole) || !all_digits(fraction) || (whole.is_empty() && fraction.is_empty()) {
        return None;
    }
    let (whole, fraction) = (whole.trim_start_matches('0'), fraction.trim_end_matches('0'));
    let whole = if whole.is_empty() { "0" } else { whole };
    let number = if fraction.is_empty() { whole.to_string() } else { format!("{whole}.{fraction}") };
    Some(if negative && number != "0" { format!("-{number}") } else { number })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(text: &str, form: AnswerForm) -> Option<String> {
        answer(text, form).map(|a| a.number)
    }

    #[test]
    fn the_last_mark_counts() {
        let cases = [
            ("2 + 2 = 4\n#### 4", Some("4")),
            ("#### 3\nno, wait\n#### 1,234.50", Some("1234.5")),
            ("####-7", Some("-7")),
            ("#### $18.", Some("18")),
            ("#### 18, I think", Some("18")),
            ("#### 5\n#### none", Some("5")),
            ("the answer is 4", None),
            ("#### ", None),
            ("#### 1.2.3", None),
            ("", None),
        ];
        for (text, wanted) in cases {
            assert_eq!(number(text, AnswerForm::Strict).as_deref(), wanted, "{text}");
        }
    }

    #[test]
    fn the_last_number_counts() {
        let cases = [
            ("He has 3 and then 1,200 apples.", Some("1200")),
            ("so x = -4.0", Some("-4")),
            ("7 - 4", Some("4")),
            ("7-4", Some("4")),
            ("it is .5", Some("0.5")),
            ("no number", None),
            ("version b2 has 3 ends", Some("3")),
        ];
        for (text, wanted) in cases {
            assert_eq!(number(text, AnswerForm::Flexible).as_deref(), wanted, "{text}");
        }
    }

    #[test]
    fn a_reference_is_a_number_or_marks_one() {
        let cases = [
            ("16 - 9 = 7\n#### 7", Some("7")),
            ("18", Some("18")),
            (" $1,200.50. ", Some("1200.5")),
            ("-3", Some("-3")),
            ("3 apples and 4 make 7", None),
            ("1/2", None),
            ("5%", None),
            ("x = 4", None),
            ("", None),
        ];
        for (text, wanted) in cases {
            assert_eq!(reference(text).map(|a| a.number).as_deref(), wanted, "{text}");
        }
    }

    #[test]
    fn equal_numbers_have_one_form() {
        for (a, b) in
            [("007", "7"), ("1,000", "1000"), ("2.50", "2.5"), ("3.", "3"), ("-0", "0"), (".5", "0.5")]
        {
            assert_eq!(canonical(a), canonical(b), "{a} {b}");
        }
        for text in ["", "-", ".", ",", "1e5", "--1", "1.2.3"] {
            assert_eq!(canonical(text), None, "{text}");
        }
    }
}
