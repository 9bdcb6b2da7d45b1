use super::*;
use crate::data::tokenizer::tests::{load_fixture, small};
use serde_json::{Map, Value, json};
use testing::folder::TestFolder;

fn chat(turns: &[(&str, &str)]) -> Vec<Message> {
    turns.iter().map(|(role, text)| Message::new(*role, *text)).collect()
}

fn template(source: &str) -> ChatTemplate {
    ChatTemplate { source: source.into(), place: "here".into() }
}

/// What a template is given: messages alone.
fn given(messages: &Value) -> Map<String, Value> {
    Map::from_iter([
        ("messages".into(), messages.clone()),
        ("tools".into(), Value::Null),
        ("documents".into(), Value::Null),
    ])
}

fn says(text: &str) -> Map<String, Value> {
    given(&json!([{"role": "user", "content": text}]))
}

/// The small trained tokenizer with further special tokens and a template.
fn with(section: sections::TokenizerSection) -> Result<Tokenizer> {
    let folder = TestFolder::new(&format!("chat-with-{:?}", std::thread::current().id()));
    small(300).save(&folder.0)?;
    configured(Some(&section), Some(&folder.0))
}

#[test]
fn templates_are_rendered_as_by_transformers() {
    let path = testing::golden::fixture("chats.json");
    let fixture: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let tokens = || vec![("bos_token", "<s>".to_string()), ("eos_token", "</s>".to_string())];
    let cases = fixture["cases"].as_array().unwrap();
    assert!(cases.len() > 100);
    for case in cases {
        let index = |i: usize| case[i].as_u64().unwrap() as usize;
        let source = fixture["templates"][index(0)].as_str().unwrap();
        let messages = &fixture["chats"][index(1)];
        let jinja = Jinja::new(&template(source), tokens(), Default::default()).unwrap();
        let rendered = jinja.render(given(messages), case[2].as_bool().unwrap());
        match case[3].as_str() {
            None => assert!(rendered.is_err(), "{source}\n{messages:?}"),
            Some(text) => {
                let rendered = rendered.unwrap_or_else(|e| panic!("{e}\n{source}\n{messages:?}"));
                assert_eq!(rendered.text, text, "{source}\n{messages:?}");
                let marked = rendered.marked.iter().map(|range| {
                    let chars = |end: usize| rendered.text[..end].chars().count();
                    serde_json::json!([chars(range.start), chars(range.end)])
                });
                assert_eq!(Value::Array(marked.collect()), case[4], "{source}\n{messages:?}");
            }
        }
    }
}

#[test]
fn errors_of_templates_are_told_with_their_line() {
    let jinja = |source: &str| Jinja::new(&template(source), Vec::new(), Default::default());
    for (source, part) in
        [("a\nb {% if %}", "expected an expression"), ("\n{% include 'other' %}", "'include'")]
    {
        let e = jinja(source).err().unwrap();
        assert!(e.message.starts_with("here, line 2: syntax error: ") && e.message.contains(part), "{e}");
    }
    let fails = |source: &str| jinja(source).unwrap().render(says("x"), true).err().unwrap();
    let e = fails("\n\n{{ raise_exception('never ' + messages[0].content) }}");
    assert_eq!((e.message.as_str(), e.exit_code()), ("here, line 3: never x", 3));
    for (source, part) in [
        ("{{ messages[0].a.b }}", "here, line 1: 'dict object' has no attribute 'a'"),
        ("\n{{ none + 'a' }}", "here, line 2: "),
        ("{{ messages | nothing }}", "unknown filter 'nothing'"),
        ("{{ nothing() }}", "here, line 1: 'nothing' is undefined"),
        ("{{ 'a'.nothing() }}", "'str object' has no attribute 'nothing'"),
        ("{{ strftime_now('%!') }}", "bad format"),
    ] {
        let e = fails(source);
        assert!(e.message.contains(part), "{source}: {e}");
    }
    assert_eq!(
        jinja("{{ strftime_now('%Y') }}").unwrap().render(given(&json!([])), false).unwrap().text.len(),
        4
    );
    let marked = jinja("{% generation %}{{ messages[0].content }}{% endgeneration %}").unwrap();
    assert!(marked.render(says("\u{fdd0}"), false).is_err());
}

