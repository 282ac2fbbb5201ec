//! Room for what clients send, so much for the whole server.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// So much of something, be it bytes or blocks. Whoever waits for some has none: so that there is always somebody who
/// goes on, and gives back what he has.
#[derive(Debug)]
pub(crate) struct Room {
    free: Arc<Semaphore>,
    all: u32,
}

/// A part of it, until this is dropped.
pub(crate) type Taken = OwnedSemaphorePermit;

impl Room {
    pub(crate) fn new(all: usize) -> Room {
        let all = u32::try_from(all).unwrap_or(u32::MAX);
        Room { free: Arc::new(Semaphore::new(all as usize)), all }
    }

    /// Takes so much if it is free. More than all is all.
    pub(crate) fn try_take(&self, much: usize) -> Option<Taken> {
        Arc::clone(&self.free).try_acquire_many_owned(self.bounded(much)).ok()
    }

    /// Waits until so much is free, in the order of asking, and takes it. More than all is all.
    pub(crate) async fn take(&self, much: usize) -> Option<Taken> {
        // It is never closed.
        Arc::clone(&self.free).acquire_many_owned(self.bounded(much)).await.ok()
    }

    fn bounded(&self, much: usize) -> u32 {
        u32::try_from(much).unwrap_or(u32::MAX).min(self.all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_given_back_is_had_by_who_waits_and_more_than_all_is_all() {
        let room = Room::new(10);
        let first = room.take(4).await.unwrap();
        assert!(room.try_take(7).is_none());
        let six = room.try_take(6).unwrap();
        let whole = room.take(usize::MAX);
        tokio::pin!(whole);
        assert!(std::future::poll_fn(|cx| std::task::Poll::Ready(whole.as_mut().poll(cx).is_pending())).await);
        drop((first, six));
        let whole = whole.await.unwrap();
        assert_eq!((whole.num_permits(), room.free.available_permits()), (10, 0));
    }
}
