//! A curve in a terminal, drawn with Braille patterns: 2 x 4 points a character (Unicode 10, block 2800).

/// The dots of a character, by row and column: their bits.
const DOTS: [[u32; 2]; 4] = [[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]];

/// Draws the points (x rising) on `columns` x `rows` characters, with the highest and lowest value beside them. None where there
/// are fewer than two points with different x.
pub fn draw(points: &[(u64, f64)], columns: usize, rows: usize) -> Option<String> {
    let points: Vec<(u64, f64)> = points.iter().copied().filter(|(_, y)| y.is_finite()).collect();
    let (first, last) = (points.first()?.0, points.last()?.0);
    if last <= first {
        return None;
    }
    let (width, height) = (2 * columns, 4 * rows);
    // The mean of the points of a column of dots.
    let mut sums = vec![(0.0, 0u32); width];
    for (x, y) in &points {
        let at = ((x - first) as f64 / (last - first) as f64 * (width - 1) as f64).round() as usize;
        sums[at].0 += y;
        sums[at].1 += 1;
    }
    let means: Vec<Option<f64>> = sums.iter().map(|(sum, n)| (*n > 0).then(|| sum / f64::from(*n))).collect();
    let there = || means.iter().flatten().copied();
    let (low, high) = (there().fold(f64::INFINITY, f64::min), there().fold(f64::NEG_INFINITY, f64::max));
    let range = if high > low { high - low } else { 1.0 };
    let row_of = |y: f64| ((high - y) / range * (height - 1) as f64).round() as usize;
    let mut cells = vec![vec![0u32; columns]; rows];
    let mut dot = |x: usize, y: usize| cells[y / 4][x / 2] |= DOTS[y % 4][x % 2];
    let mut before: Option<(usize, usize)> = None;
    for (x, mean) in means.iter().enumerate() {
        let Some(y) = mean.map(row_of) else { continue };
        // A line from the point before, so that steep parts have no gaps.
        let (x0, y0) = before.unwrap_or((x, y));
        let steps = (x - x0).max(y.abs_diff(y0)).max(1);
        for i in 0..=steps {
            let part = i as f64 / steps as f64;
            let between = |a: usize, b: usize| (a as f64 + (b as f64 - a as f64) * part).round() as usize;
            dot(between(x0, x), between(y0, y));
        }
        before = Some((x, y));
    }
    let label = |row: usize| match row {
        0 => format!("{high:>9.4} "),
        _ if row == rows - 1 => format!("{low:>9.4} "),
        _ => " ".repeat(10),
    };
    let line = |(row, cells): (usize, &Vec<u32>)| {
        let drawn: String = cells.iter().filter_map(|bits| char::from_u32(0x2800 + bits)).collect();
        format!("{}{}", label(row), drawn.trim_end_matches('\u{2800}'))
    };
    Some(cells.iter().enumerate().map(line).collect::<Vec<_>>().join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_falls_from_corner_to_corner() {
        let points: Vec<(u64, f64)> = (0..8).map(|x| (x, 1.0 - x as f64 / 7.0)).collect();
        let drawn = draw(&points, 4, 2).unwrap();
        assert_eq!(
            drawn,
            "   1.0000 \u{2811}\u{2884}\n   0.0000 \u{2800}\u{2800}\u{2811}\u{2884}".to_string()
        );
    }

    #[test]
    fn what_is_no_curve_is_left_out() {
        assert_eq!(draw(&[], 10, 3), None);
        assert_eq!(draw(&[(5, 1.0)], 10, 3), None);
        assert_eq!(draw(&[(5, f64::NAN), (6, f64::NAN)], 10, 3), None);
        // A flat one is one line of dots.
        let flat = draw(&[(1, 2.0), (2, 2.0)], 3, 2).unwrap();
        assert!(flat.starts_with("   2.0000 \u{2809}\u{2809}\u{2809}\n"), "{flat}");
    }
}
