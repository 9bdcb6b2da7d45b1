use super::*;
use serde_json::json;
use testing::folder::TestFolder;

const TEXT: &str =
    "The quick brown fox jumps over 13 lazy dogs.\n\nThe dogs sleep, the fox doesn't.\n  It's 2026!\n";

/// A byte-level BPE that is trained on a few sentences.
pub fn small(vocab_size: usize) -> Tokenizer {
    train((0..50).map(|_| Ok(TEXT.to_string())), vocab_size, true).unwrap()
}

#[test]
fn a_trained_tokenizer_decodes_what_it_encodes() {
    let t = small(290);
    assert_eq!((t.vocab_size(), t.bos_id(), t.eos_ids(), t.pad_id()), (290, Some(0), &[1][..], Some(2)));
    for text in [TEXT, "", " ", "naïve 中文 🦀\u{0}\r\n\t", "1234567890 -3.5e10"] {
        let ids = t.encode(text, false).unwrap();
        assert_eq!(t.decode(&ids, true).unwrap(), text);
        let with_bos = t.encode(text, true).unwrap();
        assert_eq!((with_bos[0], &with_bos[1..]), (0, &ids[..]));
        assert_eq!(t.decode(&with_bos, true).unwrap(), text);
    }
    assert!(t.encode(TEXT, false).unwrap().len() < TEXT.len() * 2 / 3);
    assert_eq!(t.encode("4711", false).unwrap().len(), 4);
    assert!(t.adds_bos());
}

#[test]
fn digits_may_be_merged_on_demand() {
    let texts = || (0..50).map(|_| Ok("in 2026 and 2026".to_string()));
    assert_eq!(train(texts(), 280, true).unwrap().encode("2026", false).unwrap().len(), 4);
    assert!(train(texts(), 280, false).unwrap().encode("2026", false).unwrap().len() < 4);
}

#[test]
fn training_repeats_and_stops_where_the_text_ends() {
    assert_eq!(small(300).hash(), small(300).hash());
    assert_ne!(small(300).hash(), small(299).hash());
    let t = small(100_000);
    assert!((300..1000).contains(&t.vocab_size()), "{}", t.vocab_size());
    assert_eq!(train([Ok(String::new())].into_iter(), 300, true).err().unwrap().exit_code(), 3);
    let e = train([Ok(String::new())].into_iter(), 258, true).err().unwrap();
    assert!(e.exit_code() == 2 && e.message.contains("259"), "{e}");
    let texts = [Ok("a".to_string()), Err(Error::data("line 7 is wrong")), Ok("b".to_string())];
    assert_eq!(train(texts.into_iter(), 300, true).err().unwrap().message, "line 7 is wrong");
}

#[test]
fn special_tokens_in_plain_text_stay_text() {
    let t = small(290);
    assert_eq!(t.encode("</s>", false).unwrap(), [1]);
    let plain = t.clone().plain();
    let ids = plain.encode("a</s>", false).unwrap();
    assert!(!ids.contains(&1));
    assert_eq!(plain.decode(&ids, true).unwrap(), "a</s>");
}

#[test]
fn pieces_give_the_ids_of_the_whole() {
    let t = small(320);
    let text = format!("{}word\n\n  indented\nüber\n中文\n12\n", TEXT.replace('.', "")).repeat(40);
    let whole = t.encode(&text, false).unwrap();
    for size in [1, 10, 100, 1000] {
        let pieces = t.pieces(&text, size);
        assert!(pieces.len() > text.len() / (size + 120), "{} pieces of {size}", pieces.len());
        assert_eq!(pieces.concat(), text);
        let ids: Vec<u32> = pieces.iter().flat_map(|p| t.encode(p, false).unwrap()).collect();
        assert!(ids == whole, "size {size}");
    }
    assert_eq!(t.pieces("no break", 2), ["no break"]);
}

