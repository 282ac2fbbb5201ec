//! Opening Hugging Face safetensors: one file, several, or several with an index.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use super::contents::{SAFETENSORS, names_in};
use super::store::read_small;
use super::texts::{self, JsonText, PIECE};
use super::{Checkpoint, DataFile, Layout, Parts, hub, is_there};
use crate::error::{Error, FormatError, Result};
use crate::format::hf_index::{self, HfIndex, INDEX_NAME, Part};
use crate::format::manifest::{MAX_MANIFEST_LEN, Source, SourceFile};
use crate::format::safetensors::{self, Header, LENGTH_FIELD, METADATA, OfFile, in_line, json_len};
use crate::tensor::TensorName;
use crate::tensors::Tensors;
use crate::threads;

/// The one shard's name where there is no index.
const SINGLE_NAME: &str = "model.safetensors";

/// A data file, and its header once it was read.
struct Opened {
    file: DataFile,
    header: Option<Result<Found>>,
}

/// A file's header, as its pieces have it.
struct Found {
    /// Bytes of its JSON.
    json_len: u64,
    pieces: Vec<Header>,
}

impl From<DataFile> for Opened {
    fn from(file: DataFile) -> Self {
        Opened { file, header: None }
    }
}

/// Whether a file's name is one of a safetensors file.
fn is_safetensors(name: &OsStr) -> bool {
    name.as_encoded_bytes().ends_with(SAFETENSORS)
}

/// Names of a directory's safetensors files, sorted, out of all that were `listed`; only `model.safetensors` where there is
/// one.
fn file_names(dir: &Path, listed: Option<&[OsString]>) -> Result<Vec<String>> {
    let mut found = match listed {
        Some(listed) => listed.to_vec(),
        None => names_in(dir, |_| true).map_err(Error::io("list", dir))?,
    };
    found.retain(|name| is_safetensors(name));
    // Left out, its tensors would be missing and nobody be told.
    let not_utf8 = |name| FormatError::new(&dir.join(name), "the name of a weight file must be UTF-8: rename it");
    let names = found.into_iter().map(|name| name.into_string().map_err(not_utf8));
    let mut names = names.collect::<Result<Vec<String>, _>>()?;
    if names.iter().any(|name| name == SINGLE_NAME) {
        names = vec![SINGLE_NAME.to_owned()];
    }
    Ok(names)
}

/// Those of the listed files that an index names in all likelihood: `model-00001-of-00002.safetensors` and so on, if there
/// are as many as their names say.
fn likely_shards(listed: Option<&[OsString]>) -> Vec<&str> {
    let names = listed.unwrap_or_default().iter().filter(|name| is_safetensors(name)).filter_map(|name| name.to_str());
    let shards: Vec<&str> = names.filter(|name| name.starts_with("model-")).collect();
    let end = format!("-of-{:05}.safetensors", shards.len());
    if shards.iter().all(|name| name.ends_with(&end)) { shards } else { Vec::new() }
}

pub(super) fn open_file(path: &Path) -> Result<Checkpoint> {
    let name = path.file_name().map_or_else(|| SINGLE_NAME.into(), |name| name.to_string_lossy().into_owned());
    let file = DataFile::open(path, &name, true)?;
    assemble(path, vec![file.into()], None)
}

/// Opens files that somebody else found; `root` is where they were looked for.
pub(super) fn open_files(root: &Path, paths: &[PathBuf]) -> Result<Checkpoint> {
    let open = |path: &PathBuf| {
        let name = path.strip_prefix(root).unwrap_or(path);
        DataFile::open(path, &name.to_string_lossy(), true).map(Opened::from)
    };
    assemble(root, paths.iter().map(open).collect::<Result<_>>()?, None)
}

/// Opens a directory, whose files were `listed`, by its index, or all its safetensors files where there is none; `None`
/// where it has neither.
pub(super) fn open_dir(dir: &Path, listed: Option<&[OsString]>) -> Result<Option<Checkpoint>> {
    let index_path = dir.join(INDEX_NAME);
    if is_there(&index_path)? {
        return open_indexed(dir, &index_path, listed, MAX_MANIFEST_LEN).map(Some);
    }
    let names = file_names(dir, listed)?;
    if names.is_empty() {
        return Ok(None);
    }
    let files = names.iter().map(|name| open_inside(dir, name).map(Opened::from)).collect::<Result<_>>()?;
    assemble(dir, files, None).map(Some)
}

