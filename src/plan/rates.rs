//! How fast a machine computes: a processor as `corral bench rates` has measured it, a GPU as its data sheet says.

use std::fs;
use std::path::PathBuf;
use std::thread;

use kernels::cuda;
use serde::{Deserialize, Serialize};

use super::work::StepWork;
use crate::config::sections::Compute;
use crate::env;
use crate::error::{Context, Error, Result};
use crate::files;
use crate::model::compute_kind;

/// The share of a GPU's peak that a step is taken to reach.
pub const GPU_SHARE: f64 = 0.4;

/// Training steps of a model of this width.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct TrainingRate {
    /// Numbers of a hidden state.
    pub hidden_size: i64,
    /// The dtype of products.
    pub compute: Compute,
    /// Of forward and backward.
    pub flops_per_s: f64,
}

/// Forwards of one token a row.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct DecodingRate {
    /// The dtype of products.
    pub compute: Compute,
    /// Of parameters.
    pub bytes_per_s: f64,
}

/// A machine, with all of its cores.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineRates {
    /// Its name and its widest instructions.
    pub processor: String,
    /// Those that the process may use.
    pub cores: usize,
    /// The day of the measurement, such as 2026-11-28.
    pub date: String,
    /// By width and dtype.
    pub training: Vec<TrainingRate>,
    /// By dtype.
    pub decoding: Vec<DecodingRate>,
}

/// The file that `corral bench rates` keeps: machines that share a home have an entry each.
#[derive(Debug, Default, Serialize, Deserialize)]
struct RatesFile {
    machines: Vec<MachineRates>,
}

/// What predictions rest on.
pub enum Rates {
    /// A processor.
    Machine(MachineRates),
    /// A GPU by (part of) its name.
    Gpu(String),
}

fn place() -> Result<PathBuf> {
    let home = env::corral_home();
    home.map(|home| home.join("rates.json")).ok_or_else(|| {
        Error::config("neither CORRAL_HOME nor HOME is set, so there is no folder for rates.json")
    })
}

/// This machine's processor, and how many cores this process may use.
pub fn this_machine() -> (String, usize) {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name =
        info.lines().find(|line| line.starts_with("model name")).and_then(|line| line.split(": ").nth(1));
    // Processors of one name differ in what a virtual machine shows of them.
    let extras = ["amx_bf16", "avx512_bf16", "avx512f", "avx2"];
    let extra = extras.iter().find(|flag| info.split_whitespace().any(|word| word == **flag));
    let name = format!("{}, {}", name.unwrap_or("unknown processor"), extra.unwrap_or(&"no AVX2"));
    (name, thread::available_parallelism().map_or(1, usize::from))
}

impl MachineRates {
    /// Those of this machine, if they were measured. A file that cannot be read counts as none: measuring replaces it.
    pub fn known() -> Option<MachineRates> {
        let (processor, cores) = this_machine();
        let file: RatesFile = serde_json::from_str(&fs::read_to_string(place().ok()?).ok()?).ok()?;
        file.machines.into_iter().find(|m| m.processor == processor && m.cores == cores)
    }

    /// Keeps them for later predictions; returns where.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn keep(self) -> Result<PathBuf> {
        let path = place()?;
        let there = fs::read_to_string(&path).ok().and_then(|text| serde_json::from_str(&text).ok());
        let mut file: RatesFile = there.unwrap_or_default();
        file.machines.retain(|m| (&m.processor, m.cores) != (&self.processor, self.cores));
        file.machines.push(self);
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).with_context(|| format!("cannot create {}", dir.display()))?;
        }
        let text =
            serde_json::to_string_pretty(&file).map_err(|e| Error::failed(format!("rates.json: {e}")))?;
        files::write_file(&path, (text + "\n").as_bytes())?;
        Ok(path)
    }
}

