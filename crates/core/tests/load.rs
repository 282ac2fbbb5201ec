//! Loads to the host: every layout and engine gives the bytes of the source.
#![allow(clippy::cast_possible_truncation, reason = "made sizes are small")]

use std::collections::BTreeMap;
use std::path::Path;

use sllm_core::{Checkpoint, ConvertOptions, Dtype, EngineChoice, ErrorKind, Filter, Loader, convert};

/// A safetensors file of every dtype, odd sizes, empty tensors and one large tensor; name to bytes.
fn make(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut tensors = BTreeMap::new();
    let mut header = serde_json::Map::new();
    let mut data: Vec<u8> = Vec::new();
    let mut add = |name: &str, dtype: Dtype, shape: &[u64]| {
        let len = dtype.byte_len(shape).unwrap() as usize;
        let seed = data.len() as u64;
        let bytes: Vec<u8> = (0..len as u64).map(|i| ((i + seed).wrapping_mul(0x9E37_79B9) >> 11) as u8).collect();
        let offsets = [data.len(), data.len() + len];
        header.insert(name.into(), serde_json::json!({"dtype": dtype.name(), "shape": shape, "data_offsets": offsets}));
        data.extend(&bytes);
        tensors.insert(name.to_owned(), bytes);
    };
    for dtype in Dtype::all() {
        add(&format!("odd.{dtype}"), dtype, &[3, 5, 4]);
        add(&format!("scalar.{dtype}"), dtype, if dtype.bits() < 8 { &[8] } else { &[] });
        add(&format!("none.{dtype}"), dtype, &[0, 7]);
    }
    add("large", Dtype::BF16, &[3001, 1703]);
    add("page", Dtype::U8, &[65536]);
    add("last", Dtype::U8, &[1]);
    let mut json = serde_json::to_vec(&header).unwrap();
    json.resize(json.len().next_multiple_of(8), b' ');
    std::fs::write(path, test_support::safetensors(json, &data)).unwrap();
    tensors
}

#[test]
fn every_layout_and_engine_gives_the_bytes_of_the_source() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let source = dir.path().join("model.safetensors");
    let expected = make(&source);
    let store = dir.path().join("store");
    convert(&Checkpoint::open(&source).unwrap(), &store, &ConvertOptions::new()).unwrap();
    for path in [&source, &store] {
        let checkpoint = Checkpoint::open(path).unwrap();
        for engine in [EngineChoice::Auto, EngineChoice::Uring, EngineChoice::Pread, EngineChoice::Mapped] {
            for direct in [None, Some(true), Some(false)] {
                for verify in [false, checkpoint.sums().is_some() && engine != EngineChoice::Mapped] {
                    let loader = Loader::builder().engine(engine).direct(direct).verify(verify).build().unwrap();
                    let loaded = loader.load(&checkpoint).unwrap();
                    assert_eq!(loaded.tensors().len(), expected.len());
                    for (name, bytes) in &expected {
                        let tensor = loaded.tensor(name).unwrap();
                        assert!(&tensor.to_vec().unwrap() == bytes, "{name} by {engine}, direct {direct:?}");
                        assert_eq!(tensor.addr() % 256, 0);
                    }
                }
            }
        }
    }
}

#[test]
fn a_small_ring_and_one_thread_are_enough() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let source = dir.path().join("model.safetensors");
    let expected = make(&source);
    let checkpoint = Checkpoint::open(&source).unwrap();
    for engine in [EngineChoice::Uring, EngineChoice::Pread] {
        let loader = Loader::builder().engine(engine).direct(Some(true)).threads(1).pinned_bytes(8192).build().unwrap();
        let loaded = loader.load(&checkpoint).unwrap();
        assert!(loaded.tensor("large").unwrap().to_vec().unwrap() == expected["large"]);
    }
}

#[test]
fn a_glob_loads_what_it_names_and_nothing_else() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let source = dir.path().join("model.safetensors");
    let expected = make(&source);
    let checkpoint = Checkpoint::open(&source).unwrap();
    let loader = Loader::builder().build().unwrap();
    let loaded = loader.load_filtered(&checkpoint, &Filter::globs(["odd.*", "last"]).unwrap()).unwrap();
    assert_eq!(loaded.tensors().len(), 23);
    assert!(loaded.report().read_bytes < 100_000, "{}", loaded.report().read_bytes);
    for tensor in loaded.tensors() {
        let name = tensor.info().name.as_str();
        assert_eq!(tensor.to_vec().unwrap(), expected[name]);
        assert_eq!(loaded.tensor(name).unwrap().addr(), tensor.addr());
    }
    assert_eq!(loaded.tensor("large").unwrap_err().kind(), ErrorKind::NotFound, "the checkpoint has it, the load not");
    let missing = loader.load_filtered(&checkpoint, &Filter::globs(["nothing.*"]).unwrap()).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
}