/// Opens a directory by its index, of at most `limit` bytes.
fn open_indexed(dir: &Path, index_path: &Path, listed: Option<&[OsString]>, limit: u64) -> Result<Checkpoint> {
    let index_file = open_inside(dir, INDEX_NAME)?;
    // A long index takes as long as the headers, which are read meanwhile; what fails there is tried again below.
    let likely = if index_file.len() < PIECE { Vec::new() } else { likely_shards(listed) };
    let likely: Vec<DataFile> = likely.iter().map_while(|name| open_inside(dir, name).ok()).collect();
    let within_limit = (index_file.len() <= limit).then_some(&index_file);
    let (parts, headers) = scan(within_limit, likely.iter().enumerate());
    let parts = match parts {
        Some(parts) => parts,
        None => vec![hf_index::parse(index_path, &read_small(&index_file, limit)?)?],
    };
    let index = HfIndex::of(index_path, parts)?;
    let mut likely: Vec<Opened> =
        likely.into_iter().zip(headers).map(|(file, header)| Opened { file, header: header.map(Ok) }).collect();
    let mut files = Vec::with_capacity(index.shards.len());
    for shard in &index.shards {
        if let Some(place) = likely.iter().position(|opened| opened.file.name() == shard) {
            files.push(likely.swap_remove(place));
            continue;
        }
        let file = open_inside(dir, shard).map_err(|e| match e {
            Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                FormatError::new(index_path, format!("it names shard {shard:?}, which is not there")).into()
            }
            e => e,
        })?;
        files.push(file.into());
    }
    assemble(dir, files, Some((index_path, index)))
}

/// Opens a file of a model directory.
fn open_inside(dir: &Path, name: &str) -> Result<DataFile> {
    let path = dir.join(name);
    ensure_inside(dir, &path)?;
    DataFile::open(&path, name, true)
}

/// Whether a file of a model directory lies in it: a link may lead only into the same directory or, in the Hugging Face
/// cache, to the blobs of the same repository.
pub(crate) fn ensure_inside(dir: &Path, path: &Path) -> Result<()> {
    let real = path.canonicalize().map_err(Error::io("inspect", path))?;
    let real_dir = dir.canonicalize().map_err(Error::io("inspect", dir))?;
    let allowed = real.starts_with(&real_dir)
        || hub::blobs_of_snapshot(&real_dir).is_some_and(|blobs: PathBuf| real.starts_with(blobs));
    if !allowed {
        let reason = format!(
            "it is a link out of its directory, to {}; copy the file or open its own directory",
            real.display()
        );
        return Err(FormatError::new(path, reason).into());
    }
    Ok(())
}

fn assemble(root: &Path, mut opened: Vec<Opened>, index: Option<(&Path, HfIndex)>) -> Result<Checkpoint> {
    read_headers(&mut opened);
    let (mut files, mut shards) = (Vec::with_capacity(opened.len()), Vec::with_capacity(opened.len()));
    let mut tensors = Tensors::default();
    for Opened { file, header } in opened {
        let Some(header) = header else { continue }; // `read_headers` leaves none out
        let Found { json_len, mut pieces } = header?;
        let number = files.len();
        let mut metadata = pieces.iter_mut().filter_map(|piece| piece.metadata.take());
        let (metadata, second) = (metadata.next(), metadata.next());
        if second.is_some() {
            return Err(FormatError::new(file.path(), format!("its {METADATA} occurs twice")).into());
        }
        let mut found = in_line(OfFile { path: file.path(), number, json_len }, pieces, file.len())?;
        // A file that was read as if it had another number.
        if found.first().is_some_and(|tensor| tensor.file != number) {
            found.iter_mut().for_each(|tensor| (tensor.file, tensor.shard) = (number, number));
        }
        tensors.append(found);
        shards.push(SourceFile { name: file.name().to_owned(), metadata: metadata.flatten() });
        files.push(file);
    }
    let is_as_told = index.as_ref().is_some_and(|(_, index)| is_as_told(index, &tensors));
    let (index_path, mut index) = index.unzip();
    let metadata = index.as_mut().map(|index| index.metadata.take());
    let checkpoint = Checkpoint::from_parts(Parts {
        root: root.to_owned(),
        layout: Layout::Safetensors,
        told_by: root.to_owned(),
        files,
        tensors,
        names_differ: is_as_told,
        are_in_line: true,
        sums: None,
        identity: None,
        origin: Source { layout: Layout::Safetensors.name().into(), files: shards, index: metadata, seen: None },
    })?;
    if let (Some(path), Some(index), false) = (index_path, index, is_as_told) {
        check_index(path, &index, &checkpoint)?;
    }
    Ok(checkpoint)
}

