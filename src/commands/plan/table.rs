//! A memory plan, as a table or as JSON.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tch::Device;

use crate::commands::check::size;
use crate::plan::models::{PHASES, peaks};
use crate::plan::traffic::Traffic;
use crate::plan::{ModelsMemory, TrainingMemory};

/// The largest micro-batch that fits a device.
#[derive(Clone, Copy)]
pub(super) struct Fit {
    /// The device's memory.
    bytes: u64,
    /// The most rows that fit; 0: not even one.
    largest: i64,
    /// The most of those that divide the rows of a rank.
    divides: Option<i64>,
}

impl Fit {
    pub(super) fn new(t: &TrainingMemory, bytes: u64, process: i64) -> Fit {
        let largest = t.largest(bytes as i64, process);
        let divides = (1..=largest.min(t.rows)).rev().find(|n| t.rows % n == 0);
        Fit { bytes, largest, divides }
    }
}

fn kind_of_device(t: &TrainingMemory) -> &'static str {
    if t.device == Device::Cpu { "cpu" } else { "cuda" }
}

/// What a step takes at most, the reference and the process included.
fn step_bytes(t: &TrainingMemory, process: i64) -> i64 {
    t.step(t.micro_batch).total() + t.stays() + process
}

pub(super) fn training_json(t: &TrainingMemory, process: i64, fit: Option<Fit>, time: Value) {
    let (stays, asking) = (t.stays(), t.asking(t.micro_batch));
    let (stage, largest) = t.largest_stage(t.micro_batch);
    let mut out = json!({
        "subcommand": t.subcommand,
        "parameters": t.shape.num_parameters(),
        "device": kind_of_device(t),
        "ranks": t.ranks,
        "micro_batch_size": t.micro_batch,
        "sequence_length": t.each.length,
        "parts": t.step(t.micro_batch),
        "process_bytes": process,
        "step_bytes": step_bytes(t, process),
        "checkpoint_bytes": largest.checkpoint,
        "sent_bytes": t.traffic(t.micro_batch),
        "peak_bytes": t.peak(t.micro_batch, process),
    });
    if t.num_stages() > 1 {
        out["stage"] = json!(stage);
        out["stages_step_bytes"] = t.steps(t.micro_batch).into_iter().map(|bytes| bytes + process).collect();
    }
    if t.each.sequences > 1 {
        out["completions"] = json!(t.each.sequences);
        out["reference_bytes"] = json!(stays);
        out["asking_bytes"] = json!(if asking > 0 { asking + process } else { 0 });
    }
    if t.device != Device::Cpu {
        out["host_bytes"] = json!(largest.checkpoint + if t.offload { largest.moments } else { 0 });
    }
    if let Some(Fit { bytes, largest, divides }) = fit {
        out["device_memory"] = json!(bytes);
        out["largest_micro_batch_size"] = json!(largest);
        out["largest_of_batch"] = divides.map_or(Value::Null, Value::from);
    }
    println!("{}", with(out, time));
}

