//! One process group at a time holds a run's folder.
//!
//! Rank 0 keeps `RUN_DIR/.lock` open under a lock of the kernel (fcntl's, of the open file), which ends with the process,
//! and writes who it is into it. Every five seconds it touches `RUN_DIR/.heartbeat`: on a file system whose locks do not
//! reach other hosts, or that has none, this is what tells a run from what a dead host left.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use serde::{Deserialize, Serialize};

use crate::distributed::environment::is_restart_by_launcher;
use crate::error::{Context, Error, Result};
use crate::files::{beside, write_error};
use crate::{files, info, warn};

const LOCK: &str = ".lock";
const HEARTBEAT: &str = ".heartbeat";
const BEAT: Duration = Duration::from_secs(5);
/// Another host's lock is taken over after so long without a beat.
const DEAD_AFTER: Duration = Duration::from_secs(60);
/// How long a process that was killed may take to give its lock back.
const GRACE: Duration = Duration::from_secs(2);

/// Who holds a folder, as it stands in the lock's file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Holder {
    host: String,
    /// Of the running kernel: processes of two containers on one machine share it.
    boot: String,
    pid: u32,
    /// The process's start, in ticks after boot: another process may get its number.
    ticks: u64,
    /// What started the rank: a launcher that starts it again is the same group.
    launcher: u32,
    since: String,
}

impl Holder {
    fn this_process() -> Holder {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_string();
        Holder {
            host: read("/proc/sys/kernel/hostname"),
            boot: read("/proc/sys/kernel/random/boot_id"),
            pid: std::process::id(),
            ticks: start_ticks(std::process::id()).unwrap_or(0),
            launcher: std::os::unix::process::parent_id(),
            since: chrono::Local::now().format("%Y-%m-%d %H:%M:%S").to_string(),
        }
    }

    fn is_alive_here(&self) -> bool {
        start_ticks(self.pid) == Some(self.ticks)
    }
}

/// When a process of this machine was started, in ticks after boot; none where there is no such process.
fn start_ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Field 22; the name before it may hold spaces, so count from its closing parenthesis.
    stat.rsplit(')').next()?.split_whitespace().nth(19)?.parse().ok()
}

/// What the kernel says of the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kernel {
    Free,
    Held,
    /// The file system has no locks.
    Refuses,
}

/// The lock of a run's folder; given back when it is dropped.
pub struct RunLock {
    dir: PathBuf,
    file: File,
    /// Ends the thread that beats.
    beats: Option<Sender<()>>,
    /// The folder was not there before.
    made: bool,
}

impl RunLock {
    /// Takes the lock of the run's folder, which is made if it is missing.
    ///
    /// # Errors
    /// Of kind Config: another run holds it; the message says who. Then nothing is changed.
    pub fn take(dir: &Path) -> Result<RunLock> {
        let made = !files::exists(dir)?;
        files::create_dir(dir).context(format!("cannot make the folder {}", dir.display()))?;
        let started = Instant::now();
        let (file, kernel) = loop {
            match Self::try_take(dir)? {
                Ok(taken) => break taken,
                // A killed process is not gone at once.
                Err(_) if started.elapsed() < GRACE => std::thread::sleep(Duration::from_millis(50)),
                Err(refused) => return Err(refused),
            }
        };
        if kernel == Kernel::Refuses {
            warn!(
                "{}: its file system refuses locks: a second run in this folder is only noticed while {HEARTBEAT} is younger \
                 than {} s",
                dir.display(),
                DEAD_AFTER.as_secs()
            );
        }
        let here = Holder::this_process();
        if let Some(old) = read_holder(&dir.join(LOCK)).filter(|old| old.boot != here.boot) {
            info!("{}: took over the lock that pid {} on {} left", dir.display(), old.pid, old.host);
        }
        let mut lock = RunLock { dir: dir.to_path_buf(), file, beats: None, made };
        lock.sign()?;
        Ok(lock)
    }

    /// Refuses, as [`RunLock::take`] does, a folder that another run holds. Changes nothing.
    pub fn check_free(dir: &Path) -> Result<()> {
        let started = Instant::now();
        loop {
            match look(dir)? {
                Some(_) if started.elapsed() < GRACE => std::thread::sleep(Duration::from_millis(50)),
                Some(refused) => return Err(refused),
                None => return Ok(()),
            }
        }
    }

