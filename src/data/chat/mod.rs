//! Conversations as the model reads them: rendered by its chat template, in tokens, with the assistant's turns known.
//!
//! A prompt and its completion are a conversation of two messages, so that all go one way.

mod dialogue;
mod jinja;
mod prefill;
mod templates;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::path::Path;

use super::conversation::{Conversation, Message};
use super::fields::Leftovers;
use super::tokenizer::{ChatTemplate, Tokenizer};
use crate::config::sections;
use crate::error::{Error, Result};
pub use dialogue::Dialogue;
use dialogue::Reads;
use jinja::{Jinja, Rendered};
pub use templates::names as built_in_names;

/// A tokenizer and the chat template that goes with it.
pub struct Chat {
    tokenizer: Tokenizer,
    template: Jinja,
    reads: Reads,
    end_of_turn: Option<u32>,
}

/// A conversation in tokens.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Encoding {
    /// The rendered template.
    pub text: String,
    /// The text's token ids.
    pub ids: Vec<u32>,
    /// The places in `ids` of the assistant's turns, each with the token that ends it; empty where it says nothing.
    pub turns: Vec<Range<usize>>,
    /// The numbers of the turns that the loss does not count; see [`Message::supervised`].
    pub uncounted: Vec<usize>,
}

impl Encoding {
    /// Whether each token belongs to a turn of the assistant that the loss counts.
    pub fn mask(&self) -> Vec<bool> {
        self.mask_from(0)
    }

    /// The same without the first `turns` turns.
    pub fn mask_from(&self, turns: usize) -> Vec<bool> {
        let mut mask = vec![false; self.ids.len()];
        for (i, turn) in self.turns.iter().enumerate().skip(turns) {
            mask[turn.clone()].fill(!self.uncounted.contains(&i));
        }
        mask
    }

    /// Without the first `n` turns.
    fn after_turns(mut self, n: usize) -> Encoding {
        self.turns.drain(..n.min(self.turns.len()));
        self.uncounted = self.uncounted.iter().filter_map(|i| i.checked_sub(n)).collect();
        self
    }

    /// Whether each token is counted where all are but for the turns that are not to be.
    pub fn mask_of_all(&self) -> Vec<bool> {
        let mut mask = vec![true; self.ids.len()];
        for i in &self.uncounted {
            mask[self.turns[*i].clone()].fill(false);
        }
        mask
    }
}

impl Chat {
    /// The tokenizer's own chat template; see [`configured`] for another one.
    ///
    /// # Errors
    /// The tokenizer has no template (none is ever guessed); the template is no Jinja, with its place and line.
    pub fn new(tokenizer: &Tokenizer) -> Result<Chat> {
        let Some(template) = tokenizer.chat_template() else {
            return Err(Error::config(format!(
                "{}: the model has no chat template; choose one: {}, or a file with one (tokenizer.chat_template), or \
                 a plain one (tokenizer.template)",
                tokenizer.place(),
                templates::names()
            )));
        };
        Chat::with(tokenizer, template)
    }

    fn with(tokenizer: &Tokenizer, template: &ChatTemplate) -> Result<Chat> {
        let source = &template.source;
        let template = Jinja::new(template, tokenizer.special_tokens().to_vec(), tokenizer.template_date())?;
        let reads = Reads::of(source, &template);
        let mut chat = Chat { tokenizer: tokenizer.clone(), template, reads, end_of_turn: None };
        // What a template makes of these two tells how it ends a turn; not every one takes them.
        let probe = [Message::new("user", "a"), Message::new("assistant", "b")];
        if let Ok(encoded) = chat.encode(&probe, false) {
            let last = encoded.turns.last().and_then(|turn| encoded.ids[turn.clone()].last());
            chat.end_of_turn = last.copied().filter(|id| chat.tokenizer.is_added(*id));
        }
        Ok(chat)
    }

    /// The tokenizer that `encode` goes through.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The token that ends the assistant's turns in this template, where it is one of its own.
    pub fn end_of_turn(&self) -> Option<u32> {
        self.end_of_turn
    }

    /// Tokens that end an answer: the tokenizer's ends of a text, and the end of a turn.
    pub fn stop_ids(&self) -> Vec<u32> {
        let mut ids = self.tokenizer.eos_ids().to_vec();
        ids.extend(self.end_of_turn.filter(|id| !ids.contains(id)));
        ids
    }

