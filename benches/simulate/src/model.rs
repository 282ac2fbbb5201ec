//! Models by name, as sparse safetensors files, and the pieces that the code's own plan cuts of them.

use std::fs::{self, File};
use std::ops::Range;

use sllm_core::{Checkpoint, Filter, LoadPlan, Placement, PlanOptions, tuning};
use tempfile::TempDir;

use crate::way::Way;

type Failure = Box<dyn std::error::Error>;

/// Bytes of a shard at most, as `benches/peers/inputs.py` writes them.
const SHARD_LEN: u64 = 4_900_000_000;

/// One read, and its copies: the device's place and the bytes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Piece {
    pub(crate) len: u64,
    pub(crate) copies: Vec<(usize, u64)>,
    /// The window of a file that it lies in.
    pub(crate) window: (usize, u64),
    /// The part of its file that it lies in, 0 to 1.
    pub(crate) place: Range<f64>,
}

/// A model whose weights are holes.
pub(crate) struct Model {
    checkpoint: Checkpoint,
    _dir: TempDir,
}

impl Model {
    /// A model by the name that the peers' command takes: `llama8b`, `many:GB` or `many:GB:TENSORS`.
    pub(crate) fn named(name: &str) -> Result<Model, Failure> {
        Model::sparse(&lens_of(name)?)
    }

