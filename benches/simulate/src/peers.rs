//! A run of the peers' comparison: its limits put in, its own figures beside what comes out.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use serde_json::Value;
use sllm_core::tuning;

use crate::host::Host;
use crate::model::Model;
use crate::pipeline::seconds;
use crate::table::{Case, shares};
use crate::way::Way;

type Failure = Box<dyn std::error::Error>;

/// Where a figure was taken: model, state, processors.
type Place = (String, String, String);

/// One measurement of OUT.json.
struct Run {
    place: Place,
    name: String,
    rate: f64,
    /// Bytes a second of releasing what was registered.
    release: Option<f64>,
}

fn runs(data: &Value) -> Vec<Run> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let run = |run: &Value| {
        let (seconds, bytes) = (run["seconds"].as_f64()?, run["bytes"].as_f64()?);
        let release = run["release_seconds"].as_f64().map(|seconds| bytes / seconds);
        let place = (text(&run["model"]), text(&run["state"]), text(&run["cpus"]));
        Some(Run { place, name: text(&run["name"]), rate: bytes / seconds, release })
    };
    data["runs"].as_array().into_iter().flatten().filter_map(run).collect()
}

fn median(rates: impl Iterator<Item = f64>) -> Option<f64> {
    let mut rates: Vec<f64> = rates.collect();
    rates.sort_by(f64::total_cmp);
    let (low, high) = (rates.len().checked_sub(1)? / 2, rates.len() / 2);
    Some(rates[low].midpoint(rates[high]))
}

/// The host whose limits a run took; what it did not take is as measured elsewhere.
fn host_of(data: &Value, runs: &[Run], place: &Place) -> Host {
    let cpus = data["host"]["cpus"].as_u64().and_then(|cpus| usize::try_from(cpus).ok());
    let limit = |name: &str| median(runs.iter().filter(|run| run.name == name).map(|run| run.rate));
    let floors: BTreeMap<&str, ()> =
        runs.iter().filter(|run| run.name.starts_with("floor")).map(|run| (run.name.as_str(), ())).collect();
    let here = |name: &str| {
        let mine = |run: &&Run| run.name == name && run.place.0 == place.0 && run.place.1 == place.1;
        median(runs.iter().filter(mine).map(|run| run.rate))
    };
    let best = floors.keys().filter_map(|name| here(name).or_else(|| limit(name))).max_by(f64::total_cmp);
    Host::like_measured("the peers' host", |host| {
        host.cpus = if place.2.is_empty() { cpus.unwrap_or(host.cpus) } else { cpus_in(&place.2) };
        host.link = limit("copy peak").unwrap_or(host.link);
        host.read_each = limit("page cache, 1 thread").unwrap_or(host.read_each);
        host.register = limit("register file pages").unwrap_or(host.register);
        host.release = median(runs.iter().filter_map(|run| run.release)).unwrap_or(host.release);
        host.disk = best.unwrap_or(host.disk);
    })
}

/// Processors in a list such as `0,2-5`.
fn cpus_in(list: &str) -> usize {
    let count = |part: &str| match part.split_once('-') {
        Some((first, last)) => Some(last.parse::<usize>().ok()?.checked_sub(first.parse().ok()?)? + 1),
        None => part.parse::<usize>().ok().map(|_| 1),
    };
    list.split(',').filter_map(count).sum::<usize>().max(1)
}

/// How a loader of ours reads cached and uncached bytes, by its name in `benches/peers/loaders.py`.
fn ways(name: &str, host: &Host) -> Option<(Way, Way)> {
    match name {
        // Where checksums are compared, the device takes them.
        "ours-store" | "ours-safetensors" | "ours-verify" => Some((Way::cached(host, 1), Way::uncached())),
        "ours-pread" => Some((Way::pread(tuning::cached_lanes(host.cpus, 1)), Way::uncached_pread())),
        "ours-mapped" => Some((Way::mapped(), Way::uncached())),
        _ => None,
    }
}

