//! Short work that several threads share.

use std::convert::Infallible;
use std::sync::{Mutex, PoisonError};
use std::thread::{Builder, Scope};

/// Processors that this process may use.
pub(crate) fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Does `work` for every item, in this thread and in as many more as make `threads`. Where no thread can be had, this one
/// does all.
pub(crate) fn share<I: Iterator + Send>(threads: usize, name: &str, items: I, work: impl Fn(I::Item) + Sync) {
    let Ok(()) = try_share::<_, _, Infallible>(
        threads,
        name,
        items,
        || (),
        |(), item| {
            work(item);
            Ok(())
        },
    );
}

/// The same of work that may fail, in threads that each have a `state`. After the first error, which is returned, no item
/// is begun.
pub(crate) fn try_share<I: Iterator + Send, S, E: Send>(
    threads: usize,
    name: &str,
    items: I,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, I::Item) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let shared = Mutex::new((items, Ok(())));
    let lock = || shared.lock().unwrap_or_else(PoisonError::into_inner);
    let next = || {
        let (items, result) = &mut *lock();
        if result.is_ok() { items.next() } else { None }
    };
    let run = || {
        let mut state = state();
        while let Some(item) = next() {
            if let Err(e) = work(&mut state, item) {
                let result = &mut lock().1;
                if result.is_ok() {
                    *result = Err(e);
                }
            }
        }
    };
    std::thread::scope(|scope| fan_out(scope, threads, name, &run));
    shared.into_inner().unwrap_or_else(PoisonError::into_inner).1
}

/// Runs `run` in this thread and in as many more as make `threads`, or in fewer where no more can be had. To start a thread
/// takes as long as short work: so each starts others before it begins.
fn fan_out<'s>(scope: &'s Scope<'s, '_>, threads: usize, name: &'s str, run: &'s (dyn Fn() + Sync)) {
    let mut left = threads.saturating_sub(1);
    while left > 0 {
        let theirs = left.div_ceil(2);
        let start = move || fan_out(scope, theirs, name, run);
        if Builder::new().name(name.into()).spawn_scoped(scope, start).is_err() {
            break;
        }
        left -= theirs;
    }
    run();
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn every_item_is_worked_once_by_however_many_threads() {
        for threads in [0, 1, 3, 40] {
            let mut items = [0; 20];
            share(threads, "test", items.iter_mut(), |item| *item += 1);
            assert_eq!(items, [1; 20]);
        }
    }

    #[test]
    fn the_first_error_stops_all() {
        for threads in [1, 2, 9] {
            let worked = AtomicU64::new(0);
            let result = try_share(
                threads,
                "test",
                0..1_000_000u64,
                || (),
                |(), number| {
                    worked.fetch_add(1, Ordering::Relaxed);
                    if number >= 10 { Err(number) } else { Ok(()) }
                },
            );
            assert!(result.is_err_and(|number| (10..20).contains(&number)));
            assert!((11..20).contains(&worked.into_inner()));
        }
    }

    #[test]
    fn each_thread_has_a_state_of_its_own() {
        let states = AtomicU64::new(0);
        let new = || (states.fetch_add(1, Ordering::Relaxed), 0u64);
        let sums = [const { AtomicU64::new(0) }; 3];
        let add = |(state, sum): &mut (u64, u64), number: u64| -> Result<(), Infallible> {
            *sum += number;
            sums[usize::try_from(*state).unwrap()].store(*sum, Ordering::Relaxed);
            Ok(())
        };
        try_share(3, "test", 0..1000, new, add).unwrap();
        assert_eq!(sums.map(AtomicU64::into_inner).iter().sum::<u64>(), 499_500);
    }
}
