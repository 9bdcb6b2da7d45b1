//! What the documentation names exists: files, links, subcommands. Its YAML can be read.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use testing::program::corral;

/// Folders of the tree that documents name paths in.
const ROOTS: [&str; 8] = ["configs", "docs", "kernels", "launch", "scripts", "src", "testing", "tests"];

/// Endings of files that are always ours.
const SOURCES: [&str; 8] = [".rs", ".cpp", ".h", ".inc", ".cu", ".cuh", ".sh", ".py"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A document, divided into text and fenced blocks.
struct Document {
    path: PathBuf,
    text: Vec<String>,
    /// Language, which may be empty, and contents.
    blocks: Vec<(String, String)>,
}

impl Document {
    fn read(path: PathBuf) -> Document {
        let all = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let (mut text, mut blocks) = (Vec::new(), Vec::new());
        for (i, part) in all.split("```").enumerate() {
            if i % 2 == 0 {
                text.push(part.to_string());
            } else {
                let (language, contents) = part.split_once('\n').unwrap_or((part, ""));
                blocks.push((language.trim().to_string(), contents.to_string()));
            }
        }
        Document { path, text, blocks }
    }

    fn name(&self) -> String {
        self.path.strip_prefix(root()).unwrap_or(&self.path).display().to_string()
    }

    /// Texts in backquotes, each in one line.
    fn quoted(&self) -> Vec<String> {
        let paragraphs = self.text.iter().flat_map(|text| text.split("\n\n"));
        let quoted = paragraphs.flat_map(|paragraph| paragraph.split('`').skip(1).step_by(2));
        quoted.map(|text| text.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
    }

    /// Lines of blocks that are no drawings.
    fn lines(&self) -> Vec<String> {
        let blocks = self.blocks.iter().filter(|(_, contents)| !contents.contains('└'));
        blocks.flat_map(|(_, contents)| contents.lines()).map(str::to_string).collect()
    }
}

fn documents() -> Vec<Document> {
    let folder = fs::read_dir(root().join("docs")).expect("docs/");
    let mut paths: Vec<PathBuf> = folder.map(|entry| entry.expect("an entry of docs/").path()).collect();
    paths.retain(|path| path.extension().is_some_and(|e| e == "md"));
    paths.sort();
    paths.extend(["README.md", "CONTRIBUTING.md"].map(|name| root().join(name)));
    paths.into_iter().map(Document::read).collect()
}

/// Adds all files and folders below a folder, by their paths from the root.
fn add_tree(folder: &Path, tree: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display())) {
        let path = entry.expect("an entry of a folder").path();
        let name = path.strip_prefix(root()).expect("a path below the root");
        tree.insert(name.to_str().expect("a name in UTF-8").to_string());
        if path.is_dir() {
            add_tree(&path, tree);
        }
    }
}

/// Whether a text in backquotes is a path of this tree: a source file, or something below a folder of the root or of src/.
/// Names in capitals stand for others (`config/NAME.rs`).
fn is_ours(path: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_./-".contains(c);
    let capitals = |part: &str| {
        let stem = part.split('.').next().unwrap_or(part);
        stem.len() > 1 && stem != "README" && stem.chars().all(|c| c.is_ascii_uppercase() || c == '_')
    };
    if path.starts_with('.') || !path.chars().all(plain) || path.split('/').any(capitals) {
        return false;
    }
    let below = path.split_once('/').is_some_and(|(first, _)| {
        ROOTS.contains(&first) || (!first.is_empty() && root().join("src").join(first).is_dir())
    });
    below || SOURCES.iter().any(|ending| path.ends_with(ending))
}

/// Paths may leave out folders at their front: `model/block.rs` lies in src/.
fn is_there(path: &str, tree: &BTreeSet<String>) -> bool {
    let path = path.trim_end_matches('/');
    let end = format!("/{path}");
    tree.iter().any(|name| name == path || name.ends_with(&end))
}

#[test]
fn paths_exist() {
    let mut tree: BTreeSet<String> = ROOTS.iter().map(|name| name.to_string()).collect();
    for name in ROOTS {
        add_tree(&root().join(name), &mut tree);
    }
    tree.insert("build.rs".to_string());
    let mut missing = Vec::new();
    for document in documents() {
        for text in document.quoted() {
            // Of a command, the program: `scripts/bench.py --device cuda`.
            let path = text.split(' ').next().unwrap_or_default();
            if is_ours(path) && !is_there(path, &tree) {
                missing.push(format!("{}: {path}", document.name()));
            }
        }
    }
    assert!(missing.is_empty(), "these are not in the tree:\n{}", missing.join("\n"));
}

#[test]
fn links_lead_somewhere() {
    let mut missing = Vec::new();
    for document in documents() {
        let folder = document.path.parent().expect("a folder").to_path_buf();
        for text in &document.text {
            for rest in text.split("](").skip(1) {
                let target = rest.split([')', '#']).next().unwrap_or_default();
                if !target.is_empty() && !target.contains("://") && !folder.join(target).exists() {
                    missing.push(format!("{}: {target}", document.name()));
                }
            }
        }
    }
    assert!(missing.is_empty(), "these links lead nowhere:\n{}", missing.join("\n"));
}

