//! Jinja's tests: what follows `is`.

use super::arguments::{CallArguments, int, required};
use super::tree::Comparison;
use super::value::JinjaValue;
use super::{RenderResult, fail, filters, operators, text};

const NAMES: [&str; 39] = [
    "odd",
    "even",
    "divisibleby",
    "defined",
    "undefined",
    "filter",
    "test",
    "none",
    "boolean",
    "false",
    "true",
    "integer",
    "float",
    "lower",
    "upper",
    "string",
    "mapping",
    "number",
    "sequence",
    "iterable",
    "callable",
    "sameas",
    "escaped",
    "in",
    "==",
    "eq",
    "equalto",
    "!=",
    "ne",
    ">",
    "gt",
    "greaterthan",
    "ge",
    ">=",
    "<",
    "lt",
    "lessthan",
    "<=",
    "le",
];

pub fn check(name: &str, value: &JinjaValue, args: CallArguments) -> RenderResult<bool> {
    use Comparison::*;
    let comparison = match name {
        "==" | "eq" | "equalto" => Some(Eq),
        "!=" | "ne" => Some(Ne),
        ">" | "gt" | "greaterthan" => Some(Gt),
        ">=" | "ge" => Some(Ge),
        "<" | "lt" | "lessthan" => Some(Lt),
        "<=" | "le" => Some(Le),
        "in" => Some(In),
        _ => None,
    };
    let what = || format!("the test '{name}'");
    if let Some(comparison) = comparison {
        let [other] = args.bind(&what(), ["other"])?;
        return operators::compare(comparison, value, &required(&what(), "other", other)?);
    }
    if name == "divisibleby" || name == "sameas" {
        let [other] = args.bind(&what(), [if name == "sameas" { "other" } else { "num" }])?;
        let other = required(&what(), "other", other)?;
        return match name {
            "sameas" => Ok(operators::same(value, &other)),
            _ => Ok(remainder(value, &other)? == 0),
        };
    }
    args.none(&what())?;
    Ok(match name {
        "odd" => remainder(value, &JinjaValue::Int(2))? == 1,
        "even" => remainder(value, &JinjaValue::Int(2))? == 0,
        "defined" => !value.is_undefined(),
        "undefined" => value.is_undefined(),
        "filter" => value.as_str().is_some_and(|name| filters::NAMES.contains(&name)),
        "test" => value.as_str().is_some_and(|name| NAMES.contains(&name)),
        "none" => matches!(value, JinjaValue::None),
        "boolean" => matches!(value, JinjaValue::Bool(_)),
        "false" => matches!(value, JinjaValue::Bool(false)),
        "true" => matches!(value, JinjaValue::Bool(true)),
        "integer" => matches!(value, JinjaValue::Int(_)),
        "float" => matches!(value, JinjaValue::Float(_)),
        "number" => matches!(value, JinjaValue::Int(_) | JinjaValue::Float(_) | JinjaValue::Bool(_)),
        "string" => value.as_str().is_some(),
        "mapping" => matches!(value, JinjaValue::Dict(_)),
        "sequence" => {
            let iterates = matches!(value, JinjaValue::View(..) | JinjaValue::Iterator(..));
            value.is_iterable() && !iterates
        }
        "iterable" => value.is_iterable() || matches!(value, JinjaValue::Loop(_)),
        "callable" => matches!(
            value,
            JinjaValue::Macro(_)
                | JinjaValue::Function(_)
                | JinjaValue::Method(_)
                | JinjaValue::Joiner(_)
                | JinjaValue::Loop(_)
                | JinjaValue::Undefined(_)
        ),
        "escaped" => matches!(value, JinjaValue::Markup(_)),
        "lower" | "upper" => {
            let text = value.to_text()?;
            let mut cased = text.chars().filter(|c| text::is_cased(*c)).peekable();
            let right = |c: char| if name == "lower" { c.is_lowercase() } else { c.is_uppercase() };
            cased.peek().is_some() && cased.all(right)
        }
        _ => return fail(format!("unknown test '{name}'")),
    })
}

/// `value % number`
fn remainder(value: &JinjaValue, number: &JinjaValue) -> RenderResult<i128> {
    match operators::binary(super::tree::Operator::Mod, value, number)? {
        JinjaValue::Float(x) => Ok(if x == x.trunc() { x as i128 } else { -1 }),
        other => int("the test", &other),
    }
}