/// Whether every tensor has a name of its own, and is where an index, which has each once, says if that names it.
fn is_as_told(index: &HfIndex, tensors: &Tensors) -> bool {
    if names_all(index, tensors) {
        return index.is_sorted() || index.repeated().is_none();
    }
    // Its file, and whether the index named it already.
    let mut found: HashMap<&str, (usize, bool)> =
        tensors.iter().map(|tensor| (tensor.name.as_str(), (tensor.file, false))).collect();
    found.len() == tensors.len()
        && index.weight_map().all(|(name, shard)| {
            let found = found.get_mut(name.as_str());
            found.is_some_and(|(file, is_named)| *file == shard && !std::mem::replace(is_named, true))
        })
}

/// Whether an index names every tensor in its file, those of a file in the file's order.
fn names_all(index: &HfIndex, tensors: &Tensors) -> bool {
    let first_of = |file| tensors.partition_point(|tensor| tensor.file < file);
    let mut next: Vec<usize> = (0..index.shards.len()).map(first_of).collect();
    let is_next = |(name, shard): (&TensorName, usize)| {
        let Some(place) = next.get_mut(shard) else { return false };
        let tensor = tensors.get(*place);
        *place += 1;
        tensor.is_some_and(|tensor| tensor.file == shard && tensor.name == *name)
    };
    index.len() == tensors.len() && index.weight_map().all(is_next)
}

/// The first of an index's entries that is there twice, or not as it says.
fn check_index(path: &Path, index: &HfIndex, checkpoint: &Checkpoint) -> Result<()> {
    if let Some(name) = index.repeated() {
        return Err(FormatError::new(path, "the name occurs twice in weight_map").tensor(name).into());
    }
    for (name, shard) in index.weight_map() {
        if checkpoint.tensor(name).map_or(true, |tensor| tensor.file != shard) {
            let shard = &index.shards[shard];
            let reason = format!("the index says that it is in {shard:?}, but it is not");
            return Err(FormatError::new(path, reason).tensor(name).into());
        }
    }
    Ok(())
}

