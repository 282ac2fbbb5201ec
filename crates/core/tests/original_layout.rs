//! The original ServerlessLLM layout: its directories are opened, and its reader can read ours.

mod common;

use std::fs;
use std::path::Path;

use common::{Made, assert_holds, bytes_of, every_dtype, noise, write_safetensors};
use serde_json::{Map, Value, json};
use sllm_core::{Checkpoint, ConvertOptions, Dtype, ErrorKind, Layout, Shape, WorkOptions, convert, export, verify};
use tempfile::tempdir;

/// Reads a directory as the original does: offsets count over the data files, as long as these are, one after another.
fn read_as_the_original(dir: &Path) -> Map<String, Value> {
    let mut data = Vec::new();
    for k in 0.. {
        match fs::read(dir.join(format!("tensor.data_{k}"))) {
            Ok(bytes) => data.extend(bytes),
            Err(_) => break,
        }
    }
    let index: Map<String, Value> = serde_json::from_slice(&fs::read(dir.join("tensor_index.json")).unwrap()).unwrap();
    let entry = |(name, entry): (String, Value)| {
        let number = |i: usize| usize::try_from(entry[i].as_u64().unwrap()).unwrap();
        let bytes = &data[number(0)..number(0) + number(1)];
        (name, json!([entry[4], entry[2], entry[3], bytes]))
    };
    index.into_iter().map(entry).collect()
}

/// Writes tensors as the original does: each at a multiple of 8, a new file where the next would pass `max_file_len`.
fn write_as_the_original(dir: &Path, tensors: &[(&Made, Option<Vec<u64>>)], max_file_len: usize) {
    fs::create_dir_all(dir).unwrap();
    let mut files: Vec<Vec<u8>> = vec![Vec::new()];
    let mut index = Map::new();
    for (made, strides) in tensors {
        let mut file = files.last_mut().unwrap();
        if file.len() + made.bytes.len() > max_file_len && !file.is_empty() {
            files.push(Vec::new());
            file = files.last_mut().unwrap();
        }
        file.extend(&made.bytes);
        file.resize(file.len().next_multiple_of(8), 0);
        let end: usize = files.iter().map(Vec::len).sum();
        let offset = end - made.bytes.len().next_multiple_of(8);
        let strides = strides.clone().unwrap_or_else(|| contiguous(&made.shape));
        let dtype = format!("torch.{}", made.dtype.torch_name());
        index.insert(made.name.clone(), json!([offset, made.bytes.len(), made.shape, strides, dtype]));
    }
    for (k, bytes) in files.iter().enumerate() {
        fs::write(dir.join(format!("tensor.data_{k}")), bytes).unwrap();
    }
    fs::write(dir.join("tensor_index.json"), Value::Object(index).to_string()).unwrap();
}

fn contiguous(shape: &[u64]) -> Vec<u64> {
    (0..shape.len()).map(|i| shape[i + 1..].iter().product::<u64>().max(1)).collect()
}

#[test]
fn the_originals_reader_reads_what_we_write() {
    let dir = tempdir().unwrap();
    // torch has no packed 6-bit types, and its 4-bit type counts pairs.
    let packed = [Dtype::F4, Dtype::F6_E2M3, Dtype::F6_E3M2];
    let tensors: Vec<Made> = every_dtype().into_iter().filter(|made| !packed.contains(&made.dtype)).collect();
    write_safetensors(&dir.path().join("m.safetensors"), &tensors, None);
    let source = Checkpoint::open(dir.path().join("m.safetensors")).unwrap();
    convert(&source, &dir.path().join("store"), &ConvertOptions::new()).unwrap();
    let read = read_as_the_original(&dir.path().join("store"));
    assert_eq!(read.len(), tensors.len());
    for made in &tensors {
        let strides =
            if made.shape.contains(&0) { read[&made.name][2].clone() } else { json!(contiguous(&made.shape)) };
        let dtype = format!("torch.{}", made.dtype.torch_name());
        assert!(read[&made.name] == json!([dtype, made.shape, strides, made.bytes]), "{:?}", made.name);
    }
    // Without our manifest it is a directory of the original's, and gives the same tensors.
    fs::remove_file(dir.path().join("store/manifest.json")).unwrap();
    let original = Checkpoint::open(dir.path().join("store")).unwrap();
    assert_eq!(original.layout(), Layout::Original);
    assert_holds(&original, &tensors);
}

