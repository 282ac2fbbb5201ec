//! Verification: every chunk of a store read and compared with its checksum.

use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Instant;

use serde::Serialize;

use crate::checkpoint::{Checkpoint, DataFile};
use crate::control::{WorkOptions, gb_per_s};
use crate::convert::chunks::Chunks;
use crate::convert::workers::for_each;
use crate::error::{CorruptChunk, Error, Result};
use crate::format::manifest::CHUNK_LEN;

/// What a verification found.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct VerifyReport {
    /// The store.
    #[serde(serialize_with = "crate::error::lossy")]
    pub path: PathBuf,
    /// The identity its manifest gives.
    pub identity: String,
    /// Chunks read.
    pub chunks: u64,
    /// Bytes read.
    pub bytes: u64,
    /// The chunks that are not what was stored, by file and offset; empty where all is well.
    pub corrupt: Vec<CorruptChunk>,
    /// Seconds it took.
    pub seconds: f64,
    /// `bytes` by `seconds`, in 1e9 bytes a second.
    pub gb_per_s: f64,
}

/// Verifies a store before other work on `more` bytes, and gives the bytes that it read. The first corrupt chunk is an
/// error, and no chunk is begun after it.
pub(crate) fn verify_before(store: &Checkpoint, options: &WorkOptions, more: u64) -> Result<u64> {
    let report = compare(store, &options.clone().control(options.control.part(0, more)), true)?;
    match report.corrupt.into_iter().next() {
        Some(fault) => Err(Error::Corrupt(Box::new(fault))),
        None => Ok(report.bytes),
    }
}

/// Reads every chunk of a store and compares it with its checksum. Corrupt chunks are listed in the report, all of them.
///
/// # Errors
/// [`Error::Invalid`] for a checkpoint that is not a store: only a store has checksums. [`Error::Io`] and
/// [`Error::Truncated`] where a file cannot be read; [`Error::Cancelled`].
pub fn verify(store: &Checkpoint, options: &WorkOptions) -> Result<VerifyReport> {
    compare(store, options, false)
}

/// The CRC-64/NVME of a range of a file, which is read through `buf`. `done` is told of every read.
pub(crate) fn sum_of(
    file: &DataFile,
    offset: u64,
    len: u64,
    buf: &mut [u8],
    done: impl Fn(u64) -> Result<()>,
) -> Result<u64> {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme);
    let mut at = 0;
    while at < len {
        let count = usize::try_from(len - at).unwrap_or(usize::MAX).min(buf.len());
        file.read_exact_at(&mut buf[..count], offset + at)?;
        digest.update(&buf[..count]);
        at += count as u64;
        done(count as u64)?;
    }
    Ok(digest.finalize())
}

/// Compares all chunks, or those up to the first corrupt one, and in other threads a few more: none before it is left out.
fn compare(store: &Checkpoint, options: &WorkOptions, stop_at_corrupt: bool) -> Result<VerifyReport> {
    let start = Instant::now();
    let threads = options.thread_count()?;
    let Some((sums, identity)) = store.sums().zip(store.identity()) else {
        let (path, layout) = (store.path().display(), store.layout().name());
        return Err(Error::Invalid(format!("{path}: the {layout} layout has no checksums; only a store is verified")));
    };
    let chunks = Chunks::new(sums.chunk_len, store.files().iter().map(|file| file.len()));
    let corrupt = Mutex::new(Vec::new());
    let meter = options.control.meter(chunks.total_len());
    options.control.check()?;
    let result = for_each(threads, chunks.count(), CHUNK_LEN, |number, buffer| {
        let chunk = chunks.get(number);
        let file = &store.files()[chunk.file];
        // A foreign writer may use chunks larger than a buffer.
        let buf = buffer.get(CHUNK_LEN.min(chunk.len));
        let sum = sum_of(file, chunk.offset, chunk.len, buf, |len| meter.add(len))?;
        match store.check_chunk(chunk.file, chunk.number, sum) {
            Err(Error::Corrupt(fault)) => {
                corrupt.lock().unwrap_or_else(|e| e.into_inner()).push((number, (*fault).clone()));
                if stop_at_corrupt { Err(Error::Corrupt(fault)) } else { Ok(()) }
            }
            result => result,
        }
    });
    let mut corrupt = corrupt.into_inner().unwrap_or_else(|e| e.into_inner());
    match result {
        // Chunks before it, which other threads had begun, may be corrupt too: the first one counts.
        Err(Error::Corrupt(_)) if stop_at_corrupt => {}
        result => result?,
    }
    corrupt.sort_unstable_by_key(|(number, _)| *number);
    let seconds = start.elapsed().as_secs_f64();
    Ok(VerifyReport {
        path: store.path().to_owned(),
        identity: identity.to_owned(),
        chunks: chunks.count(),
        bytes: chunks.total_len(),
        corrupt: corrupt.into_iter().map(|(_, fault)| fault).collect(),
        seconds,
        gb_per_s: gb_per_s(chunks.total_len(), seconds),
    })
}
