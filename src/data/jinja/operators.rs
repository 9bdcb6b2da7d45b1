//! What can be computed with values: arithmetic, comparisons, membership.

use std::cmp::Ordering;
use std::rc::Rc;

use super::text;
use super::tree::{Comparison, Operator};
use super::value::{JinjaValue, defined, hashable};
use super::{RenderResult, fail, format, numbers};

/// The longest text or list that an operator makes.
const LONGEST: usize = 100_000_000;

/// A number in arithmetic.
enum Number {
    Int(i128),
    Float(f64),
}

fn number(value: &JinjaValue) -> Option<Number> {
    match value {
        JinjaValue::Float(x) => Some(Number::Float(*x)),
        _ => value.as_int().map(Number::Int),
    }
}

fn too_large<T>() -> RenderResult<T> {
    fail("a whole number has more than 38 digits, which is not supported")
}

pub fn binary(operator: Operator, a: &JinjaValue, b: &JinjaValue) -> RenderResult<JinjaValue> {
    defined(a)?;
    if operator == Operator::Mod && a.as_str().is_some() {
        return percent(a, b);
    }
    defined(b)?;
    if let (Some(x), Some(y)) = (number(a), number(b)) {
        return arithmetic(operator, x, y);
    }
    match (operator, a, b) {
        (Operator::Add, JinjaValue::Markup(x), y) | (Operator::Add, y, JinjaValue::Markup(x))
            if y.as_str().is_some() =>
        {
            let (a, b) = if matches!(a, JinjaValue::Markup(_)) {
                (x.clone(), escaped(y)?)
            } else {
                (escaped(y)?, x.clone())
            };
            return Ok(JinjaValue::Markup(format!("{a}{b}").into()));
        }
        (Operator::Add, JinjaValue::Str(x), JinjaValue::Str(y)) => return Ok(format!("{x}{y}").into()),
        (Operator::Add, JinjaValue::List(x), JinjaValue::List(y)) => {
            return Ok(JinjaValue::list(x.iter().chain(y.iter()).cloned().collect()));
        }
        (
            Operator::Add,
            JinjaValue::Tuple(x) | JinjaValue::Group(x),
            JinjaValue::Tuple(y) | JinjaValue::Group(y),
        ) => {
            return Ok(JinjaValue::tuple(x.iter().chain(y.iter()).cloned().collect()));
        }
        (Operator::Mul, JinjaValue::Int(_) | JinjaValue::Bool(_), _) => {
            if let Some(repeated) = repeat(b, a)? {
                return Ok(repeated);
            }
        }
        (Operator::Mul, _, JinjaValue::Int(_) | JinjaValue::Bool(_)) => {
            if let Some(repeated) = repeat(a, b)? {
                return Ok(repeated);
            }
        }
        _ => {}
    }
    if operator == Operator::Add && a.as_str().is_some() {
        return fail(format!("can only concatenate str (not \"{}\") to str", b.type_name()));
    }
    let sign = match operator {
        Operator::Add => "+",
        Operator::Sub => "-",
        Operator::Mul => "*",
        Operator::Div => "/",
        Operator::FloorDiv => "//",
        Operator::Mod => "%",
        Operator::Pow => "** or pow()",
    };
    fail(format!("unsupported operand type(s) for {sign}: '{}' and '{}'", a.type_name(), b.type_name()))
}

/// A text or a list, as often as a number says.
fn repeat(what: &JinjaValue, times: &JinjaValue) -> RenderResult<Option<JinjaValue>> {
    let times = usize::try_from(times.as_int().unwrap_or(0).max(0)).unwrap_or(usize::MAX);
    let size = match what {
        JinjaValue::Str(text) => text.len(),
        _ => what.as_items().map_or(0, |items| items.len()),
    };
    if size.saturating_mul(times) > LONGEST {
        return fail("a repeated text or list is too long");
    }
    let items =
        |items: &Rc<Vec<JinjaValue>>| (0..times).flat_map(|_| items.iter().cloned()).collect::<Vec<_>>();
    Ok(match what {
        JinjaValue::Str(text) => Some(text.repeat(times).into()),
        JinjaValue::List(list) => Some(JinjaValue::list(items(list))),
        JinjaValue::Tuple(list) => Some(JinjaValue::tuple(items(list))),
        _ => None,
    })
}

