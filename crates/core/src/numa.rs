//! The NUMA node that a load's devices are at: memory and processors near them.
//!
//! Bytes that are staged on another node cross the link between the nodes once more on their way. Where the system does not
//! say where a device is, or devices are at several nodes, there is no node, and everything stays where the system puts it.
//! The host, to which nothing is staged, is not asked.

use std::ops::RangeInclusive;
use std::path::Path;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::device::Device;
use crate::small_file::read_small_file;

/// Where the system tells of its nodes and devices.
pub(crate) const SYSTEM: &str = "/sys";

/// Bytes of a file there that are read at most: lists of 8,192 processors are shorter.
const MAX_FILE_LEN: u64 = 64 << 10;

/// A node with memory, of a host that has several.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Node {
    number: u32,
    cpus: CpuSet,
}

impl Node {
    /// The node that all these devices but the host are at, below such a directory as [`SYSTEM`]. `None` where the host has
    /// one, where it is not known of a device, or where it is not one.
    pub(crate) fn of(system: &Path, devices: &[Device]) -> Option<Node> {
        let nodes = system.join("devices/system/node");
        let with_memory = parse_list(&read(&nodes.join("has_memory"))?)?;
        if !has_several(&with_memory) {
            return None;
        }
        let staged = devices.iter().filter(|device| device.needs_pinning());
        let mut places = staged.map(|device| number_of(system, &device.pci_address()?));
        let number = places.next()??;
        if places.any(|other| other != Some(number))
            || !with_memory.iter().any(|range| range.contains(&(number as usize)))
        {
            return None;
        }
        let list = parse_list(&read(&nodes.join(format!("node{number}/cpulist")))?)?;
        let mut cpus = CpuSet::new();
        let is_mine = |cpu: &usize| list.iter().any(|range| range.contains(cpu));
        (0..CpuSet::MAX_CPU).filter(is_mine).for_each(|cpu| cpus.set(cpu));
        Some(Node { number, cpus })
    }

    /// Its number, as the system counts.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// Keeps the calling thread, one of `threads`, on those of its processors that are the node's. Where these are too few
    /// for all threads, or the system refuses, the thread keeps all it had, and the error says why.
    pub(crate) fn bind_thread(&self, threads: usize) -> Result<(), String> {
        let stay = |why: String| format!("reader threads are not kept on NUMA node {}: {why}", self.number);
        let allowed = sched_getaffinity(None).map_err(|e| stay(e.to_string()))?;
        let mut near = CpuSet::new();
        (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu) && self.cpus.is_set(cpu)).for_each(|cpu| near.set(cpu));
        if (near.count() as usize) < threads.max(1) {
            return Err(stay(format!("{} of their processors are there, for {threads} threads", near.count())));
        }
        sched_setaffinity(None, &near).map_err(|e| stay(e.to_string()))
    }
}

fn read(path: &Path) -> Option<String> {
    read_small_file(path, MAX_FILE_LEN).ok()
}

/// The node of the device at a PCI address; `None` where it is not known.
fn number_of(system: &Path, address: &str) -> Option<u32> {
    let file = system.join("bus/pci/devices").join(folder_of(address)?).join("numa_node");
    // -1 where the firmware does not say.
    read(&file)?.trim().parse().ok()
}

/// A PCI address as the system names its directory: `0000:b1:00.0`. Drivers write it with capitals, or a longer domain.
fn folder_of(address: &str) -> Option<String> {
    let (place, function) = address.trim().split_once('.')?;
    let mut parts = place.split(':').map(|part| u32::from_str_radix(part, 16).ok());
    let (domain, bus, device) = (parts.next()??, parts.next()??, parts.next()??);
    let function = u32::from_str_radix(function, 16).ok()?;
    let is_address = parts.next().is_none() && bus < 256 && device < 32 && function < 8;
    is_address.then(|| format!("{domain:04x}:{bus:02x}:{device:02x}.{function:x}"))
}

