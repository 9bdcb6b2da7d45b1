//! Shapes by name: those of the benchmark table, and of published models as their `config.json` has them.

use super::shape::{Experts, Family, Features, Head, Llama3RopeScaling, Shape};

impl Shape {
    /// The names of the presets. `llama-15m`, `llama-42m` and `llama-110m` are those of the benchmark table; `llama-350m` is of
    /// the size of small reward models; `llama-1b` is `llama-3.2-1b`; the others are published models.
    pub const PRESETS: [&'static str; 37] = [
        "llama-15m",
        "llama-42m",
        "llama-110m",
        "llama-350m",
        "llama-1b",
        "llama-1-7b",
        "llama-1-13b",
        "llama-1-33b",
        "llama-2-7b",
        "llama-2-13b",
        "llama-2-70b",
        "llama-3-8b",
        "llama-3-70b",
        "llama-3.1-8b",
        "llama-3.1-70b",
        "llama-3.1-405b",
        "llama-3.2-1b",
        "llama-3.2-3b",
        "llama-3.3-70b",
        "mistral-7b",
        "mixtral-8x7b",
        "qwen-7b",
        "qwen-14b",
        "qwen-72b",
        "qwen2.5-0.5b",
        "qwen2.5-1.5b",
        "qwen2.5-3b",
        "qwen2.5-7b",
        "qwen2.5-14b",
        "qwen2.5-32b",
        "qwen2.5-72b",
        "qwen3-0.6b",
        "qwen3-1.7b",
        "qwen3-4b",
        "qwen3-8b",
        "qwen3-14b",
        "qwen3-32b",
    ];

    /// The preset of a published model, by its hub id: `meta-llama/Llama-3.2-1B-Instruct` is `llama-3.2-1b`. The shape of a
    /// fine-tuned model is its base's.
    pub fn preset_of_hub_id(id: &str) -> Option<&'static str> {
        let (_, name) = id.split_once('/')?;
        let name = name.to_lowercase();
        let mut name = name.strip_prefix("meta-").unwrap_or(&name);
        for end in ["-v0.1", "-hf", "-instruct", "-base", "-chat"] {
            name = name.strip_suffix(end).unwrap_or(name);
        }
        Shape::PRESETS.into_iter().find(|preset| *preset == name)
    }

    /// A preset by name.
    pub fn preset(name: &str) -> Option<Shape> {
        Some(match name {
            "llama-15m" => Shape { vocab_size: 4096, max_position_embeddings: 256, ..plain(288, 768, 6, 6) },
            "llama-42m" => Shape { vocab_size: 8192, max_position_embeddings: 512, ..plain(512, 1376, 8, 8) },
            "llama-110m" => Shape { max_position_embeddings: 1024, ..plain(768, 2048, 12, 12) },
            "llama-350m" => Shape { max_position_embeddings: 2048, ..plain(1024, 2816, 24, 16) },
            "llama-1-7b" => llama1(plain(4096, 11008, 32, 32)),
            "llama-1-13b" => llama1(plain(5120, 13824, 40, 40)),
            "llama-1-33b" => llama1(plain(6656, 17920, 60, 52)),
            "llama-2-7b" => plain(4096, 11008, 32, 32),
            "llama-2-13b" => plain(5120, 13824, 40, 40),
            "llama-2-70b" => Shape { num_key_value_heads: 8, ..plain(8192, 28672, 80, 64) },
            "llama-3-8b" => first_llama3(plain(4096, 14336, 32, 32)),
            "llama-3-70b" => first_llama3(plain(8192, 28672, 80, 64)),
            "llama-3.1-8b" => llama3(8.0, plain(4096, 14336, 32, 32)),
            "llama-3.1-70b" | "llama-3.3-70b" => llama3(8.0, plain(8192, 28672, 80, 64)),
            "llama-3.1-405b" => llama3(8.0, plain(16384, 53248, 126, 128)),
            "llama-3.2-1b" | "llama-1b" => {
                Shape { tie_word_embeddings: true, ..llama3(32.0, plain(2048, 8192, 16, 32)) }
            }
            "llama-3.2-3b" => Shape { tie_word_embeddings: true, ..llama3(32.0, plain(3072, 8192, 28, 24)) },
            // v0.1; later versions have no window.
            "mistral-7b" => Shape { family: Family::Mistral, sliding_window: Some(4096), ..mistral() },
            "mixtral-8x7b" => Shape {
                family: Family::Mixtral,
                rope_theta: 1e6,
                experts: Some(Experts {
                    num_local_experts: 8,
                    num_experts_per_tok: 2,
                    router_aux_loss_coef: 0.02,
                }),
                ..mistral()
            },
            // The first generation, which has Qwen2's mathematics; positions up to its `seq_length`.
            "qwen-7b" => qwen(151936, 8192, 10000.0, plain(4096, 11008, 32, 32)),
            "qwen-14b" => qwen(152064, 2048, 10000.0, plain(5120, 13696, 40, 40)),
            "qwen-72b" => qwen(152064, 32768, 1e6, plain(8192, 24576, 80, 64)),
            "qwen2.5-0.5b" => Shape { tie_word_embeddings: true, ..qwen25(2, plain(896, 4864, 24, 14)) },
            "qwen2.5-1.5b" => Shape { tie_word_embeddings: true, ..qwen25(2, plain(1536, 8960, 28, 12)) },
            "qwen2.5-3b" => Shape { tie_word_embeddings: true, ..qwen25(2, plain(2048, 11008, 36, 16)) },
            "qwen2.5-7b" => Shape { vocab_size: 152064, ..qwen25(4, plain(3584, 18944, 28, 28)) },
            "qwen2.5-14b" => Shape { vocab_size: 152064, ..qwen25(8, plain(5120, 13824, 48, 40)) },
            "qwen2.5-32b" => Shape { vocab_size: 152064, ..qwen25(8, plain(5120, 27648, 64, 40)) },
            "qwen2.5-72b" => Shape { vocab_size: 152064, ..qwen25(8, plain(8192, 29568, 80, 64)) },
            "qwen3-0.6b" => Shape { tie_word_embeddings: true, ..qwen3(plain(1024, 3072, 28, 16)) },
            "qwen3-1.7b" => Shape { tie_word_embeddings: true, ..qwen3(plain(2048, 6144, 28, 16)) },
            "qwen3-4b" => Shape { tie_word_embeddings: true, ..qwen3(plain(2560, 9728, 36, 32)) },
            "qwen3-8b" => qwen3(plain(4096, 12288, 36, 32)),
            "qwen3-14b" => qwen3(plain(5120, 17408, 40, 40)),
            "qwen3-32b" => qwen3(plain(5120, 25600, 64, 64)),
            _ => return None,
        })
    }
}

