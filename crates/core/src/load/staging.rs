//! What a load stages by, kept from one batch of a session to the next: pinning it again would cost more than a batch.

use std::cell::OnceCell;
use std::sync::Arc;

use super::Loader;
use super::lane::{Buffers, Outcome};
use super::ring::{Form, Ring};
use crate::cache::Use;
use crate::device::{Device, Stream};
use crate::error::{Error, Result};
use crate::numa::Node;
use crate::read::choose::{MAX_LANES, Share};
use crate::read::depth::Depth;
use crate::read::rates::Rates;

/// Streams, one a device, and the ring of buffers.
#[derive(Debug, Default)]
pub(super) struct Staging {
    ring: Option<Ring>,
    streams: Vec<Stream>,
    /// Where the loader's devices are, once it was asked.
    node: OnceCell<Option<Node>>,
    /// What was found out about the disk.
    pub(super) depth: Arc<Depth>,
    /// And about the page cache.
    pub(super) rates: Rates,
    /// Something had to be read from a disk: pieces stay short, since a ring of other buffers would have to be pinned.
    pub(super) is_cold: bool,
}

impl Staging {
    /// The NUMA node near which bytes are staged, if there is one.
    pub(super) fn node(&self, loader: &Loader) -> Option<Node> {
        *self.node.get_or_init(|| Node::of(&loader.system, &loader.devices))
    }

    /// Takes the ring that the loader has prepared, or begins to pin one of this form, if there is none yet.
    pub(super) fn prepare(&mut self, loader: &Loader, form: impl FnOnce() -> Option<Form>) {
        if self.ring.is_none() {
            self.ring = loader.take_prepared().or_else(|| loader.prepared_ring(form()?));
        }
    }

    fn open_streams(&mut self, loader: &Loader) -> Result<()> {
        if self.streams.is_empty() {
            self.streams = loader.devices.iter().map(Device::stream).collect::<Result<_>>()?;
        }
        Ok(())
    }

    /// Has the device at this place take checksums of what its stream brings, by so many slots.
    pub(super) fn begin_sums(&mut self, loader: &Loader, place: usize, slots: usize) -> Result<()> {
        self.open_streams(loader)?;
        Ok(self.streams.get_mut(place).map_or(Ok(()), |stream| stream.begin_sums(slots))?)
    }

    /// A stream for each of the loader's devices, and buffers of `piece_len` bytes: those of a cache, or a pool that
    /// holds the shares' buffers, in memory of `node`. Shares get fewer lanes and buffers where the loader's limit, or the
    /// cache, is small.
    pub(super) fn fit<'a>(
        &'a mut self,
        loader: &Loader,
        node: Option<Node>,
        cache: Option<&'a Use>,
        piece_len: u64,
        shares: &mut [Share<'_>],
        outcome: &Outcome,
    ) -> Result<(Buffers<'a>, &'a [Stream])> {
        self.open_streams(loader)?;
        let too_large = || Error::Invalid(format!("a piece of {piece_len} bytes does not fit the memory"));
        let buffer_len = usize::try_from(piece_len).map_err(|_| too_large())?;
        let ring = usize::try_from(loader.pinned_len / piece_len).unwrap_or(usize::MAX);
        let most = cache.map_or(ring, |cache| cache.chunks() / 2).max(1);
        let staged = shares.iter().filter(|share| share.buffers_per_lane > 0).count();
        for share in shares.iter_mut().filter(|share| share.buffers_per_lane > 0) {
            let mine = (most / staged).max(1);
            (share.lanes, share.buffers_per_lane) = divide(mine, share.lanes, share.buffers_per_lane);
        }
        if let Some(cache) = cache {
            return Ok((Buffers::Cache(cache), &self.streams));
        }
        let buffers = shares.iter().map(|share| share.lanes * share.buffers_per_lane).sum();
        let per_lane = shares.iter().map(|share| share.buffers_per_lane).max().unwrap_or(0);
        let form = Form { buffer_len, buffers, per_lane };
        let ring = match self.ring.take().or_else(|| loader.take_prepared()) {
            Some(ring) if ring.fits(form) => ring,
            other => {
                if let Some(other) = other {
                    let both = (other.pool.len() as u64).saturating_add(form.len());
                    if both <= loader.pinned_len { other.release() } else { drop(other) }
                }
                Ring::new(loader, node, form)?
            }
        };
        ring.refusal.iter().for_each(|refusal| outcome.note(refusal.clone()));
        Ok((Buffers::Ring(&self.ring.insert(ring).pool), &self.streams))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Some(ring) = self.ring.take() {
            ring.release();
        }
    }
}

