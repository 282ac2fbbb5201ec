//! Short work that several threads share.

use std::sync::{Mutex, PoisonError};

/// Processors that this process may use.
pub(crate) fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Does `work` for every item, in this thread and in as many more as make `threads`. Where no thread can be had, this one
/// does all.
pub(crate) fn share<I: Iterator + Send>(threads: usize, name: &str, items: I, work: impl Fn(I::Item) + Sync) {
    let items = Mutex::new(items);
    let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    let run = || {
        while let Some(item) = next() {
            work(item);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            let _ = std::thread::Builder::new().name(name.into()).spawn_scoped(scope, run);
        }
        run();
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_worked_once_by_however_many_threads() {
        for threads in [0, 1, 3, 40] {
            let mut items = [0; 20];
            share(threads, "test", items.iter_mut(), |item| *item += 1);
            assert_eq!(items, [1; 20]);
        }
    }
}
