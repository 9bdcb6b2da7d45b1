//! The pre-tokenizers that GGUF files name (`tokenizer.ggml.pre`): how a text is cut before anything is joined.
//!
//! llama.cpp keeps the patterns in its code (`llm_tokenizer_bpe` and `llama_vocab::impl::load` in `src/llama-vocab.cpp`).
//! Those here are of the models' own `tokenizer.json`, which it adapts to its engine of regular expressions.

use serde_json::{Value, json};

/// One step of a pre-tokenizer. The byte-level step without a pattern, which comes last, goes without saying.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum PreTokenizerStep {
    /// What matches stands by itself.
    Split(String),
    /// Every digit stands by itself.
    Digits,
    /// GPT-2's pattern.
    Gpt2,
}

use PreTokenizerStep::{Digits, Gpt2};

/// A pre-tokenizer, and what comes with it unless the file says otherwise.
pub(super) struct Pre {
    /// All that stand for the same; the first is written.
    pub names: &'static [&'static str],
    pub steps: Vec<PreTokenizerStep>,
    /// A word that is a token is taken as it is.
    pub ignore_merges: bool,
    pub add_bos: bool,
    /// The text is brought into Unicode's form NFC first (llama.cpp leaves that out, the models' own tokenizers do not).
    pub nfc: bool,
}

const LLAMA_3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN_3_5: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK_3: [&str; 3] = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
];
const DEEPSEEK_CODER: [&str; 5] = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"];
const GPT_2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";

/// All that are built.
pub(super) fn all() -> Vec<Pre> {
    let split = |patterns: &[&str]| {
        patterns.iter().map(|p| PreTokenizerStep::Split((*p).to_string())).collect::<Vec<_>>()
    };
    let plain = |names, steps| Pre { names, steps, ignore_merges: false, add_bos: false, nfc: false };
    let default = split(&[r"[\p{P}\$\+<=>\^~\|]+", GPT_2, r"\p{N}+", "[0-9][0-9][0-9]"]);
    vec![
        Pre {
            ignore_merges: true,
            add_bos: true,
            ..plain(
                &["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
                split(&[LLAMA_3]),
            )
        },
        plain(&["dbrx", "smaug-bpe", "glm4", "chatglm-bpe"], split(&[LLAMA_3])),
        Pre { nfc: true, ..plain(&["qwen2", "deepseek-r1-qwen", "megrez"], split(&[QWEN_2])) },
        plain(&["stablelm2", "hunyuan", "solar-open", "grok-2"], split(&[QWEN_2])),
        Pre { nfc: true, ..plain(&["qwen35"], split(&[QWEN_3_5])) },
        Pre { ignore_merges: true, add_bos: true, ..plain(&["tekken"], split(&[TEKKEN])) },
        plain(&["gpt-4o", "llama4", "kanana2"], split(&[GPT_4O])),
        plain(&["deepseek-v3", "hunyuan-dense"], split(&DEEPSEEK_3)),
        plain(&["deepseek-coder"], split(&DEEPSEEK_CODER)),
        plain(
            &["smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"],
            vec![Digits, Gpt2],
        ),
        plain(
            &["gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "gigachat", "mellum", "exaone4"],
            vec![Gpt2],
        ),
        plain(&["default"], default),
    ]
}

impl Pre {
    /// As a `tokenizer.json` has it.
    pub(super) fn definition(&self) -> Value {
        let byte_level = |pattern: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": pattern});
        let mut steps: Vec<Value> = self
            .steps
            .iter()
            .map(|step| match step {
                PreTokenizerStep::Split(p) => {
                    json!({"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": false})
                }
                Digits => json!({"type": "Digits", "individual_digits": true}),
                Gpt2 => byte_level(true),
            })
            .collect();
        if self.steps.last() != Some(&Gpt2) {
            steps.push(byte_level(false));
        }
        match steps.len() {
            1 => steps.remove(0),
            _ => json!({"type": "Sequence", "pretokenizers": steps}),
        }
    }
}

/// The steps of a byte-level pre-tokenizer of a `tokenizer.json`; none where it is of another kind.
pub(super) fn steps(definition: &Value) -> Option<Vec<PreTokenizerStep>> {
    let all = match definition["type"].as_str()? {
        "Sequence" => definition["pretokenizers"].as_array()?.clone(),
        _ => vec![definition.clone()],
    };
    let (last, before) = all.split_last()?;
    let mut steps = before.iter().map(|step| match step["type"].as_str()? {
        "Split" if step["behavior"] == "Isolated" && step["invert"] == false => {
            Some(PreTokenizerStep::Split(step["pattern"]["Regex"].as_str()?.to_string()))
        }
        "Digits" if step["individual_digits"] == true => Some(Digits),
        _ => None,
    });
    let mut steps = steps.by_ref().collect::<Option<Vec<_>>>()?;
    if last["type"] != "ByteLevel" || last["add_prefix_space"] == true {
        return None;
    }
    // Where it is left out, it is true.
    if last["use_regex"] != false {
        steps.push(Gpt2);
    }
    Some(steps)
}
