//! Loads through a cache are compared with the files, while chunks come, go and are fought for.

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use test_support::{header, noise, safetensors};

use super::*;
use crate::device::Block;
use crate::plan::Segment;
use crate::{ConvertOptions, Loader, convert};

const CHUNK: u64 = 8192;

/// A model of one tensor of `len` bytes, all different by `seed`.
fn model(dir: &Path, name: &str, len: u64, seed: u64) -> PathBuf {
    let path = dir.join(format!("{name}.safetensors"));
    fs::write(&path, safetensors(header(len), &noise(seed, usize::try_from(len).unwrap()))).unwrap();
    path
}

fn cache(chunks: u64) -> Cache {
    Cache::new(CHUNK, chunks * CHUNK, None).unwrap()
}

fn loader(cache: &Cache) -> Loader {
    Loader::builder().cache(cache.clone()).build().unwrap()
}

/// Loads a file whole by one segment, and compares every byte.
fn load_whole(loader: &Loader, checkpoint: &Checkpoint) -> crate::LoadReport {
    let file = &checkpoint.files()[0];
    let block = Block::alloc(&Device::host(), file.len()).unwrap();
    let segment = Segment::contiguous(0, 0, file.len(), 0, 0);
    let report = loader.fill_segments(checkpoint, &[segment], vec![block.clone()]).unwrap();
    let mut bytes = vec![0; usize::try_from(file.len()).unwrap()];
    block.read(0, &mut bytes).unwrap();
    assert!(bytes == fs::read(file.path()).unwrap(), "{} came wrong", file.name());
    report
}

#[test]
fn the_second_load_reads_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(model(dir.path(), "a", 100_000, 1)).unwrap();
    let (cache, len) = (cache(20), checkpoint.files()[0].len());
    let loader = loader(&cache);
    assert_eq!(load_whole(&loader, &checkpoint).cached_bytes, 0);
    assert_eq!(cache.resident_len(&checkpoint), len);
    let report = load_whole(&loader, &checkpoint);
    assert_eq!((report.cached_bytes, report.read_bytes), (len, len));
    assert_eq!(report.engines.iter().map(|e| e.engine).collect::<Vec<_>>(), ["cache"]);
    // Another opening of the same file finds its chunks; a file with the same bytes is another file.
    let again = Checkpoint::open(checkpoint.path()).unwrap();
    assert_eq!(load_whole(&loader, &again).cached_bytes, len);
    let copy = Checkpoint::open(model(dir.path(), "b", 100_000, 1)).unwrap();
    assert_eq!(cache.resident_len(&copy), 0);
}

#[test]
fn a_cache_is_filled_without_a_destination() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(model(dir.path(), "a", 100_000, 1)).unwrap();
    let cache = cache(20);
    let report = loader(&cache).fill_cache(&checkpoint).unwrap();
    assert_eq!((report.bytes, report.read_bytes), (0, checkpoint.files()[0].len()));
    assert_eq!(cache.resident_len(&checkpoint), report.read_bytes);
    assert!(Loader::builder().build().unwrap().fill_cache(&checkpoint).is_err());
}

#[test]
fn a_model_larger_than_the_cache_streams_through_it_and_leaves_its_beginning() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(model(dir.path(), "a", 40 * CHUNK, 1)).unwrap();
    let cache = cache(10);
    for _ in 0..3 {
        load_whole(&loader(&cache), &checkpoint);
        assert!(cache.usage().occupied <= 10 * CHUNK);
    }
    let state = cache.lock();
    let head = (0..4).all(|chunk| state.is_present(&cache.files(&checkpoint)[0], chunk));
    assert!(head, "the beginning is worth most to the next load");
}

#[test]
fn the_model_used_longest_ago_goes_first_and_a_pinned_one_stays() {
    let dir = tempfile::tempdir().unwrap();
    let open = |name: &str, seed| Checkpoint::open(model(dir.path(), name, 4 * CHUNK - 100, seed)).unwrap();
    let (a, b, c, d) = (open("a", 1), open("b", 2), open("c", 3), open("d", 4));
    let cache = cache(12);
    let loader = loader(&cache);
    for checkpoint in [&a, &b, &c] {
        load_whole(&loader, checkpoint);
    }
    cache.pin(&a).unwrap();
    load_whole(&loader, &d);
    let len = a.files()[0].len();
    assert_eq!([&a, &b, &c, &d].map(|checkpoint| cache.resident_len(checkpoint)), [len, 0, len, len]);
    assert!(cache.is_pinned(&a) && !cache.is_pinned(&b));
    cache.pin(&c).unwrap();
    assert!(cache.pin(&d).unwrap_err().to_string().contains("cannot be pinned"), "nothing would be left for others");
    assert_eq!(cache.evict_idle(Duration::ZERO), len, "only d is neither pinned nor in use");
    cache.unpin(&a);
    assert_eq!(cache.evict(&a), len);
    assert_eq!(cache.clear(), len);
    assert_eq!(cache.usage().occupied, 0);
}

