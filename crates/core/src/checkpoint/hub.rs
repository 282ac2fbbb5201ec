//! The Hugging Face cache, read without a network: `models--ORG--NAME/{refs,snapshots,blobs}`.

use std::env;
use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::small_file::read_small_file;

/// Bytes of a reference at most, which is a commit's name.
const MAX_REF_LEN: u64 = 4 << 10;

/// The cache directory, by the variables that huggingface_hub obeys, in its order.
fn cache_dir() -> Option<PathBuf> {
    let var = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
    let set = |name: &str| var(name).map(|value| PathBuf::from(expanded(&value, |name| env::var_os(name))));
    set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE")).or_else(|| Some(set("HF_HOME")?.join("hub"))).or_else(
        || {
            let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
            Some(cache.join("huggingface").join("hub"))
        },
    )
}

/// What huggingface_hub makes of a path: `~` at its beginning is the home directory, and `$NAME` and `${NAME}` are what `var`
/// says. What is not set stays as it is.
fn expanded(path: &OsStr, var: impl Fn(&str) -> Option<OsString>) -> OsString {
    let Some(text) = path.to_str() else { return path.to_owned() };
    let below_home = text.strip_prefix('~').filter(|rest| rest.is_empty() || rest.starts_with('/'));
    let (mut out, mut rest) = match below_home.zip(var("HOME")) {
        Some((rest, home)) => (home, rest),
        None => (OsString::new(), text),
    };
    while let Some((before, after)) = rest.split_once('$') {
        out.push(before);
        let braced = after.strip_prefix('{').and_then(|name| name.split_once('}'));
        let (name, after) = braced.unwrap_or_else(|| {
            after.split_at(after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len()))
        });
        let named = &rest[before.len()..rest.len() - after.len()];
        out.push(var(name).unwrap_or_else(|| named.into()));
        rest = after;
    }
    out.push(rest);
    out
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

/// Where the links of a snapshot directory, or of one below it, may lead: its repository's blobs. Both paths are canonical.
pub(super) fn blobs_of_snapshot(dir: &Path) -> Option<PathBuf> {
    let snapshots = dir.ancestors().skip(1).find(|dir| dir.file_name().is_some_and(|name| name == "snapshots"))?;
    Some(snapshots.with_file_name("blobs"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use super::*;

    #[test]
    fn paths_are_expanded_as_huggingface_hub_does() {
        let var = |name: &str| match name {
            "HOME" => Some("/home/me".into()),
            "DISK" => Some("/mnt/$HOME".into()),
            "n_1" => Some("".into()),
            _ => None,
        };
        for (path, expected) in [
            ("/hf", "/hf"),
            ("~", "/home/me"),
            ("~/hf/~", "/home/me/hf/~"),
            ("~other/hf", "~other/hf"),
            ("$DISK/hf", "/mnt/$HOME/hf"),
            ("${DISK}hf$n_1$n_1.x", "/mnt/$HOMEhf.x"),
            ("~/$HOME${HOME}", "/home/me//home/me/home/me"),
            ("$DISKS/$", "$DISKS/$"),
            ("${DISK/${NONE}$HOME", "${DISK/${NONE}/home/me"),
            ("$$HOME", "$/home/me"),
        ] {
            assert_eq!(expanded(path.as_ref(), var), expected, "{path}");
        }
        let no_text = OsString::from_vec(b"~/\xff".to_vec());
        assert_eq!(expanded(&no_text, var), no_text);
        assert_eq!(expanded("~/hf".as_ref(), |_| None), "~/hf");
    }

    #[test]
    fn blobs_are_beside_the_snapshots_that_a_directory_is_below() {
        let blobs = |dir: &str| blobs_of_snapshot(dir.as_ref()).map(|blobs| blobs.to_str().unwrap().to_owned());
        for dir in ["/hub/m/snapshots/c0ffee", "/hub/m/snapshots/c0ffee/unet/deep"] {
            assert_eq!(blobs(dir).as_deref(), Some("/hub/m/blobs"));
        }
        for dir in ["/hub/m/snapshots", "/hub/m", "/", "/hub/my-snapshots/x"] {
            assert_eq!(blobs(dir), None, "{dir}");
        }
    }
}
