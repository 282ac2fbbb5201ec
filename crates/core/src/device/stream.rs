//! Copies on their way to a device.

use std::sync::{Arc, Mutex, PoisonError};

use super::{BackendStream, BackendSums, Block, Device, DeviceError, Mark, Part, Run, StreamCopy};
use crate::plan::{PieceCopy, rows_end};
use crate::read::Filled;

/// A queue of copies to one device.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(super) stream: Box<dyn BackendStream>,
    /// Where checksums are taken on the device.
    pub(super) sums: Option<Box<dyn BackendSums>>,
    pub(super) device: Device,
}

/// A filled piece, and where its bytes go.
#[derive(Debug)]
pub(crate) struct Parcel<'a> {
    pub(crate) source: Filled,
    pub(crate) copies: &'a [PieceCopy],
    /// Its place in a chunk that the device sums up.
    pub(crate) part: Option<Part>,
}

/// Copies in flight, and what they read. Waits for them when dropped.
#[derive(Debug)]
pub(crate) struct Pending {
    /// By parcel, until it is taken.
    sources: Mutex<Vec<Option<Filled>>>,
    marks: Vec<Box<dyn Mark>>,
    _blocks: Arc<[Block]>,
}

/// Issues the copies of several pieces, each on its device's stream, and marks their end.
///
/// On an error everything that was issued is waited for before the sources are dropped.
pub(crate) fn copy(
    streams: &[Stream],
    blocks: &Arc<[Block]>,
    parcels: Vec<Parcel<'_>>,
) -> Result<Pending, DeviceError> {
    let mut by_stream: Vec<(Vec<StreamCopy>, Vec<Run>)> = streams.iter().map(|_| Default::default()).collect();
    for Parcel { source, copies, part } in &parcels {
        let is_pinned = source.is_pinned();
        for copy in *copies {
            let (at, dst) = resolve(streams, blocks, source, copy)?;
            let place = usize::try_from(copy.src_offset).map_err(|_| DeviceError::OutOfBounds)?;
            by_stream[at].0.push(StreamCopy { source: source.at(place, is_pinned), dst, rows: *copy });
            by_stream[at].1.extend(part.map(|part| part.run(copy, dst)).transpose()?.filter(|run| run.words > 0));
        }
    }
    let used = || streams.iter().zip(&by_stream).filter(|(_, (copies, _))| !copies.is_empty());
    let issue = |(stream, (copies, runs)): (&Stream, &(Vec<StreamCopy>, Vec<Run>))| {
        // SAFETY: `resolve` checked that the rows lie in the source and in the block; `Pending` keeps both until the
        // marks are reached, and so does the wait below after an error.
        unsafe { stream.stream.copy(copies)? };
        // SAFETY: the same rows. The load holds its blocks until its `Summing` has stopped.
        if runs.is_empty() { Ok(()) } else { unsafe { stream.sums()?.add(runs) } }
    };
    let issued = used().try_for_each(issue);
    let marks = issued.and_then(|()| used().map(|(stream, _)| stream.stream.mark()).collect());
    match marks {
        Ok(marks) => {
            let sources = parcels.into_iter().map(|parcel| Some(parcel.source)).collect();
            Ok(Pending { sources: Mutex::new(sources), marks, _blocks: Arc::clone(blocks) })
        }
        Err(error) => {
            for (stream, _) in used() {
                let _ = stream.stream.synchronize();
            }
            Err(error)
        }
    }
}

/// The place of the stream to a block's device.
pub(crate) fn stream_of(streams: &[Stream], block: &Block) -> Option<usize> {
    streams.iter().position(|stream| stream.device.same_as(block.device()))
}

/// The stream's place and the device address of a copy, checked against source and block.
fn resolve(
    streams: &[Stream],
    blocks: &[Block],
    source: &Filled,
    copy: &PieceCopy,
) -> Result<(usize, u64), DeviceError> {
    let block = blocks.get(copy.block).ok_or(DeviceError::OutOfBounds)?;
    check_rows(copy, source.len() as u64, block.len())?;
    let at = stream_of(streams, block).ok_or(DeviceError::OutOfBounds)?;
    Ok((at, block.addr() + copy.dst_offset))
}

/// An error where a row lies outside its source or its block, which have these lengths.
pub(super) fn check_rows(copy: &PieceCopy, source_len: u64, block_len: u64) -> Result<(), DeviceError> {
    let inside = |start: u64, pitch: u64, len: u64| {
        rows_end(start, copy.rows, copy.row_len, pitch).is_some_and(|end| end <= len)
    };
    let fits = inside(copy.src_offset, copy.src_pitch, source_len)
        && inside(copy.dst_offset, copy.dst_pitch, block_len)
        && copy.rows.checked_mul(copy.row_len).is_some();
    if fits { Ok(()) } else { Err(DeviceError::OutOfBounds) }
}

impl Pending {
    /// Whether the device has read the sources.
    pub(crate) fn is_done(&self) -> bool {
        self.marks.iter().all(|mark| mark.is_done())
    }

    /// Waits for the copies and gives the source of one parcel back, the first time.
    pub(crate) fn wait(&self, parcel: usize) -> Result<Option<Filled>, DeviceError> {
        let mut result = Ok(());
        for mark in &self.marks {
            result = result.and(mark.wait());
        }
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        result.map(|()| sources.get_mut(parcel).and_then(Option::take))
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        for mark in &self.marks {
            // After an error of the device nothing more is read; otherwise the copies are done now.
            let _ = mark.wait();
        }
    }
}

impl Stream {
    /// The device that it copies to.
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }

    pub(crate) fn synchronize(&self) -> Result<(), DeviceError> {
        self.stream.synchronize()
    }

    /// Begins to take checksums of what it brings, by so many slots; nothing, where its device never does.
    pub(crate) fn begin_sums(&mut self, slots: usize) -> Result<(), DeviceError> {
        if self.sums.is_none() {
            self.sums = self.stream.sums()?;
        }
        self.sums.as_mut().map_or(Ok(()), |sums| sums.begin(slots))
    }

    fn sums(&self) -> Result<&dyn BackendSums, DeviceError> {
        self.sums.as_deref().ok_or(DeviceError::OutOfBounds)
    }
}

/// The checksums that devices take in one load. Dropping it waits for what reads the load's blocks.
#[derive(Debug)]
pub(crate) struct Summing<'a>(&'a [Stream]);

impl<'a> Summing<'a> {
    /// Those of streams for which they were begun.
    pub(crate) fn new(streams: &'a [Stream]) -> Self {
        Summing(streams)
    }

    /// Waits, and gives the remainders by the slots of the stream at this place.
    pub(crate) fn remainders(&self, place: usize) -> Result<Vec<u64>, DeviceError> {
        self.0.get(place).ok_or(DeviceError::OutOfBounds)?.sums()?.take()
    }
}

impl Drop for Summing<'_> {
    fn drop(&mut self) {
        self.0.iter().filter_map(|stream| stream.sums.as_deref()).for_each(BackendSums::stop);
    }
}
