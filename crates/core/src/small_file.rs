//! Small files, read whole: a token, a configuration, what the system tells.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};

/// The text of a file of at most `limit` bytes, which may be a pipe.
///
/// # Errors
/// [`Error::Io`] where it cannot be read or is not UTF-8, [`Error::Invalid`] where it is longer.
pub fn read_small_file(path: &Path, limit: u64) -> Result<String> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(limit.saturating_add(1)).read_to_end(&mut bytes));
    read.map_err(Error::io("read", path))?;
    if bytes.len() as u64 > limit {
        return Err(Error::Invalid(format!(
            "{} has more than the {limit} bytes that it may have: is it the right file?",
            path.display()
        )));
    }
    String::from_utf8(bytes).map_err(|e| Error::io("read as UTF-8", path)(std::io::Error::other(e)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_its_limit_and_no_further() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "é".repeat(8)).unwrap();
        assert_eq!(read_small_file(&path, 16).unwrap(), "éééééééé");
        let error = read_small_file(&path, 15).unwrap_err();
        assert!(matches!(error, Error::Invalid(_)) && error.to_string().contains("more than the 15 bytes"), "{error}");
        // Files without an end.
        assert!(matches!(read_small_file(Path::new("/dev/zero"), 1 << 16), Err(Error::Invalid(_))));
        std::fs::write(&path, [0xff]).unwrap();
        assert!(matches!(read_small_file(&path, 15), Err(Error::Io { .. })));
        assert!(matches!(read_small_file(dir.path(), 15), Err(Error::Io { .. })));
    }
}