    /// The lock's file, or why somebody else has it.
    fn try_take(dir: &Path) -> Result<std::result::Result<(File, Kernel), Error>> {
        let path = dir.join(LOCK);
        let error = |e: io::Error| write_error(&path, &e);
        loop {
            let mut options = OpenOptions::new();
            let mut file =
                options.read(true).write(true).create(true).truncate(false).open(&path).map_err(error)?;
            let kernel = ask_kernel(&file, true)?;
            if let Some(refused) = refusal(dir, &mut file, kernel)? {
                return Ok(Err(refused));
            }
            if kernel == Kernel::Held {
                // The lock of a dead host, or of what our launcher has ended: a file in its place has a lock of its own.
                let new = beside(&path, &format!(".tmp-{}-", std::process::id()));
                file = options.open(&new).map_err(error)?;
                ask_kernel(&file, true)?;
                fs::rename(&new, &path).map_err(error)?;
            }
            // Whoever had it may have removed it between our opening and locking.
            if is_same(&file, &path) {
                return Ok(Ok((file, kernel)));
            }
        }
    }

    /// Writes who holds the folder, and begins to beat.
    fn sign(&mut self) -> Result<()> {
        let path = self.dir.join(LOCK);
        let text =
            serde_json::to_string(&Holder::this_process()).map_err(|e| Error::failed(e.to_string()))?;
        let write = |file: &mut File| -> io::Result<()> {
            file.set_len(0)?;
            file.rewind()?;
            file.write_all(format!("{text}\n").as_bytes())
        };
        write(&mut self.file).and_then(|()| beat(&self.dir)).map_err(|e| write_error(&path, &e))?;
        let (sender, receiver) = mpsc::channel::<()>();
        let (dir, file) = (self.dir.clone(), self.file.try_clone().map_err(|e| write_error(&path, &e))?);
        let beating = move || {
            while receiver.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
                if is_same(&file, &dir.join(LOCK)) {
                    // A beat that is missed is told by nobody: the disk may be full, and the lock holds.
                    let _ = beat(&dir);
                }
            }
        };
        let thread = std::thread::Builder::new().name("heartbeat".into()).spawn(beating);
        thread.context("cannot start the thread that keeps the run's lock")?;
        self.beats = Some(sender);
        Ok(())
    }

    /// Whether the folder is still this run's.
    ///
    /// # Errors
    /// It was removed or moved, or another run has taken it over.
    pub fn check(&self) -> Result<()> {
        if is_same(&self.file, &self.dir.join(LOCK)) {
            return Ok(());
        }
        let dir = self.dir.display();
        Err(Error::failed(match read_holder(&self.dir.join(LOCK)) {
            Some(other) if self.dir.exists() => format!(
                "{dir} was taken over by pid {} on {} (since {}): this run ends, so that two do not write the same files",
                other.pid, other.host, other.since
            ),
            _ => format!("{dir} was removed or moved while the run was writing into it: this run ends"),
        }))
    }
}

impl Drop for RunLock {
    fn drop(&mut self) {
        self.beats = None;
        if is_same(&self.file, &self.dir.join(LOCK)) {
            // The heartbeat first: without a lock's file nobody looks at it. What stays is taken over by the next run.
            let _ = fs::remove_file(self.dir.join(HEARTBEAT));
            let _ = fs::remove_file(self.dir.join(LOCK));
        }
        if self.made {
            // Fails, as it should, where something was written.
            let _ = fs::remove_dir(&self.dir);
        }
    }
}

/// Why the folder's lock could not be taken now.
fn look(dir: &Path) -> Result<Option<Error>> {
    let Ok(mut file) = OpenOptions::new().read(true).write(true).open(dir.join(LOCK)) else {
        return Ok(None);
    };
    let kernel = ask_kernel(&file, false)?;
    refusal(dir, &mut file, kernel)
}

/// Who holds a run's folder, for those who look into it.
pub fn holder(dir: &Path) -> Option<String> {
    look(dir).ok()??;
    let holder = read_holder(&dir.join(LOCK))?;
    Some(format!("pid {} on {}, since {}", holder.pid, holder.host, holder.since))
}