#[test]
fn a_group_has_at_most_its_limit() {
    let dir = tempfile::tempdir().unwrap();
    let open = |name: &str, seed| Checkpoint::open(model(dir.path(), name, 8 * CHUNK, seed)).unwrap();
    let (a, b) = (open("a", 1), open("b", 2));
    let cache = cache(40);
    load_whole(&loader(&cache), &a);
    let limited = loader(&cache.limited("team/", 3 * CHUNK));
    for checkpoint in [&a, &b] {
        load_whole(&limited, checkpoint);
        assert!(cache.usage().occupied <= 3 * CHUNK, "{:?}", cache.usage());
        cache.lock().check();
    }
}

#[test]
fn pinned_models_do_not_count_for_their_groups_limit() {
    let dir = tempfile::tempdir().unwrap();
    let open = |name: &str, seed| Checkpoint::open(model(dir.path(), name, 8 * CHUNK - 200, seed)).unwrap();
    let (a, b) = (open("a", 1), open("b", 2));
    let cache = cache(40);
    let limited = loader(&cache.limited("team/", 3 * CHUNK));
    cache.pin(&a).unwrap();
    for checkpoint in [&a, &b] {
        load_whole(&limited, checkpoint);
    }
    let len = a.files()[0].len();
    assert_eq!((cache.resident_len(&a), cache.usage().occupied), (len, (8 + 3) * CHUNK));
    cache.unpin(&a);
    cache.lock().check();
    assert_eq!(cache.usage().occupied, 3 * CHUNK);
}

#[test]
fn a_file_that_two_checkpoints_share_stays_while_either_pins_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), "a", 4 * CHUNK - 200, 1);
    let linked = dir.path().join("b.safetensors");
    fs::hard_link(&path, &linked).unwrap();
    let (a, b) = (Checkpoint::open(&path).unwrap(), Checkpoint::open(&linked).unwrap());
    let cache = cache(12);
    let limited = cache.limited("team/", CHUNK);
    let is_pinned = || (cache.is_pinned(&a), cache.is_pinned(&b));
    cache.pin(&a).unwrap();
    assert_eq!(is_pinned(), (true, false));
    load_whole(&loader(&limited), &b);
    cache.pin(&b).unwrap();
    cache.unpin(&b);
    assert_eq!((is_pinned(), cache.usage().occupied), ((true, false), 4 * CHUNK));
    cache.unpin(&b);
    assert_eq!((cache.evict_idle(Duration::ZERO), cache.usage().pinned), (0, a.files()[0].len()));
    cache.lock().check();
    cache.unpin(&a);
    cache.lock().check();
    assert_eq!((is_pinned(), cache.usage().occupied, cache.usage().pinned), ((false, false), CHUNK, 0));
}

#[test]
fn what_is_pinned_of_a_path_is_what_was_pinned_last() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), "a", 6 * CHUNK - 200, 1);
    let old = Checkpoint::open(&path).unwrap();
    let cache = cache(10);
    cache.pin(&old).unwrap();
    // Both at once would not have the room.
    fs::remove_file(&path).unwrap();
    let new = Checkpoint::open(model(dir.path(), "a", 8 * CHUNK - 200, 2)).unwrap();
    cache.pin(&new).unwrap();
    assert_eq!((cache.is_pinned(&old), cache.is_pinned(&new)), (false, true));
    load_whole(&loader(&cache), &new);
    cache.unpin(&old);
    assert!(!cache.is_pinned(&new), "whatever opening says so");
    cache.clear();
    assert!(cache.lock().stamps().is_empty());
}

