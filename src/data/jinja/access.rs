//! Attributes, items and slices, looked up as the sandbox does: `x.a` is an attribute and else an item, `x['a']` an item
//! and else an attribute.

use std::rc::Rc;

use super::functions::Function;
use super::value::{JinjaValue, Range, defined};
use super::{RenderResult, fail, methods, text};

/// `object.name`
pub fn attribute(object: &JinjaValue, name: &str) -> RenderResult<JinjaValue> {
    defined(object)?;
    if let Some(value) = python_attribute(object, name) {
        return Ok(value);
    }
    Ok(match python_item(object, &JinjaValue::from(name))? {
        Some(value) => value,
        None => missing(object, &JinjaValue::from(name)),
    })
}

/// `object[key]`
pub fn item(object: &JinjaValue, key: &JinjaValue) -> RenderResult<JinjaValue> {
    defined(object)?;
    if let Some(value) = python_item(object, key)? {
        return Ok(value);
    }
    let value = key.as_str().and_then(|name| python_attribute(object, name));
    Ok(value.unwrap_or_else(|| missing(object, key)))
}

fn missing(object: &JinjaValue, key: &JinjaValue) -> JinjaValue {
    let kind = match object {
        JinjaValue::None => "None".to_string(),
        JinjaValue::Namespace(_) => "jinja2.utils.Namespace object".into(),
        _ => format!("{} object", object.type_name()),
    };
    JinjaValue::undefined(match key {
        JinjaValue::Str(name) => format!("'{kind}' has no attribute {}", text::repr(name)),
        key => format!("{kind} has no element {}", key.repr().unwrap_or_else(|_| key.type_name().into())),
    })
}

/// `getattr(object, name)`, as far as the sandbox lets it.
fn python_attribute(object: &JinjaValue, name: &str) -> Option<JinjaValue> {
    let unsafe_ = |kind: &str| {
        Some(JinjaValue::undefined(format!("access to attribute '{name}' of '{kind}' object is unsafe.")))
    };
    match object {
        JinjaValue::Namespace(dict) => return dict.borrow().name(name).cloned(),
        JinjaValue::Loop(state) => return state.attribute(name),
        JinjaValue::Group(items) if name == "grouper" || name == "list" => {
            return items.get(usize::from(name == "list")).cloned();
        }
        JinjaValue::Macro(value) => {
            return match name {
                "name" => Some(JinjaValue::from(&value.node.name)),
                "arguments" => {
                    Some(JinjaValue::tuple(value.node.params.iter().map(JinjaValue::from).collect()))
                }
                "caller" => Some(value.node.caller.into()),
                "catch_kwargs" => Some(value.node.kwargs.into()),
                "catch_varargs" => Some(value.node.varargs.into()),
                _ => None,
            };
        }
        JinjaValue::Function(Function::Dict) if name == "fromkeys" => {
            return Some(JinjaValue::Function(Function::FromKeys));
        }
        JinjaValue::Cycler(state) if name == "current" => return state.0.get(state.1.get()).cloned(),
        JinjaValue::Range(range) => match name {
            "start" => return Some(JinjaValue::Int(range.start)),
            "stop" => return Some(JinjaValue::Int(range.stop)),
            "step" => return Some(JinjaValue::Int(range.step)),
            _ => {}
        },
        JinjaValue::Int(_) | JinjaValue::Float(_) | JinjaValue::Bool(_) => match name {
            "real" | "numerator" => return Some(object.clone()),
            "imag" => return Some(JinjaValue::Int(0)),
            "denominator" => return Some(JinjaValue::Int(1)),
            _ => {}
        },
        _ => {}
    }
    let kind = object.type_name();
    if methods::changes(object, name) {
        return unsafe_(kind);
    }
    methods::names(object).contains(&name).then(|| JinjaValue::Method(Rc::new((object.clone(), name.into()))))
}