    fn sparse(lens: &[u64]) -> Result<Model, Failure> {
        let dir = TempDir::new()?;
        let mut shards: Vec<Vec<(usize, u64)>> = vec![Vec::new()];
        let mut size = 0;
        for (number, &len) in lens.iter().enumerate() {
            if size + len > SHARD_LEN && size > 0 {
                shards.push(Vec::new());
                size = 0;
            }
            shards.last_mut().ok_or("no shard")?.push((number, len));
            size += len;
        }
        for (number, shard) in shards.iter().enumerate() {
            let mut end = 0;
            let mut entries = Vec::new();
            for (tensor, len) in shard {
                let start = end;
                end += len;
                entries.push(format!(r#""t{tensor}":{{"dtype":"U8","shape":[{len}],"data_offsets":[{start},{end}]}}"#));
            }
            // Padded, so that tensors of a multiple of 256 bytes lie at one, as the safetensors library writes them.
            let mut json = format!("{{{}}}", entries.join(","));
            // No width of a format, which ends at 65,535.
            let len = (json.len() + 8).next_multiple_of(256) - 8;
            json.extend(std::iter::repeat_n(' ', len - json.len()));
            let path = dir.path().join(format!("model-{:05}-of-{:05}.safetensors", number + 1, shards.len()));
            fs::write(&path, [&(json.len() as u64).to_le_bytes()[..], json.as_bytes()].concat())?;
            File::options().write(true).open(&path)?.set_len(8 + json.len() as u64 + end)?;
        }
        Ok(Model { checkpoint: Checkpoint::open(dir.path())?, _dir: dir })
    }

    /// Bytes of all tensors.
    pub(crate) fn len(&self) -> u64 {
        self.checkpoint.total_len()
    }

    /// The pieces of a load in one way, tensors dealt out over so many devices, in the order
    /// in which they are read out of a cache.
    pub(crate) fn pieces(&self, way: &Way, devices: usize) -> Result<Vec<Piece>, Failure> {
        let mut next = 0;
        let deal = |_: &sllm_core::TensorInfo| {
            next = (next + 1) % devices;
            next
        };
        let placement = Placement::new(&self.checkpoint, Filter::all().select(&self.checkpoint)?, deal)?;
        let files: Vec<u64> = self.checkpoint.files().iter().map(|file| file.len()).collect();
        let options = PlanOptions {
            piece_len: way.piece_len,
            chunk_len: way.verify.then_some(tuning::CHUNK_LEN),
            ..PlanOptions::default()
        };
        let plan = LoadPlan::build(&files, &placement.block_lens(), &placement.segments, &options)?;
        let piece = |piece: &sllm_core::Piece| {
            let copies = plan.copies(piece).iter().map(|copy| (placement.blocks[copy.block].device, copy.len()));
            let whole = files[piece.file] as f64;
            Piece {
                len: piece.len,
                copies: copies.collect(),
                window: (piece.file, piece.offset / sllm_core::tuning::WINDOW),
                place: piece.offset as f64 / whole..(piece.offset + piece.len) as f64 / whole,
            }
        };
        let mut pieces: Vec<&sllm_core::Piece> = plan.pieces().iter().collect();
        if devices > 1 {
            plan.spread(&mut pieces, |block| placement.blocks[block].device);
        }
        Ok(pieces.into_iter().map(piece).collect())
    }
}

/// Lengths of a model's tensors, bf16.
fn lens_of(name: &str) -> Result<Vec<u64>, Failure> {
    let parts: Vec<&str> = name.split(':').collect();
    match parts[..] {
        ["llama8b"] => Ok(llama8b()),
        ["many", gb] => Ok(many(gb.parse()?, None)),
        ["many", gb, count] => Ok(many(gb.parse()?, Some(count.parse()?))),
        _ => Err(format!("{name:?} is no model: give llama8b, many:GB or many:GB:TENSORS").into()),
    }
}

/// Llama-3.1-8B, in the order in which the safetensors library lays a shard out: by name, all of one dtype.
fn llama8b() -> Vec<u64> {
    let (hidden, inner, kv, vocab) = (4096, 14336, 1024, 128_256);
    let layer = [hidden, hidden * inner, inner * hidden, inner * hidden, hidden];
    let attention = [kv * hidden, hidden * hidden, hidden * hidden, kv * hidden];
    let layers = (0..32).flat_map(|_| layer.into_iter().chain(attention));
    std::iter::once(vocab * hidden).chain(layers).chain([hidden, vocab * hidden]).map(|elements| 2 * elements).collect()
}

/// Three matrices and a norm, many times, as `benches/peers/inputs.py` makes them.
fn many(gb: f64, count: Option<u32>) -> Vec<u64> {
    let width = 2048u64;
    let bytes = gb * 1e9;
    let row = (2 * width) as f64;
    let (groups, inner) = match count {
        None => ((bytes / (row * 2305.0)).round(), 768.0),
        Some(count) => {
            let groups = f64::from((count / 4).max(1));
            (groups, (bytes / groups / row / 3.0).round().max(1.0))
        }
    };
    let (norm, matrix) = (2 * width, row * inner);
    // Whole and positive by construction.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let (groups, matrix) = (groups.max(1.0) as usize, matrix as u64);
    [norm, matrix, matrix, matrix].repeat(groups)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_have_the_sizes_that_the_peers_command_makes() {
        let llama = Model::named("llama8b").unwrap();
        assert_eq!((lens_of("llama8b").unwrap().len(), llama.len()), (291, 16_060_522_496));
        let small = lens_of("many:8:18864").unwrap();
        assert_eq!(small.len(), 18_864);
        let total: u64 = small.iter().sum();
        assert_eq!(Model::named("many:8:18864").unwrap().len(), total, "its header has more than 64 KiB");
        assert!(total.abs_diff(8_000_000_000) < 40_000_000, "{total}");
        assert!(lens_of("many").is_err() && lens_of("many:x").is_err());
    }

    #[test]
    fn pieces_carry_every_byte_once() {
        let model = Model::named("many:0.1").unwrap();
        for (way, devices) in [(Way::pread(2), 1), (Way { verify: true, ..Way::pread(2) }, 1), (Way::pread(2), 3)] {
            let pieces = model.pieces(&way, devices).unwrap();
            let copied: u64 = pieces.iter().flat_map(|piece| &piece.copies).map(|(_, len)| len).sum();
            assert_eq!(copied, model.len());
            assert!(pieces.iter().all(|piece| piece.len <= way.piece_len));
            let used = pieces.iter().flat_map(|piece| &piece.copies).map(|(device, _)| device).max();
            assert_eq!(used, Some(&(devices - 1)));
        }
    }
}
