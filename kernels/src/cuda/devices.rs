//! What is known of a GPU: its properties, its memory, and how fast its data sheet says that it multiplies.

use tch::Kind;

/// Properties of a GPU.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceInfo {
    /// As the driver names it: `NVIDIA H200`.
    pub name: String,
    /// The same on all hosts for one GPU, and different for two.
    pub uuid: [u8; 16],
    /// Compute capability: (9, 0) is sm_90.
    pub capability: (i32, i32),
    /// Streaming multiprocessors.
    pub num_processors: i32,
    /// All of its memory.
    pub memory_bytes: i64,
}

/// Part of a device's name, and the peak of its dense matrix products in TFLOP/s: bfloat16 with float32 sums on tensor cores,
/// and float32 (not TF32), as NVIDIA's data sheets state them. The first that is found counts.
const PEAK_TFLOPS: &[(&str, f64, f64)] = &[
    ("GB200", 2500.0, 80.0),
    ("B200", 2250.0, 75.0),
    ("GH200", 989.0, 67.0),
    ("H200 NVL", 835.0, 60.0),
    ("H200", 989.0, 67.0),
    ("H100 NVL", 835.0, 60.0),
    ("H100 PCIe", 756.0, 51.0),
    ("H100", 989.0, 67.0),
    ("H800 PCIe", 756.0, 51.0),
    ("H800", 989.0, 67.0),
    ("A100", 312.0, 19.5),
    ("A800", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 30.3),
    ("A10G", 70.0, 31.2),
    ("A10", 125.0, 31.2),
    ("RTX 6000 Ada", 364.0, 91.1),
    ("RTX A6000", 154.8, 38.7),
    ("RTX 5090", 209.5, 104.8),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 3090 Ti", 80.0, 40.0),
    ("RTX 3090", 71.0, 35.6),
];

/// Peak FLOP/s of dense matrix products on a device of this name (see [`DeviceInfo::name`]); none where it is not known, as
/// for parts of a device (MIG) and the slower chips of laptops.
pub fn peak_flops(device_name: &str, kind: Kind) -> Option<f64> {
    let other = ["MIG", "Laptop", "Max-Q", "RTX 4090 D", "RTX 5090 D"];
    if other.iter().any(|o| device_name.contains(o)) {
        return None;
    }
    // Words, so that L40 is no L4 and A1000 no A100.
    let words = |s: &str| s.split([' ', '-']).map(str::to_owned).collect::<Vec<_>>();
    let name = words(device_name);
    let known = |part: &str| name.windows(words(part).len()).any(|w| w == words(part));
    let (_, bfloat16, float32) = PEAK_TFLOPS.iter().find(|(part, ..)| known(part))?;
    match kind {
        Kind::BFloat16 => Some(bfloat16 * 1e12),
        Kind::Float => Some(float32 * 1e12),
        _ => None,
    }
}

/// Of libtorch's caching allocator on one device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// In tensors now.
    pub allocated: i64,
    /// The most that tensors took.
    pub peak_allocated: i64,
    /// Taken from the driver now.
    pub reserved: i64,
    /// The most that was taken from the driver.
    pub peak_reserved: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_of_known_devices_only() {
        let bf16 = |name| peak_flops(name, Kind::BFloat16);
        assert_eq!(bf16("NVIDIA H100 80GB HBM3"), Some(989e12));
        assert_eq!(bf16("NVIDIA H100 PCIe"), Some(756e12));
        assert_eq!(bf16("NVIDIA H200"), Some(989e12));
        assert_eq!(bf16("NVIDIA GB200"), Some(2500e12));
        assert_eq!(bf16("NVIDIA A100-SXM4-80GB"), Some(312e12));
        assert_eq!(bf16("NVIDIA A100-PCIE-40GB"), Some(312e12));
        assert_eq!(bf16("NVIDIA L40"), Some(181e12));
        assert_eq!(bf16("NVIDIA L4"), Some(121e12));
        assert_eq!(bf16("NVIDIA GeForce RTX 3090"), Some(71e12));
        assert_eq!(peak_flops("NVIDIA H200", Kind::Float), Some(67e12));
        for name in [
            "NVIDIA RTX A1000",
            "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
            "NVIDIA GeForce RTX 4090 Laptop GPU",
            "",
        ] {
            assert_eq!(bf16(name), None, "{name}");
        }
        assert_eq!(peak_flops("NVIDIA H200", Kind::Double), None);
    }
}
