//! How long a training will take here, in words.

use kernels::cuda;

use crate::algorithms::recipe::{Recipe, Shown};
use crate::commands::Global;
use crate::distributed::world::DeviceChoice;
use crate::error::Result;
use crate::plan::MemoryPlan;
use crate::plan::links::{Links, Sending};
use crate::plan::rates::{MachineRates, Rates};
use crate::plan::work::StepWork;
use crate::telemetry::progress::duration;

/// The rates of the device that the command line names; `gpu`: of a GPU of this name, which need not be here.
pub fn rates(global: &Global, gpu: Option<&str>) -> Result<Option<Rates>> {
    let named = |index: usize| Some(cuda::load().ok()?.device_info(index).ok()?.name);
    Ok(match (gpu, DeviceChoice::of(global.device.as_deref())?) {
        (Some(name), _) => Some(Rates::Gpu(name.into())),
        (None, DeviceChoice::Cpu) => MachineRates::known().map(Rates::Machine),
        (None, DeviceChoice::Cuda) => named(0).map(Rates::Gpu),
        (None, DeviceChoice::CudaIndex(index)) => named(index).map(Rates::Gpu),
    })
}

/// The work of a run over data that are open: rows count as they are, in so many steps as there are.
pub fn work<R: Recipe>(config: &R, inputs: &R::Inputs, plan: &MemoryPlan) -> StepWork {
    let work = plan.work().with_steps(R::steps(inputs));
    match config.shown(inputs) {
        Shown::Examples { train, .. } => {
            let a_row = train.counts().tokens as f64 / train.num_rows().max(1) as f64;
            let full = work.tokens / config.common().train.batch_size as f64;
            work.with_tokens(a_row / full)
        }
        Shown::Windows { .. } | Shown::Prompts(_) => work,
    }
}

/// What a step and the run will take.
pub fn line(work: &StepWork, rates: Option<&Rates>) -> String {
    let Some(rates) = rates else {
        return "predicted time: - (corral bench rates measures this machine in half a minute; of a GPU: --gpu NAME)"
            .into();
    };
    let Some(p) = work.predict(rates) else {
        return match rates {
            Rates::Gpu(name) if !work.samples => {
                format!("predicted time: - (the peak of {name} in {:?} is not known)", work.compute)
            }
            Rates::Gpu(_) => "predicted time: - (sampling on a GPU was not measured yet)".into(),
            Rates::Machine(_) => "predicted time: - (corral bench rates has not measured this dtype)".into(),
        };
    };
    let whole = match (work.steps, p.total_s) {
        (Some(steps), Some(total_s)) => format!("{} for {steps} steps, ", duration(total_s)),
        _ => String::new(),
    };
    format!(
        "predicted time: {whole}{} s a step, {:.0} tokens/s ({}{})",
        short(p.step_s),
        p.tokens_per_s,
        rates.basis(),
        if work.samples { "; responses of maximum length" } else { "" }
    )
}

/// What a rank sends in a step takes, at speeds that were stated, in a line.
pub fn sending_line(sending: &Sending, links: &Links, work: &StepWork, rates: Option<&Rates>) -> String {
    let Sending { overlapped_s, exposed_s, bubble } = *sending;
    let speeds = format!("{} and {} GB/s", short(links.inside / 1e9), short(links.across / 1e9));
    let sent = format!(
        "sending at {speeds} inside and between nodes: {} s beside computing, {} s that it waits for",
        short(overlapped_s),
        short(exposed_s)
    );
    let sent = match bubble > 0.0 {
        true => format!("{sent}, stages wait for each other for {:.0} % of it", 100.0 * bubble),
        false => sent,
    };
    match rates.and_then(|rates| work.predict(rates)) {
        Some(p) => format!("{sent}; with it {} s a step (predicted)", short(sending.step_s(p.step_s))),
        None => sent,
    }
}

/// Seconds with two digits that count.
pub fn short(seconds: f64) -> String {
    match seconds {
        s if s >= 9.95 => format!("{s:.0}"),
        s if s >= 0.995 => format!("{s:.1}"),
        s => format!("{s:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::sections::Compute;

    #[test]
    fn lines_tell_what_is_known() {
        let work = StepWork {
            tokens: 4e6,
            flops: 4e6 * 6.0 * 8e9,
            read_bytes: 0.0,
            samples: false,
            hidden_size: 4096,
            compute: Compute::Bfloat16,
            steps: Some(1000),
            ranks: 8,
        };
        let gpu = |name: &str| Rates::Gpu(name.into());
        assert_eq!(
            line(&work, Some(&gpu("H100"))),
            "predicted time: 16 h 51 min for 1000 steps, 61 s a step, 65933 tokens/s (assumed: 40 % of the peak of H100, not \
             measured)"
        );
        assert!(line(&work, None).starts_with("predicted time: - (corral bench rates"));
        assert!(line(&work, Some(&gpu("X1"))).contains("the peak of X1"));
        assert!(line(&StepWork { samples: true, ..work }, Some(&gpu("H100"))).contains("sampling"));
    }

    #[test]
    fn seconds_are_short() {
        assert_eq!([0.123, 1.04, 9.96, 123.4].map(short), ["0.12", "1.0", "10", "123"]);
    }
}