/// Llama 2, of these sizes.
fn plain(hidden_size: i64, intermediate_size: i64, layers: i64, heads: i64) -> Shape {
    Shape {
        family: Family::Llama,
        head: Head::Lm,
        vocab_size: 32000,
        hidden_size,
        intermediate_size,
        num_hidden_layers: layers,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_dim: hidden_size / heads,
        max_position_embeddings: 4096,
        rms_norm_eps: 1e-5,
        rope_theta: 10000.0,
        rope_scaling: None,
        tie_word_embeddings: false,
        initializer_range: 0.02,
        sliding_window: None,
        max_window_layers: 0,
        experts: None,
        features: Features::default(),
    }
}

fn llama1(plain: Shape) -> Shape {
    Shape { max_position_embeddings: 2048, rms_norm_eps: 1e-6, ..plain }
}

fn llama3(factor: f64, plain: Shape) -> Shape {
    Shape {
        vocab_size: 128256,
        num_key_value_heads: 8,
        max_position_embeddings: 131072,
        rope_theta: 500000.0,
        rope_scaling: Some(Llama3RopeScaling {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        }),
        ..plain
    }
}

/// Llama 3, before its context was extended.
fn first_llama3(plain: Shape) -> Shape {
    Shape { max_position_embeddings: 8192, rope_scaling: None, ..llama3(8.0, plain) }
}

/// Qwen 2.5 with so many heads of keys and values.
fn qwen25(num_key_value_heads: i64, plain: Shape) -> Shape {
    Shape { num_key_value_heads, ..qwen(151936, 32768, 1e6, plain) }
}

fn qwen3(plain: Shape) -> Shape {
    Shape {
        family: Family::Qwen3,
        features: Family::Qwen3.features(),
        num_key_value_heads: 8,
        head_dim: 128,
        ..qwen(151936, 40960, 1e6, plain)
    }
}

fn mistral() -> Shape {
    Shape { num_key_value_heads: 8, max_position_embeddings: 32768, ..plain(4096, 14336, 32, 32) }
}