/// A store, and one that has the same data file, but the checksums of another; that one is `store-2`.
fn store_and_mixed(dir: &Path) -> (Checkpoint, Checkpoint) {
    let stores = [1, 2].map(|seed| {
        let source = Checkpoint::open(model(dir, "source", 9 << 20, seed)).unwrap();
        let store = dir.join(format!("store-{seed}"));
        convert(&source, &store, &ConvertOptions::new()).unwrap();
        store
    });
    let mixed = dir.join("mixed");
    fs::create_dir(&mixed).unwrap();
    fs::hard_link(stores[0].join("tensor.data_0"), mixed.join("tensor.data_0")).unwrap();
    for name in ["manifest.json", "tensor_index.json"] {
        fs::copy(stores[1].join(name), mixed.join(name)).unwrap();
    }
    (Checkpoint::open(&stores[0]).unwrap(), Checkpoint::open(&mixed).unwrap())
}

#[test]
fn what_comes_in_the_place_of_a_checkpoint_has_its_pin_and_the_chunks_of_the_same_files() {
    let dir = tempfile::tempdir().unwrap();
    let (first, mixed) = store_and_mixed(dir.path());
    let (again, other) =
        (Checkpoint::open(first.path()).unwrap(), Checkpoint::open(dir.path().join("store-2")).unwrap());
    let cache = Cache::new(4 << 20, 64 << 20, None).unwrap();
    let verifying = Loader::builder().cache(cache.clone()).verify(true).build().unwrap();
    let len = verifying.fill_cache(&first).unwrap().read_bytes;
    cache.pin(&first).unwrap();
    cache.replace(&first, &again).unwrap();
    assert_eq!((cache.is_pinned(&again), cache.resident_len(&again)), (true, len));
    cache.replace(&again, &mixed).unwrap();
    assert_eq!((cache.is_pinned(&mixed), cache.resident_len(&mixed)), (true, len));
    assert!(matches!(verifying.fill_cache(&mixed), Err(Error::Corrupt(_))), "it has other checksums");
    // What others pin stays for them.
    cache.unpin(&again);
    cache.unpin(&mixed);
    cache.pin(&first).unwrap();
    verifying.fill_cache(&first).unwrap();
    cache.replace(&mixed, &other).unwrap();
    assert_eq!((cache.resident_len(&first), cache.is_pinned(&other)), (len, false));
    // There is no room for what is too large: it is not pinned, and the old one is no more.
    let large = Checkpoint::open(model(dir.path(), "large", 80 << 20, 3)).unwrap();
    assert!(cache.replace(&first, &large).is_err());
    assert_eq!((cache.is_pinned(&first), cache.is_pinned(&large), cache.usage().resident), (false, false, 0));
}

#[test]
fn a_chunk_is_compared_with_the_checksums_of_whoever_wants_it() {
    let dir = tempfile::tempdir().unwrap();
    let (store, mixed) = store_and_mixed(dir.path());
    let cache = Cache::new(4 << 20, 64 << 20, None).unwrap();
    let verifying = Loader::builder().cache(cache.clone()).verify(true).build().unwrap();
    let len = verifying.fill_cache(&store).unwrap().read_bytes;
    assert_eq!(load_whole(&verifying, &store).cached_bytes, len);
    assert!(matches!(verifying.fill_cache(&mixed), Err(Error::Corrupt(_))), "another store's checksums were good");
    assert_eq!(load_whole(&verifying, &store).notes, Vec::<String>::new());
    // As one who does not verify sees it, both have the same file.
    assert_eq!(loader(&cache).fill_cache(&mixed).unwrap().cached_bytes, len);
}

#[test]
fn a_file_that_claims_more_chunks_than_a_list_can_have_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse.safetensors");
    // One chunk more than is allowed; not all file systems have files so long.
    let len = CHUNK << 24;
    let start = safetensors(header(len), &[]);
    fs::write(&path, &start).unwrap();
    let file = fs::File::options().write(true).open(&path).unwrap();
    if file.set_len(start.len() as u64 + len).is_err() {
        eprintln!("skipped: files of {len} bytes are not to be had here");
        return;
    }
    let checkpoint = Checkpoint::open(&path).unwrap();
    let error = loader(&cache(10)).fill_cache(&checkpoint).unwrap_err().to_string();
    assert!(error.contains("16777217 chunks of"), "{error}");
}

