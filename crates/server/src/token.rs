//! The secret that TCP clients show.

use std::fmt;
use std::path::Path;

use sllm_core::{Error, Result, read_small_file};
use sllm_proto::MAX_TOKEN_FILE;
use tonic::metadata::MetadataMap;

/// Bytes of a token at least: fewer could be guessed.
const MIN_LEN: usize = 16;

/// A secret shared with clients, who send it as `authorization: Bearer TOKEN`.
#[derive(Clone)]
pub struct Token(String);

impl Token {
    /// Checks what was given as a token.
    pub fn new(text: &str) -> Result<Token> {
        Token::of(text, "what was given as a token")
    }

    /// As [`Token::new`]; `place` is where it was found, for an error.
    pub(crate) fn of(text: &str, place: impl fmt::Display) -> Result<Token> {
        let text = text.trim();
        if text.len() < MIN_LEN || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(Error::Invalid(format!(
                "{place} is no token: it has {MIN_LEN} or more visible ASCII characters; `openssl rand -hex 32` makes one"
            )));
        }
        Ok(Token(text.to_owned()))
    }

    /// Reads a token's file.
    pub fn from_file(path: &Path) -> Result<Token> {
        Token::of(&read_small_file(path, MAX_TOKEN_FILE)?, path.display())
    }

    /// Whether a request shows it. Takes as long for any wrong token of a length.
    pub(crate) fn is_shown(&self, metadata: &MetadataMap) -> bool {
        let shown = metadata.get("authorization").map_or(&[][..], |value| value.as_encoded_bytes());
        let shown = shown.strip_prefix(b"Bearer ").unwrap_or_default();
        let differs =
            shown.iter().zip(self.0.as_bytes()).fold(0, |differs, (a, b)| std::hint::black_box(differs | (a ^ b)));
        shown.len() == self.0.len() && differs == 0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_very_token_is_taken() {
        let token = Token::new("0123456789abcdef\n").unwrap();
        let shown = |value: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("authorization", value.parse().unwrap());
            token.is_shown(&metadata)
        };
        assert!(shown("Bearer 0123456789abcdef"));
        for wrong in ["", "Bearer ", "0123456789abcdef", "Bearer 0123456789abcdeF", "Bearer 0123456789abcdef0"] {
            assert!(!shown(wrong), "{wrong}");
        }
        assert!(!token.is_shown(&MetadataMap::new()));
        assert!(Token::new("short").is_err() && Token::new("with a space in it").is_err());
        assert!(!format!("{token:?}").contains("0123"), "a token does not reach a log");
    }
}
