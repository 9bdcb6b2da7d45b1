//! The C ABI is written twice, in `cpp/abi.h` and in the `extern "C"` blocks of `src`: both are the same, and every function
//! that a .cpp defines is declared. (The C++ compiler compares the header with the definitions.)

use std::collections::BTreeMap;
use std::path::Path;

/// A function as the header declares it: the types of what it returns and of its arguments, in C.
type Functions = BTreeMap<String, (String, Vec<String>)>;

/// Rust's types and those that C++ has for them.
const TYPES: [(&str, &str); 19] = [
    ("()", "void"),
    ("bool", "bool"),
    ("c_char", "char"),
    ("c_int", "int"),
    ("c_void", "void"),
    ("f64", "double"),
    ("i64", "int64_t"),
    ("u8", "uint8_t"),
    ("u16", "uint16_t"),
    ("u32", "uint32_t"),
    ("u64", "uint64_t"),
    ("usize", "size_t"),
    ("C_tensor", "at::Tensor"),
    ("StorePtr", "StorePtr"),
    ("BackendPtr", "BackendPtr"),
    ("WorkPtr", "WorkPtr"),
    ("GraphPtr", "GraphPtr"),
    ("CUlib_st", "CUlib_st"),
    ("CUkern_st", "CUkern_st"),
];

/// The C type for a type of Rust.
fn in_c(rust: &str) -> String {
    let rust = rust.trim();
    if let Some(to) = rust.strip_prefix("*mut ") {
        return format!("{}*", in_c(to));
    }
    if let Some(to) = rust.strip_prefix("*const ") {
        assert!(!to.starts_with('*'), "the table has no {rust}");
        return format!("const {}*", in_c(to));
    }
    match rust {
        "Raw" => in_c("*mut C_tensor"),
        "Stream" => "Stream".into(),
        _ => {
            let known = TYPES.iter().find(|(name, _)| *name == rust);
            known.unwrap_or_else(|| panic!("the table has no {rust}")).1.into()
        }
    }
}

/// Without comments, every run of white space as one space.
fn plain(text: &str) -> String {
    let code = text.lines().map(|line| line.split("//").next().unwrap_or(""));
    code.flat_map(str::split_whitespace).collect::<Vec<_>>().join(" ")
}

/// What lies between `open` and the bracket that closes it, for every `open` of the text.
fn blocks<'a>(text: &'a str, open: &str) -> Vec<&'a str> {
    let end = |rest: &str| {
        let mut depth = 1;
        rest.find(|c| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            depth == 0
        })
    };
    let starts = text.match_indices(open).map(|(at, _)| &text[at + open.len()..]);
    starts.map(|rest| &rest[..end(rest).expect("a block ends")]).collect()
}

/// `RETURNED NAME(ARGUMENTS)`, cut at the brackets.
fn cut(declaration: &str) -> (&str, &str) {
    let (head, rest) = declaration.split_once('(').expect("a function has arguments");
    (head.trim(), rest.rsplit_once(')').expect("arguments end").0.trim())
}

fn arguments(list: &str) -> impl Iterator<Item = &str> {
    list.split(',').map(str::trim).filter(|argument| !argument.is_empty())
}

fn header(text: &str) -> Functions {
    let text = plain(text);
    let mut found = Functions::new();
    for declaration in blocks(&text, "extern \"C\" {").iter().flat_map(|block| block.split(';')) {
        if declaration.trim().is_empty() {
            continue;
        }
        let (head, list) = cut(declaration);
        // `T name`, with the star at the type.
        let split = |s: &str| s.rsplit_once(' ').map(|(t, name)| (t.to_owned(), name.to_owned())).expect(s);
        let (returned, name) = split(head);
        let types = arguments(list).map(|argument| split(argument).0).collect();
        assert!(found.insert(name, (returned, types)).is_none(), "{head} is declared twice");
    }
    found
}

fn rust(texts: &[String]) -> Functions {
    let mut found = Functions::new();
    for text in texts.iter().map(|text| plain(text)) {
        let all = [blocks(&text, "unsafe extern \"C\" {"), blocks(&text, "shim! {")].concat();
        for declaration in all.iter().flat_map(|block| block.split(';')) {
            let Some((_, declaration)) = declaration.split_once("fn ") else { continue };
            let (name, list) = cut(declaration);
            // Functions of other libraries, such as OpenMP, are declared in their own headers.
            if !name.starts_with("corral_") {
                continue;
            }
            let returned = declaration.rsplit_once("->").map_or("()", |(_, returned)| returned);
            let types = arguments(list).map(|a| in_c(a.split_once(':').expect("NAME: TYPE").1)).collect();
            let twice = found.insert(name.into(), (in_c(returned), types));
            assert!(twice.is_none(), "{name} is declared twice");
        }
    }
    found
}

