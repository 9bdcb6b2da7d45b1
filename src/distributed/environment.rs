//! Which rank this process is, as its launcher tells it: `launch` and torchrun (RANK ...), mpirun (OMPI_COMM_WORLD_*),
//! srun (SLURM_*).

use crate::env;
use crate::{Error, Result};

/// A process's place in the world, and where the world meets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankEnvironment {
    /// This process among all ranks, from 0.
    pub rank: i64,
    /// Ranks of the run, over all hosts.
    pub world_size: i64,
    /// This process among the ranks of its host, from 0; on GPUs the index of its device.
    pub local_rank: i64,
    /// Ranks of this host.
    pub local_world_size: i64,
    /// Where rank 0 is: the host of the store at which the ranks meet.
    pub host: String,
    /// The port of that store.
    pub port: u16,
    /// Whether a store is served there already (torchrun's agent); otherwise rank 0 serves it.
    pub store_is_served: bool,
    /// Counts restarts: a store that outlives them keeps their keys apart.
    pub attempt: i64,
}

const DEFAULT_PORT: u16 = 29500;

type Get<'a> = &'a dyn Fn(&str) -> Option<String>;

impl RankEnvironment {
    /// From this process's environment; `None` if no launcher set one.
    pub fn from_env() -> Result<Option<RankEnvironment>> {
        RankEnvironment::read(&env::text)
    }

    /// From any environment. Errors (exit code 2) name the variables that do not fit.
    pub fn read(get: Get) -> Result<Option<RankEnvironment>> {
        // An empty value counts as none.
        let get: Get = &|name| get(name).filter(|v| !v.is_empty());
        let place = if get("RANK").is_some() || get("WORLD_SIZE").is_some() {
            torchrun(get)?
        } else if get("OMPI_COMM_WORLD_SIZE").is_some() {
            mpirun(get)?
        } else if get("SLURM_STEP_NUM_TASKS").is_some() && get("SLURM_PROCID").is_some() {
            // SLURM_STEP_NUM_TASKS is srun's: the batch script itself, with no srun, is a world of one.
            srun(get)?
        } else {
            return Ok(None);
        };
        place.check()?;
        Ok(Some(place))
    }

    fn check(&self) -> Result<()> {
        let RankEnvironment { rank, world_size, local_rank, local_world_size, .. } = self;
        let wrong = if *world_size < 1 {
            format!("the world size is {world_size}; it must be at least 1")
        } else if *rank < 0 || rank >= world_size {
            format!("rank {rank} does not exist in a world of {world_size} (ranks count from 0)")
        } else if *local_world_size < 1 || local_world_size > world_size {
            format!("the local world size is {local_world_size} in a world of {world_size}")
        } else if *local_rank < 0 || local_rank >= local_world_size {
            format!("local rank {local_rank} does not exist among {local_world_size} on this host")
        } else {
            return Ok(());
        };
        Err(Error::config(format!(
            "the launcher's environment is inconsistent: {wrong}; see RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE (or \
             OMPI_COMM_WORLD_*, SLURM_*)"
        )))
    }
}

/// Whether the launcher (`launch` or torchrun) has started this world again.
pub fn is_restart_by_launcher() -> bool {
    let count = |name| env::parsed::<u64>(name).unwrap_or(0);
    count("CORRAL_RESTART_COUNT") > 0 || count("TORCHELASTIC_RESTART_COUNT") > 0
}

fn number<T: std::str::FromStr>(get: Get, name: &str) -> Result<Option<T>> {
    let Some(text) = get(name) else { return Ok(None) };
    match text.trim().parse() {
        Ok(n) => Ok(Some(n)),
        Err(_) => Err(Error::config(format!(
            "the environment variable {name} is {text:?}, which is not a valid number"
        ))),
    }
}

