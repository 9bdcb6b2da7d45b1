//! What the architecture promises: folders import only those below them, some folders have no circles between files, files
//! stay small. A limit that is passed for a reason has it here.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// The folders of `src`, lowest first: each imports only those before it.
const LAYERS: [&str; 20] = [
    "env",
    "error",
    "content",
    "random",
    "signals",
    "files",
    "gguf",
    "telemetry",
    "config",
    "rewards",
    "distributed",
    "data",
    "model",
    "optim",
    "plan",
    "checkpoint",
    "generate",
    "algorithms",
    "report",
    "commands",
];

/// Folders whose files import each other in one direction.
const WITHOUT_CIRCLES: [&str; 4] =
    ["kernels/src", "src/config", "src/distributed", "src/checkpoint/families"];

const LINES_OF_A_FILE: usize = 500;

/// Longer files, tests left out, and why they stay so.
const LONG_FILES: [(&str, usize, &str); 2] = [
    ("src/checkpoint/pickle/machine.rs", 588, "one machine: its opcodes and values"),
    ("src/data/arrow/ipc.rs", 537, "one format"),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn sources(folder: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false if path.extension().is_some_and(|e| e == "rs") => found.push(path),
                false => {}
            }
        }
    }
    found.sort();
    found
}

fn name(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().to_string_lossy().into_owned()
}

fn is_test(path: &str) -> bool {
    path.ends_with("tests.rs") || path.contains("/tests/")
}

/// The code of a file without the tests at its end.
fn code(path: &Path) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap();
    text.lines().take_while(|line| *line != "#[cfg(test)]").map(str::to_string).collect()
}

/// The paths that a file names, `crate::a::b` and `super::a`, comments and texts left out.
fn paths(path: &Path) -> Vec<String> {
    let lines = code(path);
    let text: String = lines
        .iter()
        .map(|line| line.split("//").next().unwrap_or(""))
        .map(|line| line.split('"').step_by(2).collect::<Vec<_>>().join("\"\"") + "\n")
        .collect();
    let begins = ["crate::", "super::"];
    let mut found = Vec::new();
    for (at, _) in text.match_indices("::") {
        let begin = text[..at].rfind(|c: char| !(c.is_alphanumeric() || c == '_')).map_or(0, |i| i + 1);
        if !begins.contains(&&text[begin..at + 2]) || text[..begin].ends_with("::") {
            continue;
        }
        found.extend(expand(&text[begin..]));
    }
    found
}

/// `a::{b, c::d}` as `a::b` and `a::c::d`, up to where the path ends.
fn expand(text: &str) -> Vec<String> {
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':')).unwrap_or(text.len());
    let (head, rest) = text.split_at(end);
    if !(head.ends_with("::") && rest.starts_with('{')) {
        return vec![head.trim_end_matches(':').to_string()];
    }
    let (mut depth, mut begin, mut parts) = (0, 1, Vec::new());
    for (i, c) in rest.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if (c == ',' && depth == 1) || depth == 0 {
            parts.push(rest[begin..i].trim());
            begin = i + 1;
        }
        if depth == 0 {
            break;
        }
    }
    let parts = parts.into_iter().filter(|part| !part.is_empty());
    parts.flat_map(expand).map(|part| format!("{head}{part}")).collect()
}

#[test]
fn folders_import_only_what_is_below_them() {
    let height = |name: &str| LAYERS.iter().position(|layer| *layer == name);
    for path in sources("src") {
        let file = name(&path);
        let of = file.trim_start_matches("src/").split(['/', '.']).next().unwrap().to_string();
        if of == "lib" || of == "main" || is_test(&file) {
            continue;
        }
        let own = height(&of).unwrap_or_else(|| panic!("{file}: LAYERS has no {of}"));
        for used in paths(&path).iter().filter_map(|p| p.strip_prefix("crate::")) {
            let used = used.split("::").next().unwrap();
            // Macros and names of the root.
            let Some(other) = height(used) else { continue };
            assert!(other <= own, "{file} imports {used}, which is above {of}");
        }
    }
}

/// Files by their module paths, such as `comm::store`; that of `mod.rs` is its folder's.
fn modules(folder: &str) -> BTreeMap<Vec<String>, PathBuf> {
    let base = root().join(folder);
    let module = |path: &PathBuf| {
        let relative = path.strip_prefix(&base).unwrap().with_extension("");
        let mut parts: Vec<String> = relative.iter().map(|p| p.to_string_lossy().into_owned()).collect();
        if parts.last().is_some_and(|last| last == "mod" || last == "lib") {
            parts.pop();
        }
        parts
    };
    sources(folder).into_iter().filter(|p| !is_test(&name(p))).map(|p| (module(&p), p)).collect()
}

