//! How many reads of a disk to keep in flight, found out while reading.
//!
//! A local disk that answers in a tenth of a millisecond, a volume behind a network, and a virtual disk whose host copies
//! every byte want different numbers: the last one is slower the more memory is read into at once
//! (`docs/benchmarks.md`, "Disk"), the others idle with few. So a share begins with some, tries more and fewer in turn with
//! them, since a disk's rate moves by itself too, goes where it is faster, and tries again now and then.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Reads in flight that are tried.
const LEVELS: [usize; 5] = [2, 4, 8, 16, 32];
/// The most that are tried.
pub const MOST_READS: usize = LEVELS[LEVELS.len() - 1];
/// The level that a load begins with.
const FIRST: usize = 1;
/// A level is left only for one that is so much faster in the mean of all rounds: rates of the same level differ too.
const BETTER: f64 = 1.05;
/// A level that is so much faster, or slower, after any round is judged at once.
const SURE: f64 = 1.25;
/// Rounds of a trial: in each, the home level and its rivals are measured once.
const ROUNDS: usize = 4;
/// A level is measured so long at least, and by so many reads; the first trials are shorter, since a fast disk is read to
/// its end in half a second.
const WINDOW: Window = Window { time: Duration::from_millis(30), reads: 48 };
const FIRST_WINDOW: Window = Window { time: Duration::from_millis(10), reads: 24 };
/// A pause in which nothing was read is counted up to this; after a longer one the window begins anew.
const PAUSE: Duration = Duration::from_millis(10);
/// Windows between two trials; twice as many after each that changed nothing, up to the most.
const HOLD: usize = 40;
const MOST_HOLD: usize = 160;

struct Window {
    time: Duration,
    reads: usize,
}

/// The reads in flight that the lanes of a share may have, all together.
#[derive(Debug)]
pub(crate) struct Depth {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    climb: Climb,
    /// Of lanes that read in the order of their tickets: those that read, and the tickets of those that wait.
    reading: usize,
    waiting: BTreeMap<u64, Arc<Condvar>>,
    /// When the last of them ended.
    rested: Instant,
    /// Reads that were begun before the level was changed, whose ends say nothing of it.
    unsettled: usize,
    /// Of the window: its start, its reads and their bytes.
    since: Instant,
    reads: usize,
    bytes: u64,
}

impl Default for Depth {
    fn default() -> Depth {
        let state = State {
            climb: Climb::default(),
            reading: 0,
            waiting: BTreeMap::new(),
            rested: Instant::now(),
            unsettled: 0,
            since: Instant::now(),
            reads: 0,
            bytes: 0,
        };
        Depth { state: Mutex::new(state), changed: Condvar::new() }
    }
}

impl Depth {
    /// Reading begins, maybe again after other work: what was measured last is not of these reads.
    pub(crate) fn begin(&self) {
        self.lock().begin();
    }

    /// The reads that all lanes may have in flight.
    pub(crate) fn reads(&self) -> usize {
        self.lock().climb.reads()
    }

