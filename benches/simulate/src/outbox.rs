//! Filled pieces on their way to the links, in batches, by the rules of the loader's own `load/outbox.rs`.

use std::collections::VecDeque;

use sllm_core::tuning::BUSY;

use crate::resource::Serial;

/// What the lanes of one process send copies by.
#[derive(Debug, Clone)]
pub(crate) struct Outbox {
    /// Pieces of a batch at most.
    most: usize,
    batches: Vec<Batch>,
    /// One a link. A piece is in the line of its first copy's.
    lines: Vec<Line>,
}

#[derive(Debug, Clone, Default)]
struct Line {
    /// The batch that pieces are added to, once there is one.
    open: Option<usize>,
    /// Those that the link may still be busy with, oldest first.
    issued: VecDeque<usize>,
}

#[derive(Debug, Clone, Default)]
struct Batch {
    line: usize,
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
        Outbox { most, batches: Vec::new(), lines: vec![Line::default(); links.max(1)] }
    }

    /// Adds a piece's copies to the open batch of its line. Gives that batch's number.
    pub(crate) fn send(&mut self, copies: impl Iterator<Item = (usize, u64)>) -> usize {
        let copies: Vec<(usize, u64)> = copies.collect();
        let line = copies.first().map_or(0, |(link, _)| *link);
        let batch = self.lines[line].open.unwrap_or(self.batches.len());
        if batch == self.batches.len() {
            self.batches.push(Batch { line, ..Batch::default() });
            self.lines[line].open = Some(batch);
        }
        self.batches[batch].pieces += 1;
        self.batches[batch].copies.extend(copies);
        batch
    }

    /// Whether a batch, to which a piece was added, has as many as it may.
    pub(crate) fn is_full(&self, batch: usize) -> bool {
        self.batches[batch].pieces >= self.most
    }

    /// The next line, of those from `first` on, whose open batch is to be issued by whoever comes by, and that batch.
    pub(crate) fn idle(&mut self, first: usize, now: f64) -> Option<(usize, usize)> {
        let Outbox { lines, batches, .. } = self;
        lines.iter_mut().enumerate().skip(first).find_map(|(number, line)| {
            let open = line.open?;
            while line.issued.front().is_some_and(|&batch| batches[batch].end.is_some_and(|end| end <= now)) {
                line.issued.pop_front();
            }
            (line.issued.len() < BUSY).then_some((number, open))
        })
    }

    /// An open batch that a lane has to issue that asks whether another one is done.
    pub(crate) fn overdue(&mut self, batch: usize, now: f64) -> Option<usize> {
        if self.end(batch).is_some() { None } else { self.idle(0, now).map(|(_, batch)| batch) }
    }

    pub(crate) fn is_open(&self, batch: usize) -> bool {
        self.lines[self.batches[batch].line].open == Some(batch)
    }

    /// Takes an open batch to be issued, and says how many copies it is.
    pub(crate) fn take(&mut self, batch: usize) -> usize {
        let line = &mut self.lines[self.batches[batch].line];
        line.open = None;
        line.issued.push_back(batch);
        self.batches[batch].copies.len()
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
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends pieces of 10 bytes to a link at the same time; the numbers of those after which a batch was due.
    fn due(outbox: &mut Outbox, link: usize, pieces: usize, now: f64, links: &mut [Serial]) -> Vec<usize> {
        let mut due = Vec::new();
        for number in 1..=pieces {
            let batch = outbox.send([(link, 10)].into_iter());
            if outbox.is_full(batch) || outbox.idle(link, now) == Some((link, batch)) {
                outbox.take(batch);
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
        assert_eq!(due(&mut outbox, 0, 11, 0.0, &mut links), [1, 2, 6, 10]);
        // One rest a batch: 1.5, 1.5 and twice 4.5 s; the eleventh waits.
        assert_eq!([0, 1, 2, 3, 4].map(|batch| outbox.end(batch)), [Some(1.5), Some(3.0), Some(7.5), Some(12.0), None]);
        assert_eq!(outbox.overdue(4, 7.4), None);
        assert_eq!(
            outbox.overdue(4, 7.5),
            Some(4),
            "one batch is left, so that whoever asks for the open one issues it"
        );
        assert_eq!(outbox.overdue(3, 7.5), None, "this one was issued");
        assert_eq!((outbox.take(4), outbox.is_open(4)), (1, false));
    }

    #[test]
    fn a_batch_of_one_piece_is_due_at_once() {
        let mut outbox = Outbox::new(1, 1);
        assert_eq!(due(&mut outbox, 0, 5, 0.0, &mut [Serial::new(10.0, 0.5)]), [1, 2, 3, 4, 5]);
        assert_eq!(outbox.end(4), Some(5.0 * 1.5));
    }

    #[test]
    fn every_link_has_its_line_and_a_batch_ends_with_the_last_of_its_links() {
        let mut links = [Serial::new(10.0, 0.0), Serial::new(10.0, 0.0)];
        let mut outbox = Outbox::new(4, 2);
        assert_eq!(due(&mut outbox, 0, 5, 0.0, &mut links), [1, 2]);
        assert_eq!(due(&mut outbox, 1, 3, 0.0, &mut links), [1, 2]);
        let batch = outbox.send([(1, 40), (1, 60), (0, 10)].into_iter());
        assert_eq!((batch, outbox.overdue(batch, 0.5), outbox.take(batch)), (5, None, 4));
        outbox.wait(batch, 7);
        assert_eq!(outbox.issue(batch, 0.0, &mut links), (13.0, vec![7]));
        assert_eq!(links.map(|mut link| link.push(0.0, 10.0)), [4.0, 14.0]);
        assert_eq!(outbox.overdue(2, 1.0), Some(2), "the first link has one batch left");
    }

    #[test]
    fn whoever_asks_for_a_busy_links_piece_issues_what_waits_for_an_idle_one() {
        let mut links = [Serial::new(10.0, 9.0), Serial::new(10.0, 0.0)];
        let mut outbox = Outbox::new(4, 2);
        assert_eq!(due(&mut outbox, 0, 3, 0.0, &mut links), [1, 2]);
        assert_eq!(due(&mut outbox, 1, 3, 0.0, &mut links), [1, 2]);
        assert_eq!(outbox.overdue(2, 1.0), Some(5));
    }
}
