use super::*;
use crate::data::readers::records;
use testing::folder::TestFolder;

fn record(line: &str) -> Record {
    static FILES: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    let number = FILES.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let folder = TestFolder::new(&format!("conversation-{number}"));
    let path = folder.0.join("data.jsonl");
    std::fs::write(&path, line).unwrap();
    records(&path, None, &std::sync::Arc::default()).unwrap().next().unwrap().unwrap()
}

fn read(line: &str) -> Result<Vec<Message>> {
    conversation(&record(line)).map(|conversation| conversation.messages)
}

fn pair(prompt: &str, completion: &str) -> Vec<Message> {
    chat(&[("user", prompt), ("assistant", completion)])
}

fn chat(turns: &[(&str, &str)]) -> Vec<Message> {
    turns.iter().map(|(role, text)| Message::new(*role, *text)).collect()
}

#[test]
fn every_format_is_known_by_its_keys() {
    let ab = chat(&[("user", "a"), ("assistant", "b")]);
    let cases = [
        (r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#, &ab),
        (r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#, &ab),
        (r#"{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}"#, &ab),
        (r#"{"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}"#, &ab),
        (r#"{"prompt": "a", "completion": "b"}"#, &pair("a", "b")),
        (r#"{"prompt": "a", "completions": ["b", "c"], "num_correct": 1}"#, &pair("a", "b")),
        (r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#, &pair("a", "b")),
        (r#"{"question": "a", "answer": "b"}"#, &pair("a", "b")),
        (r#"{"instruction": "a", "input": "", "output": "b"}"#, &pair("a", "b")),
        (r#"{"instruction": "a", "input": "x", "output": "b"}"#, &pair("a\n\nx", "b")),
    ];
    for (line, wanted) in cases {
        assert_eq!(&read(&line.replace('\n', " ")).unwrap(), wanted, "{line}");
    }
    let parts = r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": null},
                    {"type": "text", "text": "b"}]}]}"#;
    let parts = read(&parts.replace('\n', " ")).unwrap();
    assert_eq!(parts[0].text(), "ab");
    let content = serde_json::json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    assert_eq!(parts[0].content, Some(content));
}

#[test]
fn a_dialogue_of_many_turns() {
    let text = r#"{"chosen": "\n\nHuman: a\nb\n\nc\n\nAssistant: d\n\nHuman: e\n\nAssistant:"}"#;
    let turns = chat(&[("user", "a\nb\n\nc"), ("assistant", "d"), ("user", "e"), ("assistant", "")]);
    assert_eq!(read(text).unwrap(), turns);
}

#[test]
fn a_prompt_is_a_record_without_its_answer() {
    let text = |t: &str| PromptForm::Text(t.into());
    let user = PromptForm::Messages(chat(&[("user", "a")]).into());
    let cases = [
        (r#"{"prompt": "a", "completion": "b"}"#, text("a")),
        (r#"{"question": "a", "answer": "b"}"#, text("a")),
        (r#"{"prompt": [{"role": "user", "content": "a"}]}"#, user.clone()),
        (r#"{"messages": [{"role": "user", "content": "a"}]}"#, user.clone()),
        (r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#, user),
    ];
    for (line, wanted) in cases {
        assert_eq!(PromptForm::read(&record(line)).unwrap(), wanted, "{line}");
    }
    for (line, wanted) in [
        (r#"{"messages": [{"role": "assistant", "content": "a"}]}"#, "nothing before the answer"),
        (r#"{"prompt": 3}"#, "`prompt` is a number"),
        (r#"{"x": 3}"#, "no known format"),
    ] {
        let e = PromptForm::read(&record(line)).unwrap_err();
        assert!(e.message.contains(wanted) && e.message.contains("data.jsonl:1"), "{line}: {e}");
    }
}

/// One answer at the end is left out, of a dialogue in a text, too; an earlier turn of the assistant stays.
#[test]
fn one_answer_is_left_out() {
    let list = r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
                   {"role": "assistant", "content": "c"}]}"#;
    let cases = [
        (list.replace('\n', " "), chat(&[("user", "a"), ("assistant", "b")])),
        (r#"{"prompt": "\n\nHuman: a\n\nAssistant: b"}"#.to_string(), chat(&[("user", "a")])),
        (r#"{"prompt": "\n\nHuman: a\n\nAssistant:"}"#.to_string(), chat(&[("user", "a")])),
    ];
    for (line, wanted) in cases {
        assert_eq!(PromptForm::read(&record(&line)).unwrap().without_answer().messages, wanted, "{line}");
    }
}

#[test]
fn what_cannot_be_read_is_told_with_its_place() {
    let cases = [
        (r#"{"a": 1}"#, "data.jsonl:1: no known format"),
        (r#"{"messages": []}"#, "`messages` is empty"),
        (r#"{"messages": "x"}"#, "no list of messages"),
        (r#"{"messages": [{"content": "x"}]}"#, "no `role`"),
        (r#"{"messages": [{"role": "user"}]}"#, "no text `content`"),
        (r#"{"messages": [{"role": "user", "content": [{"type": "image"}]}]}"#, "not text"),
        (r#"{"prompt": "a", "completion": 3}"#, "neither a text nor a list"),
        (r#"{"prompt": "a", "completions": []}"#, "no list with a completion"),
        (r#"{"question": "a", "answer": 3}"#, "`answer` is a number"),
        (r#"{"chosen": "Human: a"}"#, "must begin with a turn"),
        (r#"{"instruction": "a"}"#, "no key `output`"),
    ];
    for (line, wanted) in cases {
        let e = read(line).unwrap_err();
        assert!(e.message.contains(wanted) && e.message.contains("data.jsonl:1"), "{line}: {e}");
        assert_eq!(e.exit_code(), 3);
    }
}
