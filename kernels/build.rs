//! Compiles the C++ side against the libtorch that torch-sys was built with: the part for all machines into this crate,
//! the part that needs CUDA's symbols into a shared object that `cuda/shim.rs` embeds and opens when a GPU is asked for.

#![expect(
    clippy::disallowed_methods,
    reason = "cargo tells a build script by the environment what it must know"
)]

use std::path::{Path, PathBuf};
use std::{env, fs};

/// What kernels compiled at run time may include; embedded, so that this works where no CUDA headers are.
const NVRTC_HEADERS: [&str; 9] = [
    "cuda_bf16.h",
    "cuda_bf16.hpp",
    "cuda_fp16.h",
    "cuda_fp16.hpp",
    "cuda_fp8.h",
    "cuda_fp8.hpp",
    "nv/target",
    "nv/detail/__preprocessor",
    "nv/detail/__target_macros",
];

fn main() {
    println!("cargo:rerun-if-changed=cpp");
    println!("cargo:rerun-if-changed=build.rs");
    let lib = PathBuf::from(env::var("DEP_TCH_LIBTORCH_LIB").expect("torch-sys tells where libtorch is"));
    let torch = lib.parent().expect("libtorch's lib folder has a parent").to_path_buf();
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets OUT_DIR"));

    // No loops over numbers in it, only calls of the kernels of `rows_and_quant` and of libtorch.
    // -fopenmp for at::parallel_for, which is inline: it runs on libtorch's own thread pool, whose libgomp.so.1 is
    // found first by the run path.
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .pic(true)
        .warnings(false)
        .std("c++17")
        .opt_level(1)
        .flag("-fopenmp")
        .include("cpp")
        .include("cpp/comm/gloo_fwd")
        .include(torch.join("include"))
        .include(torch.join("include/torch/csrc/api/include"));
    // Beside each other: the shim takes as long as all else.
    std::thread::scope(|scope| {
        scope.spawn(|| cuda_shim(&build, &torch, &lib, &out));
        rows_and_quant();
        build.clone().file("cpp/all.cpp").compile("corral_kernels");
    });

    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    println!("cargo:rustc-link-lib=gomp");
    // For this package's own tests.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
}

/// Kernels on plain pointers, once per instruction set; nothing of the standard library in them (see cpp/ops/cpu_rows.h).
fn rows_and_quant() {
    for (source, prefix, contract) in [("ops/cpu_rows", "rows", "fast"), ("quant/cpu_quant", "quant", "off")]
    {
        for level in ["v2", "v3", "v4"] {
            let isa = format!("{prefix}_{level}");
            cc::Build::new()
                .cpp(true)
                .pic(true)
                .std("c++17")
                .opt_level(3)
                .flag(format!("-march=x86-64-{level}"))
                .flag_if_supported("-mprefer-vector-width=512")
                .flags(["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"])
                .flag(format!("-ffp-contract={contract}"))
                .include("cpp")
                .define("CORRAL_ISA", isa.as_str())
                .file(format!("cpp/{source}.cpp"))
                .compile(&isa);
        }
    }
}

/// Builds `libcorral_cuda.so` and collects NVRTC's headers in `out`. Where this libtorch or this machine lacks what is
/// needed, the files are empty and CORRAL_NO_CUDA says why; the run-time error repeats it.
fn cuda_shim(build: &cc::Build, torch: &Path, lib: &Path, out: &Path) {
    let shim = out.join("libcorral_cuda.so");
    let nvidia = torch.parent().unwrap_or(torch).join("nvidia");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    let cuda_home = PathBuf::from(env::var("CUDA_HOME").unwrap_or("/usr/local/cuda".into()));
    let cuda =
        [nvidia.join("cu13"), cuda_home].into_iter().find(|d| d.join("include/crt/host_config.h").exists());
    let nccl =
        [nvidia.join("nccl/include"), "/usr/include".into()].into_iter().find(|d| d.join("nccl.h").exists());

    let cudart = cuda
        .iter()
        .flat_map(|c| ["lib", "lib64"].map(|d| c.join(d).join("libcudart.so.13")))
        .find(|f| f.exists());

    let why = match (lib.join("libtorch_cuda.so").exists(), &cuda, &cudart, &nccl) {
        (false, ..) => "this libtorch has no CUDA (no libtorch_cuda.so)",
        (true, None, ..) => "CUDA's headers (crt/host_config.h) were not found when corral was built",
        (true, _, None, _) => {
            "CUDA 13 (libcudart.so.13 beside its headers) was not found when corral was built"
        }
        (true, .., None) => "NCCL's header (nccl.h) was not found when corral was built",
        _ => "",
    };
    println!("cargo:rustc-env=CORRAL_NO_CUDA={why}");
    let include = cuda.as_ref().map(|c| c.join("include"));
    embed_headers(include.as_deref(), out);
    let (Some(cuda), Some(cudart), Some(nccl), "") = (cuda, cudart, nccl, why) else {
        if lib.join("libtorch_cuda.so").exists() {
            println!("cargo:warning=no CUDA in this build: {why}");
        }
        fs::write(&shim, "").expect("write into OUT_DIR");
        return;
    };

    let mut command = build.get_compiler().to_command();
    command
        .args(["-shared", "-w", "cpp/cuda/cuda_shim.cpp", "-o"])
        .arg(&shim)
        .arg("-I")
        .arg(cuda.join("include"))
        .arg("-I")
        .arg(cuda.join("include/cccl"))
        .arg("-I")
        .arg(nccl)
        .arg("-L")
        .arg(lib)
        .args(["-ltorch_cuda", "-lc10_cuda", "-ltorch_cpu", "-lc10"])
        .arg(cudart)
        .arg("-Wl,--no-undefined");
    // It takes half a minute and seldom changes: not again when only another C++ file did.
    let stamp = out.join("cuda_shim.stamp");
    let line = format!("{command:?}");
    let sources = ["cpp/cuda/cuda_shim.cpp", "cpp/abi.h", "cpp/guard.h"].map(Path::new);
    if fs::read_to_string(&stamp).is_ok_and(|s| s == line) && sources.iter().all(|s| newer(&shim, s)) {
        return;
    }
    let status = command.status().expect("the C++ compiler starts");
    assert!(status.success(), "cpp/cuda/cuda_shim.cpp does not compile: {line}");
    fs::write(stamp, line).expect("write into OUT_DIR");
}

fn newer(file: &Path, than: &Path) -> bool {
    let time = |p: &Path| fs::metadata(p).and_then(|m| m.modified());
    matches!((time(file), time(than)), (Ok(a), Ok(b)) if a > b)
}

/// Writes `nvrtc_headers.rs`: the list of (name, text) that `cuda/nvrtc.rs` hands to NVRTC.
fn embed_headers(include: Option<&Path>, out: &Path) {
    let mut list = String::from("&[\n");
    for name in NVRTC_HEADERS {
        let candidates = include.map(|i| [i.join(name), i.join("cccl").join(name)]);
        let Some(path) = candidates.into_iter().flatten().find(|p| p.exists()) else { continue };
        let copy = out.join(name.replace('/', "_"));
        fs::copy(&path, &copy).expect("copy a CUDA header into OUT_DIR");
        list += &format!("    ({name:?}, include_str!({:?})),\n", copy.display().to_string());
    }
    fs::write(out.join("nvrtc_headers.rs"), list + "]\n").expect("write into OUT_DIR");
}
