//! The table of `docs/benchmarks.md`: hosts, what is loaded how, and the seconds.

use std::fmt::Write;

use crate::host::Host;
use crate::model::{Model, Piece};
use crate::pipeline::{From, Share, seconds};
use crate::way::{Engine, Way};

type Failure = Box<dyn std::error::Error>;

/// What is in the page cache, and who loads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Case {
    Warm,
    Cold,
    /// The first half of each file is cached.
    Half,
}

/// The shares of a load: cached and uncached pieces at once, as the loader divides them.
pub(crate) fn shares(
    model: &Model,
    case: Case,
    cached: Way,
    uncached: Way,
    devices: usize,
) -> Result<Vec<Share>, Failure> {
    let is_cached = |piece: &Piece| match case {
        Case::Warm => true,
        Case::Cold => false,
        Case::Half => piece.place.end <= 0.5,
    };
    // One plan is cut for both.
    let cached = if case == Case::Half { Way { piece_len: uncached.piece_len, ..cached } } else { cached };
    let mut shares = Vec::new();
    for (way, from) in [(cached, From::Cache), (uncached, From::Disk)] {
        let mut pieces = model.pieces(&way, devices)?;
        pieces.retain(|piece| is_cached(piece) == (from == From::Cache));
        if !pieces.is_empty() {
            shares.push(Share { way, from, pieces, first_device: 0 });
        }
    }
    let staged = shares.iter().filter(|share| share.way.buffers > 0).count();
    for share in &mut shares {
        share.way = share.way.fitted(staged);
    }
    Ok(shares)
}

/// Seconds of a load to the first device as the loader would do it.
pub(crate) fn predicted(host: &Host, model: &Model, case: Case) -> Result<f64, Failure> {
    let (cached, uncached) = (Way::cached(host, 1), Way::uncached());
    Ok(seconds(host, &shares(model, case, cached, uncached, 1)?))
}

/// A load that was measured, by a build with these sizes.
struct Measured {
    what: &'static str,
    case: Case,
    cached: Way,
    /// GB/s of one large copy on the host of that day.
    link: f64,
    /// GB/s, where it stands in `docs/benchmarks.md`.
    gb_per_s: f64,
    /// Why the simulation need not come near, where it does not.
    unexplained: Option<&'static str>,
}

impl Measured {
    fn seconds(&self, model: &Model) -> Result<f64, Failure> {
        let host = Host { link: self.link * 1e9, ..Host::measured() };
        let uncached = Way { batch: self.cached.batch, ..Way::uncached() };
        Ok(seconds(&host, &shares(model, self.case, self.cached, uncached, 1)?))
    }
}

const MIB: u64 = 1 << 20;

/// By builds that issued every piece at once.
fn before() -> [Measured; 10] {
    let pread =
        |lanes, piece_len, buffers, verify| Way { engine: Engine::Pread, lanes, buffers, piece_len, verify, batch: 1 };
    let link = Host::measured().link / 1e9;
    let one = |what, case, cached, gb_per_s| Measured { what, case, cached, link, gb_per_s, unexplained: None };
    let warm = |what, cached, gb_per_s| one(what, Case::Warm, cached, gb_per_s);
    let not = |why, row| Measured { unexplained: Some(why), ..row };
    // What is uncached needs no sizes of then: the disk is all that counts.
    let any = Way { batch: 1, ..Way::pread(12) };
    let in_place = Way { engine: Engine::Mapped, lanes: 1, buffers: 0, piece_len: 4 * MIB, verify: false, batch: 1 };
    [
        warm("warm, 12 threads, pieces of 3 MiB", pread(12, 3 * MIB, 2, false), 49.7),
        warm("warm, 10 threads, pieces of 3 MiB", pread(10, 3 * MIB, 2, false), 48.8),
        warm("warm, 12 threads, pieces of 2 MiB", pread(12, 2 * MIB, 2, false), 47.7),
        // A ring of 96 MiB.
        warm("warm, verified, 12 threads, chunks of 4 MiB", pread(12, 4 * MIB, 2, true), 26.7),
        // 32.1 to 34.0.
        warm("warm, 2 CPUs, pages in place", in_place, 33.0),
        // Medians of store and safetensors, 1.80 and 1.66.
        one("cold", Case::Cold, any, 1.73),
        // Likewise 3.11 and 3.47.
        one("half cached", Case::Half, any, 3.29),
        warm("warm, 16 CPUs, pages in place", in_place, 31.7),
        not("the driver's lock", warm("warm, 12 threads, pieces of 1 MiB", pread(12, MIB, 2, false), 27.8)),
        not("the cache's edge", warm("warm, 12 threads, 3 buffers of 3 MiB each", pread(12, 3 * MIB, 3, false), 44.1)),
    ]
}