impl Rates {
    /// FLOP/s that all ranks of this work have together. Ranks on a processor share it; each has a GPU of its own.
    pub(super) fn flops_per_s(&self, work: &StepWork) -> Option<f64> {
        match self {
            Rates::Gpu(name) => {
                let peak = cuda::peak_flops(name, compute_kind(work.compute))?;
                Some(GPU_SHARE * peak * work.ranks as f64)
            }
            Rates::Machine(m) => {
                let mut known: Vec<(f64, f64)> = m
                    .training
                    .iter()
                    .filter(|rate| rate.compute == work.compute)
                    .map(|rate| ((rate.hidden_size as f64).ln(), rate.flops_per_s.ln()))
                    .collect();
                known.sort_by(|a, b| a.0.total_cmp(&b.0));
                Some(between(&known, (work.hidden_size as f64).ln())?.exp())
            }
        }
    }

    pub(super) fn bytes_per_s(&self, work: &StepWork) -> Option<f64> {
        match self {
            Rates::Gpu(_) => None,
            Rates::Machine(m) => {
                m.decoding.iter().find(|rate| rate.compute == work.compute).map(|rate| rate.bytes_per_s)
            }
        }
    }

    /// What a prediction rests on, in words.
    pub fn basis(&self) -> String {
        match self {
            Rates::Machine(m) => format!("measured by corral bench rates on {}", m.date),
            Rates::Gpu(name) => {
                format!("assumed: {:.0} % of the peak of {name}, not measured", 100.0 * GPU_SHARE)
            }
        }
    }
}

/// The value at `x` on the line through the points around it, which are sorted; outside of them the nearest one's.
fn between(points: &[(f64, f64)], x: f64) -> Option<f64> {
    let (first, last) = (points.first()?, points.last()?);
    let above = points.iter().position(|p| p.0 >= x).unwrap_or(points.len());
    Some(match above {
        0 => first.1,
        i if i == points.len() => last.1,
        i => {
            let ((x0, y0), (x1, y1)) = (points[i - 1], points[i]);
            y0 + (y1 - y0) * (x - x0) / (x1 - x0)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(hidden_size: i64) -> StepWork {
        StepWork {
            tokens: 1e3,
            flops: 1e12,
            read_bytes: 1e9,
            samples: false,
            hidden_size,
            compute: Compute::Float32,
            steps: Some(10),
            ranks: 2,
        }
    }

    fn machine() -> Rates {
        let rate =
            |hidden_size, flops_per_s| TrainingRate { hidden_size, compute: Compute::Float32, flops_per_s };
        Rates::Machine(MachineRates {
            processor: "a processor".into(),
            cores: 2,
            date: "2026-11-28".into(),
            training: vec![rate(100, 1e10), rate(10_000, 1e12)],
            decoding: vec![DecodingRate { compute: Compute::Float32, bytes_per_s: 1e10 }],
        })
    }

    #[test]
    fn rates_lie_between_those_of_the_measured_widths() {
        let rate = |hidden| machine().flops_per_s(&work(hidden)).unwrap();
        for (hidden, expected) in [(10, 1e10), (100, 1e10), (1_000, 1e11), (10_000, 1e12), (100_000, 1e12)] {
            assert!((rate(hidden) / expected - 1.0).abs() < 1e-9, "{hidden}: {}", rate(hidden));
        }
        let other = StepWork { compute: Compute::Bfloat16, ..work(100) };
        assert!(other.predict(&machine()).is_none());
    }

    #[test]
    fn a_prediction_adds_computing_and_reading() {
        let p = work(10_000).predict(&machine()).unwrap();
        assert!((p.step_s - 1.1).abs() < 1e-9 && (p.total_s.unwrap() - 11.0).abs() < 1e-9);
        assert!((p.tokens_per_s - 1e3 / 1.1).abs() < 1e-6);
    }

    #[test]
    fn gpus_are_predicted_where_their_peak_is_stated_and_nothing_is_sampled() {
        let bf16 = StepWork { compute: Compute::Bfloat16, ..work(4096) };
        let p = bf16.predict(&Rates::Gpu("H100".into())).unwrap();
        assert!((p.step_s - 1e12 / (0.4 * 989e12 * 2.0)).abs() < 1e-9);
        assert!(StepWork { samples: true, ..bf16 }.predict(&Rates::Gpu("H100".into())).is_none());
        assert!(bf16.predict(&Rates::Gpu("unknown".into())).is_none());
    }
}
