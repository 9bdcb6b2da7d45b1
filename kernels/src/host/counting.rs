//! An allocator that counts, for tests that show what a reader of untrusted files allocates:
//!
//! ```ignore
//! #[global_allocator]
//! static ALLOCATOR: kernels::counting::Counting = kernels::counting::Counting;
//! ```

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::abi::{corral_allocations_begin, corral_allocations_end};
use crate::error::{Result, check};

/// What tensors on the CPU took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tensors {
    /// The most bytes at once.
    pub peak: i64,
    /// Bytes that are still there.
    pub live: i64,
}

/// Counts the memory of the tensors that `f` makes on this thread.
pub fn tensors<T>(f: impl FnOnce() -> T) -> Result<(T, Tensors)> {
    // SAFETY: the counter belongs to this thread, and is taken away below.
    check(unsafe { corral_allocations_begin() })?;
    let result = f();
    let (mut peak, mut live) = (0, 0);
    // SAFETY: writes two numbers; fails where no counter is there.
    check(unsafe { corral_allocations_end(&mut peak, &mut live) })?;
    Ok((result, Tensors { peak, live }))
}

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, with the bytes of all threads counted.
pub struct Counting;

/// Bytes allocated now.
pub fn live() -> usize {
    LIVE.load(Relaxed)
}

/// The most bytes that were allocated at once since [`reset_peak`].
pub fn peak() -> usize {
    PEAK.load(Relaxed)
}

/// [`peak`] begins again, from what is allocated now.
pub fn reset_peak() {
    PEAK.store(live(), Relaxed);
}

fn add(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Relaxed) + bytes;
    PEAK.fetch_max(live, Relaxed);
}

// SAFETY: every call goes to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Old and new may exist at once.
        add(size);
        // SAFETY: the caller's promises are passed on.
        let moved = unsafe { System.realloc(pointer, layout, size) };
        LIVE.fetch_sub(layout.size(), Relaxed);
        moved
    }
}
