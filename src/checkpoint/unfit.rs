//! How files' tensors differ from those that a model wants: in one message that shows some of both sides.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::source::TensorSource;
use crate::error::{Error, Result};

/// Lines of each kind that are shown.
const SHOWN: usize = 6;

/// What is wrong with tensors, a line for each.
#[derive(Default)]
pub(super) struct Unfit {
    /// Tensors that the model wants and the files do not have.
    pub missing: Vec<String>,
    /// Tensors that have another shape.
    pub wrong: Vec<String>,
    /// Tensors that the files have and the model does not.
    pub extra: Vec<String>,
    /// What the names have in common.
    pub hint: Option<String>,
}

impl Unfit {
    /// Compares the tensors that are wanted, by names and shapes, with those of files. What is superfluous is left to the caller.
    pub fn of(wanted: &BTreeMap<String, Vec<i64>>, files: &TensorSource) -> Result<Unfit> {
        let mut unfit = Unfit::default();
        let found: BTreeSet<&str> = files.names().map(String::as_str).collect();
        for (name, shape) in wanted {
            if !found.contains(name.as_str()) {
                unfit.missing.push(format!("`{name}` {shape:?} is missing"));
                continue;
            }
            let view = files.view(name)?;
            if view.shape != *shape {
                unfit.wrong.push(format!("`{name}` is {:?} and should be {shape:?}", view.shape));
            }
        }
        unfit.hint = common_prefix(&wanted.keys().map(String::as_str).collect(), &found);
        Ok(unfit)
    }

    /// An error that begins with `headline`, if anything is wrong.
    pub fn into_result(self, headline: &str) -> Result<()> {
        let mut lines: Vec<String> = Vec::new();
        for (mut some, more) in [
            (self.missing, "are missing"),
            (self.wrong, "have another shape"),
            (self.extra, "belong to nothing in the model"),
        ] {
            let rest = some.len().saturating_sub(SHOWN);
            some.truncate(SHOWN);
            lines.append(&mut some);
            if rest > 0 {
                lines.push(format!("and {rest} more {more}"));
            }
        }
        if lines.is_empty() {
            return Ok(());
        }
        lines.splice(0..0, self.hint);
        Err(Error::data(format!("{headline}:\n  {}", lines.join("\n  "))))
    }
}

/// What the names `found` in files have before the names that are `wanted`, or lack of them; none where most of those that
/// do not fit have nothing in common.
pub(super) fn common_prefix(wanted: &BTreeSet<&str>, found: &BTreeSet<&str>) -> Option<String> {
    let strangers: Vec<&str> = found.difference(wanted).copied().collect();
    // Every end of a wanted name, with what comes before it.
    let mut ends: HashMap<&str, &str> = HashMap::new();
    for name in wanted.difference(found) {
        ends.extend(name.match_indices('.').map(|(i, _)| (&name[i + 1..], &name[..=i])));
    }
    let mut count: HashMap<(bool, &str), usize> = HashMap::new();
    for name in &strangers {
        let cut = name.match_indices('.').map(|(i, _)| i + 1).find(|i| wanted.contains(&name[*i..]));
        let prefix = match (cut, ends.get(name)) {
            (Some(at), _) => (true, &name[..at]),
            (None, Some(before)) => (false, *before),
            (None, None) => continue,
        };
        *count.entry(prefix).or_default() += 1;
    }
    let ((added, prefix), n) = count.into_iter().max_by_key(|((_, prefix), n)| (*n, prefix.len()))?;
    if 2 * n < strangers.len() {
        return None;
    }
    let all = found.iter().all(|name| name.starts_with(prefix));
    Some(match (added, all) {
        (true, true) => format!(
            "all begin with `{prefix}`: save the model from inside its wrapper, or rename its tensors"
        ),
        (true, false) => format!("{n} of {} begin with `{prefix}`, without which they fit", found.len()),
        (false, _) => format!("{n} of {} lack `{prefix}` at the beginning of their names", found.len()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_common_prefix_is_named() {
        let wanted =
            BTreeSet::from(["model.norm.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]);
        let prefix = |names: &[String]| {
            let found = names.iter().map(String::as_str).collect();
            common_prefix(&wanted, &found)
        };
        let with = |p: &str| wanted.iter().map(|name| format!("{p}{name}")).collect::<Vec<_>>();
        for p in ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."] {
            let told = prefix(&with(p)).unwrap();
            assert!(told.starts_with(&format!("all begin with `{p}`")), "{told}");
        }
        assert_eq!(prefix(&with("")), None);
        let mut some = with("module.");
        some[0] = "other.weight".into();
        assert!(prefix(&some).unwrap().starts_with("2 of 3 begin with `module.`"));
        let inner = ["norm.weight", "layers.0.mlp.up_proj.weight"].map(String::from);
        assert_eq!(prefix(&inner).unwrap(), "2 of 2 lack `model.` at the beginning of their names");
        assert_eq!(prefix(&["a.b", "c.d", "e.f", "norm.weight"].map(String::from)), None);
    }

    #[test]
    fn some_of_every_kind_are_shown() {
        let lines = |what: &str, n: usize| (0..n).map(|i| format!("{what} {i}")).collect::<Vec<_>>();
        let unfit = Unfit {
            missing: lines("m", 20),
            wrong: lines("w", 1),
            extra: lines("e", 7),
            hint: Some("all begin with `x.`".into()),
        };
        let e = unfit.into_result("the tensors do not fit").unwrap_err();
        let expected: Vec<String> = std::iter::once("the tensors do not fit:".to_string())
            .chain(["  all begin with `x.`".into()])
            .chain((0..6).map(|i| format!("  m {i}")))
            .chain(["  and 14 more are missing".into(), "  w 0".into()])
            .chain((0..6).map(|i| format!("  e {i}")))
            .chain(["  and 1 more belong to nothing in the model".into()])
            .collect();
        assert_eq!(e.message.lines().collect::<Vec<_>>(), expected);
        Unfit { hint: Some("x".into()), ..Unfit::default() }.into_result("fine").unwrap();
    }
}
