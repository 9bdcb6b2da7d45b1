//! Training of byte-level BPE.

use super::Tokenizer;
use crate::error::{Error, Result};
use serde_json::json;
use std::path::Path;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::{byte_level::ByteLevel, digits::Digits, sequence::Sequence};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, models::TrainerWrapper};

const SPECIAL: [&str; 3] = ["<s>", "</s>", "<pad>"];

/// The smallest vocabulary of byte-level BPE: 256 bytes and the special tokens.
pub const MIN_VOCAB_SIZE: usize = 256 + SPECIAL.len();

/// Trains byte-level BPE on all cores. Tokens 0, 1, 2 are `<s>` (put before every text), `</s>` and `<pad>`; then the
/// 256 bytes; then the merges. `split_digits`: every digit is a token of its own. The vocabulary is smaller than
/// `vocab_size` where the texts support no more merges. Equal texts give equal tokenizers.
pub fn train(
    texts: impl Iterator<Item = Result<String>> + Send,
    vocab_size: usize,
    split_digits: bool,
) -> Result<Tokenizer> {
    if vocab_size < MIN_VOCAB_SIZE {
        return Err(Error::config(format!(
            "a vocabulary of {vocab_size} is too small for byte-level BPE: the 256 bytes and {} need {MIN_VOCAB_SIZE}",
            SPECIAL.join(", ")
        )));
    }
    let failed = |e: tokenizers::Error| Error::failed(format!("cannot train the tokenizer: {e}"));
    let byte_level = ByteLevel::new(false, true, true);
    let mut inner = tokenizers::Tokenizer::new(BPE::default());
    if split_digits {
        let steps = vec![Digits::new(true).into(), byte_level.into()];
        inner.with_pre_tokenizer(Some(Sequence::new(steps)));
    } else {
        inner.with_pre_tokenizer(Some(byte_level));
    }
    inner.with_decoder(Some(ByteLevel::default()));
    let mut trainer: TrainerWrapper = BpeTrainerBuilder::new()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(SPECIAL.map(|t| AddedToken::from(t, true)).to_vec())
        .build()
        .into();
    let mut error = None;
    let mut num_texts = 0u64;
    // Chunks of 64 KiB, cut at line breaks, let one long text keep all cores busy too; a cut may part a line break
    // from the white space after it, which changes nothing but a count or two.
    let chunks = texts
        .map_while(|text| text.map_err(|e| error = Some(e)).ok())
        .inspect(|text| num_texts += !text.is_empty() as u64)
        .flat_map(|text| {
            let mut chunks = vec![String::new()];
            for line in text.split_inclusive('\n') {
                match chunks.last_mut() {
                    Some(chunk) if chunk.len() < 1 << 16 => chunk.push_str(line),
                    _ => chunks.push(line.to_string()),
                }
            }
            chunks
        });
    tokenizers::parallelism::set_parallelism(true);
    inner.train(&mut trainer, chunks).map_err(failed)?;
    if let Some(e) = error {
        return Err(e);
    }
    if num_texts == 0 {
        return Err(Error::data("there is no text to train the tokenizer on"));
    }
    let template = TemplateProcessing::builder()
        .try_single("<s> $A")
        .and_then(|b| b.try_pair("<s> $A <s>:1 $B:1"))
        .map_err(|e| Error::failed(format!("cannot make the tokenizer's template: {e}")))?
        .special_tokens(vec![(SPECIAL[0], 0)])
        .build()
        .map_err(|e| Error::failed(format!("cannot make the tokenizer's template: {e}")))?;
    inner.with_post_processor(Some(template));
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "pad_token": SPECIAL[2],
        "clean_up_tokenization_spaces": false,
    });
    let files = vec![
        ("tokenizer.json".to_string(), inner.to_string(true).map_err(failed)?.into_bytes()),
        ("tokenizer_config.json".to_string(), format!("{config:#}\n").into_bytes()),
    ];
    Tokenizer::from_files(files, Path::new("tokenizer.json"), &json!({}))
}
