//! The mesh of a run as a table: which ranks form which group, on which node.

use crate::config::common::Common;
use crate::distributed::mesh::{AxisName, Keep, MeshPlan};
use crate::error::Result;

/// Groups of an axis that are shown.
const GROUPS: usize = 6;

/// Prints the mesh of `ranks` ranks on `nodes` nodes, if there are several ranks.
pub fn show(c: &Common, ranks: i64, nodes: i64) -> Result<()> {
    let parallel = c.parallel;
    if ranks > 1 {
        let mesh = MeshPlan::of(parallel, ranks, Some(ranks / nodes))?;
        table(&mesh, ranks / nodes).iter().for_each(|line| println!("{line}"));
        if mesh.pipeline > 1 {
            let micro_batches = c.train.micro_batches(mesh.data);
            let waits = 100.0 * (mesh.pipeline - 1) as f64 / micro_batches as f64;
            println!(
                "# {micro_batches} micro-batch(es) of a step go through {} stages: with 1f1b these wait for each other for {waits:.0} % of what \
                 they compute; a smaller train.micro_batch_size makes more",
                mesh.pipeline
            );
        }
        if mesh.pipeline > 1 && mesh.shard > 1 && !Keep::of(parallel.mode).values() {
            println!(
                "# parallel.mode={} gathers the blocks of a stage again in every micro-batch; grads and optimizer keep them, which takes \
                 more memory",
                parallel.mode.name()
            );
        }
    }
    Ok(())
}

fn table(mesh: &MeshPlan, of_node: i64) -> Vec<String> {
    let (ranks, nodes) = (mesh.ranks(), mesh.ranks() / of_node);
    let mut lines = vec![format!(
        "# mesh: {ranks} ranks = pipeline {} x data {} x context {} x tensor {}, on {nodes} node(s) of {of_node}",
        mesh.pipeline, mesh.data, mesh.context, mesh.tensor
    )];
    for (axis, about) in [
        (AxisName::Tensor, "share every matrix"),
        (AxisName::Context, "share every sequence"),
        (AxisName::Data, "have different rows"),
        (AxisName::Shard, "share one copy of the parameters"),
        (AxisName::Replicate, "hold equal slices"),
        (AxisName::Pipeline, "share the blocks"),
    ] {
        let groups = mesh.groups(axis);
        if groups[0].len() == 1 {
            continue;
        }
        let shown: Vec<String> = groups.iter().take(GROUPS).map(|g| numbers(g)).collect();
        let more =
            if groups.len() > GROUPS { format!(" | ... {} groups", groups.len()) } else { String::new() };
        let across = groups.iter().any(|g| g.iter().any(|rank| rank / of_node != g[0] / of_node));
        let place = match (nodes, across) {
            (1, _) => "",
            (_, true) => "; across nodes",
            (_, false) => "; inside a node",
        };
        lines.push(format!("#   {:<10} {}{more} ({about}{place})", axis.name(), shown.join(" | ")));
    }
    lines
}

/// `0-3`, or `0,2,4`; of many the first, the second and the last.
fn numbers(ranks: &[i64]) -> String {
    let (first, last) = (ranks[0], ranks[ranks.len() - 1]);
    if ranks.len() > 1 && last - first + 1 == ranks.len() as i64 {
        return format!("{first}-{last}");
    }
    if ranks.len() > 8 {
        return format!("{first},{},...,{last}", ranks[1]);
    }
    ranks.iter().map(i64::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_listed_with_their_nodes() {
        let mesh = MeshPlan { pipeline: 1, data: 4, context: 1, tensor: 2, shard: 2 };
        let text = table(&mesh, 4).join("\n");
        assert!(
            text.contains("8 ranks = pipeline 1 x data 4 x context 1 x tensor 2, on 2 node(s) of 4"),
            "{text}"
        );
        assert!(
            text.contains("tensor     0-1 | 2-3 | 4-5 | 6-7 (share every matrix; inside a node)"),
            "{text}"
        );
        assert!(text.contains("data       0,2,4,6 | 1,3,5,7 (have different rows; across nodes)"), "{text}");
        assert!(
            text.contains("shard      0,2 | 1,3 | 4,6 | 5,7 (share one copy of the parameters; inside"),
            "{text}"
        );
        assert!(
            text.contains("replicate  0,4 | 1,5 | 2,6 | 3,7 (hold equal slices; across nodes)"),
            "{text}"
        );
        assert!(!text.contains("context  "), "{text}");
    }
}
