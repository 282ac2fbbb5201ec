//! What clients want moved, as the core takes it: every number checked.

use sllm_core::{Block, Device, PlanOptions, Segment};
use sllm_proto::storage::MemCopyChunk;
use sllm_proto::store;
use tonic::Status;

use crate::fault::invalid;

/// Segments of a batch at most, as many as the plan makes of them: a few bytes of a message may say a thousand million rows,
/// and each that is read by itself takes memory before it is known that two go to one place.
const MAX_SEGMENTS: usize = 1 << 21;

fn too_many() -> Status {
    invalid(format!("what is wanted lies in more than {MAX_SEGMENTS} ranges of files: send several batches or loads"))
}

/// The segments of a batch, and the numbers of the blocks that they name, of so many that are attached. `files` has the
/// places of the client's files.
///
/// That segments lie inside their files and blocks, and write no byte twice, is checked by the plan.
pub(super) fn of_batch(
    segments: &[store::Segment],
    files: &[usize],
    blocks: usize,
) -> Result<(Vec<Segment>, Vec<usize>), Status> {
    if segments.len() > MAX_SEGMENTS {
        return Err(too_many());
    }
    // Only the blocks of this batch are loaded into: a session may have many.
    let mut used = Vec::new();
    let mut places = vec![None; blocks];
    let mut out = Vec::with_capacity(segments.len());
    let (mut parts, options) = (0u64, PlanOptions::default());
    for segment in segments {
        let file = usize::try_from(segment.file).ok().and_then(|file| files.get(file));
        let file =
            *file.ok_or_else(|| invalid(format!("there is no file {}: {} were named", segment.file, files.len())))?;
        let missing = || invalid(format!("there is no block {}: {blocks} are attached", segment.block));
        let number = usize::try_from(segment.block).map_err(|_| missing())?;
        let block = *places.get_mut(number).ok_or_else(missing)?.get_or_insert_with(|| {
            used.push(number);
            used.len() - 1
        });
        let rows = segment.rows.max(1);
        // One row has no next one to be told of.
        let pitch = |told: u64| if rows == 1 { segment.row_len } else { told };
        let segment = Segment {
            file,
            offset: segment.offset,
            row_len: segment.row_len,
            rows,
            src_pitch: pitch(segment.src_pitch),
            block,
            dst_offset: segment.dst_offset,
            dst_pitch: pitch(segment.dst_pitch),
        };
        parts = parts.saturating_add(segment.parts(&options));
        if parts > MAX_SEGMENTS as u64 {
            return Err(too_many());
        }
        out.push(segment);
    }
    Ok((out, used))
}

/// Adds segments of the original's chunks, whose offsets count over all files, one after the other. `first_block` is the
/// place of the handles' first block. Of all that are added to one list there may be so many.
pub(super) fn add_chunks(
    out: &mut Vec<Segment>,
    chunks: &[MemCopyChunk],
    files: &[u64],
    handles: usize,
    first_block: usize,
) -> Result<(), Status> {
    let mut starts = Vec::with_capacity(files.len());
    let mut total = 0u64;
    for len in files {
        starts.push(total);
        total = total.checked_add(*len).ok_or_else(|| invalid("the files are longer than 64 bits can count"))?;
    }
    for chunk in chunks {
        let end = chunk.src_offset.checked_add(chunk.size).filter(|&end| end <= total);
        let outside = || invalid(format!("{chunk:?} passes the model's {total} bytes"));
        let end = end.ok_or_else(outside)?;
        chunk
            .dst_offset
            .checked_add(chunk.size)
            .ok_or_else(|| invalid(format!("{chunk:?} passes every memory's end")))?;
        let handle = usize::try_from(chunk.handle_idx).ok().filter(|&handle| handle < handles);
        let handle = handle.ok_or_else(|| invalid(format!("{chunk:?} names no handle: {handles} were given")))?;
        // A chunk may lie over the ends of files.
        let mut at = chunk.src_offset;
        let mut file = starts.partition_point(|&start| start <= at).saturating_sub(1);
        while at < end {
            let stop = end.min(starts[file] + files[file]);
            if at < stop {
                let to = chunk.dst_offset + (at - chunk.src_offset);
                if out.len() == MAX_SEGMENTS {
                    return Err(too_many());
                }
                out.push(Segment::contiguous(file, at - starts[file], stop - at, first_block + handle, to));
            }
            at = stop;
            file += 1;
        }
    }
    Ok(())
}

