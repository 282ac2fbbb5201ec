//! Made checkpoints, and other people's ways of reading them.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use sllm_core::{Checkpoint, Dtype, TensorInfo};
pub(crate) use test_support::noise;

/// A tensor of a made checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Made {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    pub(crate) bytes: Vec<u8>,
}

impl Made {
    pub(crate) fn new(name: &str, dtype: Dtype, shape: &[u64]) -> Made {
        let len = usize::try_from(dtype.byte_len(shape).unwrap()).unwrap();
        let seed = name.bytes().fold(len as u64, |seed, b| seed.wrapping_mul(31) + u64::from(b));
        Made { name: name.into(), dtype, shape: shape.to_vec(), bytes: noise(seed, len) }
    }
}

/// Every dtype in several shapes, with names that are hard to write down.
pub(crate) fn every_dtype() -> Vec<Made> {
    let mut tensors = Vec::new();
    for dtype in Dtype::all() {
        for shape in [&[2, 4, 8][..], &[0], &[3, 0, 5], &[], &[1], &[70_000, 4]] {
            if dtype.byte_len(shape).is_ok() {
                tensors.push(Made::new(&format!("{dtype}.{shape:?}"), dtype, shape));
            }
        }
    }
    for name in ["ünï.ço∂é 🦀", "new\nline", "quo\"te", "back\\slash", "", "nul\0", "\u{202e}", "a/../b"] {
        tensors.push(Made::new(name, Dtype::U8, &[13]));
    }
    tensors
}

/// Writes a file with the safetensors library.
pub(crate) fn write_safetensors(path: &Path, tensors: &[Made], metadata: Option<&[(&str, &str)]>) {
    let views = tensors.iter().map(|made| {
        let dtype = serde_json::from_value(made.dtype.name().into()).unwrap();
        let shape = made.shape.iter().map(|&d| usize::try_from(d).unwrap()).collect();
        (made.name.as_str(), TensorView::new(dtype, shape, &made.bytes).unwrap())
    });
    let metadata = metadata.map(|pairs| pairs.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect());
    safetensors::serialize_to_file(views, metadata, path).unwrap();
}

/// Writes `shards` and their index.
pub(crate) fn write_sharded(dir: &Path, shards: &[(&str, &[Made])]) {
    let mut weight_map = serde_json::Map::new();
    for (name, tensors) in shards {
        write_safetensors(&dir.join(name), tensors, Some(&[("format", "pt"), ("shard", name)]));
        weight_map.extend(tensors.iter().map(|made| (made.name.clone(), (*name).into())));
    }
    let index = serde_json::json!({"metadata": {"total_size": 12345, "note": "kept"}, "weight_map": weight_map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

/// A safetensors file as the library reads it: metadata, and the tensors by name.
pub(crate) type Oracle = (Option<BTreeMap<String, String>>, BTreeMap<String, Made>);

pub(crate) fn read_safetensors(path: &Path) -> Oracle {
    let bytes = fs::read(path).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata: Option<HashMap<String, String>> = metadata.metadata().clone();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let made = |(name, view): (String, TensorView<'_>)| {
        let dtype = serde_json::to_value(view.dtype()).unwrap();
        let dtype = Dtype::from_name(dtype.as_str().unwrap()).unwrap();
        let shape = view.shape().iter().map(|&d| d as u64).collect();
        (name.clone(), Made { name, dtype, shape, bytes: view.data().to_vec() })
    };
    (metadata.map(|map| map.into_iter().collect()), tensors.tensors().into_iter().map(made).collect())
}

/// Writes a safetensors file of which only the header is given, and `data` bytes of zeros (a hole).
pub(crate) fn write_raw(path: &Path, json: &str, data: u64) {
    let header = test_support::safetensors(json, &[]);
    fs::write(path, &header).unwrap();
    File::options().write(true).open(path).unwrap().set_len(header.len() as u64 + data).unwrap();
}

/// The bytes of one tensor, read from where the checkpoint says that they are.
pub(crate) fn bytes_of(checkpoint: &Checkpoint, tensor: &TensorInfo) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(tensor.len).unwrap()];
    let file = File::open(checkpoint.files()[tensor.file].path()).unwrap();
    file.read_exact_at(&mut bytes, tensor.offset).unwrap();
    bytes
}

/// Asserts that a checkpoint holds exactly these tensors.
pub(crate) fn assert_holds<'a>(checkpoint: &Checkpoint, tensors: impl IntoIterator<Item = &'a Made>) {
    let mut count = 0;
    for made in tensors {
        let tensor = checkpoint.tensor(&made.name).unwrap();
        assert_eq!((tensor.dtype, &*tensor.shape), (made.dtype, &*made.shape), "{:?}", made.name);
        assert!(bytes_of(checkpoint, tensor) == made.bytes, "bytes of {:?} differ", made.name);
        count += 1;
    }
    assert_eq!(checkpoint.tensors().len(), count);
}

/// Names of all entries of a directory, sorted.
pub(crate) fn entries(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    names
}

/// Makes a system call fail in this thread and those that it starts from now on.
pub(crate) fn refuse_syscall(number: libc::c_long, errno: i32) {
    let op = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: u16::try_from(code).unwrap(), jt, jf, k };
    let (number, errno) = (u32::try_from(number).unwrap(), u32::try_from(errno).unwrap());
    let mut program = [
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, number),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | errno),
        op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
    // SAFETY: the program lives for the call; the filter concerns this thread alone.
    let refused = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) == 0
    };
    assert!(refused, "{}", std::io::Error::last_os_error());
}
