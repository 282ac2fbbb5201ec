//! The link to a device: the most that it carries, measured once and remembered in the user's cache directory.
//!
//! A figure is never guessed. It is measured with the code that loads copy by, and kept under the card, its place and
//! the host's boot: another of these is another link.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use super::{Block, Device, Parcel, copy};
use crate::control::gb_per_s;
use crate::error::{Error, Result};
use crate::plan::PieceCopy;
use crate::pool::BufferPool;
use crate::read::Filled;
use crate::small_file::read_small_file;

/// Bytes of the pinned buffer that is copied.
const BUFFER_LEN: usize = 64 << 20;
/// Bytes of one copy: from here on longer ones are hardly faster (`docs/benchmarks.md`).
const COPY_LEN: u64 = 16 << 20;
/// Copies of one pass, back to back. So many that waiting for the last of them does not count.
const COPIES: u64 = 16;
/// Passes: the best counts, and after this time no further one begins.
const PASSES: usize = 5;
const PASSES_TIME: Duration = Duration::from_millis(40);

/// How often it is measured where it came out lower than what was seen, and how long to wait for whoever else uses the
/// link, such as the driver after a large allocation was freed.
const ATTEMPTS: usize = 3;
const PAUSE: Duration = Duration::from_millis(50);

/// How old a remembered figure may be, in seconds: a link may be trained anew without a restart.
const MAX_AGE: u64 = 30 * 24 * 3600;
/// Links that are remembered, the newest ones: a home directory may serve many hosts.
const MAX_LINKS: usize = 64;
/// Bytes of the file of links at most; more is not ours.
const MAX_FILE_LEN: u64 = 1 << 20;
const VERSION: u32 = 1;

/// The most that a device's link carries from pinned host memory.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LinkPeak {
    /// 1e9 bytes a second.
    pub gb_per_s: f64,
    /// When it was measured, in seconds since 1970.
    pub measured_at: u64,
}

/// The file of links.
#[derive(Serialize, Deserialize)]
struct Links {
    version: u32,
    /// By card, place and boot.
    links: BTreeMap<String, LinkPeak>,
}

impl Device {
    /// The peak of its link, remembered in the user's cache directory (`$XDG_CACHE_HOME`, else `~/.cache`; there
    /// `sllm/links.json`), else measured, which takes some 30 ms and 80 MiB; `None` for the host, which has no link.
    ///
    /// `seen` is what the caller saw it carry, in GB/s: a lower peak was measured while others used the link, and is
    /// measured anew, up to three times. Where it stays lower, `seen` is the peak.
    pub fn link_peak(&self, seen: f64) -> Result<Option<LinkPeak>> {
        match links_file() {
            Some(file) => LinkPeak::remembered(self, seen, &file),
            None => Ok(LinkPeak::measure_beside(self, seen)?.map(|peak| peak.at_least(seen))),
        }
    }
}

impl LinkPeak {
    /// Measures it now. `None` for the host.
    pub fn measure(device: &Device) -> Result<Option<LinkPeak>> {
        if device.0.link()?.is_none() {
            return Ok(None);
        }
        let pool = BufferPool::new(BUFFER_LEN, 1, BUFFER_LEN, Some(device))?;
        let mut buffer = pool.try_acquire();
        if let Some(why) = pool.refusal() {
            let why =
                format!("the link of {} is not measured: {BUFFER_LEN} bytes cannot be pinned: {why}", device.id());
            return Err(Error::Invalid(why));
        }
        let streams = [device.stream()?];
        let blocks: Arc<[Block]> = vec![Block::alloc(device, COPY_LEN)?].into();
        let copies: Vec<PieceCopy> = (0..COPIES)
            .map(|i| PieceCopy {
                src_offset: i * COPY_LEN % BUFFER_LEN as u64,
                row_len: COPY_LEN,
                rows: 1,
                src_pitch: COPY_LEN,
                block: 0,
                dst_offset: 0,
                dst_pitch: COPY_LEN,
            })
            .collect();
        let (started, mut best) = (Instant::now(), 0.0_f64);
        for pass in 0..PASSES {
            let Some(source) = buffer.take().filter(|_| pass == 0 || started.elapsed() < PASSES_TIME) else { break };
            let now = Instant::now();
            let parcel = Parcel { source: Filled::Buffer(source), copies: &copies, part: None };
            let source = copy(&streams, &blocks, vec![parcel])?.wait(0)?;
            best = best.max(gb_per_s(COPIES * COPY_LEN, now.elapsed().as_secs_f64()));
            if let Some(Filled::Buffer(source)) = source {
                buffer = Some(source);
            }
        }
        // What a file of decimal figures gives back as it was.
        Ok(Some(LinkPeak { gb_per_s: (best * 1000.0).round() / 1000.0, measured_at: now() }))
    }

