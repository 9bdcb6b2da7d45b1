//! Jinja's filters of lists and other values that are iterated over.

use std::cmp::Ordering;
use std::rc::Rc;

use super::arguments::{CallArguments, int, required, text};
use super::machine::Machine;
use super::value::{JinjaValue, defined, hashable};
use super::{Failure, RenderResult, access, checks, fail, filters, operators};

pub enum Applied {
    Done(JinjaValue),
    /// It is no filter of lists.
    Other(JinjaValue, CallArguments),
}

#[expect(clippy::too_many_lines, reason = "an arm for each filter")]
pub fn apply(
    machine: &mut Machine,
    name: &str,
    what: &str,
    value: JinjaValue,
    args: CallArguments,
) -> RenderResult<Applied> {
    Ok(Applied::Done(match name {
        "length" | "count" => {
            args.none(what)?;
            value.len()?.into()
        }
        "list" => {
            args.none(what)?;
            JinjaValue::list(value.items()?)
        }
        "first" => {
            args.none(what)?;
            match &value {
                JinjaValue::Iterator(_, rest) => rest.borrow_mut().next(),
                other => other.items()?.into_iter().next(),
            }
            .unwrap_or_else(|| JinjaValue::undefined("No first item, sequence was empty."))
        }
        "last" => {
            args.none(what)?;
            if !value.is_iterable() || matches!(value, JinjaValue::Iterator(..)) {
                return fail(format!("'{}' object is not reversible", value.type_name()));
            }
            let last = value.items()?.pop();
            last.unwrap_or_else(|| JinjaValue::undefined("No last item, sequence was empty."))
        }
        "reverse" => {
            args.none(what)?;
            match &value {
                JinjaValue::Str(text) => text.chars().rev().collect::<String>().into(),
                other => {
                    let mut items = other.items()?;
                    items.reverse();
                    match other {
                        JinjaValue::Iterator(..) => JinjaValue::list(items),
                        _ => JinjaValue::iterator("reversed", items),
                    }
                }
            }
        }
        "join" => join(what, &value, args)?,
        "items" => {
            args.none(what)?;
            match &value {
                JinjaValue::Undefined(_) => JinjaValue::generator(Vec::new()),
                JinjaValue::Dict(_) => {
                    JinjaValue::generator(super::methods::call(&value, "items", args)?.items()?)
                }
                _ => return fail("Can only get item pairs from a mapping."),
            }
        }
        "map" => map(machine, what, value, args)?,
        "select" | "reject" | "selectattr" | "rejectattr" => select(name, what, &value, args)?,
        "sort" => {
            let [reverse, case, attribute] = args.bind(what, ["reverse", "case_sensitive", "attribute"])?;
            let paths = match &attribute {
                Some(JinjaValue::Str(text)) => text.split(',').map(path_of_text).collect(),
                other => vec![path(other.as_ref())?],
            };
            let keep_case = flag(case);
            let keys = |item: &JinjaValue| {
                paths
                    .iter()
                    .map(|path| at_path(item, path, keep_case, None))
                    .collect::<RenderResult<Vec<_>>>()
            };
            let items = value.items()?;
            let keyed = items
                .iter()
                .map(|item| Ok(JinjaValue::list(keys(item)?)))
                .collect::<RenderResult<Vec<_>>>()?;
            JinjaValue::list(sorted(items, keyed, flag(reverse))?)
        }
        "dictsort" => dictsort(what, &value, args)?,
        "unique" => {
            let [case, attribute] = args.bind(what, ["case_sensitive", "attribute"])?;
            let (path, keep_case) = (path(attribute.as_ref())?, flag(case));
            let (mut seen, mut kept) = (Vec::<JinjaValue>::new(), Vec::new());
            for item in value.items()? {
                let key = at_path(&item, &path, keep_case, None)?;
                hashable(&key)?;
                if !seen.iter().any(|other| operators::equal(other, &key)) {
                    seen.push(key);
                    kept.push(item);
                }
            }
            JinjaValue::generator(kept)
        }
        "min" | "max" => {
            let [case, attribute] = args.bind(what, ["case_sensitive", "attribute"])?;
            let (path, keep_case) = (path(attribute.as_ref())?, flag(case));
            let mut best: Option<(JinjaValue, JinjaValue)> = None;
            for item in value.items()? {
                let key = at_path(&item, &path, keep_case, None)?;
                let sign = if name == "min" { "<" } else { ">" };
                let wanted = if name == "min" { Ordering::Less } else { Ordering::Greater };
                let better = match &best {
                    None => true,
                    Some((_, other)) => operators::order(sign, &key, other)? == Some(wanted),
                };
                if better {
                    best = Some((item, key));
                }
            }
            let none = || JinjaValue::undefined("No aggregated item, sequence was empty.");
            best.map_or_else(none, |(item, _)| item)
        }
        "sum" => {
            let [attribute, start] = args.bind(what, ["attribute", "start"])?;
            let path = path(attribute.as_ref())?;
            let start = start.unwrap_or(JinjaValue::Int(0));
            if start.as_str().is_some() {
                return fail("sum() can't sum strings [use ''.join(seq) instead]");
            }
            value.items()?.iter().try_fold(start, |sum, item| {
                operators::binary(super::tree::Operator::Add, &sum, &at_path(item, &path, true, None)?)
            })?
        }
        "batch" | "slice" => {
            let count_name = if name == "batch" { "linecount" } else { "slices" };
            let [count, fill] = args.bind(what, [count_name, "fill_with"])?;
            let count = int(what, &required(what, count_name, count)?)?;
            let fill = fill.filter(|f| !matches!(f, JinjaValue::None));
            let Some(count) = usize::try_from(count).ok().filter(|n| (1..=1_000_000).contains(n)) else {
                return fail(format!("{what} needs a positive number"));
            };
            let items = value.items()?;
            let parts = if name == "batch" { batch(items, count, fill) } else { slice(items, count, fill) };
            JinjaValue::generator(parts.into_iter().map(JinjaValue::list).collect())
        }
        "groupby" => groupby(what, &value, args)?,
        _ => return Ok(Applied::Other(value, args)),
    }))
}

