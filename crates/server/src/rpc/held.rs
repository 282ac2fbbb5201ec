//! Blocks of a load, with what holds their memory open.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;

use sllm_core::Block;
use tonic::Status;

use crate::imports::Hold;

/// The blocks of a load. They go before what holds their memory open, by a name `K` of that memory.
pub(super) struct Held<K> {
    blocks: Vec<Block>,
    holds: HashMap<K, Hold>,
}

impl<K> Default for Held<K> {
    fn default() -> Held<K> {
        Held { blocks: Vec::new(), holds: HashMap::new() }
    }
}

impl<K: Eq + Hash> Held<K> {
    /// Adds a block that needs nothing to be held.
    pub(super) fn add(&mut self, block: Block) {
        self.blocks.push(block);
    }

    /// Adds a block of memory that `open` holds open, once a name.
    pub(super) fn add_of(
        &mut self,
        memory: K,
        open: impl FnOnce() -> Result<Hold, Status>,
        block: impl FnOnce(&Hold) -> Result<Block, Status>,
    ) -> Result<(), Status> {
        let hold = match self.holds.entry(memory) {
            Entry::Occupied(hold) => hold.into_mut(),
            Entry::Vacant(place) => place.insert(open()?),
        };
        self.blocks.push(block(hold)?);
        Ok(())
    }

    pub(super) fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// Loads into the blocks; their memory is held until that is over.
    pub(super) fn load<T>(self, load: impl FnOnce(Vec<Block>) -> T) -> T {
        let Held { blocks, holds } = self;
        let loaded = load(blocks);
        drop(holds);
        loaded
    }
}
