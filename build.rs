//! Run paths: the binaries find libtorch by themselves, with no LD_LIBRARY_PATH. And a fingerprint of the sources, by which
//! ranks tell whether they are the same program.

use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let mut hash = 0xcbf2_9ce4_8422_2325;
    for name in ["Cargo.lock", "src", "kernels/src", "kernels/cpp"] {
        println!("cargo:rerun-if-changed={name}");
        add(Path::new(name), &mut hash);
    }
    println!("cargo:rustc-env=CORRAL_SOURCE={hash:016x}");
    // Where this build found libtorch (told by torch-sys), then where an image or an unpacked release keeps it.
    #[expect(clippy::disallowed_methods, reason = "how cargo tells a build script of its dependencies")]
    if let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
    }
    for path in ["$ORIGIN/../lib/torch/lib", "$ORIGIN/../../.libtorch/torch/lib"] {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{path}");
    }
}

/// Adds a file, or all below a folder, by name: FNV-1a. What cannot be read is told by the compiler.
fn add(path: &Path, hash: &mut u64) {
    let mut take = |bytes: &[u8]| {
        bytes.iter().for_each(|byte| *hash = (*hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    };
    take(path.to_string_lossy().as_bytes());
    match std::fs::read_dir(path) {
        Err(_) => take(&std::fs::read(path).unwrap_or_default()),
        Ok(entries) => {
            let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
            paths.sort();
            paths.iter().for_each(|path| add(path, hash));
        }
    }
}
