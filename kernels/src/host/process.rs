//! Programs that this process starts.

use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::abi::{corral_names_are_numbers, corral_recorder_is_off};

/// Lets `command` begin as a shell would start it, in a process group of its own: no signal is blocked or ignored, whatever
/// is in this process and its threads; its environment is the user's.
pub fn as_from_a_shell(command: &mut Command) -> &mut Command {
    // SAFETY: reads a number that was set before main.
    if unsafe { corral_recorder_is_off() } != 0 {
        command.env_remove("TORCH_FR_BUFFER_SIZE");
    }
    let reset = || {
        // SAFETY: async-signal-safe calls on memory of their own. Numbers that are no signal, and those of signals that
        // always act, are refused without effect.
        unsafe {
            for signal in 1..=64 {
                libc::signal(signal, libc::SIG_DFL);
            }
            let mut none = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            match libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut()) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        }
    };
    // SAFETY: `reset` neither allocates nor locks, as is asked of what runs between fork and exec.
    unsafe { command.process_group(0).pre_exec(reset) }
}

/// Ends the process now, without destructors or exit handlers: those may wait for a GPU that never answers.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: does not return.
    unsafe { libc::_exit(code) }
}

/// Whether libraries of this process that ask for the names of addresses get numbers, at once: c10d asks for each connection, and a name
/// server may not answer.
pub fn names_are_numbers() -> bool {
    // SAFETY: compares two addresses.
    unsafe { corral_names_are_numbers() != 0 }
}