/// Why the lock in `file`, of which the kernel says `kernel`, cannot be taken; none if it can.
fn refusal(dir: &Path, file: &mut File, kernel: Kernel) -> Result<Option<Error>> {
    let mut text = String::new();
    let _ = file.rewind().and_then(|()| file.read_to_string(&mut text));
    let Ok(holder) = serde_json::from_str::<Holder>(&text) else {
        // Nobody has signed: it is being taken this very moment, or was never held.
        let taken = kernel == Kernel::Held;
        return Ok(taken
            .then(|| Error::config(format!("{}: another run has just taken this folder", dir.display()))));
    };
    let here = Holder::this_process();
    let restarted = is_restart_by_launcher();
    if restarted && (&holder.host, holder.launcher) == (&here.host, here.launcher) {
        return Ok(None);
    }
    // Across hosts only beats count: of a file system's locks nobody knows whether they reach the other host.
    let silent = silence(dir);
    let beats = silent.is_some_and(|silent| silent < DEAD_AFTER);
    let holds = match (holder.boot == here.boot, kernel) {
        (true, Kernel::Held) => true,
        (true, Kernel::Free) => false,
        (true, Kernel::Refuses) => match holder.host == here.host {
            true => holder.is_alive_here(),
            false => beats,
        },
        // This host was started anew.
        (false, Kernel::Free | Kernel::Refuses) if holder.host == here.host => false,
        (false, Kernel::Held) => beats,
        (false, _) => beats && !restarted,
    };
    let (pid, host, since) = (holder.pid, &holder.host, &holder.since);
    if !holds {
        return Ok(None);
    }
    let sign = silent.map_or(String::new(), |s| format!(", last sign of life {} s ago", s.as_secs()));
    let wait = match holder.boot == here.boot {
        true => "end it first".to_string(),
        false => {
            format!("end it first (without a sign of life for {} s it is taken over)", DEAD_AFTER.as_secs())
        }
    };
    Ok(Some(Error::config(format!(
        "another run holds {}: pid {pid} on {host}, since {since}{sign}; {wait}, or choose another output_dir",
        dir.display()
    ))))
}

/// Asks the kernel for the lock of an open file, or whether it would give it.
fn ask_kernel(file: &File, take: bool) -> Result<Kernel> {
    let mut range = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let answer = match take {
        true => fcntl(file, FcntlArg::F_OFD_SETLK(&range)),
        false => fcntl(file, FcntlArg::F_OFD_GETLK(&mut range)),
    };
    match answer {
        Ok(_) if take || range.l_type == libc::F_UNLCK as libc::c_short => Ok(Kernel::Free),
        Ok(_) | Err(Errno::EAGAIN | Errno::EACCES) => Ok(Kernel::Held),
        Err(Errno::ENOLCK | Errno::ENOSYS | Errno::EOPNOTSUPP | Errno::EINVAL) => Ok(Kernel::Refuses),
        Err(e) => Err(Error::failed(format!("cannot lock {LOCK}: {}", e.desc()))),
    }
}

/// Whether `path` is still the open file.
fn is_same(file: &File, path: &Path) -> bool {
    let id = |m: fs::Metadata| (m.dev(), m.ino());
    match (fs::metadata(path), file.metadata()) {
        (Ok(there), Ok(open)) => id(there) == id(open),
        _ => false,
    }
}

fn read_holder(path: &Path) -> Option<Holder> {
    serde_json::from_str(&fs::read_to_string(path).ok()?).ok()
}

fn beat(dir: &Path) -> io::Result<()> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    fs::write(dir.join(HEARTBEAT), format!("{now}\n"))
}

