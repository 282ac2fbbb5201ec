//! Which segments write the same byte: of two that do, which one came last would be chance.

use std::collections::BTreeMap;

use super::Segment;
use crate::error::{Error, Result};

/// Refuses segments that write a byte twice.
///
/// Rows may interleave with rows of the same pitch in other columns; what is harder to tell apart is refused.
pub(crate) fn check_destinations(segments: &[Segment]) -> Result<()> {
    let mut order: Vec<&Segment> = segments.iter().filter(|segment| !segment.is_empty()).collect();
    order.sort_unstable_by_key(|s| (s.block, s.dst_offset));
    for segments in order.chunk_by(|a, b| a.block == b.block) {
        let mut open = Open::default();
        for segment in segments {
            if let Some(other) = open.add(segment) {
                return Err(Error::Invalid(format!("{segment:?} and {other:?} go to the same place")));
            }
        }
    }
    Ok(())
}

/// Whether two segments of one block may write the same byte.
pub(crate) fn destinations_meet(a: &Segment, b: &Segment) -> bool {
    a.dst_offset < b.dst_end() && b.dst_offset < a.dst_end() && !in_other_columns(a, b)
}

/// Whether two segments are in different columns of one pitch.
fn in_other_columns(a: &Segment, b: &Segment) -> bool {
    let pitch = match (a.rows > 1, b.rows > 1) {
        (true, true) if a.dst_pitch != b.dst_pitch => return false,
        (true, _) => a.dst_pitch,
        (false, true) => b.dst_pitch,
        (false, false) => return false,
    };
    if a.row_len.max(b.row_len) > pitch {
        return false;
    }
    // The distance from a's column to b's, going round: room for a's row; and from b's to a's, for b's.
    let (a_column, b_column) = (a.dst_offset % pitch, b.dst_offset % pitch);
    let round = |from: u64, to: u64| if to >= from { to - from } else { to + (pitch - from) };
    a_column != b_column && round(a_column, b_column) >= a.row_len && round(b_column, a_column) >= b.row_len
}

/// Segments of a block that may end after what was added last.
#[derive(Default)]
struct Open<'a> {
    /// The one of a single row; two would meet.
    row: Option<&'a Segment>,
    /// Those of several rows, all of one pitch, by the column where each begins.
    columns: BTreeMap<u64, &'a Segment>,
    /// Of these the one that ends last.
    last: Option<&'a Segment>,
}

impl<'a> Open<'a> {
    /// Adds a segment that begins no sooner than those before it, or gives one that it meets.
    fn add(&mut self, segment: &'a Segment) -> Option<&'a Segment> {
        let is_open = |other: &&Segment| other.dst_end() > segment.dst_offset;
        self.row = self.row.filter(is_open);
        self.last = self.last.filter(is_open);
        if let Some(row) = self.row.filter(|row| !in_other_columns(segment, row)) {
            return Some(row);
        }
        match self.last {
            None => self.columns.clear(),
            Some(last) if !in_other_columns(segment, last) => return Some(last),
            Some(last) => {
                // Columns go round: it meets the next one before or after it, or none.
                let column = segment.dst_offset % last.dst_pitch;
                for is_before in [true, false] {
                    if let Some(other) = self.next(column, is_before, segment.dst_offset)
                        && !in_other_columns(segment, other)
                    {
                        return Some(other);
                    }
                }
            }
        }
        if segment.rows == 1 {
            self.row = Some(segment);
        } else {
            self.columns.insert(segment.dst_offset % segment.dst_pitch, segment);
            self.last = self.last.filter(|last| last.dst_end() > segment.dst_end()).or(Some(segment));
        }
        None
    }

    /// The next segment of several rows, from a column on or back, that does not end before `offset`. Those that do go.
    fn next(&mut self, column: u64, is_before: bool, offset: u64) -> Option<&'a Segment> {
        loop {
            let columns = &self.columns;
            let next = if is_before {
                columns.range(..=column).next_back().or_else(|| columns.last_key_value())
            } else {
                columns.range(column..).next().or_else(|| columns.first_key_value())
            };
            let (&start, &other) = next?;
            if other.dst_end() > offset {
                return Some(other);
            }
            self.columns.remove(&start);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Each with each.
    fn meet(segments: &[Segment]) -> bool {
        let mut pairs = segments.iter().enumerate().flat_map(|(i, a)| segments[..i].iter().map(move |b| (a, b)));
        pairs.any(|(a, b)| a.block == b.block && destinations_meet(a, b))
    }

    fn rows(dst_offset: u64, row_len: u64, rows: u64, dst_pitch: u64) -> Segment {
        Segment { rows, row_len, src_pitch: row_len, dst_pitch, ..Segment::contiguous(0, 0, row_len, 0, dst_offset) }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

        #[test]
        fn what_each_says_with_each_is_found(
            mut segments in proptest::collection::vec(
                (0..400u64, 1..12u64, 1..8u64, prop_oneof![Just(16u64), Just(16), Just(16), 12..40u64], 0..2usize)
                    .prop_map(|(offset, len, count, pitch, block)| Segment { block, ..rows(offset, len, count, pitch) }),
                0..12,
            ),
        ) {
            // Those that meet what came before are left out, so that many lists are good ones; all but the last.
            let mut kept: Vec<Segment> = Vec::new();
            let last = segments.pop();
            for segment in segments {
                kept.push(segment);
                prop_assert_eq!(check_destinations(&kept).is_err(), meet(&kept), "{:?}", kept);
                if meet(&kept) {
                    kept.pop();
                }
            }
            kept.extend(last);
            kept.reverse();
            prop_assert_eq!(check_destinations(&kept).is_err(), meet(&kept), "{:?}", kept);
        }
    }

    #[test]
    fn many_columns_are_told_apart_without_comparing_each_with_each() {
        // Half a million: each with each would be 10^11 comparisons.
        let columns: Vec<Segment> = (0..1 << 19).map(|column| rows(column, 1, 2, 1 << 19)).collect();
        check_destinations(&columns).unwrap();
        let twice = [&columns[..], &[rows(77, 1, 2, 1 << 19)]].concat();
        assert!(check_destinations(&twice).is_err());
        let across = [&columns[..], &[rows((1 << 19) - 1, 2, 1, 2)]].concat();
        assert!(check_destinations(&across).is_err());
    }

    #[test]
    fn what_is_empty_meets_nothing() {
        check_destinations(&[rows(0, 10, 1, 10), rows(5, 0, 1, 0), rows(5, 0, 3, 0), rows(5, 4, 0, 4)]).unwrap();
    }
}