/// A line for each function that is not the same on both sides.
fn differences(header: &Functions, rust: &Functions) -> Vec<String> {
    let names: std::collections::BTreeSet<_> = header.keys().chain(rust.keys()).collect();
    names
        .into_iter()
        .filter_map(|name| match (header.get(name), rust.get(name)) {
            (Some(_), None) => Some(format!("{name} is in abi.h alone")),
            (None, Some(_)) => Some(format!("{name} is in src alone")),
            (c, r) => (c != r).then(|| format!("{name}: {c:?} in abi.h, {r:?} in src")),
        })
        .collect()
}

/// The files of a folder with this ending.
fn read(folder: &str, ending: &str) -> Vec<String> {
    fn walk(folder: &Path, ending: &str, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(folder).expect("a folder of the package") {
            let path = entry.expect("an entry").path();
            match path.is_dir() {
                true => walk(&path, ending, found),
                false if path.extension().is_some_and(|e| e == ending) => {
                    found.push(std::fs::read_to_string(&path).expect("a source"));
                }
                false => {}
            }
        }
    }
    let mut found = Vec::new();
    walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder), ending, &mut found);
    found
}

fn abi_h() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("cpp/abi.h");
    std::fs::read_to_string(path).expect("cpp/abi.h")
}

#[test]
fn header_and_rust_declare_the_same() {
    let (header, rust) = (header(&abi_h()), rust(&read("src", "rs")));
    assert!(header.len() > 50, "{} functions", header.len());
    assert_eq!(differences(&header, &rust), [""; 0]);
}

#[test]
fn all_that_is_defined_is_declared() {
    const STARTS: [&str; 3] = ["char* corral_", "void corral_", "int corral_"];
    let cut_name = |line: &str| {
        let head = line.split('(').next().unwrap_or(line);
        head.rsplit(' ').next().unwrap_or(head).to_owned()
    };
    let declared = header(&abi_h());
    let mut defined = Vec::new();
    for text in read("cpp", "cpp") {
        let heads = text.lines().filter(|l| STARTS.iter().any(|start| l.starts_with(start)));
        defined.extend(heads.map(cut_name));
        let exports = text.contains("extern \"C\"");
        assert!(!exports || text.contains("#include \"abi.h\""), "it does not include abi.h:\n{text}");
    }
    defined.sort_unstable();
    assert_eq!(defined, declared.keys().cloned().collect::<Vec<_>>());
}

/// The comparison sees what it is for.
#[test]
fn what_differs_is_found() {
    let (header_text, rust_texts) = (abi_h(), read("src", "rs"));
    let found = |from: &str, to: &str| {
        let changed = header_text.replacen(from, to, 1);
        assert_ne!(changed, header_text, "{from} is in the header");
        differences(&header(&changed), &rust(&rust_texts))
    };
    let few_rows = "char* corral_few_rows(at::Tensor* x, at::Tensor* w, at::Tensor* add, at::Tensor** y);";
    for (from, to, name) in [
        (few_rows, "", "corral_few_rows is in src alone"),
        (few_rows, &few_rows.replace("few_rows", "some_rows"), "corral_few_rows is in src alone"),
        (few_rows, &few_rows.replace("at::Tensor* add, ", ""), "corral_few_rows"),
        (few_rows, &few_rows.replace("at::Tensor** y", "at::Tensor* y"), "corral_few_rows"),
        (few_rows, &few_rows.replace("char*", "void"), "corral_few_rows"),
        ("uint64_t first", "int64_t first", "corral_fill_normal"),
        ("double eps, at::Tensor** y", "float eps, at::Tensor** y", "corral_rms_norm"),
        ("const char* host, uint16_t", "char* host, uint16_t", "corral_store_tcp"),
        ("Stream stream", "Stream* stream", "corral_cuda_stream_synchronize"),
    ] {
        let found = found(from, to);
        assert!(found.iter().any(|line| line.contains(name)), "{from} as {to}: {found:?}");
    }
    let more = format!("{header_text} extern \"C\" {{ void corral_new(int a); }}");
    assert_eq!(differences(&header(&more), &rust(&rust_texts)), ["corral_new is in abi.h alone"]);
    let more = "unsafe extern \"C\" { fn corral_new(a: c_int); }".to_string();
    let texts: Vec<_> = rust_texts.iter().cloned().chain([more]).collect();
    assert_eq!(differences(&header(&header_text), &rust(&texts)), ["corral_new is in src alone"]);
}
