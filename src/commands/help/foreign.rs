//! The names of other trainers in Markdown: docs/names.md.

use crate::config::foreign::{KEYS, VALUES};

/// The whole document.
pub fn document() -> String {
    let mut text = String::from(
        "# Names in other trainers\n\nMade by `corral help --foreign`; a test compares it with the program. A configuration that uses \
         such a name is refused with the name here; `corral help NAME` tells of both.\n\n## Keys\n\n| name | program | here | |\n| --- | \
         --- | --- | --- |\n",
    );
    for key in KEYS {
        let here: Vec<String> = key.here.iter().map(|here| format!("`{here}`")).collect();
        text += &format!("| `{}` | {} | {} | {} |\n", key.name, key.programs, here.join(", "), key.note);
    }
    text += "\n## Values\n\n| at a key that ends in | value | here |\n| --- | --- | --- |\n";
    for (key, there, here) in VALUES {
        text += &format!("| `{key}` | `{there}` | `{here}` |\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::catalog::Catalog;
    use super::*;

    #[test]
    fn every_name_leads_to_a_key() {
        let places = Catalog::new().places();
        let keys: BTreeSet<&str> = places.iter().map(|place| place.name.as_str()).collect();
        let unknown: Vec<&str> =
            KEYS.iter().flat_map(|key| key.here).filter(|here| !keys.contains(**here)).copied().collect();
        assert_eq!(unknown, Vec::<&str>::new());
        assert!(KEYS.len() >= 120, "{}", KEYS.len());
        let mut names: Vec<&str> = KEYS.iter().map(|key| key.name).collect();
        names.sort_unstable();
        let twice: Vec<&[&str]> = names.windows(2).filter(|pair| pair[0] == pair[1]).collect();
        assert_eq!(twice, Vec::<&[&str]>::new());
        // Without a key here there is a sentence in its place.
        assert!(KEYS.iter().all(|key| !(key.here.is_empty() && key.note.is_empty())));
    }

    #[test]
    fn every_value_is_one_of_its_key() {
        let places = Catalog::new().places();
        for (end, there, here) in VALUES {
            let takes = |place: &super::super::catalog::KeyPlace, word: &str| {
                (place.name == *end || place.name.ends_with(&format!(".{end}")))
                    && place.key.kind.choice().is_none_or(|words| words.iter().any(|(w, _)| *w == word))
            };
            assert!(places.iter().any(|place| takes(place, here)), "{end}: {here}");
            assert!(
                !places.iter().any(|p| takes(p, there) && p.key.kind.choice().is_some()),
                "{end}: {there} is a value here, too"
            );
        }
    }
}