#[test]
fn yaml_can_be_read() {
    let mut count = 0;
    for document in documents() {
        for (_, contents) in document.blocks.iter().filter(|(language, _)| language == "yaml") {
            if let Err(e) = serde_saphyr::from_str::<serde_json::Value>(contents) {
                panic!("{}: {e}\n{contents}", document.name());
            }
            count += 1;
        }
    }
    assert!(count > 0, "no document has a block of YAML");
}

/// The subcommands that `corral --help` lists, and what it says of each.
fn subcommands() -> BTreeMap<String, String> {
    let output = Command::new(corral()).arg("--help").output().expect("corral --help");
    let help = String::from_utf8(output.stdout).expect("help in UTF-8");
    let list = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    // Long descriptions go on in lines that begin further to the right.
    let entries = list.take_while(|line| !line.is_empty()).filter(|line| !line.starts_with("   "));
    let entries = entries.filter_map(|line| line.trim_start().split_once(' '));
    entries.map(|(name, about)| (name.to_string(), about.trim().to_string())).collect()
}

/// The subcommand in a command line of `corral` or `launch`; none where it has none, or stands for any.
fn subcommand(command: &str) -> Option<&str> {
    let mut words = command.split_whitespace();
    if !matches!(words.next(), Some("corral" | "launch")) {
        return None;
    }
    while let Some(word) = words.next() {
        if word.starts_with("--") {
            words.next(); // Its value; nothing follows --help and --version.
        } else if word != "..." && !word.starts_with('-') {
            let placeholder =
                word.starts_with(['[', '(', '#']) || word.chars().any(|c| c.is_ascii_uppercase());
            return (!placeholder).then_some(word);
        }
    }
    None
}

#[test]
fn subcommands_exist() {
    let known = subcommands();
    assert!(known.contains_key("pretrain") && known.contains_key("plan"), "corral --help lists {known:?}");
    let mut unknown = Vec::new();
    for document in documents() {
        for command in document.quoted().into_iter().chain(document.lines()) {
            if subcommand(&command).is_some_and(|name| !known.contains_key(name)) {
                unknown.push(format!("{}: {command}", document.name()));
            }
        }
    }
    assert!(unknown.is_empty(), "corral has no such subcommands:\n{}", unknown.join("\n"));
}

#[test]
fn subcommands_are_described() {
    let known = subcommands();
    let different: BTreeSet<&String> = known.values().collect();
    assert_eq!(different.len(), known.len(), "subcommands share a description: {known:#?}");
}

/// docs/config.md, docs/names.md and docs/corral.schema.json are what the program makes of its keys.
#[test]
fn keys_are_those_of_the_program() {
    let made = [
        ("--markdown", "docs/config.md"),
        ("--foreign", "docs/names.md"),
        ("--schema", "docs/corral.schema.json"),
    ];
    for (flag, file) in made {
        let output = Command::new(corral()).args(["help", flag]).output().expect("corral help");
        assert!(output.status.success(), "corral help {flag}: {}", String::from_utf8_lossy(&output.stderr));
        let there = fs::read_to_string(root().join(file)).expect(file);
        assert!(there == String::from_utf8_lossy(&output.stdout), "{file} is old: make keys writes it anew");
    }
}

/// Every recipe names its own part of the schema, for editors.
#[test]
fn recipes_name_their_schema() {
    let schema = fs::read_to_string(root().join("docs/corral.schema.json")).expect("docs/corral.schema.json");
    let schema: serde_json::Value = serde_json::from_str(&schema).expect("JSON");
    let mut count = 0;
    for recipe in fs::read_dir(root().join("configs"))
        .expect("configs/")
        .flat_map(|f| fs::read_dir(f.unwrap().path()).unwrap())
    {
        let path = recipe.unwrap().path();
        if path.extension().is_none_or(|e| e != "yaml") {
            continue;
        }
        let folder = path.parent().and_then(Path::file_name).unwrap().to_string_lossy().replace('_', "-");
        let line = format!("# yaml-language-server: $schema=../../docs/corral.schema.json#/$defs/{folder}");
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.lines().any(|l| l == line), "{}: the line `{line}` is missing", path.display());
        assert!(schema["$defs"][&folder].is_object(), "the schema has no {folder}");
        count += 1;
    }
    assert!(count > 20, "{count} recipes");
}

#[test]
fn what_is_checked() {
    for path in [
        "model/block.rs",
        "scripts/demo.sh",
        "docs/",
        "block.rs",
        "tests/golden/README.md",
        "checkpoint/families",
    ] {
        assert!(is_ours(path), "{path}");
    }
    for path in ["config/NAME.rs", "configs/*/a.yaml", "runs/", "DIR/train/", ".txt", "config.json", "corral"]
    {
        assert!(!is_ours(path), "{path}");
    }
    assert_eq!(subcommand("corral -q --threads 2 sft x=y"), Some("sft"));
    assert_eq!(subcommand("launch --nproc 2 ppo"), Some("ppo"));
    assert_eq!(subcommand("launch ... pretrain"), Some("pretrain"));
    for command in
        ["corral", "corral --help", "launch [--nproc N] SUBCOMMAND ...", "make test", "corral SUBCOMMAND"]
    {
        assert_eq!(subcommand(command), None, "{command}");
    }
}
