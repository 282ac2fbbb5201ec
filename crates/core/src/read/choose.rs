//! Which engine reads which pieces, and why.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use super::bounce::Bounce;
use super::depth::{Depth, MOST_READS};
use super::pread::{Pace, Turns};
use super::rates::{Measured, Rates};
use super::residency::{is_cached, is_sample_cached};
use super::uring::Governed;
use super::{Cached, EngineChoice, Mapped, Pread, ReadEngine, Uring};
use crate::checkpoint::DataFile;
use crate::device::Device;
use crate::error::Result;
use crate::plan::{Piece, Segment};
use crate::threads::{self, processors};

/// Reads in flight of an io_uring lane, where nothing finds out how many are good.
const URING_DEPTH: usize = 8;
/// Buffers of an io_uring lane beyond its reads in flight: those that are being copied.
pub const URING_SPARE: usize = 4;
/// io_uring lanes for uncached bytes.
pub const URING_LANES: usize = 2;
/// Processors from which threads that copy out of the page cache beat copying its pages in place, whatever these are.
pub const PREAD_CPUS: usize = 8;
/// Threads beyond which reading for one device does not get faster (measured, `docs/benchmarks.md`).
pub const MAX_LANES: usize = 14;
/// And for any number of devices: the ring of more leaves the processor's cache.
const MOST_LANES: usize = 32;
/// Places that are looked at, or pieces where it is forced how all are read.
const SAMPLES: usize = 64;
/// Bytes of a place that are looked at, to tell whether it is cached.
const SAMPLED_LEN: u64 = 64 << 10;
/// Pieces that one thread asks the system about before another is worth starting.
const ASKED_BY_ONE: usize = 256;
/// Threads that keep a disk busy where each has one read in flight, and nothing finds out how many are good.
const COLD_LANES: usize = 8;
/// Buffers of a thread where it is found out: the copy of the buffer is waited for, since one that is used again is in a
/// cache, the host's too.
pub const COLD_BUFFERS: usize = 1;
/// Buffers of a pread lane: one is filled while the other is copied. More leave the processor's cache.
pub const PREAD_BUFFERS: usize = 2;

/// Threads that read cached bytes, by processors and devices: each device has a link of its own to keep busy.
pub fn cached_lanes(processors: usize, devices: usize) -> usize {
    processors.min(MAX_LANES.saturating_mul(devices.max(1))).min(MOST_LANES)
}

/// Lanes, and buffers of each, by which cached bytes are staged, where they are.
pub(crate) fn staged_lanes(devices: &[Device], wishes: &Wishes) -> Option<(usize, usize)> {
    let is_staged = match wishes.engine {
        EngineChoice::Auto => copies_pages(processors(), wishes.verify),
        EngineChoice::Pread => true,
        EngineChoice::Uring | EngineChoice::Mapped => false,
    };
    let is_staged = is_staged && wishes.direct != Some(true) && !wishes.caches;
    let pins = devices.iter().any(Device::needs_pinning);
    (is_staged && pins).then(|| (wishes.threads.unwrap_or_else(|| warm_lanes(devices)), PREAD_BUFFERS))
}

/// Threads that read cached bytes for these devices.
fn warm_lanes(devices: &[Device]) -> usize {
    cached_lanes(processors(), devices.iter().filter(|device| !device.is_host()).count())
}

/// Whether threads copy cached bytes out of the page cache sooner than its pages are registered, or have to see them.
fn copies_pages(cpus: usize, sums_up: bool) -> bool {
    cpus >= PREAD_CPUS || sums_up
}

/// Where bytes are, in reports.
pub(crate) const PINNED_MEMORY: &str = "pinned memory";
const PAGE_CACHE: &str = "page cache";
const DISK: &str = "disk";
/// The engine of the page cache's pages, in reports.
const MAPPED: &str = "mapped";

