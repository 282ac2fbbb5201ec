//! What the tests of several crates need: small files, and other processes. It depends on nothing, so that every crate
//! can use it.

mod files;
mod other;

pub use files::{header, noise, safetensors};
pub use other::{Other, hex, unhex};
