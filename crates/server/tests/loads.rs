//! Loads into host memory by our own service: what arrives is what is on the disk, or an error says why not.

mod common;

use std::fs;
use std::path::Path;
use std::time::Duration;

use common::session::{Loading, all_of, contents, load, open_message, ticket};
use common::{SEALED, Served, memory, models};
use sllm_proto::storage::LoadModelRequest;
use sllm_proto::store::load_event::Kind as Event;
use sllm_proto::store::load_request::Kind as Asked;
use sllm_proto::store::{
    Attach, Batch, EvictRequest, ListRequest, Open, PinRequest, PreloadRequest, Segment, StatusRequest, UnpinRequest,
    attach,
};
use tonic::{Code, Status};

const LEN: usize = 9_000_123;
/// Between looks at what the server does.
const PAUSE: Duration = Duration::from_millis(5);

fn fill(models: &std::path::Path) {
    models::safetensors(models, "plain", 1, LEN);
    models::store(models, "team/store", 2, LEN);
    models::original(models, "original", 3, [5_000_008, 4_000_000]);
}

fn small(config: &mut sllm_server::Config) {
    config.pool_len = 32 << 20;
    config.chunk_len = 4 << 20;
}

async fn resident(served: &Served, name: &str) -> u64 {
    let list = served.store().await.list(ListRequest {}).await.unwrap().into_inner();
    list.models.iter().find(|model| model.name == name).map_or(0, |model| model.resident)
}

/// Waits until nothing is loaded.
async fn quiet(served: &Served) {
    let mut client = served.store().await;
    while !client.status(StatusRequest {}).await.unwrap().into_inner().jobs.is_empty() {
        tokio::time::sleep(PAUSE).await;
    }
}