/// What finds out how many reads of a disk there should be at once.
#[derive(Clone, Copy)]
pub(crate) enum Governor<'a> {
    /// For reads into a ring of buffers.
    Depth(&'a Arc<Depth>),
    /// For reads into a cache.
    Bounce(&'a Arc<Bounce>),
}

/// What the caller wants.
#[derive(Clone, Default)]
pub(crate) struct Wishes {
    pub(crate) engine: EngineChoice,
    /// Whether to pass the page cache; `None`: as residency says.
    pub(crate) direct: Option<bool>,
    /// Reader threads; `None`: as the engine needs.
    pub(crate) threads: Option<usize>,
    /// Checksums are compared; of a share, lanes take them, so that its pages must come into buffers.
    pub(crate) verify: bool,
    /// Bytes go into a cache, so that pages must come into buffers.
    pub(crate) caches: bool,
    /// Rings that io_uring lanes may open, where a test says so.
    pub(crate) rings: Option<Arc<AtomicUsize>>,
}

/// One engine's share of a load.
pub(crate) struct Share<'a> {
    pub(crate) engine: Box<dyn ReadEngine>,
    /// Its name in reports.
    pub(crate) name: &'static str,
    pub(crate) direct: bool,
    /// Where its bytes are: `page cache`, `disk` or `pinned memory`.
    pub(crate) source: &'static str,
    pub(crate) reason: String,
    pub(crate) pieces: Vec<&'a Piece>,
    pub(crate) lanes: usize,
    /// Buffers that each lane may hold.
    pub(crate) buffers_per_lane: usize,
}

impl Share<'_> {
    /// Whether its pieces may come in another order than that of the files: not out of windows that are registered one
    /// after another, and a disk is the limit whatever the order.
    pub(crate) fn any_order(&self) -> bool {
        self.name != MAPPED && self.source != DISK
    }
}

/// Lanes for chunks that are in the cache: on a device they only issue copies, on the host they copy.
const CACHED_LANES: usize = 2;
const CACHED_LANES_HOST: usize = 8;

/// The share of pieces that are in the cache.
pub(crate) fn cached<'a>(
    pieces: Vec<&'a Piece>,
    devices: &[Device],
    wishes: &Wishes,
    bounce: &Arc<Bounce>,
) -> Share<'a> {
    let copies = devices.iter().any(Device::is_host) || wishes.verify;
    let wanted = wishes.threads.unwrap_or(if copies { processors().min(CACHED_LANES_HOST) } else { CACHED_LANES });
    Share {
        engine: Box::new(Cached {
            pread: Pread { direct: wishes.direct == Some(true), pace: Pace::Bounce(Arc::clone(bounce)), faults: None },
        }),
        name: "cache",
        direct: false,
        source: PINNED_MEMORY,
        reason: "chunks are in the cache, or another load reads them".into(),
        lanes: wanted.clamp(1, pieces.len().max(1)),
        pieces,
        buffers_per_lane: PREAD_BUFFERS,
    }
}

/// Divides pieces among engines: cached ones and uncached ones are read each in their way, at once. Lanes take the checksums of
/// those that `sums_up` says, so that these must come into buffers; others need not, where pages are copied in place.
pub(crate) fn choose<'a>(
    files: &[DataFile],
    pieces: Vec<&'a Piece>,
    devices: &[Device],
    wishes: &Wishes,
    sums_up: impl Fn(&Piece) -> bool,
    governor: Option<Governor<'_>>,
    rates: &Rates,
) -> Result<Vec<Share<'a>>> {
    let Residency { cached, uncached, told, on_disk } = split(files, pieces, wishes.direct.map(|direct| !direct));
    let differs = are_apart(files, &cached, devices, wishes, &sums_up, rates);
    let (summed, other) = cached.into_iter().partition(|piece| differs && sums_up(piece));
    let mut shares = Vec::new();
    for (pieces, warm) in [(other, true), (summed, true), (uncached, false)] as [(Vec<&Piece>, bool); 3] {
        if pieces.is_empty() {
            continue;
        }
        let wishes = &Wishes { verify: pieces.iter().any(|piece| sums_up(piece)), ..wishes.clone() };
        let (engine, reason) = match wishes.engine {
            EngineChoice::Auto => {
                let (engine, reason) = auto(files, &pieces, warm, devices, wishes, rates);
                (engine, format!("{told}; {reason}"))
            }
            forced => (forced, "it was asked for".to_owned()),
        };
        let mut share = share(engine, reason, warm, pieces, devices, wishes, governor)?;
        if warm && on_disk {
            share.source = DISK;
        }
        shares.push(share);
    }
    Ok(shares)
}

