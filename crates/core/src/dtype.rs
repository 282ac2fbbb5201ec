//! Element types of tensors: all that safetensors has.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The type of a tensor's elements, with safetensors' names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(non_camel_case_types)]
#[non_exhaustive]
pub enum Dtype {
    /// Boolean, one byte.
    BOOL,
    /// MX 4-bit float, two elements a byte.
    F4,
    /// MX 6-bit float, 2 exponent bits, packed.
    F6_E2M3,
    /// MX 6-bit float, 3 exponent bits, packed.
    F6_E3M2,
    /// Unsigned 8-bit integer.
    U8,
    /// Signed 8-bit integer.
    I8,
    /// 8-bit float, 5 exponent bits.
    F8_E5M2,
    /// 8-bit float, 4 exponent bits.
    F8_E4M3,
    /// 8-bit exponent (MX scale).
    F8_E8M0,
    /// 8-bit float, 4 exponent bits, no negative zero.
    F8_E4M3FNUZ,
    /// 8-bit float, 5 exponent bits, no negative zero.
    F8_E5M2FNUZ,
    /// Signed 16-bit integer.
    I16,
    /// Unsigned 16-bit integer.
    U16,
    /// IEEE half precision.
    F16,
    /// Brain float.
    BF16,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned 32-bit integer.
    U32,
    /// IEEE single precision.
    F32,
    /// Complex of two single-precision floats.
    C64,
    /// IEEE double precision.
    F64,
    /// Signed 64-bit integer.
    I64,
    /// Unsigned 64-bit integer.
    U64,
}

/// Every dtype with its safetensors name, its torch name and its bits an element.
///
/// torch has no packed 6-bit type; its own 4-bit type holds two elements (`float4_e2m1fn_x2`).
const TABLE: [(Dtype, &str, &str, u64); 22] = [
    (Dtype::BOOL, "BOOL", "bool", 8),
    (Dtype::F4, "F4", "float4_e2m1fn_x2", 4),
    (Dtype::F6_E2M3, "F6_E2M3", "float6_e2m3fn", 6),
    (Dtype::F6_E3M2, "F6_E3M2", "float6_e3m2fn", 6),
    (Dtype::U8, "U8", "uint8", 8),
    (Dtype::I8, "I8", "int8", 8),
    (Dtype::F8_E5M2, "F8_E5M2", "float8_e5m2", 8),
    (Dtype::F8_E4M3, "F8_E4M3", "float8_e4m3fn", 8),
    (Dtype::F8_E8M0, "F8_E8M0", "float8_e8m0fnu", 8),
    (Dtype::F8_E4M3FNUZ, "F8_E4M3FNUZ", "float8_e4m3fnuz", 8),
    (Dtype::F8_E5M2FNUZ, "F8_E5M2FNUZ", "float8_e5m2fnuz", 8),
    (Dtype::I16, "I16", "int16", 16),
    (Dtype::U16, "U16", "uint16", 16),
    (Dtype::F16, "F16", "float16", 16),
    (Dtype::BF16, "BF16", "bfloat16", 16),
    (Dtype::I32, "I32", "int32", 32),
    (Dtype::U32, "U32", "uint32", 32),
    (Dtype::F32, "F32", "float32", 32),
    (Dtype::C64, "C64", "complex64", 64),
    (Dtype::F64, "F64", "float64", 64),
    (Dtype::I64, "I64", "int64", 64),
    (Dtype::U64, "U64", "uint64", 64),
];

impl Dtype {
    /// Every dtype, in the order of safetensors' own list.
    pub fn all() -> impl Iterator<Item = Dtype> {
        TABLE.iter().map(|row| row.0)
    }

    fn row(self) -> &'static (Dtype, &'static str, &'static str, u64) {
        &TABLE[self as usize]
    }

    /// The name in a safetensors header, such as `BF16`.
    pub fn name(self) -> &'static str {
        self.row().1
    }

    /// The name of torch's type without its module, such as `bfloat16`.
    pub fn torch_name(self) -> &'static str {
        self.row().2
    }

    /// Bits of one element: 4 to 64.
    pub fn bits(self) -> u64 {
        self.row().3
    }

    /// The dtype of a safetensors name, or `None`.
    pub fn from_name(name: &str) -> Option<Dtype> {
        TABLE.iter().find(|row| row.1 == name).map(|row| row.0)
    }

    /// The dtype of a torch name (with or without `torch.`), or `None`.
    pub fn from_torch_name(name: &str) -> Option<Dtype> {
        let name = name.strip_prefix("torch.").unwrap_or(name);
        TABLE.iter().find(|row| row.2 == name).map(|row| row.0)
    }

    /// Bytes of a contiguous tensor of this dtype, or why there is no such tensor.
    pub fn byte_len(self, shape: &[u64]) -> Result<u64, &'static str> {
        let mut elements: u64 = 1;
        for &dim in shape {
            elements = elements.checked_mul(dim).ok_or("the product of its shape overflows 64 bits")?;
        }
        let bits = elements.checked_mul(self.bits()).ok_or("its size in bits overflows 64 bits")?;
        if bits % 8 != 0 {
            return Err("its elements do not fill whole bytes");
        }
        Ok(bits / 8)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_the_order_of_the_enum() {
        for (i, row) in TABLE.iter().enumerate() {
            assert_eq!(row.0 as usize, i);
            assert_eq!(Dtype::from_name(row.1), Some(row.0));
            assert_eq!(Dtype::from_torch_name(row.2), Some(row.0));
        }
    }

    #[test]
    fn byte_len_counts_bits_and_refuses_overflow() {
        assert_eq!(Dtype::F32.byte_len(&[]), Ok(4));
        assert_eq!(Dtype::F4.byte_len(&[2, 3]), Ok(3));
        assert_eq!(Dtype::F6_E2M3.byte_len(&[4]), Ok(3));
        assert_eq!(Dtype::BF16.byte_len(&[0, u64::MAX]), Ok(0));
        assert!(Dtype::F4.byte_len(&[3]).is_err());
        assert!(Dtype::U8.byte_len(&[u64::MAX, 2]).is_err());
        assert!(Dtype::F64.byte_len(&[u64::MAX / 8]).is_err());
    }
}
