//! The functions that a template can call.

use std::cell::{Cell, RefCell};
use std::fmt::Write;
use std::rc::Rc;

use chrono::NaiveDateTime;
use chrono::format::{Item, StrftimeItems};

use super::arguments::{CallArguments, int, required, text};
use super::value::{Dict, JinjaValue, Range};
use super::{RenderResult, fail};

/// The time that a template is told.
pub type Clock = NaiveDateTime;

/// As the sandbox has it.
const LONGEST_RANGE: i128 = 100_000;

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Function {
    RaiseException,
    StrftimeNow,
    Range,
    Dict,
    FromKeys,
    Namespace,
    Cycler,
    Joiner,
    Lipsum,
}

impl Function {
    pub fn named(name: &str) -> Option<Function> {
        Some(match name {
            "raise_exception" => Function::RaiseException,
            "strftime_now" => Function::StrftimeNow,
            "range" => Function::Range,
            "dict" => Function::Dict,
            "namespace" => Function::Namespace,
            "cycler" => Function::Cycler,
            "joiner" => Function::Joiner,
            "lipsum" => Function::Lipsum,
            _ => return None,
        })
    }
}

pub fn call(function: Function, args: CallArguments, clock: Clock) -> RenderResult<JinjaValue> {
    match function {
        Function::RaiseException => {
            let [message] = args.bind("raise_exception", ["message"])?;
            fail(&*required("raise_exception", "message", message)?.to_text()?)
        }
        Function::StrftimeNow => {
            let [format] = args.bind("strftime_now", ["format"])?;
            strftime(text("strftime_now", &required("strftime_now", "format", format)?)?, clock)
        }
        Function::Range => range(args),
        Function::Dict => Ok(JinjaValue::Dict(Rc::new(dict(args)?))),
        Function::FromKeys => from_keys(args),
        Function::Namespace => {
            let dict = dict(args)?;
            if let Some((key, _)) =
                dict.items.iter().find(|(key, _)| key.as_str().is_some_and(|k| k.starts_with('_')))
            {
                let key = key.to_text()?;
                return fail(format!("a namespace cannot hold '{key}', which begins with an underscore"));
            }
            Ok(JinjaValue::Namespace(Rc::new(RefCell::new(dict))))
        }
        Function::Cycler if args.positional.is_empty() || !args.named.is_empty() => {
            fail("cycler needs items to cycle through")
        }
        Function::Cycler => Ok(JinjaValue::Cycler(Rc::new((args.positional, Cell::new(0))))),
        Function::Joiner => {
            let [separator] = args.bind("joiner", ["sep"])?;
            Ok(JinjaValue::Joiner(Rc::new((separator.unwrap_or_else(|| ", ".into()), Cell::new(false)))))
        }
        Function::Lipsum => fail("the function 'lipsum', which makes up text, is not supported"),
    }
}

fn range(args: CallArguments) -> RenderResult<JinjaValue> {
    if !args.named.is_empty() {
        return fail("range takes no named arguments");
    }
    let numbers: Vec<i128> = args.positional.iter().map(|v| int("range", v)).collect::<RenderResult<_>>()?;
    let range = match numbers[..] {
        [stop] => Range { start: 0, stop, step: 1 },
        [start, stop] => Range { start, stop, step: 1 },
        [_, _, 0] => return fail("range() arg 3 must not be zero"),
        [start, stop, step] => Range { start, stop, step },
        _ => return fail("range takes one to three numbers"),
    };
    if range.len() > LONGEST_RANGE {
        return fail(format!("a range has at most {LONGEST_RANGE} items"));
    }
    Ok(JinjaValue::Range(range))
}

pub fn from_keys(args: CallArguments) -> RenderResult<JinjaValue> {
    let [keys, value] = args.bind("dict.fromkeys", ["iterable", "value"])?;
    let mut dict = Dict::default();
    for key in required("dict.fromkeys", "iterable", keys)?.items()? {
        dict.set(key, value.clone().unwrap_or(JinjaValue::None))?;
    }
    Ok(JinjaValue::Dict(Rc::new(dict)))
}

/// `dict(pairs, name=value, ...)`
fn dict(args: CallArguments) -> RenderResult<Dict> {
    let mut dict = match args.positional.as_slice() {
        [] => Dict::default(),
        [JinjaValue::Dict(dict)] => (**dict).clone(),
        [pairs] => {
            let mut dict = Dict::default();
            for pair in pairs.items()? {
                let pair = pair.items()?;
                let [key, value] = &pair[..] else { return fail("dict needs pairs of a key and a value") };
                dict.set(key.clone(), value.clone())?;
            }
            dict
        }
        _ => return fail("dict takes at most one argument without a name"),
    };
    for (name, value) in args.named {
        dict.set_name(&name, value);
    }
    Ok(dict)
}

fn strftime(format: &str, clock: Clock) -> RenderResult<JinjaValue> {
    // Python's names for what chrono writes otherwise, or not of a time without a zone.
    let format = format.replace("%f", "%6f").replace("%Z", "").replace("%z", "");
    let items: Vec<Item> = StrftimeItems::new(&format).collect();
    let mut out = String::new();
    if items.contains(&Item::Error) || write!(out, "{}", clock.format_with_items(items.iter())).is_err() {
        return fail(format!("strftime_now: bad format {format:?}"));
    }
    Ok(out.into())
}
