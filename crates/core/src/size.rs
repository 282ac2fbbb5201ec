//! Byte counts as people write them.

use crate::error::{Error, Result};

const UNITS: [char; 6] = ['k', 'm', 'g', 't', 'p', 'e'];

/// Bytes of a size: a whole number with a unit of any case, or with none, which are bytes. Units are binary, with an `i` and
/// without, as the original ServerlessLLM means its flags: `4GB` and `4 GiB` are 4294967296 bytes.
pub fn parse_size(text: &str) -> Result<u64> {
    let text = text.trim();
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let Some(shift) = shift_of(unit.trim_start()).filter(|_| !number.is_empty()) else {
        return Err(Error::Invalid(
            "a size is a whole number, alone or with B, KB, MB, GB, TB, PB or EB, which are binary (1MB = 1MiB = \
             1048576 bytes)"
                .into(),
        ));
    };
    // `number` is digits only: all that can be wrong with it is its size.
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.ok_or_else(|| Error::Invalid("a size is at most what 64 bits can count".into()))
}

/// The power of two that a unit is.
fn shift_of(unit: &str) -> Option<u32> {
    let unit = unit.to_ascii_lowercase();
    let Some(prefix) = unit.strip_suffix('b') else { return unit.is_empty().then_some(0) };
    let prefix = prefix.strip_suffix('i').filter(|prefix| !prefix.is_empty()).unwrap_or(prefix);
    if prefix.is_empty() {
        return Some(0);
    }
    (10..).step_by(10).zip(UNITS).find(|(_, letter)| prefix.chars().eq([*letter])).map(|(shift, _)| shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_binary_and_of_any_case() {
        for (text, bytes) in [
            ("0", 0),
            (" 4096 ", 4096),
            ("4096B", 4096),
            ("3KB", 3 << 10),
            ("32MB", 32 << 20),
            ("32mb", 32 << 20),
            ("16mib", 16 << 20),
            ("4GB", 4 << 30),
            ("4GiB", 4 << 30),
            ("4 GiB", 4 << 30),
            ("1TB", 1 << 40),
            ("3PiB", 3 << 50),
            ("15EB", 15 << 60),
            ("16777215TiB", 16_777_215 << 40),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text).unwrap(), bytes, "{text}");
        }
    }

    #[test]
    fn other_sizes_are_refused() {
        for text in
            ["", "MB", "-1", "+1", "1.5GiB", "32M", "4GiBs", "0x10", "1 2", "GiB4", "4iB", "4KKB", "4ZB", "\u{0663}MB"]
        {
            assert!(parse_size(text).unwrap_err().to_string().contains("whole number"), "{text}");
        }
        for text in ["18446744073709551616", "16777216TiB", "16EB", "99999999999999999999GB"] {
            assert!(parse_size(text).unwrap_err().to_string().contains("64 bits"), "{text}");
        }
    }
}
