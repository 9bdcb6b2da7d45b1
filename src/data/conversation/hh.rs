//! Dialogues of Anthropic's HH data: one text, whose turns begin with `\n\nHuman:` and `\n\nAssistant:`.

use super::Message;

/// How a dialogue begins.
pub const HUMAN: &str = "\n\nHuman:";

const TURNS: [(&str, &str); 2] = [(HUMAN, "user"), ("\n\nAssistant:", "assistant")];

/// The turns of a dialogue; none where the text is no dialogue.
pub fn dialogue(text: &str) -> Option<Vec<Message>> {
    let next = |text: &str| TURNS.iter().filter_map(|turn| Some((text.find(turn.0)?, *turn))).min();
    if !TURNS.iter().any(|(mark, _)| text.starts_with(mark)) {
        return None;
    }
    let (mut messages, mut rest) = (Vec::new(), text);
    while let Some((_, (mark, role))) = next(rest) {
        let after = &rest[mark.len()..];
        let end = next(after).map_or(after.len(), |(at, _)| at);
        messages.push(Message::new(role, after[..end].trim()));
        rest = &after[end..];
    }
    Some(messages)
}

/// The turns of a prompt that is a text: those of a dialogue that begins with the user, which may end with the beginning of
/// the answer, or else one turn of the user.
pub fn prompt_turns(text: &str) -> Vec<Message> {
    let mut turns = match text.starts_with(HUMAN) {
        true => dialogue(text).unwrap_or_default(),
        false => vec![Message::new("user", text)],
    };
    // The prompts of the data end with `\n\nAssistant:`.
    turns.pop_if(|m| m.role == "assistant" && m.text().is_empty());
    turns
}
