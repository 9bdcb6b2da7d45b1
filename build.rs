//! Run paths: the binaries find libtorch by themselves, with no LD_LIBRARY_PATH.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Where this build found libtorch (told by torch-sys), then where an image or an unpacked release keeps it.
    if let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
    }
    for path in ["$ORIGIN/../lib/torch/lib", "$ORIGIN/../../.libtorch/torch/lib"] {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{path}");
    }
}