/// A list of the kernel's, such as `0-3,8,10-11`; empty for no numbers. `None` where it is no such list.
fn parse_list(text: &str) -> Option<Vec<RangeInclusive<usize>>> {
    let text = text.trim();
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        (first <= last).then_some(first..=last)
    };
    if text.is_empty() { Some(Vec::new()) } else { text.split(',').map(range).collect() }
}

/// Whether a list names more than one number.
fn has_several(list: &[RangeInclusive<usize>]) -> bool {
    let first = list.first().map(|range| *range.start());
    list.iter().any(|range| Some(*range.start()) != first || Some(*range.end()) != first)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        for (text, list) in [
            ("0\n", vec![0..=0]),
            ("0-127\n", vec![0..=127]),
            ("0-3,8,10-11\n", vec![0..=3, 8..=8, 10..=11]),
            ("1,3,5", vec![1..=1, 3..=3, 5..=5]),
            ("4-4, 6", vec![4..=4, 6..=6]),
            ("\n", vec![]),
            ("0-18446744073709551615", vec![0..=usize::MAX]),
        ] {
            assert_eq!(parse_list(text), Some(list), "{text:?}");
        }
        for text in ["x", "1-", "-1", "3-1", "1,,2", "0-7:2/4", "0 1", "18446744073709551616", ","] {
            assert_eq!(parse_list(text), None, "{text:?}");
        }
        assert!(!["", "0", "7,7", "7-7"].iter().any(|text| has_several(&parse_list(text).unwrap())));
        assert!(["0-1", "0,2", "0,0,1"].iter().all(|text| has_several(&parse_list(text).unwrap())));
    }

    #[test]
    fn addresses_become_directories_below_their_place_or_nothing() {
        for (address, folder) in [
            ("0000:01:00.0", "0000:01:00.0"),
            ("0000:B1:1F.7", "0000:b1:1f.7"),
            ("00000000:0A:00.0", "0000:0a:00.0"),
            ("10000:e1:00.0", "10000:e1:00.0"),
            ("1:2:3.4", "0001:02:03.4"),
        ] {
            assert_eq!(folder_of(address).as_deref(), Some(folder), "{address}");
        }
        for address in
            ["", "0000:01:00", "0000:100:00.0", "0000:01:20.0", "0000:01:00.8", "0:0:0:0.0", "01:00.0", "../0:0.0"]
        {
            assert_eq!(folder_of(address), None, "{address}");
        }
    }

    /// A device's directory, and the node's number in it.
    fn put(system: &Path, address: &str, node: &str) {
        let folder = system.join("bus/pci/devices").join(address);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("numa_node"), node).unwrap();
    }

    #[test]
    fn a_devices_number_is_known_or_it_is_not() {
        let dir = tempfile::tempdir().unwrap();
        for (node, number) in [("1\n", Some(1)), ("0", Some(0)), ("-1\n", None), ("", None), ("99999999999", None)] {
            put(dir.path(), "0000:b1:00.0", node);
            assert_eq!(number_of(dir.path(), "0000:B1:00.0"), number, "{node:?}");
        }
        assert_eq!(number_of(dir.path(), "0000:b2:00.0"), None);
        put(dir.path(), "0000:b1:00.0", &"1".repeat(1 << 20));
        assert_eq!(number_of(dir.path(), "0000:b1:00.0"), None);
    }

    /// The numbers of a set.
    fn numbers(set: &CpuSet) -> Vec<usize> {
        (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()
    }

    #[test]
    fn devices_of_one_node_of_several_have_it() {
        let driver = cuda::Driver::load();
        driver.set_devices(4);
        let dir = tempfile::tempdir().unwrap();
        let system = dir.path();
        let devices: Vec<Device> = (0..4).map(|ordinal| Device::cuda(ordinal).unwrap()).collect();
        let (of, host) = (|devices: &[Device]| Node::of(system, devices), Device::host());
        assert!(of(&devices[..1]).is_none(), "the system says nothing");
        let nodes = system.join("devices/system/node");
        for (node, cpus) in [(0, "0-1,4-5\n"), (1, "2,3,6-7,1023,1024-9999999999\n")] {
            fs::create_dir_all(nodes.join(format!("node{node}"))).unwrap();
            fs::write(nodes.join(format!("node{node}/cpulist")), cpus).unwrap();
        }
        fs::write(nodes.join("has_memory"), "0-1\n").unwrap();
        for (place, node) in ["0", "1", "1", "-1"].iter().enumerate() {
            put(system, &format!("0000:{:02x}:00.0", place + 1), node);
        }
        let node = of(&devices[..1]).unwrap();
        assert_eq!((node.number(), numbers(&node.cpus)), (0, vec![0, 1, 4, 5]));
        let node = of(&devices[1..3]).unwrap();
        assert_eq!((node.number(), numbers(&node.cpus)), (1, vec![2, 3, 6, 7, 1023]));
        assert!(of(&devices[..2]).is_none(), "two nodes");
        assert!(of(&devices[1..]).is_none(), "one is not known");
        for with_host in [[host.clone(), devices[1].clone()], [devices[1].clone(), host.clone()]] {
            assert_eq!(of(&with_host).unwrap().number(), 1);
        }
        assert!(of(&[host]).is_none() && of(&[]).is_none(), "nothing is staged");
        driver.fail("cuDeviceGetPCIBusId", 1, 1);
        assert!(of(&devices[1..2]).is_none(), "the driver does not say");
        for cpus in ["x", "1-"] {
            fs::write(nodes.join("node1/cpulist"), cpus).unwrap();
            assert!(of(&devices[1..2]).is_none());
        }
        fs::write(nodes.join("node1/cpulist"), "\n").unwrap();
        assert!(of(&devices[1..2]).unwrap().bind_thread(1).is_err(), "a node without processors");
        for memory in ["0\n", "0,2-3\n", "\n", "nonsense"] {
            fs::write(nodes.join("has_memory"), memory).unwrap();
            assert!(of(&devices[1..2]).is_none(), "{memory:?}: one node, or none of its number");
        }
    }

    #[test]
    fn a_thread_is_kept_on_processors_that_it_had_and_others_are_left_alone() {
        let before = sched_getaffinity(None).unwrap();
        let (first, count) = (numbers(&before)[0], before.count() as usize);
        let node = |cpus: &[usize]| {
            let mut set = CpuSet::new();
            cpus.iter().for_each(|&cpu| set.set(cpu));
            Node { number: 7, cpus: set }
        };
        let foreign: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&cpu| !before.is_set(cpu)).collect();
        let one = node(&[&foreign[..], &[first]].concat());
        let in_a_thread = |test: &(dyn Fn() + Sync)| std::thread::scope(|scope| scope.spawn(test).join().unwrap());
        in_a_thread(&|| {
            one.bind_thread(1).unwrap();
            assert_eq!(numbers(&sched_getaffinity(None).unwrap()), [first]);
            // What one processor leaves is what the next call may take.
            assert!(node(&(0..CpuSet::MAX_CPU).collect::<Vec<_>>()).bind_thread(1).is_ok());
            assert_eq!(numbers(&sched_getaffinity(None).unwrap()), [first]);
        });
        in_a_thread(&|| {
            let why = one.bind_thread(2).unwrap_err();
            assert!(why.contains("node 7") && why.contains("1 of their processors are there, for 2 threads"), "{why}");
            node(&foreign).bind_thread(1).unwrap_err();
            node(&(0..CpuSet::MAX_CPU).collect::<Vec<_>>()).bind_thread(count + 1).unwrap_err();
            assert_eq!(sched_getaffinity(None).unwrap(), before);
        });
        assert_eq!(sched_getaffinity(None).unwrap(), before);
    }
}