/// Scans an index, and the headers of files, each with its number. What has another form than most, or an error, is `None`.
fn scan<'a>(
    index: Option<&DataFile>,
    files: impl Iterator<Item = (usize, &'a DataFile)>,
) -> (Option<Vec<Part>>, Vec<Option<Found>>) {
    let files: Vec<Option<(&DataFile, OfFile<'_>)>> =
        files.map(|(number, file)| Some((file, of_file(file, number).ok()?))).collect();
    let index_len = index.map_or(0, DataFile::len);
    let len = index_len + files.iter().flatten().map(|(_, of_file)| of_file.json_len).sum::<u64>();
    let piece_len = texts::piece_len(len);
    let mut index = index.map(|file| JsonText::new(file, 0..index_len, b'"', piece_len));
    let header = |file: Option<(&'a DataFile, OfFile<'a>)>| {
        let (file, of_file) = file?;
        let place = LENGTH_FIELD..LENGTH_FIELD + of_file.json_len;
        Some((of_file, JsonText::new(file, place, b'}', piece_len)))
    };
    let mut headers: Vec<_> = files.into_iter().map(header).collect();
    let of_all = headers.iter().flatten().map(|(_, text)| text.pieces());
    let buffers = texts::buffers(len, of_all.chain(index.iter().map(JsonText::pieces)));
    let of_index = index.iter_mut().flat_map(|text| text.tasks(buffers.as_ref(), hf_index::scan));
    let of_headers = headers.iter_mut().flatten().flat_map(|(of_file, text)| {
        let of_file = *of_file;
        text.tasks(buffers.as_ref(), move |piece| safetensors::scan(of_file, piece))
    });
    texts::share(len, of_index.chain(of_headers));
    let found = |(of_file, text): (OfFile<'_>, JsonText<'_, Header>)| {
        Some(Found { json_len: of_file.json_len, pieces: text.into_found()? })
    };
    let headers = headers.into_iter().map(|header| header.and_then(found)).collect();
    (index.and_then(JsonText::into_found), headers)
}

/// Reads the headers of files that were not read yet.
fn read_headers(files: &mut [Opened]) {
    let unread: Vec<usize> = (0..files.len()).filter(|&number| files[number].header.is_none()).collect();
    let of_unread = unread.iter().map(|&number| (number, &files[number].file));
    let (_, scanned) = scan(None, of_unread);
    for (number, header) in unread.into_iter().zip(scanned) {
        files[number].header = header.map(Ok);
    }
    // Those of another form than most.
    let others: Vec<_> = files.iter_mut().enumerate().filter(|(_, opened)| opened.header.is_none()).collect();
    threads::share(texts::threads_for(others.len()), "sllm-open", others.into_iter(), |(number, opened)| {
        opened.header = Some(parse_header(&opened.file, number));
    });
}

/// A file as its header's tensors are told of it.
fn of_file(file: &DataFile, number: usize) -> Result<OfFile<'_>> {
    if file.len() < LENGTH_FIELD {
        let reason = format!("it has {} bytes: too short for a safetensors file", file.len());
        return Err(FormatError::new(file.path(), reason).into());
    }
    let mut field = [0; 8];
    file.read_exact_at(&mut field, 0)?;
    let json_len = json_len(file.path(), field, file.len())?;
    Ok(OfFile { path: file.path(), number, json_len })
}