fn arithmetic(operator: Operator, x: Number, y: Number) -> RenderResult<JinjaValue> {
    use Operator::*;
    if let (Number::Int(x), Number::Int(y)) = (&x, &y) {
        let (x, y) = (*x, *y);
        if y == 0 && matches!(operator, Div | FloorDiv | Mod) {
            return fail(if operator == Div {
                "division by zero"
            } else {
                "integer division or modulo by zero"
            });
        }
        let whole = match operator {
            Add => x.checked_add(y),
            Sub => x.checked_sub(y),
            Mul => x.checked_mul(y),
            FloorDiv => x.checked_div(y).map(|q| q - i128::from(x % y != 0 && (x < 0) != (y < 0))),
            Mod => x.checked_rem(y).map(|r| if r != 0 && (r < 0) != (y < 0) { r + y } else { r }),
            Pow if y >= 0 => match u32::try_from(y) {
                Ok(power) => x.checked_pow(power),
                Err(_) => None,
            },
            Div | Pow => return arithmetic(operator, Number::Float(x as f64), Number::Float(y as f64)),
        };
        return match whole {
            Some(n) => Ok(JinjaValue::Int(n)),
            None => too_large(),
        };
    }
    let float = |n| match n {
        Number::Int(n) => n as f64,
        Number::Float(x) => x,
    };
    let (x, y) = (float(x), float(y));
    let modulo = |x: f64, y: f64| {
        let rest = x % y;
        if rest != 0.0 && (rest < 0.0) != (y < 0.0) { rest + y } else { rest }
    };
    if y == 0.0 && matches!(operator, Div | FloorDiv | Mod) {
        return fail(match operator {
            Div => "float division by zero",
            FloorDiv => "float floor division by zero",
            _ => "float modulo",
        });
    }
    if operator == Pow && x == 0.0 && y < 0.0 {
        return fail("0.0 cannot be raised to a negative power");
    }
    if operator == Pow && x < 0.0 && y.fract() != 0.0 {
        return fail("complex numbers are not supported");
    }
    Ok(JinjaValue::Float(match operator {
        Add => x + y,
        Sub => x - y,
        Mul => x * y,
        Div => x / y,
        FloorDiv => ((x - modulo(x, y)) / y).round(),
        Mod => modulo(x, y),
        Pow => x.powf(y),
    }))
}

/// `text % values`
fn percent(text: &JinjaValue, values: &JinjaValue) -> RenderResult<JinjaValue> {
    let (JinjaValue::Str(pattern), values) = (text, values) else {
        return fail("'%' on text that is marked as HTML is not supported");
    };
    format::printf(pattern, values).map(JinjaValue::from)
}

pub fn negative(value: &JinjaValue) -> RenderResult<JinjaValue> {
    defined(value)?;
    match number(value) {
        Some(Number::Int(n)) => Ok(JinjaValue::Int(-n)),
        Some(Number::Float(x)) => Ok(JinjaValue::Float(-x)),
        None => fail(format!("bad operand type for unary -: '{}'", value.type_name())),
    }
}

pub fn positive(value: &JinjaValue) -> RenderResult<JinjaValue> {
    defined(value)?;
    match number(value) {
        Some(Number::Int(n)) => Ok(JinjaValue::Int(n)),
        Some(Number::Float(x)) => Ok(JinjaValue::Float(x)),
        None => fail(format!("bad operand type for unary +: '{}'", value.type_name())),
    }
}

/// `a ~ b ~ ...`
pub fn concat(parts: &[JinjaValue]) -> RenderResult<JinjaValue> {
    let mut out = String::new();
    for part in parts {
        out += &part.to_text()?;
    }
    Ok(out.into())
}

/// A value as text of HTML.
pub fn escaped(value: &JinjaValue) -> RenderResult<Rc<str>> {
    Ok(match value {
        JinjaValue::Markup(text) => text.clone(),
        _ => text::escape(&value.to_text()?).into(),
    })
}

/// `a == b`
pub fn equal(a: &JinjaValue, b: &JinjaValue) -> bool {
    if let (Some(x), Some(y)) = (number(a), number(b)) {
        return compare_numbers(x, y) == Some(Ordering::Equal);
    }
    if let (Some(x), Some(y)) = (a.as_str(), b.as_str()) {
        return x == y;
    }
    let all =
        |x: &[JinjaValue], y: &[JinjaValue]| x.len() == y.len() && x.iter().zip(y).all(|(x, y)| equal(x, y));
    match (a, b) {
        (JinjaValue::Undefined(_), JinjaValue::Undefined(_)) | (JinjaValue::None, JinjaValue::None) => true,
        (JinjaValue::List(x), JinjaValue::List(y)) => all(x, y),
        (JinjaValue::Tuple(x) | JinjaValue::Group(x), JinjaValue::Tuple(y) | JinjaValue::Group(y)) => {
            all(x, y)
        }
        (JinjaValue::Dict(x), JinjaValue::Dict(y)) => {
            let same = |(key, value): &(JinjaValue, JinjaValue)| matches!(y.get(key), Ok(Some(v)) if equal(value, v));
            x.items.len() == y.items.len() && x.items.iter().all(same)
        }
        (JinjaValue::Range(x), JinjaValue::Range(y)) => {
            x.len() == y.len() && (x.len() == 0 || x.start == y.start && (x.len() == 1 || x.step == y.step))
        }
        (JinjaValue::View(kind @ ("dict_keys" | "dict_items"), x), JinjaValue::View(other, y))
            if kind == other =>
        {
            x.len() == y.len() && x.iter().all(|x| y.iter().any(|y| equal(x, y)))
        }
        _ => same(a, b),
    }
}