    /// Waits until as few read as the disk wants, and no ticket that waits is older, for so long.
    pub(crate) fn enter(&self, ticket: u64, limit: Duration) -> bool {
        let mut state = self.lock();
        if !state.may_enter(ticket) {
            let turn = Arc::new(Condvar::new());
            state.waiting.insert(ticket, Arc::clone(&turn));
            let waited = turn.wait_timeout_while(state, limit, |state| !state.may_enter(ticket));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let enters = state.may_enter(ticket);
        state.waiting.remove(&ticket);
        if enters {
            if state.reading == 0 && state.rested.elapsed() > PAUSE {
                state.begin();
            }
            state.reading += 1;
        }
        state.call_oldest();
        enters
    }

    /// Ends a read that was entered, of so many bytes.
    pub(crate) fn leave(&self, len: u64) {
        let mut state = self.lock();
        state.reading = state.reading.saturating_sub(1);
        state.rested = Instant::now();
        drop(state);
        self.done(len);
        self.lock().call_oldest();
    }

    /// Whether lane `number` of those that have one read in flight at most may read. Waits for that as long as this, or
    /// until it is over.
    pub(crate) fn wait(&self, number: usize, limit: Duration, over: &AtomicBool) -> bool {
        let waits = |state: &mut State| number >= state.climb.reads() && !over.load(Ordering::Relaxed);
        let waited = self.changed.wait_timeout_while(self.lock(), limit, waits);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        number < state.climb.reads()
    }

    /// Sets `over`, and wakes lanes that wait.
    pub(crate) fn end(&self, over: &AtomicBool) {
        // Under the lock: a lane that is about to wait would not be woken.
        let state = self.lock();
        over.store(true, Ordering::Relaxed);
        drop(state);
        self.changed.notify_all();
    }

    /// Counts a read that is done.
    pub(crate) fn done(&self, len: u64) {
        let mut state = self.lock();
        if state.unsettled > 0 {
            state.unsettled -= 1;
            state.since = Instant::now();
            return;
        }
        state.reads += 1;
        state.bytes = state.bytes.saturating_add(len);
        let elapsed = state.since.elapsed();
        let window = if state.climb.has_settled { WINDOW } else { FIRST_WINDOW };
        if state.reads < window.reads || elapsed < window.time {
            return;
        }
        let before = state.climb.reads();
        let rate = state.bytes as f64 / elapsed.as_secs_f64();
        state.climb.measured(rate);
        (state.reads, state.bytes, state.since) = (0, 0, Instant::now());
        if state.climb.reads() != before {
            state.unsettled = before.max(state.climb.reads());
            state.call_oldest();
            drop(state);
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether one more may read, and none that waits is older.
    fn may_enter(&self, ticket: u64) -> bool {
        let is_oldest = self.waiting.first_key_value().is_none_or(|(&oldest, _)| oldest >= ticket);
        is_oldest && self.reading < self.climb.reads()
    }

    /// Wakes the one whose turn it is, and no other: there may be many.
    fn call_oldest(&self) {
        if let Some((&oldest, turn)) = self.waiting.first_key_value()
            && self.may_enter(oldest)
        {
            turn.notify_one();
        }
    }

    fn begin(&mut self) {
        self.unsettled = self.climb.reads();
        (self.reads, self.bytes) = (0, 0);
    }
}

/// Which level to read at, by the rates of those that were tried.
#[derive(Debug)]
struct Climb {
    home: usize,
    /// The levels beside it that may be better, of this trial.
    rivals: Vec<Rival>,
    /// The home level's rate in this round, once it was measured.
    rate: Option<f64>,
    /// The rival that is measured next.
    next: usize,
    rounds: usize,
    /// Windows until the next trial, and how many there are after a trial that changes nothing.
    hold: usize,
    next_hold: usize,
    /// A trial ended where it began.
    has_settled: bool,
}

#[derive(Debug)]
struct Rival {
    level: usize,
    /// Its rates, each as a part of the home level's of the same round, added up.
    sum: f64,
}

impl Default for Climb {
    fn default() -> Climb {
        let rivals = Climb::rivals([Some(FIRST + 1), FIRST.checked_sub(1)]);
        Climb { home: FIRST, rivals, rate: None, next: 0, rounds: 0, hold: 0, next_hold: HOLD, has_settled: false }
    }
}

impl Climb {
    fn rivals(levels: [Option<usize>; 2]) -> Vec<Rival> {
        let levels = levels.into_iter().flatten().filter(|&level| level < LEVELS.len());
        levels.map(|level| Rival { level, sum: 0.0 }).collect()
    }

    /// Reads in flight now.
    fn reads(&self) -> usize {
        let rival = self.rivals.get(self.next).filter(|_| self.rate.is_some());
        LEVELS[rival.map_or(self.home, |rival| rival.level)]
    }

    /// Takes the rate of the present level.
    fn measured(&mut self, rate: f64) {
        if self.hold > 0 {
            self.hold -= 1;
            return;
        }
        let Some(home) = self.rate else {
            self.rate = Some(rate);
            return;
        };
        if let Some(rival) = self.rivals.get_mut(self.next) {
            rival.sum += rate / home;
        }
        self.next += 1;
        if self.next >= self.rivals.len() {
            self.judge();
        }
    }

    /// Ends a round.
    fn judge(&mut self) {
        (self.rate, self.next) = (None, 0);
        self.rounds += 1;
        let (rounds, is_last) = (self.rounds as f64, self.rounds == ROUNDS);
        let wanted = if is_last { BETTER } else { SURE };
        let best = self.rivals.iter().max_by(|a, b| a.sum.total_cmp(&b.sum));
        match best.filter(|best| best.sum > wanted * rounds).map(|best| best.level) {
            Some(better) => {
                // From there further on: what lies behind was worse just now.
                let onward = if better > self.home { better.checked_add(1) } else { better.checked_sub(1) };
                (self.home, self.next_hold) = (better, HOLD);
                self.begin([onward, None]);
            }
            None => {
                self.rivals.retain(|rival| rival.sum * SURE >= rounds);
                if is_last || self.rivals.is_empty() {
                    self.settle();
                }
            }
        }
    }

    /// Begins a trial of these levels.
    fn begin(&mut self, levels: [Option<usize>; 2]) {
        (self.rivals, self.rounds) = (Climb::rivals(levels), 0);
        if self.rivals.is_empty() {
            self.settle();
        }
    }

    /// Stays for some time, and tries both neighbours then.
    fn settle(&mut self) {
        self.has_settled = true;
        self.hold = self.next_hold;
        self.next_hold = (2 * self.next_hold).min(MOST_HOLD);
        (self.rivals, self.rounds) = (Climb::rivals([Some(self.home + 1), self.home.checked_sub(1)]), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads in flight after so many windows over a disk of these rates.
    fn settles(windows: usize, rate: impl Fn(usize) -> f64) -> usize {
        let mut climb = Climb::default();
        for _ in 0..windows {
            climb.measured(rate(climb.reads()));
        }
        LEVELS[climb.home]
    }

    #[test]
    fn it_goes_where_a_disk_is_fastest() {
        assert_eq!(settles(9, |reads| reads as f64), 32, "a disk far away");
        assert_eq!(settles(20, |reads| (reads as f64).min(16.0)), 16, "enough is enough");
        assert_eq!(settles(9, |reads| 1.0 / reads as f64), 2, "a disk that wants few");
        assert_eq!(settles(9, |_| 1.0), 4, "one that does not care");
        assert_eq!(settles(500, |reads| 1.0 + reads as f64 / 1000.0), 4, "or hardly");
    }

    #[test]
    fn it_tries_again_when_a_disk_has_changed() {
        let mut climb = Climb::default();
        for _ in 0..9 {
            climb.measured(climb.reads() as f64);
        }
        assert_eq!(climb.reads(), 32);
        for _ in 0..2 * HOLD {
            climb.measured(1.0 / climb.reads() as f64);
        }
        assert_eq!(LEVELS[climb.home], 2);
    }

    #[test]
    fn most_windows_are_read_at_the_level_that_was_found() {
        let mut climb = Climb::default();
        let mut elsewhere = 0;
        for _ in 0..1000 {
            elsewhere += usize::from(climb.reads() != 4);
            climb.measured(1.0);
        }
        assert!(elsewhere <= 2 * ROUNDS * (2 + 1000usize.div_ceil(MOST_HOLD)), "{elsewhere} of 1000");
    }

    #[test]
    fn a_disk_whose_rate_moves_by_itself_is_read_well() {
        // Windows of the same level differ by up to 20 % either way.
        let mut random = 1u64;
        let mut moves = || {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            0.8 + 0.4 * (random >> 11) as f64 / (1u64 << 53) as f64
        };
        for best in [2.0, 4.0, 8.0, 16.0, 32.0] {
            let rate = |reads: usize| 0.85f64.powf((reads as f64 / best).log2().abs());
            let (mut climb, mut sum) = (Climb::default(), 0.0);
            for _ in 0..1000 {
                sum += rate(climb.reads());
                climb.measured(rate(climb.reads()) * moves());
            }
            assert!(sum > 930.0, "the best is {best}: {sum} of 1000");
        }
    }

    #[test]
    fn lanes_beyond_the_level_wait_until_it_is_over() {
        let depth = Depth::default();
        let (over, moment) = (AtomicBool::new(false), Duration::from_millis(1));
        assert_eq!((depth.wait(3, Duration::MAX, &over), depth.wait(4, moment, &over)), (true, false));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| depth.wait(9, Duration::from_secs(600), &over));
            depth.end(&over);
            assert!(!waits.join().unwrap());
        });
    }

    #[test]
    fn as_many_read_at_once_as_the_disk_wants_the_oldest_first() {
        let (depth, moment) = (Depth::default(), Duration::from_millis(1));
        for ticket in 0..4 {
            assert!(depth.enter(ticket, Duration::MAX));
        }
        assert!(!depth.enter(0, moment), "four read");
        let order = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for ticket in [9, 7, 8] {
                let (depth, order) = (&depth, &order);
                scope.spawn(move || {
                    assert!(depth.enter(ticket, Duration::from_secs(600)));
                    order.lock().unwrap().push(ticket);
                    depth.leave(1);
                });
            }
            while depth.lock().waiting.len() < 3 {
                std::thread::yield_now();
            }
            depth.leave(1);
        });
        assert_eq!(*order.lock().unwrap(), [7, 8, 9]);
        assert!(depth.lock().waiting.is_empty(), "who has given up waits no more");
    }

    #[test]
    fn short_pauses_between_reads_do_not_keep_the_level_from_moving() {
        let depth = Depth::default();
        let (start, mut ticket) = (Instant::now(), 0);
        while depth.reads() == LEVELS[FIRST] && start.elapsed() < Duration::from_secs(60) {
            assert!(depth.enter(ticket, Duration::MAX));
            depth.leave(1 << 20);
            ticket += 1;
        }
        assert_eq!(depth.reads(), LEVELS[FIRST + 1], "one read at a time, each over before the next");
    }

    #[test]
    fn reads_move_the_level() {
        let depth = Depth::default();
        depth.begin();
        let (start, mut seen) = (Instant::now(), vec![depth.reads()]);
        while seen.len() < 3 && start.elapsed() < Duration::from_secs(60) {
            depth.done(1 << 20);
            let reads = depth.reads();
            if Some(&reads) != seen.last() {
                seen.push(reads);
            }
        }
        assert_eq!(seen[..2], [4, 8], "the first trial is of more");
    }
}
