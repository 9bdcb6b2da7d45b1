//! The stages of a pipeline: a model's blocks lie over them, activations go from each to the next, and gradients back.

use std::collections::VecDeque;

use kernels::comm::{Group, Work};
use tch::{Device, Kind, Tensor};

use crate::config::parallel::StageOrder;
use crate::distributed::axis::Axis;
use crate::distributed::schedule::{Pass, passes};
use crate::error::{Error, Result};

/// A rank's place among the stages, and its neighbours there.
#[derive(Clone)]
pub struct Pipeline {
    /// The ranks that share the blocks; a rank's place on it is its stage.
    pub axis: Axis,
    /// Blocks of each stage; none: divided evenly.
    pub blocks: Option<Vec<i64>>,
    /// In which order this stage computes micro-batches.
    pub order: StageOrder,
    before: Option<Neighbour>,
    after: Option<Neighbour>,
    /// The first and the last stage, on these two.
    ends: Option<Group>,
}

/// A rank and one of the next stage. Each way has a group of its own, so that a tensor does not wait for one that goes the other
/// way.
#[derive(Clone)]
struct Neighbour {
    activations: Group,
    gradients: Group,
}

/// Makes the group of this name and these world ranks.
type NewGroup<'a> = &'a dyn Fn(&str, &[i64]) -> Result<Group>;

impl Pipeline {
    /// One stage, which has all blocks.
    pub fn solo() -> Pipeline {
        let (axis, order) = (Axis::solo(), StageOrder::default());
        Pipeline { axis, blocks: None, order, before: None, after: None, ends: None }
    }

    /// Joins the stages of `ranks`, world ranks of which `stage` is this one; tensors that are sent lie on `device`. Collective.
    pub fn connect(ranks: &[i64], stage: usize, device: Device, new_group: NewGroup) -> Result<Pipeline> {
        let last = ranks.len() - 1;
        if last == 0 {
            return Ok(Pipeline::solo());
        }
        let axis = Axis::of(new_group(&format!("pipeline/{}", ranks[0]), ranks)?);
        let is_end = stage == 0 || stage == last;
        let ends =
            is_end.then(|| new_group(&format!("ends/{}", ranks[0]), &[ranks[0], ranks[last]])).transpose()?;
        // From the first stage on, one pair after the other: nobody waits in a circle.
        let join = |lower: usize| {
            let pair = [ranks[lower], ranks[lower + 1]];
            let joined = Neighbour {
                activations: new_group(&format!("activations/{}", pair[0]), &pair)?,
                gradients: new_group(&format!("gradients/{}", pair[0]), &pair)?,
            };
            joined.meet(lower == stage, device)?;
            Ok::<_, Error>(joined)
        };
        let before = (stage > 0).then(|| join(stage - 1)).transpose()?;
        let after = (stage < last).then(|| join(stage)).transpose()?;
        Ok(Pipeline { axis, before, after, ends, ..Pipeline::solo() })
    }

    /// What this stage does in a step of so many micro-batches, in order.
    pub fn passes(&self, micro_batches: usize) -> Vec<Pass> {
        passes(self.order, self.axis.rank as usize, self.axis.size as usize, micro_batches)
    }

    /// Whether this stage has the embedding.
    pub fn is_first(&self) -> bool {
        self.axis.rank == 0
    }

    /// Whether this stage has the head.
    pub fn is_last(&self) -> bool {
        self.axis.rank + 1 == self.axis.size
    }

    /// The first and the last stage, where these are two and this is one of them.
    pub fn ends(&self) -> Option<&Group> {
        self.ends.as_ref()
    }

    /// Bytes that this rank has sent so far to other stages.
    pub fn sent_bytes(&self) -> u64 {
        let neighbours = self.before.iter().chain(&self.after);
        let groups = neighbours.flat_map(|n| [&n.activations, &n.gradients]).chain(&self.ends);
        groups.map(Group::sent_bytes).sum::<u64>() + self.axis.group.sent_bytes()
    }
}

