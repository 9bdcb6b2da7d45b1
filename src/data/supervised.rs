//! Records as sequences of which the loss counts the supervised tokens: what fine-tuning trains on, and `score` and `eval`
//! measure.

use super::chat::Chat;
use super::conversation::prompt_and_completion;
use super::examples::{Encoded, Example};
use super::odd::{Odd, OrOdd, Reason};
use super::readers::Record;

/// A record in tokens. Supervised are the assistant's turns, their ends included; of `prompt` and `completion` the completion's.
/// `train_on_prompt`: supervised is everything but the turns that the record leaves out.
pub fn example(record: &Record, chat: &Chat, train_on_prompt: bool) -> Result<Example, Odd> {
    let (mut whole, completion) = prompt_and_completion(record).or_odd(Reason::Format)?;
    let has = |key: &str| record.fields.get(key).is_some_and(|v| !v.is_null());
    let answers = has("prompt") && has("completion") && !has("messages") && !has("conversations");
    let encoding = if answers {
        let encoding = chat.answer(&whole, &completion);
        whole.extend(completion);
        encoding
    } else {
        whole.extend(completion);
        chat.encode(&whole, false)
    };
    let encoding = encoding.map_err(|e| e.context(&record.place)).or_odd(Reason::Template)?;
    let supervised = if train_on_prompt { encoding.mask_of_all() } else { encoding.mask() };
    let example = Example::from(Encoded { ids: encoding.ids, supervised });
    Ok(Example { leftovers: chat.leftovers(&whole), ..example })
}