/// The devices of blocks, each once.
pub(super) fn devices(blocks: &[Block]) -> Vec<Device> {
    let mut devices: Vec<Device> = Vec::new();
    for block in blocks {
        if !devices.iter().any(|device| device.id() == block.device().id()) {
            devices.push(block.device().clone());
        }
    }
    if devices.is_empty() { vec![Device::host()] } else { devices }
}

/// What devices are called together.
pub(super) fn names(devices: &[Device]) -> String {
    let mut ids: Vec<String> = devices.iter().map(Device::id).collect();
    ids.sort_unstable();
    ids.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(src_offset: u64, size: u64, dst_offset: u64, handle_idx: u64) -> MemCopyChunk {
        MemCopyChunk { src_offset, size, dst_offset, handle_idx }
    }

    fn of_chunks(chunks: &[MemCopyChunk], files: &[u64], handles: usize, first: usize) -> Result<Vec<Segment>, Status> {
        let mut segments = Vec::new();
        add_chunks(&mut segments, chunks, files, handles, first).map(|()| segments)
    }

    #[test]
    fn chunks_are_cut_where_files_end() {
        // An empty file is passed over.
        let segments = of_chunks(&[chunk(6, 10, 100, 1), chunk(0, 0, 0, 0)], &[10, 0, 4, 5], 2, 3).unwrap();
        let parts = [(0, 6, 4, 4, 100), (2, 0, 4, 4, 104), (3, 0, 2, 4, 108)];
        let parts = parts.map(|(file, offset, len, block, to)| Segment::contiguous(file, offset, len, block, to));
        assert_eq!(segments, parts);
    }

    #[test]
    fn chunks_that_pass_an_end_or_name_no_handle_are_refused() {
        for wrong in [
            chunk(0, 11, 0, 0),
            chunk(11, 0, 0, 0),
            chunk(u64::MAX, 1, 0, 0),
            chunk(1, u64::MAX, 0, 0),
            chunk(0, 10, u64::MAX, 0),
            chunk(0, 1, 0, 1),
            chunk(0, 1, 0, u64::MAX),
        ] {
            assert!(of_chunks(&[wrong], &[4, 6], 1, 0).is_err(), "{wrong:?}");
        }
        assert!(of_chunks(&[chunk(0, 1, 0, 0)], &[u64::MAX, 1], 1, 0).is_err());
    }

    #[test]
    fn segments_name_files_and_blocks_that_are_there() {
        let segment =
            |file, block, rows| store::Segment { file, block, rows, row_len: 4, src_pitch: 9, ..Default::default() };
        let (segments, used) = of_batch(&[segment(0, 1, 0), segment(0, 1, 2)], &[5], 2).unwrap();
        assert_eq!(used, [1]);
        assert_eq!(segments[0], Segment::contiguous(5, 0, 4, 0, 0));
        assert_eq!((segments[1].rows, segments[1].src_pitch), (2, 9));
        for wrong in [segment(1, 0, 0), segment(0, 2, 0), segment(u32::MAX, u32::MAX, 0)] {
            assert!(of_batch(&[wrong], &[5], 2).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn what_a_plan_would_make_too_many_segments_of_is_refused() {
        let gap = PlanOptions::default().max_gap;
        let rows = |rows, src_pitch| store::Segment { rows, row_len: 1, src_pitch, dst_pitch: 1, ..Default::default() };
        let most = MAX_SEGMENTS as u64;
        let count = |segments: &[store::Segment]| of_batch(segments, &[0], 1).map(|(segments, _)| segments.len());
        // Rows that are read together are one.
        assert_eq!(count(&[rows(u64::MAX, gap), rows(most - 1, gap + 1)]).unwrap(), 2);
        let empty = store::Segment { row_len: 0, ..rows(u64::MAX, u64::MAX) };
        assert_eq!(count(&[empty]).unwrap(), 1);
        for wrong in
            [vec![rows(most + 1, gap + 1)], vec![rows(most / 4, gap + 1); 5], vec![rows(u64::MAX, u64::MAX); 3]]
        {
            let error = count(&wrong).unwrap_err();
            assert!(error.message().contains("ranges of files"), "{error}");
        }
        // Of the original's: each chunk is of both files, and there is a list for each device.
        let over_both = vec![chunk(0, 2, 0, 0); MAX_SEGMENTS / 4];
        let mut segments = Vec::new();
        for _ in 0..2 {
            add_chunks(&mut segments, &over_both, &[1, 1], 1, 0).unwrap();
        }
        let error = add_chunks(&mut segments, &[chunk(0, 1, 0, 0)], &[1, 1], 1, 0).unwrap_err();
        assert!(error.message().contains("ranges of files"), "{error}");
    }
}