#[test]
fn a_model_without_a_template_is_refused_with_the_list() {
    let e = Chat::new(&small(300)).err().unwrap();
    assert!(e.message.contains("llama-2, llama-3, chatml, mistral, human-assistant"), "{e}");
    assert_eq!(e.exit_code(), 2);
    for (what, part) in [
        ("chatml", "needs <|im_start|>, <|im_end|>"),
        ("vicuna", "`vicuna` is not a built-in template (llama-2"),
    ] {
        let e = with_chat_template(small(300), what).err().unwrap();
        assert!(e.message.contains(part) && e.exit_code() == 2, "{e}");
    }
}

/// Up to every turn of the assistant, the ids are those of the prompt that asks for it.
fn check_turns(chat: &Chat, messages: &[Message]) -> Encoding {
    let whole = chat.encode(messages, false).unwrap();
    let answers: Vec<usize> =
        messages.iter().enumerate().filter(|(_, m)| m.role == "assistant").map(|(i, _)| i).collect();
    assert_eq!(whole.turns.len(), answers.len());
    for (turn, i) in whole.turns.iter().zip(answers) {
        let prompt = chat.prompt(&messages[..i]).unwrap();
        assert_eq!(prompt, whole.ids[..turn.start], "{:?}", whole.text);
    }
    let bos = chat.tokenizer().bos_id();
    assert!(whole.ids.len() < 2 || whole.ids[0] != whole.ids[1] || Some(whole.ids[0]) != bos);
    whole
}

fn conversations() -> Vec<Vec<Message>> {
    let texts = ["Hi", "", " x ", "\nlines\n\n", "12", "中 🦀", "'s", "a  b", "<s>", "a</s>b", "_▁"];
    let mut all = Vec::new();
    for (i, a) in texts.iter().enumerate() {
        for b in texts {
            let c = texts[(i + 3) % texts.len()];
            all.push(chat(&[("user", a), ("assistant", b), ("user", c), ("assistant", a)]));
        }
    }
    all
}

#[test]
fn no_token_joins_question_and_answer() {
    let plain = sections::TokenizerSection {
        template: Some("Q: {prompt}\nA: {completion}\n".into()),
        ..Default::default()
    };
    for name in ["llama", "no_prefix", "symbols", "llama3", "qwen"] {
        let (folder, tokenizer) = load_fixture(name);
        let chatml = with_chat_template(
            tokenizer.clone().with_tokens(&["<|im_start|>".into(), "<|im_end|>".into()]).unwrap(),
            "chatml",
        );
        let human = with_chat_template(tokenizer.clone(), "human-assistant");
        let bare = "{% for m in messages %}{{ m.role[0] + ':' + m.content }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}";
        let bare = with_chat_template(tokenizer.clone(), bare);
        for tokenizer in [chatml.unwrap(), human.unwrap(), bare.unwrap()] {
            let chat = Chat::new(&tokenizer).unwrap();
            for messages in conversations() {
                check_turns(&chat, &messages);
            }
        }
        let chat = Chat::new(&configured(Some(&plain), Some(&folder.0)).unwrap()).unwrap();
        for messages in conversations() {
            check_turns(&chat, &messages[..2]);
        }
        if tokenizer.bos_id().is_some() {
            let llama2 = with_chat_template(tokenizer.clone(), "llama-2").unwrap();
            let mistral = with_chat_template(tokenizer, "mistral").unwrap();
            for tokenizer in [llama2, mistral] {
                let chat = Chat::new(&tokenizer).unwrap();
                for messages in conversations() {
                    assert_eq!(check_turns(&chat, &messages).ids.first().copied(), tokenizer.bos_id());
                }
            }
        }
    }
}

/// A segment inside a text is encoded as SentencePiece encodes the rest of that text.
#[test]
fn segments_go_on_where_the_text_before_ends() {
    let (_folder, t) = load_fixture("llama");
    let ids = |segments: &[&str]| t.encode_segments(segments).unwrap();
    let whole = |text: &str| t.encode(text, false).unwrap();
    assert_eq!(ids(&["Hello", " world"]).concat(), whole("Hello world"));
    assert_eq!(ids(&["", "Hello"]), [vec![], whole("Hello")]);
    // `▁` comes before a text, and after a special token, and nowhere else.
    let space = t.token_to_id("▁").unwrap();
    assert_eq!(ids(&["a", "(b"])[1], whole("a(b")[whole("a").len()..]);
    assert_eq!(whole("(")[0], space);
    assert_ne!(ids(&["a", "("])[1][0], space);
    for segments in [["a</s>", "(b"], ["a", "</s>(b"], ["a</s>(", "b"]] {
        let text = segments.concat();
        assert_eq!(
            t.decode(&ids(&segments).concat(), false).unwrap(),
            t.decode(&whole(&text), false).unwrap()
        );
    }
    assert_eq!(ids(&["a</s>", "(b"]).concat(), whole("a</s>(b"));
    assert_eq!(ids(&["a", "b</s>(c"])[1], [ids(&["a", "b"])[1].clone(), whole("</s>(c")].concat());
}

