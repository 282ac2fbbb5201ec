//! The report of a process, written at its exit.

use crate::control::counters;
use crate::state::{State, forked, lock};
use std::fmt::Write;

/// Where the environment wants the report.
pub(crate) fn path_of_environment() -> Option<String> {
    let path = std::env::var("FAKE_CUDA_REPORT").ok().filter(|path| !path.is_empty())?;
    Some(path.replace("%p", &std::process::id().to_string()))
}

/// Has the report written when the process ends by returning from `main` or by `exit`.
pub(crate) fn write_at_exit() {
    // SAFETY: the library is never unloaded (it is linked with nodelete), so the function stays.
    unsafe { libc::atexit(at_exit) };
}

extern "C" fn at_exit() {
    // A forked child must not write over its parent's report, and its lock may be held for ever.
    if forked() {
        return;
    }
    let state = lock();
    if let Some(path) = &state.report
        && let Err(error) = std::fs::write(path, json(&state))
    {
        eprintln!("fake-cuda: cannot write the report to {path}: {error}");
    }
}

/// The report. Names are plain, so nothing needs escaping.
fn json(state: &State) -> String {
    let mut text = format!("{{\n  \"pid\": {},\n", std::process::id());
    for (name, value) in counters(state) {
        let _ = writeln!(text, "  \"{name}\": {value},");
    }
    let list = |values: Vec<String>| values.join(", ");
    let left = state.devices.iter().map(|(ordinal, device)| format!("\"{ordinal}\": {}", device.used)).collect();
    let peak = state.devices.iter().map(|(ordinal, device)| format!("\"{ordinal}\": {}", device.peak)).collect();
    let calls = state.calls.iter().map(|(symbol, calls)| format!("\"{symbol}\": {calls}")).collect();
    let lost = state.devices.values().filter(|device| device.lost).count();
    let _ = writeln!(text, "  \"lost_devices\": {lost},");
    let _ = writeln!(text, "  \"device_bytes\": {{{}}},", list(left));
    let _ = writeln!(text, "  \"device_bytes_peak\": {{{}}},", list(peak));
    let _ = writeln!(text, "  \"calls\": {{{}}}\n}}", list(calls));
    text
}
