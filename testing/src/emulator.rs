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
        let (libraries, operations): (Vec<PathBuf>, PathBuf) = std::thread::scope(|scope| {
            let operations = scope.spawn(|| operations(&root, &folder));
            let libraries = sources::SOURCES.iter().map(|s| kernels_of(&root, &folder, s)).collect();
            (libraries, operations.join().unwrap())
        });
        #[allow(unsafe_code)]
        // SAFETY: built of these sources, in their order.
        unsafe { emulator::install(&libraries, &operations) }.unwrap();
    });
}

/// The kernels of one source.
fn kernels_of(root: &Path, folder: &Path, source: &sources::Source) -> PathBuf {
    let cases: String = source.kernels.iter().map(|k| format!("  CASE({k})\n")).collect();
    let program = format!(
        "#include \"emulator.h\"\n#include \"{}\"\n\
         #define CASE(k) if (!strcmp(name, #k)) return emulator::launch(k, grid, block, shared, args);\n\
         extern \"C\" int corral_emulate(const char* name, const unsigned* grid, const unsigned* block, size_t shared, \
         void** args) {{\n{cases}  return 2;\n}}\n",
        source.name
    );
    // Products and sums are contracted, as NVRTC does.
    let mut options = vec!["-O2", "-ffp-contract=fast", "-fno-math-errno", "-fno-strict-aliasing"];
    if std::is_x86_feature_detected!("fma") {
        options.push("-mfma");
    }
    options.extend(source.options);
    let headers = [
        "testing/emulator/emulator.h",
        "testing/emulator/cuda_bf16.h",
        "testing/emulator/cuda_fp8.h",
        "kernels/cuda/common.cuh",
    ];
    let read = |file: &&str| std::fs::read_to_string(root.join(file)).unwrap();
    let parts: String = headers.iter().map(read).collect();
    let includes = ["testing/emulator", "kernels/cuda"].map(|dir| root.join(dir));
    let stem = source.name.trim_end_matches(".cu");
    compile(folder, stem, &program, &options, &includes, &format!("{}{parts}", source.text))
}

/// libtorch's operations for CUDA, for the CPU.
fn operations(root: &Path, folder: &Path) -> PathBuf {
    let program = std::fs::read_to_string(root.join("testing/emulator/flash.cpp")).unwrap();
    let torch = kernels::cuda::libtorch_dir().unwrap().join("../include");
    let includes = [torch.join("torch/csrc/api/include"), torch];
    compile(folder, "flash", &program, &["-O1"], &includes, "")
}

/// The shared object of a program, which is compiled once: its name says what it is made of, `parts` is what it includes.
fn compile(
    folder: &Path,
    stem: &str,
    program: &str,
    options: &[&str],
    includes: &[PathBuf],
    parts: &str,
) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    (program, options, includes, parts).hash(&mut hasher);
    let name = format!("{stem}-{:016x}", hasher.finish());
    let done = folder.join(format!("{name}.so"));
    if done.exists() {
        return done;
    }
    let unfinished = folder.join(format!("{name}.{}", std::process::id()));
    let cpp = folder.join(format!("{name}.{}.cpp", std::process::id()));
    std::fs::write(&cpp, program).unwrap();
    let compiler = std::env::var("CXX").unwrap_or("c++".into());
    let mut command = Command::new(&compiler);
    command.args(["-std=c++17", "-fPIC", "-shared", "-w"]).args(options);
    for include in includes {
        command.arg("-I").arg(include);
    }
    let status = command.arg(&cpp).arg("-o").arg(&unfinished).status().unwrap();
    assert!(status.success(), "{compiler} does not compile {}", cpp.display());
    std::fs::rename(&unfinished, &done).unwrap();
    std::fs::remove_file(&cpp).unwrap();
    done
}
