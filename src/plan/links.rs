//! How long a rank sends at stated speeds, and what of it a step waits for: a formula, not a measurement.

use super::traffic::Traffic;
use crate::distributed::mesh::{AxisName, MeshPlan};

/// The speeds of links, in bytes a second that a rank sends.
#[derive(Debug, Clone, Copy)]
pub struct Links {
    /// Ranks of a node.
    pub of_node: i64,
    /// To ranks of the same node.
    pub inside: f64,
    /// To ranks of other nodes.
    pub across: f64,
}

/// Seconds of a step in which a rank sends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sending {
    /// Parameters and gradients, which are sent while others compute.
    pub overlapped_s: f64,
    /// Activations, keys and values, which products wait for.
    pub exposed_s: f64,
    /// What stages wait for each other, as a share of what they compute: (P - 1) / m of P stages and m micro-batches.
    pub bubble: f64,
}

impl Sending {
    /// A step that computes for so long: what overlaps takes no longer than the larger of both.
    pub fn step_s(&self, computing_s: f64) -> f64 {
        (computing_s.max(self.overlapped_s) + self.exposed_s) * (1.0 + self.bubble)
    }
}

impl Links {
    /// Of a step of so many micro-batches. An axis with one group that crosses nodes is as fast as the links between these.
    pub fn sending(&self, traffic: &Traffic, mesh: &MeshPlan, micro_batches: i64) -> Sending {
        let seconds = |axis, bytes: f64| {
            let crosses =
                |group: &Vec<i64>| group.iter().any(|r| r / self.of_node != group[0] / self.of_node);
            match mesh.groups(axis).iter().any(crosses) {
                true => bytes / self.across,
                false => bytes / self.inside,
            }
        };
        let Traffic { shard, replicate, tensor, context, pipeline } = *traffic;
        Sending {
            bubble: (mesh.pipeline - 1) as f64 / micro_batches as f64,
            overlapped_s: seconds(AxisName::Shard, shard)
                + seconds(AxisName::Replicate, replicate)
                + seconds(AxisName::Pipeline, pipeline),
            exposed_s: seconds(AxisName::Tensor, tensor) + seconds(AxisName::Context, context),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_crosses_nodes_is_slower() {
        let links = Links { of_node: 4, inside: 100.0, across: 10.0 };
        let traffic = Traffic { shard: 200.0, replicate: 0.0, tensor: 300.0, context: 0.0, pipeline: 50.0 };
        let mesh = |tensor, data| MeshPlan { pipeline: 1, data, context: 1, tensor, shard: data };
        let within = links.sending(&traffic, &mesh(4, 2), 2);
        assert_eq!(within, Sending { overlapped_s: 20.5, exposed_s: 3.0, bubble: 0.0 });
        assert_eq!((within.step_s(5.0), within.step_s(50.0)), (23.5, 53.0));
        assert_eq!(links.sending(&traffic, &mesh(8, 1), 2).exposed_s, 30.0);
        let inside = Sending { overlapped_s: 2.5, exposed_s: 3.0, bubble: 0.0 };
        assert_eq!(links.sending(&traffic, &mesh(1, 4), 2), inside);
        let stages = MeshPlan { pipeline: 2, ..mesh(4, 1) };
        let across = links.sending(&traffic, &stages, 4);
        assert_eq!(across, Sending { overlapped_s: 7.0, exposed_s: 3.0, bubble: 0.25 });
        assert_eq!(across.step_s(13.0), 20.0);
    }
}