/// Whether some cached pieces come into buffers, because lanes sum them up, and most of them, the others, are copied in place.
fn are_apart(
    files: &[DataFile],
    cached: &[&Piece],
    devices: &[Device],
    wishes: &Wishes,
    sums_up: &impl Fn(&Piece) -> bool,
    rates: &Rates,
) -> bool {
    if wishes.engine != EngineChoice::Auto || copies_pages(processors(), false) {
        return false;
    }
    let others: Vec<&Piece> = cached.iter().copied().filter(|piece| !sums_up(piece)).collect();
    let are_most = others.len() < cached.len() && others.len() > cached.len() / 4 * 3;
    let wishes = Wishes { verify: false, ..wishes.clone() };
    are_most && auto(files, &others, true, devices, &wishes, rates).0 == EngineChoice::Mapped
}

/// Whether a part of these segments that counts is to be read from a disk, past the page cache; by a sample.
pub(crate) fn is_cold(files: &[DataFile], segments: &[Segment], wishes: &Wishes) -> bool {
    match (wishes.engine, wishes.direct) {
        (EngineChoice::Mapped, _) | (_, Some(false)) => false,
        (_, Some(true)) => true,
        (_, None) => {
            let places = sample(segments);
            let is_uncached = |&&(file, offset): &&(usize, u64)| {
                let file: Option<&DataFile> = files.get(file).filter(|file| offset < file.len());
                let len = |file: &DataFile| SAMPLED_LEN.min(file.len() - offset);
                file.is_some_and(|file| is_sample_cached(file, offset, len(file)) == Some(false))
            };
            16 * places.iter().filter(is_uncached).count() > places.len()
        }
    }
}

/// Some places of segments, file and offset, as far from each other: one segment may be a whole file.
fn sample(segments: &[Segment]) -> Vec<(usize, u64)> {
    let total = segments.iter().fold(0u64, |total, segment| total.saturating_add(segment.len()));
    let step = total.div_ceil(SAMPLES as u64).max(1);
    let mut places = Vec::new();
    let mut next = 0u64;
    for segment in segments {
        while next < segment.len() {
            let row = (next / segment.row_len).saturating_mul(segment.src_pitch);
            places.push((segment.file, segment.offset.saturating_add(row).saturating_add(next % segment.row_len)));
            next = next.saturating_add(step);
        }
        next -= segment.len();
    }
    places
}

#[derive(Default)]
struct Residency<'a> {
    cached: Vec<&'a Piece>,
    uncached: Vec<&'a Piece>,
    told: String,
    /// Those to be read by the page cache are not in it.
    on_disk: bool,
}