/// Mappings of clients' memory in this process, where the server is.
fn mapped(name: &str) -> usize {
    fs::read_to_string("/proc/self/maps").unwrap().lines().filter(|line| line.contains(name)).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_layout_arrives_as_it_is_on_the_disk_first_from_files_and_then_from_the_pool() {
    let served = Served::start(fill, |_| ());
    for name in ["plain", "team/store", "original"] {
        let expected = models::bytes(&served.models().join(name));
        let (first, done) = load(&served, name).await.unwrap();
        assert!(first == expected, "{name}");
        assert_eq!((done.bytes, done.from_pool), (expected.len() as u64, 0), "{name}");
        assert_eq!(done.from_files, expected.len() as u64, "{name}");
        let (second, done) = load(&served, name).await.unwrap();
        assert!(second == expected, "{name} from the pool");
        assert_eq!((done.from_pool, done.from_files), (expected.len() as u64, 0), "{name}");
        let report: serde_json::Value = serde_json::from_str(&done.report).unwrap();
        assert_eq!(report["bytes"], expected.len() as u64);
        assert_eq!(resident(&served, name).await, expected.len() as u64);
    }
    let usage = served.store().await.status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((usage.loads_done, usage.loads_failed), (6, 0));
    assert!(usage.pool.unwrap().hits > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_has_one_name_whatever_way_leads_to_it() {
    let served = Served::start(fill, |_| ());
    std::os::unix::fs::symlink("plain", served.models().join("alias")).unwrap();
    let absolute = served.models().join("plain");
    for name in ["plain", "./plain/", "alias", absolute.to_str().unwrap()] {
        let open = open_message(name, &absolute);
        Loading::open(&mut served.store().await, open).await.unwrap();
    }
    let list = served.store().await.list(ListRequest {}).await.unwrap().into_inner();
    assert_eq!(list.models.len(), 1, "{list:?}");
    assert_eq!((list.models[0].name.as_str(), list.models[0].layout.as_str()), ("plain", "safetensors"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_that_leaves_the_storage_path_is_refused() {
    let served = Served::start(fill, |_| ());
    let outside = served.dir.path().join("outside");
    models::safetensors(&outside, "m", 9, 1000);
    let models = served.models();
    std::os::unix::fs::symlink(outside.join("m"), models.join("out")).unwrap();
    fs::create_dir(models.join("half")).unwrap();
    std::os::unix::fs::symlink(outside.join("m/model.safetensors"), models.join("half/model.safetensors")).unwrap();
    std::os::unix::fs::symlink("loop", models.join("loop")).unwrap();
    let long = "x".repeat(100_000);
    let absolute = outside.join("m");
    let none = absolute.with_file_name("none");
    for (name, code) in [
        ("", Code::InvalidArgument),
        ("../outside/m", Code::InvalidArgument),
        ("plain/../../outside/m", Code::InvalidArgument),
        (absolute.to_str().unwrap(), Code::InvalidArgument),
        // What is not there is answered as what is.
        (none.to_str().unwrap(), Code::InvalidArgument),
        ("/", Code::InvalidArgument),
        ("out", Code::InvalidArgument),
        ("half", Code::InvalidArgument),
        ("nul\0", Code::InvalidArgument),
        (&long, Code::InvalidArgument),
        ("loop", Code::PermissionDenied),
        ("missing", Code::NotFound),
        ("plain/model.safetensors/x", Code::NotFound),
        ("team", Code::NotFound),
    ] {
        let open = Open { model: name.into(), ..Default::default() };
        let error = Loading::open(&mut served.store().await, open).await.err().unwrap();
        assert_eq!(error.code(), code, "{name:?}: {error}");
        assert!(!error.message().is_empty());
    }
    assert!(served.store().await.list(ListRequest {}).await.unwrap().into_inner().models.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_differ_from_the_clients_are_refused() {
    let served = Served::start(fill, |_| ());
    let good = open_message("plain", &served.models().join("plain"));
    let change = |change: &dyn Fn(&mut sllm_proto::store::File)| {
        let mut open = good.clone();
        change(&mut open.files[0]);
        open
    };
    for wrong in [
        change(&|file| file.len += 1),
        change(&|file| file.modified_s += 1),
        change(&|file| file.modified_ns ^= 1),
        change(&|file| file.inode ^= 1),
        change(&|file| file.name = "other.safetensors".into()),
        Open { status_changed_ns: vec![good.status_changed_ns[0] - 1], ..good.clone() },
    ] {
        let error = Loading::open(&mut served.store().await, wrong).await.err().unwrap();
        assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    }
    // One file system that is mounted twice, and a client that does not know its files so well.
    let mounted = change(&|file| (file.device, file.inode) = (file.device ^ 1, file.inode ^ 1));
    let unknown = change(&|file| (file.device, file.inode) = (0, 0));
    // As clients were before they told the time of status.
    let older = Open { status_changed_ns: Vec::new(), ..good.clone() };
    for right in [good.clone(), mounted, unknown, older] {
        Loading::open(&mut served.store().await, right).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_out_of_order_or_bounds_ends_with_the_reason_and_nothing_is_written() {
    let served = Served::start(fill, |_| ());
    let open = open_message("plain", &served.models().join("plain"));
    let len = open.files[0].len;
    let whole = Segment { row_len: len, ..Default::default() };
    let with = |change: &dyn Fn(&mut Segment)| {
        let mut segment = whole;
        change(&mut segment);
        segment
    };
    let bad = [
        vec![with(&|s| s.file = 1)],
        vec![with(&|s| s.file = u32::MAX)],
        vec![with(&|s| s.block = 1)],
        vec![with(&|s| s.block = u32::MAX)],
        vec![with(&|s| s.offset = 1)],
        vec![with(&|s| s.offset = u64::MAX)],
        vec![with(&|s| s.row_len += 1)],
        vec![with(&|s| s.row_len = u64::MAX)],
        vec![with(&|s| s.dst_offset = 1)],
        vec![with(&|s| s.dst_offset = u64::MAX)],
        vec![with(&|s| (s.rows, s.src_pitch, s.dst_pitch) = (2, len, len))],
        vec![with(&|s| (s.rows, s.row_len, s.src_pitch, s.dst_pitch) = (u64::MAX, 8, 8, 8))],
        vec![with(&|s| (s.rows, s.row_len, s.src_pitch, s.dst_pitch) = (2, 8, 4, 8))],
        vec![with(&|s| (s.rows, s.row_len, s.src_pitch, s.dst_pitch) = (2, 8, 8, u64::MAX))],
        // A byte that is written twice.
        vec![with(&|s| s.row_len = 100), with(&|s| (s.row_len, s.dst_offset) = (100, 99))],
    ];
    for segments in bad {
        let file = memory(len, SEALED);
        let (mut loading, _) = Loading::open(&mut served.store().await, open.clone()).await.unwrap();
        loading.attach_host(&served.socket(), ticket(), &file).await;
        loading.batch(segments.clone()).await;
        let error = loading.error().await;
        assert_eq!(error.code(), Code::InvalidArgument, "{segments:?}: {error}");
        assert!(contents(&file).iter().all(|&byte| byte == 0xee), "{segments:?}: something was written");
    }

    // What has no bytes is no mistake.
    let (mut loading, _) = Loading::open(&mut served.store().await, open.clone()).await.unwrap();
    loading.attach_host(&served.socket(), ticket(), &memory(len, SEALED)).await;
    for empty in [vec![], vec![Segment::default()]] {
        loading.batch(empty).await;
        assert_eq!(loading.done().await.unwrap().bytes, 0);
    }

    let attach = |len, offset, memory| Asked::Attach(Attach { len, offset, memory });
    let passed = ticket();
    let path = served.socket();
    let sealed = memory(4096, SEALED);
    tokio::task::spawn_blocking(move || common::pass(&path, passed, &sealed)).await.unwrap().unwrap();
    let by = |ticket: &[u8]| Some(attach::Memory::Ticket(ticket.to_vec()));
    let cuda = |device: usize, handle: usize| {
        let (device, handle) = (vec![0; device], vec![0; handle]);
        Some(attach::Memory::Cuda(sllm_proto::store::CudaMemory { device, handle, ..Default::default() }))
    };
    let wrong: [(Vec<Asked>, Code); 9] = [
        (vec![Asked::Open(open.clone())], Code::InvalidArgument),
        (vec![attach(1, 0, None)], Code::InvalidArgument),
        (vec![attach(1, 0, by(&[9; 16]))], Code::InvalidArgument),
        (vec![attach(1, 0, by(&[9; 15]))], Code::InvalidArgument),
        (vec![attach(1, 4096, by(&passed))], Code::InvalidArgument),
        // A refused attach has used the ticket up.
        (vec![attach(1, 0, by(&passed))], Code::InvalidArgument),
        (vec![attach(1, 0, cuda(15, 64))], Code::InvalidArgument),
        (vec![attach(1, 0, cuda(16, 65))], Code::InvalidArgument),
        (vec![attach(1, 0, cuda(16, 64))], Code::NotFound),
    ];
    for (messages, code) in wrong {
        let (mut loading, _) = Loading::open(&mut served.store().await, open.clone()).await.unwrap();
        for message in messages.clone() {
            loading.ask(message).await;
        }
        let error = loading.error().await;
        assert_eq!(error.code(), code, "{messages:?}: {error}");
    }
    let mut unopened = Loading::start(&mut served.store().await).await;
    unopened.batch(vec![whole]).await;
    assert_eq!(unopened.error().await.code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_too_large_is_refused_and_one_of_200_000_segments_is_not() {
    let served = Served::start(fill, |_| ());
    let open = open_message("plain", &served.models().join("plain"));
    let file = memory(open.files[0].len, SEALED);
    let (mut loading, _) = Loading::open(&mut served.store().await, open.clone()).await.unwrap();
    loading.attach_host(&served.socket(), ticket(), &file).await;
    let rows = 200_000_u64;
    let segment = |at: u64| Segment { offset: at * 40, row_len: 39, dst_offset: at * 39, ..Default::default() };
    loading.batch((0..rows).map(segment).collect()).await;
    assert_eq!(loading.done().await.unwrap().bytes, rows * 39);
    let source = models::bytes(&served.models().join("plain"));
    let expected: Vec<u8> = source.chunks(40).take(200_000).flat_map(|row| &row[..39]).copied().collect();
    assert!(contents(&file)[..expected.len()] == expected);

    // More than 60 bytes each.
    let huge = Segment {
        offset: u64::MAX,
        row_len: u64::MAX,
        rows: u64::MAX,
        src_pitch: u64::MAX,
        dst_offset: u64::MAX,
        dst_pitch: u64::MAX,
        ..Default::default()
    };
    loading.batch(vec![huge; sllm_proto::MAX_MESSAGE_LEN / 60]).await;
    let error = loading.error().await;
    assert_eq!(error.code(), Code::OutOfRange, "{error}");
    let limit = format!("the limit is: {} bytes", sllm_proto::MAX_MESSAGE_LEN);
    assert!(error.message().contains(&limit), "{error}");
    load(&served, "plain").await.unwrap();
    // The original's service says the same.
    let request = LoadModelRequest { model_path: "m".repeat(sllm_proto::MAX_ORIGINAL_LEN), ..Default::default() };
    let error = served.storage().await.load_model_async(request).await.unwrap_err();
    assert_eq!(error.code(), Code::OutOfRange, "{error}");
    assert!(error.message().contains(&format!("the limit is: {} bytes", sllm_proto::MAX_ORIGINAL_LEN)), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_would_take_all_memory_are_refused() {
    // Of a file that is mostly a hole, every 100,000th byte: a million ranges.
    let (rows, pitch) = (1_000_000_u64, 100_000);
    let sparse = |models: &Path| {
        let len = rows * pitch;
        let header = format!(r#"{{"t":{{"dtype":"U8","shape":[{len}],"data_offsets":[0,{len}]}}}}"#);
        let bytes = test_support::safetensors(header, &[]);
        fs::create_dir_all(models.join("sparse")).unwrap();
        let file = fs::File::create(models.join("sparse/model.safetensors")).unwrap();
        file.set_len(bytes.len() as u64 + len).unwrap();
        std::io::Write::write_all(&mut &file, &bytes).unwrap();
    };
    let served = Served::start(sparse, |_| ());
    let open = open_message("sparse", &served.models().join("sparse"));
    let file = memory(rows, SEALED);
    let (mut loading, _) = Loading::open(&mut served.store().await, open).await.unwrap();
    loading.attach_host(&served.socket(), ticket(), &file).await;
    loading.batch(vec![Segment { rows, row_len: 1, src_pitch: pitch, dst_pitch: 1, ..Default::default() }; 3]).await;
    let error = loading.error().await;
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    assert!(error.message().contains("more than 2097152 ranges of files"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_of_a_stream_come_one_after_the_other_and_may_be_sent_ahead() {
    let served = Served::start(fill, |_| ());
    let open = open_message("plain", &served.models().join("plain"));
    let file = memory(open.files[0].len, SEALED);
    let (mut loading, _) = Loading::open(&mut served.store().await, open).await.unwrap();
    loading.attach_host(&served.socket(), ticket(), &file).await;
    // Each writes over what the one before wrote.
    for offset in 0..50 {
        loading.batch(vec![Segment { offset: offset * 1000, row_len: 100_000, ..Default::default() }]).await;
    }
    for _ in 0..50 {
        assert_eq!(loading.done().await.unwrap().bytes, 100_000);
    }
    let source = models::bytes(&served.models().join("plain"));
    assert!(contents(&file)[..100_000] == source[49_000..149_000]);
    drop(loading.to);
    assert!(loading.from.message().await.unwrap().is_none(), "the stream ends well");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_in_the_middle_leaves_nothing_behind() {
    let served = Served::start(|models| models::safetensors(models, "large", 7, 48 << 20), |_| ());
    let open = open_message("large", &served.models().join("large"));
    let segments = all_of(&open);
    for round in 0..8 {
        let (mut loading, opened) = Loading::open(&mut served.store().await, open.clone()).await.unwrap();
        let name = format!("gone-{round}");
        let file = common::named_memory(&name, opened.total, SEALED);
        loading.attach_host(&served.socket(), ticket(), &file).await;
        // The memory is attached when an empty batch is done.
        loading.batch(Vec::new()).await;
        loading.done().await.unwrap();
        for _ in 0..20 {
            loading.batch(segments.clone()).await;
        }
        if round % 2 == 0 {
            loading.event().await.unwrap();
        }
        drop(loading);
        while mapped(&name) > 0 {
            tokio::time::sleep(PAUSE).await;
        }
        quiet(&served).await;
    }
    let (bytes, _) = load(&served, "large").await.unwrap();
    assert!(bytes == models::bytes(&served.models().join("large")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_that_is_out_of_time_fails_by_its_deadline() {
    let served = Served::start(|models| models::safetensors(models, "large", 7, 48 << 20), |_| ());
    let open = open_message("large", &served.models().join("large"));
    let segments = all_of(&open);
    let (mut loading, opened) = Loading::open(&mut served.store().await, open).await.unwrap();
    let file = memory(opened.total, SEALED);
    loading.attach_host(&served.socket(), ticket(), &file).await;
    // One of them takes longer than a millisecond on any machine.
    for _ in 0..1000 {
        loading.ask(Asked::Batch(Batch { segments: segments.clone(), timeout_ms: 1 })).await;
    }
    assert_eq!(loading.error().await.code(), Code::DeadlineExceeded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_cut_or_rots_in_the_middle_is_an_error_and_its_bytes_are_not_kept() {
    let served = Served::start(fill, |_| ());
    let path = served.models().join("plain/model.safetensors");
    let open = open_message("plain", &served.models().join("plain"));
    let (mut loading, opened) = Loading::open(&mut served.store().await, open.clone()).await.unwrap();
    let file = memory(opened.total, SEALED);
    loading.attach_host(&served.socket(), ticket(), &file).await;
    fs::File::options().write(true).open(&path).unwrap().set_len(5_000_000).unwrap();
    loading.batch(all_of(&open)).await;
    let error = loading.error().await;
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("truncated"), "{error}");
    // What was read of it before is of no use to anybody.
    assert!(Loading::open(&mut served.store().await, open).await.is_err());
    assert_eq!(served.store().await.status(StatusRequest {}).await.unwrap().into_inner().pool.unwrap().resident, 0);

    // A store's checksums tell bytes that changed without the file's time.
    let data = served.models().join("team/store/tensor.data_0");
    let times = fs::metadata(&data).unwrap().modified().unwrap();
    let mut bytes = fs::read(&data).unwrap();
    bytes[4_500_000] ^= 1;
    fs::write(&data, bytes).unwrap();
    fs::File::options().write(true).open(&data).unwrap().set_modified(times).unwrap();
    let error = load(&served, "team/store").await.unwrap_err();
    assert_eq!(error.code(), Code::DataLoss, "{error}");
    let (_, done) = load(&served, "original").await.unwrap();
    assert!(done.bytes > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_changes_on_the_disk_while_resident_is_read_anew() {
    let served = Served::start(fill, |_| ());
    load(&served, "plain").await.unwrap();
    served.store().await.pin(PinRequest { model: "plain".into() }).await.unwrap();
    let before = open_message("plain", &served.models().join("plain"));
    models::safetensors(&served.models(), "plain", 77, LEN + 5);
    let (bytes, done) = load(&served, "plain").await.unwrap();
    assert!(bytes == models::bytes(&served.models().join("plain")));
    assert_eq!(done.from_pool, 0);
    let list = served.store().await.list(ListRequest {}).await.unwrap().into_inner();
    assert_eq!((list.models.len(), list.models[0].pinned, list.models[0].resident), (1, true, bytes.len() as u64));
    let error = Loading::open(&mut served.store().await, before).await.err().unwrap();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn models_larger_than_the_pool_stream_through_it_and_pinned_ones_stay() {
    let served = Served::start(
        |models| {
            fill(models);
            models::safetensors(models, "large", 7, 60 << 20);
        },
        small,
    );
    let mut client = served.store().await;
    let mut events = client.preload(PreloadRequest { model: "plain".into(), pin: true }).await.unwrap().into_inner();
    let mut last = None;
    while let Some(event) = events.message().await.unwrap() {
        last = Some(event);
    }
    let last = last.unwrap();
    assert_eq!((last.done, last.total), (last.total, models::bytes(&served.models().join("plain")).len() as u64));
    let (bytes, _) = load(&served, "large").await.unwrap();
    assert!(bytes == models::bytes(&served.models().join("large")));
    let pool = client.status(StatusRequest {}).await.unwrap().into_inner().pool.unwrap();
    assert!(pool.resident <= pool.capacity && pool.capacity == 32 << 20 && pool.evictions > 0, "{pool:?}");
    assert_eq!(resident(&served, "plain").await, last.total);
    let error = client.pin(PinRequest { model: "large".into() }).await.unwrap_err();
    assert_eq!(error.code(), Code::ResourceExhausted, "{error}");

    let model = client.unpin(UnpinRequest { model: "plain".into() }).await.unwrap().into_inner();
    assert!(!model.pinned);
    let evicted = client.evict(EvictRequest { model: "plain".into() }).await.unwrap().into_inner().bytes;
    assert_eq!((evicted, resident(&served, "plain").await), (last.total, 0));
    client.evict(EvictRequest { model: String::new() }).await.unwrap();
    assert_eq!(client.status(StatusRequest {}).await.unwrap().into_inner().pool.unwrap().resident, 0);
    assert_eq!(client.evict(EvictRequest { model: "never".into() }).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn models_that_share_a_file_are_pinned_each_for_itself() {
    let served = Served::start(fill, |_| ());
    fs::create_dir(served.models().join("shared")).unwrap();
    let file = |model: &str| served.models().join(model).join("model.safetensors");
    fs::hard_link(file("plain"), file("shared")).unwrap();
    let mut client = served.store().await;
    for model in ["plain", "shared"] {
        assert!(client.pin(PinRequest { model: model.into() }).await.unwrap().into_inner().pinned);
    }
    assert!(!client.unpin(UnpinRequest { model: "shared".into() }).await.unwrap().into_inner().pinned);
    let list = client.list(ListRequest {}).await.unwrap().into_inner();
    let pinned: Vec<_> = list.models.iter().map(|model| (model.name.as_str(), model.pinned)).collect();
    assert_eq!(pinned, [("plain", true), ("shared", false)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_holds_for_all_models_of_its_prefix() {
    let served = Served::start(
        |models| (0..3).for_each(|i| models::store(models, &format!("team/{i}"), i, 8 << 20)),
        |config| config.quotas = vec!["team/=12MB".parse().unwrap()],
    );
    for i in 0..3 {
        load(&served, &format!("team/{i}")).await.unwrap();
    }
    let list = served.store().await.list(ListRequest {}).await.unwrap().into_inner();
    let resident: u64 = list.models.iter().map(|model| model.resident).sum();
    assert!(resident > 0 && resident <= 12 << 20, "{list:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_clients_at_once_each_get_their_bytes() {
    let names = ["plain", "team/store", "original"];
    let served = std::sync::Arc::new(Served::start(fill, |config| {
        config.pool_len = 24 << 20;
        config.chunk_len = 4 << 20;
        config.max_loads = 4;
    }));
    let expected: Vec<Vec<u8>> = names.iter().map(|name| models::bytes(&served.models().join(name))).collect();
    let expected = std::sync::Arc::new(expected);
    let mut clients = tokio::task::JoinSet::new();
    for at in 0..100 {
        let (server, expected) = (std::sync::Arc::clone(&served), std::sync::Arc::clone(&expected));
        clients.spawn(async move {
            let (bytes, _) = load(&server, names[at % 3]).await?;
            assert!(bytes == expected[at % 3], "client {at}");
            Ok::<_, Status>(())
        });
        if at % 10 == 0 {
            // In every order with evictions.
            served.store().await.evict(EvictRequest { model: String::new() }).await.unwrap();
        }
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap().unwrap();
    }
    let status = served.store().await.status(StatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.loads_done, status.loads_failed), (100, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_lets_a_running_load_end_and_takes_no_new_one() {
    let mut served = Served::start(|models| models::safetensors(models, "large", 7, 48 << 20), |_| ());
    let open = open_message("large", &served.models().join("large"));
    let mut client = served.store().await;
    let (mut loading, opened) = Loading::open(&mut client, open.clone()).await.unwrap();
    let (mut idle, _) = Loading::open(&mut client, open.clone()).await.unwrap();
    let file = memory(opened.total, SEALED);
    loading.attach_host(&served.socket(), ticket(), &file).await;
    loading.batch(all_of(&open)).await;
    let first = loading.event().await.unwrap();
    served.signal();
    assert_eq!(idle.error().await.code(), Code::Unavailable);
    let done = if let Event::Done(done) = first { done } else { loading.done().await.unwrap() };
    assert_eq!(done.bytes, opened.total);
    loading.batch(all_of(&open)).await;
    assert_eq!(loading.error().await.code(), Code::Unavailable);
    drop((loading, idle, client));
    let expected = models::bytes(&served.models().join("large"));
    served.ended().await;
    assert!(contents(&file) == expected);
}
