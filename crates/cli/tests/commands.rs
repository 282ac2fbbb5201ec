//! What each subcommand prints and makes when all is well.

mod common;

use std::fs;
use std::path::Path;

use common::{model, run, sllm};
use serde_json::json;

#[test]
fn convert_makes_a_store_and_tells_of_it() {
    let fixture = model();
    let store = fixture.path("store");
    let ran = run("convert", &[&fixture.model, &store], &["--threads", "1"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stdout.contains("3 tensors") && ran.stdout.contains("identity "), "{}", ran.stdout);
    assert!(ran.stderr.contains("convert: 100% ("), "{}", ran.stderr);
    for name in ["manifest.json", "tensor_index.json", "tensor.data_0", "config.json"] {
        assert!(store.join(name).is_file(), "{name}");
    }
}

#[test]
fn convert_overwrites_only_when_asked() {
    let fixture = model();
    let store = fixture.store();
    assert_eq!(run("convert", &[&fixture.model, &store], &[]).code, 7);
    assert_eq!(run("convert", &[&fixture.model, &store], &["--overwrite"]).code, 0);
}

#[test]
fn export_gives_the_source_back() {
    let fixture = model();
    let (store, back) = (fixture.store(), fixture.path("back"));
    fs::write(store.join("other.bin"), "").unwrap();
    let ran = run("export", &[&store, &back], &["--json"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!((&ran.json()["tensors"], &ran.json()["skipped"]), (&json!(3), &json!(["other.bin"])));
    let ran = run("export", &[&store, &fixture.path("again")], &[]);
    assert!(ran.stdout.ends_with("not copied: other.bin\n"), "{}", ran.stdout);
    let (old, new) =
        (fs::read(fixture.model.join("model.safetensors")).unwrap(), fs::read(back.join("model.safetensors")).unwrap());
    let (old, new) =
        (safetensors::SafeTensors::deserialize(&old).unwrap(), safetensors::SafeTensors::deserialize(&new).unwrap());
    for (name, tensor) in old.tensors() {
        assert_eq!(new.tensor(&name).unwrap(), tensor);
    }
    assert_eq!(fs::read(back.join("config.json")).unwrap(), b"{}");
}

#[test]
fn inspect_shows_the_summary_and_the_tensors() {
    let fixture = model();
    let store = fixture.store();
    let ran = run("inspect", &[&store], &[]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stdout.contains("layout    store\nidentity  "), "{}", ran.stdout);
    let line = ran.stdout.lines().find(|line| line.ends_with("embed.weight")).unwrap();
    assert_eq!(
        line.split_whitespace().collect::<Vec<_>>(),
        ["BF16", "[350,", "100]", "70000", "4096", "tensor.data_0", "embed.weight"]
    );
    assert_eq!(ran.stderr, "");

    let ran = run("inspect", &[&store], &["--tensors", "norm.*"]);
    assert!(ran.stdout.contains("norm.weight") && !ran.stdout.contains("embed.weight"), "{}", ran.stdout);
}

#[test]
fn inspect_json_holds_the_same() {
    let fixture = model();
    let converted = run("convert", &[&fixture.model, &fixture.path("store")], &["--json"]).json();
    let of_store = run("inspect", &[&fixture.path("store")], &["--json"]).json();
    assert_eq!(of_store["identity"], converted["identity"]);
    assert_eq!(of_store["tensor_count"], 3);
    assert_eq!(of_store["bytes"], 70_067);
    assert_eq!(of_store["chunk_len"], 4 << 20);
    assert_eq!(of_store["dtypes"]["F32"], json!({"tensors": 1, "bytes": 64}));
    assert_eq!(of_store["files"][0]["name"], "tensor.data_0");

    let of_source = run("inspect", &[&fixture.model], &["--json", "--tensors", "norm.bias"]).json();
    assert_eq!(of_source["layout"], "safetensors");
    assert_eq!(of_source["identity"], json!(null));
    assert_eq!(of_source["tensor_count"], 3);
    let tensors = of_source["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), 1);
    assert_eq!(tensors[0]["shape"], json!([3]));
    assert_eq!(tensors[0]["file"], "model.safetensors");
}

#[test]
fn inspect_counts_no_tensors_at_all() {
    let fixture = model();
    let path = fixture.path("empty.safetensors");
    fs::write(&path, b"\x02\0\0\0\0\0\0\0{}").unwrap();
    let ran = run("inspect", &[&path], &[]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stdout.contains("tensors   0\nbytes     0 (0 B)\n"), "{}", ran.stdout);
}

#[test]
fn inspect_escapes_names_that_a_terminal_would_obey() {
    let fixture = model();
    let path = fixture.path("odd.safetensors");
    let header = br#"{"a\u001b[2J":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#;
    fs::write(&path, test_support::safetensors(header, &[])).unwrap();
    let ran = run("inspect", &[&path], &[]);
    assert!(ran.stdout.contains("a\\u{1b}[2J") && !ran.stdout.contains('\u{1b}'), "{:?}", ran.stdout);
}

#[test]
fn verify_of_a_good_store_is_well() {
    let fixture = model();
    let store = fixture.store();
    let ran = run("verify", &[&store], &[]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stdout.contains(": 1 chunk as stored, "), "{}", ran.stdout);
    let json = run("verify", &[&store], &["--json"]).json();
    assert_eq!(json["corrupt"], json!([]));
    assert_eq!(json.get("error"), None);
}

#[test]
fn load_tells_how_it_went() {
    let fixture = model();
    let store = fixture.store();
    for engine in ["auto", "pread", "mapped"] {
        let ran = run("load", &[&store], &["--device", "host", "--engine", engine]);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        assert!(ran.stdout.contains("3 tensors") && !ran.stdout.contains("median"), "{}", ran.stdout);
        assert!(ran.stderr.contains("load: 100% ("), "{}", ran.stderr);
    }
}

#[test]
fn load_to_a_card_is_set_beside_its_link_whose_peak_is_remembered() {
    let fixture = model();
    let (store, cache) = (fixture.store(), fixture.path("cache"));
    let load = |options: &[&str]| {
        let mut command = sllm(["load".as_ref(), store.as_os_str(), "--device=cuda:0".as_ref()]);
        let output = command
            .args(options)
            .env("LD_LIBRARY_PATH", cuda::Driver::find().parent().unwrap())
            .env("XDG_CACHE_HOME", &cache)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let json: serde_json::Value = serde_json::from_str(&load(&["--json", "--repeat", "2"])).unwrap();
    let file = fs::read_to_string(cache.join("sllm/links.json")).unwrap();
    let links: serde_json::Value = serde_json::from_str(&file).unwrap();
    let remembered = links["links"].as_object().unwrap().values().next().unwrap()["gb_per_s"].as_f64().unwrap();
    for run in json["runs"].as_array().unwrap() {
        let number = |name: &str| run[name].as_f64().unwrap();
        assert_eq!(number("link_gb_per_s").to_bits(), remembered.to_bits());
        assert!((number("of_link") * remembered - number("gb_per_s")).abs() < 1e-9, "{run}");
        assert_eq!(run["link_measured"].as_str().unwrap().len(), "2026-11-25".len());
    }
    let text = load(&[]);
    assert!(text.contains("\n  limit: ") && text.contains(" % of this link ("), "{text}");
    assert_eq!(fs::read_to_string(cache.join("sllm/links.json")).unwrap(), file, "it was measured again");

    let to_host = run("load", &[&store], &["--device", "host"]).stdout;
    assert!(to_host.contains("\n  limit: ") && !to_host.contains("link"), "{to_host}");
}

#[test]
fn bash_completes_options_and_values_of_subcommands() {
    let script = run("completions", &[], &["bash"]).stdout;
    let complete = r#"
        words() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _sllm__store sllm-store "${@: -1}" "${@: -2:1}"; echo "${COMPREPLY[@]}"; }
        words sllm-store ver
        words sllm-store load --dir
        words sllm-store load --engine ""
        words sllm-store evict --al
        words sllm-store completions f
    "#;
    let output = std::process::Command::new("bash").args(["-c", &format!("{script}\n{complete}")]).output().unwrap();
    let completed = String::from_utf8(output.stdout).unwrap();
    assert_eq!(completed, "verify\n--direct\nauto uring pread mapped\n--all\nfish\n", "{:?}", output.stderr);
}

#[test]
fn load_says_once_why_a_driver_that_is_there_was_not_used() {
    let fixture = model();
    let store = fixture.store();
    let load = |options: &[&str], environment: &[(&str, &str)]| {
        let mut command = sllm(["load".as_ref(), store.as_os_str()]);
        let output = command
            .args(options)
            .env("LD_LIBRARY_PATH", cuda::Driver::find().parent().unwrap())
            .env("XDG_CACHE_HOME", fixture.path("cache"))
            .envs(environment.iter().copied())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let fails = [("FAKE_CUDA_FAIL", "cuInit:1:802")];
    let text = load(&["--repeat", "2"], &fails);
    let note =
        "cuda: cannot initialise the driver: CUDA_ERROR_SYSTEM_NOT_READY (802); --device auto takes the host's memory";
    assert!(text.contains(" to host\n") && text.matches(note).count() == 1, "{text}");
    let json: serde_json::Value = serde_json::from_str(&load(&["--json"], &fails)).unwrap();
    assert!(json["runs"][0]["notes"].as_array().unwrap().contains(&note.into()), "{json}");
    // It is no news that there is no device, or that the host was asked for.
    for quiet in [load(&[], &[("FAKE_CUDA_DEVICES", "0")]), load(&["--device", "host"], &fails)] {
        assert!(quiet.contains(" to host\n") && !quiet.contains("driver"), "{quiet}");
    }
    assert!(load(&[], &[]).contains(" to cuda:0"));
}

#[test]
fn load_repeats_and_tells_the_median() {
    let fixture = model();
    let store = fixture.store();
    let options = ["--device", "host", "--verify", "--repeat", "3", "--threads", "2", "--pinned", "8MiB"];
    let ran = run("load", &[&store], &options);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stdout.contains("\nmedian of 3 runs: "), "{}", ran.stdout);

    let json = run("load", &[&store], &[&options[..], &["--json"]].concat()).json();
    let runs = json["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 3);
    let mut seconds: Vec<f64> = runs.iter().map(|run| run["seconds"].as_f64().unwrap()).collect();
    seconds.sort_unstable_by(f64::total_cmp);
    assert_eq!(json["median"]["seconds"].as_f64().unwrap().to_bits(), seconds[1].to_bits());
    for run in runs {
        assert_eq!((&run["verified"], &run["tensors"]), (&json!(true), &json!(3)));
        assert_eq!(run["devices"], json!(["host"]));
        assert!(run["gb_per_s"].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn load_takes_a_part_and_any_layout() {
    let fixture = model();
    for direct in ["auto", "off"] {
        let options =
            ["--device", "cpu", "--tensors", "norm.bias", "--tensors", "norm.w*", "--direct", direct, "--json"];
        let ran = run("load", &[&fixture.model], &options);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let run = &ran.json()["runs"][0];
        assert_eq!((&run["tensors"], &run["layout"]), (&json!(2), &json!("safetensors")));
    }
}

#[test]
fn quiet_is_quiet() {
    let fixture = model();
    let (store, back) = (fixture.path("store"), fixture.path("back"));
    let commands: [(&str, Vec<&Path>); 6] = [
        ("convert", vec![&fixture.model, &store]),
        ("export", vec![&store, &back]),
        ("inspect", vec![&store]),
        ("verify", vec![&store]),
        ("load", vec![&store]),
        ("prefetch", vec![&store]),
    ];
    for (word, paths) in commands {
        let ran = run(word, &paths, &["--quiet"]);
        assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (0, "", ""), "{word}");
    }
    let ran = run("verify", &[&store], &["--quiet", "--json"]);
    assert_eq!(ran.stderr, "");
    assert_eq!(ran.json()["chunks"], 1);
}

#[test]
fn completions_are_written_for_every_shell() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let ran = run("completions", &[], &[shell]);
        assert_eq!(ran.code, 0);
        assert!(ran.stdout.contains("sllm-store") && ran.stdout.contains("inspect"), "{shell}");
    }
}

#[test]
fn help_lists_the_exit_codes() {
    let help = run("--help", &[], &[]);
    assert_eq!((help.code, help.stderr.as_str()), (0, ""));
    for line in ["    1  stored bytes are corrupt", "   10  too little device memory", "  130  cancelled"] {
        assert!(help.stdout.contains(line), "{}", help.stdout);
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let fixture = model();
    let store = fixture.store();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut child = std::process::Command::new(sllm([""; 0]).get_program())
        .args(["inspect".as_ref(), store.as_os_str()])
        .stdout(writer)
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn prefetch_reads_all_of_it() {
    let fixture = model();
    let ran = run("prefetch", &[&fixture.model], &["--json", "--eager"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let report = ran.json();
    let len = fs::metadata(fixture.model.join("model.safetensors")).unwrap().len();
    assert_eq!((&report["end"], &report["bytes"]), (&json!("complete"), &json!(len)));
    assert_eq!(report["cached_bytes"].as_u64().unwrap() + report["read_bytes"].as_u64().unwrap(), len);
    let limited = run("prefetch", &[&fixture.model], &["--json", "--limit", "1KB"]);
    assert_eq!(limited.json()["end"], json!("limit"));
}

#[test]
fn prefetch_in_the_background_returns_the_process_that_reads() {
    let fixture = model();
    let ran = run("prefetch", &[&fixture.model], &["--background"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert!(ran.stdout.contains("being read into the page cache by process "), "{}", ran.stdout);
    let missing = run("prefetch", &[&fixture.path("nothing")], &["--background"]);
    assert_eq!(missing.code, 3, "what is not there is told before the process is made");
}