impl Neighbour {
    /// A first transfer each way: NCCL connects then, and both sides wait for it.
    fn meet(&self, lower: bool, device: Device) -> Result<()> {
        let one = Tensor::f_ones([1], (Kind::Float, device))?;
        for (group, sends) in [(&self.activations, lower), (&self.gradients, !lower)] {
            match sends {
                true => group.send(&one)?.wait()?,
                false => group.receive(&one)?.wait()?,
            }
        }
        Ok(())
    }
}

/// The blocks of each of `stages` stages: as `given`, or evenly, where the first ones have one more if they do not divide.
pub fn blocks_of_stages(blocks: i64, stages: i64, given: Option<&[i64]>) -> Vec<i64> {
    match given {
        Some(given) => given.to_vec(),
        None => (0..stages).map(|stage| blocks / stages + i64::from(stage < blocks % stages)).collect(),
    }
}

/// Size and dtype of a tensor that is received.
pub type Expected = (Vec<i64>, Kind);

/// The tensors of a step between this stage and its neighbours, in the order of its micro-batches.
pub struct Transfers {
    device: Device,
    /// The step's micro-batches.
    micro_batches: usize,
    activations: Direction,
    gradients: Direction,
}

/// What comes from one side and goes to the other.
struct Direction {
    from: Option<Group>,
    to: Option<Group>,
    /// Sends that have not been waited for.
    sent: VecDeque<Work>,
    /// Receives under way: of the micro-batch `next` and those after it.
    coming: VecDeque<Vec<(Tensor, Work)>>,
    next: usize,
}

/// Tensors that a neighbour may not have taken yet.
const MAX_SENT: usize = 4;

impl Transfers {
    /// Of a step of so many micro-batches.
    pub fn new(pipeline: &Pipeline, micro_batches: usize, device: Device) -> Transfers {
        let (before, after) = (pipeline.before.as_ref(), pipeline.after.as_ref());
        let way = |from: Option<&Group>, to: Option<&Group>| Direction {
            from: from.cloned(),
            to: to.cloned(),
            sent: VecDeque::new(),
            coming: VecDeque::new(),
            next: 0,
        };
        Transfers {
            device,
            micro_batches,
            activations: way(before.map(|n| &n.activations), after.map(|n| &n.activations)),
            gradients: way(after.map(|n| &n.gradients), before.map(|n| &n.gradients)),
        }
    }

    /// Gives the next stage what this one has computed of a micro-batch; on the last one nothing.
    pub fn send_activations(&mut self, tensors: &[Tensor]) -> Result<()> {
        self.activations.send(tensors)
    }

    /// Gives the stage before the gradients of what it has sent; on the first one nothing.
    pub fn send_gradients(&mut self, tensors: &[Tensor]) -> Result<()> {
        self.gradients.send(tensors)
    }

    /// What the stage before has computed of the next micro-batch; none on the first stage. `expected` says what comes of each.
    pub fn receive_activations(
        &mut self,
        expected: impl Fn(usize) -> Result<Vec<Expected>>,
    ) -> Result<Option<Vec<Tensor>>> {
        self.activations.receive(self.micro_batches, self.device, expected)
    }

    /// The gradients of what this stage has sent of the next micro-batch; none on the last stage.
    pub fn receive_gradients(
        &mut self,
        expected: impl Fn(usize) -> Result<Vec<Expected>>,
    ) -> Result<Option<Vec<Tensor>>> {
        self.gradients.receive(self.micro_batches, self.device, expected)
    }

    /// Waits until the neighbours have all that was sent.
    pub fn finish(mut self) -> Result<()> {
        let ways = [&mut self.activations, &mut self.gradients];
        ways.into_iter().flat_map(|way| way.sent.drain(..)).try_for_each(|work| Ok(work.wait()?))
    }
}

impl Direction {
    fn send(&mut self, tensors: &[Tensor]) -> Result<()> {
        let Some(to) = &self.to else { return Ok(()) };
        for tensor in tensors {
            self.sent.push_back(to.send(&tensor.contiguous())?); // overlaps what follows
        }
        while self.sent.len() > MAX_SENT || self.sent.front().is_some_and(Work::is_done) {
            self.sent.pop_front().map_or(Ok(()), Work::wait)?;
        }
        Ok(())
    }

