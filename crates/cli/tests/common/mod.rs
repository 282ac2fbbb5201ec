//! Small checkpoints, and the command run on them.
#![allow(dead_code)] // Each test file uses a part of it.

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::Value;
use tempfile::TempDir;

/// A directory with a model in it.
pub(crate) struct Fixture {
    pub(crate) dir: TempDir,
    pub(crate) model: PathBuf,
}

/// Three tensors in one safetensors file, and a configuration.
pub(crate) fn model() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    let (embed, norm, bias) = (bytes(70_000), bytes(64), bytes(3));
    let tensors = [
        ("embed.weight", TensorView::new(Dtype::BF16, vec![350, 100], &embed).unwrap()),
        ("norm.weight", TensorView::new(Dtype::F32, vec![16], &norm).unwrap()),
        ("norm.bias", TensorView::new(Dtype::U8, vec![3], &bias).unwrap()),
    ];
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    safetensors::serialize_to_file(tensors, Some(metadata), &model.join("model.safetensors")).unwrap();
    fs::write(model.join("config.json"), "{}").unwrap();
    Fixture { dir, model }
}

fn bytes(len: usize) -> Vec<u8> {
    (0u8..=250).cycle().take(len).collect()
}

impl Fixture {
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The model as a store.
    pub(crate) fn store(&self) -> PathBuf {
        let store = self.path("store");
        sllm(["convert".as_ref(), self.model.as_os_str(), store.as_os_str()]).assert().success();
        store
    }
}

/// The command with these arguments, an empty Hugging Face cache, and no place to remember anything in.
pub(crate) fn sllm<I: IntoIterator<Item = S>, S: AsRef<std::ffi::OsStr>>(args: I) -> Command {
    let mut command = Command::cargo_bin("sllm-store").unwrap();
    command.args(args).env("HF_HUB_CACHE", "/nonexistent").env("XDG_CACHE_HOME", "/proc/nonexistent");
    command
}

/// What one run gave.
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ran {
    /// Standard output as one JSON object and nothing else.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        let value: Value = serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {:?}", self.stdout));
        assert!(value.is_object());
        value
    }
}

/// Runs `sllm-store WORD... PATH...` with options last.
#[track_caller]
pub(crate) fn run(word: &str, paths: &[&Path], options: &[&str]) -> Ran {
    let mut command = sllm([word]);
    let output = command.args(paths).args(options).output().unwrap();
    Ran {
        code: output.status.code().expect("the command was killed"),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}
