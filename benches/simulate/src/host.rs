//! Hosts as rates, each of which was measured alone or is an assumption that the table names.

/// Rates of a host. Bytes, seconds, bytes a second.
#[derive(Debug, Clone)]
pub(crate) struct Host {
    pub(crate) name: String,
    pub(crate) cpus: usize,
    /// Devices, each with a link of its own.
    pub(crate) gpus: usize,
    /// One large pinned copy.
    pub(crate) link: f64,
    /// What a copy, or a batch of copies, costs the link beside its bytes.
    pub(crate) copy_overhead: f64,
    /// What issuing a copy costs the thread, in a batch too.
    pub(crate) copy_issue: f64,
    /// One thread, page cache to a buffer in the processor's cache.
    pub(crate) read_each: f64,
    /// What the memory moves, to and fro, all together.
    pub(crate) memory: f64,
    /// The last-level cache. Buffers that do not fit it go through the memory.
    pub(crate) cache_len: f64,
    /// CRC-64 of one thread.
    pub(crate) checksum: f64,
    pub(crate) disk: f64,
    pub(crate) disk_latency: f64,
    /// Touching and pinning memory, one thread and all.
    pub(crate) pin_each: f64,
    pub(crate) pin_total: f64,
    /// Registering mapped pages of the page cache, and releasing them after the load.
    pub(crate) register: f64,
    pub(crate) release: f64,
    /// Planning and allocating.
    pub(crate) setup: f64,
    /// Starting a thread.
    pub(crate) spawn: f64,
}

const GB: f64 = 1e9;
const GIB: f64 = (1u64 << 30) as f64;

impl Host {
    /// The host of `docs/benchmarks.md`. No rate here is a load's result.
    pub(crate) fn measured() -> Host {
        Host {
            name: "measured: H100, PCIe Gen5, 16 CPUs, virtual disk".into(),
            cpus: 16,
            gpus: 1,
            link: 54.8 * GB,
            // Copies of 256 KiB to 4 MiB came to 34.9 to 52.8 GB/s: 2.7 to 3.0 us each beside their bytes.
            copy_overhead: 2.9e-6,
            copy_issue: 2.6e-6,
            // One thread that reads into a ring and has it copied: 7 GB/s.
            read_each: 7.0 * GB,
            // Eight threads with pieces of 16 MiB, so that the ring is in no cache: 31 GB/s, four times over the
            // memory (see `Way::traffic`).
            memory: 124.0 * GB,
            // Not a rate: rings of 72 and 84 MiB kept their speed, those of 96 and 108 did not.
            cache_len: 90.0 * 1_048_576.0,
            checksum: 33.0 * GB,
            disk: 1.59 * GB,
            disk_latency: 1e-4,
            pin_each: 4.1 * GIB,
            pin_total: 29.7 * GIB,
            register: 8.0 * GIB / 0.16,
            release: 16.0 * GIB / 0.20,
            // Reports: 2.6 ms of planning and asking what is cached, 0.9 ms of allocating.
            setup: 3.5e-3,
            spawn: 1e-5,
        }
    }

    /// As measured, with some rates replaced.
    pub(crate) fn like_measured(name: &str, change: impl FnOnce(&mut Host)) -> Host {
        let mut host = Host { name: name.into(), ..Host::measured() };
        change(&mut host);
        host
    }
}
