//! A loader whose bytes somebody else moves, until that fails.
#![allow(clippy::cast_possible_truncation, reason = "made sizes are small")]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Made, every_dtype, write_safetensors};
use sllm_core::{
    Block, Cancel, Checkpoint, Control, Error, LoadReport, Loader, LoaderBuilder, Progress, Remote, RemoteReport,
    Result, Segment,
};

/// Moves by a loader of its own, so many times.
#[derive(Debug)]
struct Other {
    works: usize,
    calls: Arc<AtomicUsize>,
    verified: bool,
}

impl Remote for Other {
    fn fill(
        &self,
        checkpoint: &Checkpoint,
        segments: &[Segment],
        blocks: &[Block],
        control: &Control,
    ) -> Result<RemoteReport> {
        if self.calls.fetch_add(1, Ordering::Relaxed) >= self.works {
            // Half of the work is done.
            let half = &segments[..segments.len() / 2];
            Loader::builder().build()?.fill_segments(checkpoint, half, again(blocks))?;
            return Err(Error::Invalid("the other one is gone".into()));
        }
        let report = Loader::builder().build()?.fill_segments(checkpoint, segments, again(blocks))?;
        control.tell(Progress { done: report.bytes, total: report.bytes });
        let by = "the other one".to_owned();
        let verified = self.verified;
        Ok(RemoteReport { by, from_memory: report.read_bytes, verified, ..RemoteReport::default() })
    }
}

/// The same memory: the blocks themselves are taken by the load.
fn again(blocks: &[Block]) -> Vec<Block> {
    // SAFETY: the caller's blocks live as long as the call.
    blocks.iter().map(|block| unsafe { Block::from_raw(block.device(), block.addr(), block.len()) }).collect()
}

struct Model {
    _dir: tempfile::TempDir,
    checkpoint: Checkpoint,
    tensors: Vec<Made>,
}

fn model() -> Model {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("model.safetensors");
    let tensors = every_dtype();
    write_safetensors(&path, &tensors, None);
    let checkpoint = Checkpoint::open(&path).unwrap();
    Model { _dir: dir, checkpoint, tensors }
}

fn with(works: usize, verified: bool) -> (LoaderBuilder, Arc<AtomicUsize>) {
    let calls = Arc::new(AtomicUsize::new(0));
    let other = Other { works, calls: Arc::clone(&calls), verified };
    (Loader::builder().remote(Box::new(other)), calls)
}

fn load(loader: &Loader, model: &Model) -> LoadReport {
    let loaded = loader.load(&model.checkpoint).unwrap();
    for tensor in &model.tensors {
        assert_eq!(loaded.tensor(&tensor.name).unwrap().to_vec().unwrap(), tensor.bytes, "{}", tensor.name);
    }
    loaded.report().clone()
}

#[test]
fn the_remote_moves_everything_while_it_works() {
    let model = model();
    let (builder, calls) = with(usize::MAX, false);
    let loader = builder.build().unwrap();
    for _ in 0..2 {
        let report = load(&loader, &model);
        assert_eq!(report.engines.iter().map(|e| e.engine).collect::<Vec<_>>(), ["server"]);
        assert_eq!((report.limit, report.cached_bytes), ("memory", report.read_bytes));
        assert!(report.notes.is_empty());
    }
    assert_eq!(calls.load(Ordering::Relaxed), 2);
}

#[test]
fn after_its_failure_files_are_read_and_the_report_says_so_once() {
    let model = model();
    let (builder, calls) = with(1, false);
    let loader = builder.build().unwrap();
    load(&loader, &model);
    let report = load(&loader, &model);
    assert_ne!(report.engines[0].engine, "server");
    assert_eq!(report.fell_back.as_deref(), Some("the other one is gone"));
    assert_eq!(report.notes, ["the other one is gone; files are read"]);
    let report = load(&loader, &model);
    assert_eq!((report.fell_back.as_deref(), report.notes.len()), (Some("the other one is gone"), 0));
    assert_eq!(calls.load(Ordering::Relaxed), 2, "who failed is not asked again");
}

#[test]
fn a_load_that_is_stopped_does_not_go_on_with_files() {
    let model = model();
    let cancel = Cancel::new();
    let (told, (builder, _)) = (cancel.clone(), with(usize::MAX, false));
    let control = Control::new().cancelled_by(cancel).on_progress(move |_| told.cancel());
    let error = builder.control(control).build().unwrap().load(&model.checkpoint).unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");
    let control = Control::new().until(std::time::Instant::now());
    let error = Loader::builder().control(control).build().unwrap().load(&model.checkpoint).unwrap_err();
    assert!(matches!(error, Error::TimedOut), "{error}");
}

#[test]
fn who_does_not_verify_does_not_load_what_is_to_be_verified() {
    let model = model();
    let store = model._dir.path().join("store");
    sllm_core::convert(&model.checkpoint, &store, &sllm_core::ConvertOptions::new()).unwrap();
    let model = Model { checkpoint: Checkpoint::open(&store).unwrap(), ..model };
    for verified in [true, false] {
        let (builder, _) = with(usize::MAX, verified);
        let report = load(&builder.verify(true).build().unwrap(), &model);
        assert_eq!((report.engines[0].engine == "server", report.verified), (verified, true));
    }
}