#[test]
fn a_load_that_fails_leaves_nothing_of_its_file_and_its_group() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(model(dir.path(), "a", 8 * CHUNK, 1)).unwrap();
    let cache = cache(40);
    let limited = cache.limited("team/", 3 * CHUNK);
    // Before it begins: the segment passes the file's end.
    let file = &checkpoint.files()[0];
    let block = Block::alloc(&Device::host(), file.len()).unwrap();
    let outside = Segment::contiguous(0, 1, file.len(), 0, 0);
    assert!(loader(&limited).fill_segments(&checkpoint, &[outside], vec![block]).is_err());
    assert!(cache.lock().stamps().is_empty());
    // And after that.
    let cancel = crate::Cancel::new();
    cancel.cancel();
    let control = crate::Control::new().cancelled_by(cancel);
    let cancelled = Loader::builder().cache(limited.clone()).control(control).build().unwrap();
    assert!(matches!(cancelled.fill_cache(&checkpoint), Err(Error::Cancelled)));
    assert!(cache.lock().stamps().is_empty());
}

#[test]
fn a_load_keeps_its_groups_limit_whatever_becomes_of_others() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(model(dir.path(), "a", 8 * CHUNK, 1)).unwrap();
    let cache = cache(40);
    // It is made before the end of another load, with which all of the file goes.
    let other = cache.begin(&checkpoint);
    let limited = loader(&cache.limited("team/", 3 * CHUNK));
    drop(other);
    load_whole(&limited, &checkpoint);
    assert_eq!(cache.usage().occupied, 3 * CHUNK);
    cache.lock().check();
}

#[test]
fn two_loads_at_once_read_a_file_once() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(model(dir.path(), "a", 100 * CHUNK, 1)).unwrap();
    let cache = cache(200);
    let loader = loader(&cache);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| load_whole(&loader, &checkpoint));
        }
    });
    assert_eq!(cache.usage().misses, 101, "each chunk is read by one load");
}

#[test]
fn loads_at_once_read_past_the_page_cache_by_small_buffers() {
    // Where the build directory is, files can be read directly.
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let checkpoint = Checkpoint::open(model(dir.path(), "a", (5 << 20) + 17, 1)).unwrap();
    for chunks in [2, 20, 100] {
        // Chunks of four steps.
        let cache = Cache::new(64 << 10, chunks * (64 << 10), None).unwrap();
        let builder = Loader::builder().cache(cache.clone()).direct(Some(true));
        let loader = builder.clone().build().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| load_whole(&loader, &checkpoint));
            }
            let cancel = crate::Cancel::new();
            let stop = cancel.clone();
            let control = crate::Control::new().cancelled_by(cancel).on_progress(move |_| stop.cancel());
            let stopped = builder.clone().control(control).build().unwrap().fill_cache(&checkpoint);
            assert!(stopped.is_err() || chunks == 100, "others may have read all of it");
        });
        let report = load_whole(&loader, &checkpoint);
        let missed = report.engines.iter().find(|engine| engine.source == "disk");
        assert_eq!(missed.is_some(), chunks < 100, "{report}");
        assert!(missed.is_none_or(|engine| (engine.engine, engine.direct) == ("pread", true)), "{report}");
    }
}

#[test]
fn a_load_that_gives_up_leaves_its_chunks_to_those_that_wait() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(model(dir.path(), "a", 50 * CHUNK, 1)).unwrap();
    let cache = cache(100);
    let plan = crate::LoadPlan::whole(&[checkpoint.files()[0].len()], CHUNK);
    let first = cache.begin(&checkpoint);
    assert_eq!(first.split(plan.pieces()).missing.len(), 51);
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| load_whole(&loader(&cache), &checkpoint));
        std::thread::sleep(Duration::from_millis(30));
        drop(first);
        let report = waits.join().unwrap();
        assert_eq!(report.cached_bytes, 0);
    });
    let CacheUsage { hits, misses, .. } = cache.usage();
    assert_eq!((hits, misses), (0, 102), "nothing was found: both loads had all of it to read");
}

#[test]
fn bytes_that_another_load_reads_are_no_reads_of_who_waits_for_them() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(model(dir.path(), "a", 50 * CHUNK, 1)).unwrap();
    let len = checkpoint.files()[0].len();
    let cache = cache(100);
    let plan = crate::LoadPlan::whole(&[len], CHUNK);
    let first = cache.begin(&checkpoint);
    let missing = first.split(plan.pieces()).missing;
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| load_whole(&loader(&cache), &checkpoint));
        std::thread::sleep(Duration::from_millis(30));
        for piece in missing {
            let mut buffer = first.try_buffer().unwrap();
            let bytes = &mut buffer.as_mut_slice()[..usize::try_from(piece.len).unwrap()];
            checkpoint.files()[0].read_exact_at(bytes, piece.offset).unwrap();
            first.put(piece, buffer, None);
        }
        let report = waits.join().unwrap();
        assert_eq!((report.read_bytes, report.cached_bytes), (len, len));
    });
    let CacheUsage { hits, misses, .. } = cache.usage();
    assert_eq!((hits, misses), (51, 51));
}

