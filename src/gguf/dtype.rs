//! What the elements of a tensor are stored as.

use std::fmt;

use crate::error::{Error, Result};

/// A dtype of ggml's that can be read (`ggml_type`); its elements lie in blocks.
#[allow(non_camel_case_types)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GgufDtype {
    /// float32
    F32,
    /// float16
    F16,
    /// bfloat16
    BF16,
    /// float64
    F64,
    /// 4 bits with a scale for each 32 elements.
    Q4_0,
    /// 4 bits with a scale and a minimum for each 32 elements.
    Q4_1,
    /// 5 bits with a scale for each 32 elements.
    Q5_0,
    /// 5 bits with a scale and a minimum for each 32 elements.
    Q5_1,
    /// 8 bits with a scale for each 32 elements.
    Q8_0,
    /// 2 bits in blocks of 256, with a scale and a minimum for each 16 elements.
    Q2_K,
    /// 3 bits in blocks of 256, with a scale for each 16 elements.
    Q3_K,
    /// 4 bits in blocks of 256, with a scale and a minimum for each 32 elements.
    Q4_K,
    /// 5 bits in blocks of 256, with a scale and a minimum for each 32 elements.
    Q5_K,
    /// 6 bits in blocks of 256, with a scale for each 16 elements.
    Q6_K,
}

use GgufDtype::*;

/// Id in files, elements of a block, bytes of a block.
const TABLE: [(GgufDtype, u32, usize, usize); 14] = [
    (F32, 0, 1, 4),
    (F16, 1, 1, 2),
    (Q4_0, 2, 32, 18),
    (Q4_1, 3, 32, 20),
    (Q5_0, 6, 32, 22),
    (Q5_1, 7, 32, 24),
    (Q8_0, 8, 32, 34),
    (Q2_K, 10, 256, 84),
    (Q3_K, 11, 256, 110),
    (Q4_K, 12, 256, 144),
    (Q5_K, 13, 256, 176),
    (Q6_K, 14, 256, 210),
    (F64, 28, 1, 8),
    (BF16, 30, 1, 2),
];

/// Names of those that cannot be read.
const OTHERS: [(u32, &str); 23] = [
    (4, "Q4_2"),
    (5, "Q4_3"),
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
    (42, "Q2_0"),
];

impl GgufDtype {
    /// # Errors
    /// Of kind Data, with the type's name where it has one: it cannot be read.
    pub fn of_id(id: u32) -> Result<GgufDtype> {
        if let Some((dtype, ..)) = TABLE.iter().find(|(_, known, ..)| *known == id) {
            return Ok(*dtype);
        }
        let name = match OTHERS.iter().find(|(other, _)| *other == id) {
            Some((_, name)) => (*name).to_string(),
            None => format!("{id}, which is not known"),
        };
        let built: Vec<String> = TABLE.iter().map(|(dtype, ..)| dtype.to_string()).collect();
        Err(Error::data(format!("its type is {name}; built are {}", built.join(", "))))
    }

    fn row(self) -> &'static (GgufDtype, u32, usize, usize) {
        TABLE.iter().find(|(dtype, ..)| *dtype == self).expect("all are in the table")
    }

    /// Its number in files (`ggml_type`).
    pub fn id(self) -> u32 {
        self.row().1
    }

    /// Elements of a block.
    pub fn block_len(self) -> usize {
        self.row().2
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.row().3
    }

    /// Bytes of so many elements, which must be whole blocks.
    pub fn bytes(self, numel: i64) -> u64 {
        numel as u64 / self.block_len() as u64 * self.block_bytes() as u64
    }
}

impl fmt::Display for GgufDtype {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{self:?}")
    }
}