fn parse_header(file: &DataFile, number: usize) -> Result<Found> {
    let of_file = of_file(file, number)?;
    // At most MAX_HEADER_LEN, which fits usize.
    let mut json = vec![0; usize::try_from(of_file.json_len).unwrap_or(0)];
    file.read_exact_at(&mut json, LENGTH_FIELD)?;
    Ok(Found { json_len: of_file.json_len, pieces: vec![safetensors::parse(of_file, json)?] })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use serde_json::{Map, Value, json};
    use tempfile::TempDir;

    use super::*;

    const FILES: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

    /// Two files of such tensors, each of a byte, and an index that says of each tensor the file that `told` says.
    fn write(tensors: [&[String]; 2], told: &[(&String, &str)]) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (file, names) in FILES.iter().zip(tensors) {
            let entry = |(i, name): (usize, &String)| {
                format!(r#""{name}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#, i + 1)
            };
            let header = format!("{{{}}}", names.iter().enumerate().map(entry).collect::<Vec<_>>().join(","));
            fs::write(dir.path().join(file), test_support::safetensors(header, &vec![7; names.len()])).unwrap();
        }
        let map: Vec<String> = told.iter().map(|(name, file)| format!(r#""{name}":"{file}""#)).collect();
        fs::write(dir.path().join(INDEX_NAME), format!(r#"{{"weight_map":{{{}}}}}"#, map.join(","))).unwrap();
        dir
    }

    /// The same of files of `count` tensors, whose index may be so long that headers are read beside it.
    fn check(count: usize) {
        let names = |letter: &str| (0..count).map(|i| format!("{letter}{i:0150}")).collect::<Vec<String>>();
        let (a, b) = (names("a"), names("b"));
        let told = || a.iter().map(|name| (name, FILES[0])).chain(b.iter().map(|name| (name, FILES[1])));
        let right: Vec<_> = told().collect();
        let is_right = |dir: &TempDir| {
            let checkpoint = Checkpoint::open(dir).unwrap();
            assert_eq!((checkpoint.tensors().len(), checkpoint.files().len()), (2 * count, 2));
            for (name, file) in &right {
                let tensor = checkpoint.tensor(name).unwrap();
                assert_eq!(checkpoint.files()[tensor.file].name(), *file);
                assert_eq!(tensor.shard, tensor.file);
            }
            assert!(checkpoint.tensors_by_name().is_sorted_by(|a, b| a.name < b.name));
        };
        let is_refused = |dir: &TempDir, says: &str, tensor: &str| {
            let error = Checkpoint::open(dir).unwrap_err().to_string();
            assert!(error.contains(says) && error.contains(tensor), "{error}");
        };

        let dir = write([&a, &b], &right);
        is_right(&dir);
        // A file that the index does not name is none of the checkpoint's, and of its shards one may be missing.
        fs::write(dir.path().join("model-00003-of-00003.safetensors"), "").unwrap();
        is_right(&dir);
        fs::remove_file(dir.path().join(FILES[1])).unwrap();
        is_refused(&dir, "which is not there", FILES[1]);
        fs::write(dir.path().join(FILES[1]), "short").unwrap();
        is_refused(&dir, "too short", FILES[1]);

        is_right(&write([&a, &b], &told().rev().collect::<Vec<_>>()));
        // Not all tensors need be in the index.
        is_right(&write([&a, &b], &right[1..2 * count - 1]));
        let mut wrong = right.clone();
        wrong[count - 1].1 = FILES[1];
        is_refused(&write([&a, &b], &wrong), "but it is not", &a[count - 1]);
        let other = String::from("other");
        wrong[count - 1] = (&other, FILES[0]);
        is_refused(&write([&a, &b], &wrong), "but it is not", "other");
        wrong[count - 1] = right[0];
        is_refused(&write([&a, &b], &wrong), "twice", &a[0]);

        let both = [&b[..], &a[..1]].concat();
        is_refused(&write([&a, &both], &right), "is in two files", &a[0]);
        let again = [&b[..], &b[..1]].concat();
        is_refused(&write([&a, &again], &right), "twice", &b[0]);

        // What looks like the end of a tensor, within names.
        let odd = |names: &[String]| names.iter().map(|name| format!("{name}}},")).collect::<Vec<_>>();
        let (a, b) = (odd(&a), odd(&b));
        let told: Vec<_> = a.iter().map(|name| (name, FILES[0])).chain(b.iter().map(|name| (name, FILES[1]))).collect();
        let checkpoint = Checkpoint::open(write([&a, &b], &told)).unwrap();
        assert!(told.iter().all(|(name, file)| {
            checkpoint.tensor(name).is_ok_and(|tensor| checkpoint.files()[tensor.file].name() == *file)
        }));
    }

    #[test]
    fn an_index_is_compared_with_the_files_however_long_and_in_whatever_order() {
        check(2);
        let many = usize::try_from(PIECE).unwrap() / 100;
        check(many);
    }

    #[test]
    fn an_index_is_read_to_its_end_or_refused() {
        let dir = write([&["a".into()], &["b".into()]], &[(&"a".into(), FILES[0]), (&"b".into(), FILES[1])]);
        let path = dir.path().join(INDEX_NAME);
        let len = fs::metadata(&path).unwrap().len();
        let open = |limit| open_indexed(dir.path(), &path, None, limit).map_err(|e| e.to_string());
        assert_eq!(open(len).unwrap().tensors().len(), 2);
        assert!(open(len - 1).unwrap_err().contains(&format!("more than the {} that are read", len - 1)));
        // What is within the limit is an index by itself.
        fs::write(&path, [fs::read(&path).unwrap(), b" x".to_vec()].concat()).unwrap();
        assert!(open(len).unwrap_err().contains("that are read"));
        assert!(open(len + 2).unwrap_err().contains("trailing characters"));
    }

    #[test]
    fn a_header_in_pieces_is_that_of_a_whole() {
        let count = usize::try_from(8 * PIECE).unwrap() / 100;
        let entry = |i: usize| {
            let (from, to) = (2 * i, 2 * i + 2);
            format!(r#""w.{i:0200}": {{"dtype": "I8", "shape": [1, 2], "data_offsets": [{from}, {to}]}}"#)
        };
        let entries: Vec<String> = (0..count).map(entry).collect();
        let open = |header: String, len: usize| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("model.safetensors");
            fs::write(&path, test_support::safetensors(header, &vec![7; len])).unwrap();
            Checkpoint::open(&path).map_err(|e| e.to_string())
        };
        let metadata = r#""__metadata__": {"format": "pt"}"#;
        let (early, late) = entries.split_at(count / 3);
        let mut swapped = entries.clone();
        swapped.swap(count - 2, count - 1);
        for ordered in [entries.clone(), [late, early].concat(), swapped] {
            let checkpoint = open(format!("{{{metadata}, {}}}", ordered.join(", ")), 2 * count).unwrap();
            assert_eq!(checkpoint.tensors().len(), count);
            for (i, tensor) in checkpoint.tensors().iter().enumerate() {
                let offset = tensor.offset - checkpoint.tensors()[0].offset;
                assert_eq!((&*tensor.name, offset, tensor.len), (&*format!("w.{i:0200}"), 2 * i as u64, 2));
            }
            assert_eq!(checkpoint.origin().files[0].metadata.as_ref().unwrap()["format"], "pt");
        }

        let null = r#""__metadata__": null"#;
        let checkpoint = open(format!("{{{}, {null}}}", entries.join(", ")), 2 * count).unwrap();
        assert_eq!((checkpoint.tensors().len(), &checkpoint.origin().files[0].metadata), (count, &None));

        // Faults that no piece has by itself.
        for (entries, len, says) in [
            (format!("{}, {}", entries.join(", "), entry(0)), 2 * count, "overlaps"),
            (
                format!(
                    "{}, {}",
                    entries.join(", "),
                    entry(0).replace("[0, 2]", &format!("[{0}, {1}]", 2 * count, 2 * count + 2))
                ),
                2 * count + 2,
                "twice",
            ),
            (entries[1..].join(", "), 2 * count, "hole"),
            (entries.join(", "), 2 * count - 1, "truncated"),
            (entries.join(", "), 2 * count + 1, "1 bytes follow"),
            (format!("{metadata}, {}, {metadata}", entries.join(", ")), 2 * count, "__metadata__ occurs twice"),
            (format!("{null}, {}, {metadata}", entries.join(", ")), 2 * count, "__metadata__ occurs twice"),
            (format!("{metadata}, {}, {null}", entries.join(", ")), 2 * count, "__metadata__ occurs twice"),
        ] {
            let error = open(format!("{{{entries}}}"), len).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn shards_are_likely_where_there_are_as_many_as_they_say() {
        let listed = |names: &[&str]| names.iter().map(OsString::from).collect::<Vec<_>>();
        let likely = |names: &[&str]| likely_shards(Some(&listed(names))).len();
        assert_eq!(likely(&FILES), 2);
        assert_eq!(likely(&[FILES[0], FILES[1], "consolidated.safetensors", "model.safetensors"]), 2);
        assert_eq!(likely(&FILES[1..]), 0);
        assert_eq!(likely(&[FILES[0], FILES[1], "model-00003-of-00003.safetensors"]), 0);
        assert_eq!(likely(&[]), 0);
        assert!(likely_shards(None).is_empty());
    }

    #[test]
    fn an_index_of_mixed_dtypes_is_found_by_name() {
        // As files are written: by dtype, then by name; the index by name.
        let dir = tempfile::tempdir().unwrap();
        let mut header = Map::new();
        for (i, name) in ["b", "d", "a", "c"].iter().enumerate() {
            header.insert((*name).into(), json!({"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]}));
        }
        let header = Value::from(header).to_string();
        fs::write(dir.path().join("x.safetensors"), test_support::safetensors(header, &[0; 4])).unwrap();
        let map = json!({"a": "x.safetensors", "b": "x.safetensors", "c": "x.safetensors", "d": "x.safetensors"});
        fs::write(dir.path().join(INDEX_NAME), json!({"weight_map": map}).to_string()).unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let names: Vec<&str> = checkpoint.tensors().iter().map(|tensor| tensor.name.as_str()).collect();
        assert_eq!(names, ["b", "d", "a", "c"]);
        assert_eq!(checkpoint.position("c"), Some(3));
    }
}
