//! Collectives between real processes: this test binary starts itself once per rank, with the environment that `launch`
//! sets and the case to run in CORRAL_TEST_CASE.

#![allow(clippy::unwrap_used, reason = "a helper that fails ends its test")]
#![allow(clippy::disallowed_methods, reason = "the tests' own variables, CORRAL_TEST_* among them")]

use corral::config::parallel::{Mode, Parallel};
use corral::distributed::world::{BackendChoice, DeviceChoice, World, leave};
use kernels::comm::{Backend, Group, ReduceOp, Store};
use kernels::watch::Watch;
use std::net::TcpListener;
use std::process::{Child, Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tch::{Device, Kind, Tensor};
use testing::ranks::{free_port, start_as_rank};

struct Ranks(Vec<Child>);

fn spawn(case: &str, rank: i64, world_size: i64, port: u16) -> Child {
    let (local_rank, mut more) = ((rank / 2).to_string(), vec![("CORRAL_TEST_CASE", case)]);
    if case == "hosts" {
        // As if ranks went round two hosts of two each.
        more.extend([("LOCAL_RANK", local_rank.as_str()), ("LOCAL_WORLD_SIZE", "2")]);
    }
    start_as_rank(rank, world_size, port, &more)
}

fn start(case: &str, world_size: i64) -> Ranks {
    let port = free_port();
    Ranks((0..world_size).map(|rank| spawn(case, rank, world_size, port)).collect())
}

impl Ranks {
    /// Waits for the given ranks and returns their outputs.
    fn outputs(&mut self, ranks: &[usize]) -> Vec<String> {
        ranks
            .iter()
            .map(|&r| {
                let child = &mut self.0[r];
                let deadline = Instant::now() + Duration::from_secs(60);
                while child.try_wait().unwrap().is_none() {
                    assert!(Instant::now() < deadline, "rank {r} hangs");
                    std::thread::sleep(Duration::from_millis(20));
                }
                let Output { stdout, stderr, .. } = take(child);
                String::from_utf8_lossy(&stdout).into_owned() + &String::from_utf8_lossy(&stderr)
            })
            .collect()
    }
}

fn take(child: &mut Child) -> Output {
    let replacement = Command::new("true").spawn().unwrap();
    std::mem::replace(child, replacement).wait_with_output().unwrap()
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // A rank that has ended cannot be killed.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs the case on all ranks; every one must print "fine".
fn all_fine(case: &str, world_size: i64) {
    let mut ranks = start(case, world_size);
    for (rank, output) in ranks.outputs(&(0..world_size as usize).collect::<Vec<_>>()).iter().enumerate() {
        assert!(output.contains("rank is fine"), "{case}, rank {rank}: {output}");
    }
}

/// The line "error: ..." of a rank's output.
fn error_of(output: &str) -> &str {
    output.lines().find_map(|l| l.split_once("error: ")).map(|(_, e)| e).unwrap_or_else(|| panic!("{output}"))
}

#[test]
fn values_of_all_collectives_in_all_dtypes() {
    all_fine("values", 3);
}

#[test]
fn asynchronous_collectives_overlap() {
    all_fine("overlap", 2);
}

#[test]
fn large_slices_travel_in_place_and_are_summed_in_the_order_of_ranks() {
    all_fine("large", 3);
}

#[test]
fn sub_groups_have_ranks_of_their_own() {
    all_fine("sub_groups", 3);
}

#[test]
fn two_ranks_send_each_other_tensors() {
    all_fine("transfers", 3);
}

#[test]
fn hybrid_by_hosts_wants_neighbours_on_one_host() {
    let mut ranks = start("hosts", 4);
    for output in ranks.outputs(&[0, 1, 2, 3]) {
        let error = error_of(&output);
        assert!(error.contains("ranks of a host") && error.contains("rank 1 is number 0"), "{output}");
    }
}

#[test]
fn an_exited_peer_is_named_at_once() {
    let mut ranks = start("exit", 3);
    let began = Instant::now();
    for output in ranks.outputs(&[0, 1]) {
        let error = error_of(&output);
        assert!(error.contains("all-reduce #2 of group `world`"), "{error}");
        assert!(error.contains("missing: rank 2 (gives no sign of life"), "{error}");
        assert!(!error.contains("rank 1 (") && !error.contains("rank 0 ("), "{error}");
    }
    // Long before the time-out of 120 s.
    assert!(began.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_rank_0_that_is_gone_is_named_though_it_kept_the_store() {
    let mut ranks = start("exit_0", 2);
    let output = &ranks.outputs(&[1])[0];
    let error = error_of(output);
    assert!(error.contains("all-reduce #2 of group `world` failed on rank 1"), "{error}");
    assert!(error.contains("missing: rank 0 (the store that it serves"), "{error}");
}

#[test]
fn a_peer_that_hangs_is_named_when_the_time_is_up() {
    let mut ranks = start("hang", 3);
    for output in ranks.outputs(&[0, 2]) {
        let error = error_of(&output);
        assert!(error.contains("all-gather #2 of group `world`"), "{error}");
        assert!(error.contains("timed out after 3 s"), "{error}");
        assert!(
            error.contains("missing: rank 1 (is alive, but got only to #1 (all-reduce) of the group)"),
            "{error}"
        );
        let waited: f64 = output.split_once("waited ").unwrap().1.split(' ').next().unwrap().parse().unwrap();
        assert!((2.5..5.0).contains(&waited), "{waited} s: {error}");
    }
}

#[test]
fn a_peer_that_hangs_or_dies_is_named_in_a_reduce_scatter_too() {
    let mut ranks = start("hang_scatter", 3);
    for output in ranks.outputs(&[0, 2]) {
        let error = error_of(&output);
        assert!(error.contains("reduce-scatter #2 of group `world`"), "{error}");
        assert!(error.contains("timed out after 3 s"), "{error}");
        assert!(error.contains("missing: rank 1 (is alive, but got only to #1"), "{error}");
    }
    let mut ranks = start("exit_scatter", 3);
    for output in ranks.outputs(&[0, 2]) {
        let error = error_of(&output);
        assert!(error.contains("reduce-scatter #2 of group `world`"), "{error}");
        assert!(error.contains("missing: rank 1 (gives no sign of life"), "{error}");
    }
}

#[test]
fn a_stopped_rank_0_is_named() {
    let mut ranks = start("stop_0", 2);
    let output = &ranks.outputs(&[1])[0];
    let error = error_of(output);
    assert!(error.contains("timed out after 3 s") && error.contains("missing: rank 0"), "{error}");
}

#[test]
fn ranks_that_call_different_collectives_are_told() {
    let mut ranks = start("disagree", 2);
    let outputs = ranks.outputs(&[0, 1]);
    let told = outputs.iter().filter(|o| {
        o.contains("rank 1 (called all-gather as #1 instead)")
            || o.contains("rank 0 (called all-reduce as #1 instead)")
    });
    assert!(told.count() >= 1, "{outputs:?}");
}

#[test]
fn a_rank_that_never_comes_is_named() {
    let port = free_port();
    let mut ranks = Ranks(vec![spawn("come", 0, 3, port), spawn("come", 2, 3, port)]);
    for output in ranks.outputs(&[0, 1]) {
        let error = error_of(&output);
        assert!(error.contains("rank 1 has not joined within 3 s (group `world` of 3 ranks)"), "{error}");
    }
}

#[test]
fn nobody_at_the_address() {
    let mut ranks = Ranks(vec![spawn("come", 1, 2, free_port())]);
    let output = &ranks.outputs(&[0])[0];
    assert!(error_of(output).contains("rank 0 does not answer at 127.0.0.1:"), "{output}");
}

#[test]
fn a_port_in_use_is_named() {
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut ranks = Ranks(vec![spawn("come", 0, 2, port)]);
    let output = &ranks.outputs(&[0])[0];
    assert!(error_of(output).contains(&format!("port {port} on 127.0.0.1 is in use")), "{output}");
}

#[test]
fn a_group_of_one_only_copies() {
    let group = Group::solo();
    let x = Tensor::arange(6, (Kind::Float, Device::Cpu));
    let out = x.zeros_like();
    group.all_gather(&out, &x).unwrap().wait().unwrap();
    assert_eq!(out, x);
    let out = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu));
    group.reduce_scatter(&out, &x, ReduceOp::Avg).unwrap().wait().unwrap();
    assert_eq!(out.view(-1), x);
    group.all_reduce(&out, ReduceOp::Sum).unwrap().wait().unwrap();
    assert_eq!(out.view(-1), x);
    group.broadcast(&out, 0).unwrap().wait().unwrap();
    group.barrier().unwrap();
    assert_eq!(group.combine(&[3.0], ReduceOp::Max).unwrap(), [3.0]);
    assert!(group.all_gather(&out, &out.narrow(0, 0, 1)).is_err());
    assert!(group.all_gather(&out.tr(), &out).err().unwrap().message.contains("not contiguous"));
}

/// libtorch's flight recorder crashed here now and then (SIGSEGV): see `kernels/cpp/comm/c10d.cpp`.
/// `TORCH_FR_BUFFER_SIZE=2000` switches it on again.
#[test]
fn groups_may_begin_on_several_threads_at_once() {
    let mut ranks = Ranks(vec![spawn("begin", 0, 1, free_port())]);
    let output = &ranks.outputs(&[0])[0];
    assert!(output.contains("rank is fine"), "a crash, it seems: {output}");
}

#[test]
fn devices_and_backends_that_cannot_be() {
    for bad in ["gpu", "cuda:", "cuda:x", ""] {
        assert_eq!(bad.parse::<DeviceChoice>().unwrap_err().exit_code(), 2, "{bad}");
    }
    assert_eq!("cuda:3".parse::<DeviceChoice>().unwrap(), DeviceChoice::CudaIndex(3));
    match "mpi".parse::<BackendChoice>() {
        Ok(choice) => assert!(cfg!(feature = "mpi") && choice == BackendChoice::Mpi),
        Err(e) => {
            assert!(
                !cfg!(feature = "mpi") && e.exit_code() == 2 && e.message.contains("built without MPI"),
                "{e}"
            );
        }
    }
}

/// [`as_rank`] under `mpirun`: how that ends, after how long, and all output.
#[cfg(feature = "mpi")]
fn over_mpi(case: &str, ranks: i64) -> (i32, Duration, String) {
    let began = Instant::now();
    let output = testing::ranks::mpirun(ranks)
        .arg(std::env::current_exe().unwrap())
        .args(["as_rank", "--exact", "--nocapture"])
        .env("CORRAL_TEST_CASE", case)
        .output()
        .expect("mpirun starts");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.code().unwrap_or(-1), began.elapsed(), text)
}

/// The same values as over Gloo, to the bit: sums are made in the order of ranks there and here.
#[cfg(feature = "mpi")]
#[test]
fn mpi_carries_every_collective() {
    for (case, ranks) in [("values", 3), ("overlap", 2), ("large", 3), ("sub_groups", 3), ("transfers", 3)] {
        let (code, _, output) = over_mpi(case, ranks);
        assert_eq!((code, output.matches("rank is fine").count()), (0, ranks as usize), "{case}: {output}");
    }
}

#[cfg(feature = "mpi")]
#[test]
fn mpi_names_ranks_that_do_not_come() {
    for case in ["hang", "hang_scatter"] {
        let (code, took, output) = over_mpi(case, 3);
        assert!(output.contains("missing: rank 1"), "{case}: {output}");
        assert!(output.contains("timed out after 3 s"), "{case}: {output}");
        assert!(code != 0 && took < Duration::from_secs(30), "{case}: {code} after {took:?}: {output}");
    }
    let (code, _, output) = over_mpi("disagree", 2);
    assert!(code != 0 && output.contains("all-gather") && output.contains("all-reduce"), "{code}: {output}");
}

/// `mpirun` itself notices a lost rank, says which, and ends the others.
#[cfg(feature = "mpi")]
#[test]
fn mpi_ends_all_when_a_rank_is_lost() {
    let (code, took, output) = over_mpi("exit", 3);
    assert!(code != 0 && took < Duration::from_secs(30), "{code} after {took:?}: {output}");
    assert!(output.contains("process rank 2") && output.contains("signal 9"), "{output}");
}

/// In a process of its own, as libtorch looks for CUDA once.
#[test]
fn cuda_loads_when_asked_for_and_says_what_is_missing() {
    let mut ranks = Ranks(vec![spawn("cuda", 0, 1, free_port())]);
    let output = &ranks.outputs(&[0])[0];
    assert!(output.contains("rank is fine"), "{output}");
}

// ---- what a rank does ----

#[test]
fn as_rank() {
    let Ok(case) = std::env::var("CORRAL_TEST_CASE") else { return };
    let result = run_case(&case);
    match result {
        Ok(()) => {
            println!("rank is fine");
            leave();
        }
        Err(e) => println!("error: {e}"),
    }
}

fn run_case(case: &str) -> corral::Result<()> {
    match case {
        "cuda" => return cuda(),
        "begin" => return begin(),
        _ => {}
    }
    let timeout_s = match case {
        "hang" | "hang_scatter" | "stop_0" | "come" | "disagree" => 3.0,
        _ => 120.0,
    };
    if case == "hosts" {
        let parallel = Parallel { mode: Mode::Hybrid, ..Parallel::default() };
        return World::from_env(BackendChoice::Auto, DeviceChoice::Cpu, &parallel).map(drop);
    }
    let backend = BackendChoice::of(None)?;
    let parallel = Parallel { timeout_s, ..Parallel::default() };
    let world = World::from_env(backend, DeviceChoice::Cpu, &parallel)?;
    let name = if backend == BackendChoice::Mpi { "mpi" } else { "gloo" };
    assert_eq!(world.choice, format!("communication: {name} (ranks on CPU)"));
    let one = || Tensor::ones([4], (Kind::Float, Device::Cpu));
    match case {
        "values" => [Kind::Float, Kind::BFloat16, Kind::Double, Kind::Int64]
            .into_iter()
            .try_for_each(|k| values(&world, k)),
        "overlap" => overlap(&world),
        "large" => [Kind::Float, Kind::BFloat16].into_iter().try_for_each(|k| large(&world, k)),
        "sub_groups" => sub_groups(&world),
        "transfers" => transfers(&world),
        "exit" | "exit_0" => {
            let leaver = if case == "exit" { 2 } else { 0 };
            world.group.all_reduce(&one(), ReduceOp::Sum)?.wait()?;
            if world.rank == leaver {
                kill(libc::SIGKILL);
            }
            Ok(world.group.all_reduce(&one(), ReduceOp::Sum)?.wait()?)
        }
        "hang" => {
            world.group.all_reduce(&one(), ReduceOp::Sum)?.wait()?;
            if world.rank == 1 {
                std::thread::sleep(Duration::from_secs(600));
            }
            let began = Instant::now();
            let out = Tensor::zeros([12], (Kind::Float, Device::Cpu));
            let result = world.group.all_gather(&out, &one())?.wait();
            println!("waited {} s", began.elapsed().as_secs_f64());
            Ok(result?)
        }
        "hang_scatter" | "exit_scatter" => {
            world.group.all_reduce(&one(), ReduceOp::Sum)?.wait()?;
            if world.rank == 1 && case == "exit_scatter" {
                kill(libc::SIGKILL);
            } else if world.rank == 1 {
                std::thread::sleep(Duration::from_secs(600));
            }
            let input = Tensor::ones([3_000_000], (Kind::Float, Device::Cpu));
            let out = Tensor::zeros([1_000_000], (Kind::Float, Device::Cpu));
            Ok(world.group.reduce_scatter(&out, &input, ReduceOp::Sum)?.wait()?)
        }
        "stop_0" => {
            world.group.all_reduce(&one(), ReduceOp::Sum)?.wait()?;
            if world.rank == 0 {
                kill(libc::SIGSTOP);
            }
            Ok(world.group.all_reduce(&one(), ReduceOp::Sum)?.wait()?)
        }
        "disagree" => {
            let out = Tensor::zeros([8], (Kind::Float, Device::Cpu));
            let result = match world.rank {
                0 => world.group.all_reduce(&one(), ReduceOp::Sum)?.wait(),
                _ => world.group.all_gather(&out, &one())?.wait(),
            };
            Ok(result?)
        }
        _ => Ok(()),
    }
}

fn kill(signal: i32) {
    let signal = nix::sys::signal::Signal::try_from(signal).unwrap();
    nix::sys::signal::kill(nix::unistd::getpid(), signal).unwrap();
    // Another thread may take the signal, and this one run on until that has.
    std::thread::sleep(Duration::from_secs(1));
}

/// Small integers: exact in every dtype.
fn values(world: &World, kind: Kind) -> corral::Result<()> {
    let (group, rank, size) = (&world.group, world.rank, world.world_size);
    let of = |values: &[f64]| Tensor::from_slice(values).to_kind(kind);
    let equal = |what: &str, got: &Tensor, want: &[f64]| {
        let got = Vec::<f64>::try_from(got.view(-1).to_kind(Kind::Double)).unwrap();
        assert_eq!(got, want, "{what} in {kind:?} on rank {rank}");
    };
    let r = rank as f64;

    for (op, want) in [(ReduceOp::Sum, [3.0, 6.0]), (ReduceOp::Max, [2.0, 3.0]), (ReduceOp::Min, [0.0, 1.0])]
    {
        let t = of(&[r, r + 1.0]);
        group.all_reduce(&t, op)?.wait()?;
        equal("all-reduce", &t, &want);
    }
    let averaged = of(&[r, r + 1.0]);
    let result = group.all_reduce(&averaged, ReduceOp::Avg);
    if kind == Kind::Int64 {
        assert!(result.err().unwrap().message.contains("average"));
    } else {
        result?.wait()?;
        equal("average", &averaged, &[1.0, 2.0]);
    }

    let gathered = Tensor::zeros([size, 2], (kind, Device::Cpu));
    group.all_gather(&gathered, &of(&[r, 10.0 * r]))?.wait()?;
    equal("all-gather", &gathered, &[0.0, 0.0, 1.0, 10.0, 2.0, 20.0]);

    let input = of(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) * (rank + 1);
    let before = input.copy();
    let part = Tensor::zeros([2], (kind, Device::Cpu));
    group.reduce_scatter(&part, &input, ReduceOp::Sum)?.wait()?;
    equal("reduce-scatter", &part, &[6.0 * (2.0 * r + 1.0), 6.0 * (2.0 * r + 2.0)]);
    assert_eq!(input, before, "reduce-scatter leaves its input");
    if kind != Kind::Int64 {
        group.reduce_scatter(&part, &input, ReduceOp::Avg)?.wait()?;
        equal("averaging reduce-scatter", &part, &[2.0 * (2.0 * r + 1.0), 2.0 * (2.0 * r + 2.0)]);
    }

    let t = of(&[r + 5.0]);
    group.broadcast(&t, 2)?.wait()?;
    equal("broadcast", &t, &[7.0]);

    let exchanged = Tensor::zeros([3], (kind, Device::Cpu));
    group.all_to_all(&exchanged, &of(&[r, 10.0 + r, 20.0 + r]))?.wait()?;
    equal("all-to-all", &exchanged, &[10.0 * r, 10.0 * r + 1.0, 10.0 * r + 2.0]);

    group.barrier()?;
    assert_eq!(group.combine(&[r, -r], ReduceOp::Max)?, [2.0, 0.0]);
    Ok(())
}

/// Many under way at once, waited for in another order; one is dropped unwaited.
fn overlap(world: &World) -> corral::Result<()> {
    let tensors: Vec<_> =
        (0..8).map(|i| Tensor::full([100_000], (world.rank + 1) * i, (Kind::Float, Device::Cpu))).collect();
    let mut works = Vec::new();
    for t in &tensors {
        works.push(world.group.all_reduce(t, ReduceOp::Sum)?);
    }
    for (i, work) in works.into_iter().enumerate().rev() {
        if i == 3 {
            continue;
        }
        work.wait()?;
        assert_eq!(tensors[i].min().double_value(&[]), 3.0 * i as f64);
        assert_eq!(tensors[i].max().double_value(&[]), 3.0 * i as f64);
    }
    Ok(world.group.barrier()?)
}

/// Slices of several pieces with a rest, several collectives under way at once, waited for in another order.
fn large(world: &World, kind: Kind) -> corral::Result<()> {
    let (rank, size, n) = (world.rank, world.world_size, 600_001);
    let on_cpu = (kind, Device::Cpu);
    let ramp = (Tensor::arange(size * n, (Kind::Int64, Device::Cpu)).remainder(61)).to_kind(kind);
    let mut works = Vec::new();
    for i in 0..3 {
        let gathered = Tensor::zeros([size * n], on_cpu);
        let mine = ramp.narrow(0, rank * n, n) + i;
        // The first in place: a rank's slice is where it belongs already.
        if i == 0 {
            gathered.narrow(0, rank * n, n).copy_(&mine);
            let part = gathered.narrow(0, rank * n, n);
            works.push((world.group.all_gather(&gathered, &part)?, gathered, &ramp + i));
        } else {
            works.push((world.group.all_gather(&gathered, &mine)?, gathered, &ramp + i));
        }
        // 1e8 + 1 rounds to 1e8, and so the order in which three ranks are added shows: (x0 + x1) + x2.
        let factor = [1.0e8, 1.0, -1.0e8][rank as usize];
        let input = Tensor::ones([size * n], on_cpu) * factor;
        let part = Tensor::full([n], 7, on_cpu);
        let sum = (Tensor::full([n], 1.0e8, on_cpu) + 1.0) - Tensor::full([n], 1.0e8, on_cpu);
        works.push((world.group.reduce_scatter(&part, &input, ReduceOp::Sum)?, part, sum));
        let input = &ramp * (rank + 1);
        let part = Tensor::zeros([n], on_cpu);
        works.push((
            world.group.reduce_scatter(&part, &input, ReduceOp::Max)?,
            part,
            ramp.narrow(0, rank * n, n) * size,
        ));
    }
    for (i, (work, got, want)) in works.into_iter().enumerate().rev() {
        work.wait()?;
        assert!(got.equal(&want), "collective {i} in {kind:?} on rank {rank}");
    }
    uneven_all_reduces(world, kind, &ramp)
}

/// All-reduces of numbers of elements that ranks cannot divide evenly, also fewer than ranks, and none.
fn uneven_all_reduces(world: &World, kind: Kind, ramp: &Tensor) -> corral::Result<()> {
    let (rank, size) = (world.rank, world.world_size);
    let ones = size * (size + 1) / 2;
    let mut works = Vec::new();
    for n in [0, 1, size - 1, 100_003, size * 600_001 - 2, size * 600_001] {
        // Up to 19 x 6: exact in bf16.
        let ramp = ramp.narrow(0, 0, n).remainder(20);
        let sum = &ramp * (rank + 1);
        works.push((world.group.all_reduce(&sum, ReduceOp::Sum)?, sum, &ramp * ones));
        let most = &ramp * (rank + 1);
        works.push((world.group.all_reduce(&most, ReduceOp::Max)?, most, &ramp * size));
        let factor = [1.0e8, 1.0, -1.0e8][rank as usize];
        let ordered = Tensor::ones([n], (kind, Device::Cpu)) * factor;
        // Over Gloo the order is that of a ring.
        if world.group.backend_name() == "mpi" {
            let big = Tensor::full([n], 1.0e8, (kind, Device::Cpu));
            works.push((world.group.all_reduce(&ordered, ReduceOp::Sum)?, ordered, (&big + 1.0) - &big));
        }
    }
    for (i, (work, got, want)) in works.into_iter().enumerate().rev() {
        work.wait()?;
        assert!(got.equal(&want), "all-reduce {i} in {kind:?} on rank {rank}");
    }
    Ok(())
}

fn sub_groups(world: &World) -> corral::Result<()> {
    let rank = world.rank;
    if rank != 1 {
        // Order of members is order of ranks in the group.
        let pair = world.new_group("pair", &[2, 0])?;
        assert_eq!((pair.rank(), pair.size(), pair.name()), (if rank == 2 { 0 } else { 1 }, 2, "pair"));
        let out = Tensor::zeros([2], (Kind::Int64, Device::Cpu));
        pair.all_gather(&out, &Tensor::from_slice(&[rank]))?.wait()?;
        assert_eq!(Vec::<i64>::try_from(&out)?, [2, 0]);
        assert!(world.new_group("pair", &[2, 0]).unwrap_err().message.contains("made before"));
    } else {
        assert!(world.new_group("pair", &[2, 0]).is_err(), "not a member");
        assert_eq!(world.new_group("alone", &[1])?.size(), 1);
    }
    let t = Tensor::from_slice(&[rank]);
    world.group.all_reduce(&t, ReduceOp::Sum)?.wait()?;
    assert_eq!(t.int64_value(&[0]), 3);
    Ok(())
}

/// Between two of three ranks, both ways at once, also larger than what is buffered on the way.
fn transfers(world: &World) -> corral::Result<()> {
    if world.rank == 1 {
        return Ok(world.group.barrier()?);
    }
    let pair = world.new_group("pair", &[0, 2])?;
    let (mine, theirs) = (world.rank, 2 - world.rank);
    for n in [1, 1000, 3_000_000] {
        let sent: Vec<Tensor> =
            (0..2).map(|i| Tensor::full([n], 10 * mine + i, (Kind::BFloat16, Device::Cpu))).collect();
        let received = [
            Tensor::zeros([n], (Kind::BFloat16, Device::Cpu)),
            Tensor::zeros([n], (Kind::BFloat16, Device::Cpu)),
        ];
        let mut works = Vec::new();
        for (out, into) in sent.iter().zip(&received) {
            // Both ranks call them in one order.
            if mine == 0 {
                works.push(pair.send(out)?);
                works.push(pair.receive(into)?);
            } else {
                works.push(pair.receive(into)?);
                works.push(pair.send(out)?);
            }
        }
        works.into_iter().rev().try_for_each(|work| work.wait())?;
        for (i, t) in received.iter().enumerate() {
            let want = (10 * theirs + i as i64) as f64;
            assert_eq!((t.min().double_value(&[]), t.max().double_value(&[])), (want, want));
        }
    }
    Ok(world.group.barrier()?)
}

/// Groups of one rank each, whose first collectives two threads begin at one moment.
fn begin() -> corral::Result<()> {
    const RANKS: i64 = 24;
    const GROUPS: usize = 8;
    let timeout = Duration::from_secs(30);
    let server = Store::tcp("127.0.0.1", 0, true, timeout)?;
    // Ranks as threads, since a group takes its time.
    let rank = &|rank: i64| -> corral::Result<_> {
        let watch = Watch::start(server.reconnect()?, rank, RANKS, rank == 0)?;
        let group =
            |i| Group::new(&watch, Backend::Gloo, &format!("{rank}/{i}"), &[rank], timeout, Device::Cpu);
        let groups = (0..GROUPS).map(group).collect::<kernels::Result<Vec<_>>>()?;
        Ok((watch, groups))
    };
    let (watches, groups): (Vec<_>, Vec<_>) = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..RANKS).map(|r| scope.spawn(move || rank(r))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect::<corral::Result<Vec<_>>>()
    })?
    .into_iter()
    .unzip();
    // Groups that were made one after the other go to different threads, none of which has two of a rank.
    let mut by_rank: Vec<_> = groups.into_iter().map(Vec::into_iter).collect();
    let groups: Vec<Group> =
        (0..GROUPS).flat_map(|_| by_rank.iter_mut().filter_map(Iterator::next).collect::<Vec<_>>()).collect();
    let arrived = AtomicUsize::new(0);
    let begin = |thread: usize| -> kernels::Result<()> {
        let mine: Vec<&Group> = groups.iter().skip(thread).step_by(2).collect();
        let one = Tensor::ones([1], (Kind::Float, Device::Cpu));
        let tensors: Vec<Tensor> = mine.iter().map(|_| one.copy()).collect();
        let mut works = Vec::new();
        for (i, (group, tensor)) in mine.iter().zip(&tensors).enumerate() {
            // The threads meet before every collective.
            arrived.fetch_add(1, Ordering::AcqRel);
            for spins in 1.. {
                match arrived.load(Ordering::Acquire) {
                    n if n >= 2 * (i + 1) => break,
                    _ if spins % 4096 == 0 => std::thread::yield_now(),
                    _ => std::hint::spin_loop(),
                }
            }
            works.push(group.all_reduce(tensor, ReduceOp::Sum));
        }
        works.into_iter().collect::<kernels::Result<Vec<_>>>()?.into_iter().try_for_each(|work| work.wait())
    };
    std::thread::scope(|scope| {
        let begin = &begin;
        let threads: Vec<_> = (0..2).map(|thread| scope.spawn(move || begin(thread))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })?;
    // Where it records, the race is there, whether it was lost now or not.
    let trace = kernels::comm::recorder_trace()?;
    assert!(!trace.contains("\"entries\""), "the flight recorder is on: {trace:.200}");
    drop(watches);
    Ok(())
}

/// Works with and without a GPU.
fn cuda() -> corral::Result<()> {
    let loaded = |name: &str| std::fs::read_to_string("/proc/self/maps").unwrap().contains(name);
    assert!(!loaded("libtorch_cuda.so"), "CPU runs do not load CUDA");
    let cuda = kernels::cuda::load()?;
    assert!(loaded("libtorch_cuda.so"));
    match cuda.device_count() {
        Ok(count) => assert_eq!(count as i64, tch::Cuda::device_count()),
        Err(_) => {
            assert!(!tch::Cuda::is_available());
            let e =
                World::from_env(BackendChoice::Auto, DeviceChoice::Cuda, &Parallel::default()).err().unwrap();
            assert_eq!(e.exit_code(), 2);
            assert!(e.message.starts_with("--device cuda: no usable GPU: "), "{e}");
            println!("{e}");
        }
    }
    Ok(())
}
