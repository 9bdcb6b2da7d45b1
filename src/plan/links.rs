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
}

impl Sending {
    /// A step that computes for so long: what overlaps takes no longer than the larger of both.
    pub fn step_s(&self, computing_s: f64) -> f64 {
        computing_s.max(self.overlapped_s) + self.exposed_s
    }
}

impl Links {
    /// An axis with one group that crosses nodes is as fast as the links between these.
    pub fn sending(&self, traffic: &Traffic, mesh: &MeshPlan) -> Sending {
        let seconds = |axis, bytes: f64| {
            let crosses =
                |group: &Vec<i64>| group.iter().any(|r| r / self.of_node != group[0] / self.of_node);
            match mesh.groups(axis).iter().any(crosses) {
                true => bytes / self.across,
                false => bytes / self.inside,
            }
        };
        let Traffic { shard, replicate, tensor, context } = *traffic;
        Sending {
            overlapped_s: seconds(AxisName::Shard, shard) + seconds(AxisName::Replicate, replicate),
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
        let traffic = Traffic { shard: 200.0, replicate: 0.0, tensor: 300.0, context: 0.0 };
        let mesh = |tensor, data| MeshPlan { pipeline: 1, data, context: 1, tensor, shard: data };
        let within = links.sending(&traffic, &mesh(4, 2));
        assert_eq!(within, Sending { overlapped_s: 20.0, exposed_s: 3.0 });
        assert_eq!((within.step_s(5.0), within.step_s(50.0)), (23.0, 53.0));
        assert_eq!(links.sending(&traffic, &mesh(8, 1)).exposed_s, 30.0);
        assert_eq!(links.sending(&traffic, &mesh(1, 4)), Sending { overlapped_s: 2.0, exposed_s: 3.0 });
    }
}
