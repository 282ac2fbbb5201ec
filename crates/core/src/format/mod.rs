//! The files a checkpoint is made of: their bytes parsed and checked, nothing opened or loaded.

pub(crate) mod hf_index;
pub(crate) mod manifest;
pub(crate) mod original;
pub(crate) mod safetensors;
pub(crate) mod scan;

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

/// Alignment of reads, of a store's files, and of its large tensors, in bytes.
pub const PAGE: u64 = 4096;
/// The same, for memory.
pub(crate) const PAGE_BYTES: usize = 4096;

/// A string of a JSON text, borrowed where it has no escapes.
#[derive(Debug, Deserialize)]
pub(crate) struct Text<'a>(#[serde(borrow)] pub(crate) Cow<'a, str>);

/// The first of these names that occurs a second time.
pub(crate) fn repeated<'a>(mut names: impl Iterator<Item = &'a str> + Clone) -> Option<&'a str> {
    // As most writers leave them.
    if names.clone().is_sorted_by(|a, b| a < b) {
        return None;
    }
    let mut seen = HashSet::with_capacity(names.clone().count());
    names.find(|&name| !seen.insert(name))
}

/// A JSON object as its entries in order, so that a repeated key is seen and not lost.
#[derive(Debug)]
pub(crate) struct Entries<K, T>(pub(crate) Vec<(K, T)>);

impl<'de, K: Deserialize<'de>, T: Deserialize<'de>> Deserialize<'de> for Entries<K, T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor<K, T>(PhantomData<(K, T)>);

        impl<'de, K: Deserialize<'de>, T: Deserialize<'de>> Visitor<'de> for EntriesVisitor<K, T> {
            type Value = Entries<K, T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<K, T>, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(EntriesVisitor(PhantomData))
    }
}
