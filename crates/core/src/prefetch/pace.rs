//! Reading that gives way: it pauses while others read from the disks.
//!
//! A process that starts reads thousands of small files one after the other; behind a stream of large reads each of
//! them waits. So the disks' own counters are looked at ten times a second, and what was not ours was others'.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often the counters are looked at.
const TICK: Duration = Duration::from_millis(100);
/// Bytes a second of others that count as reading: less is noise.
const BUSY: f64 = 32e6;
/// While paused nothing is ours, so that less is enough to say that others are done.
const QUIET: f64 = 8e6;
/// The longest pause, so that a host where somebody always reads does not stop us, and the least time between two.
const LONGEST: Duration = Duration::from_secs(2);
const SHORTEST: Duration = Duration::from_millis(300);

/// Bytes that all disks have read; `None` where that is not known.
type Counter = fn() -> Option<u64>;

/// When to read. Shared by the threads that read.
#[derive(Debug)]
pub(super) struct Pace {
    counter: Counter,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    at: Instant,
    disks: Option<u64>,
    ours: u64,
    /// When the present pause or the present time of reading began.
    since: Instant,
    paused: bool,
    waited: Duration,
}

impl Pace {
    /// Without `yields` it never pauses.
    pub(super) fn new(yields: bool) -> Pace {
        Pace::by(if yields { disks_read } else { || None })
    }

    fn by(counter: Counter) -> Pace {
        let now = Instant::now();
        let state = State { at: now, disks: counter(), ours: 0, since: now, paused: false, waited: Duration::ZERO };
        Pace { counter, state: Mutex::new(state) }
    }

    /// Whether to read now, given all bytes that we have read from disks so far.
    pub(super) fn may_read(&self, ours: u64) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if now.duration_since(state.at) >= TICK {
            state.look(now, (self.counter)(), ours);
        }
        !state.paused
    }

    /// Time in which it was paused.
    pub(super) fn waited(&self) -> Duration {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.waited + if state.paused { state.since.elapsed() } else { Duration::ZERO }
    }
}

impl State {
    fn look(&mut self, now: Instant, disks: Option<u64>, ours: u64) {
        let seconds = now.duration_since(self.at).as_secs_f64();
        let mine = ours.saturating_sub(self.ours);
        let all = disks.zip(self.disks).map_or(0, |(now, before)| now.saturating_sub(before));
        (self.at, self.disks, self.ours) = (now, disks, ours);
        let rate = |bytes: u64| bytes as f64 / seconds;
        let others = rate(all.saturating_sub(mine));
        let lasted = now.duration_since(self.since);
        if self.paused {
            if others < QUIET || lasted >= LONGEST {
                self.waited += lasted;
                (self.paused, self.since) = (false, now);
            }
        // What was read ahead for us, or is still under way, is up to a tenth of what we read.
        } else if others > BUSY + rate(mine) / 10.0 && lasted >= SHORTEST {
            (self.paused, self.since) = (true, now);
        }
    }
}

/// Bytes that this system's disks have read.
fn disks_read() -> Option<u64> {
    let text = fs::read_to_string("/proc/diskstats").ok()?;
    sectors_read(&text, |name| Path::new("/sys/block").join(name).exists())?.checked_mul(512)
}

/// Names of disks that lie on others begin so.
const STACKED: [&str; 8] = ["loop", "ram", "zram", "dm-", "md", "bcache", "drbd", "zd"];

/// Sectors read of all whole disks (`is_disk`; not partitions), without those that lie on others.
fn sectors_read(diskstats: &str, is_disk: impl Fn(&str) -> bool) -> Option<u64> {
    // Of each disk, its own and those of its paths.
    let mut disks: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for line in diskstats.lines() {
        let mut fields = line.split_whitespace().skip(2);
        let (Some(name), Some(sectors)) = (fields.next(), fields.nth(2).and_then(|n| n.parse::<u64>().ok())) else {
            continue;
        };
        let stacked = STACKED.iter().any(|prefix| name.starts_with(prefix));
        if !stacked && is_disk(name) {
            let path = disk_of_path(name);
            let (own, paths) = disks.entry(path.clone().unwrap_or_else(|| name.to_owned())).or_default();
            let count = if path.is_some() { paths } else { own };
            *count = count.saturating_add(sectors);
        }
    }
    // Newer kernels count a read of a disk with several paths for both, older ones for the path alone.
    let all = disks.values().map(|&(own, paths)| own.max(paths));
    (!disks.is_empty()).then(|| all.fold(0, u64::saturating_add))
}