/// Lanes, and buffers of each, of a share that wants so many but may have only `buffers` in all. None of them is 0.
pub(super) fn divide(buffers: usize, lanes: usize, per_lane: usize) -> (usize, usize) {
    // Lanes beyond those of one device are worth less than a lane's second buffer.
    let lanes = lanes.min((buffers / per_lane).max(MAX_LANES)).min(buffers);
    (lanes, per_lane.min(buffers / lanes))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::fs;
    use std::path::Path;
    use std::sync::Mutex;

    use cuda::Driver;
    use rustix::thread::{CpuSet, sched_getaffinity};

    use super::*;
    use crate::{Checkpoint, Control, EngineChoice, Filter, LoadReport};

    const LEN: usize = 20 << 20;

    /// A system of two nodes, each with all processors of this list: cuda:0 and cuda:1 at the first, cuda:2 at one that
    /// only the list of nodes knows of, cuda:3 at none.
    fn two_nodes(system: &Path, cpus: &str) {
        let nodes = system.join("devices/system/node");
        for node in [0, 900] {
            fs::create_dir_all(nodes.join(format!("node{node}"))).unwrap();
            fs::write(nodes.join(format!("node{node}/cpulist")), cpus).unwrap();
        }
        fs::write(nodes.join("has_memory"), "0,900\n").unwrap();
        for (bus, node) in [(1, "0\n"), (2, "0\n"), (3, "900\n"), (4, "-1\n")] {
            let folder = system.join(format!("bus/pci/devices/0000:{bus:02x}:00.0"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("numa_node"), node).unwrap();
        }
    }

    /// Loads two tensors, by so many threads, and compares their bytes; the report, and the processors that lanes were
    /// allowed.
    fn load(system: &Path, devices: &[usize], threads: usize) -> (LoadReport, HashSet<Vec<usize>>) {
        let path = system.join("model.safetensors");
        let json = format!(
            r#"{{"a":{{"dtype":"U8","shape":[{LEN}],"data_offsets":[0,{LEN}]}},"b":{{"dtype":"U8","shape":[{LEN}],"data_offsets":[{LEN},{}]}}}}"#,
            2 * LEN
        );
        let bytes = test_support::noise(1, 2 * LEN);
        fs::write(&path, test_support::safetensors(&json, &bytes)).unwrap();
        let seen = Arc::new(Mutex::new(HashSet::new()));
        let see = Arc::clone(&seen);
        let control = Control::new().on_progress(move |_| {
            let allowed = sched_getaffinity(None).unwrap();
            see.lock().unwrap().insert((0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu)).collect());
        });
        let devices = devices.iter().map(|&ordinal| Device::cuda(ordinal).unwrap()).collect::<Vec<_>>();
        let several = devices.len() > 1;
        let builder = Loader::builder().devices(devices).engine(EngineChoice::Pread).direct(Some(false));
        let mut loader = builder.threads(threads).control(control).build().unwrap();
        loader.system = system.into();
        let checkpoint = Checkpoint::open(&path).unwrap();
        let place = |info: &crate::TensorInfo| usize::from(several && info.name == "b");
        let loaded = loader.load_placed(&checkpoint, &Filter::all(), place).unwrap();
        assert!(loaded.tensor("a").unwrap().to_vec().unwrap() == bytes[..LEN]);
        assert!(loaded.tensor("b").unwrap().to_vec().unwrap() == bytes[LEN..]);
        (loaded.report().clone(), std::mem::take(&mut *seen.lock().unwrap()))
    }

    #[test]
    fn few_buffers_are_divided_among_lanes() {
        for (buffers, lanes, per_lane, expected) in [
            (128, 14, 2, (14, 2)),
            (128, 112, 2, (64, 2)), // many threads were asked for: each lane keeps its second buffer
            (20, 28, 2, (14, 1)),
            (20, 8, 2, (8, 2)),
            (9, 12, 2, (9, 1)),
            (40, 2, 36, (2, 20)),
            (1, 24, 2, (1, 1)),
        ] {
            assert_eq!(divide(buffers, lanes, per_lane), expected, "{buffers} for {lanes} lanes of {per_lane}");
        }
    }

    #[test]
    fn a_load_is_staged_near_its_devices_where_they_are_at_one_node_of_several() {
        let driver = Driver::load();
        driver.set_devices(4);
        let dir = tempfile::tempdir().unwrap();
        let before = sched_getaffinity(None).unwrap();
        let all: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&cpu| before.is_set(cpu)).collect();
        two_nodes(dir.path(), &format!("{}\n", all[0]));
        let refusals = |report: &LoadReport| report.notes.iter().filter(|note| note.contains("staging memory")).count();
        let stayed = |report: &LoadReport| report.notes.iter().filter(|note| note.contains("reader threads")).count();

        for devices in [&[0][..], &[0, 1]] {
            let (report, seen) = load(dir.path(), devices, 1);
            assert_eq!((report.numa_node, stayed(&report)), (Some(0), 0), "{:?}", report.notes);
            assert_eq!(seen, HashSet::from([vec![all[0]]]));
            // Memory of node 0 is refused where a container has not the right to ask.
            assert!(report.notes.iter().all(|note| note.contains("NUMA node 0")) && refusals(&report) <= 1);
            assert!(report.to_string().contains("devices at NUMA node 0"));
        }
        let (report, seen) = load(dir.path(), &[0], 3);
        assert_eq!((report.numa_node, stayed(&report)), (Some(0), 1), "three lanes are too many: {:?}", report.notes);
        assert_eq!(seen, HashSet::from([all.clone()]));
        // The kernel has no such node: noted once, and nothing else is different.
        let (report, seen) = load(dir.path(), &[2], 1);
        assert_eq!((report.numa_node, refusals(&report)), (Some(900), 1), "{:?}", report.notes);
        assert_eq!(seen, HashSet::from([vec![all[0]]]));
        for devices in [&[0, 2][..], &[3], &[1, 3]] {
            let (report, seen) = load(dir.path(), devices, 1);
            assert_eq!((report.numa_node, report.notes.len()), (None, 0), "{:?}", report.notes);
            assert_eq!(seen, HashSet::from([all.clone()]));
            assert!(!report.to_string().contains("NUMA"));
        }
        assert_eq!(sched_getaffinity(None).unwrap(), before, "the caller's own thread is left alone");
    }
}