/// `a is b`
pub fn same(a: &JinjaValue, b: &JinjaValue) -> bool {
    match (a, b) {
        (JinjaValue::None, JinjaValue::None) => true,
        (JinjaValue::Bool(x), JinjaValue::Bool(y)) => x == y,
        (JinjaValue::Int(x), JinjaValue::Int(y)) => x == y,
        (JinjaValue::Str(x), JinjaValue::Str(y)) => x == y,
        (JinjaValue::List(x), JinjaValue::List(y)) => Rc::ptr_eq(x, y),
        (JinjaValue::Tuple(x), JinjaValue::Tuple(y)) => Rc::ptr_eq(x, y) || x.is_empty() && y.is_empty(),
        (JinjaValue::Dict(x), JinjaValue::Dict(y)) => Rc::ptr_eq(x, y),
        (JinjaValue::Namespace(x), JinjaValue::Namespace(y)) => Rc::ptr_eq(x, y),
        (JinjaValue::Macro(x), JinjaValue::Macro(y)) => Rc::ptr_eq(x, y),
        (JinjaValue::Loop(x), JinjaValue::Loop(y)) => Rc::ptr_eq(x, y),
        (JinjaValue::Function(x), JinjaValue::Function(y)) => x == y,
        _ => false,
    }
}

fn compare_numbers(x: Number, y: Number) -> Option<Ordering> {
    match (x, y) {
        (Number::Int(x), Number::Int(y)) => Some(x.cmp(&y)),
        (Number::Float(x), Number::Float(y)) => x.partial_cmp(&y),
        (Number::Int(x), Number::Float(y)) => compare_mixed(x, y),
        (Number::Float(x), Number::Int(y)) => compare_mixed(y, x).map(Ordering::reverse),
    }
}

/// Exact, also where a float cannot hold the whole number.
fn compare_mixed(x: i128, y: f64) -> Option<Ordering> {
    match numbers::truncate(y) {
        Some(whole) => match x.cmp(&whole) {
            Ordering::Equal => 0f64.partial_cmp(&y.fract()),
            other => Some(other),
        },
        None => 0f64.partial_cmp(&y),
    }
}

/// The order of two values; none with a NaN.
pub fn order(sign: &str, a: &JinjaValue, b: &JinjaValue) -> RenderResult<Option<Ordering>> {
    defined(a)?;
    defined(b)?;
    if let (Some(x), Some(y)) = (number(a), number(b)) {
        return Ok(compare_numbers(x, y));
    }
    if let (Some(x), Some(y)) = (a.as_str(), b.as_str()) {
        return Ok(Some(x.cmp(y)));
    }
    let (x, y) = match (a, b) {
        (JinjaValue::List(x), JinjaValue::List(y)) => (x, y),
        (JinjaValue::Tuple(x) | JinjaValue::Group(x), JinjaValue::Tuple(y) | JinjaValue::Group(y)) => (x, y),
        _ => {
            let (a, b) = (a.type_name(), b.type_name());
            return fail(format!("'{sign}' not supported between instances of '{a}' and '{b}'"));
        }
    };
    match x.iter().zip(y.iter()).find(|(x, y)| !equal(x, y)) {
        Some((x, y)) => order(sign, x, y),
        None => Ok(Some(x.len().cmp(&y.len()))),
    }
}

pub fn compare(comparison: Comparison, a: &JinjaValue, b: &JinjaValue) -> RenderResult<bool> {
    use Comparison::*;
    Ok(match comparison {
        Eq => equal(a, b),
        Ne => !equal(a, b),
        Lt => order("<", a, b)?.is_some_and(Ordering::is_lt),
        Le => order("<=", a, b)?.is_some_and(Ordering::is_le),
        Gt => order(">", a, b)?.is_some_and(Ordering::is_gt),
        Ge => order(">=", a, b)?.is_some_and(Ordering::is_ge),
        In => contains(b, a)?,
        NotIn => !contains(b, a)?,
    })
}

/// `value in container`
pub fn contains(container: &JinjaValue, value: &JinjaValue) -> RenderResult<bool> {
    match container {
        JinjaValue::Str(text) | JinjaValue::Markup(text) => match value.as_str() {
            Some(part) => Ok(text.contains(part)),
            None => fail(format!("'in <string>' requires string as left operand, not {}", value.type_name())),
        },
        JinjaValue::Dict(dict) => Ok(dict.get(value)?.is_some()),
        JinjaValue::View("dict_keys", items) => {
            hashable(value)?;
            Ok(items.iter().any(|item| equal(item, value)))
        }
        JinjaValue::Iterator(_, rest) => Ok(rest.borrow_mut().by_ref().any(|item| equal(&item, value))),
        _ if container.is_iterable() => Ok(container.items()?.iter().any(|item| equal(item, value))),
        _ => fail(format!("argument of type '{}' is not iterable", container.type_name())),
    }
}
