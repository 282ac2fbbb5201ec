//! Filled pieces on their way to the links, in batches, by the rules of the loader's own `load/outbox.rs`.

use std::collections::VecDeque;

use sllm_core::tuning::BUSY;

use crate::resource::Serial;

/// What the lanes of one process send copies by.
#[derive(Debug, Clone)]
pub(crate) struct Outbox {
    /// Pieces of a batch at most.
    most: usize,
    /// Batches that keep its links busy.
    busy: usize,
    /// All batches; pieces are added to the last one, which is open.
    batches: Vec<Batch>,
    /// Those that a link may still be busy with, oldest first.
    issued: VecDeque<usize>,
}

#[derive(Debug, Clone, Default)]
struct Batch {
    pieces: usize,
    /// Link and bytes of each copy.
    copies: Vec<(usize, u64)>,
    /// When the last of its copies is done, once they are issued.
    end: Option<f64>,
    /// Lanes that wait for the one that issues it.
    waiting: Vec<usize>,
}

impl Outbox {
    pub(crate) fn new(most: usize, links: usize) -> Outbox {
        Outbox { most, busy: BUSY * links, batches: vec![Batch::default()], issued: VecDeque::new() }
    }

    fn open(&self) -> usize {
        self.batches.len() - 1
    }

    /// Adds a piece's copies to the open batch, whose number it gives.
    pub(crate) fn send(&mut self, copies: impl Iterator<Item = (usize, u64)>) -> usize {
        let open = self.open();
        self.batches[open].pieces += 1;
        self.batches[open].copies.extend(copies);
        open
    }

    /// Whether the open batch, to which a piece was added, is to be issued.
    pub(crate) fn is_due(&mut self, now: f64) -> bool {
        self.batches[self.open()].pieces >= self.most || self.is_idle(now)
    }

    /// Whether a lane that asks if this batch is done has to issue it.
    pub(crate) fn is_overdue(&mut self, batch: usize, now: f64) -> bool {
        self.is_open(batch) && self.is_idle(now)
    }

    pub(crate) fn is_open(&self, batch: usize) -> bool {
        batch == self.open()
    }

    /// Takes the open batch to be issued: its number, and how many copies it is. The next one is open.
    pub(crate) fn take(&mut self) -> (usize, usize) {
        let open = self.open();
        self.issued.push_back(open);
        self.batches.push(Batch::default());
        (open, self.batches[open].copies.len())
    }

    /// The copies that were taken come to their links, each link's as one. Gives the end of all, and who waits for it.
    pub(crate) fn issue(&mut self, batch: usize, now: f64, links: &mut [Serial]) -> (f64, Vec<usize>) {
        let Batch { copies, end, waiting, .. } = &mut self.batches[batch];
        let mut last = now;
        for (place, link) in links.iter_mut().enumerate() {
            let bytes: u64 = copies.iter().filter(|(device, _)| *device == place).map(|(_, len)| len).sum();
            if bytes > 0 {
                last = last.max(link.push(now, bytes as f64));
            }
        }
        *end = Some(last);
        (last, std::mem::take(waiting))
    }

    /// When a batch is done, once it is issued.
    pub(crate) fn end(&self, batch: usize) -> Option<f64> {
        self.batches[batch].end
    }

    pub(crate) fn is_done(&self, batch: usize, now: f64) -> bool {
        self.end(batch).is_some_and(|end| end <= now)
    }

    /// A lane waits for a batch that another one issues.
    pub(crate) fn wait(&mut self, batch: usize, lane: usize) {
        self.batches[batch].waiting.push(lane);
    }

    /// Whether a link may run out of work.
    fn is_idle(&mut self, now: f64) -> bool {
        while self.issued.front().is_some_and(|&batch| self.is_done(batch, now)) {
            self.issued.pop_front();
        }
        self.issued.len() < self.busy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends pieces of 10 bytes to link 0 at the same time; the numbers of those after which a batch was due.
    fn due(outbox: &mut Outbox, pieces: usize, now: f64, links: &mut [Serial]) -> Vec<usize> {
        let mut due = Vec::new();
        for number in 1..=pieces {
            outbox.send([(0, 10)].into_iter());
            if outbox.is_due(now) {
                let (batch, _) = outbox.take();
                outbox.issue(batch, now, links);
                due.push(number);
            }
        }
        due
    }

    #[test]
    fn pieces_go_at_once_to_a_link_with_little_to_do_and_else_as_many_together_as_may() {
        let mut links = [Serial::new(10.0, 0.5)];
        let mut outbox = Outbox::new(4, 1);
        assert_eq!(due(&mut outbox, 11, 0.0, &mut links), [1, 2, 6, 10]);
        // One rest a batch: 1.5, 1.5 and twice 4.5 s; the eleventh waits.
        assert_eq!([0, 1, 2, 3, 4].map(|batch| outbox.end(batch)), [Some(1.5), Some(3.0), Some(7.5), Some(12.0), None]);
        assert!(!outbox.is_overdue(4, 7.4));
        assert!(outbox.is_overdue(4, 7.5), "one batch is left, so that whoever asks for the open one issues it");
        assert!(!outbox.is_overdue(3, 7.5), "this one was issued");
        assert_eq!(outbox.take(), (4, 1));
    }

    #[test]
    fn a_batch_of_one_piece_is_due_at_once() {
        let mut outbox = Outbox::new(1, 1);
        assert_eq!(due(&mut outbox, 5, 0.0, &mut [Serial::new(10.0, 0.5)]), [1, 2, 3, 4, 5]);
        assert_eq!(outbox.end(4), Some(5.0 * 1.5));
    }

    #[test]
    fn every_link_may_have_its_batches_and_a_batch_ends_with_the_last_of_its_links() {
        let mut links = [Serial::new(10.0, 0.0), Serial::new(10.0, 0.0)];
        let mut outbox = Outbox::new(4, 2);
        assert_eq!(due(&mut outbox, 9, 0.0, &mut links), [1, 2, 3, 4, 8]);
        let batch = outbox.send([(1, 40), (1, 60), (0, 10)].into_iter());
        assert_eq!(outbox.take(), (batch, 4));
        outbox.wait(batch, 7);
        assert_eq!(outbox.issue(batch, 0.0, &mut links), (10.0, vec![7]));
        assert_eq!(links.map(|mut link| link.push(0.0, 10.0)), [11.0, 11.0]);
    }
}
