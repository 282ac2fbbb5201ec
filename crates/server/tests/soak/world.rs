//! The models of a soak, what they were at any time, and what was counted.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use tonic::Status;

use crate::common::{Served, models};

const PLAIN: usize = 9_000_123;
const SMALL: usize = 70_001;
/// More than the pool has.
const LARGE: usize = 37_000_011;
/// The models' names; the first three change on the disk.
pub(crate) const MODELS: [&str; 5] = ["plain", "small", "large", "team/store", "original"];
const CHANGING: [(&str, usize); 3] = [("plain", PLAIN), ("small", SMALL), ("large", LARGE)];
/// Bytes of the longest model at most, and how far from its memory's beginning a load may put it at most.
pub(crate) const LARGEST: u64 = LARGE as u64 + 4096;
pub(crate) const SHIFT: u64 = 5000;
/// Contents of a model that are kept, of the last versions.
const KEPT: usize = 2;

/// Makes the models as they are first.
pub(crate) fn fill(models: &Path) {
    for (name, len) in CHANGING {
        models::safetensors(models, name, 0, len);
    }
    models::store(models, "team/store", 4, 12_000_005);
    models::original(models, "original", 5, [5_000_008, 4_000_000]);
}

/// Choices that a seed makes.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64, client: u64) -> Random {
        let mixed = (seed ^ client.wrapping_mul(0xbf58_476d_1ce4_e5b9)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Random(mixed | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    /// Less than `end`.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(crate) fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }
}

/// A model on the disk, which others may replace.
pub(crate) struct Model {
    pub(crate) name: &'static str,
    pub(crate) path: PathBuf,
    /// The bytes of its tensor, where it can be replaced.
    len: Option<usize>,
    versions: Mutex<Versions>,
    replacing: Mutex<()>,
}

#[derive(Default)]
struct Versions {
    /// What each is made of, the one that is being put in place too.
    seeds: Vec<u64>,
    /// The last one that is in place.
    current: usize,
    /// Bytes of the data files, by version.
    contents: BTreeMap<usize, Arc<Vec<u8>>>,
}

impl Model {
    fn new(models: &Path, name: &'static str) -> Model {
        let path = models.join(name);
        let len = CHANGING.iter().find(|(changing, _)| *changing == name).map(|(_, len)| *len);
        let contents = BTreeMap::from([(0, Arc::new(models::bytes(&path)))]);
        let versions = Mutex::new(Versions { seeds: vec![0], current: 0, contents });
        Model { name, path, len, versions, replacing: Mutex::default() }
    }

    /// The version that is in place now, or an earlier one.
    pub(crate) fn version(&self) -> usize {
        self.versions.lock().unwrap().current
    }

    /// The version that is in place now, or a later one.
    fn last(&self) -> usize {
        self.versions.lock().unwrap().seeds.len() - 1
    }

    /// Puts another version in place, where it can be.
    pub(crate) fn replace(&self, seed: u64) {
        let Some(len) = self.len else { return };
        let _replacing = self.replacing.lock().unwrap();
        let aside = tempfile::tempdir_in(self.path.parent().unwrap()).unwrap();
        models::safetensors(aside.path(), "m", seed, len);
        let version = {
            let mut versions = self.versions.lock().unwrap();
            versions.seeds.push(seed);
            versions.seeds.len() - 1
        };
        let name = "model.safetensors";
        fs::rename(aside.path().join("m").join(name), self.path.join(name)).unwrap();
        self.versions.lock().unwrap().current = version;
    }

    fn content(&self, version: usize) -> Arc<Vec<u8>> {
        let seed = {
            let versions = self.versions.lock().unwrap();
            if let Some(content) = versions.contents.get(&version) {
                return Arc::clone(content);
            }
            versions.seeds[version]
        };
        let scratch = tempfile::tempdir_in(self.path.parent().unwrap()).unwrap();
        models::safetensors(scratch.path(), "m", seed, self.len.unwrap());
        let content = Arc::new(models::bytes(&scratch.path().join("m")));
        let mut versions = self.versions.lock().unwrap();
        versions.contents.insert(version, Arc::clone(&content));
        while versions.contents.len() > KEPT {
            versions.contents.pop_first();
        }
        content
    }

    /// An error is the model's fault where it was replaced meanwhile: `None`.
    pub(crate) fn unless_replaced<T>(&self, version: usize, result: Result<T, Status>) -> Result<Option<T>, Status> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(_) if self.last() > version => Ok(None),
            Err(status) => Err(status),
        }
    }
}

/// The server, its models, and what was counted.
pub(crate) struct World {
    pub(crate) served: Served,
    pub(crate) models: HashMap<&'static str, Model>,
    /// How often somebody has begun to clear all.
    end: Option<Instant>,
    counts: Mutex<BTreeMap<&'static str, u64>>,
}

impl World {
    pub(crate) fn new(served: Served, end: Option<Instant>) -> World {
        let models = MODELS.into_iter().map(|name| (name, Model::new(&served.models(), name))).collect();
        World { served, models, end, counts: Mutex::default() }
    }

    pub(crate) fn is_time_left(&self) -> bool {
        self.end.is_some_and(|end| Instant::now() < end)
    }

    pub(crate) fn count(&self, what: &'static str) {
        *self.counts.lock().unwrap().entry(what).or_default() += 1;
    }

    pub(crate) fn count_of(&self, what: &'static str) -> u64 {
        self.counts.lock().unwrap().get(what).copied().unwrap_or_default()
    }

    /// Compares what arrived with all versions that were in place since `version` was.
    pub(crate) fn compare(&self, model: &Model, version: usize, bytes: &[u8], offset: u64) -> Result<(), Status> {
        self.count("compared");
        let range = offset as usize..offset as usize + bytes.len();
        if (version..=model.last()).any(|version| model.content(version)[range.clone()] == *bytes) {
            return Ok(());
        }
        let content = model.content(version);
        let first = content[range].iter().zip(bytes).position(|(one, other)| one != other);
        Err(Status::data_loss(format!("what arrived is not what lay on the disk, from byte {first:?} on")))
    }
}

impl fmt::Display for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.counts.lock().unwrap())
    }
}
