//! CUDA's kernels on the CPU: builds the emulator (testing/emulator) with the machine's C++ compiler and installs it.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use kernels::cuda::{emulator, sources};

/// From now on this process takes CPU tensors for a GPU's. The first time it compiles, for some seconds.
pub fn install() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let folder = root.join("target/emulator");
        std::fs::create_dir_all(&folder).unwrap();
        let libraries: Vec<PathBuf> = std::thread::scope(|scope| {
            let builds: Vec<_> =
                sources::SOURCES.iter().map(|s| scope.spawn(|| build(&root, &folder, s))).collect();
            builds.into_iter().map(|b| b.join().unwrap()).collect()
        });
        #[allow(unsafe_code)]
        // SAFETY: built of these sources, in their order.
        unsafe { emulator::install(&libraries) }.unwrap();
    });
}

/// The shared object of one source, by what it is made of.
fn build(root: &Path, folder: &Path, source: &sources::Source) -> PathBuf {
    let cases: String = source.kernels.iter().map(|k| format!("  CASE({k})\n")).collect();
    let program = format!(
        "#include \"emulator.h\"\n#include \"{}\"\n\
         #define CASE(k) if (!strcmp(name, #k)) return emulator::launch(k, grid, block, shared, args);\n\
         extern \"C\" int corral_emulate(const char* name, const unsigned* grid, const unsigned* block, size_t shared, \
         void** args) {{\n{cases}  return 2;\n}}\n",
        source.name
    );
    // Products and sums are contracted, as NVRTC does.
    let mut options = vec!["-std=c++17", "-O2", "-fPIC", "-shared", "-w", "-march=native", "-ffp-contract=fast"];
    options.extend(["-fno-math-errno", "-fno-strict-aliasing"]);
    options.extend(source.options);
    let mut hasher = DefaultHasher::new();
    (&program, &options, source.text).hash(&mut hasher);
    for file in ["testing/emulator/emulator.h", "testing/emulator/cuda_bf16.h", "kernels/cuda/common.cuh"] {
        std::fs::read_to_string(root.join(file)).unwrap().hash(&mut hasher);
    }
    let stem = source.name.trim_end_matches(".cu");
    let done = folder.join(format!("{stem}-{:016x}.so", hasher.finish()));
    if done.exists() {
        return done;
    }
    let unfinished = folder.join(format!("{stem}-{:016x}-{}", hasher.finish(), std::process::id()));
    let cpp = unfinished.with_extension("cpp");
    std::fs::write(&cpp, program).unwrap();
    let compiler = std::env::var("CXX").unwrap_or("c++".into());
    let status = Command::new(&compiler)
        .args(&options)
        .arg("-I")
        .arg(root.join("testing/emulator"))
        .arg("-I")
        .arg(root.join("kernels/cuda"))
        .arg(&cpp)
        .arg("-o")
        .arg(&unfinished)
        .status()
        .unwrap();
    assert!(status.success(), "{compiler} does not compile {}", cpp.display());
    std::fs::rename(&unfinished, &done).unwrap();
    std::fs::remove_file(&cpp).unwrap();
    done
}
