//! Byte counts as people write them: `32MB` (1e6), `4GiB` (2^30), `4096`.

use std::fmt::Display;

const UNITS: [(&str, u64); 10] = [
    ("", 1),
    ("b", 1),
    ("kb", 1_000),
    ("mb", 1_000_000),
    ("gb", 1_000_000_000),
    ("tb", 1_000_000_000_000),
    ("kib", 1 << 10),
    ("mib", 1 << 20),
    ("gib", 1 << 30),
    ("tib", 1 << 40),
];

/// Bytes of a size: a whole number and a unit, of any case. For clap.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let unit = unit.trim_start().to_ascii_lowercase();
    let factor = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor);
    let (false, Some(factor)) = (number.is_empty(), factor) else {
        return Err("a size is a whole number with B, KB, MB, GB, TB, KiB, MiB, GiB, TiB or no unit".into());
    };
    // `number` is digits only: all that can be wrong with it is its size.
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
    bytes.ok_or_else(|| "it is more than 64 bits can count".into())
}

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
    fn sizes_have_decimal_and_binary_units_of_any_case() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("3KB", 3_000),
            ("32MB", 32_000_000),
            ("32mb", 32_000_000),
            ("2Gb", 2_000_000_000),
            ("1TB", 1_000_000_000_000),
            ("1KiB", 1024),
            ("16mib", 16 << 20),
            ("4GiB", 4 << 30),
            ("4 GiB", 4 << 30),
            ("16777215TiB", 16_777_215 << 40),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn other_sizes_are_refused() {
        for text in ["", "MB", "-1", "+1", "1.5GiB", "32M", "4GiBs", "0x10", "1 2", "GiB4", "٣MB"] {
            assert!(parse(text).unwrap_err().starts_with("a size is"), "{text}");
        }
        for text in ["18446744073709551616", "16777216TiB", "18446744073709552KB"] {
            assert!(parse(text).unwrap_err().contains("64 bits"), "{text}");
        }
    }

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
