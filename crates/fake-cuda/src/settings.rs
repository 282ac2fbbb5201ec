//! What a test can set: by the environment or by the control functions.

use crate::codes::{self, Code};
use std::str::FromStr;
use std::time::Duration;

/// Most devices that can be asked for.
pub(crate) const MAX_DEVICES: u64 = 64;

/// Longest delay, so that clock arithmetic cannot overflow.
const MAX_DELAY: Duration = Duration::from_secs(3600);

/// The limits and delays of the driver.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Devices that exist.
    pub(crate) devices: u64,
    /// Bytes of each device.
    pub(crate) memory: u64,
    /// Time from a call to its copy.
    pub(crate) delay: Duration,
    /// Bytes per second of a device in each direction, 0 = no limit.
    pub(crate) bandwidth: u64,
    /// Copies that succeed before the device is lost, `u64::MAX` = never.
    pub(crate) lose_after: u64,
    /// Bytes of the largest single registration.
    pub(crate) register_limit: u64,
    /// Bytes registered at once.
    pub(crate) registered_total: u64,
    /// Whether memory cannot be exported.
    pub(crate) no_ipc: bool,
    /// Copies from the host before the one that brings a wrong bit.
    pub(crate) spoil_after: u64,
}

impl Settings {
    pub(crate) const fn new() -> Self {
        Self {
            devices: 1,
            memory: 1 << 30,
            delay: Duration::from_micros(300),
            bandwidth: 0,
            lose_after: u64::MAX,
            register_limit: 1 << 30,
            registered_total: u64::MAX,
            no_ipc: false,
            spoil_after: u64::MAX,
        }
    }

    /// Sets one value by its name. False if there is no such setting.
    pub(crate) fn set(&mut self, name: &str, value: u64) -> bool {
        match name {
            "devices" => self.devices = value.min(MAX_DEVICES),
            "memory" => self.memory = value,
            "delay_us" => self.delay = Duration::from_micros(value).min(MAX_DELAY),
            "bandwidth" => self.bandwidth = value,
            "lose_after" => self.lose_after = value,
            "register_limit" => self.register_limit = value,
            "registered_total" => self.registered_total = value,
            "no_ipc" => self.no_ipc = value != 0,
            "spoil_after" => self.spoil_after = value,
            _ => return false,
        }
        true
    }

    /// Overrides the values that the environment names.
    pub(crate) fn read_environment(&mut self) {
        for (variable, name) in [
            ("FAKE_CUDA_DEVICES", "devices"),
            ("FAKE_CUDA_MEMORY", "memory"),
            ("FAKE_CUDA_DELAY_US", "delay_us"),
            ("FAKE_CUDA_BANDWIDTH", "bandwidth"),
            ("FAKE_CUDA_LOST_AFTER", "lose_after"),
            ("FAKE_CUDA_REGISTER_LIMIT", "register_limit"),
            ("FAKE_CUDA_REGISTERED_TOTAL", "registered_total"),
            ("FAKE_CUDA_NO_IPC", "no_ipc"),
        ] {
            let Ok(text) = std::env::var(variable) else {
                continue;
            };
            match text.trim().parse() {
                Ok(value) => {
                    self.set(name, value);
                }
                Err(_) => eprintln!("fake-cuda: {variable}={text} is not a number and is ignored"),
            }
        }
    }
}

/// One call that is to fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    symbol: String,
    /// Calls up to and including the failing one.
    remaining: u64,
    code: Code,
}

impl Fault {
    pub(crate) fn new(symbol: &str, nth: u64, code: Code) -> Self {
        Self { symbol: symbol.to_owned(), remaining: nth.max(1), code: codes::known(code) }
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is not symbol:nth[:code]");
        let mut parts = text.trim().split(':');
        let symbol = parts.next().filter(|symbol| !symbol.is_empty()).ok_or_else(wrong)?;
        let nth = parts.next().and_then(|nth| nth.parse().ok()).filter(|nth| *nth > 0).ok_or_else(wrong)?;
        let code = parts.next().map_or(Ok(codes::UNKNOWN), |code| code.parse().map_err(|_| wrong()))?;
        if parts.next().is_some() {
            return Err(wrong());
        }
        Ok(Self::new(symbol, nth, code))
    }
}

/// The faults of `FAKE_CUDA_FAIL`.
pub(crate) fn faults_of_environment() -> Vec<Fault> {
    let text = std::env::var("FAKE_CUDA_FAIL").unwrap_or_default();
    let parse = |one: &str| one.parse().inspect_err(|error| eprintln!("fake-cuda: FAKE_CUDA_FAIL: {error}")).ok();
    text.split(',').filter(|one| !one.trim().is_empty()).filter_map(parse).collect()
}

/// Counts a call against the faults. The code of the one that is due, if any; it is then used up.
pub(crate) fn due_fault(faults: &mut Vec<Fault>, symbol: &str) -> Option<Code> {
    let mut due = None;
    faults.retain_mut(|fault| {
        if !same_symbol(&fault.symbol, symbol) {
            return true;
        }
        fault.remaining -= 1;
        if fault.remaining == 0 {
            due.get_or_insert(fault.code);
        }
        fault.remaining > 0
    });
    due
}

/// Whether a name that a test gives means `symbol`: the name itself, or the name without its version.
pub(crate) fn same_symbol(name: &str, symbol: &str) -> bool {
    if name == symbol {
        return true;
    }
    let version = symbol.strip_prefix(name).and_then(|rest| rest.strip_prefix("_v"));
    version.is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_due_at_its_nth_call_only() {
        let mut faults = vec!["cuMemAlloc:2:2".parse::<Fault>().unwrap()];
        assert_eq!(due_fault(&mut faults, "cuMemAlloc_v2"), None);
        assert_eq!(due_fault(&mut faults, "cuMemAllocHost_v2"), None);
        assert_eq!(due_fault(&mut faults, "cuMemAlloc_v2"), Some(2));
        assert_eq!(due_fault(&mut faults, "cuMemAlloc_v2"), None);
    }

    #[test]
    fn malformed_faults_are_refused() {
        for text in ["", "cuInit", "cuInit:0", "cuInit:x", "cuInit:1:y", "cuInit:1:2:3", ":1"] {
            assert!(text.parse::<Fault>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_code_the_driver_does_not_have_becomes_unknown() {
        assert_eq!("cuInit:1:12345".parse::<Fault>().unwrap().code, codes::UNKNOWN);
        assert_eq!("cuInit:1".parse::<Fault>().unwrap().code, codes::UNKNOWN);
    }
}