/// By builds that issue pieces in batches, with several constants. Of these hosts' rates only the link was measured.
fn batched() -> [Measured; 15] {
    let way = Way { engine: Engine::Pread, lanes: 12, buffers: 2, piece_len: 3 * MIB, verify: false, batch: 8 };
    let of = |link, what, cached, gb_per_s| {
        let case = Case::Warm;
        Measured { what, case, cached, link, gb_per_s, unexplained: None }
    };
    let warm = |what, cached, gb_per_s| of(54.565, what, cached, gb_per_s);
    let present = Way { lanes: 14, piece_len: 2 * MIB, ..way };
    let not = |why, row| Measured { unexplained: Some(why), ..row };
    [
        of(55.06, "present build: batches of 8, 14 threads, 2 buffers of 2 MiB each", present, 52.42),
        of(55.12, "the same, on another host", present, 50.79),
        warm("batches of 8, 12 threads, 2 buffers of 3 MiB each", way, 52.65),
        warm("the same, batches of 1", Way { batch: 1, ..way }, 49.12),
        warm("the same, batches of 4", Way { batch: 4, ..way }, 51.54),
        warm("the same, batches of 16", Way { batch: 16, ..way }, 45.90),
        warm("the same, 2 buffers of 2 MiB", Way { piece_len: 2 * MIB, ..way }, 51.76),
        warm("the same, 3 buffers of 2 MiB", Way { piece_len: 2 * MIB, buffers: 3, ..way }, 52.42),
        warm("the same, 4 buffers of 1 MiB", Way { piece_len: MIB, buffers: 4, ..way }, 51.17),
        warm("the same, 14 threads", Way { lanes: 14, ..way }, 52.37),
        // Chunks of 4 MiB in two pieces.
        warm("the same, verified, 2 buffers of 2 MiB", Way { piece_len: 2 * MIB, verify: true, ..way }, 51.37),
        not("the driver's lock, or waking", warm("the same, 2 buffers of 1 MiB", Way { piece_len: MIB, ..way }, 43.88)),
        not("the cache's edge", warm("the same, 2 buffers of 4 MiB", Way { piece_len: 4 * MIB, ..way }, 51.29)),
        not(
            "the cache's edge",
            warm("the same, 4 buffers of 2 MiB", Way { piece_len: 2 * MIB, buffers: 4, ..way }, 52.15),
        ),
        not(
            "loads of 34.5 to 47.8",
            warm("the same, 8 threads, 3 buffers of 3 MiB", Way { lanes: 8, buffers: 3, ..way }, 39.70),
        ),
    ]
}

/// Hosts that were not at hand.
fn unseen() -> Vec<(Host, &'static str, Case)> {
    let nvme = Host::like_measured("as measured, 4 NVMe drives at 28 GB/s", |host| host.disk = 28e9);
    let gen4 = Host::like_measured("as measured, PCIe Gen4 x16 link at 26 GB/s", |host| host.link = 26e9);
    let gen4_nvme = Host { disk: 28e9, name: "the same, with the 4 NVMe drives".into(), ..gen4.clone() };
    let hopper = grace();
    let hopper_nvme = Host { disk: 28e9, name: "the same, with the 4 NVMe drives".into(), ..hopper.clone() };
    vec![
        (nvme.clone(), "cold", Case::Cold),
        (nvme, "half cached", Case::Half),
        (gen4.clone(), "warm", Case::Warm),
        (gen4_nvme, "cold", Case::Cold),
        (hopper.clone(), "warm", Case::Warm),
        (hopper_nvme, "cold", Case::Cold),
    ]
}