#[test]
fn the_originals_directories_are_opened_and_converted() {
    let dir = tempdir().unwrap();
    let mut tensors: Vec<Made> = (0..30).map(|i| Made::new(&format!("t{i}"), Dtype::BF16, &[i * 7, 3])).collect();
    tensors.push(Made::new("scalar", Dtype::F32, &[]));
    let transposed = Made { shape: vec![8, 5], ..Made::new("transposed", Dtype::F32, &[5, 8]) };
    let mut written: Vec<_> = tensors.iter().map(|made| (made, None)).collect();
    written.push((&transposed, Some(vec![1, 8])));
    let original = dir.path().join("original");
    write_as_the_original(&original, &written, 4000);
    fs::write(original.join("config.json"), "{}").unwrap();

    let source = Checkpoint::open(&original).unwrap();
    assert_eq!(source.layout(), Layout::Original);
    assert!(source.files().len() > 3);
    assert_holds(&source, tensors.iter().chain([&transposed]));
    let report = convert(&source, &dir.path().join("store"), &ConvertOptions::new()).unwrap();
    assert_eq!((report.tensors, report.other_files), (32, 1));
    let store = Checkpoint::open(dir.path().join("store")).unwrap();
    assert_holds(&store, tensors.iter().chain([&transposed]));
    assert_eq!(store.tensor("transposed").unwrap().strides.as_deref(), Some(&Shape::from(&[1, 8][..])));
    assert!(verify(&store, &WorkOptions::new()).unwrap().corrupt.is_empty());
    let read = read_as_the_original(&dir.path().join("store"));
    assert_eq!(read["transposed"], json!(["torch.float32", [8, 5], [1, 8], transposed.bytes]));

    let error = export(&source, &dir.path().join("back"), &WorkOptions::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    write_as_the_original(&original, &written[..31], 4000);
    export(&Checkpoint::open(&original).unwrap(), &dir.path().join("back"), &WorkOptions::new()).unwrap();
    assert_holds(&Checkpoint::open(dir.path().join("back")).unwrap(), &tensors);
    let error = verify(&Checkpoint::open(&original).unwrap(), &WorkOptions::new()).unwrap_err();
    assert!(error.kind() == ErrorKind::Invalid && error.to_string().contains("no checksums"), "{error}");
}

#[test]
fn names_of_one_storage_are_kept() {
    let dir = tempdir().unwrap();
    let bytes = noise(3, 480);
    fs::write(dir.path().join("tensor.data_0"), &bytes).unwrap();
    let index = json!({
        "whole": [0, 480, [10, 12], [12, 1], "torch.float32"],
        "tied": [0, 480, [120], [1], "torch.float32"],
        "transposed": [0, 480, [12, 10], [1, 12], "torch.float32"],
        "first row": [0, 480, [12], [1], "torch.float32"],
    });
    fs::write(dir.path().join("tensor_index.json"), index.to_string()).unwrap();
    let source = Checkpoint::open(dir.path()).unwrap();
    let target = tempdir().unwrap();
    convert(&source, &target.path().join("store"), &ConvertOptions::new()).unwrap();
    let store = Checkpoint::open(target.path().join("store")).unwrap();
    for (name, len) in [("whole", 480), ("tied", 480), ("transposed", 480), ("first row", 48)] {
        assert_eq!(bytes_of(&store, store.tensor(name).unwrap()), bytes[..len], "{name}");
    }
    assert!(store.tensor("whole").unwrap().is_tied_with(store.tensor("transposed").unwrap()));
    assert!(store.tensor("whole").unwrap().is_tied_with(store.tensor("tied").unwrap()));
}

#[test]
fn a_lost_tail_is_told() {
    let dir = tempdir().unwrap();
    let tensors = [Made::new("a", Dtype::F32, &[1000]), Made::new("b", Dtype::F32, &[100])];
    write_as_the_original(dir.path(), &[(&tensors[0], None), (&tensors[1], None)], 1 << 20);
    let data = fs::File::options().write(true).open(dir.path().join("tensor.data_0")).unwrap();
    data.set_len(4096).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    let message = error.to_string();
    assert_eq!(error.kind(), ErrorKind::Format);
    for part in ["tensor_index.json", "\"b\"", "at byte 4000", "end at 4096", "tail is lost"] {
        assert!(message.contains(part), "{message}");
    }
    fs::remove_file(dir.path().join("tensor.data_0")).unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap_err().kind(), ErrorKind::Format);
}

#[test]
fn a_tensor_over_a_files_end_is_told() {
    let dir = tempdir().unwrap();
    for k in 0..2 {
        fs::write(dir.path().join(format!("tensor.data_{k}")), [0; 100]).unwrap();
    }
    fs::write(dir.path().join("tensor_index.json"), r#"{"w": [96, 8, [8], [1], "torch.uint8"]}"#).unwrap();
    let message = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(message.contains("\"w\"") && message.contains("lies over the end of tensor.data_0"), "{message}");
}

#[test]
fn a_tensor_of_no_bytes_without_data_files_is_refused() {
    let dir = tempdir().unwrap();
    for (index, tensors) in [(r#"{"a":[0,0,[0],[1],"torch.float32"]}"#, None), ("{}", Some(0))] {
        fs::write(dir.path().join("tensor_index.json"), index).unwrap();
        let opened = Checkpoint::open(dir.path());
        assert_eq!(opened.as_ref().ok().map(|checkpoint| checkpoint.tensors().len()), tensors);
        if let Err(error) = opened {
            assert_eq!(error.kind(), ErrorKind::Format);
            let message = error.to_string();
            assert!(message.contains("\"a\"") && message.contains("no data file 0"), "{message}");
        }
    }
    // With a file, though an empty one, it has a place.
    fs::write(dir.path().join("tensor_index.json"), r#"{"a":[0,0,[0],[1],"torch.float32"]}"#).unwrap();
    fs::write(dir.path().join("tensor.data_0"), "").unwrap();
    let (checkpoint, target) = (Checkpoint::open(dir.path()).unwrap(), dir.path().with_extension("store"));
    assert_eq!(convert(&checkpoint, &target, &ConvertOptions::new()).unwrap().tensors, 1);
    fs::remove_dir_all(target).unwrap();
}