    fn receive(
        &mut self,
        micro_batches: usize,
        device: Device,
        expected: impl Fn(usize) -> Result<Vec<Expected>>,
    ) -> Result<Option<Vec<Tensor>>> {
        let Some(from) = &self.from else { return Ok(None) };
        // One more than is needed now: it comes while this one is computed.
        while self.coming.len() < 2 && self.next + self.coming.len() < micro_batches {
            let post = |(size, kind): Expected| {
                let tensor = Tensor::f_empty(size, (kind, device))?;
                let work = from.receive(&tensor)?;
                Ok((tensor, work))
            };
            let tensors = expected(self.next + self.coming.len())?.into_iter().map(post);
            self.coming.push_back(tensors.collect::<Result<_>>()?);
        }
        let Some(tensors) = self.coming.pop_front() else {
            return Err(Error::failed("a step has no more micro-batches to receive"));
        };
        self.next += 1;
        let there = tensors.into_iter().map(|(tensor, work)| work.wait().map(|()| tensor));
        Ok(Some(there.collect::<Result<_, _>>()?))
    }
}

#[cfg(test)]
mod tests {
    use testing::ranks::on_ranks_with_groups;

    use super::*;

    #[test]
    fn blocks_are_divided_evenly() {
        assert_eq!(blocks_of_stages(7, 3, None), [3, 2, 2]);
        assert_eq!(blocks_of_stages(8, 2, None), [4, 4]);
        assert_eq!(blocks_of_stages(8, 2, Some(&[5, 3])), [5, 3]);
    }

    /// What each stage adds to goes to the last one and back, in order, also where a stage is far ahead.
    #[test]
    fn tensors_go_from_stage_to_stage() {
        for stages in [2, 3] {
            on_ranks_with_groups(stages, |world, new_group| {
                let new_group = |name: &str, ranks: &[i64]| Ok(new_group(name, ranks));
                let stage = world.rank();
                let pipeline =
                    Pipeline::connect(world.ranks(), stage as usize, Device::Cpu, &new_group).unwrap();
                assert_eq!((pipeline.is_first(), pipeline.is_last()), (stage == 0, stage + 1 == stages));
                assert_eq!(pipeline.ends().is_some(), pipeline.is_first() || pipeline.is_last());
                let micro_batches = 7;
                // Of different sizes; a second tensor has another dtype.
                let expected =
                    |k: usize| Ok(vec![(vec![k as i64 + 1, 3], Kind::Double), (vec![2], Kind::Int64)]);
                let tensors = |k: usize, value: i64| {
                    let sizes = expected(k).unwrap();
                    sizes
                        .into_iter()
                        .map(|(size, kind)| Tensor::full(size, value, (kind, Device::Cpu)))
                        .collect::<Vec<_>>()
                };
                let value = |tensors: &[Tensor]| {
                    assert!(tensors[0].max().double_value(&[]) == tensors[1].max().double_value(&[]));
                    tensors[1].int64_value(&[1])
                };
                let mut transfers = Transfers::new(&pipeline, micro_batches, Device::Cpu);
                if pipeline.is_first() {
                    // The others look for it several times.
                    std::thread::sleep(std::time::Duration::from_millis(700));
                }
                let before: Vec<i64> = (0..micro_batches)
                    .map(|k| {
                        let before = transfers.receive_activations(expected).unwrap();
                        let sum = before.map_or(100 * k as i64, |before| value(&before)) + stage;
                        transfers.send_activations(&tensors(k, sum)).unwrap();
                        sum
                    })
                    .collect();
                let sum_before: i64 = (0..=stage).sum();
                assert!(before.iter().enumerate().all(|(k, sum)| *sum == 100 * k as i64 + sum_before));
                for (k, sum) in before.into_iter().enumerate() {
                    let after = transfers.receive_gradients(expected).unwrap();
                    let back = after.map_or(sum, |after| value(&after));
                    assert_eq!(back, 100 * k as i64 + (0..stages).sum::<i64>());
                    transfers.send_gradients(&tensors(k, back)).unwrap();
                }
                transfers.finish().unwrap();
                assert!(pipeline.sent_bytes() > 0);
            });
        }
    }
}