/// A GH200-like host: what makers say of memory and cache, what was published of the link; threads as measured here.
fn grace() -> Host {
    Host::like_measured("GH200-like: link 375 GB/s, 72 CPUs, memory 384 GB/s", |host| {
        (host.cpus, host.link, host.memory) = (72, 375e9, 384e9);
        host.cache_len = 114.0 * MIB as f64;
    })
}

/// A host of eight devices, each with the measured link.
fn eight() -> Host {
    Host::like_measured("8 GPUs, PCIe Gen5 each, 128 CPUs, memory 500 GB/s", |host| {
        (host.cpus, host.gpus, host.memory, host.cache_len) = (128, 8, 500e9, 200.0 * MIB as f64);
    })
}

/// The whole table.
pub(crate) fn markdown() -> Result<String, Failure> {
    let model = Model::named("llama8b")?;
    let gb = model.len() as f64 / 1e9;
    let mut out = String::new();
    let host = Host::measured();
    writeln!(out, "| {} | predicted s | GB/s | measured GB/s | difference |\n|---|---|---|---|---|", host.name)?;
    for row in before().into_iter().chain(batched()) {
        let Measured { what, gb_per_s, unexplained, .. } = row;
        let seconds = row.seconds(&model)?;
        let rate = gb / seconds;
        let off = (rate / gb_per_s - 1.0) * 100.0;
        let why = unexplained.map(|why| format!(", not explained: {why}")).unwrap_or_default();
        writeln!(out, "| {what} | {seconds:.3} | {rate:.2} | {gb_per_s:.2} | {off:+.0} %{why} |")?;
    }
    writeln!(out, "\n| host | load | predicted s | GB/s |\n|---|---|---|---|")?;
    for (host, what, case) in unseen() {
        let seconds = predicted(&host, &model, case)?;
        writeln!(out, "| {} | {what} | {seconds:.3} | {:.1} |", host.name, gb / seconds)?;
    }
    let host = eight();
    for (what, seconds, bytes) in eight_ways(&host, &model)? {
        writeln!(out, "| {} | {what} | {seconds:.3} | {:.1} |", host.name, bytes / 1e9 / seconds)?;
    }
    Ok(out)
}

/// Loads of eight devices: what is done, seconds, bytes that arrive.
fn eight_ways(host: &Host, model: &Model) -> Result<Vec<(String, f64, f64)>, Failure> {
    let len = model.len() as f64;
    let gpus = host.gpus;
    let mut rows = Vec::new();
    let one = Way::cached(host, 1);
    for way in [Way::cached(host, gpus).fitted(1), one] {
        let what = format!("warm, one process, tensors over {gpus} devices, {} threads", way.lanes);
        rows.push((what, seconds(host, &shares(model, Case::Warm, way, Way::uncached(), gpus)?), len));
    }
    // Each process takes the whole model to its own device.
    let one = shares(model, Case::Warm, one, Way::uncached(), 1)?;
    let all: Vec<Share> = (0..gpus)
        .flat_map(|first_device| one.iter().map(move |share| Share { first_device, ..share.clone() }))
        .collect();
    rows.push((
        format!("warm, {gpus} processes, the whole model to each device"),
        seconds(host, &all),
        len * gpus as f64,
    ));
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_measured_host_is_predicted_to_a_tenth() {
        let model = Model::named("llama8b").unwrap();
        let gb = model.len() as f64 / 1e9;
        let rows = before().into_iter().chain(batched()).filter(|row| row.unexplained.is_none());
        for row in rows {
            let Measured { what, gb_per_s, .. } = row;
            let rate = gb / row.seconds(&model).unwrap();
            assert!((rate / gb_per_s - 1.0).abs() < 0.1, "{what}: {rate:.2} for {gb_per_s}");
        }
    }

    #[test]
    fn half_cached_takes_both_ways_and_loses_no_piece() {
        let model = Model::named("many:0.5").unwrap();
        let whole = model.pieces(&Way::uncached(), 1).unwrap().len();
        let shares = shares(&model, Case::Half, Way::cached(&Host::measured(), 1), Way::uncached(), 1).unwrap();
        assert_eq!(shares.iter().map(|share| share.from).collect::<Vec<_>>(), [From::Cache, From::Disk]);
        assert_eq!(shares.iter().map(|share| share.pieces.len()).sum::<usize>(), whole);
    }
}