#[test]
fn bos_is_never_there_twice() {
    let bos_twice = "{{ bos_token }}{{ bos_token }}{{ messages[0].content }}";
    let t = with_chat_template(small(300), bos_twice).unwrap();
    let prompt = Chat::new(&t).unwrap().prompt_text("<s>abc").unwrap();
    assert_eq!(prompt[..2], [0, t.encode("a", false).unwrap()[0]]);
    assert_eq!(t.encode_prompt("<s>abc").unwrap(), prompt);
    assert_eq!(t.encode_prompt("abc").unwrap(), prompt);
}

#[test]
fn plain_templates() {
    let section =
        |template: &str| sections::TokenizerSection { template: Some(template.into()), ..Default::default() };
    let t = with(section("Question: {prompt}\n\n\"{{A}}\"\\: {completion} .")).unwrap();
    let chat_ = Chat::new(&t).unwrap();
    let pair = chat(&[("user", "1 + 1?"), ("assistant", " 2")]);
    let encoded = chat_.encode(&pair, false).unwrap();
    assert_eq!(encoded.text, "<s>Question: 1 + 1?\n\n\"{A}\"\\:  2 .</s>");
    let turn = encoded.turns[0].clone();
    assert_eq!(t.decode(&encoded.ids[turn.clone()], false).unwrap(), " 2 .</s>");
    assert_eq!(turn.end, encoded.ids.len());
    assert_eq!(encoded.mask().iter().filter(|m| **m).count(), turn.len());
    assert_eq!(chat_.prompt_text("1 + 1?").unwrap(), encoded.ids[..turn.start]);
    assert_eq!((chat_.end_of_turn(), chat_.stop_ids()), (Some(1), vec![1]));
    let e = chat_.render(&chat(&[("system", "x"), ("user", "y")]), true).unwrap_err();
    assert!(
        e.message.contains("places for a prompt and its completion only; the roles here are system, user"),
        "{e}"
    );

    for (text, part) in [
        ("{prompt}", "once each"),
        ("{completion}{prompt}", "once each"),
        ("{prompt}{prompt}{completion}", "once each"),
        ("{prompt}{answer}", "`{answer}` is not known"),
        ("{prompt}{completion", "a single brace"),
        ("}{prompt}{completion}", "a single brace"),
    ] {
        let e = with(section(text)).err().unwrap();
        assert!(e.message.contains(part) && e.exit_code() == 2, "{text}: {e}");
    }
}