#[test]
fn save_and_load_keep_everything() {
    let folder = TestFolder::new("tokenizer");
    let t = small(290);
    t.save(&folder.0).unwrap();
    let again = Tokenizer::load(&folder.0).unwrap();
    assert_eq!((again.hash(), again.vocab_size(), again.eos_ids()), (t.hash(), 290, &[1][..]));
    assert_eq!(again.encode(TEXT, true).unwrap(), t.encode(TEXT, true).unwrap());

    // Written anew with padding, truncation and other white space: the same tokenizer.
    let path = folder.0.join("tokenizer.json");
    let mut value: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    value["truncation"] =
        json!({"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0});
    std::fs::write(&path, value.to_string()).unwrap();
    let again = Tokenizer::load(&path).unwrap();
    assert_eq!(again.hash(), t.hash());
    assert_eq!(again.encode(TEXT, true).unwrap(), t.encode(TEXT, true).unwrap());
}

#[test]
fn special_tokens_come_from_all_their_files() {
    let folder = TestFolder::new("tokenizer-special");
    small(290).save(&folder.0).unwrap();
    folder.file("tokenizer_config.json", r#"{"eos_token": {"content": "</s>"}, "chat_template": "x"}"#);
    folder.file("special_tokens_map.json", r#"{"eos_token": "<s>", "pad_token": "<pad>"}"#);
    folder.file("generation_config.json", r#"{"eos_token_id": [7, 1, 9], "bos_token_id": 0}"#);
    let t = Tokenizer::load(&folder.0).unwrap();
    // Without added_tokens_decoder the older file counts, as in transformers.
    assert_eq!((t.bos_id(), t.eos_ids(), t.pad_id()), (Some(0), &[0, 7, 1, 9][..], Some(2)));
    let config = r#"{"eos_token": {"content": "</s>"}, "chat_template": "x", "added_tokens_decoder": {}}"#;
    folder.file("tokenizer_config.json", config);
    let t = Tokenizer::load(&folder.0).unwrap();
    assert_eq!((t.eos_ids(), t.pad_id()), (&[1, 7, 9][..], None));
    assert_eq!(t.chat_template().unwrap().source, "x");
    folder.file("chat_template.jinja", "y");
    assert_eq!(Tokenizer::load(&folder.0).unwrap().chat_template().unwrap().source, "y");
}

#[test]
fn bad_tokenizers_are_refused_with_the_reason() {
    let folder = TestFolder::new("tokenizer-bad");
    let error = || {
        let e = Tokenizer::load(&folder.0).err().unwrap();
        assert_eq!(e.exit_code(), 3);
        e.message
    };
    assert!(error().contains("there is no tokenizer.json"));
    folder.file("tokenizer.json", "{");
    assert!(error().contains("not valid JSON"));
    folder.file("tokenizer.json", "{}");
    assert!(error().contains("not a tokenizer"));
    small(290).save(&folder.0).unwrap();
    folder.file("tokenizer_config.json", r#"{"eos_token": "<eos>"}"#);
    assert!(error().contains("eos_token is `<eos>`, which is not in the vocabulary"));
    folder.file("tokenizer_config.json", "{}");
    folder.file("generation_config.json", r#"{"eos_token_id": "</s>"}"#);
    assert!(error().contains("eos_token_id is no token id"));
}

// ---- vocabularies of other formats ----

fn fixture(name: &str) -> std::path::PathBuf {
    testing::golden::fixture("tokenizers").join(name)
}

/// A folder with the fixture's vocabulary under `name` and nothing else, and what the library itself says.
fn folder_with(fixture_name: &str, name: &str) -> (TestFolder, Value) {
    let folder = TestFolder::new(&format!("vocabulary-{fixture_name}-{name}"));
    std::fs::copy(fixture(fixture_name), folder.0.join(name)).unwrap();
    let json = fixture(&format!("{}.json", fixture_name.split('.').next().unwrap()));
    (folder, serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap())
}

/// One of the fixtures by its name, in its folder.
pub fn load_fixture(name: &str) -> (TestFolder, Tokenizer) {
    let file = if name == "qwen" { "qwen.tiktoken".into() } else { format!("{name}.model") };
    let target = if name == "qwen" { "qwen.tiktoken" } else { "tokenizer.model" };
    let folder = TestFolder::new(&format!("fixture-{name}-{:?}", std::thread::current().id()));
    std::fs::copy(fixture(&file), folder.0.join(target)).unwrap();
    let t = Tokenizer::load(&folder.0).unwrap();
    (folder, t)
}

fn check_cases(t: &Tokenizer, expected: &Value) {
    let cases = expected["cases"].as_array().unwrap();
    assert!(cases.len() > 300);
    for case in cases {
        let (text, ids) = (case[0].as_str().unwrap(), &case[1]);
        assert_eq!(&json!(t.encode(text, false).unwrap()), ids, "{text:?}");
    }
}

/// Saved, the tokenizer is a tokenizer.json that gives the same.
fn check_saved(name: &str, t: &Tokenizer, expected: &Value) {
    let folder = TestFolder::new(&format!("vocabulary-saved-{name}"));
    t.save(&folder.0).unwrap();
    let again = Tokenizer::load(&folder.0).unwrap();
    assert!(again.place().ends_with("tokenizer.json"));
    assert_eq!(again.hash(), t.hash());
    assert_eq!((again.bos_id(), again.eos_ids(), again.pad_id()), (t.bos_id(), t.eos_ids(), t.pad_id()));
    check_cases(&again.plain(), expected);
}

#[test]
fn sentencepiece_models_give_sentencepieces_ids() {
    for name in ["llama", "no_prefix", "symbols"] {
        let (folder, expected) = folder_with(&format!("{name}.model"), "tokenizer.model");
        let t = Tokenizer::load(&folder.0).unwrap();
        let id = |key: &str| u32::try_from(expected[key].as_i64().unwrap()).ok();
        let unk = t.special_tokens().iter().find(|(name, _)| *name == "unk_token");
        let unk = unk.and_then(|(_, text)| t.token_to_id(text));
        assert_eq!((t.bos_id(), t.pad_id(), unk), (id("bos"), id("pad"), id("unk")), "{name}");
        assert_eq!(t.eos_ids().first().copied(), id("eos"));
        assert!(t.adds_bos());
        let plain = t.clone().plain();
        check_cases(&plain, &expected);
        check_saved(name, &t, &expected);
        if name != "no_prefix" {
            // With byte fallback nothing is lost.
            for case in expected["cases"].as_array().unwrap() {
                let text = case[0].as_str().unwrap();
                let ids = plain.encode(text, true).unwrap();
                assert_eq!(ids[0], 1);
                assert_eq!(plain.decode(&ids, true).unwrap(), text.replace('▁', " "), "{text:?}");
            }
        }
    }
}

#[test]
fn tiktoken_vocabularies_give_tiktokens_ids() {
    let (folder, expected) = folder_with("llama3.model", "tokenizer.model");
    let t = Tokenizer::load(&folder.0).unwrap();
    assert_eq!(
        (t.vocab_size(), t.bos_id(), t.eos_ids(), t.pad_id()),
        (856, Some(600), &[601, 608, 609][..], Some(604))
    );
    assert!(t.adds_bos());
    for (id, token) in
        [(605, "reserved_special_token_2"), (610, "python_tag"), (855, "reserved_special_token_247")]
    {
        assert_eq!(t.id_to_token(id).unwrap(), format!("<|{token}|>"));
    }
    check_cases(&t.clone().plain(), &expected);
    check_saved("llama3", &t, &expected);

    let (folder, expected) = folder_with("qwen.tiktoken", "qwen.tiktoken");
    let t = Tokenizer::load(&folder.0).unwrap();
    assert_eq!((t.vocab_size(), t.bos_id(), t.eos_ids(), t.pad_id()), (808, None, &[600][..], Some(600)));
    assert_eq!(t.encode("a<|im_end|>", true).unwrap().last(), Some(&602));
    assert_eq!(t.token_to_id("<|extra_204|>"), Some(807));
    check_cases(&t.clone().plain(), &expected);
    check_saved("qwen", &t, &expected);
    folder.file("generation_config.json", r#"{"chat_format": "chatml", "eos_token_id": 600}"#);
    let t = Tokenizer::load(&folder.0).unwrap();
    assert_eq!(t.eos_ids(), [600, 602]);
    check_saved("qwen", &t, &expected);
}

#[test]
fn what_cannot_be_converted_is_refused_with_the_reason() {
    let model = std::fs::read(fixture("llama.model")).unwrap();
    let folder = TestFolder::new("vocabulary-bad");
    let error = |bytes: &[u8]| {
        folder.file("tokenizer.model", bytes);
        let e = Tokenizer::load(&folder.0).err().unwrap();
        assert_eq!(e.exit_code(), 3);
        assert!(e.message.contains("tokenizer.model: "), "{e}");
        e.message
    };
    // Fields at the end of a protobuf are merged with what stands before.
    let and = |more: &[u8]| [&model, more].concat();
    assert!(error(&and(&[0x12, 2, 3 << 3, 1])).contains("a Unigram model of SentencePiece is not built"));
    assert!(error(&and(&[0x12, 2, 3 << 3, 3])).contains("a word model"));
    assert!(error(&and(&[0x1a, 3, 0x12, 1, b'x'])).contains("its normalizer `identity` maps characters"));
    assert!(error(&and(&[0x1a, 2, 4 << 3, 1])).contains("remove_extra_whitespaces"));
    assert!(error(&and(&[0x0a, 5, 0x0a, 3, b'<', b's', b'>'])).contains("the piece `<s>` appears twice"));
    assert!(error(&and(&[0x0a, 6, 0x0a, 2, 0xc3, 0x28, 0x18, 1])).contains("not UTF-8"));
    assert!(error(&and(&[0x0a, 2, 0x18, 1])).contains("a piece is empty"));
    assert!(error(&and(&[0x0a, 9, 0x0a])).contains("cut off"));
    assert!(error(&[]).contains("no pieces"));
    assert!(error(b"hello").contains("not a SentencePiece model"));

    let ranks = std::fs::read_to_string(fixture("llama3.model")).unwrap();
    let (first, rest) = ranks.split_once('\n').unwrap();
    assert!(error(rest.as_bytes()).contains("line 1: the rank 1 follows, but 0 is missing"));
    assert!(error(format!("{ranks}{first}\n").as_bytes()).contains("line 601: the rank 0 appears twice"));
    assert!(
        error(format!("{ranks}{} 600\n", first.split(' ').next().unwrap()).as_bytes())
            .contains("token appears twice")
    );
    assert!(error(format!("{ranks}x\n").as_bytes()).contains("line 601: not a token in base64 and its rank"));
    assert!(error(b"YWI= 0\n").contains("the byte 0x00 has no token"));

    std::fs::remove_file(folder.0.join("tokenizer.model")).unwrap();
    let message = || Tokenizer::load(&folder.0).err().unwrap().message;
    assert!(
        message().ends_with("there is no tokenizer.json, tokenizer.model or qwen.tiktoken in this folder")
    );
    folder.file("vocab.json", "{}");
    folder.file("merges.txt", "");
    assert!(
        message()
            .contains("vocab.json and merges.txt cannot be read: save the tokenizer once with transformers")
    );
}

#[test]
fn the_config_beside_a_vocabulary_counts() {
    let (folder, t) = load_fixture("llama");
    let n = t.vocab_size() as u32;
    let (space, a) = (t.token_to_id("▁").unwrap(), t.encode("a", true).unwrap());
    assert_eq!(a[0], 1);
    folder.file(
        "tokenizer_config.json",
        r#"{"add_bos_token": false, "add_eos_token": true, "pad_token": {"content": "[PAD]"}, "chat_template": "c"}"#,
    );
    folder.file("added_tokens.json", format!(r#"{{"[PAD]": {n}, "<|x|>": {}}}"#, n + 1));
    let t = Tokenizer::load(&folder.0).unwrap();
    assert_eq!((t.vocab_size() as u32, t.pad_id(), t.adds_bos()), (n + 2, Some(n), false));
    assert_eq!(t.encode("a", true).unwrap(), [&a[1..], &[2]].concat());
    assert_eq!(t.encode("<|x|>", false).unwrap(), [n + 1]);
    assert_eq!(t.chat_template().unwrap().source, "c");
    let saved = TestFolder::new("vocabulary-config");
    t.save(&saved.0).unwrap();
    assert!(!saved.0.join("added_tokens.json").exists());
    let again = Tokenizer::load(&saved.0).unwrap();
    assert_eq!((again.hash(), again.pad_id()), (t.hash(), Some(n)));

    // Ids that contradict the vocabulary.
    folder.file("added_tokens.json", r#"{"[PAD]": 7}"#);
    assert!(Tokenizer::load(&folder.0).err().unwrap().message.contains("`[PAD]` has the id 7 of the piece"));
    folder.file("added_tokens.json", format!(r#"{{"[PAD]": {}}}"#, n + 5));
    let e = Tokenizer::load(&folder.0).err().unwrap();
    assert!(e.message.contains(&format!("`[PAD]` should have the id {}, but gets {n}", n + 5)), "{e}");
    std::fs::remove_file(folder.0.join("added_tokens.json")).unwrap();

    // Only the beginning of a text gets a space.
    folder.file("tokenizer_config.json", r#"{"legacy": false}"#);
    let t = Tokenizer::load(&folder.0).unwrap();
    assert_eq!(t.encode("(</s>(", false).unwrap()[0], space);
    assert_eq!(t.encode("(</s>(", false).unwrap().iter().filter(|id| **id == space).count(), 1);
    folder.file("tokenizer_config.json", r#"{"add_prefix_space": false}"#);
    assert_ne!(Tokenizer::load(&folder.0).unwrap().encode("(", false).unwrap()[0], space);
    // A folder of Meta's has nothing but the vocabulary; of an older model of Hugging Face's, config.json has the ids.
    std::fs::remove_file(folder.0.join("tokenizer_config.json")).unwrap();
    folder.file("config.json", r#"{"eos_token_id": [2, 5], "pad_token_id": 0}"#);
    let t = Tokenizer::load(&folder.0).unwrap();
    assert_eq!((t.bos_id(), t.eos_ids(), t.pad_id()), (Some(1), &[2, 5][..], Some(0)));
}

/// Tokens that other files than tokenizer.json name, and what transformers makes of them (tests/fixtures/make_added.py).
#[test]
fn added_tokens_of_other_files_count_as_in_transformers() {
    let fixture: Value = serde_json::from_str(include_str!("../../../tests/fixtures/added.json")).unwrap();
    for case in fixture["cases"].as_array().unwrap() {
        let folder = TestFolder::new("added-tokens");
        for (name, content) in case["files"].as_object().unwrap() {
            folder.file(name, content.to_string());
        }
        folder.file("tokenizer.json", fixture["tokenizer"].to_string());
        let name = &case["name"];
        let t = match (Tokenizer::load(&folder.0), case["refused"].as_array()) {
            (Ok(t), None) => t,
            (Err(e), Some(words)) => {
                assert!(words.iter().all(|w| e.message.contains(w.as_str().unwrap())), "{name}: {e}");
                assert_eq!(e.exit_code(), 3);
                continue;
            }
            (Ok(_), Some(_)) => panic!("{name}: not refused"),
            (Err(e), None) => panic!("{name}: {e}"),
        };
        assert_eq!(json!(t.encode(case["text"].as_str().unwrap(), true).unwrap()), case["ids"], "{name}");
        assert_eq!(json!(t.vocab_size()), case["len"], "{name}");
        let text = t.decode(&t.encode(case["text"].as_str().unwrap(), true).unwrap(), true).unwrap();
        assert_eq!(json!(text), case["decoded"], "{name}");
        for (key, token) in case["special"].as_object().unwrap() {
            let named = t.special_tokens().iter().find(|(name, _)| name == key);
            assert_eq!(json!(named.map(|(_, text)| text)), *token, "{name}: {key}");
        }
        // What is saved says the same.
        let saved = TestFolder::new("added-tokens-saved");
        t.save(&saved.0).unwrap();
        let again = Tokenizer::load(&saved.0).unwrap();
        assert_eq!((again.hash(), again.eos_ids()), (t.hash(), t.eos_ids()), "{name}");
        assert_eq!(json!(again.encode(case["text"].as_str().unwrap(), true).unwrap()), case["ids"], "{name}");
    }
}

/// Ids that are no token's say nothing; what is no number is refused.
#[test]
fn ids_that_are_no_tokens_are_left_out() {
    let folder = TestFolder::new("tokenizer-no-ids");
    small(290).save(&folder.0).unwrap();
    folder.file("tokenizer_config.json", "{}");
    let load = |generation: Value, config: Value| {
        folder.file("generation_config.json", generation.to_string());
        folder.file("config.json", config.to_string());
        Tokenizer::load(&folder.0).map(|t| (t.bos_id(), t.eos_ids().to_vec(), t.pad_id()))
    };
    let ids = |bos: Value, eos: Value, pad: Value| json!({"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad});
    let none = json!({});
    for (bos, eos, pad, right) in [
        (json!(0), json!(1), json!(-1), (Some(0), vec![1], None)),
        (json!(-1), json!(-1), json!(290), (None, vec![], None)),
        (json!([0]), json!([1, -1, 2]), json!([2, 1]), (Some(0), vec![1, 2], Some(2))),
        (json!([]), json!([]), json!([-1]), (None, vec![], None)),
        (json!(null), json!([null, 1]), json!(null), (None, vec![1], None)),
        (json!(100000), json!([1, 100000]), json!(100000), (None, vec![1], None)),
    ] {
        let all = ids(bos, eos, pad);
        assert_eq!(load(all.clone(), none.clone()).unwrap(), right, "{all}");
        assert_eq!(load(none.clone(), all.clone()).unwrap(), right, "{all}");
    }
    // A model with more rows than the tokenizer has tokens may end with one of them.
    let rows = load(json!({"eos_token_id": [1, 300]}), json!({"vocab_size": 320})).unwrap();
    assert_eq!(rows.1, [1, 300]);
    for bad in [json!("0"), json!(1.5), json!({"id": 1}), json!([[1]])] {
        let e = load(ids(json!(0), json!(1), bad.clone()), none.clone()).unwrap_err();
        assert!(
            e.message.contains("pad_token_id is no token id") && e.message.contains(&bad.to_string()),
            "{e}"
        );
    }
}

/// Texts of letters, marks, digits, apostrophes, white space and line ends of many scripts, in pieces and as a whole.
#[test]
#[expect(clippy::too_many_lines, reason = "the scripts and tokenizers that are tried")]
fn pieces_of_any_script_give_the_ids_of_the_whole() {
    let golden = testing::golden::repository().join("tests/golden/models");
    let mut all: Vec<(String, Tokenizer)> = ["llama", "no_prefix", "symbols", "llama3", "qwen"]
        .map(|name| (name.to_string(), load_fixture(name).1))
        .into();
    for name in ["llama2", "llama3", "mistral", "qwen2", "qwen3", "mixtral", "tied"] {
        all.push((format!("golden {name}"), Tokenizer::load(golden.join(name)).unwrap()));
    }
    let lines_with = |added: &[&str]| {
        small(300).with_tokens(&added.iter().map(|t| t.to_string()).collect::<Vec<_>>()).unwrap()
    };
    all.push(("trained".into(), small(320)));
    all.push(("with tokens".into(), lines_with(&["<|x|>", "END", "é"])));
    let parts = [
        "नमस्ते",
        "दुनिया",
        "कि",
        "का",
        "हिन्दी",
        "สวัสดี",
        "ที่",
        "กำ",
        "น้ำ",
        "السَّلامُ",
        "عَلَيْكُمْ",
        "كتابٌ",
        "שָׁלוֹם",
        "தமிழ்",
        "বাংলা",
        "ো",
        "e\u{301}",
        "é",
        "ß",
        "ǆ",
        "ªº",
        "ⅷ",
        "ⓐ",
        "中文",
        "日本語",
        "한국어",
        "🦀",
        "\u{200d}",
        "\u{345}",
        "ͅ",
        "a",
        "Word",
        "don't",
        "it's",
        "'S",
        "'",
        "’s",
        "12",
        "٣٤",
        "१२",
        "½",
        "3.14",
        ".",
        "!?",
        "-",
        "_",
        "<|x|>",
        "END",
        "</s>",
        "<s>",
        " ",
        "  ",
        "\t",
        "\u{a0}",
        "\u{3000}",
    ];
    let breaks = [
        "\n", "\n", "\n\n", "\r\n", "\r\n\r\n", "\n \n", " \n", "\n  ", "\r", "\u{2028}", "\u{85}", "\n\t",
        "\t\r\n",
    ];
    let mut rng = crate::random::Rng::new(7, "pieces", 0);
    let mut pick = |from: &[&'static str]| from[rng.below(from.len() as u64) as usize];
    let mut text = || {
        let mut text = String::new();
        for _ in 0..400 {
            text += pick(&parts);
            if pick(&["a", "b", "c", "d"]) == "a" {
                text += pick(&breaks);
            }
        }
        text
    };
    let texts: Vec<String> = (0..30).map(|_| text()).collect();
    let mut cut = 0;
    for (name, t) in &all {
        for text in &texts {
            let whole = t.encode(text, false).unwrap();
            for size in [1, 16, 300] {
                let pieces = t.pieces(text, size);
                assert_eq!(pieces.concat(), *text);
                cut += pieces.len() - 1;
                let mut at = 0;
                for piece in &pieces {
                    let ids = t.encode(piece, false).unwrap();
                    assert!(whole[at..].starts_with(&ids), "{name}, pieces of {size}: {piece:?}");
                    at += ids.len();
                }
                assert_eq!(at, whole.len(), "{name}, pieces of {size}");
            }
        }
        if name.contains("qwen") || name.contains("llama3") || name == "trained" {
            assert!(t.pieces(&texts.concat(), 100).len() > 200, "{name} cuts nowhere");
        }
    }
    assert!(cut > 10_000, "{cut}");
}

/// Damaged files give an error or a tokenizer, never a panic.
#[test]
fn mutated_files_do_no_harm() {
    let json = small(270).files().find(|(name, _)| *name == "tokenizer.json").unwrap().1.to_vec();
    let config = br#"{"eos_token": {"content": "</s>"}, "added_tokens_decoder": {"1": {"content": "<s>"}},
        "chat_template": [{"name": "default", "template": "x"}], "add_bos_token": false, "legacy": false}"#;
    let sources = [
        ("tokenizer.model", std::fs::read(fixture("no_prefix.model")).unwrap()),
        ("tokenizer.model", std::fs::read(fixture("llama3.model")).unwrap()),
        ("tokenizer.json", json),
        ("tokenizer_config.json", config.to_vec()),
    ];
    std::thread::scope(|scope| {
        for (name, source) in sources {
            scope.spawn(move || mutate(name, &source, 10_000));
        }
    });
}

fn mutate(name: &str, source: &[u8], count: usize) {
    let folder = TestFolder::new(&format!("vocabulary-mutated-{name}-{}", source.len()));
    let mut rng = crate::random::Rng::new(1, name, source.len() as u64);
    if name == "tokenizer_config.json" {
        folder.file("tokenizer.model", std::fs::read(fixture("no_prefix.model")).unwrap());
    }
    let (mut good, mut bad) = (0, 0);
    for i in 0..count {
        let mut bytes = source.to_vec();
        for _ in 0..1 + rng.below(3) {
            let at = rng.below(bytes.len() as u64) as usize;
            let end = (at + 1 + rng.below(20) as usize).min(bytes.len());
            match rng.below(5) {
                0 => bytes[at] = rng.below(256) as u8,
                1 => bytes[at] ^= 1 << rng.below(8),
                2 if i % 4 == 0 => bytes.truncate(at + 1),
                3 => {
                    let copy = bytes[at..end].to_vec();
                    bytes.splice(at..at, copy);
                }
                _ => drop(bytes.drain(at..end)),
            }
            if bytes.is_empty() {
                bytes.push(0);
            }
        }
        folder.file(name, &bytes);
        match Tokenizer::load(&folder.0) {
            Ok(t) => {
                good += 1;
                let text = "Hello <s> 中\n";
                let _ = t.encode_segments(&[text, text]).map(|ids| t.decode(&ids.concat(), true));
            }
            Err(e) => {
                bad += 1;
                assert_eq!(e.exit_code(), 3, "{e}");
            }
        }
    }
    assert!(good > count / 100 && bad > count / 100, "{name}: {good} {bad}");
}
