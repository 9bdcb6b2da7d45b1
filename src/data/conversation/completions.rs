//! The common part of a prompt and its completions, and what each says after it.

use serde_json::Value;

use super::{Message, turns};
use crate::data::fields::Fields;
use crate::data::message::shown;
use crate::error::Result;

/// A prompt and completions of it, of which each may repeat the prompt, whole or its last turn, or begin with a system turn
/// that the prompt lacks: the common part, once, and what follows it. A completion begins with a turn of the assistant.
///
/// # Errors
/// With both: prompts that differ.
pub(in crate::data) fn split(
    fields: &Fields,
    prompt: Vec<Message>,
    completions: &[(&'static str, &Value)],
) -> Result<(Vec<Message>, Vec<Vec<Message>>)> {
    let mut prompts: Vec<Vec<Message>> = Vec::new();
    let mut answers = Vec::new();
    for (key, value) in completions {
        let said = turns(value, "assistant", fields, key)?;
        if !said.iter().any(|m| m.role == "assistant") {
            return Err(fields.bad(format!("`{key}`: a completion has no assistant turn")));
        }
        let (own, answer) = divided(&prompt, said).map_err(|theirs| {
            let shown = |turns: &[Message]| {
                let turns: Vec<String> = turns.iter().map(|m| format!("{}: {}", m.role, m.text())).collect();
                shown(&turns.join("; ").into())
            };
            let (ours, theirs) = (shown(&prompt), shown(&theirs));
            fields.bad(format!("the prompts differ: {ours} in the record, {theirs} in `{key}`"))
        })?;
        prompts.push(own);
        answers.push(answer);
    }
    let longest = prompts.iter().max_by_key(|p| p.len()).cloned().unwrap_or_default();
    for (own, answer) in prompts.iter().zip(&mut answers) {
        // What follows the prompt in all of them is told by the longest one; the others must say the same.
        if own.len() != longest.len() || !own.iter().zip(&longest).all(|(a, b)| a.says_the_same_as(b)) {
            let whole: Vec<Message> = own.iter().chain(answer.iter()).cloned().collect();
            let (_, rest) = divided(&longest, whole)
                .ok()
                .filter(|(own, _)| own.len() == longest.len())
                .ok_or_else(|| fields.bad("the prompts of the completions differ"))?;
            *answer = rest;
        }
    }
    common(fields, longest, answers)
}

/// Takes what all answers begin with into the prompt; at least one turn of each stays.
pub(in crate::data) fn common(
    fields: &Fields,
    mut prompt: Vec<Message>,
    mut answers: Vec<Vec<Message>>,
) -> Result<(Vec<Message>, Vec<Vec<Message>>)> {
    if answers.len() > 1 {
        let most = answers.iter().map(Vec::len).min().unwrap_or(1).saturating_sub(1);
        let same = |i: &usize| answers.iter().all(|a| a[*i].says_the_same_as(&answers[0][*i]));
        let n = (0..most).take_while(same).count();
        let mut shared = Vec::new();
        for answer in &mut answers {
            shared = answer.drain(..n).collect();
        }
        prompt.extend(shared);
    }
    for answer in &mut answers {
        // A tool's result may come first where the answers have it in common; a user's turn is a prompt that differs.
        if let Some(first) = answer.first().filter(|m| m.role != "assistant") {
            let (role, text) = (&first.role, shown(&first.text().into()));
            return Err(fields.bad(format!(
                "the prompts differ: a completion begins with a turn of role `{role}`, {text}, which not all completions share"
            )));
        }
    }
    Ok((prompt, answers))
}

/// Divides what is said into its prompt, which has to be `prompt`, and the answer.
///
/// # Errors
/// What is said before the answer, where that is another prompt.
fn divided(prompt: &[Message], said: Vec<Message>) -> Result<(Vec<Message>, Vec<Message>), Vec<Message>> {
    let bare = |turns: &[Message]| usize::from(turns.first().is_some_and(|m| m.role == "system"));
    let same = |a: &[Message], b: &[Message]| {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.says_the_same_as(b))
    };
    let (ours, theirs) = (&prompt[bare(prompt)..], &said[bare(&said)..]);
    let systems =
        (bare(prompt) > 0).then(|| &prompt[0]).into_iter().chain((bare(&said) > 0).then(|| &said[0]));
    let systems: Vec<&Message> = systems.collect();
    let system = systems.first().map(|m| (*m).clone());
    let agree = systems.iter().all(|m| m.says_the_same_as(systems[0]));
    let whole = |n: usize| {
        (system.iter().cloned().chain(theirs[..n].iter().cloned()).collect(), theirs[n..].to_vec())
    };
    let n = ours.len();
    if agree && n > 0 && theirs.len() > n && same(&theirs[..n], ours) {
        return Ok(whole(n));
    }
    let first = theirs.first().map(|m| m.role.as_str());
    if systems.len() == bare(prompt) && matches!(first, Some("assistant" | "tool" | "ipython" | "function")) {
        return Ok((prompt.to_vec(), said));
    }
    // The prompt may be the last turn before the answer.
    let last = theirs.iter().rposition(|m| m.role == "assistant").unwrap_or(0);
    let answers = |n: &usize| theirs[*n].role == "assistant";
    let ends = (n.max(1)..=last).rev().filter(answers).find(|end| same(&theirs[end - n..*end], ours));
    match ends.filter(|_| agree && n > 0) {
        Some(end) => Ok(whole(end)),
        None => {
            let first = said.iter().position(|m| m.role == "assistant").unwrap_or(said.len());
            Err(said[..first].to_vec())
        }
    }
}