#[test]
fn a_configured_tokenizer_is_saved_with_its_tokens_and_template() {
    let section = sections::TokenizerSection {
        chat_template: Some("chatml".into()),
        add_tokens: vec!["<|im_start|>".into(), "<|im_end|>".into(), "</s>".into()],
        ..Default::default()
    };
    let t = with(section.clone()).unwrap();
    assert_eq!((t.vocab_size(), t.eos_ids()), (302, &[1, 301][..]));
    assert_ne!(t.hash(), t.base_hash());
    assert_eq!(t.base_hash(), small(300).hash());
    let (rows, padded) = (
        |n| t.rows(n, Some(&section)).unwrap(),
        sections::TokenizerSection { pad_to_multiple_of: Some(64), ..section.clone() },
    );
    assert_eq!((rows(300), rows(302), rows(310)), (302, 302, 310));
    assert_eq!(t.rows(300, Some(&padded)).unwrap(), 320);
    assert!(
        t.rows(299, Some(&section))
            .unwrap_err()
            .message
            .contains("302 tokens, more than the model's vocab_size of 299")
    );
    assert!(t.rows(300, None).is_err() && t.rows(300, Some(&Default::default())).is_err());

    let folder = TestFolder::new("chat-configured");
    t.save(&folder.0).unwrap();
    let again = Tokenizer::load(&folder.0).unwrap();
    assert_eq!((again.hash(), again.eos_ids()), (t.hash(), t.eos_ids()));
    let messages = chat(&[("user", "Hi"), ("assistant", "Ho")]);
    let (a, b) = (Chat::new(&t).unwrap(), Chat::new(&again).unwrap());
    assert_eq!(a.encode(&messages, false).unwrap(), b.encode(&messages, false).unwrap());
    assert_eq!(
        a.render(&messages, true).unwrap(),
        "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!((a.end_of_turn(), a.stop_ids()), (Some(301), vec![1, 301]));
    // With the tokens already there nothing changes.
    assert_eq!(configured(Some(&section), Some(&folder.0)).unwrap().hash(), t.hash());
}

#[test]
fn turns_are_those_of_the_assistant() {
    let t = with(sections::TokenizerSection {
        chat_template: Some("chatml".into()),
        add_tokens: vec!["<|im_start|>".into(), "<|im_end|>".into()],
        ..Default::default()
    });
    let chat_ = Chat::new(&t.unwrap()).unwrap();
    let turns = |chat_: &Chat, messages: &[Message]| -> Vec<String> {
        let encoded = chat_.encode(messages, false).unwrap();
        encoded
            .turns
            .iter()
            .map(|r| chat_.tokenizer().decode(&encoded.ids[r.clone()], false).unwrap())
            .collect()
    };
    let messages = chat(&[("user", "a"), ("assistant", "b\n"), ("user", "c"), ("assistant", "")]);
    assert_eq!(turns(&chat_, &messages), ["b\n<|im_end|>", "<|im_end|>"]);
    assert_eq!(turns(&chat_, &messages[..1]), Vec::<String>::new());

    let human = Chat::new(&with_chat_template(small(300), "human-assistant").unwrap()).unwrap();
    assert_eq!(turns(&human, &messages), [" b\n</s>", " </s>"]);
    // An answer that was cut: what the template writes before it stays, what it writes after it goes.
    let unfinished = |answer: &str| {
        let encoded = human.encode_unfinished(&chat(&[("user", "b"), ("assistant", answer)])).unwrap();
        let turn = &encoded.ids[encoded.turns[0].clone()];
        assert_eq!(encoded.turns[0].end, encoded.ids.len());
        human.tokenizer().decode(turn, false).unwrap()
    };
    assert_eq!([unfinished("b\n"), unfinished("")], [" b\n", " </s>"]);
    // Without a token at the end, a turn ends where its text does.
    let bare = "{% for m in messages %}{{ m.role + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}";
    let bare = Chat::new(&with_chat_template(small(300), bare).unwrap()).unwrap();
    assert_eq!(turns(&bare, &messages), ["b\n\n", "\n"]);
    assert_eq!(bare.end_of_turn(), None);

    // What was said earlier is rendered otherwise: it cannot be trained with, and asked it can be.
    let last_only = "{% for m in messages %}{{ m.role + (m.content if loop.last else '') }}{% endfor %}";
    let last_only = Chat::new(&with_chat_template(small(300), last_only).unwrap()).unwrap();
    let e = last_only.encode(&messages, false).unwrap_err();
    assert!(
        e.message.contains("in message 2 cannot be told") && e.message.contains("{% generation %}"),
        "{e}"
    );
    assert!(!last_only.prompt(&messages).unwrap().is_empty());
}

/// Right values: transformers 5.24, `apply_chat_template(..., continue_final_message=True)`.
#[test]
fn a_last_turn_of_the_assistant_is_continued_as_by_transformers() {
    let trims = "{% for m in messages %}[{{ m.role }}]\n{{ m.content | trim }}|{% endfor %}{% if add_generation_prompt \
                 %}[assistant]\n{% endif %}";
    let human = "\n\nHuman: Q\n\nAssistant:";
    for (template, said, wanted) in [
        (trims, "The sea", "[user]\nQ|[assistant]\nThe sea".to_string()),
        (trims, "The sea ", "[user]\nQ|[assistant]\nThe sea".into()),
        (trims, " The", "[user]\nQ|[assistant]\nThe".into()),
        (trims, "", "[user]\nQ|[assistant]".into()),
        ("human-assistant", "The sea", format!("<s>{human} The sea")),
        ("human-assistant", "The sea ", format!("<s>{human} The sea ")),
        ("human-assistant", " The", format!("<s>{human}  The")),
        ("human-assistant", "", format!("<s>{human} ")),
        ("llama-2", "The sea ", "<s>[INST] Q [/INST] The sea ".into()),
        ("llama-2", " The", "<s>[INST] Q [/INST] The".into()),
    ] {
        let chat_ = Chat::new(&with_chat_template(small(300), template).unwrap()).unwrap();
        let messages = chat(&[("user", "Q"), ("assistant", said)]);
        let ids = chat_.prompt_or_prefill(&messages).unwrap();
        assert_eq!(chat_.tokenizer().decode(&ids, false).unwrap(), wanted, "{template} {said:?}");
    }
    let loses = "{% for m in messages %}{% if m.role == 'user' %}U{{ m.content }}{% endif %}{% endfor %}A";
    let loses = Chat::new(&with_chat_template(small(300), loses).unwrap()).unwrap();
    let e = loses.prompt_or_prefill(&chat(&[("user", "Q"), ("assistant", "The")])).unwrap_err();
    assert!(e.message.contains("cannot be continued") && e.exit_code() == 3, "{e}");
    assert!(loses.prompt_or_prefill(&chat(&[("user", "Q")])).is_ok());
}

/// What follows a prefill is supervised from its first character on, and its tokens do not reach back.
#[test]
fn an_answer_goes_on_where_its_prefill_ends() {
    let chat_ = Chat::new(&with_chat_template(small(300), "human-assistant").unwrap()).unwrap();
    let prompt = chat(&[("user", "Q"), ("assistant", "x"), ("user", "R"), ("assistant", "One, ")]);
    let encoding =
        chat_.answer(&prompt, &chat(&[("assistant", "two"), ("user", "S"), ("assistant", "y")])).unwrap();
    let decode =
        |range: &Range<usize>| chat_.tokenizer().decode(&encoding.ids[range.clone()], false).unwrap();
    assert_eq!(encoding.turns.iter().map(decode).collect::<Vec<_>>(), ["two</s>", " y</s>"]);
    assert_eq!(encoding.ids[..encoding.turns[0].start], chat_.prompt_or_prefill(&prompt).unwrap());
    // A turn of the assistant that something else follows is whole.
    let encoding = chat_.answer(&prompt[..2], &chat(&[("user", "R"), ("assistant", "two")])).unwrap();
    assert_eq!(encoding.turns.len(), 1);
}

#[test]
fn templates_are_told_the_date() {
    let source = "{{ strftime_now('%Y-%m-%d') }}|{{ date_string|default('none') }}|{{ messages[0].content }}";
    let t = with_chat_template(small(300), source).unwrap();
    let date = |text: &str| text.parse::<crate::config::template_date::TemplateDate>().unwrap();
    let rendered = |t: &Tokenizer| Chat::new(t).unwrap().render(&chat(&[("user", "x")]), false).unwrap();
    let given = t.clone().with_template_date(date("2024-07-06"));
    assert_eq!(rendered(&given), "2024-07-06|06 Jul 2024|x");
    let today = chrono::Local::now().date_naive();
    assert_eq!(rendered(&t), format!("{today}|none|x"));
    // Fingerprints are of what comes out.
    let other = t.clone().with_template_date(date("2024-07-07"));
    let prints = [&t, &given, &other].map(|t| t.text_fingerprint());
    assert!(prints[0] != prints[1] && prints[1] != prints[2]);
    assert_eq!(given.told_date().unwrap().to_string(), "2024-07-06");
    let without = with_chat_template(small(300), "human-assistant").unwrap();
    assert_eq!(without.told_date(), None);
    let dated = without.clone().with_template_date(date("2024-07-06"));
    assert_eq!(without.text_fingerprint(), dated.text_fingerprint());
    // A template that reads date_string alone is told it only where the user gave one.
    let string_only = with_chat_template(small(300), "{{ date_string|default('26 Jul 2024') }}").unwrap();
    assert_eq!((string_only.told_date(), rendered(&string_only)), (None, "26 Jul 2024".into()));
    assert_eq!(rendered(&string_only.with_template_date(date("2025-01-31"))), "31 Jan 2025");
    for bad in ["2024-7-6", "06.07.2024", "2024-02-30", ""] {
        assert!(bad.parse::<crate::config::template_date::TemplateDate>().is_err(), "{bad}");
    }
}