#[test]
fn files_import_each_other_in_one_direction() {
    for folder in WITHOUT_CIRCLES {
        let modules = modules(folder);
        // The folder's own path below the root of its package.
        let below: Vec<&str> = folder.split('/').skip_while(|part| *part != "src").skip(1).collect();
        let resolve = |from: &[String], path: &str| -> Option<Vec<String>> {
            let mut parts: Vec<&str> = path.split("::").collect();
            let mut at: Vec<String> = match parts.remove(0) {
                "crate" => {
                    let rest = parts.strip_prefix(below.as_slice())?;
                    rest.iter().map(|p| p.to_string()).collect()
                }
                _ => {
                    let mut at = from[..from.len().checked_sub(1)?].to_vec();
                    while parts.first() == Some(&"super") {
                        parts.remove(0);
                        at.pop()?;
                    }
                    at.into_iter().chain(parts.iter().map(|p| p.to_string())).collect()
                }
            };
            while !modules.contains_key(&at) {
                at.pop()?;
            }
            Some(at)
        };
        let arrows: BTreeMap<&Vec<String>, BTreeSet<Vec<String>>> = modules
            .iter()
            .map(|(module, path)| {
                let used = paths(path).iter().filter_map(|p| resolve(module, p)).collect::<BTreeSet<_>>();
                (module, used.into_iter().filter(|used| used != module && !used.is_empty()).collect())
            })
            .collect();
        for start in modules.keys() {
            let (mut seen, mut next) = (BTreeSet::new(), vec![start.clone()]);
            while let Some(at) = next.pop() {
                for used in &arrows[&at] {
                    assert!(
                        used != start,
                        "{folder}: {} reaches itself, by {}",
                        start.join("::"),
                        at.join("::")
                    );
                    if seen.insert(used.clone()) {
                        next.push(used.clone());
                    }
                }
            }
        }
    }
}

/// Functions are clippy's matter: `too_many_lines`, and `too-many-lines-threshold` of clippy.toml.
#[test]
fn files_stay_small() {
    let mut used = BTreeSet::new();
    for path in ["src", "kernels/src", "launch"].into_iter().flat_map(sources) {
        let (file, lines) = (name(&path), code(&path).len());
        if is_test(&file) {
            continue;
        }
        let allowed = LONG_FILES.iter().find(|(name, ..)| *name == file);
        let most = allowed.map_or(LINES_OF_A_FILE, |(_, lines, _)| *lines);
        assert!(lines <= most, "{file} has {lines} lines; at most {most}");
        if lines > LINES_OF_A_FILE {
            used.insert(file);
        }
    }
    for (file, ..) in LONG_FILES {
        assert!(used.contains(file), "{file} is no longer long: take it out of LONG_FILES");
    }
}

#[test]
fn paths_are_expanded() {
    let found = expand("crate::a::{b, c::{d, e}, self as f};");
    assert_eq!(found, ["crate::a::b", "crate::a::c::d", "crate::a::c::e", "crate::a::self"]);
}

/// Names that modules share: each is the same part of its module, and is named with it (`sft::Inputs`).
const NAMES_OF_MODULES: [(&str, &str); 3] = [
    ("Args", "the arguments of a command"),
    ("Command", "the subcommands of a command"),
    ("Inputs", "what a recipe opens before it trains"),
];

/// The type that a line defines; none for an alias of a type of the same name.
fn defined_type(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let line = match line.strip_prefix("pub(").and_then(|rest| rest.split_once(") ")) {
        Some((_, rest)) => rest,
        None => line.strip_prefix("pub ").unwrap_or(line),
    };
    let (kind, rest) = line.split_once(' ')?;
    if !["struct", "enum", "union", "trait", "type"].contains(&kind) {
        return None;
    }
    let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
    let (name, rest) = rest.split_at(end);
    let is_alias = kind == "type" && rest.contains(&format!("::{name}"));
    (!name.is_empty() && !is_alias).then_some(name)
}

#[test]
fn a_type_name_has_one_meaning() {
    assert_eq!(defined_type("pub(super) struct Batch<'a> {"), Some("Batch"));
    assert_eq!(defined_type("type Session<'a> = session::Session<'a, Learner>;"), None);
    let mut defined: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for path in sources("src") {
        // Types of traits' implementations stand deeper.
        for line in code(&path).iter().filter(|line| !(line.starts_with(' ') && line.contains("type "))) {
            if let Some(name_of_type) = defined_type(line) {
                defined.entry(name_of_type.to_string()).or_default().insert(name(&path));
            }
        }
    }
    assert!(defined.len() > 300, "{}", defined.len());
    let shared = |name: &str| NAMES_OF_MODULES.iter().any(|(known, _)| *known == name);
    let twice: Vec<String> = defined
        .iter()
        .filter(|(name, files)| files.len() > 1 && !shared(name))
        .map(|(name, files)| format!("{name}: {}", files.iter().cloned().collect::<Vec<_>>().join(", ")))
        .collect();
    assert!(twice.is_empty(), "types need names of their own:\n{}", twice.join("\n"));
}
