//! What each position of a forward's rows sees of the positions before it.

use tch::{Device, Tensor};

use super::upload::upload;
use crate::error::{Error, Result};

/// What positions of B rows of T see: position i of a row sees its segment's positions up to i, of a sliding window at most the
/// last W of them. A segment is a packed document, a row's padding, or what follows it.
#[derive(Debug, Default)]
pub struct Spans {
    /// The first position of its row that each position sees, int64 `[B * T]`; none: 0.
    start: Option<Tensor>,
    segments: Option<Segments>,
    window: Option<i64>,
}

/// The segments of all rows, one after the other, as flash attention takes them.
#[derive(Debug)]
pub(crate) struct Segments {
    /// Where they begin, and where the last one ends, int32 `[S + 1]`.
    pub cum_seq: Tensor,
    /// Tokens of the longest.
    pub longest: i64,
}

impl Clone for Spans {
    fn clone(&self) -> Spans {
        let segments = self
            .segments
            .as_ref()
            .map(|s| Segments { cum_seq: s.cum_seq.shallow_clone(), longest: s.longest });
        Spans { start: self.start.as_ref().map(Tensor::shallow_clone), segments, window: self.window }
    }
}

impl Spans {
    /// Every position sees its row up to itself.
    pub fn rows() -> Spans {
        Spans::default()
    }

    /// `starts`: where in its row the segment of each of the B * T positions begins; a segment's first position names itself.
    /// None: at 0. `window`: W.
    ///
    /// # Errors
    /// Starts that are not those of segments, one after the other.
    pub fn new(
        starts: Option<&[i64]>,
        [batch, time]: [i64; 2],
        window: Option<i64>,
        device: Device,
    ) -> Result<Spans> {
        let window = window.filter(|w| *w < time);
        let segments = starts.map(|s| segments(s, [batch, time], device)).transpose()?;
        if segments.is_none() && window.is_none() {
            return Ok(Spans::rows());
        }
        let first = |i: usize| {
            let at = i as i64 % time;
            starts.map_or(0, |s| s[i]).max(window.map_or(0, |w| at - w + 1))
        };
        let start: Vec<i64> = (0..(batch * time) as usize).map(first).collect();
        Ok(Spans { start: Some(upload(&Tensor::from_slice(&start), device)?), segments, window })
    }

    /// The first position of its row that each position sees, int64 `[B * T]`; none: 0.
    pub fn start(&self) -> Option<&Tensor> {
        self.start.as_ref()
    }

    pub(crate) fn segments(&self) -> Option<&Segments> {
        self.segments.as_ref()
    }

    pub(crate) fn window(&self) -> Option<i64> {
        self.window
    }
}

fn segments(starts: &[i64], [batch, time]: [i64; 2], device: Device) -> Result<Segments> {
    if starts.len() as i64 != batch * time || i32::try_from(starts.len()).is_err() {
        return Err(Error::new(format!("{} starts for {batch} rows of {time}", starts.len())));
    }
    let mut cum_seq: Vec<i32> = Vec::new();
    for (i, start) in starts.iter().enumerate() {
        let row = i as i64 / time * time;
        if i as i64 == row + start {
            cum_seq.push(i as i32);
        } else if cum_seq.last().is_none_or(|begin| i64::from(*begin) != row + start) {
            return Err(Error::new(format!(
                "position {} of row {} cannot see from {start} on: no segment begins there",
                i as i64 - row,
                i as i64 / time
            )));
        }
    }
    cum_seq.push(starts.len() as i32);
    let longest = cum_seq.windows(2).map(|w| i64::from(w[1] - w[0])).max().unwrap_or(0);
    Ok(Segments { cum_seq: upload(&Tensor::from_slice(&cum_seq), device)?, longest })
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    fn of(starts: &[i64], size: [i64; 2], window: Option<i64>) -> Result<(Vec<i64>, Vec<i64>, i64)> {
        let spans = Spans::new(Some(starts), size, window, Device::Cpu)?;
        let s = spans.segments().unwrap();
        let list = |t: &Tensor| Vec::<i64>::try_from(t.to_kind(Kind::Int64)).unwrap();
        Ok((list(spans.start().unwrap()), list(&s.cum_seq), s.longest))
    }

    #[test]
    fn segments_of_packed_and_padded_rows() {
        let starts = [0, 0, 2, 2, 2, 0, 1, 2, 2, 2];
        let (start, cum_seq, longest) = of(&starts, [2, 5], None).unwrap();
        assert_eq!(start, starts);
        assert_eq!((cum_seq, longest), (vec![0, 2, 5, 6, 7, 10], 3));
        let (start, cum_seq, _) = of(&starts, [2, 5], Some(2)).unwrap();
        assert_eq!(start, [0, 0, 2, 2, 3, 0, 1, 2, 2, 3]);
        assert_eq!(cum_seq, [0, 2, 5, 6, 7, 10], "a window is not a segment");
        let window = Spans::new(None, [2, 3], Some(2), Device::Cpu).unwrap();
        assert_eq!(Vec::<i64>::try_from(window.start().unwrap()).unwrap(), [0, 0, 1, 0, 0, 1]);
        assert!(window.segments().is_none());
        assert!(
            Spans::new(None, [2, 3], Some(3), Device::Cpu).unwrap().start().is_none(),
            "as wide as a row"
        );
    }

    #[test]
    fn starts_that_are_no_segments_are_refused() {
        for (starts, size) in
            [(&[1i64, 1][..], [1, 2]), (&[0, 0, 1], [1, 3]), (&[0, 0, 0], [1, 2]), (&[0, 2], [1, 2])]
        {
            assert!(of(starts, size, None).is_err(), "{starts:?}");
        }
    }
}
