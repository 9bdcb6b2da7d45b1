//! Tokenizers and chat templates against transformers' values (tests/golden, or CORRAL_GOLDEN).

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]

use corral::data::chat::{self, Chat};
use corral::data::conversation::Message;
use corral::data::tokenizer::Tokenizer;
use serde_json::{Value, json};
use testing::golden::{golden, json};

const KINDS: [&str; 4] = ["sp", "sp_meta", "llama3", "qwen2"];

fn load(kind: &str) -> (Value, Tokenizer) {
    let expected = json(&golden().join("tokenizer").join(format!("{kind}.json")));
    let tokenizer = golden().join(expected["tokenizer"].as_str().unwrap());
    (expected, Tokenizer::load(tokenizer.parent().unwrap()).unwrap())
}

#[test]
fn ids_and_texts_are_those_of_transformers() {
    for kind in KINDS {
        let (expected, t) = load(kind);
        assert_eq!(json!(t.vocab_size()), expected["vocab_size"]);
        for (key, id) in [("bos", t.bos_id()), ("eos", t.eos_ids().first().copied()), ("pad", t.pad_id())] {
            let named = t.special_tokens().iter().find(|(name, _)| *name == format!("{key}_token"));
            assert_eq!(json!(named.map(|(_, text)| text)), expected[key], "{kind}");
            assert!(named.is_none_or(|(_, text)| t.id_to_token(id.unwrap()).as_ref() == Some(text)));
        }
        let cases = expected["cases"].as_array().unwrap();
        assert!(cases.len() >= 40);
        for case in cases {
            let text = case["text"].as_str().unwrap();
            let (ids, bare) = (t.encode(text, true).unwrap(), t.encode(text, false).unwrap());
            assert_eq!(json!(ids), case["ids"], "{kind}: {text:?}");
            assert_eq!(json!(bare), case["ids_no_special"], "{kind}: {text:?}");
            assert_eq!(json!(t.decode(&bare, false).unwrap()), case["decoded"], "{kind}: {text:?}");
            assert_eq!(
                json!(t.decode(&ids, true).unwrap()),
                case["decoded_skip_special"],
                "{kind}: {text:?}"
            );
        }
    }
}

/// The chats with `chat`: the text, the ids and, where it is there, the mask of the assistant's tokens.
fn check_chats(expected: &Value, chat: &Chat) {
    let chats = expected["chats"].as_array().unwrap();
    assert!(!chats.is_empty());
    for case in chats {
        let messages = case["messages"].as_array().unwrap();
        let messages: Vec<Message> = messages.iter().map(|m| Message::read(m).unwrap()).collect();
        let prompt = case["add_generation_prompt"].as_bool().unwrap();
        assert_eq!(json!(chat.render(&messages, prompt).unwrap()), case["text"]);
        let encoded = chat.encode(&messages, prompt).unwrap();
        assert_eq!(json!(encoded.text), case["text"]);
        assert_eq!(json!(encoded.ids), case["ids"], "{}", case["text"]);
        if !case["assistant_mask"].is_null() {
            let mask: Vec<u8> = encoded.mask().into_iter().map(u8::from).collect();
            assert_eq!(json!(mask), case["assistant_mask"], "{}", case["text"]);
        }
        if prompt {
            assert_eq!(json!(chat.prompt(&messages).unwrap()), case["ids"]);
        }
    }
}

#[test]
fn chats_are_rendered_as_by_transformers() {
    for kind in KINDS {
        let (expected, t) = load(kind);
        assert_eq!(json!(t.chat_template().unwrap().source), expected["chat_template"]);
        check_chats(&expected, &Chat::new(&t).unwrap());
    }
}

#[test]
fn built_in_templates_are_those_of_the_models() {
    for kind in KINDS {
        let (expected, t) = load(kind);
        let name = expected["chat_template_name"].as_str().unwrap();
        check_chats(&expected, &Chat::new(&chat::with_chat_template(t, name).unwrap()).unwrap());
    }
}

/// The templates with `{% generation %}` that the masks were made with.
#[test]
fn marked_templates_give_the_same_masks() {
    let llama3 = "{% for message in messages %}{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}\
        {{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}\
        {% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}\
        {% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";
    let chatml = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}\
        {% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}\
        {% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}\
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
    for (kind, template) in [("llama3", llama3), ("qwen2", chatml)] {
        let (expected, t) = load(kind);
        assert!(!expected["chats"][0]["assistant_mask"].is_null());
        check_chats(&expected, &Chat::new(&chat::with_chat_template(t, template).unwrap()).unwrap());
    }
}