/// `object[key]`; none where Python finds none or the object has no items.
fn python_item(object: &JinjaValue, key: &JinjaValue) -> RenderResult<Option<JinjaValue>> {
    let place = |len: usize| {
        let index = key.as_int()?;
        let index = if index < 0 { index + len as i128 } else { index };
        usize::try_from(index).ok().filter(|i| *i < len)
    };
    Ok(match object {
        JinjaValue::Dict(dict) => match dict.get(key) {
            Ok(value) => value.cloned(),
            // Python raises a TypeError, which Jinja takes for nothing found.
            Err(_) => None,
        },
        JinjaValue::List(items) | JinjaValue::Tuple(items) | JinjaValue::Group(items) => {
            place(items.len()).map(|i| items[i].clone())
        }
        JinjaValue::Str(text) | JinjaValue::Markup(text) => {
            let at = place(text.chars().count());
            at.and_then(|i| text.chars().nth(i)).map(|c| c.to_string().into())
        }
        JinjaValue::Range(range) => {
            place(range.len() as usize).map(|i| JinjaValue::Int(range.start + i as i128 * range.step))
        }
        _ => None,
    })
}

/// `object[start:stop:step]`
pub fn slice(object: &JinjaValue, parts: [JinjaValue; 3]) -> RenderResult<JinjaValue> {
    defined(object)?;
    match object {
        JinjaValue::Dict(_) => return fail("unhashable type: 'slice'"),
        JinjaValue::Str(_)
        | JinjaValue::List(_)
        | JinjaValue::Tuple(_)
        | JinjaValue::Group(_)
        | JinjaValue::Range(_) => {}
        JinjaValue::Markup(_) => return fail("a slice of text that is marked as HTML is not supported"),
        _ => return fail(format!("'{}' object is not subscriptable", object.type_name())),
    }
    if parts.iter().any(|part| !matches!(part, JinjaValue::None) && part.as_int().is_none()) {
        return fail("slice indices must be integers or None or have an __index__ method");
    }
    let [start, stop, step] = parts.map(|part| part.as_int());
    if step == Some(0) {
        return fail("slice step cannot be zero");
    }
    let step = step.unwrap_or(1);
    let bounds = |len: usize| slice_bounds(len as i128, start, stop, step);
    let indices = |len: usize| {
        let (start, stop) = bounds(len);
        Range { start, stop, step }.numbers().filter_map(|i| usize::try_from(i).ok())
    };
    Ok(match object {
        JinjaValue::Str(text) => {
            let chars: Vec<char> = text.chars().collect();
            indices(chars.len()).map(|i| chars[i]).collect::<String>().into()
        }
        JinjaValue::List(items) => JinjaValue::list(indices(items.len()).map(|i| items[i].clone()).collect()),
        JinjaValue::Tuple(items) | JinjaValue::Group(items) => {
            JinjaValue::tuple(indices(items.len()).map(|i| items[i].clone()).collect())
        }
        JinjaValue::Range(range) => {
            let (from, to) = bounds(range.len() as usize);
            let place = |i: i128| range.start + i * range.step;
            JinjaValue::Range(Range {
                start: place(from),
                stop: place(to),
                step: range.step.saturating_mul(step),
            })
        }
        _ => return fail(format!("'{}' object is not subscriptable", object.type_name())),
    })
}

/// Where a slice of `len` items begins and ends, by Python's rules.
fn slice_bounds(len: i128, start: Option<i128>, stop: Option<i128>, step: i128) -> (i128, i128) {
    let (lowest, highest) = if step > 0 { (0, len) } else { (-1, len - 1) };
    let clip = |at: Option<i128>, default: i128| match at {
        None => default,
        Some(at) if at < 0 => at.saturating_add(len).max(lowest),
        Some(at) => at.min(highest),
    };
    let (first, end) = if step > 0 { (lowest, highest) } else { (highest, lowest) };
    (clip(start, first), clip(stop, end))
}
