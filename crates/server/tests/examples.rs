//! The settings of `examples/server` are settings that the server takes.

use std::fs;
use std::path::{Path, PathBuf};

use sllm_server::{Config, Settings};

fn sample() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/server/sllm-store.toml")
}

/// The sample with the keys turned on that are off in it: lines that begin with # and no space.
fn all_keys_on() -> Settings {
    let text = fs::read_to_string(sample()).unwrap();
    let on = |line: &str| match line.strip_prefix('#') {
        Some(key) if key.starts_with(|c: char| c.is_ascii_lowercase()) => format!("{key}\n"),
        _ => format!("{line}\n"),
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("all.toml");
    fs::write(&path, text.lines().map(on).collect::<String>()).unwrap();
    Settings::from_file(&path).unwrap()
}

#[test]
fn the_sample_resolves_as_it_is() {
    let config = Settings::from_file(&sample()).unwrap().resolve(None).unwrap();
    assert_eq!((config.storage_path, config.pool_len), ("/models".into(), 64 << 30));
}

#[test]
fn the_sample_has_every_key() {
    // A key that is new does not compile here before it is named, and fails before it is in the sample.
    let Settings {
        storage_path,
        mem_pool_size,
        chunk_size,
        num_thread,
        registration_required,
        host,
        port,
        listen,
        metrics_listen,
        preload,
        pin,
        ttl,
        quota,
        verify,
        max_loads,
        drain_seconds,
        gpu_idle_seconds,
        token_file,
    } = all_keys_on();
    let keys = [
        ("storage_path", storage_path.is_some()),
        ("mem_pool_size", mem_pool_size.is_some()),
        ("chunk_size", chunk_size.is_some()),
        ("num_thread", num_thread.is_some()),
        ("registration_required", registration_required.is_some()),
        ("host", host.is_some()),
        ("port", port.is_some()),
        ("listen", !listen.is_empty()),
        ("metrics_listen", metrics_listen.is_some()),
        ("preload", !preload.is_empty()),
        ("pin", !pin.is_empty()),
        ("ttl", ttl.is_some()),
        ("quota", !quota.is_empty()),
        ("verify", verify.is_some()),
        ("max_loads", max_loads.is_some()),
        ("drain_seconds", drain_seconds.is_some()),
        ("gpu_idle_seconds", gpu_idle_seconds.is_some()),
        ("token_file", token_file.is_some()),
    ];
    let missing: Vec<_> = keys.iter().filter(|(_, there)| !there).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn keys_that_are_off_in_the_sample_show_the_defaults() {
    let mut settings = all_keys_on();
    // It names a file of another machine.
    settings.token_file = None;
    let (shown, default) = (settings.resolve(None).unwrap(), Config::new("/"));
    assert_eq!(shown.chunk_len, default.chunk_len);
    assert_eq!(shown.registration_required, default.registration_required);
    assert_eq!(shown.verify, default.verify);
    assert_eq!(shown.max_loads, default.max_loads);
    assert_eq!(shown.drain, default.drain);
    assert_eq!(shown.gpu_idle, default.gpu_idle);
}
