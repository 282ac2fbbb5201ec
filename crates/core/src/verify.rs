//! Verification: every chunk of a store read and compared with its checksum.

use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Instant;

use serde::Serialize;

use crate::checkpoint::Checkpoint;
use crate::control::Control;
use crate::convert::chunks::{Chunk, Chunks};
use crate::convert::gb_per_s;
use crate::convert::workers::{DEFAULT_THREADS, for_each};
use crate::error::{CorruptChunk, Error, Result};
use crate::format::manifest::CHUNK_LEN;

/// How to verify.
#[derive(Debug, Clone, Default)]
pub struct VerifyOptions {
    threads: Option<usize>,
    control: Control,
}

impl VerifyOptions {
    /// The defaults: a thread a core and at most eight.
    pub fn new() -> Self {
        Self::default()
    }

    /// Threads that read and check.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Progress callback and cancel flag.
    pub fn control(mut self, control: Control) -> Self {
        self.control = control;
        self
    }
}

/// What a verification found.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct VerifyReport {
    /// The store.
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

/// Reads every chunk of a store and compares it with its checksum. Corrupt chunks are listed in the report, all of them.
///
/// # Errors
/// [`Error::Invalid`] for a checkpoint that is not a store: only a store has checksums. [`Error::Io`] and
/// [`Error::Truncated`] where a file cannot be read; [`Error::Cancelled`].
pub fn verify(store: &Checkpoint, options: &VerifyOptions) -> Result<VerifyReport> {
    let start = Instant::now();
    let Some((sums, identity)) = store.sums().zip(store.identity()) else {
        let (path, layout) = (store.path().display(), store.layout().name());
        return Err(Error::Invalid(format!("{path}: the {layout} layout has no checksums; only a store is verified")));
    };
    let chunks = Chunks::new(sums.chunk_len, store.files().iter().map(|file| file.len()));
    let corrupt = Mutex::new(Vec::new());
    let meter = options.control.meter(chunks.total_len());
    options.control.check()?;
    for_each(options.threads.unwrap_or(DEFAULT_THREADS), chunks.count(), CHUNK_LEN, |number, buffer| {
        let chunk = chunks.get(number);
        let file = &store.files()[chunk.file];
        let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc64Nvme);
        let mut done = 0;
        // A foreign writer may use chunks larger than a buffer.
        while done < chunk.len {
            let buf = buffer.get(CHUNK_LEN.min(chunk.len - done));
            file.read_exact_at(buf, chunk.offset + done)?;
            digest.update(buf);
            done += buf.len() as u64;
            meter.add(buf.len() as u64)?;
        }
        // The manifest has a checksum for every chunk: that was checked when it was opened.
        let expected = sums.get(chunk.file, chunk.number).unwrap_or_default();
        let found = digest.finalize();
        if found != expected {
            let fault = describe(store, chunk, expected, found);
            corrupt.lock().unwrap_or_else(|e| e.into_inner()).push((number, fault));
        }
        Ok(())
    })?;
    let mut corrupt = corrupt.into_inner().unwrap_or_else(|e| e.into_inner());
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

fn describe(store: &Checkpoint, chunk: Chunk, expected: u64, found: u64) -> CorruptChunk {
    let tensors = store.tensors();
    // Tensors are sorted by file and offset and do not overlap, so their ends are sorted too.
    let first = tensors.partition_point(|t| (t.file, t.offset + t.len) <= (chunk.file, chunk.offset));
    let inside = tensors[first..].iter().take_while(|t| (t.file, t.offset) < (chunk.file, chunk.offset + chunk.len));
    CorruptChunk {
        path: store.files()[chunk.file].path().to_owned(),
        chunk: chunk.number,
        offset: chunk.offset,
        len: chunk.len,
        expected,
        found,
        tensors: inside.filter(|t| t.len > 0).map(|t| t.name.clone()).collect(),
    }
}