fn flag(value: Option<JinjaValue>) -> bool {
    value.is_some_and(|v| v.is_true())
}

/// The parts of `a.b.0`.
fn path_of_text(text: &str) -> Vec<JinjaValue> {
    let part = |part: &str| match part.parse::<i128>() {
        Ok(n) if part.bytes().all(|b| b.is_ascii_digit()) => JinjaValue::Int(n),
        _ => part.into(),
    };
    text.split('.').map(part).collect()
}

fn path(attribute: Option<&JinjaValue>) -> RenderResult<Vec<JinjaValue>> {
    Ok(match attribute {
        None | Some(JinjaValue::None) => Vec::new(),
        Some(JinjaValue::Str(text)) => path_of_text(text),
        Some(other) => vec![other.clone()],
    })
}

/// What an item has at a path; as lower case where case does not count.
fn at_path(
    item: &JinjaValue,
    path: &[JinjaValue],
    keep_case: bool,
    default: Option<&JinjaValue>,
) -> RenderResult<JinjaValue> {
    let mut value = item.clone();
    for part in path {
        value = access::item(&value, part)?;
        if let Some(default) = default.filter(|_| value.is_undefined()) {
            value = default.clone();
        }
    }
    Ok(match &value {
        JinjaValue::Str(text) if !keep_case => text.to_lowercase().into(),
        _ => value,
    })
}

/// The items in the order of their keys; equal ones stay as they are.
fn sorted(items: Vec<JinjaValue>, keys: Vec<JinjaValue>, reverse: bool) -> RenderResult<Vec<JinjaValue>> {
    let mut pairs: Vec<(JinjaValue, JinjaValue)> = keys.into_iter().zip(items).collect();
    let mut failed: Option<Failure> = None;
    pairs.sort_by(|(a, _), (b, _)| {
        // As Python asks: whether the later one is less.
        match operators::order("<", b, a) {
            Ok(order) => {
                let order = order.map_or(Ordering::Equal, Ordering::reverse);
                if reverse { order.reverse() } else { order }
            }
            Err(e) => {
                failed.get_or_insert(e);
                Ordering::Equal
            }
        }
    });
    match failed {
        Some(e) => Err(e),
        None => Ok(pairs.into_iter().map(|(_, item)| item).collect()),
    }
}

fn join(what: &str, value: &JinjaValue, args: CallArguments) -> RenderResult<JinjaValue> {
    let [separator, attribute] = args.bind(what, ["d", "attribute"])?;
    let separator = separator.map_or(Ok("".into()), |s| s.to_text())?;
    let path = path(attribute.as_ref())?;
    let mut parts = Vec::new();
    for item in value.items()? {
        parts.push(at_path(&item, &path, true, None)?.to_text()?.to_string());
    }
    Ok(parts.join(&separator).into())
}

fn map(
    machine: &mut Machine,
    what: &str,
    value: JinjaValue,
    mut args: CallArguments,
) -> RenderResult<JinjaValue> {
    if !value.is_true() {
        return Ok(JinjaValue::generator(Vec::new()));
    }
    let mut out = Vec::new();
    if args.positional.is_empty() && args.named.iter().any(|(name, _)| &**name == "attribute") {
        let mut take = |wanted: &str| {
            let at = args.named.iter().position(|(name, _)| &**name == wanted);
            at.map(|i| args.named.remove(i).1)
        };
        let (attribute, default) = (take("attribute"), take("default"));
        if let Some((name, _)) = args.named.first() {
            return fail(format!("Unexpected keyword argument '{name}'"));
        }
        let path = path(attribute.as_ref())?;
        for item in value.items()? {
            out.push(at_path(&item, &path, true, default.as_ref())?);
        }
        return Ok(JinjaValue::generator(out));
    }
    if args.positional.is_empty() {
        return fail("map requires a filter argument");
    }
    let name = args.positional.remove(0);
    for item in value.items()? {
        let args = CallArguments { positional: args.positional.clone(), named: args.named.clone() };
        out.push(filters::apply(machine, text(what, &name)?, item, args)?);
    }
    Ok(JinjaValue::generator(out))
}