    /// The text that the template makes of the messages. `add_generation_prompt`: with the beginning of the
    /// assistant's answer to them.
    pub fn render<'a>(
        &self,
        dialogue: impl Into<Dialogue<'a>>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        Ok(self.rendered(dialogue.into(), add_generation_prompt)?.text)
    }

    fn rendered(&self, dialogue: Dialogue, add_generation_prompt: bool) -> Result<Rendered> {
        self.template.render(dialogue.variables(&self.reads)?, add_generation_prompt)
    }

    /// What the record of a conversation has and nothing uses.
    pub fn leftovers(&self, conversation: &Conversation) -> Leftovers {
        Leftovers { unread: conversation.unused.clone(), unwritten: self.unwritten(conversation) }
    }

    /// What is said of each key that is given to the template and that leaves no trace in the text.
    pub fn unwritten(&self, conversation: &Conversation) -> Vec<String> {
        dialogue::unwritten(conversation, &self.reads, |dialogue| {
            [false, true].map(|prompt| self.rendered(dialogue, prompt).ok().map(|rendered| rendered.text))
        })
    }

    /// The conversation in tokens, with the assistant's turns.
    ///
    /// Nothing is put before or after the rendered text: BOS is there once where the template writes it, however often
    /// it does so at the beginning. The text is encoded in segments, cut where a turn of the assistant begins and ends,
    /// so that no token joins what was asked and what is answered: up to a turn, the ids are those of [`Chat::prompt`]
    /// with the messages before it. The assistant's turns are what `{% generation %}` marks in the template. Without
    /// marks, a turn begins where the messages before it, rendered with the generation prompt, end, and ends with the
    /// last special token of what the template then writes, or, without one, where that ends.
    ///
    /// # Errors
    /// The template refuses the messages; what it writes for messages changes with those that follow, so that the
    /// turns cannot be told.
    pub fn encode<'a>(
        &self,
        dialogue: impl Into<Dialogue<'a>>,
        add_generation_prompt: bool,
    ) -> Result<Encoding> {
        let dialogue = dialogue.into();
        let (text, turns) = self.render_turns(dialogue, add_generation_prompt)?;
        let uncounted = self.uncounted(dialogue, turns.len())?;
        Ok(Encoding { uncounted, ..self.encode_text(text, &turns)? })
    }

    /// The numbers of the assistant's turns, of `turns` that were found, that the loss does not count.
    fn uncounted(&self, dialogue: Dialogue, turns: usize) -> Result<Vec<usize>> {
        let all: Vec<&Message> = dialogue.messages.iter().filter(|m| m.role == "assistant").collect();
        let uncounted: Vec<usize> = (0..all.len()).filter(|i| !all[*i].supervised).collect();
        if !uncounted.is_empty() && turns != all.len() {
            return Err(Error::data(format!(
                "{}: it marks {turns} turns of {} of the assistant, so that those with `weight` 0 or `train` false cannot be \
                 told from the others",
                self.template.place,
                all.len()
            )));
        }
        Ok(uncounted)
    }

    /// [`Chat::encode`] of a conversation whose last message is an answer that did not come to its end: without what the
    /// template writes after it. An answer that the template does not write as it is, or an empty one, is taken for whole.
    pub fn encode_unfinished<'a>(&self, dialogue: impl Into<Dialogue<'a>>) -> Result<Encoding> {
        let dialogue = dialogue.into();
        let (mut text, mut turns) = self.render_turns(dialogue, false)?;
        if let (Some(turn), Some(answer)) = (turns.last_mut(), dialogue.messages.last()) {
            // Many templates trim what is said.
            let written = |said: &str| text[turn.clone()].find(said).map(|at| turn.start + at + said.len());
            let said = answer.text();
            let all = [&*said, said.trim()];
            if let Some(end) = all.into_iter().filter(|said| !said.is_empty()).find_map(written) {
                text.truncate(end);
                turn.end = end;
            }
        }
        self.encode_text(text, &turns)
    }

    fn render_turns(
        &self,
        dialogue: Dialogue,
        add_generation_prompt: bool,
    ) -> Result<(String, Vec<Range<usize>>)> {
        let rendered = self.rendered(dialogue, add_generation_prompt)?;
        let turns = match self.template.marks {
            true => rendered.marked,
            false => self.find_turns(dialogue, &rendered.text)?,
        };
        Ok((rendered.text, turns))
    }

    /// The ids of messages and of the beginning of the assistant's answer: what a model is given to answer. A template
    /// whose turns cannot be told, which cannot be trained with, is encoded as one text.
    pub fn prompt<'a>(&self, dialogue: impl Into<Dialogue<'a>>) -> Result<Vec<u32>> {
        let dialogue = dialogue.into();
        let rendered = self.rendered(dialogue, true)?;
        let turns = match self.template.marks {
            true => rendered.marked,
            false => self.find_turns(dialogue, &rendered.text).unwrap_or_default(),
        };
        Ok(self.encode_text(rendered.text, &turns)?.ids)
    }

    /// The ids of a prompt, as one message of the user.
    pub fn prompt_text(&self, prompt: &str) -> Result<Vec<u32>> {
        self.prompt(&[Message::new("user", prompt)])
    }

    fn encode_text(&self, text: String, turns: &[Range<usize>]) -> Result<Encoding> {
        let (mut segments, mut at) = (Vec::new(), 0);
        for turn in turns {
            segments.extend([&text[at..turn.start], &text[turn.clone()]]);
            at = turn.end;
        }
        segments.push(&text[at..]);
        let (mut ids, mut places) = (Vec::new(), Vec::new());
        for (i, segment) in self.tokenizer.encode_segments(&segments)?.into_iter().enumerate() {
            let begin = ids.len();
            ids.extend(segment);
            if i == 0 {
                self.tokenizer.one_bos(&mut ids);
            }
            if i % 2 == 1 {
                places.push(begin..ids.len());
            }
        }
        Ok(Encoding { text, ids, turns: places, uncounted: Vec::new() })
    }

    /// Where the assistant's turns lie in `text`, which the template has made of the messages.
    fn find_turns(&self, dialogue: Dialogue, text: &str) -> Result<Vec<Range<usize>>> {
        let mut turns = Vec::new();
        for (i, _) in dialogue.messages.iter().enumerate().filter(|(_, m)| m.role == "assistant") {
            let cannot = |why: &str| {
                Error::data(format!(
                    "{}: which tokens are the assistant's in message {} cannot be told: {why}; mark them in the \
                     template with {{% generation %}} and {{% endgeneration %}}, or choose another template",
                    self.template.place,
                    i + 1
                ))
            };
            let rendered = |n: usize, prompt| {
                let rendered = self.rendered(dialogue.first(n), prompt);
                rendered.map_err(|e| cannot(&format!("the messages before it alone give: {e}")))
            };
            let (before, with) = (rendered(i, true)?.text, rendered(i + 1, false)?.text);
            if !with.starts_with(&before) {
                return Err(cannot("the turn does not begin with the generation prompt"));
            }
            if !text.starts_with(&with) {
                return Err(cannot("it is rendered otherwise where messages follow"));
            }
            let turn = &text[before.len()..with.len()];
            let end = self.tokenizer.end_of_last_token(turn).filter(|end| turn[*end..].trim().is_empty());
            turns.push(before.len()..before.len() + end.unwrap_or(turn.len()));
        }
        Ok(turns)
    }
}