/// Predictions for what a run measured of ours.
pub(crate) fn markdown(path: &Path) -> Result<String, Failure> {
    let data: Value = serde_json::from_slice(&fs::read(path)?)?;
    if data["host"]["device"] == "cpu" {
        return Err("the run loaded to host memory; the simulation is of loads to a GPU".into());
    }
    let runs = runs(&data);
    let mut out = String::from("| load | predicted GB/s | measured GB/s | difference |\n|---|---|---|---|\n");
    let mut done: Vec<(&Place, &str)> = Vec::new();
    for Run { place, name, .. } in &runs {
        let host = host_of(&data, &runs, place);
        let Some((cached, uncached)) = ways(name, &host) else { continue };
        if done.contains(&(place, name)) {
            continue;
        }
        done.push((place, name));
        let case = match place.1.as_str() {
            "warm" => Case::Warm,
            "cold" => Case::Cold,
            _ => Case::Half,
        };
        let model = Model::named(&place.0)?;
        let seconds = seconds(&host, &shares(&model, case, cached, uncached, 1)?);
        let rate = model.len() as f64 / seconds / 1e9;
        let mine = runs.iter().filter(|run| run.place == *place && run.name == *name).map(|run| run.rate / 1e9);
        let measured = median(mine).ok_or("nothing was measured")?;
        let off = (rate / measured - 1.0) * 100.0;
        let cpus = if place.2.is_empty() { String::new() } else { format!(", CPUs {}", place.2) };
        writeln!(out, "| {}, {}{cpus}, {name} | {rate:.2} | {measured:.2} | {off:+.0} % |", place.0, place.1)?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(state: &str, cpus: Option<&str>, name: &str, bytes: f64, seconds: f64) -> Value {
        serde_json::json!({"model": "many:1", "state": state, "cpus": cpus, "name": name, "round": 0,
                           "bytes": bytes, "seconds": seconds})
    }

    #[test]
    fn a_runs_limits_take_the_place_of_the_measured_hosts() {
        let data = serde_json::json!({"host": {"device": "X", "cpus": 24}, "runs": [
            run("warm", None, "copy peak", 1e9, 0.05), run("warm", None, "copy peak", 1e9, 0.1),
            run("warm", None, "copy peak", 1e9, 0.1), run("cold", None, "floor, direct, 4 threads", 6e9, 2.0),
            run("cold", None, "floor, buffered, 4 threads", 4e9, 2.0), {"name": "ours-store", "failed": "so"},
        ]});
        let runs = runs(&data);
        assert_eq!(runs.len(), 5);
        let place = |cpus: &str| ("many:1".into(), "cold".into(), cpus.into());
        let host = host_of(&data, &runs, &place(""));
        assert_eq!((host.link, host.disk, host.cpus), (1e10, 3e9, 24));
        assert_eq!(host.read_each, Host::measured().read_each);
        assert_eq!(host_of(&data, &runs, &place("0,4-6")).cpus, 4);
    }

    #[test]
    fn a_run_is_predicted_row_by_row_and_no_faster_than_its_link() {
        let mut runs = vec![run("warm", None, "copy peak", 1e9, 0.1), run("warm", None, "safetensors", 1e9, 0.5)];
        runs.extend(
            ["ours-store", "ours-verify", "ours-pread", "ours-mapped"].map(|n| run("warm", None, n, 1e9, 0.125)),
        );
        runs.push(run("warm", None, "ours-store", 1e9, 0.125));
        let data = serde_json::json!({"host": {"device": "X", "cpus": 24}, "runs": runs});
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.json");
        fs::write(&path, data.to_string()).unwrap();
        let table = markdown(&path).unwrap();
        let rows: Vec<Vec<&str>> = table.lines().skip(2).map(|line| line.split('|').map(str::trim).collect()).collect();
        assert_eq!(rows.len(), 4, "{table}");
        for row in rows {
            let predicted: f64 = row[2].parse().unwrap();
            assert!((5.0..10.0).contains(&predicted), "{table}");
            assert_eq!(row[3], "8.00");
        }
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(median([4.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), Some(2.5));
        assert_eq!(median(std::iter::empty()), None);
    }
}