fn select(name: &str, what: &str, value: &JinjaValue, mut args: CallArguments) -> RenderResult<JinjaValue> {
    if !value.is_true() {
        return Ok(JinjaValue::generator(Vec::new()));
    }
    let of_attribute = name.ends_with("attr");
    let mut attribute = None;
    if of_attribute {
        if args.positional.is_empty() {
            return fail("Missing parameter for attribute name");
        }
        attribute = Some(args.positional.remove(0));
    }
    let path = path(attribute.as_ref())?;
    let test = if args.positional.is_empty() { None } else { Some(args.positional.remove(0)) };
    let mut kept = Vec::new();
    for item in value.items()? {
        let subject = at_path(&item, &path, true, None)?;
        let holds = match &test {
            None => subject.is_true(),
            Some(test) => {
                let args = CallArguments { positional: args.positional.clone(), named: args.named.clone() };
                checks::check(text(what, test)?, &subject, args)?
            }
        };
        if holds == name.starts_with("select") {
            kept.push(item);
        }
    }
    Ok(JinjaValue::generator(kept))
}

fn dictsort(what: &str, value: &JinjaValue, args: CallArguments) -> RenderResult<JinjaValue> {
    let [case, by, reverse] = args.bind(what, ["case_sensitive", "by", "reverse"])?;
    let by = by.unwrap_or_else(|| "key".into());
    let place = match text(what, &by)? {
        "key" => 0,
        "value" => 1,
        _ => return fail("You can only sort by either \"key\" or \"value\""),
    };
    defined(value)?;
    let JinjaValue::Dict(_) = value else {
        return fail(format!("'{}' object has no attribute 'items'", value.type_name()));
    };
    let items = super::methods::call(value, "items", CallArguments::default())?.items()?;
    let (place, keep_case) = ([JinjaValue::Int(place)], flag(case));
    let keys =
        items.iter().map(|pair| at_path(pair, &place, keep_case, None)).collect::<RenderResult<_>>()?;
    Ok(JinjaValue::list(sorted(items, keys, flag(reverse))?))
}

fn batch(items: Vec<JinjaValue>, count: usize, fill: Option<JinjaValue>) -> Vec<Vec<JinjaValue>> {
    let mut parts: Vec<Vec<JinjaValue>> = items.chunks(count).map(<[JinjaValue]>::to_vec).collect();
    if let (Some(last), Some(fill)) = (parts.last_mut(), fill) {
        last.resize(count, fill);
    }
    parts
}

fn slice(items: Vec<JinjaValue>, count: usize, fill: Option<JinjaValue>) -> Vec<Vec<JinjaValue>> {
    let (each, more) = (items.len() / count, items.len() % count);
    let mut rest = items.into_iter();
    let part = |i: usize| {
        let mut part: Vec<JinjaValue> = rest.by_ref().take(each + usize::from(i < more)).collect();
        part.extend(fill.clone().filter(|_| i >= more));
        part
    };
    (0..count).map(part).collect()
}

fn groupby(what: &str, value: &JinjaValue, args: CallArguments) -> RenderResult<JinjaValue> {
    let [attribute, default, case] = args.bind(what, ["attribute", "default", "case_sensitive"])?;
    let path = path(Some(&required(what, "attribute", attribute)?))?;
    let default = default.filter(|d| !matches!(d, JinjaValue::None));
    let keep_case = flag(case);
    let key = |item: &JinjaValue| at_path(item, &path, keep_case, default.as_ref());
    let items = value.items()?;
    let keys = items.iter().map(key).collect::<RenderResult<_>>()?;
    let mut groups: Vec<(JinjaValue, Vec<JinjaValue>)> = Vec::new();
    for item in sorted(items, keys, false)? {
        let key = key(&item)?;
        match groups.last_mut() {
            Some((last, members)) if operators::equal(last, &key) => members.push(item),
            _ => groups.push((key, vec![item])),
        }
    }
    let group = |(_, members): (JinjaValue, Vec<JinjaValue>)| {
        let grouper = at_path(&members[0], &path, true, default.as_ref())?;
        Ok(JinjaValue::Group(Rc::new(vec![grouper, JinjaValue::list(members)])))
    };
    Ok(JinjaValue::list(groups.into_iter().map(group).collect::<RenderResult<_>>()?))
}
