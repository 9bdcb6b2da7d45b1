//! The CUDA C++ of this package, which [`super::nvrtc`] compiles at run time.

/// CUDA C++ that is compiled as one: its file, options, and kernels.
pub struct Source {
    /// The file in `cuda/`, for messages.
    pub name: &'static str,
    /// What the file holds.
    pub text: &'static str,
    /// As nvcc's: `-DNAME=VALUE`.
    pub options: &'static [&'static str],
    /// The names of its kernels (`extern "C"`), in the order of the file.
    pub kernels: &'static [&'static str],
}

const ROWS: &str = include_str!("../../cuda/rows.cu");
const ROW_KERNELS: &[&str] = &[
    "rms_norm",
    "rms_apply",
    "rms_backward",
    "add_columns",
    "rope",
    "swiglu",
    "swiglu_backward",
    "log_softmax",
    "dropout",
    "accumulate",
    "embedding_backward",
    "add_runs",
];

const QUANT: &str = include_str!("../../cuda/quant.cu");
const QUANT_KERNELS: &[&str] = &["nf4_quantize", "nf4_dequantize", "int8_quantize", "int8_dequantize"];

const DECODE: &str = include_str!("../../cuda/decode.cu");
const DECODE_KERNELS: &[&str] = &["decode_attention", "decode_combine"];

const SAMPLE: &str = include_str!("../../cuda/sample.cu");

/// All there is to compile.
pub const SOURCES: [Source; 10] = [
    Source { name: "rows.cu", text: ROWS, options: &["-DDTYPE=float"], kernels: ROW_KERNELS },
    Source { name: "rows.cu", text: ROWS, options: &["-DDTYPE=bf16"], kernels: ROW_KERNELS },
    Source {
        name: "optim.cu",
        text: include_str!("../../cuda/optim.cu"),
        options: &[],
        kernels: &["adamw", "adamw8", "sum_squares", "add_doubles"],
    },
    Source { name: "quant.cu", text: QUANT, options: &["-DDTYPE=float"], kernels: QUANT_KERNELS },
    Source { name: "quant.cu", text: QUANT, options: &["-DDTYPE=bf16"], kernels: QUANT_KERNELS },
    Source { name: "decode.cu", text: DECODE, options: &["-DDTYPE=float"], kernels: DECODE_KERNELS },
    Source { name: "decode.cu", text: DECODE, options: &["-DDTYPE=bf16"], kernels: DECODE_KERNELS },
    Source {
        name: "float8.cu",
        text: include_str!("../../cuda/float8.cu"),
        options: &[],
        kernels: &["float8_amax", "float8_transpose", "float8_cast"],
    },
    Source { name: "sample.cu", text: SAMPLE, options: &["-DDTYPE=float"], kernels: &["sample"] },
    Source { name: "sample.cu", text: SAMPLE, options: &["-DDTYPE=bf16"], kernels: &["sample"] },
];

// Positions in SOURCES.
pub(crate) const ROWS_FLOAT: usize = 0;
pub(crate) const ROWS_BF16: usize = 1;
pub(crate) const OPTIM: usize = 2;
pub(crate) const QUANT_FLOAT: usize = 3;
pub(crate) const QUANT_BF16: usize = 4;
pub(crate) const DECODE_FLOAT: usize = 5;
pub(crate) const DECODE_BF16: usize = 6;
pub(crate) const FLOAT8: usize = 7;
pub(crate) const SAMPLE_FLOAT: usize = 8;
pub(crate) const SAMPLE_BF16: usize = 9;
