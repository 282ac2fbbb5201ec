//! Memory that the page cache may take without anything being pushed out: what the system and the control group leave.

use std::fs;
use std::path::Path;

/// Bytes that may be read into the page cache; `None` where the system does not say.
pub(super) fn available() -> Option<u64> {
    let of_system = fs::read_to_string("/proc/meminfo").ok().and_then(|text| meminfo(&text));
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let of_group = group(Path::new("/sys/fs/cgroup"), &own);
    let least = [of_system, of_group].into_iter().flatten().min()?;
    // Some is left to those who start at the same time.
    Some(least / 10 * 9)
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn meminfo(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What the limits of the control group and those above it leave, file pages counted as free; `None` without a limit.
fn group(root: &Path, own: &str) -> Option<u64> {
    let path = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let mut dir = root.join(path);
    let mut least = None;
    while dir.starts_with(root) {
        let number = |name: &str| fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
        if let (Some(max), Some(current)) = (number("memory.max"), number("memory.current")) {
            let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
            let left = max.saturating_sub(current.saturating_sub(file_pages(&stat)));
            least = Some(least.map_or(left, |least: u64| least.min(left)));
        }
        if !dir.pop() {
            break;
        }
    }
    least
}

/// The `file` line of `memory.stat`, in bytes, without what is not yet written.
fn file_pages(stat: &str) -> u64 {
    let number = |name: &str| {
        let line = stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|number| number.parse::<u64>().ok()).unwrap_or(0)
    };
    number("file").saturating_sub(number("file_dirty")).saturating_sub(number("shmem"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_in_kib() {
        assert_eq!(meminfo("MemTotal:  100 kB\nMemAvailable:   24681352 kB\n"), Some(24_681_352 * 1024));
        assert_eq!(meminfo("MemTotal:  100 kB\n"), None);
        assert_eq!(meminfo("MemAvailable: many kB\n"), None);
    }

    #[test]
    fn the_narrowest_group_counts_and_its_file_pages_are_free() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("pod/engine");
        fs::create_dir_all(&inner).unwrap();
        let write = |dir: &Path, max: &str, current: &str, stat: &str| {
            fs::write(dir.join("memory.max"), max).unwrap();
            fs::write(dir.join("memory.current"), current).unwrap();
            fs::write(dir.join("memory.stat"), stat).unwrap();
        };
        write(&inner, "max\n", "500\n", "");
        assert_eq!(group(root.path(), "0::/pod/engine\n"), None, "no limit");
        write(&root.path().join("pod"), "1000\n", "700\n", "anon 300\nfile 400\nfile_dirty 50\nshmem 20\n");
        assert_eq!(group(root.path(), "0::/pod/engine\n"), Some(1000 - (700 - 330)));
        write(&inner, "600\n", "500\n", "file 100\n");
        assert_eq!(group(root.path(), "0::/pod/engine\n"), Some(200));
        assert_eq!(group(root.path(), ""), None);
    }

    #[test]
    fn this_system_says_something() {
        assert!(available().unwrap() > 0);
    }
}