fn qwen(vocab_size: i64, positions: i64, rope_theta: f64, plain: Shape) -> Shape {
    Shape {
        family: Family::Qwen2,
        features: Family::Qwen2.features(),
        vocab_size,
        max_position_embeddings: positions,
        rms_norm_eps: 1e-6,
        rope_theta,
        ..plain
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the models' pages and indices of weights state them.
    #[test]
    fn published_models_have_their_published_numbers_of_parameters() {
        let published = [
            ("llama-1-7b", 6_738_415_616),
            ("llama-1-13b", 13_015_864_320),
            ("llama-1-33b", 32_528_943_616),
            ("llama-2-7b", 6_738_415_616),
            ("llama-2-13b", 13_015_864_320),
            ("llama-2-70b", 68_976_648_192),
            ("llama-3.1-8b", 8_030_261_248),
            ("llama-3.1-70b", 70_553_706_496),
            ("llama-3.2-1b", 1_235_814_400),
            ("llama-3.2-3b", 3_212_749_824),
            ("llama-3-8b", 8_030_261_248),
            ("llama-3.1-405b", 405_853_388_800),
            ("llama-3.3-70b", 70_553_706_496),
            ("qwen2.5-0.5b", 494_032_768),
            ("qwen2.5-1.5b", 1_543_714_304),
            ("qwen2.5-3b", 3_085_938_688),
            ("qwen2.5-7b", 7_615_616_512),
            ("qwen2.5-14b", 14_770_033_664),
            ("qwen2.5-32b", 32_763_876_352),
            ("qwen2.5-72b", 72_706_203_648),
            ("qwen3-0.6b", 596_049_920),
            ("qwen3-1.7b", 1_720_574_976),
            ("qwen3-4b", 4_022_468_096),
            ("qwen3-8b", 8_190_735_360),
            ("qwen3-14b", 14_768_307_200),
            ("qwen3-32b", 32_762_123_264),
            ("mistral-7b", 7_241_732_096),
            ("mixtral-8x7b", 46_702_792_704),
            ("qwen-7b", 7_721_324_544),
            ("qwen-14b", 14_167_290_880),
            ("qwen-72b", 72_287_920_128),
        ];
        for (name, parameters) in published {
            assert_eq!(Shape::preset(name).unwrap().num_parameters(), parameters, "{name}");
        }
        assert_eq!(Shape::preset("llama-1b"), Shape::preset("llama-3.2-1b"));
        for name in Shape::PRESETS {
            Shape::preset(name).unwrap().check().unwrap();
        }
    }

    #[test]
    fn hub_ids_have_presets() {
        for (id, preset) in [
            ("meta-llama/Llama-2-7b-hf", "llama-2-7b"),
            ("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3-8b"),
            ("meta-llama/Llama-3.2-1B-Instruct", "llama-3.2-1b"),
            ("Qwen/Qwen2.5-0.5B-Instruct", "qwen2.5-0.5b"),
            ("Qwen/Qwen3-4B-Base", "qwen3-4b"),
            ("mistralai/Mistral-7B-v0.1", "mistral-7b"),
        ] {
            assert_eq!(Shape::preset_of_hub_id(id), Some(preset), "{id}");
        }
        assert_eq!(Shape::preset_of_hub_id("mistralai/Mistral-7B-v0.3"), None);
        assert_eq!(Shape::preset_of_hub_id("llama-2-7b"), None);
    }

    /// Checkpoints from before there were families.
    #[test]
    fn shapes_without_a_family_are_llamas() {
        let shape = Shape::preset("llama-42m").unwrap();
        let mut json = serde_json::to_value(&shape).unwrap();
        for key in ["family", "sliding_window", "max_window_layers", "experts"] {
            assert!(json.as_object_mut().unwrap().remove(key).is_some(), "{key}");
        }
        assert_eq!(serde_json::from_value::<Shape>(json).unwrap(), shape);
    }

    /// Against counts by hand.
    #[test]
    fn operations_count_what_a_token_takes_part_in() {
        let near = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-12, "{a} {b}");
        let llama = Shape::preset("llama-2-7b").unwrap();
        let head = 32000.0 * 4096.0;
        let block = 4.0 * 4096.0 * 4096.0 + 3.0 * 4096.0 * 11008.0;
        near(llama.flops_per_token(1000), 6.0 * (32.0 * block + head) + 32.0 * 12.0 * 4096.0 * 500.0);
        let mixtral = Shape::preset("mixtral-8x7b").unwrap();
        let block = 2.0 * 4096.0 * (4096.0 + 1024.0) + 8.0 * 4096.0 + 2.0 * 3.0 * 4096.0 * 14336.0;
        near(mixtral.flops_per_token(1000), 6.0 * (32.0 * block + head) + 32.0 * 12.0 * 4096.0 * 500.0);
        // In the continuum, as without a window: 2 (6 - 2 / 2) / 6 of 6 positions instead of 3.
        let mistral = Shape { sliding_window: Some(2), max_window_layers: 31, ..llama.clone() };
        let difference = llama.flops_per_token(6) - mistral.flops_per_token(6);
        near(difference, 12.0 * 4096.0 * (3.0 - 2.0 * 5.0 / 6.0));
    }
}