fn required<T: std::str::FromStr>(get: Get, name: &str, beside: &str) -> Result<T> {
    number(get, name)?.ok_or_else(|| {
        Error::config(format!(
            "{beside} is set in the environment but {name} is not: start ranks with `launch`, or unset {beside}"
        ))
    })
}

fn torchrun(get: Get) -> Result<RankEnvironment> {
    let rank = required(get, "RANK", "WORLD_SIZE")?;
    let world_size = required(get, "WORLD_SIZE", "RANK")?;
    let (host, port) = meeting_point(get)?;
    let host = match host {
        Some(host) => host,
        None if world_size == 1 => "127.0.0.1".into(),
        None => {
            return Err(Error::config(
                "RANK and WORLD_SIZE are set in the environment but MASTER_ADDR is not",
            ));
        }
    };
    let attempts = [number(get, "TORCHELASTIC_RESTART_COUNT")?, number(get, "CORRAL_RESTART_COUNT")?];
    let served = get("TORCHELASTIC_USE_AGENT_STORE");
    Ok(RankEnvironment {
        rank,
        world_size,
        // One host unless told otherwise.
        local_rank: number(get, "LOCAL_RANK")?.unwrap_or(rank),
        local_world_size: number(get, "LOCAL_WORLD_SIZE")?.unwrap_or(world_size),
        host,
        port: port.unwrap_or(DEFAULT_PORT),
        store_is_served: served.is_some_and(|v| v.eq_ignore_ascii_case("true") || v == "1"),
        attempt: attempts.into_iter().flatten().next().unwrap_or(0),
    })
}

fn mpirun(get: Get) -> Result<RankEnvironment> {
    let beside = "OMPI_COMM_WORLD_SIZE";
    let world_size = required(get, beside, beside)?;
    let local_world_size = required(get, "OMPI_COMM_WORLD_LOCAL_SIZE", beside)?;
    let (mut host, port) = meeting_point(get)?;
    if host.is_none() && local_world_size == world_size {
        host = Some("127.0.0.1".into());
    }
    if host.is_none() {
        host = first_host(get, &["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"])?;
    }
    let Some(host) = host else {
        return Err(Error::config(
            "mpirun does not say where rank 0 is: set MASTER_ADDR to the first host (mpirun -x MASTER_ADDR=HOST), or \
             CORRAL_RDZV=HOST:PORT",
        ));
    };
    Ok(RankEnvironment {
        rank: required(get, "OMPI_COMM_WORLD_RANK", beside)?,
        world_size,
        local_rank: required(get, "OMPI_COMM_WORLD_LOCAL_RANK", beside)?,
        local_world_size,
        host,
        port: port.unwrap_or(DEFAULT_PORT),
        store_is_served: false,
        attempt: number(get, "CORRAL_RESTART_COUNT")?.unwrap_or(0),
    })
}