    /// What this file remembers of the device's link, as [`Device::link_peak`]. A file that cannot be read, is not of
    /// this form, or says nothing of this link or something too old, is written anew; where it cannot be written,
    /// nothing is remembered.
    pub fn remembered(device: &Device, seen: f64, file: &Path) -> Result<Option<LinkPeak>> {
        let Some(link) = device.0.link()? else { return Ok(None) };
        let key = boot().map(|boot| format!("{link} {boot}"));
        let mut links = read(file);
        links.retain(|_, peak| peak.is_sound());
        let known = key.as_ref().and_then(|key| links.get(key)).filter(|peak| peak.gb_per_s >= seen);
        if let Some(&peak) = known {
            return Ok(Some(peak));
        }
        let peak = LinkPeak::measure_beside(device, seen)?;
        if let (Some(key), Some(peak)) = (key, peak) {
            links.insert(key, peak);
            while links.len() > MAX_LINKS {
                let oldest = links.iter().min_by_key(|(_, peak)| peak.measured_at).map(|(key, _)| key.clone());
                links.remove(&oldest.unwrap_or_default());
            }
            write(file, Links { version: VERSION, links });
        }
        Ok(peak.map(|peak| peak.at_least(seen)))
    }

    /// Measures it again where it comes out lower than what was seen.
    fn measure_beside(device: &Device, seen: f64) -> Result<Option<LinkPeak>> {
        let mut peak = LinkPeak::measure(device)?;
        for _ in 1..ATTEMPTS {
            let Some(best) = peak.as_mut().filter(|best| best.gb_per_s < seen) else { break };
            thread::sleep(PAUSE);
            let again = LinkPeak::measure(device)?;
            best.gb_per_s = again.map_or(0.0, |again| again.gb_per_s).max(best.gb_per_s);
        }
        Ok(peak)
    }

    /// What the link carried, it can carry. That is not remembered: it may be of more than one link.
    fn at_least(self, seen: f64) -> LinkPeak {
        let seen = if seen.is_finite() { seen } else { 0.0 };
        LinkPeak { gb_per_s: self.gb_per_s.max(seen), ..self }
    }

    /// The day on which it was measured, by UTC: `2026-11-25`.
    pub fn date(&self) -> String {
        let (year, month, day) = civil(self.measured_at / 86_400);
        format!("{year:04}-{month:02}-{day:02}")
    }

    /// Whether it is a rate, measured lately.
    fn is_sound(&self) -> bool {
        let now = now();
        let age = now.checked_sub(self.measured_at);
        self.gb_per_s.is_finite() && self.gb_per_s > 0.0 && age.is_some_and(|age| age <= MAX_AGE)
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Year, month and day of a day since 1970-01-01, in the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // The calendar repeats after 400 years of 146,097 days.
    let (mut year, mut day) = (1970 + days / 146_097 * 400, days % 146_097);
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let mut month = 1;
    for len in [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < len {
            break;
        }
        day -= len;
        month += 1;
    }
    (year, month, day + 1)
}

/// `sllm/links.json` in the user's cache directory; `None` where the environment names none.
fn links_file() -> Option<PathBuf> {
    let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(cache.join("sllm/links.json"))
}

/// What tells this host, since it was started, from others.
fn boot() -> Option<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").or_else(|_| fs::read_to_string("/etc/machine-id"));
    id.ok().map(|id| id.trim().to_owned()).filter(|id| !id.is_empty())
}

/// The links of a file; none where it is not as written.
fn read(file: &Path) -> BTreeMap<String, LinkPeak> {
    let text = read_small_file(file, MAX_FILE_LEN).ok();
    let links = text.and_then(|text| serde_json::from_str::<Links>(&text).ok());
    links.filter(|links| links.version == VERSION).map(|links| links.links).unwrap_or_default()
}

/// Puts a new file in the place of the old one. A cache that cannot be written costs only the next measuring.
fn write(file: &Path, links: Links) {
    let beside = file.with_extension(format!("json.{}", std::process::id()));
    let written = || -> std::io::Result<()> {
        fs::create_dir_all(file.parent().unwrap_or(Path::new("/")))?;
        fs::write(&beside, serde_json::to_vec(&links)?)?;
        fs::rename(&beside, file)
    };
    if written().is_err() {
        let _ = fs::remove_file(&beside);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_have_their_dates() {
        // As `date -u -d @SECONDS +%F` has them.
        for (seconds, date) in [
            (0, "1970-01-01"),
            (951_782_400, "2000-02-29"),
            (951_868_800, "2000-03-01"),
            (1_704_067_199, "2023-12-31"),
            (1_795_564_800, "2026-11-25"),
            (4_107_542_400, "2100-03-01"),
            (13_574_563_200, "2400-02-29"),
        ] {
            assert_eq!(LinkPeak { gb_per_s: 1.0, measured_at: seconds }.date(), date);
        }
    }

    #[test]
    fn the_host_has_no_link() {
        let file = tempfile::tempdir().unwrap().path().join("links.json");
        assert_eq!(LinkPeak::remembered(&Device::host(), 0.0, &file).unwrap(), None);
        assert_eq!(LinkPeak::measure(&Device::host()).unwrap(), None);
        assert!(!file.exists());
    }
}
