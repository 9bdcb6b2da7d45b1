use super::*;
use serde_json::Value as Json;

fn clock() -> Clock {
    chrono::NaiveDate::from_ymd_opt(2024, 7, 6).unwrap().and_hms_opt(0, 0, 0).unwrap()
}

fn render(source: &str, variables: &Json) -> Result<String, Failure> {
    let mut dict = Dict::default();
    for (name, value) in variables.as_object().unwrap() {
        dict.set_name(name, value.into());
    }
    Template::new(source)?.render(dict, clock())
}

fn fails(source: &str) -> Failure {
    render(source, &serde_json::json!({})).expect_err(source)
}

/// What transformers' environment renders of thousands of snippets (tests/fixtures/make_jinja.py).
#[test]
fn snippets_are_rendered_as_by_jinja2() {
    let fixture: Json = serde_json::from_str(include_str!("../../../tests/fixtures/jinja.json")).unwrap();
    let cases = fixture["cases"].as_array().unwrap();
    assert!(cases.len() > 6000);
    let mut wrong = Vec::new();
    for case in cases {
        let source = case[0].as_str().unwrap();
        let got = render(source, &fixture["variables"]).map(|text| text.replace(OPEN, "").replace(CLOSE, ""));
        let right = match case[1].as_str() {
            Some(text) => got.as_deref() == Ok(text),
            None => got.is_err(),
        };
        if !right {
            wrong.push(format!("{source}\n  right {}\n  got   {got:?}", case[1]));
        }
    }
    assert!(wrong.is_empty(), "{} of {} differ:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

/// The golden models' templates, and others that write tools, with tools none, empty and given
/// (tests/fixtures/make_tools.py).
#[test]
fn templates_with_tools_are_rendered_as_by_jinja2() {
    let fixture: Json = serde_json::from_str(include_str!("../../../tests/fixtures/tools.json")).unwrap();
    let cases = fixture["cases"].as_array().unwrap();
    assert!(cases.len() > 200);
    for case in cases {
        let mut variables = fixture["variables"].clone();
        for (name, value) in case[1].as_object().unwrap() {
            variables[name] = value.clone();
        }
        let got = render(fixture["templates"][case[0].as_str().unwrap()].as_str().unwrap(), &variables);
        match case[2].as_str() {
            Some(text) => assert_eq!(got.as_deref(), Ok(text), "{} {}", case[0], case[1]),
            None => assert!(got.is_err(), "{} {}", case[0], case[1]),
        }
    }
}

#[test]
fn what_is_not_built_is_refused_by_its_name() {
    for (source, name) in [
        ("{% include 'a' %}", "'include'"),
        ("{% extends 'a' %}", "'extends'"),
        ("{% import 'a' as b %}", "'import'"),
        ("{% from 'a' import b %}", "'from'"),
        ("{% block a %}{% endblock %}", "'block'"),
        ("{% autoescape true %}{% endautoescape %}", "'autoescape'"),
        ("{% for x in [1] recursive %}{% endfor %}", "recursive"),
        ("{{ 'a'|urlencode }}", "'urlencode'"),
        ("{{ ['a']|random }}", "'random'"),
        ("{{ 'a'|pprint }}", "'pprint'"),
        ("{{ 1|filesizeformat }}", "'filesizeformat'"),
        ("{{ 'a'.encode() }}", "'encode'"),
        ("{{ 'a'.casefold() }}", "'casefold'"),
        ("{{ (5).bit_length() }}", "'bit_length'"),
        ("{{ lipsum() }}", "'lipsum'"),
        ("{{ [1]|map('abs') }}", "| list"),
        (r"{{ '\N{DASH}' }}", r"\N"),
        ("{{ 2 ** 200 }}", "38 digits"),
    ] {
        let e = fails(source);
        assert!(e.message.contains(name) && e.line == Some(1), "{source}: {e:?}");
    }
}

#[test]
fn failures_have_their_line() {
    for (source, line) in [
        ("\n{{ 1 / 0 }}", 2),
        ("{% if true %}\n\n{{ none.x.y }}{% endif %}", 3),
        ("a\n{% if %}", 2),
        ("\n\n{{ 'a", 3),
        ("{% macro m() %}\n{{ 1 + 'a' }}{% endmacro %}\n\n{{ m() }}", 2),
        ("{% for x in [\n1,\n0] %}\n{{ 1 / x }}{% endfor %}", 4),
    ] {
        assert_eq!(fails(source).line, Some(line), "{source}");
    }
}

/// Whatever a template does, it ends in an error and not in a stack that runs out; on a thread as small as rayon's.
#[test]
fn deep_templates_are_refused() {
    let deep = |open: &str, close: &str, n: usize| format!("{}1{}", open.repeat(n), close.repeat(n));
    let sources = [
        "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}".to_string(),
        "{% macro m(n) %}{% for x in [1] %}{% if true %}{{ (m(n) ~ 'a')|upper }}{% endif %}{% endfor %}{% endmacro %}{{ m(0) }}".into(),
        format!("{{{{ {} }}}}", deep("(", ")", 5000)),
        format!("{{{{ {} }}}}", deep("[", "]", 5000)),
        format!("{{{{ {} }}}}", deep("{'a': ", "}", 5000)),
        format!("{{{{ {}1 }}}}", "-".repeat(5000)),
        format!("{{{{ {}1 }}}}", "not ".repeat(5000)),
        format!("{{{{ 1{} }}}}", " + 1".repeat(5000)),
        format!("{{{{ 1{} }}}}", "|abs".repeat(5000)),
        format!("{{{{ 1{} }}}}", ".a".repeat(5000)),
        format!("{{{{ 1{} }}}}", " if 1 else 2".repeat(5000)),
        format!("{}{}", "{% if true %}".repeat(5000), "{% endif %}".repeat(5000)),
        format!("{}{}", "{% for x in [1] %}".repeat(5000), "{% endfor %}".repeat(5000)),
        format!("{{% set {}a{} = 1 %}}", "(".repeat(5000), ")".repeat(5000)),
        "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}".into(),
        format!("{}{{{{ x.y.z }}}}", "{% set x = {'a': x} %}".repeat(5000)),
        "{% set ns = namespace(x='a') %}{% for i in range(100) %}{% set ns.x = ns.x * 9 %}{% endfor %}".into(),
    ];
    let run = move || sources.iter().for_each(|source| drop(fails(source)));
    std::thread::Builder::new().stack_size(2 << 20).spawn(run).unwrap().join().unwrap();
}

/// As deep as real templates go, and somewhat deeper.
#[test]
fn what_is_nested_in_earnest_runs() {
    let variables = serde_json::json!({});
    let source = "{% macro m(n) %}{% if n > 0 %}{% for x in [1] %}{{ m(n - 1) }}{% endfor %}{% endif %}{{ n }}{% endmacro %}{{ m(20) }}";
    assert!(render(source, &variables).unwrap().ends_with("1920"));
    let blocks = format!("{}x{}", "{% if true %}".repeat(40), "{% endif %}".repeat(40));
    assert_eq!(render(&blocks, &variables).unwrap(), "x");
    let sum = format!("{{{{ 1{} }}}}", " + 1".repeat(200));
    assert_eq!(render(&sum, &variables).unwrap(), "201");
}

/// Damaged templates give an error or a text, never a panic.
#[test]
fn damaged_templates_do_no_harm() {
    let fixture: Json = serde_json::from_str(include_str!("../../../tests/fixtures/jinja.json")).unwrap();
    let mut rng = crate::random::Rng::new(1, "jinja", 0);
    let cases = fixture["cases"].as_array().unwrap();
    let pieces = [
        "{%", "%}", "{{", "}}", "'", "(", ")", "[", "|", ".", " ", "-", "\n", "é", "0", "\\", ",", "if",
        "endfor",
    ];
    for _ in 0..20_000 {
        let source = cases[rng.below(cases.len() as u64) as usize][0].as_str().unwrap();
        let mut chars: Vec<String> = source.chars().map(String::from).collect();
        for _ in 0..1 + rng.below(3) {
            let at = rng.below(chars.len() as u64) as usize;
            match rng.below(3) {
                0 if chars.len() > 1 => drop(chars.remove(at)),
                1 => chars[at] = pieces[rng.below(pieces.len() as u64) as usize].into(),
                _ => chars.insert(at, pieces[rng.below(pieces.len() as u64) as usize].into()),
            }
        }
        let _ = render(&chars.concat(), &fixture["variables"]);
    }
}

#[test]
fn the_date_is_the_clocks() {
    let template = Template::new("{{ strftime_now('%d %b %Y, %A %-d %B %H:%M %j%%') }}").unwrap();
    let text = template.render(Dict::default(), clock()).unwrap();
    assert_eq!(text, "06 Jul 2024, Saturday 6 July 00:00 188%");
    assert!(fails("{{ strftime_now('%!') }}").message.contains("bad format"));
}
