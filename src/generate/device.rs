//! Steps of generation that stay on a GPU: it reads its own tokens, and the host those of the step before, while the next one
//! runs.
//!
//! A step is queued as a whole, as a CUDA graph where it can be captured. On the CPU, where tests run it with the emulated
//! kernels, it is the same work, done at once.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use kernels::cuda::{CopyStream, Graph, Pinned};
use kernels::ops::{self, SampleOptions, SampleRows};
use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::generate::sampler::{self, Choice, Draw, Sampling};
use crate::model::rotary::RopeTables;
use crate::model::{KvCache, Llama};
use crate::warn;

/// What the kernel of decoding takes in every dtype.
const LARGEST_HEAD: i64 = 512;
/// Numbers that a row has in [`Buffers`], besides its token.
const INPUTS_PER_ROW: i64 = 5;
/// Lengths for which a graph serves differ by at most so many tokens.
const LENGTH_BUCKET: i64 = 256;

/// A row that gets one more token.
#[derive(Debug, Clone, Copy)]
pub(super) struct DeviceRow {
    /// The number of the request, and of its sample.
    pub of: (usize, usize),
    pub slot: usize,
    /// Tokens that its slot holds, without the one that the step reads.
    pub length: i64,
    /// What the next token is drawn for.
    pub draw: Draw,
}

/// Whether steps can be captured in this process; a capture that has failed would fail again.
static CAPTURES: AtomicBool = AtomicBool::new(true);