#[test]
fn a_corrupt_chunk_is_not_kept_and_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(model(dir.path(), "a", 9 << 20, 1)).unwrap();
    let store = dir.path().join("store");
    convert(&source, &store, &ConvertOptions::new()).unwrap();
    let checkpoint = Checkpoint::open(&store).unwrap();
    let good = Cache::new(8 << 20, 32 << 20, None).unwrap();
    let verifying = |cache: &Cache| Loader::builder().cache(cache.clone()).verify(true).build().unwrap();
    let report = verifying(&good).fill_cache(&checkpoint).unwrap();
    assert!(report.verified);
    verifying(&good).load(&checkpoint).unwrap();

    let data = store.join("tensor.data_0");
    let mut bytes = fs::read(&data).unwrap();
    bytes[5 << 20] ^= 1;
    fs::write(&data, bytes).unwrap();
    let changed = Checkpoint::open(&store).unwrap();
    assert!(!checkpoint.is_current() && changed.is_current());
    let error = verifying(&good).load(&changed).unwrap_err();
    assert!(matches!(&error, Error::Corrupt(chunk) if chunk.chunk == 1), "{error}");
    // What came without being compared is compared when it is wanted so.
    let unseen = Cache::new(8 << 20, 32 << 20, None).unwrap();
    loader(&unseen).fill_cache(&changed).unwrap();
    assert!(matches!(verifying(&unseen).load(&changed), Err(Error::Corrupt(_))));
    let odd = Cache::new(3 << 20, 32 << 20, None).unwrap();
    assert!(verifying(&odd).load(&checkpoint).unwrap_err().to_string().contains("cannot compare"));
}

#[test]
fn wrong_chunks_that_nobody_verified_are_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let source = Checkpoint::open(model(dir.path(), "a", 9 << 20, 1)).unwrap();
    let store = dir.path().join("store");
    convert(&source, &store, &ConvertOptions::new()).unwrap();
    let checkpoint = Checkpoint::open(&store).unwrap();
    let (cache, len) = (Cache::new(4 << 20, 32 << 20, None).unwrap(), checkpoint.files()[0].len());
    let verifying = Loader::builder().cache(cache.clone()).verify(true).build().unwrap();
    let told = |report: &crate::LoadReport| report.notes.iter().filter(|note| note.contains("read again")).count();
    let plan = crate::LoadPlan::whole(&[len], 4 << 20);

    // Zeros, and the buffers that hold them.
    let first = cache.begin(&checkpoint);
    assert_eq!(first.split(plan.pieces()).missing.len(), 3);
    let put = |piece| first.put(piece, first.try_buffer().unwrap(), None);
    let wrong: Vec<CachedChunk> = plan.pieces().iter().map(put).collect();
    let before = wrong[0].bytes().to_vec();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let report = load_whole(&verifying, &checkpoint);
                assert!(report.verified && told(&report) <= 1, "{report}");
            });
        }
    });
    assert!(wrong[0].bytes() == before, "a chunk was changed under who copies it");
    drop((wrong, first));
    assert_eq!((cache.resident_len(&checkpoint), cache.usage().evictions), (len, 3), "each was read again once");
    cache.lock().check();
    assert_eq!(told(&load_whole(&verifying, &checkpoint)), 0);
}

#[test]
fn a_file_that_was_changed_while_it_was_read_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), "a", 20 * CHUNK, 1);
    let checkpoint = Checkpoint::open(&path).unwrap();
    let cache = cache(100);
    load_whole(&loader(&cache), &checkpoint);
    model(dir.path(), "a", 20 * CHUNK, 2);
    assert!(loader(&cache).fill_cache(&checkpoint).is_err(), "the old opening names a file that is another one now");
    assert_eq!(cache.resident_len(&checkpoint), 0);
    load_whole(&loader(&cache), &Checkpoint::open(&path).unwrap());
}

#[test]
fn too_small_a_cache_is_refused() {
    assert!(Cache::new(CHUNK, CHUNK, None).is_err());
    assert!(Cache::new(1000, 1 << 20, None).is_err());
    assert!(Cache::new(0, 1 << 20, None).is_err());
}

