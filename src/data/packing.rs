//! Packing: examples of different lengths into rows of one length.

use std::collections::{BTreeMap, VecDeque};

/// Best-fit decreasing (as TRL's `pack_dataset` with strategy `bfd`): the longest first, each into the row with the
/// least room that holds it. Returns the examples of every row, by number; no length may exceed `capacity`.
pub fn best_fit_decreasing(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(lengths[*i]));
    let mut rows: Vec<Vec<usize>> = Vec::new();
    // Rows by the room that they have left; those with equal room in the order in which they came to it.
    let mut by_room: BTreeMap<usize, VecDeque<usize>> = BTreeMap::new();
    for i in order {
        let length = lengths[i];
        assert!(length <= capacity, "an example of {length} tokens does not fit rows of {capacity}");
        let fit = by_room.range_mut(length.max(1)..).next().map(|(room, rows)| (*room, rows.pop_front()));
        let (room, row) = match fit {
            Some((room, Some(row))) => (room, row),
            _ => {
                rows.push(Vec::new());
                (capacity, rows.len() - 1)
            }
        };
        if by_room.get(&room).is_some_and(VecDeque::is_empty) {
            by_room.remove(&room);
        }
        rows[row].push(i);
        if room > length {
            by_room.entry(room - length).or_default().push_back(row);
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rows that TRL makes of the golden sequences.
    #[test]
    fn rows_are_trls() {
        let golden = testing::golden::golden_algorithm("packing.json");
        let capacity = golden["seq_length"].as_u64().unwrap() as usize;
        let sequences: Vec<Vec<i64>> = serde_json::from_value(golden["sequences"].clone()).unwrap();
        let bfd = &golden["packed"]["bfd"];
        let wanted: Vec<Vec<i64>> = serde_json::from_value(bfd["input_ids"].clone()).unwrap();
        // TRL cuts what is longer than a row.
        let cut: Vec<&[i64]> = sequences.iter().map(|s| &s[..s.len().min(capacity)]).collect();
        let lengths: Vec<usize> = cut.iter().map(|s| s.len()).collect();
        let rows = best_fit_decreasing(&lengths, capacity);
        let rows: Vec<Vec<i64>> =
            rows.iter().map(|r| r.iter().flat_map(|i| cut[*i].to_vec()).collect()).collect();
        assert_eq!(rows, wanted);
    }

    #[test]
    fn every_example_lies_in_one_row_and_rows_hold_them() {
        let lengths: Vec<usize> = (0..5000usize).map(|i| 1 + i * 7919 % 61).collect();
        let rows = best_fit_decreasing(&lengths, 64);
        let mut seen: Vec<usize> = rows.iter().flatten().copied().collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..5000).collect::<Vec<_>>());
        assert!(rows.iter().all(|r| r.iter().map(|i| lengths[*i]).sum::<usize>() <= 64));
        let fullness = lengths.iter().sum::<usize>() as f64 / (rows.len() * 64) as f64;
        assert!(fullness > 0.99, "{fullness}");
    }
}