/// The tokenizer that a configuration asks for: loaded from the section's `path`, else from `model`'s folder, with the
/// section's new tokens and chat template. What ends a turn of that template also ends a text from then on, so that a
/// model that was trained with it stops there wherever it is used.
///
/// # Errors
/// There is none; the section's template is no template (with place and line).
pub fn configured(section: Option<&sections::TokenizerSection>, model: Option<&Path>) -> Result<Tokenizer> {
    let tokenizer = match (section.and_then(|s| s.path.as_deref()), model) {
        (Some(path), _) => Tokenizer::load(path)?,
        (None, Some(model)) => Tokenizer::load(model)
            .map_err(|e| Error { message: format!("{e} (or name another in tokenizer.path)"), ..e })?,
        (None, None) => return Err(Error::config("a new model needs tokenizer.path")),
    };
    let Some(section) = section else { return Ok(tokenizer) };
    let mut tokenizer = tokenizer.with_tokens(&section.add_tokens)?;
    if let Some(token) = &section.pad_token {
        tokenizer = tokenizer.with_pad_token(token)?;
    }
    let template = match (&section.chat_template, &section.template) {
        (Some(what), _) => templates::find(what, &tokenizer)?,
        (None, Some(template)) => templates::plain(template, &tokenizer)?,
        (None, None) => return Ok(tokenizer),
    };
    with_template(tokenizer, template)
}

/// The tokenizer with a chat template by name, file or Jinja, for commands that have no configuration.
pub fn with_chat_template(tokenizer: Tokenizer, what: &str) -> Result<Tokenizer> {
    let template = templates::find(what, &tokenizer)?;
    with_template(tokenizer, template)
}

fn with_template(tokenizer: Tokenizer, template: ChatTemplate) -> Result<Tokenizer> {
    let chat = Chat::with(&tokenizer, &template)?;
    tokenizer.with_chat_template(template)?.with_eos_ids(&chat.stop_ids())
}