#[derive(Debug, Clone)]
enum Step {
    Load(usize, bool),
    Fill(usize),
    Cancelled(usize),
    Evict(usize),
    Pin(usize),
    Unpin(usize),
    Clear,
    Idle,
    Limited(usize, u64),
}

fn step() -> impl Strategy<Value = Step> {
    let model = 0..4usize;
    prop_oneof![
        6 => (model.clone(), any::<bool>()).prop_map(|(m, part)| Step::Load(m, part)),
        2 => model.clone().prop_map(Step::Fill),
        2 => model.clone().prop_map(Step::Cancelled),
        1 => model.clone().prop_map(Step::Evict),
        1 => model.clone().prop_map(Step::Pin),
        2 => model.clone().prop_map(Step::Unpin),
        1 => Just(Step::Clear),
        1 => Just(Step::Idle),
        1 => (model, 1..30u64).prop_map(|(m, n)| Step::Limited(m, n)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Three threads do whatever they like with four models and a cache that holds half of them: every load brings the
    /// right bytes, the cache never holds more than it may, and in the end all memory is there again.
    #[test]
    fn any_order_of_uses_gives_right_bytes_and_keeps_the_counts(
        threads in prop::collection::vec(prop::collection::vec(step(), 1..12), 3)
    ) {
        let dir = tempfile::tempdir().unwrap();
        let lens = [5 * CHUNK, 9 * CHUNK + 77, 1, 30 * CHUNK];
        let models: Vec<Checkpoint> = (0u64..)
            .zip(lens)
            .map(|(i, len)| Checkpoint::open(model(dir.path(), &format!("m{i}"), len, i)).unwrap())
            .collect();
        let cache = cache(22);
        std::thread::scope(|scope| {
            for steps in &threads {
                scope.spawn(|| steps.iter().for_each(|step| act(step, &cache, &models)));
            }
        });
        cache.lock().check();
        let usage = cache.usage();
        prop_assert!(usage.occupied <= usage.capacity);
        models.iter().for_each(|checkpoint| cache.unpin(checkpoint));
        cache.clear();
        prop_assert_eq!(cache.usage().occupied, 0);
        let free: Vec<_> = std::iter::from_fn(|| cache.shared.pool.try_acquire()).collect();
        prop_assert_eq!(free.len(), 22, "every buffer came back");
    }
}

fn act(step: &Step, cache: &Cache, models: &[Checkpoint]) {
    match *step {
        Step::Load(m, false) => drop(load_whole(&loader(cache), &models[m])),
        Step::Load(m, true) => {
            // Every fifth byte of the middle.
            let file = &models[m].files()[0];
            let rows = file.len() / 10;
            let block = Block::alloc(&Device::host(), rows.max(1)).unwrap();
            let segment = Segment {
                file: 0,
                offset: file.len() / 4,
                row_len: 1,
                rows,
                src_pitch: 5,
                block: 0,
                dst_offset: 0,
                dst_pitch: 1,
            };
            // Several reads in flight, so that a lane has buffers that it cannot give back before they are answered.
            let engine = crate::EngineChoice::Uring;
            let loader = Loader::builder().cache(cache.clone()).engine(engine).build().unwrap();
            loader.fill_segments(&models[m], &[segment], vec![block.clone()]).unwrap();
            let mut bytes = vec![0; usize::try_from(rows).unwrap()];
            block.read(0, &mut bytes).unwrap();
            let all = fs::read(file.path()).unwrap();
            let start = usize::try_from(file.len() / 4).unwrap();
            assert!(bytes.iter().eq(all[start..].iter().step_by(5).take(bytes.len())));
        }
        Step::Fill(m) => drop(loader(cache).fill_cache(&models[m]).unwrap()),
        Step::Cancelled(m) => {
            let cancel = crate::Cancel::new();
            let told = cancel.clone();
            let control = crate::Control::new().cancelled_by(cancel).on_progress(move |_| told.cancel());
            let loader = Loader::builder().cache(cache.clone()).control(control).build().unwrap();
            assert!(matches!(loader.fill_cache(&models[m]), Err(Error::Cancelled)));
        }
        Step::Evict(m) => drop(cache.evict(&models[m])),
        Step::Pin(m) => drop(cache.pin(&models[m])),
        Step::Unpin(m) => cache.unpin(&models[m]),
        Step::Clear => drop(cache.clear()),
        Step::Idle => drop(cache.evict_idle(Duration::ZERO)),
        Step::Limited(m, chunks) => {
            load_whole(&loader(&cache.limited("group", chunks * CHUNK)), &models[m]);
        }
    }
}
