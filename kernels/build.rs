//! Compiles the C++ side against the libtorch that torch-sys was built with.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=cpp");
    println!("cargo:rerun-if-changed=build.rs");
    let lib = PathBuf::from(
        std::env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys tells where libtorch is"),
    );
    let torch = lib.parent().expect("libtorch's lib folder has a parent");

    // The row kernels, once per instruction set; nothing of the standard library in them (see cpu_rows.h).
    for (isa, arch) in [("rows_v2", "x86-64-v2"), ("rows_v3", "x86-64-v3"), ("rows_v4", "x86-64-v4")] {
        cc::Build::new()
            .cpp(true)
            .pic(true)
            .std("c++17")
            .opt_level(3)
            .flag(format!("-march={arch}"))
            .flag_if_supported("-mprefer-vector-width=512")
            .flags(["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"])
            .define("CORRAL_ISA", isa)
            .file("cpp/cpu_rows.cpp")
            .compile(isa);
    }

    // -fopenmp for at::parallel_for, which is inline: it runs on libtorch's own thread pool, whose libgomp.so.1 is
    // found first by the run path.
    cc::Build::new()
        .cpp(true)
        .pic(true)
        .warnings(false)
        .std("c++17")
        .opt_level(2)
        .flag("-fopenmp")
        .include(torch.join("include"))
        .include(torch.join("include/torch/csrc/api/include"))
        .file("cpp/ops.cpp")
        .compile("corral_kernels");
    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    println!("cargo:rustc-link-lib=gomp");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display()); // for this package's tests
}
