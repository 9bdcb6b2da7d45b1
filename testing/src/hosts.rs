//! Hosts of their own: network namespaces on one switch, each with an address, and with a name server that never answers.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::program::{Program, launch};

/// Hosts that reach each other; gone when it is dropped.
pub struct Hosts {
    /// Of the namespaces, the switch's first.
    names: Vec<String>,
    net: u32,
}

/// Networks of this process.
static NETWORKS: AtomicU32 = AtomicU32::new(0);

fn ip(words: &str) -> Result<(), String> {
    let output = Command::new("ip").args(words.split(' ')).output().map_err(|e| format!("ip: {e}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("ip {words}: {}", String::from_utf8_lossy(&output.stderr).trim())),
    }
}

impl Hosts {
    /// So many hosts; none, with a line that says why, where this machine does not allow it.
    pub fn new(count: usize) -> Option<Hosts> {
        let (net, process) = (NETWORKS.fetch_add(1, Ordering::Relaxed), std::process::id());
        let name = |i: usize| format!("corral-{process}-{net}-{i}");
        // Dropped where something fails.
        let hosts = Hosts { names: (0..=count).map(name).collect(), net };
        match hosts.set_up() {
            Ok(()) => Some(hosts),
            Err(why) => {
                eprintln!("SKIPPED: several hosts need network namespaces (root, iproute2): {why}");
                None
            }
        }
    }

    fn set_up(&self) -> Result<(), String> {
        let (switch, hosts) = (&self.names[0], &self.names[1..]);
        self.names.iter().try_for_each(|name| ip(&format!("netns add {name}")))?;
        ip(&format!("-n {switch} link add bridge type bridge"))?;
        ip(&format!("-n {switch} addr add 10.77.{}.254/24 dev bridge", self.net))?;
        ip(&format!("-n {switch} link set bridge up"))?;
        for (i, host) in hosts.iter().enumerate() {
            ip(&format!("-n {switch} link add port{i} type veth peer name eth0 netns {host}"))?;
            ip(&format!("-n {switch} link set port{i} master bridge"))?;
            ip(&format!("-n {switch} link set port{i} up"))?;
            ip(&format!("-n {host} addr add {}/24 dev eth0", self.address(i)))?;
            ip(&format!("-n {host} link set lo up"))?;
            ip(&format!("-n {host} link set eth0 up"))?;
            // The way to name servers, which ends at the switch.
            ip(&format!("-n {host} route add default via 10.77.{}.254", self.net))?;
        }
        Ok(())
    }

    /// The address of host `i`, from 0.
    pub fn address(&self, i: usize) -> String {
        format!("10.77.{}.{}", self.net, i + 1)
    }

    /// `launch` on host `i`, node `i` of all of them, which meet at the first one.
    pub fn launch(&self, i: usize, ranks: usize, options: &[&str]) -> Program {
        let program = Program::new("ip").args(&["netns", "exec", self.name(i)]).arg(launch());
        self.node(program, i, ranks).args(options)
    }

    fn node(&self, program: Program, i: usize, ranks: usize) -> Program {
        let (nodes, meeting) = (self.names.len() - 1, format!("{}:29500", self.address(0)));
        let numbers = [nodes, i, ranks].map(|n| n.to_string());
        let program =
            program.args(&["--nnodes", &numbers[0], "--node-rank", &numbers[1], "--nproc", &numbers[2]]);
        program.args(&["--rdzv", &meeting])
    }

    /// A shell on host `i` that runs `script`; `words` are its arguments.
    pub fn shell(&self, i: usize, script: &str, words: &[&str]) -> Program {
        let program =
            Program::new("ip").args(&["netns", "exec", &self.names[i + 1], "sh", "-c", script, "sh"]);
        program.args(words)
    }

    /// The namespace of host `i`.
    pub fn name(&self, i: usize) -> &str {
        &self.names[i + 1]
    }

    /// [`Hosts::launch`] where all that this host writes below `folder` goes to a disk with room for so many KiB.
    pub fn launch_on_small_disk(
        &self,
        (i, ranks): (usize, usize),
        options: &[&str],
        folder: &Path,
        kib: u32,
    ) -> Program {
        // A mount that only this host sees: what others write there is seen through it.
        let script = format!(
            "set -e; disk=$(dirname $(dirname {0}))/disk; mkdir -p $disk; mount -t tmpfs -o size={kib}k tmpfs $disk; mkdir $disk/new $disk/work; \
             mount -t overlay -o lowerdir={0},upperdir=$disk/new,workdir=$disk/work overlay {0}; exec \"$@\"",
            folder.display()
        );
        let program = self.shell(i, &script, &[]).arg(launch());
        self.node(program, i, ranks).args(options)
    }

    /// Cuts the cable of host `i`.
    pub fn cut(&self, i: usize) {
        ip(&format!("-n {} link set port{i} down", self.names[0])).unwrap();
    }

    /// Mends it.
    pub fn mend(&self, i: usize) {
        ip(&format!("-n {} link set port{i} up", self.names[0])).unwrap();
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            // It may not have come to be.
            let _ = ip(&format!("netns del {name}"));
        }
    }
}
