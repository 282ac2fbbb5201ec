//! Arithmetic of CRC-64/NVME, for checksums of bytes that were summed up in parts.
//!
//! Checksums are polynomials, reflected: bit 63 is the power 0.

/// The polynomial of CRC-64/NVME, highest power last (<https://reveng.sourceforge.io/crc-catalogue/>).
const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;
/// The polynomials 1 and x^8.
const ONE: u64 = 1 << 63;
const BYTE: u64 = 1 << 55;

/// The checksum of bytes with checksum `a`, and after them `len` bytes with checksum `b`.
///
/// crc-fast has the same, by matrices, in 100 us: as much as the checksum of a piece takes. This is 2 us.
pub(crate) fn combine(a: u64, b: u64, len: u64) -> u64 {
    multiply(shift(len), a) ^ b
}

/// The checksum of `len` zeros. That of other bytes is this one plus their remainder, without initial and final value: XOR.
pub(crate) fn of_zeros(len: u64) -> u64 {
    !multiply(shift(len), !0)
}

/// The remainder of `len` bytes with checksum `sum`, and after them `after` zeros.
pub(crate) fn remainder(sum: u64, len: u64, after: u64) -> u64 {
    multiply(shift(after), sum ^ of_zeros(len))
}

/// What `len` bytes multiply by that which was before them: x^8 for each.
fn shift(len: u64) -> u64 {
    let (mut shift, mut power, mut rest) = (ONE, BYTE, len);
    while rest > 0 {
        if rest & 1 == 1 {
            shift = multiply(shift, power);
        }
        power = multiply(power, power);
        rest >>= 1;
    }
    shift
}

/// The product of two polynomials, modulo that of the checksum.
fn multiply(a: u64, mut b: u64) -> u64 {
    let mut product = 0;
    for power in (0..64).rev() {
        product ^= b & (a >> power & 1).wrapping_neg();
        b = b >> 1 ^ POLYNOMIAL & (b & 1).wrapping_neg();
    }
    product
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "made sizes are small")]
mod tests {
    use crc_fast::{CrcAlgorithm, checksum_combine, crc64_nvme};

    use super::*;

    #[test]
    fn checksums_are_combined_as_the_library_combines_them() {
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
        for at in [0, 1, 4096, 65_537, 99_999, 100_000] {
            let (a, b) = bytes.split_at(at);
            let len = b.len() as u64;
            let (a, b) = (crc64_nvme(a), crc64_nvme(b));
            assert_eq!(combine(a, b, len), crc64_nvme(&bytes));
        }
        for len in [1 << 21, (1 << 30) + 12_345, u64::MAX] {
            let of_library = checksum_combine(CrcAlgorithm::Crc64Nvme, 0xdead_beef, 7, len);
            assert_eq!(combine(0xdead_beef, 7, len), of_library);
        }
    }

    #[test]
    fn a_remainder_and_the_checksum_of_zeros_give_a_checksum() {
        for len in [0, 1, 8, 4096, 100_000] {
            assert_eq!(of_zeros(len), crc64_nvme(&vec![0; len as usize]));
        }
        // One bit after the other, as the polynomial is defined.
        let divide = |rest: u64, byte: &u8| {
            (0..8).fold(rest ^ u64::from(*byte), |rest, _| rest >> 1 ^ POLYNOMIAL & (rest & 1).wrapping_neg())
        };
        for bytes in [&b"a"[..], b"123456789", b"the remainder of a longer text"] {
            let len = bytes.len() as u64;
            let of_bytes = bytes.iter().fold(0, divide);
            assert_eq!(of_zeros(len) ^ of_bytes, crc64_nvme(bytes));
            assert_eq!(remainder(crc64_nvme(bytes), len, 0), of_bytes);
            assert_eq!(remainder(crc64_nvme(bytes), len, 100), [0; 100].iter().fold(of_bytes, divide));
        }
    }
}
