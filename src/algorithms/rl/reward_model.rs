//! A reward model that scores responses while another model is trained. It may be of another family: what was said is then
//! tokenized again, by its own tokenizer and template.

use serde_json::json;

use crate::algorithms::base::Base;
use crate::algorithms::rl::place::{Where, at_work, check_offload, frozen};
use crate::algorithms::rl::sampling::Said;
use crate::algorithms::scorer;
use crate::checkpoint::{ModelRecord, Scoring};
use crate::config::common::Common;
use crate::config::model::Model;
use crate::config::models::FrozenModel;
use crate::data::chat::Chat;
use crate::data::conversation::Message;
use crate::data::examples::Encoded;
use crate::data::tokenizer::{Tokenizer, hex};
use crate::distributed::agree::agree;
use crate::distributed::agreement::Facts;
use crate::distributed::world::World;
use crate::error::{Error, Result};
use crate::model::Llama;

/// Opened and checked, nothing of it read yet.
pub struct OpenedRewardModel {
    base: Base,
    scoring: Scoring,
    /// Its template, where it does not read the actor's tokens.
    chat: Option<Chat>,
}

impl OpenedRewardModel {
    /// The model itself.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// What all ranks must have of it.
    pub fn add_facts(&self, facts: &mut Facts) -> Result<()> {
        self.base.add_facts("reward_model", facts)
    }

    /// `actor`: the tokenizer of the responses.
    ///
    /// # Errors
    /// No reward model; one of other tokens without a chat template of its own.
    pub fn open(section: &FrozenModel, actor: &Tokenizer) -> Result<OpenedRewardModel> {
        let mut base = Base::open_scored(&Model::Path(section.path.clone()), None, 1, None)?;
        base.tokenizer = base.tokenizer.with_template_date(actor.template_date());
        let scoring = base.weights.as_ref().map_or(Ok(None), |w| w.scoring())?;
        let has_head =
            base.weights.as_ref().is_some_and(|w| w.shape().head == crate::config::shape::Head::Score);
        if !has_head {
            return Err(Error::data(format!(
                "{}: the model has no scalar head: it is not a reward model (see corral reward)",
                section.path.display()
            )));
        }
        let scoring = scoring.unwrap_or_else(|| Scoring::raw(Default::default()));
        let template = |t: &Tokenizer| t.chat_template().map(|t| t.source.clone());
        let same =
            base.tokenizer.base_hash() == actor.base_hash() && template(&base.tokenizer) == template(actor);
        let chat = if same { None } else { Some(Chat::new(&base.tokenizer)?) };
        Ok(OpenedRewardModel { base, scoring, chat })
    }

    /// Loads it, each rank what it holds, and tells what it is. Collective.
    pub fn load<'a>(
        &'a self,
        section: &FrozenModel,
        c: &Common,
        world: &'a World,
    ) -> Result<(RewardModel<'a>, Option<ModelRecord>)> {
        let place = Where::of(world, "reward_model", section.device.as_deref(), false)?;
        check_offload("reward_model", section.offload, &place)?;
        let (model, hash) = frozen(&self.base, c, section.dtype, &place)?;
        let mut record = self.base.record_asked("reward_model", "reward_model.path", hash);
        if let Some(record) = &mut record {
            let tokenizer = &self.base.tokenizer;
            record.details["scoring"] = json!(self.scoring);
            record.details["tokenizer"] = json!(hex(&tokenizer.hash()));
            record.details["chat_template"] = json!(tokenizer.chat_template().map(|t| &t.source));
        }
        Ok((RewardModel { opened: self, model, offload: section.offload, _place: place }, record))
    }
}

pub struct RewardModel<'a> {
    opened: &'a OpenedRewardModel,
    model: Llama,
    offload: bool,
    _place: Where<'a>,
}

impl RewardModel<'_> {
    /// The normalised scores of responses. Each rank gives its own; collective where the model is sharded.
    pub fn score(&mut self, said: &[Said]) -> Result<Vec<f64>> {
        let sequences = said.iter().map(|s| self.opened.encode(s)).collect::<Result<Vec<Encoded>>>();
        let sequences = agree(self.model.params.shard_group(), sequences)?;
        at_work(&mut self.model, self.offload, |m| scorer::rewards(m, &self.opened.scoring, &sequences))
    }
}