pub(super) fn training_table(t: &TrainingMemory, process: i64, fit: Option<Fit>) {
    let (stage, largest) = t.largest_stage(t.micro_batch);
    let parts = t.step(t.micro_batch);
    let (stays, asking) = (t.stays(), t.asking(t.micro_batch));
    let completions = match t.each.sequences {
        1 => String::new(),
        n => format!(" prompts x {n} completions"),
    };
    println!(
        "# {:.2}M parameters, {:?} compute, {}; {} rank(s); micro-batches of {}{completions} x {} tokens",
        t.shape.num_parameters() as f64 / 1e6,
        t.compute,
        kind_of_device(t),
        t.ranks,
        t.micro_batch,
        t.each.length,
    );
    let line = |what: &str, bytes: i64| println!("{what:<28} {:>12}", size(bytes.max(0) as u64));
    if t.num_stages() > 1 {
        let steps = t.steps(t.micro_batch).into_iter().map(|bytes| size((bytes + process) as u64));
        let steps = steps.collect::<Vec<_>>().join(", ");
        println!("# stage {stage} of {} takes most; a step of a rank of each: {steps}", t.num_stages());
    }
    let named = parts.named();
    named.iter().filter(|(_, bytes)| *bytes > 0).for_each(|(what, bytes)| line(what, *bytes));
    if process > 0 {
        line("the process without a model", process);
    }
    if stays > 0 {
        line("the reference", stays);
    }
    line("a step of a rank, at most", step_bytes(t, process));
    if asking > 0 {
        line("forwards besides the steps", asking + process);
    }
    match t.device {
        Device::Cpu if largest.checkpoint > 0 => {
            line("a checkpoint being written", largest.checkpoint);
            line("together", t.peak(t.micro_batch, process));
        }
        Device::Cpu => {}
        _ => {
            println!(
                "# in addition: memory of CUDA and its libraries, and memory that the allocator cannot use"
            );
            if t.offload {
                line("moments in host memory", largest.moments);
            }
            if largest.checkpoint > 0 {
                line("a checkpoint, host memory", largest.checkpoint);
            }
        }
    }
    let Traffic { shard, replicate, tensor, context, pipeline } = t.traffic(t.micro_batch);
    for (axis, bytes) in [
        ("shard", shard),
        ("replicate", replicate),
        ("tensor", tensor),
        ("context", context),
        ("pipeline", pipeline),
    ] {
        if bytes > 0.0 {
            line(&format!("sent in a step: {axis}"), bytes as i64);
        }
    }
    if let Some(Fit { bytes, largest, divides }) = fit {
        let (of, rows) = (size(bytes), t.rows);
        match divides {
            None => println!(
                "# {of}: not even a micro_batch_size of 1 fits, which takes {}",
                size(t.peak(1, process) as u64)
            ),
            Some(n) if largest >= rows => {
                println!("# {of}: a micro_batch_size of {largest} fits; the {rows} rows of a rank need {n}");
            }
            Some(n) => println!(
                "# {of}: a micro_batch_size of {largest} fits; of those that divide the {rows} rows of a rank {n}"
            ),
        }
    }
}

/// An object with the entries of another one.
fn with(mut object: Value, other: Value) -> Value {
    if let (Some(object), Value::Object(other)) = (object.as_object_mut(), other) {
        object.extend(other);
    }
    object
}

pub(super) fn models_json(m: &ModelsMemory, time: Value) {
    let models: Vec<Value> = m
        .models
        .iter()
        .map(|m| {
            json!({"name": m.name, "parameters": m.parameters, "device": m.device, "offload": m.offload,
                   "resident_bytes": m.resident, "phase_bytes": m.at_work})
        })
        .collect();
    let devices: BTreeMap<&str, [i64; 3]> = m.by_device().iter().map(|(d, on)| (*d, peaks(on))).collect();
    let out = json!({"subcommand": m.subcommand, "ranks": m.ranks, "phases": PHASES, "models": models,
                     "device_bytes": devices, "host_bytes": m.host()});
    println!("{}", with(out, time));
}

pub(super) fn models_table(m: &ModelsMemory) {
    println!("# {}: {} rank(s); of each, at most", m.subcommand, m.ranks);
    println!(
        "{:<14} {:>12} {:>9} {:>12} {:>12} {:>12} {:>12}",
        "", "parameters", "dtype", "stays", PHASES[0], PHASES[1], PHASES[2]
    );
    let bytes = |b: i64| size(b.max(0) as u64);
    for (device, on) in &m.by_device() {
        println!("{device}");
        for m in on {
            let stays = if m.offload { "offloaded".into() } else { bytes(m.resident) };
            let [sampling, scoring, learning] = m.at_work.map(|b| b.map_or("-".into(), bytes));
            println!(
                "  {:<12} {:>11.1}M {:>9} {stays:>12} {sampling:>12} {scoring:>12} {learning:>12}",
                m.name,
                m.parameters as f64 / 1e6,
                format!("{:?}", m.compute).to_lowercase(),
            );
        }
        let [a, b, c] = peaks(on).map(bytes);
        println!("  {:<48} {a:>12} {b:>12} {c:>12}", "together");
    }
    if m.host() > 0 {
        println!("host memory of offloaded tensors: {}", bytes(m.host()));
    }
    println!(
        "# in addition: memory of the process and its libraries, and memory that the allocator cannot use"
    );
}
