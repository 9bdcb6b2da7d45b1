//! Files mapped into memory, read-only. Where such a file is shortened and what is gone is read, the kernel raises SIGBUS: this
//! process then ends with a message of the caller's, which names the file.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use memmap2::Mmap;

/// Exit code of a process that reads a mapped file beyond its end, because the file was shortened: unusable input data.
const EXIT_CODE: i32 = 3;

/// The bytes of a file.
#[derive(Debug)]
pub struct Map {
    bytes: Mmap,
    entry: &'static Entry,
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

/// A mapped range, as the signal's handler looks it up. Entries stay for ever and are used again.
#[derive(Debug, Default)]
struct Entry {
    begin: AtomicUsize,
    end: AtomicUsize,
    message: AtomicPtr<u8>,
    length: AtomicUsize,
    next: AtomicPtr<Entry>,
}

static FIRST: AtomicPtr<Entry> = AtomicPtr::new(null_mut());
static FREE: Mutex<Vec<&'static Entry>> = Mutex::new(Vec::new());

/// Maps the whole of `file` for reading; an empty file gives an empty map. `lost` is written to stderr, and the process ends
/// with exit code 3, where bytes are read by which the file has been shortened meanwhile.
pub fn map_file(file: &File, lost: &str) -> io::Result<Map> {
    take_sigbus()?;
    // SAFETY: the map is read-only and its bytes are plain data, valid whatever they are and become; the signal that tells of
    // bytes that are gone ends the process.
    let bytes = unsafe { Mmap::map(file)? };
    let entry = FREE.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_else(|| {
        let entry: &'static Entry = Box::leak(Box::default());
        let mut first = FIRST.load(Ordering::Acquire);
        loop {
            entry.next.store(first, Ordering::Relaxed);
            let new = std::ptr::from_ref(entry).cast_mut();
            match FIRST.compare_exchange(first, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return entry,
                Err(other) => first = other,
            }
        }
    });
    // The handler may look at any time, so that a message is never freed.
    let message: &'static [u8] = Box::leak(lost.as_bytes().into());
    entry.message.store(message.as_ptr().cast_mut(), Ordering::Relaxed);
    entry.length.store(message.len(), Ordering::Relaxed);
    entry.begin.store(bytes.as_ptr() as usize, Ordering::Relaxed);
    entry.end.store(bytes.as_ptr() as usize + bytes.len(), Ordering::Release);
    Ok(Map { bytes, entry })
}

impl Drop for Map {
    fn drop(&mut self) {
        self.entry.end.store(0, Ordering::Release);
        FREE.lock().unwrap_or_else(PoisonError::into_inner).push(self.entry);
    }
}

/// What SIGBUS did before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

fn take_sigbus() -> io::Result<()> {
    static TAKEN: Mutex<bool> = Mutex::new(false);
    let mut taken = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
    if !*taken {
        // SAFETY: both structures are plain data, and the handler does what a handler may.
        unsafe {
            let mut before = std::mem::zeroed();
            if libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut before) != 0 {
                return Err(io::Error::last_os_error());
            }
            BEFORE.get_or_init(|| before);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigbus as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            if libc::sigaction(libc::SIGBUS, &action, null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        *taken = true;
    }
    Ok(())
}

/// Ends the process where the address lies in a map; else what was there before acts, as the instruction is tried again.
extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo_t; entries and messages are never freed; all calls are async-signal-safe.
    unsafe {
        let at = (*info).si_addr() as usize;
        let mut entry = FIRST.load(Ordering::Acquire);
        while let Some(e) = entry.as_ref() {
            if at < e.end.load(Ordering::Acquire) && e.begin.load(Ordering::Relaxed) <= at {
                let (message, length) = (e.message.load(Ordering::Relaxed), e.length.load(Ordering::Relaxed));
                libc::write(libc::STDERR_FILENO, message.cast(), length);
                libc::_exit(EXIT_CODE);
            }
            entry = e.next.load(Ordering::Acquire);
        }
        match BEFORE.get() {
            Some(before) => drop(libc::sigaction(libc::SIGBUS, before, null_mut())),
            None => drop(libc::signal(libc::SIGBUS, libc::SIG_DFL)),
        }
    }
}