fn srun(get: Get) -> Result<RankEnvironment> {
    let beside = "SLURM_PROCID";
    let world_size: i64 = required(get, "SLURM_STEP_NUM_TASKS", beside)?;
    let (mut host, port) = meeting_point(get)?;
    if host.is_none() {
        host = first_host(get, &["SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"])?;
    }
    if host.is_none() && world_size == 1 {
        host = Some("127.0.0.1".into());
    }
    let Some(host) = host else {
        return Err(Error::config(
            "SLURM_PROCID is set but SLURM_JOB_NODELIST is not: set MASTER_ADDR to the first host",
        ));
    };
    // Jobs that share a host must not meet at the same port.
    let job: u64 = number(get, "SLURM_JOB_ID")?.unwrap_or(0);
    let tasks = get("SLURM_STEP_TASKS_PER_NODE").or_else(|| get("SLURM_TASKS_PER_NODE"));
    let local_world_size = match tasks {
        Some(tasks) => {
            let node: usize = number(get, "SLURM_NODEID")?.unwrap_or(0);
            tasks_per_node(&tasks).and_then(|t| t.get(node).copied()).ok_or_else(|| {
                Error::config(format!("SLURM_STEP_TASKS_PER_NODE {tasks:?} has no entry for node {node}"))
            })?
        }
        None => world_size,
    };
    Ok(RankEnvironment {
        rank: required(get, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")?,
        world_size,
        local_rank: required(get, "SLURM_LOCALID", beside)?,
        local_world_size,
        host,
        port: port.unwrap_or(15000 + (job % 20000) as u16),
        store_is_served: false,
        attempt: number(get, "CORRAL_RESTART_COUNT")?.or(number(get, "SLURM_RESTART_COUNT")?).unwrap_or(0),
    })
}

/// MASTER_ADDR and MASTER_PORT, else CORRAL_RDZV (HOST:PORT).
fn meeting_point(get: Get) -> Result<(Option<String>, Option<u16>)> {
    let (mut host, mut port) = (get("MASTER_ADDR"), number(get, "MASTER_PORT")?);
    if let (None, Some(rdzv)) = (&host, get("CORRAL_RDZV")) {
        let parts =
            rdzv.rsplit_once(':').and_then(|(h, p)| Some((h.trim_matches(['[', ']']), p.parse().ok()?)));
        let Some((h, p)) = parts.filter(|(h, _)| !h.is_empty()) else {
            return Err(Error::config(format!("CORRAL_RDZV is {rdzv:?}; it must be HOST:PORT")));
        };
        (host, port) = (Some(h.to_string()), Some(p));
    }
    Ok((host, port))
}

fn first_host(get: Get, names: &[&str]) -> Result<Option<String>> {
    let Some((name, list)) = names.iter().find_map(|n| Some((n, get(n)?))) else { return Ok(None) };
    match expand_hosts(&list).and_then(|hosts| hosts.into_iter().next()) {
        Some(host) => Ok(Some(host)),
        None => {
            Err(Error::config(format!("{name} is {list:?}, which is not a list of hosts; set MASTER_ADDR")))
        }
    }
}

/// Slurm's list of hosts: `a,node[01-03,7],rack[1-2]n[1-2]`, in order; `None` if malformed.
pub fn expand_hosts(list: &str) -> Option<Vec<String>> {
    let (mut depth, mut start, mut hosts) = (0, 0, Vec::new());
    for (i, c) in list.char_indices().chain([(list.len(), ',')]) {
        match c {
            '[' => depth += 1,
            ']' => depth -= 1,
            ',' if depth == 0 => {
                expand_one(list[start..i].trim(), &mut hosts)?;
                start = i + 1;
            }
            _ => {}
        }
    }
    (depth == 0 && !hosts.is_empty()).then_some(hosts)
}

fn expand_one(pattern: &str, hosts: &mut Vec<String>) -> Option<()> {
    if pattern.is_empty() {
        return None;
    }
    let Some((prefix, rest)) = pattern.split_once('[') else {
        hosts.push(pattern.into());
        return Some(());
    };
    let (ranges, suffix) = rest.split_once(']')?;
    for range in ranges.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let width = first.len(); // leading zeros are part of the name
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        for n in first..=last.min(first.saturating_add(100_000)) {
            expand_one(&format!("{prefix}{n:0width$}{suffix}"), hosts)?;
        }
    }
    Some(())
}