/// Divides pieces by whether they are cached; `all` forces the answer.
fn split<'a>(files: &[DataFile], pieces: Vec<&'a Piece>, all: Option<bool>) -> Residency<'a> {
    let mut residency = Residency::default();
    let total = pieces.iter().map(|piece| piece.len).sum::<u64>().max(1);
    let mut cached_bytes = 0;
    let answers = match all {
        Some(all) => vec![Some(all); pieces.len()],
        None => ask(files, &pieces),
    };
    let unknown: Vec<&Piece> =
        pieces.iter().zip(&answers).filter(|(_, told)| told.is_none()).map(|(&p, _)| p).collect();
    let (is_unknown, otherwise) = (!unknown.is_empty(), !mostly_uncached(files, &unknown));
    for (piece, answer) in pieces.into_iter().zip(answers) {
        if answer.unwrap_or(otherwise) {
            cached_bytes += piece.len;
            residency.cached.push(piece);
        } else {
            residency.uncached.push(piece);
        }
    }
    residency.on_disk = all == Some(true) && mostly_uncached(files, &residency.cached);
    residency.told = match all {
        Some(true) => "the page cache was asked for".into(),
        Some(false) => "direct reads were asked for".into(),
        None if is_unknown && otherwise => "the system does not say what is cached".into(),
        None if is_unknown => "the system does not say what is cached, and by a sample most is not".into(),
        None => format!("{} % of the bytes are in the page cache", cached_bytes * 100 / total),
    };
    residency
}

/// Whether each of these pieces is cached; `None` where the system does not say. For a large model it is asked ten
/// thousand times, which takes one thread 3 to 8 ms: so threads share the pieces.
fn ask(files: &[DataFile], pieces: &[&Piece]) -> Vec<Option<bool>> {
    let answer = |piece: &Piece| files.get(piece.file).and_then(|file| is_cached(file, piece.offset, piece.len));
    let threads = (pieces.len() / ASKED_BY_ONE).clamp(1, processors().min(MAX_LANES));
    let mut answers = vec![None; pieces.len()];
    let parts = pieces.chunks(ASKED_BY_ONE).zip(answers.chunks_mut(ASKED_BY_ONE));
    threads::share(threads, "sllm-ask", parts, |(pieces, places)| {
        for (piece, place) in pieces.iter().zip(places) {
            *place = answer(piece);
        }
    });
    answers
}

/// Whether most of these pieces come from the disk, by a sample.
fn mostly_uncached(files: &[DataFile], pieces: &[&Piece]) -> bool {
    let sample = || pieces.iter().step_by(pieces.len().div_ceil(SAMPLES).max(1));
    let uncached = |piece: &&&Piece| {
        files.get(piece.file).is_some_and(|file| is_sample_cached(file, piece.offset, piece.len) == Some(false))
    };
    2 * sample().filter(uncached).count() > sample().count()
}

/// The engine for pieces, of which there are some.
fn auto(
    files: &[DataFile],
    pieces: &[&Piece],
    warm: bool,
    devices: &[Device],
    wishes: &Wishes,
    rates: &Rates,
) -> (EngineChoice, String) {
    let cpus = processors();
    let on_host = devices.iter().all(Device::is_host);
    if !warm && wishes.caches {
        return (EngineChoice::Pread, "direct reads go by small buffers into the cache".into());
    }
    if !warm {
        return match Uring::probe() {
            Ok(()) => (EngineChoice::Uring, "io_uring keeps the disk busy".into()),
            Err(e) => (EngineChoice::Pread, e.to_string()),
        };
    }
    if on_host && !wishes.caches {
        (EngineChoice::Pread, "reads go straight to their places".into())
    } else if wishes.caches {
        (EngineChoice::Pread, "pages are copied into the cache".into())
    } else if copies_pages(cpus, wishes.verify) {
        let why = format!("{cpus} processors copy faster than pages are registered");
        (EngineChoice::Pread, if cpus < PREAD_CPUS { "the processor takes their checksums".into() } else { why })
    } else {
        in_place_or_not(files, pieces, devices, rates)
    }
}

