//! Memory that may be taken without anything being pushed out: what the system and the control group leave.

use std::fs;
use std::path::Path;

/// Bytes that may be read into the page cache; `None` where the system does not say.
pub(super) fn available() -> Option<u64> {
    // Some is left to those who start at the same time.
    free_memory().map(|free| free / 10 * 9)
}

/// Bytes of memory that this process may still take, by the system and by the limits of its control group; the page cache
/// counts as free. `None` where the system does not say.
pub fn free_memory() -> Option<u64> {
    free(Path::new("/"))
}

/// Free memory, and all that the system has, in bytes; `root` is where `/proc` and `/sys` are.
pub(crate) fn memory(root: &Path) -> Option<(u64, u64)> {
    free(root).zip(of_system(root, "MemTotal:"))
}

fn free(root: &Path) -> Option<u64> {
    let own = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let of_group = group(&root.join("sys/fs/cgroup"), &own);
    [of_system(root, "MemAvailable:"), of_group].into_iter().flatten().min()
}

fn of_system(root: &Path, field: &str) -> Option<u64> {
    meminfo(&fs::read_to_string(root.join("proc/meminfo")).ok()?, field)
}

/// A field of `/proc/meminfo`, in bytes.
fn meminfo(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// A version of control groups: where its limits of memory lie, and its names for them. Sizes are in bytes.
struct Version {
    /// Directory below the common root.
    folder: &'static str,
    limit: &'static str,
    usage: &'static str,
    /// Lines of `memory.stat`, over the groups below too: file pages, and of them those not yet written and those of no
    /// file.
    file: &'static str,
    dirty: &'static str,
    shmem: &'static str,
}

const V2: Version = Version {
    folder: "",
    limit: "memory.max",
    usage: "memory.current",
    file: "file",
    dirty: "file_dirty",
    shmem: "shmem",
};

/// Its groups without a limit have one near 2^63, which is never the least.
const V1: Version = Version {
    folder: "memory",
    limit: "memory.limit_in_bytes",
    usage: "memory.usage_in_bytes",
    file: "total_cache",
    dirty: "total_dirty",
    shmem: "total_shmem",
};

/// What the limits of the control group and those above it leave, file pages counted as free; `None` without a limit.
///
/// `own` is `/proc/self/cgroup`. Under both versions at once either may hold the limits.
fn group(root: &Path, own: &str) -> Option<u64> {
    let left = own.lines().filter_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(":/")?;
        let version = match controllers {
            "" => V2,
            some if some.split(',').any(|name| name == "memory") => V1,
            _ => return None,
        };
        version.left(&root.join(version.folder), path)
    });
    left.min()
}

impl Version {
    /// The least that the limits of a group below `root` and of those above it leave. Where a container sees only its
    /// own group, that is `root` itself, and those below it are not there.
    fn left(&self, root: &Path, path: &str) -> Option<u64> {
        let mut dir = root.join(path);
        let mut least = None;
        while dir.starts_with(root) {
            let number = |name: &str| fs::read_to_string(dir.join(name)).ok()?.trim().parse::<u64>().ok();
            if let (Some(limit), Some(usage)) = (number(self.limit), number(self.usage)) {
                let stat = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
                let left = limit.saturating_sub(usage.saturating_sub(self.file_pages(&stat)));
                least = Some(least.map_or(left, |least: u64| least.min(left)));
            }
            if !dir.pop() {
                break;
            }
        }
        least
    }

    /// File pages of a `memory.stat` that can be given up at once, in bytes.
    fn file_pages(&self, stat: &str) -> u64 {
        let number = |name: &str| {
            let line = stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.and_then(|number| number.parse::<u64>().ok()).unwrap_or(0)
        };
        number(self.file).saturating_sub(number(self.dirty)).saturating_sub(number(self.shmem))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_in_kib() {
        let free = |text| meminfo(text, "MemAvailable:");
        assert_eq!(free("MemTotal:  100 kB\nMemAvailable:   24681352 kB\n"), Some(24_681_352 * 1024));
        assert_eq!(free("MemTotal:  100 kB\n"), None);
        assert_eq!(free("MemAvailable: many kB\n"), None);
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
    fn groups_of_the_first_version_count_too() {
        let root = tempfile::tempdir().unwrap();
        let (memory, unlimited) = (root.path().join("memory"), "9223372036854771712\n");
        fs::create_dir_all(memory.join("pod/engine")).unwrap();
        let write = |dir: &Path, limit: &str, usage: &str, stat: &str| {
            fs::write(dir.join("memory.limit_in_bytes"), limit).unwrap();
            fs::write(dir.join("memory.usage_in_bytes"), usage).unwrap();
            fs::write(dir.join("memory.stat"), stat).unwrap();
        };
        let own = "12:cpu,cpuacct:/other\n5:hugetlb,memory:/pod/engine\n1:name=systemd:/pod\n0::/pod/engine\n";
        assert_eq!(group(root.path(), own), None, "no files");
        let stat = "cache 1\ntotal_cache 400\ntotal_rss 300\ntotal_shmem 20\ntotal_dirty 50\n";
        write(&memory.join("pod"), "1000\n", "700\n", stat);
        write(&memory.join("pod/engine"), unlimited, "500\n", "");
        assert_eq!(group(root.path(), own), Some(1000 - (700 - 330)));
        assert_eq!(group(root.path(), "12:cpu:/pod\n1:name=memory:/pod\n"), None, "not its group of memory");
        // A container that sees its own group as the root.
        write(&memory, "600\n", "500\n", "total_cache 100\n");
        assert_eq!(group(root.path(), "5:memory:/docker/0123\n"), Some(200));
        // Under both versions the narrower one counts.
        fs::create_dir_all(root.path().join("pod")).unwrap();
        fs::write(root.path().join("pod/memory.max"), "150\n").unwrap();
        fs::write(root.path().join("pod/memory.current"), "50\n").unwrap();
        assert_eq!(group(root.path(), own), Some(100));
    }

    #[test]
    fn this_system_says_something() {
        assert!(available().unwrap() > 0);
        let (free, total) = memory(Path::new("/")).unwrap();
        assert!(0 < free && free <= total);
    }
}
