//! Byte counts and numbers of things for people.

use std::fmt::Display;

/// Bytes for people, in binary units.
pub(crate) fn human(bytes: u64) -> String {
    let units = [("TiB", 1u64 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.iter().find(|(_, unit)| bytes >= *unit) {
        Some((name, unit)) => format!("{:.2} {name}", bytes as f64 / *unit as f64),
        None => format!("{bytes} B"),
    }
}

/// A number of things, for people.
pub(crate) fn count<N: Display + PartialEq + From<u8>>(number: N, thing: &str) -> String {
    let plural = if number == N::from(1) { "" } else { "s" };
    format!("{number} {thing}{plural}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn human_sizes_are_binary() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(1023), "1023 B");
        assert_eq!(human(1 << 20), "1.00 MiB");
        assert_eq!(human(3 << 29), "1.50 GiB");
    }

    #[test]
    fn one_is_singular() {
        assert_eq!(count(0_u64, "chunk"), "0 chunks");
        assert_eq!(count(1_usize, "tensor"), "1 tensor");
    }
}
