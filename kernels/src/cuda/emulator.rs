//! In place of a GPU, for tests: CUDA's kernels run on the CPU. Once [`install`]ed, tensors of the CPU take the GPU's path, the
//! launches and their arguments included. The emulator itself is the tests' (testing/emulator).

use std::collections::BTreeMap;
use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use libloading::os::unix::{RTLD_LOCAL, RTLD_NOW};
use tch::Tensor;

use super::library::dlopen;
use super::modules::Arg;
use super::sources::SOURCES;
use crate::error::{Error, Result, c_string};

/// Runs a kernel of a library. 0: done; 1: threads of a block wait for each other at different places; 2: no such kernel.
type Launch = unsafe extern "C" fn(
    name: *const c_char,
    grid: *const u32,
    block: *const u32,
    shared_bytes: usize,
    args: *mut *mut c_void,
) -> c_int;

static LIBRARIES: OnceLock<Vec<Launch>> = OnceLock::new();

/// Takes CPU tensors for a GPU's from now on. `libraries`: shared objects of [`SOURCES`], in their order, each of which defines
/// `corral_emulate`; `operations`: one that gives libtorch for the CPU what it has for CUDA alone.
///
/// # Safety
/// The libraries must be those that the tests' emulator built of these sources.
pub unsafe fn install(libraries: &[PathBuf], operations: &Path) -> Result<()> {
    if libraries.len() != SOURCES.len() {
        return Err(Error::new(format!("{} libraries for {} sources", libraries.len(), SOURCES.len())));
    }
    std::mem::forget(dlopen(&operations.to_string_lossy(), RTLD_NOW | RTLD_LOCAL)?);
    let mut found = Vec::new();
    for path in libraries {
        let library = dlopen(&path.to_string_lossy(), RTLD_NOW | RTLD_LOCAL)?;
        // SAFETY: the caller's promise; the library is never closed.
        let launch = unsafe { library.get::<Launch>(b"corral_emulate") }
            .map_err(|e| Error::new(format!("{}: {e}", path.display())))?;
        found.push(*launch);
        std::mem::forget(library);
    }
    LIBRARIES.get_or_init(|| found);
    Ok(())
}

/// Whether CPU tensors take the GPU's path.
pub fn is_installed() -> bool {
    LIBRARIES.get().is_some()
}

/// Where a kernel's tensors lie while it runs: copies that end where memory ends, so that what is read or written behind a
/// tensor ends the test.
struct Guarded {
    /// By the first address of the tensors; those that overlap are one piece.
    pieces: BTreeMap<usize, Piece>,
}

struct Piece {
    bytes: usize,
    map: *mut c_void,
    map_bytes: usize,
    /// The copy.
    at: usize,
}

const PAGE: usize = 4096;

impl Guarded {
    fn new(args: &[Arg]) -> Result<Guarded> {
        let mut spans: Vec<(usize, usize)> = args
            .iter()
            .filter_map(|a| match a {
                Arg::Tensor(t) => Some((t.data_ptr() as usize, bytes(t))),
                _ => None,
            })
            .collect();
        spans.sort_unstable();
        let mut pieces: BTreeMap<usize, Piece> = BTreeMap::new();
        let mut joined: Vec<(usize, usize)> = Vec::new();
        for (start, bytes) in spans {
            match joined.last_mut() {
                Some((s, b)) if start < *s + *b => *b = (*b).max(start + bytes - *s),
                _ => joined.push((start, bytes)),
            }
        }
        for (start, bytes) in joined {
            let map_bytes = bytes.next_multiple_of(PAGE) + 2 * PAGE;
            // SAFETY: a new mapping.
            let map = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    map_bytes,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                )
            };
            if map == libc::MAP_FAILED {
                return Err(Error::new("emulator: no memory"));
            }
            let end = map as usize + map_bytes - PAGE;
            // As the tensor lies within 16 bytes, which decides how kernels load.
            let mut at = end - bytes;
            at -= (at + 16 - start % 16) % 16;
            // SAFETY: the last page of the mapping; `bytes` fit before it, and the tensor has as many.
            unsafe {
                libc::mprotect(end as *mut c_void, PAGE, libc::PROT_NONE);
                std::ptr::copy_nonoverlapping(start as *const u8, at as *mut u8, bytes);
            }
            pieces.insert(start, Piece { bytes, map, map_bytes, at });
        }
        Ok(Guarded { pieces })
    }

    fn address(&self, t: &Tensor) -> u64 {
        let at = t.data_ptr() as usize;
        self.pieces.range(..=at).next_back().map_or(0, |(start, piece)| piece.at + (at - start)) as u64
    }

    fn copy_back(&self) {
        for (start, piece) in &self.pieces {
            // SAFETY: as many bytes as were copied from there.
            unsafe {
                std::ptr::copy_nonoverlapping(piece.at as *const u8, *start as *mut u8, piece.bytes);
            }
        }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        for piece in self.pieces.values() {
            // SAFETY: mapped above, unmapped once.
            unsafe { libc::munmap(piece.map, piece.map_bytes) };
        }
    }
}

fn bytes(t: &Tensor) -> usize {
    t.numel() * t.kind().elt_size_in_bytes()
}

/// Runs a kernel of `SOURCES[source]` to its end.
///
/// # Safety
/// As for a launch on a GPU.
pub(super) unsafe fn launch(
    source: usize,
    name: &str,
    grid: u32,
    block: [u32; 2],
    shared_bytes: usize,
    args: &[Arg],
) -> Result<()> {
    // The emulator has one state.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let launch = LIBRARIES.get().ok_or_else(|| Error::new("no emulator"))?[source];
    let guarded = Guarded::new(args)?;
    let mut values: Vec<u64> = args.iter().map(|a| a.bits(|t| guarded.address(t))).collect();
    let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|v| (v as *mut u64).cast()).collect();
    let c_name: CString = c_string(name)?;
    let (grid, block) = ([grid, 1, 1], [block[0], block[1], 1]);
    // SAFETY: the caller's promise, and `install`'s.
    let code = unsafe {
        launch(c_name.as_ptr(), grid.as_ptr(), block.as_ptr(), shared_bytes, pointers.as_mut_ptr())
    };
    guarded.copy_back();
    match code {
        0 => Ok(()),
        1 => Err(Error::new(format!("{name}: threads of a block wait for each other at different places"))),
        _ => Err(Error::new(format!("{name}: the emulator has no such kernel"))),
    }
}
