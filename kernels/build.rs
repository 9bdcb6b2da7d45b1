//! Compiles the C++ side against the libtorch that torch-sys was built with.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=cpp");
    let lib =
        PathBuf::from(std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys tells where libtorch is"));
    let torch = lib.parent().expect("libtorch's lib folder has a parent");
    cc::Build::new()
        .cpp(true)
        .pic(true)
        .warnings(false)
        .std("c++17")
        .opt_level(3)
        .flag("-fopenmp")
        .include(torch.join("include"))
        .include(torch.join("include/torch/csrc/api/include"))
        .file("cpp/ops.cpp")
        .compile("corral_kernels");
    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
}
