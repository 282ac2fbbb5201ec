//! What lanes share: a rate divided among those that use it, and a queue for those that come one after another.

/// A rate shared evenly: each flow gets what it can take, and no more than its part of the total.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    /// Bytes a second of one flow alone.
    each: f64,
    /// Bytes a second of all together.
    total: f64,
    /// Who flows, and the bytes that are left.
    flows: Vec<(usize, f64)>,
    now: f64,
}

impl Shared {
    pub(crate) fn new(each: f64, total: f64) -> Shared {
        Shared { each, total, flows: Vec::new(), now: 0.0 }
    }

    fn rate(&self) -> f64 {
        self.each.min(self.total / self.flows.len().max(1) as f64)
    }

    fn advance(&mut self, now: f64) {
        let moved = (now - self.now) * self.rate();
        for (_, left) in &mut self.flows {
            *left -= moved;
        }
        self.now = now;
    }

    /// Starts a flow of so many bytes.
    pub(crate) fn start(&mut self, now: f64, who: usize, bytes: f64) {
        self.advance(now);
        self.flows.push((who, bytes));
    }

    /// When the first of the flows will end, if no other starts.
    pub(crate) fn next_end(&self) -> Option<f64> {
        let left = self.flows.iter().map(|(_, left)| left.max(0.0)).min_by(f64::total_cmp)?;
        Some(self.now + left / self.rate())
    }

    /// Ends the flow that has least left, at the time that `next_end` gave.
    pub(crate) fn end_first(&mut self, now: f64) -> Option<usize> {
        self.advance(now);
        let (place, _) = self.flows.iter().enumerate().min_by(|(_, a), (_, b)| a.1.total_cmp(&b.1))?;
        // In order, so that flows of one length end in the order in which they began.
        Some(self.flows.remove(place).0)
    }
}

/// A queue: one copy after another, each with a cost of its own beside its bytes. A stream of a device.
#[derive(Debug, Clone)]
pub(crate) struct Serial {
    rate: f64,
    overhead: f64,
    free_at: f64,
}

impl Serial {
    pub(crate) fn new(rate: f64, overhead: f64) -> Serial {
        Serial { rate, overhead, free_at: 0.0 }
    }

    /// Puts a copy at the end, and says when it will be done.
    pub(crate) fn push(&mut self, now: f64, bytes: f64) -> f64 {
        self.free_at = self.free_at.max(now) + self.overhead + bytes / self.rate;
        self.free_at
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_flows_share_the_total_and_one_takes_what_it_can() {
        let mut disk = Shared::new(6.0, 8.0);
        disk.start(0.0, 1, 12.0);
        assert_eq!(disk.next_end(), Some(2.0));
        disk.start(1.0, 2, 12.0); // 6 of flow 1 are left; 4 a second each from here
        assert_eq!(disk.next_end(), Some(2.5));
        assert_eq!(disk.end_first(2.5), Some(1));
        assert_eq!(disk.next_end(), Some(3.5)); // 6 of flow 2 are left, alone at 6 a second
        assert_eq!(disk.end_first(3.5), Some(2));
        assert_eq!(disk.next_end(), None);
    }

    #[test]
    fn copies_of_a_stream_follow_each_other() {
        let mut stream = Serial::new(10.0, 0.5);
        assert_eq!(stream.push(0.0, 10.0), 1.5);
        assert_eq!(stream.push(1.0, 10.0), 3.0);
        assert_eq!(stream.push(9.0, 0.0), 9.5);
    }
}