#[test]
fn a_flipped_bit_stops_a_verified_load_and_names_its_tensor() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let source = dir.path().join("model.safetensors");
    make(&source);
    let store = dir.path().join("store");
    convert(&Checkpoint::open(&source).unwrap(), &store, &ConvertOptions::new()).unwrap();
    let good = Checkpoint::open(&store).unwrap();
    let large = good.tensor("large").unwrap().offset;
    let bytes = std::fs::read(store.join("tensor.data_0")).unwrap();
    let chunk_len = 4 << 20;
    // In the first and the last piece of a chunk, at the steps in which a piece is read, and in a file's last chunk.
    let step = 256 << 10;
    let places = [0, 1, step - 1, step, 2 * step + 1, chunk_len - 1, chunk_len + 700_000];
    for at in places.map(|place| chunk_len + place) {
        assert!(at > large && at < large + 10_000_000);
        let other = dir.path().join(at.to_string());
        std::fs::create_dir(&other).unwrap();
        for name in ["manifest.json", "tensor_index.json"] {
            std::fs::copy(store.join(name), other.join(name)).unwrap();
        }
        let data = other.join("tensor.data_0");
        let mut bytes = bytes.clone();
        bytes[at as usize] ^= 4;
        std::fs::write(&data, bytes).unwrap();
        let bad = Checkpoint::open(&other).unwrap();
        for (engine, direct) in [(EngineChoice::Pread, false), (EngineChoice::Pread, true), (EngineChoice::Uring, true)]
        {
            // With little staging memory a chunk comes in many pieces.
            for (pinned, pieces) in [(None, 5..=7), (Some(64 << 10), 300..=400)] {
                let builder = Loader::builder().engine(engine).direct(Some(direct)).pinned_bytes(pinned).verify(true);
                let loaded = builder.clone().build().unwrap().load(&good).unwrap();
                assert!(pieces.contains(&loaded.report().pieces), "{}", loaded.report().pieces);
                let error = builder.clone().build().unwrap().load(&bad).unwrap_err();
                let sllm_core::Error::Corrupt(chunk) = &error else { panic!("{engine}, byte {at}: {error}") };
                assert_eq!((chunk.chunk, chunk.path.as_path()), (at / chunk_len, data.as_path()));
                assert!(chunk.tensors.iter().any(|name| name == "large"), "{error}");
                assert!(builder.verify(false).build().unwrap().load(&bad).is_ok());
            }
        }
    }
}

#[test]
fn a_chunk_of_which_little_is_wanted_is_verified_whole() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let source = dir.path().join("model.safetensors");
    make(&source);
    let store = dir.path().join("store");
    convert(&Checkpoint::open(&source).unwrap(), &store, &ConvertOptions::new()).unwrap();
    let checkpoint = Checkpoint::open(&store).unwrap();
    let page = checkpoint.tensor("page").unwrap();
    let chunk = page.offset / (4 << 20);
    let data = store.join("tensor.data_0");
    let mut bytes = std::fs::read(&data).unwrap();
    // The byte of its chunk that is furthest from it.
    let (first, last) = (chunk * (4 << 20), bytes.len().min((chunk as usize + 1) * (4 << 20)) as u64 - 1);
    let far = if page.offset - first > last - page.offset { first } else { last };
    bytes[far as usize] ^= 1;
    std::fs::write(&data, bytes).unwrap();
    let checkpoint = Checkpoint::open(&store).unwrap();
    let filter = Filter::globs(["page"]).unwrap();
    let load = |verify| Loader::builder().verify(verify).build().unwrap().load_filtered(&checkpoint, &filter);
    assert!(load(false).is_ok());
    assert_eq!(load(true).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn the_report_says_whether_bytes_came_from_the_disk() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let source = dir.path().join("model.safetensors");
    make(&source);
    let checkpoint = Checkpoint::open(&source).unwrap();
    let source_of = |direct| {
        let loader = Loader::builder().engine(EngineChoice::Pread).direct(direct).build().unwrap();
        let loaded = loader.load(&checkpoint).unwrap();
        let engines = &loaded.report().engines;
        assert_eq!(engines.len(), 1, "{engines:?}");
        engines[0].source
    };
    assert_eq!((source_of(Some(true)), source_of(Some(false))), ("disk", "page cache"));
    let drop_pages = || {
        let file = std::fs::File::open(&source).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    };
    drop_pages();
    if source_of(None) != "disk" {
        eprintln!("skipped: this file system keeps its pages, or does not say what is cached");
        return;
    }
    // Read by the page cache, where it is not.
    drop_pages();
    assert_eq!(source_of(Some(false)), "disk");
    assert_eq!(source_of(Some(false)), "page cache");
}

#[test]
fn cancelling_stops_a_load() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let source = dir.path().join("model.safetensors");
    make(&source);
    let cancel = sllm_core::Cancel::new();
    let control = sllm_core::Control::new().cancelled_by(cancel.clone()).on_progress(move |_| cancel.cancel());
    let loader = Loader::builder().control(control).build().unwrap();
    let error = loader.load(&Checkpoint::open(&source).unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
}

#[test]
fn a_file_that_is_rewritten_after_it_was_opened_is_an_error() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let source = dir.path().join("model.safetensors");
    make(&source);
    let checkpoint = Checkpoint::open(&source).unwrap();
    let mut bytes = std::fs::read(&source).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::thread::sleep(std::time::Duration::from_millis(20)); // a file system's clock is coarse
    std::fs::write(&source, bytes).unwrap();
    let error = Loader::builder().build().unwrap().load(&checkpoint).unwrap_err();
    assert!(error.to_string().contains("changed"), "{error}");
}

#[test]
fn blocks_that_overlap_are_refused() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let source = dir.path().join("model.safetensors");
    make(&source);
    let checkpoint = Checkpoint::open(&source).unwrap();
    let loader = Loader::builder().build().unwrap();
    let block = sllm_core::Block::alloc(&sllm_core::Device::host(), 8192).unwrap();
    let segments = [0, 1].map(|block| sllm_core::Segment::contiguous(0, 0, 100, block, 0));
    let error = loader.fill_segments(&checkpoint, &segments, vec![block.clone(), block]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}