/// How long ago the folder's holder has beaten, by the clock of the file server; none where it never has.
fn silence(dir: &Path) -> Option<Duration> {
    let last = fs::metadata(dir.join(HEARTBEAT)).ok()?.modified().ok()?;
    let probe = dir.join(format!(".tmp-clock-{}", std::process::id()));
    let now = fs::write(&probe, "x").and_then(|()| fs::metadata(&probe)?.modified());
    let _ = fs::remove_file(&probe);
    Some(now.unwrap_or_else(|_| SystemTime::now()).duration_since(last).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use testing::folder::TestFolder;

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        entries.map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect()
    }

    /// What a process of another kernel left, whose last beat is `ago` old.
    fn leave(dir: &Path, host: &str, ago: u64) {
        let holder =
            Holder { host: host.into(), boot: "another".into(), pid: 4711, ..Holder::this_process() };
        fs::write(dir.join(LOCK), serde_json::to_string(&holder).unwrap()).unwrap();
        let file = File::create(dir.join(HEARTBEAT)).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(ago)).unwrap();
    }

    #[test]
    fn one_holds_it_at_a_time_and_leaves_nothing() {
        let folder = TestFolder::new("lock");
        let dir = folder.0.join("runs/a");
        let lock = RunLock::take(&dir).unwrap();
        // The lock is the open file's: the same process is refused as well.
        for e in [RunLock::take(&dir).err().unwrap(), RunLock::check_free(&dir).unwrap_err()] {
            assert_eq!(e.exit_code(), 2);
            let host = Holder::this_process().host;
            let part = format!("pid {} on {host}, since 2", std::process::id());
            assert!(e.message.contains(&part) && e.message.contains("choose another output_dir"), "{e}");
        }
        lock.check().unwrap();
        drop(lock);
        assert!(!dir.exists(), "the folder that it made goes, too");
        fs::create_dir(&dir).unwrap();
        drop(RunLock::take(&dir).unwrap());
        assert_eq!(names(&dir), [""; 0]);
    }

    #[test]
    fn what_a_dead_process_left_is_taken() {
        let folder = TestFolder::new("lock-dead");
        let text = serde_json::to_string(&Holder { pid: 4711, ..Holder::this_process() }).unwrap();
        for left in [text.as_str(), "", "{half"] {
            fs::write(folder.0.join(LOCK), left).unwrap();
            beat(&folder.0).unwrap();
            RunLock::check_free(&folder.0).unwrap();
            let lock = RunLock::take(&folder.0).unwrap();
            assert_eq!(read_holder(&folder.0.join(LOCK)).unwrap().pid, std::process::id());
            drop(lock);
        }
    }

    #[test]
    fn another_hosts_lock_is_taken_after_a_minute_of_silence() {
        let folder = TestFolder::new("lock-host");
        leave(&folder.0, "elsewhere", 40);
        let e = RunLock::take(&folder.0).err().unwrap();
        assert!(
            e.message.contains("pid 4711 on elsewhere") && e.message.contains("for 60 s it is taken"),
            "{e}"
        );
        assert!(e.message.contains("last sign of life 4"), "{e}");
        leave(&folder.0, "elsewhere", 61);
        RunLock::check_free(&folder.0).unwrap();
        drop(RunLock::take(&folder.0).unwrap());
        // A host that was started anew has forgotten its processes.
        leave(&folder.0, &Holder::this_process().host, 1);
        drop(RunLock::take(&folder.0).unwrap());
        // The same where the file server still keeps the dead host's lock.
        let held =
            OpenOptions::new().create(true).truncate(false).write(true).open(folder.0.join(LOCK)).unwrap();
        assert_eq!(ask_kernel(&held, true).unwrap(), Kernel::Free);
        leave(&folder.0, "elsewhere", 61);
        let lock = RunLock::take(&folder.0).unwrap();
        lock.check().unwrap();
        assert!(!is_same(&held, &folder.0.join(LOCK)), "a new file");
    }

    #[test]
    fn without_locks_the_process_or_its_heartbeat_tells() {
        let folder = TestFolder::new("lock-none");
        let path = folder.0.join(LOCK);
        let refused = |holder: &Holder| {
            fs::write(&path, serde_json::to_string(holder).unwrap()).unwrap();
            refusal(&folder.0, &mut File::open(&path).unwrap(), Kernel::Refuses).unwrap().is_some()
        };
        let here = Holder::this_process();
        assert!(refused(&here));
        assert!(
            !refused(&Holder { ticks: here.ticks + 1, ..here.clone() }),
            "another process has its number"
        );
        let there = Holder { boot: "another".into(), host: "elsewhere".into(), ..here.clone() };
        assert!(!refused(&there), "it has never beaten");
        beat(&folder.0).unwrap();
        assert!(refused(&there));
    }

    #[test]
    fn a_folder_that_is_gone_is_told() {
        let folder = TestFolder::new("lock-gone");
        let dir = folder.0.join("a");
        let lock = RunLock::take(&dir).unwrap();
        fs::remove_dir_all(&dir).unwrap();
        assert!(lock.check().unwrap_err().message.contains("was removed or moved"));
        let other = RunLock::take(&dir).unwrap();
        let e = lock.check().unwrap_err();
        assert!(e.message.contains("was taken over by pid"), "{e}");
        drop(lock);
        other.check().unwrap();
    }
}
