//! Inputs of users that once failed, with right values: every file of `tests/cases` through `run.py`, which says what a case is.

use std::path::Path;
use std::process::Command;
use testing::program::corral;

/// Runs the cases of one file; shows those that fail.
fn cases(file: &str) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let output = Command::new("python3")
        .arg(folder.join("cases/run.py"))
        .arg(folder.join("cases").join(file))
        .arg("--bin")
        .arg(corral().parent().expect("a folder of binaries"))
        .arg("--models")
        .arg(folder.join("golden/models"))
        .output()
        .expect("python3 runs");
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let failed: Vec<&str> = out.lines().filter(|line| !line.starts_with("right")).collect();
    assert!(output.status.success(), "{file}:\n{}\n{err}", failed.join("\n"));
}

/// A test for each file, so that they run side by side.
macro_rules! files {
    ($($name:ident),*) => {
        $(#[test]
        fn $name() {
            cases(concat!(stringify!($name), ".json"));
        })*

        /// No file is left out.
        #[test]
        fn every_file_has_its_test() {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases");
            for entry in std::fs::read_dir(folder).expect("tests/cases") {
                let name = entry.expect("an entry").file_name().to_string_lossy().into_owned();
                let Some(stem) = name.strip_suffix(".json") else { continue };
                assert!([$(stringify!($name)),*].contains(&stem), "{name} is run by no test");
            }
        }
    };
}

files!(
    adapter,
    records,
    preferences,
    model,
    tokenizer,
    template,
    config,
    hub,
    messages,
    examples,
    runs,
    adapters,
    ranks,
    console
);
