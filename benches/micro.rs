//! What a load does beside moving bytes: `cargo bench -p sllm-core --bench micro`.
//!
//! Planning, opening (parsing), checksums and the buffer pool, each at the sizes of a dense model (291 tensors) and of
//! a mixture of experts (18,864). No weights are read: the files are sparse.

use std::fs::{self, File};
use std::hint::black_box;
use std::path::Path;

use criterion::{BatchSize, Criterion, Throughput};
use sllm_core::{
    BufferPool, Checkpoint, ConvertOptions, Dtype, Filter, LoadPlan, MemoryTensor, PAGE, Placement, PlanOptions,
    Segment, save,
};
use tempfile::TempDir;

/// Bytes of one checksummed chunk of a store (`docs/format.md`), and of the pool's buffers here.
const CHUNK_LEN: usize = 4 << 20;

fn layer_names(tensors: u64) -> Vec<String> {
    (0..tensors).map(|i| format!("model.layers.{i}.weight")).collect()
}

/// Writes the header of a safetensors file of U8 tensors of `len` bytes, and leaves the weights a hole.
fn sparse_safetensors(path: &Path, names: &[String], len: u64) {
    let entry = |(i, name): (u64, &String)| {
        let (start, end) = (i * len, (i + 1) * len);
        format!(r#"{name:?}:{{"dtype":"U8","shape":[{len}],"data_offsets":[{start},{end}]}}"#)
    };
    let json = format!("{{{}}}", (0..).zip(names).map(entry).collect::<Vec<_>>().join(","));
    let bytes = test_support::safetensors(json, &[]);
    fs::write(path, &bytes).expect("the header can be written");
    let file = File::options().write(true).open(path).expect("the file was just written");
    file.set_len((bytes.len() as u64) + (names.len() as u64) * len).expect("the file can be lengthened");
}

/// Writes experts' weights, 18,864 tensors of a page in two shards, and an index: the shards sorted by name, the index in
/// the order of a model.
fn write_sharded(dir: &Path) {
    fs::create_dir(dir).expect("the directory is new");
    let names: Vec<String> = (0..18_864 / 4)
        .flat_map(|i| ["norm", "gate", "up", "down"].map(|part| format!("experts.{i}.{part}.weight")))
        .collect();
    let mut entries = Vec::new();
    for (number, shard) in names.chunks(names.len() / 2).enumerate() {
        let file = format!("model-{:05}-of-00002.safetensors", number + 1);
        entries.extend(shard.iter().map(|name| format!("{name:?}:{file:?}")));
        let mut sorted = shard.to_vec();
        sorted.sort_unstable();
        sparse_safetensors(&dir.join(file), &sorted, PAGE);
    }
    let index = format!(r#"{{"metadata":{{}},"weight_map":{{{}}}}}"#, entries.join(","));
    fs::write(dir.join("model.safetensors.index.json"), index).expect("the index can be written");
}

/// A checkpoint of equal tensors, 8 GB in all.
fn checkpoint(dir: &TempDir, tensors: u64) -> Checkpoint {
    let path = dir.path().join(format!("{tensors}.safetensors"));
    sparse_safetensors(&path, &layer_names(tensors), (8_000_000_000 / tensors).next_multiple_of(256));
    Checkpoint::open(&path).expect("the checkpoint is well formed")
}

fn plan(c: &mut Criterion) {
    let dir = TempDir::new().expect("a temporary directory");
    let mut group = c.benchmark_group("plan");
    for tensors in [291, 18_864] {
        let model = checkpoint(&dir, tensors);
        let all = Filter::all().select(&model).expect("no pattern is given");
        let files: Vec<u64> = model.files().iter().map(|file| file.len()).collect();
        let options = PlanOptions::default();

        let place = || Placement::new(&model, all.iter().copied(), |_| 0).expect("the tensors fit");
        group.bench_function(format!("place/{tensors}"), |b| b.iter(place));
        let placement = place();
        let blocks = placement.block_lens();
        group.bench_function(format!("build aligned/{tensors}"), |b| {
            b.iter(|| LoadPlan::build(&files, &blocks, black_box(&placement.segments), &options));
        });

        // Tensors that go to places of their own, at no multiple of a page, in the reverse order of the file.
        let info = model.tensors();
        let room: Vec<u64> = info.iter().map(|tensor| tensor.len.next_multiple_of(256) + 256).collect();
        let block: u64 = room.iter().sum();
        let mut end = block;
        let scattered: Vec<Segment> = (info.iter().zip(&room))
            .map(|(tensor, room)| {
                end -= room;
                Segment::contiguous(tensor.file, tensor.offset, tensor.len, 0, end)
            })
            .collect();
        group.bench_function(format!("build scattered/{tensors}"), |b| {
            b.iter(|| LoadPlan::build(&files, &[block], black_box(&scattered), &options));
        });
    }
    group.finish();
}

fn checksum(c: &mut Criterion) {
    let chunk: Vec<u8> = (0..251).cycle().take(CHUNK_LEN).collect();
    let mut group = c.benchmark_group("checksum");
    group.throughput(Throughput::Bytes(CHUNK_LEN as u64));
    group.bench_function("crc64 of a chunk", |b| b.iter(|| crc_fast::crc64_nvme(black_box(&chunk))));
    group.finish();
}

fn pool(c: &mut Criterion) {
    let mut group = c.benchmark_group("pool");
    let buffers = 16;
    let new = || BufferPool::new(CHUNK_LEN, buffers, CHUNK_LEN, None).expect("memory can be mapped");
    group.throughput(Throughput::Bytes((buffers * CHUNK_LEN) as u64));
    group.bench_function("prepare 16 buffers of 4 MiB", |b| {
        b.iter_batched(new, |pool| pool.prepare_all(1), BatchSize::PerIteration);
    });
    let ready = new();
    ready.prepare_all(1);
    group.throughput(Throughput::Elements(1));
    group.bench_function("acquire and return", |b| b.iter(|| ready.try_acquire().expect("none is held")));
    group.finish();
}

fn parse(c: &mut Criterion) {
    let dir = TempDir::new().expect("a temporary directory");
    let mut group = c.benchmark_group("open");
    group.sample_size(10);
    let path = dir.path().join("many.safetensors");
    sparse_safetensors(&path, &layer_names(200_000), PAGE);
    group.bench_function("safetensors, 200,000 tensors", |b| b.iter(|| Checkpoint::open(black_box(&path))));

    let sharded = dir.path().join("sharded");
    write_sharded(&sharded);
    group.bench_function("safetensors, 18,864 tensors in 2 files with an index", |b| {
        b.iter(|| Checkpoint::open(black_box(&sharded)));
    });

    let bytes = [7u8; 256];
    let names = layer_names(18_864);
    // A slice is one tensor's: equal slices would be stored as tied ones.
    let weights: Vec<[u8; 256]> = vec![bytes; names.len()];
    let tensor = |(name, bytes)| MemoryTensor { name, dtype: Dtype::U8, shape: &[256], strides: None, bytes };
    let slices = weights.iter().map(|bytes| &bytes[..]);
    let tensors: Vec<MemoryTensor<'_>> = names.iter().map(String::as_str).zip(slices).map(tensor).collect();
    let store = dir.path().join("store");
    save(&tensors, &store, &ConvertOptions::new()).expect("the store can be written");
    group.bench_function("store, 18,864 tensors", |b| b.iter(|| Checkpoint::open(black_box(&store))));
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    plan(&mut criterion);
    checksum(&mut criterion);
    pool(&mut criterion);
    parse(&mut criterion);
    criterion.final_summary();
}
