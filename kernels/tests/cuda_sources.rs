//! Every CUDA kernel compiles, on a machine with no GPU, for the architectures of A100, H100 and B200.

use kernels::cuda::{nvrtc, sources};

#[test]
fn every_source_compiles() {
    for source in &sources::SOURCES {
        for arch in ["sm_80", "sm_90", "sm_100"] {
            let what = format!("{} {:?} for {arch}", source.name, source.options);
            let cubin = nvrtc::compile(source.name, source.text, arch, source.options).expect(&what);
            for kernel in source.kernels {
                let symbol = format!(".text.{kernel}\0");
                assert!(cubin.windows(symbol.len()).any(|w| w == symbol.as_bytes()), "{what}: no {kernel}");
            }
        }
    }
}

/// What is launched by name is in the list, and what is in the list is in the source.
#[test]
fn lists_of_kernels_are_complete() {
    for source in &sources::SOURCES {
        let defined: Vec<&str> = source
            .text
            .split("extern \"C\" __global__ void ")
            .skip(1)
            .map(|rest| match rest.strip_prefix("__launch_bounds__(") {
                Some(rest) => rest.split_once(") ").unwrap().1,
                None => rest,
            })
            .map(|rest| rest.split('(').next().unwrap_or(""))
            .collect();
        assert_eq!(defined, source.kernels, "{}", source.name);
    }
}
