//! The Hugging Face cache, read without a network: `models--ORG--NAME/{refs,snapshots,blobs}`.

use std::env;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::small_file::read_small_file;

/// Bytes of a reference at most, which is a commit's name.
const MAX_REF_LEN: u64 = 4 << 10;

/// The cache directory, by the variables that huggingface_hub obeys, in its order.
fn cache_dir() -> Option<PathBuf> {
    let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE")).or_else(|| Some(set("HF_HOME")?.join("hub"))).or_else(
        || {
            let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
            Some(cache.join("huggingface").join("hub"))
        },
    )
}

/// The snapshot directory of a repository id such as `org/name`.
pub(super) fn resolve(id: &Path, revision: Option<&str>, cache: Option<&Path>) -> Result<PathBuf> {
    let not_found = |reason: String| Error::NotFound { path: id.to_owned(), reason };
    let repo = id.to_str().filter(|id| is_repo_id(id)).ok_or_else(|| not_found("there is no such file".into()))?;
    let cache = cache.map(Path::to_owned).or_else(cache_dir);
    let cache =
        cache.ok_or_else(|| not_found("there is no such directory, and no Hugging Face cache is set".into()))?;
    let dir = cache.join(format!("models--{}", repo.replace('/', "--")));
    if !dir.is_dir() {
        let reason = format!(
            "there is no such directory, and the Hugging Face cache {} does not hold it: download it first",
            cache.display()
        );
        return Err(not_found(reason));
    }
    let revision = revision.unwrap_or("main");
    if !crate::format::hf_index::is_plain_relative(revision) {
        return Err(Error::Invalid(format!("{revision:?} is not a revision")));
    }
    let commit = match read_small_file(&dir.join("refs").join(revision), MAX_REF_LEN) {
        Ok(commit) => commit.trim().to_owned(),
        // A commit's name has no reference.
        Err(Error::Io { source, .. }) if is_missing(source.kind()) => revision.to_owned(),
        Err(error) => return Err(error),
    };
    let snapshot = dir.join("snapshots").join(&commit);
    if !crate::format::hf_index::is_plain_relative(&commit) || !snapshot.is_dir() {
        let reason =
            format!("revision {revision:?} is not in the Hugging Face cache {}: download it first", cache.display());
        return Err(not_found(reason));
    }
    Ok(snapshot)
}

/// Whether there is no file.
fn is_missing(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::NotFound | ErrorKind::NotADirectory | ErrorKind::IsADirectory)
}

/// `name` or `org/name` of the characters that the hub allows.
fn is_repo_id(id: &str) -> bool {
    let valid = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    id.split('/').count() <= 2 && id.split('/').all(valid)
}

/// Where the links of a snapshot directory may lead: its repository's blobs. Both paths are canonical.
pub(super) fn blobs_of_snapshot(dir: &Path) -> Option<PathBuf> {
    let snapshots = dir.parent()?;
    (snapshots.file_name()? == "snapshots").then(|| snapshots.with_file_name("blobs"))
}