impl OpenedRewardModel {
    /// What the model reads: the actor's own tokens, where it knows them.
    fn encode(&self, said: &Said) -> Result<Encoded> {
        let Encoded { ids, supervised } = match &self.chat {
            None => {
                let ids: Vec<u32> = said.prompt.ids.iter().chain(said.ids).map(|id| *id as u32).collect();
                let supervised = (0..ids.len()).map(|i| i >= said.prompt.ids.len()).collect();
                Encoded { ids, supervised }
            }
            Some(chat) => rendered(chat, said)?,
        };
        let most = self.base.shape.max_position_embeddings as usize;
        // A long prompt loses its beginning: the response is what is scored.
        let cut = ids.len().saturating_sub(most);
        Ok(Encoded { ids: ids[cut..].to_vec(), supervised: supervised[cut..].to_vec() })
    }
}

/// What was said in the tokens of another template, up to where the response ended.
fn rendered(chat: &Chat, said: &Said) -> Result<Encoded> {
    let mut messages = said.prompt.messages.clone();
    messages.push(Message::new("assistant", said.text));
    let encoding = match said.ended {
        true => chat.encode(&messages, false)?,
        false => chat.encode_unfinished(&messages)?,
    };
    let mut supervised = encoding.mask();
    // Earlier turns of the assistant are of the prompt.
    let last = encoding.turns.last().map_or(0, |turn| turn.start);
    supervised[..last].fill(false);
    Ok(Encoded { ids: encoding.ids, supervised }.cut_after_the_last_turn())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::sections;
    use crate::data::chat::configured;
    use crate::data::conversation::Conversation;
    use crate::data::preferences::Preference;
    use crate::data::prompts::Prompt;
    use crate::data::tokenizer::tests::small;
    use testing::folder::TestFolder;

    /// What is trained on, what `score` and `eval` read, what the actor wrote, and what is made of its text are one.
    #[test]
    fn a_completion_ends_at_the_same_token_wherever_it_is_scored() {
        for template in ["chatml", "human-assistant"] {
            let folder = TestFolder::new(&format!("scored-{template}"));
            small(300).save(&folder.0).unwrap();
            let section = sections::TokenizerSection {
                chat_template: Some(template.into()),
                add_tokens: vec!["<|im_start|>".into(), "<|im_end|>".into()],
                ..Default::default()
            };
            let chat = Chat::new(&configured(Some(&section), Some(&folder.0)).unwrap()).unwrap();
            let messages = Conversation::from(vec![Message::new("user", "1 + 1?")]);
            let ids: Vec<i64> = chat.prompt(&messages).unwrap().into_iter().map(i64::from).collect();
            let prompt = Prompt { ids, messages, reference: None, record: Default::default() };
            let answer = vec![Message::new("assistant", "two")];
            let preference = Preference::new(prompt.messages.clone(), vec![answer]);
            let trained = preference.encode(&chat).unwrap().sequences.remove(0);

            let end = chat.end_of_turn().unwrap();
            let mut response = chat.tokenizer().encode("two", false).unwrap();
            if template == "human-assistant" {
                response = chat.tokenizer().encode(" two", false).unwrap();
            }
            response.push(end);
            let written: Vec<u32> = prompt.ids.iter().map(|id| *id as u32).chain(response.clone()).collect();
            assert_eq!(trained.ids, written, "{template}");
            let wanted: Vec<bool> = (0..written.len()).map(|i| i >= prompt.ids.len()).collect();
            assert_eq!(trained.supervised, wanted, "{template}");
            let ids: Vec<i64> = response.into_iter().map(i64::from).collect();
            let said = Said { prompt: &prompt, ids: &ids, text: "two", ended: true };
            assert_eq!(rendered(&chat, &said).unwrap(), trained, "{template}");
            let cut = rendered(&chat, &Said { ended: false, ..said }).unwrap();
            assert_eq!(cut.ids, written[..written.len() - 1], "{template}");
        }
    }
}