/// The engine for cached pieces where processors are few.
fn in_place_or_not(files: &[DataFile], pieces: &[&Piece], devices: &[Device], rates: &Rates) -> (EngineChoice, String) {
    let (cpus, mapped) = (processors(), Mapped::new(devices, false));
    let first = pieces[0];
    let measured = rates.of(&mapped, files, pieces, cpus);
    let probed = measured.and_then(|rates| match rates {
        Some(rates) => Ok(Some(rates)),
        None => mapped.probe(&files[first.file], first.offset, first.len).map(|()| None),
    });
    let told = |rates: Measured| {
        let (registered, copied) = (rates.registered / 1e9, rates.copied / 1e9);
        format!("pages are registered at {registered:.0} GB/s, and each of {cpus} processors copies {copied:.1}")
    };
    match probed {
        Ok(Some(rates)) if rates.copying_is_faster(cpus) => (EngineChoice::Pread, told(rates)),
        Ok(Some(rates)) => (EngineChoice::Mapped, told(rates)),
        Ok(None) => (EngineChoice::Mapped, format!("{cpus} processors: pages are copied in place")),
        Err(e) => (EngineChoice::Pread, format!("pages cannot be copied in place: {e}")),
    }
}

fn share<'a>(
    engine: EngineChoice,
    reason: String,
    warm: bool,
    pieces: Vec<&'a Piece>,
    devices: &[Device],
    wishes: &Wishes,
    governor: Option<Governor<'_>>,
) -> Result<Share<'a>> {
    let governor = governor.filter(|_| !warm);
    if let Some(Governor::Depth(depth)) = governor {
        depth.begin();
    }
    let (direct, source) = (!warm, if warm { PAGE_CACHE } else { DISK });
    let lanes = |wanted: usize| wishes.threads.unwrap_or(wanted).clamp(1, pieces.len().max(1));
    Ok(match engine {
        EngineChoice::Uring => {
            Uring::probe()?;
            let lanes = lanes(if warm { warm_lanes(devices) } else { URING_LANES });
            let lanes = lanes.min(MOST_READS);
            let governed = match governor {
                Some(Governor::Depth(depth)) => Some(Governed::new(Arc::clone(depth))),
                _ => None,
            };
            let depth = if governed.is_some() { MOST_READS.div_ceil(lanes) } else { URING_DEPTH };
            let (or_pread, rings) = (wishes.engine == EngineChoice::Auto, wishes.rings.clone());
            let engine = Box::new(Uring { direct, depth, governed, or_pread, faults: None, unregistered: None, rings });
            let buffers_per_lane = depth + URING_SPARE;
            Share { engine, name: "uring", direct, source, reason, pieces, lanes, buffers_per_lane }
        }
        EngineChoice::Mapped if wishes.caches => {
            let reason = "chunks are kept in buffers, and it has none: leave the engine to auto with a cache".into();
            return Err(crate::Error::Engine { engine: MAPPED, reason });
        }
        EngineChoice::Mapped if !wishes.verify => {
            let lanes = lanes(1); // the driver registers one window at a time
            // Buffers for what cannot be registered: until then they have no memory.
            let or_pread = wishes.engine == EngineChoice::Auto;
            let buffers_per_lane = if or_pread { PREAD_BUFFERS } else { 0 };
            let engine = Box::new(Mapped::new(devices, or_pread));
            Share { engine, name: MAPPED, direct: false, source, reason, pieces, lanes, buffers_per_lane }
        }
        EngineChoice::Mapped => {
            return Err(crate::Error::Engine {
                engine: MAPPED,
                reason:
                    "the processor takes checksums of buffers, and it has none, and the device cannot take them of all \
                         bytes: leave the engine to auto to verify"
                        .into(),
            });
        }
        EngineChoice::Auto | EngineChoice::Pread => {
            let (wanted, buffers_per_lane, pace) = match governor {
                _ if warm => (warm_lanes(devices), PREAD_BUFFERS, Pace::Free),
                None => (COLD_LANES, PREAD_BUFFERS, Pace::Free),
                Some(Governor::Depth(depth)) => (MOST_READS, COLD_BUFFERS, Pace::Turns(Turns::new(Arc::clone(depth)))),
                Some(Governor::Bounce(bounce)) => (MOST_READS, PREAD_BUFFERS, Pace::Bounce(Arc::clone(bounce))),
            };
            let lanes = lanes(wanted);
            let engine = Box::new(Pread { direct, pace, faults: None });
            Share { engine, name: "pread", direct, source, reason, pieces, lanes, buffers_per_lane }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::residency::tests::as_another;
    use super::*;

    #[test]
    fn places_are_sampled_by_bytes_whatever_the_segments() {
        let one = sample(&[Segment::contiguous(3, 100, 64 << 20, 0, 0)]);
        let expected: Vec<(usize, u64)> = (0..64).map(|n| (3, 100 + (n << 20))).collect();
        assert_eq!(one, expected);

        let small = (0..6400).map(|n| Segment::contiguous(0, 10 * n, 10, 0, 10 * n));
        let last = Segment::contiguous(1, 0, 64_000, 0, 64_000);
        let places = sample(&small.chain([last]).collect::<Vec<_>>());
        let expected = (0..32).map(|n| (0, 2000 * n)).chain((0..32).map(|n| (1, 2000 * n)));
        assert_eq!(places, expected.collect::<Vec<_>>());

        let rows = Segment { rows: 128, src_pitch: 1000, ..Segment::contiguous(0, 7, 10, 0, 0) };
        let expected: Vec<(usize, u64)> = (0..64).map(|n| (0, 7 + 2000 * n)).collect();
        assert_eq!(sample(&[rows]), expected);
    }

    #[test]
    fn what_is_cached_of_files_that_others_own_is_found_out_by_a_sample() {
        const LEN: usize = 8 << 20;
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![1; LEN]).unwrap();
        std::fs::File::open(&path).unwrap().sync_all().unwrap();
        let len = LEN as u64;
        let files = [DataFile::open(&path, "f", true).unwrap()];
        let plan = crate::LoadPlan::whole(&[len], 1 << 20);
        let segment = [Segment::contiguous(0, 0, len, 0, 0)];
        let uncached = || {
            let residency = split(&files, plan.pieces().iter().collect(), None);
            (residency.uncached.len(), is_cold(&files, &segment, &Wishes::default()), residency.told)
        };
        let Some((none, false, told)) = as_another(&path, uncached) else {
            eprintln!("skipped: the right to write everywhere cannot be laid down here");
            return;
        };
        assert_eq!(none, 0, "all is in the page cache: {told}");
        rustix::fs::fadvise(files[0].buffered(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
        if is_cached(&files[0], 0, len) != Some(false) || !told.contains("does not say") {
            eprintln!("skipped: the file system keeps its pages, or the kernel tells of everybody's files");
            return;
        }
        let (all, is_cold, told) = as_another(&path, uncached).unwrap();
        assert_eq!((all, is_cold), (8, true), "{told}");
        assert!(told.ends_with("by a sample most is not"), "{told}");
    }

    #[test]
    fn each_device_has_threads_while_there_are_processors() {
        let lanes = [(64, 0), (64, 1), (64, 2), (20, 2), (4, 8), (64, 3), (128, 8)]
            .map(|(cpus, devices)| cached_lanes(cpus, devices));
        assert_eq!(lanes, [14, 14, 28, 20, 4, 32, 32]);
    }

    #[test]
    fn segments_of_nothing_and_out_of_bounds_are_sampled_without_harm() {
        let empty = Segment::contiguous(0, 5, 0, 0, 0);
        assert_eq!(sample(&[empty, empty]), []);
        let vast = Segment { rows: u64::MAX, src_pitch: u64::MAX, ..Segment::contiguous(9, u64::MAX, u64::MAX, 0, 0) };
        assert!(sample(&[vast, vast]).len() <= 2 * SAMPLES);
        assert!(!is_cold(&[], &[vast], &Wishes::default()));
    }
}
