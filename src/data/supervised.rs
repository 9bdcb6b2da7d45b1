//! Records as sequences of which the loss counts the supervised tokens: what fine-tuning trains on, and `score` and `eval`
//! measure.

use super::chat::Chat;
use super::conversation::{conversation, prompt_and_completion};
use super::examples::Encoded;
use super::odd::{Odd, OrOdd, Reason};
use super::readers::Record;

/// A record in tokens. Supervised are the assistant's turns, their ends included; of `prompt` and `completion` the completion's.
pub fn encode(record: &Record, chat: &Chat) -> Result<Encoded, Odd> {
    let encoding = match prompt_and_completion(record).or_odd(Reason::Format)? {
        Some((prompt, completion)) => chat.answer(&prompt, &completion),
        None => chat.encode(&conversation(record).or_odd(Reason::Format)?, false),
    };
    let encoding = encoding.map_err(|e| e.context(&record.place)).or_odd(Reason::Template)?;
    Ok(Encoded { supervised: encoding.mask(), ids: encoding.ids })
}