/// Slurm's `2(x3),1` is 2, 2, 2, 1.
fn tasks_per_node(text: &str) -> Option<Vec<i64>> {
    let mut counts = Vec::new();
    for part in text.split(',') {
        let (count, times) = match part.split_once("(x") {
            Some((count, times)) => (count, times.strip_suffix(')')?.parse::<usize>().ok()?),
            None => (part, 1),
        };
        counts.extend(std::iter::repeat_n(count.trim().parse::<i64>().ok()?, times.min(100_000)));
    }
    Some(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<RankEnvironment>> {
        RankEnvironment::read(&|name| variables.iter().find(|v| v.0 == name).map(|v| v.1.to_string()))
    }

    #[test]
    fn no_launcher_is_no_place() {
        assert_eq!(read(&[("HOME", "/root"), ("RANK", "")]).unwrap(), None);
        // A batch script of Slurm that calls corral without srun.
        assert_eq!(read(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")]).unwrap(), None);
    }

    #[test]
    fn torchrun_with_its_agent_store() {
        let place = read(&[
            ("RANK", "5"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_RANK", "1"),
            ("LOCAL_WORLD_SIZE", "4"),
            ("MASTER_ADDR", "node1"),
            ("MASTER_PORT", "1234"),
            ("TORCHELASTIC_USE_AGENT_STORE", "True"),
            ("TORCHELASTIC_RESTART_COUNT", "2"),
        ]);
        let expected = RankEnvironment {
            rank: 5,
            world_size: 8,
            local_rank: 1,
            local_world_size: 4,
            host: "node1".into(),
            port: 1234,
            store_is_served: true,
            attempt: 2,
        };
        assert_eq!(place.unwrap(), Some(expected));
    }

    #[test]
    fn mpirun_on_one_host_and_on_several() {
        let mut env = vec![
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ];
        let place = read(&env).unwrap().unwrap();
        assert_eq!((place.rank, place.host.as_str(), place.port), (1, "127.0.0.1", 29500));
        env[1].1 = "4";
        let error = read(&env).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.message.contains("MASTER_ADDR"), "{error}");
        env.push(("CORRAL_RDZV", "node7:999"));
        let place = read(&env).unwrap().unwrap();
        assert_eq!((place.host.as_str(), place.port), ("node7", 999));
    }

    #[test]
    fn srun_takes_the_first_host_of_the_list() {
        let place = read(&[
            ("SLURM_PROCID", "4"),
            ("SLURM_STEP_NUM_TASKS", "5"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_NODEID", "2"),
            ("SLURM_STEP_TASKS_PER_NODE", "2(x2),1"),
            ("SLURM_JOB_NODELIST", "gpu[09-10,2],other"),
            ("SLURM_JOB_ID", "20007"),
        ]);
        let place = place.unwrap().unwrap();
        assert_eq!(
            (place.rank, place.local_world_size, place.host.as_str(), place.port),
            (4, 1, "gpu09", 15007)
        );
    }

    #[test]
    fn inconsistent_environments_name_the_variable() {
        for (env, word) in [
            (vec![("RANK", "1")], "WORLD_SIZE"),
            (vec![("WORLD_SIZE", "2")], "RANK"),
            (vec![("RANK", "0"), ("WORLD_SIZE", "2")], "MASTER_ADDR"),
            (vec![("RANK", "x"), ("WORLD_SIZE", "2")], "\"x\""),
            (vec![("RANK", "2"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "h")], "rank 2"),
            (
                vec![("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "70000")],
                "70000",
            ),
            (
                vec![("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "h"), ("LOCAL_RANK", "3")],
                "local rank 3",
            ),
            (vec![("RANK", "0"), ("WORLD_SIZE", "2"), ("CORRAL_RDZV", "h")], "HOST:PORT"),
        ] {
            let error = read(&env).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            assert!(error.message.contains(word), "{env:?}: {error}");
        }
    }

    #[test]
    fn lists_of_hosts() {
        let hosts = |list| expand_hosts(list).map(|h| h.join(" "));
        assert_eq!(hosts("node[01-03,7],b").as_deref(), Some("node01 node02 node03 node7 b"));
        assert_eq!(hosts("r[1-2]n[8-9]x").as_deref(), Some("r1n8x r1n9x r2n8x r2n9x"));
        assert_eq!(hosts("single").as_deref(), Some("single"));
        for bad in ["", "a[1-2", "a[x]", "a,,b"] {
            assert_eq!(hosts(bad), None, "{bad}");
        }
    }
}
