//! Tokenizers in the metadata of GGUF files (keys `tokenizer.ggml.*`).

mod pre;
mod read;
mod write;

use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};

pub use read::has_tokenizer;
pub(super) use read::read;
pub use write::{GgufLimit, write};

/// Texts in which tokenizers differ: digits, spaces, line breaks, contractions, scripts, marks, emoji, code.
const PROBES: [&str; 16] = [
    "Hello, world! How are you?",
    " leading and trailing ",
    "1234567890 12 345, 3.14159 and 1e-5; 2026-11-28",
    "a  b   c    d\t\te \n\n f\r\n  g\n\n\n",
    "I'm, you're, he'll, WE'VE, it's, THEY'D don't",
    "def f(x):\n    return {'a': [x, -1], \"b\": x**2}  # comment\n",
    "naïve café, Übergröße, señor, cafe\u{301}",
    "Привет, мир! Γειά σου Κόσμε",
    "你好，世界。こんにちは世界 안녕하세요",
    "हिन्दी में पाठ, ภาษาไทย, العربية، עברית",
    "🙂👍🏽👨‍👩‍👧 €£¥ ½ ² ™ … “quoted” — dash",
    "HTTPServer_v2.getValue() != null && !isEmpty; x<=y>=z",
    "https://example.com/a/b?c=d&e=%20f#g",
    "\u{0}\u{1}\u{7f}\u{a0}\u{200b}\u{feff}",
    "<s></s><|im_start|>user\n<|eot_id|>[INST] x [/INST]",
    "",
];

/// Refuses two tokenizers that give other ids for the same text; `loss`: of texts that it does not speak of.
pub fn check_same(a: &Tokenizer, b: &Tokenizer, loss: Option<GgufLimit>) -> Result<()> {
    let spoken_of = |text: &str| loss.is_some() && (text.starts_with(' ') || text.contains("<s>"));
    for text in PROBES.into_iter().filter(|text| !spoken_of(text)) {
        let (x, y) = (a.encode(text, true)?, b.encode(text, true)?);
        if x != y {
            return Err(Error::failed(format!(
                "for {text:?} the tokenizer gives {y:?} when read back, but {x:?} before"
            )));
        }
    }
    Ok(())
}