/// Where the tokens come from that a step reads.
pub(super) enum StepTokens<'a> {
    /// The host.
    Ids(&'a [i64]),
    /// The step before: of which of its rows.
    Before(&'a [usize]),
}

/// The memory that steps of so many rows read and write, int64 `[rows]` each but for the table.
struct Buffers {
    rows: i64,
    ids: Tensor,
    /// All but the ids, [INPUTS_PER_ROW, rows].
    numbers: Tensor,
    /// float32 [rows, 4]
    table: Tensor,
}

impl Buffers {
    fn new(rows: i64, device: Device) -> Buffers {
        let ids = Tensor::zeros([rows], (Kind::Int64, device));
        let numbers = Tensor::zeros([INPUTS_PER_ROW, rows], (Kind::Int64, device));
        Buffers { rows, ids, numbers, table: Tensor::zeros([rows, 4], (Kind::Float, device)) }
    }

    fn length(&self) -> Tensor {
        self.numbers.select(0, 0)
    }

    fn slot(&self) -> Tensor {
        self.numbers.select(0, 1)
    }

    /// What rows draw for: sample, position in the completion, and its least length.
    fn draws(&self) -> [Tensor; 3] {
        [2, 3, 4].map(|i| self.numbers.select(0, i))
    }
}

/// A step that was queued.
pub(super) struct QueuedStep {
    /// Its rows, in order.
    pub rows: Vec<DeviceRow>,
    /// Which of the two places of the host's its table goes to.
    host_buffer: usize,
    bucket: i64,
}

/// Queues steps, and reads what they chose.
pub(super) struct DeviceSteps {
    options: SampleOptions,
    ends: Tensor,
    device: Device,
    /// By the number of rows.
    buffers: HashMap<i64, Buffers>,
    /// With the rotary tables that they read: a model makes larger ones as rows grow.
    graphs: HashMap<(i64, i64), (Graph, [RopeTables; 2])>,
    /// The cache's capacity that the graphs were captured with.
    capacity: i64,
    /// Whether steps are captured.
    captures: bool,
    streams: [CopyStream; 2],
    host: [Tensor; 2],
    host_buffer: usize,
}

impl DeviceSteps {
    /// Steps of at most `batch_size` rows; none where the model's logits are not sampled on the device, or where its forwards
    /// gather values from other ranks.
    pub fn new(
        model: &Llama,
        batch_size: usize,
        eos: &[i64],
        sampling: &Sampling,
    ) -> Result<Option<DeviceSteps>> {
        let (device, kind) = (model.params.device(), model.params.compute());
        // Heads that the decoding kernel does not take are composed, and know no rows without a slot.
        let composed = model.shape.head_dim > LARGEST_HEAD;
        if composed || model.params.gathers() || !ops::samples(&Tensor::empty([0], (kind, device))) {
            return Ok(None);
        }
        let most = bucket(batch_size);
        let mut pinned = Pinned::for_sizes([16 * most; 2], device)?;
        let host = [pinned.take(&[most, 4], Kind::Float)?, pinned.take(&[most, 4], Kind::Float)?];
        Ok(Some(DeviceSteps {
            options: sampler::gpu_options(sampling),
            ends: ops::upload(&Tensor::from_slice(eos), device)?,
            device,
            buffers: HashMap::new(),
            graphs: HashMap::new(),
            capacity: 0,
            // The host may count the tokens of a mixture's experts, and it watches collectives.
            captures: device.is_cuda()
                && model.shape.experts.is_none()
                && model.params.sharding().tensor.size == 1,
            streams: [CopyStream::new(device)?, CopyStream::new(device)?],
            host,
            host_buffer: 0,
        }))
    }

    /// Queues a step of these rows, which read `tokens`; where those are of the step before, it was the last that was queued.
    pub fn launch(
        &mut self,
        model: &mut Llama,
        cache: &mut KvCache,
        rows: Vec<DeviceRow>,
        tokens: StepTokens,
        before: Option<&QueuedStep>,
    ) -> Result<QueuedStep> {
        let slots: Vec<usize> = rows.iter().map(|row| row.slot).collect();
        let longest = rows.iter().map(|row| row.length + 1).max().unwrap_or(1);
        cache.grow(&slots, longest);
        let bucket = bucket(rows.len());
        let same = matches!((&tokens, before), (StepTokens::Before(of), Some(before))
            if before.bucket == bucket && before.rows.len() == rows.len() && of.iter().copied().eq(0..rows.len()));
        // A step leaves what the next one of the same rows reads.
        if !same {
            self.fill(&rows, bucket, tokens, before)?;
        }
        self.run(model, cache, bucket, longest)?;
        let host_buffer = self.host_buffer;
        self.host_buffer = 1 - host_buffer;
        let (stream, table) = (&self.streams[host_buffer], &self.buffers[&bucket].table);
        stream.after_computing()?;
        stream.copy(&self.host[host_buffer].narrow(0, 0, bucket), table)?;
        stream.before_computing()?; // the next step writes the table again
        Ok(QueuedStep { rows, host_buffer, bucket })
    }

    /// What the rows of a step chose. The host waits for it.
    pub fn read(&self, queued: &QueuedStep) -> Result<Vec<Choice>> {
        self.streams[queued.host_buffer].wait()?;
        sampler::choices(&self.host[queued.host_buffer].narrow(0, 0, queued.rows.len() as i64))
    }

    /// Waits for all steps.
    fn wait(&self) {
        for stream in &self.streams {
            if let Err(e) = stream.wait() {
                warn!("generation: {e}");
            }
        }
    }

    fn fill(
        &mut self,
        rows: &[DeviceRow],
        bucket: i64,
        tokens: StepTokens,
        before: Option<&QueuedStep>,
    ) -> Result<()> {
        let n = rows.len() as i64;
        let ids = match (tokens, before) {
            (StepTokens::Before(of), Some(before)) => {
                let of: Vec<i64> = of.iter().map(|i| *i as i64).collect();
                let of = ops::upload(&Tensor::from_slice(&of), self.device)?;
                self.buffers[&before.bucket].ids.f_index_select(0, &of)? // [n]
            }
            (StepTokens::Ids(ids), _) => ops::upload(&Tensor::from_slice(ids), self.device)?,
            (StepTokens::Before(_), None) => return Err(crate::error::Error::failed("no step was before")),
        };
        // Rows beyond n have no slot.
        let mut numbers = vec![0i64; (INPUTS_PER_ROW * bucket) as usize];
        numbers[bucket as usize..2 * bucket as usize].fill(-1);
        for (i, row) in rows.iter().enumerate() {
            let of = [
                row.length,
                row.slot as i64,
                row.draw.sample as i64,
                row.draw.position as i64,
                row.draw.least_i64(),
            ];
            of.into_iter().enumerate().for_each(|(k, number)| numbers[k * bucket as usize + i] = number);
        }
        let numbers = ops::upload(&Tensor::from_slice(&numbers).view([INPUTS_PER_ROW, bucket]), self.device)?;
        let device = self.device;
        let buffers = self.buffers.entry(bucket).or_insert_with(|| Buffers::new(bucket, device));
        buffers.numbers.f_copy_(&numbers)?;
        let _ = buffers.ids.f_zero_()?;
        buffers.ids.narrow(0, 0, n).f_copy_(&ids)?;
        Ok(())
    }

    /// Queues the work of a step: its graph, if there is one. The first step of its kind runs without, since it compiles
    /// kernels and makes workspaces, which cannot be captured; its graph is captured right after it, for the next.
    fn run(&mut self, model: &mut Llama, cache: &KvCache, bucket: i64, longest: i64) -> Result<()> {
        if self.capacity != cache.capacity() {
            // Graphs know where the cache lay; none may run when it is freed.
            self.wait();
            self.graphs.clear();
            self.capacity = cache.capacity();
        }
        let longest = ((longest + LENGTH_BUCKET - 1) / LENGTH_BUCKET * LENGTH_BUCKET).min(cache.capacity());
        let (key, buffers) = ((bucket, longest), &self.buffers[&bucket]);
        let (ends, options) = (&self.ends, self.options);
        if let Some((graph, _)) = self.graphs.get(&key) {
            return Ok(graph.replay()?);
        }
        step(model, cache, buffers, ends, options, longest)?;
        if self.captures && CAPTURES.load(Ordering::Relaxed) {
            let work = || {
                step(model, cache, buffers, ends, options, longest)
                    .map_err(|e| kernels::Error::new(e.message))
            };
            match Graph::capture(self.device, work) {
                Ok((graph, ())) => drop(self.graphs.insert(key, (graph, model.rope_tables(longest)))),
                Err(e) => {
                    warn!("steps of generation are not captured as CUDA graphs, which is slower: {e}");
                    CAPTURES.store(false, Ordering::Relaxed);
                }
            }
        }
        Ok(())
    }
}

impl Drop for DeviceSteps {
    /// The last step may still run, and nobody read it: its graph and the host's memory must outlive it.
    fn drop(&mut self) {
        self.wait();
    }
}

/// One more token in each row of the buffers.
fn step(
    model: &mut Llama,
    cache: &KvCache,
    buffers: &Buffers,
    ends: &Tensor,
    options: SampleOptions,
    longest: i64,
) -> Result<()> {
    let hidden = model.decode_at(&buffers.ids, buffers.length(), &buffers.slot(), longest, cache)?; // [rows, C]
    let logits = model.next_token_logits(&hidden)?; // [rows, V]
    let [sample, position, least] = &buffers.draws();
    let rows = SampleRows { sample, position, least };
    ops::sample(&logits, &rows, ends, options, [&buffers.ids, &buffers.table], true)?;
    debug_assert_eq!(logits.size()[0], buffers.rows);
    let _ = buffers.length().f_add_scalar_(1)?;
    Ok(())
}

/// Rows that a step has memory for: few numbers of rows have graphs of their own.
fn bucket(rows: usize) -> i64 {
    let rows = rows.max(1);
    (if rows <= 8 { rows.next_power_of_two() } else { rows.next_multiple_of(8) }) as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets() {
        assert_eq!([1, 2, 3, 5, 8, 9, 17, 64].map(bucket), [1, 2, 4, 8, 8, 16, 24, 64]);
    }
}
