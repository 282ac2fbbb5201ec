//! Copies between strided tensors, as segments.

use super::Segment;

/// Rows shorter than this, in bytes, are not worth a copy of their own: the caller does better by the processor.
const MIN_ROW: u64 = 64;
/// Segments at most of one copy.
const MAX_SEGMENTS: u64 = 1 << 16;

/// One dimension: its size, and from one element to the next the bytes in the file and in the block.
#[derive(Debug, Clone, Copy)]
struct Dim {
    size: u64,
    src: u64,
    dst: u64,
}

/// An elementwise copy of a strided view of a file's bytes to a view of the same shape in a block.
#[derive(Debug, Clone, Copy)]
pub struct Strided<'a> {
    /// Place of the file in the checkpoint.
    pub file: usize,
    /// First element's byte in the file.
    pub offset: u64,
    /// First element's byte in the block.
    pub dst_offset: u64,
    /// Bytes of an element.
    pub item_len: u64,
    /// Sizes of the dimensions; none for a scalar.
    pub shape: &'a [u64],
    /// Strides in the file, in elements. 0 repeats.
    pub src_strides: &'a [u64],
    /// Strides in the block, in elements.
    pub dst_strides: &'a [u64],
}

impl Strided<'_> {
    /// The segments of the copy, whose `block` is 0.
    ///
    /// `None` where it has too many or too short rows to be moved so, where its numbers do not fit, or where elements
    /// of the destination share a place.
    pub fn segments(&self) -> Option<Vec<Segment>> {
        let mut dims = self.dims()?;
        if self.item_len == 0 || dims.iter().any(|dim| dim.size == 0) {
            return Some(Vec::new());
        }
        let dense = |dim: &Dim| dim.src == self.item_len && dim.dst == self.item_len;
        let row_len = match dims.last() {
            Some(dim) if dense(dim) => dims.pop()?.size.checked_mul(self.item_len)?,
            _ => self.item_len,
        };
        let rows = match dims.last() {
            Some(dim) if dim.src >= row_len && dim.dst >= row_len => dims.pop(),
            _ => None,
        };
        if row_len < MIN_ROW && (rows.is_some() || !dims.is_empty()) {
            return None;
        }
        let (rows, src_pitch, dst_pitch) = rows.map_or((1, row_len, row_len), |dim| (dim.size, dim.src, dim.dst));
        let count = dims.iter().try_fold(1u64, |count, dim| count.checked_mul(dim.size))?;
        if count > MAX_SEGMENTS {
            return None;
        }
        let mut segments = Vec::with_capacity(usize::try_from(count).ok()?);
        for number in 0..count {
            let (mut rest, mut offset, mut dst_offset) = (number, self.offset, self.dst_offset);
            for dim in dims.iter().rev() {
                let at = rest % dim.size;
                rest /= dim.size;
                offset = offset.checked_add(at.checked_mul(dim.src)?)?;
                dst_offset = dst_offset.checked_add(at.checked_mul(dim.dst)?)?;
            }
            let file = self.file;
            segments.push(Segment { file, offset, row_len, rows, src_pitch, block: 0, dst_offset, dst_pitch });
        }
        Some(segments)
    }

    /// The dimensions, those of the largest step in the block first, joined where one continues the other. Those of one
    /// element go.
    fn dims(&self) -> Option<Vec<Dim>> {
        if self.src_strides.len() != self.shape.len() || self.dst_strides.len() != self.shape.len() {
            return None;
        }
        let mut dims = Vec::with_capacity(self.shape.len());
        for ((&size, &src), &dst) in self.shape.iter().zip(self.src_strides).zip(self.dst_strides) {
            if size != 1 {
                let (src, dst) = (src.checked_mul(self.item_len)?, dst.checked_mul(self.item_len)?);
                dims.push(Dim { size, src, dst });
            }
        }
        dims.sort_by_key(|dim| std::cmp::Reverse(dim.dst));
        let mut joined: Vec<Dim> = Vec::with_capacity(dims.len());
        for dim in dims {
            let (src, dst) = (dim.src.checked_mul(dim.size)?, dim.dst.checked_mul(dim.size)?);
            match joined.last_mut() {
                Some(outer) if outer.dst < dst => return None, // elements share a place
                Some(outer) if (outer.src, outer.dst) == (src, dst) => {
                    *outer = Dim { size: outer.size.checked_mul(dim.size)?, ..dim };
                }
                _ if dim.dst < self.item_len && dim.size > 0 => return None,
                _ => joined.push(dim),
            }
        }
        Some(joined)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Element by element: (byte in the file, byte in the block).
    fn oracle(copy: &Strided<'_>) -> Vec<(u64, u64)> {
        let count: u64 = copy.shape.iter().product();
        let element = |mut number: u64| {
            let (mut src, mut dst) = (copy.offset, copy.dst_offset);
            for i in (0..copy.shape.len()).rev() {
                src += number % copy.shape[i] * copy.src_strides[i] * copy.item_len;
                dst += number % copy.shape[i] * copy.dst_strides[i] * copy.item_len;
                number /= copy.shape[i];
            }
            (src, dst)
        };
        let bytes = |n| (0..copy.item_len).map(move |i| (element(n).0 + i, element(n).1 + i));
        let mut bytes: Vec<_> = (0..count).flat_map(bytes).collect();
        bytes.sort_unstable();
        bytes
    }

    fn moved(segments: &[Segment]) -> Vec<(u64, u64)> {
        let rows = segments.iter().flat_map(|s| (0..s.rows).map(move |row| (s, row)));
        let bytes = |(s, row): (&Segment, u64)| {
            let (src, dst) = (s.offset + row * s.src_pitch, s.dst_offset + row * s.dst_pitch);
            (0..s.row_len).map(move |i| (src + i, dst + i)).collect::<Vec<_>>()
        };
        let mut bytes: Vec<_> = rows.flat_map(bytes).collect();
        bytes.sort_unstable();
        bytes
    }

    /// Strides of a contiguous tensor whose dimensions lie in memory in this order, with gaps.
    fn strides(shape: &[u64], order: &[usize], gaps: &[u64]) -> Vec<u64> {
        let mut strides = vec![0; shape.len()];
        let mut step = 1;
        for &dim in order.iter().rev() {
            strides[dim] = step;
            step *= shape[dim] + gaps[dim];
        }
        strides
    }

    proptest! {
        #[test]
        fn segments_move_every_element_once(
            shape in prop::collection::vec(1u64..6, 0..5),
            item_len in prop::sample::select(vec![1u64, 2, 64, 100]),
            orders in any::<(u64, u64)>(),
            gaps in prop::collection::vec(0u64..3, 10),
            repeated in prop::collection::vec(prop::bool::weighted(0.1), 5),
        ) {
            let order = |seed: u64| {
                let mut order: Vec<usize> = (0..shape.len()).collect();
                order.sort_by_key(|&i| if seed.is_multiple_of(3) { i as u64 } else { seed.rotate_left(7 * u32::try_from(i).unwrap()) });
                order
            };
            let mut src = strides(&shape, &order(orders.0), &gaps[..5]);
            let dst = strides(&shape, &order(orders.1), &gaps[5..]);
            src.iter_mut().zip(&repeated).filter(|(_, repeated)| **repeated).for_each(|(stride, _)| *stride = 0);
            let copy = Strided {
                file: 0, offset: 1000, dst_offset: 500, item_len, shape: &shape, src_strides: &src, dst_strides: &dst,
            };
            match copy.segments() {
                Some(segments) => prop_assert_eq!(moved(&segments), oracle(&copy)),
                None => prop_assert!(item_len < 64),
            }
        }
    }

    fn copy<'a>(shape: &'a [u64], src: &'a [u64], dst: &'a [u64]) -> Strided<'a> {
        Strided { file: 3, offset: 8, dst_offset: 16, item_len: 2, shape, src_strides: src, dst_strides: dst }
    }

    #[test]
    fn contiguous_tensors_are_one_row_and_columns_are_rows_of_a_pitch() {
        let whole = copy(&[4, 1, 1000], &[1000, 7, 1], &[1000, 9, 1]).segments().unwrap();
        assert_eq!(whole, [Segment::contiguous(3, 8, 8000, 0, 16)]);
        let columns = copy(&[4, 500], &[1000, 1], &[500, 1]).segments().unwrap();
        let segment = Segment { row_len: 1000, rows: 4, src_pitch: 2000, dst_pitch: 1000, ..whole[0] };
        assert_eq!(columns, [segment]);
    }

    #[test]
    fn experts_of_a_fused_weight_are_one_segment_each() {
        // Of [experts, rows, columns], the left half of the columns into a dense block.
        let halves = copy(&[3, 4, 500], &[4000, 1000, 1], &[2000, 500, 1]).segments().unwrap();
        assert_eq!(halves.len(), 1, "rows of all experts have one pitch");
        let rows = copy(&[3, 2, 500], &[4000, 1000, 1], &[1000, 500, 1]).segments().unwrap();
        assert_eq!(rows.len(), 3);
    }

    #[test]
    fn what_is_no_copy_of_rows_is_left_to_the_caller() {
        assert_eq!(copy(&[100, 100], &[1, 100], &[100, 1]).segments(), None, "transposed");
        assert_eq!(copy(&[100, 100], &[100, 1], &[0, 1]).segments(), None, "written twice");
        assert_eq!(copy(&[100, 100], &[100, 1], &[50, 1]).segments(), None, "rows overlap");
        assert_eq!(copy(&[2, 2], &[u64::MAX, 1], &[2, 1]).segments(), None, "overflow");
        assert_eq!(copy(&[2], &[1], &[]).segments(), None, "ranks differ");
        assert_eq!(copy(&[2, 0, 5], &[5, 5, 1], &[5, 5, 1]).segments(), Some(Vec::new()), "empty");
        assert_eq!(copy(&[], &[], &[]).segments().unwrap().len(), 1, "a scalar");
    }
}
