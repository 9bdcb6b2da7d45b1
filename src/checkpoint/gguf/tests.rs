//! Numbers against the package `gguf` (`tests/fixtures/make_gguf.py`).

use std::path::PathBuf;

use tch::{Kind, Tensor};

use super::file::GgufReader;
use super::quants::{dequantize, quantize};
use crate::checkpoint::safetensors;
use crate::checkpoint::source::TensorFile;
use crate::gguf::{Gguf, GgufDtype};

fn fixture(name: &str) -> PathBuf {
    testing::golden::fixture("gguf").join(name)
}

fn expected(file: &safetensors::SafetensorsReader, name: &str) -> Vec<f32> {
    let (shape, _) = file.info(name).unwrap();
    let t = Tensor::zeros([shape.iter().product::<i64>()], (Kind::Float, tch::Device::Cpu));
    file.read(name, 0, &t).unwrap();
    Vec::try_from(t).unwrap()
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn every_type_gives_the_numbers_that_ggml_gives() {
    let file = GgufReader(Gguf::open(&fixture("quants.gguf")).unwrap());
    let wanted = safetensors::SafetensorsReader::open(&fixture("quants.safetensors")).unwrap();
    for name in ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"] {
        let (shape, kind) = file.info(name).unwrap();
        let numel = shape.iter().product::<i64>() as usize;
        assert_eq!((kind, shape.len()), (Kind::Float, 2), "{name}");
        let wanted = expected(&wanted, name);
        // From any element on, and as many as one likes.
        for (first, n) in [(0, numel), (1, numel - 1), (31, 2), (numel / 2 - 7, 40), (numel - 1, 1), (5, 0)] {
            let mut bytes = vec![0; n * 4];
            file.read_bytes(name, first as i64, &mut bytes).unwrap();
            let numbers: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
            assert_eq!(bits(&numbers), bits(&wanted[first..first + n]), "{name}: {n} from {first} on");
        }
        let e = file.read_bytes(name, numel as i64, &mut [0; 4]).unwrap_err();
        assert!(e.message.contains("is shorter"), "{e}");
    }
}

#[test]
fn blocks_are_those_that_the_package_makes() {
    let file = Gguf::open(&fixture("quants.gguf")).unwrap();
    let numbers =
        expected(&safetensors::SafetensorsReader::open(&fixture("quants.safetensors")).unwrap(), "numbers");
    for dtype in [GgufDtype::Q8_0, GgufDtype::Q4_0, GgufDtype::Q4_1] {
        let info = file.tensors().iter().find(|t| t.name == format!("of {dtype}")).unwrap();
        let mut wanted = vec![0; dtype.bytes(info.numel()) as usize];
        file.read_blocks(info, 0, &mut wanted).unwrap();
        let mut blocks = Vec::new();
        quantize(dtype, &numbers, &mut blocks);
        assert_eq!(blocks, wanted, "{dtype}");
        // What is read of them is near.
        let mut back = vec![0.0; numbers.len()];
        dequantize(dtype, &blocks, &mut back);
        let most = |block: &[f32]| block.iter().fold(0f32, |m, x| m.max(x.abs()));
        for (block, back) in numbers.chunks(32).zip(back.chunks(32)) {
            let step = most(block) * if dtype == GgufDtype::Q8_0 { 1.0 / 127.0 } else { 2.0 / 15.0 };
            let off = most(&block.iter().zip(back).map(|(a, b)| a - b).collect::<Vec<_>>());
            // Half a step, but for what Q4_0 cuts off at its upper end, and the scale in float16, whose smallest is 2^-24.
            assert!(off <= step * 1.01 + 127.0 * 2f32.powi(-24), "{dtype}: {off} with steps of {step}");
        }
    }
}