/// The disk that a path of NVMe leads to: `nvme0n1`, of `nvme0c3n1`.
fn disk_of_path(name: &str) -> Option<String> {
    let (subsystem, rest) = name.strip_prefix("nvme")?.split_once('c')?;
    let (controller, number) = rest.split_once('n')?;
    let are_numbers = [subsystem, controller, number].iter().all(|part| part.parse::<u32>().is_ok());
    are_numbers.then(|| format!("nvme{subsystem}n{number}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_of_whole_disks_count_once() {
        let text = " 254 0 vda 12 3 1000 5 0 0 0 0 0 0 0\n 254 1 vda1 12 3 900 5 0 0 0 0 0 0 0\n\
                    7 0 loop0 1 1 50 1 0 0 0 0\n 253 0 dm-0 5 5 700 5 0 0 0\n 259 0 nvme0n1 1 1 24 1\n short\n";
        assert_eq!(sectors_read(text, |name| !name.ends_with("vda1")), Some(1024));
        assert_eq!(sectors_read("", |_| true), None);
    }

    #[test]
    fn sectors_of_a_disk_with_several_paths_count_once() {
        let sectors = |disks: &[(&str, u64)]| {
            let lines = disks.iter().map(|(name, sectors)| format!(" 259 0 {name} 1 1 {sectors} 1 0 0\n"));
            sectors_read(&lines.collect::<String>(), |_| true)
        };
        assert_eq!(sectors(&[("nvme0c0n1", 24), ("nvme0n1", 24)]), Some(24));
        assert_eq!(sectors(&[("nvme0n1", 24), ("nvme0c0n1", 10), ("nvme0c1n1", 14)]), Some(24));
        assert_eq!(sectors(&[("nvme0n1", 0), ("nvme0c0n1", 24)]), Some(24), "a kernel that counts for the path");
        assert_eq!(sectors(&[("nvme0n1", 24), ("nvme0n2", 3), ("nvme1n1", 4), ("nvme1c1n1", 4)]), Some(31));
        assert_eq!(sectors(&[("sda", 5), ("nvmec", 6), ("bcache0", 5)]), Some(11));
    }

    fn state() -> State {
        let now = Instant::now();
        State { at: now, disks: Some(0), ours: 0, since: now, paused: false, waited: Duration::ZERO }
    }

    /// One look after `ms`: what all disks and what we have read since, in MB.
    fn look(state: &mut State, ms: u64, all: u64, mine: u64) -> bool {
        let (disks, ours) = (state.disks.map(|disks| disks + all * 1_000_000), state.ours + mine * 1_000_000);
        state.look(state.at + Duration::from_millis(ms), disks, ours);
        state.paused
    }

    #[test]
    fn it_pauses_while_others_read_and_goes_on_when_they_are_done() {
        let mut state = state();
        for _ in 0..5 {
            assert!(!look(&mut state, 100, 105, 100), "a little more than ours is ours, read ahead");
        }
        assert!(look(&mut state, 100, 120, 100), "200 MB/s of others");
        assert!(look(&mut state, 100, 2, 0), "20 MB/s: they are not done");
        assert!(!look(&mut state, 100, 0, 0));
        assert_eq!(state.waited, Duration::from_millis(200));
    }

    #[test]
    fn a_host_where_somebody_always_reads_does_not_stop_it() {
        let mut state = state();
        let mut reading = 0;
        for _ in 0..100 {
            let mine = if state.paused { 0 } else { 50 };
            reading += u32::from(!look(&mut state, 100, 50 + mine, mine));
        }
        assert!((10..30).contains(&reading), "{reading} of 100 looks");
    }

    #[test]
    fn without_counters_it_never_pauses() {
        let mut state = state();
        for _ in 0..10 {
            state.look(state.at + Duration::from_millis(100), None, 0);
            assert!(!state.paused);
        }
    }
}
