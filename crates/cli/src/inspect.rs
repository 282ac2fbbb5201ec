//! `sllm-store inspect`.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::Serialize;
use sllm_core::{Checkpoint, Dtype, Result, TensorInfo};

use crate::args::InspectArgs;
use crate::output::{Answer, Session, printable};
use crate::size::human;

/// What a checkpoint holds.
#[derive(Serialize)]
struct Summary<'a> {
    path: Cow<'a, str>,
    layout: &'static str,
    identity: Option<&'a str>,
    chunk_len: Option<u64>,
    /// Tensor names.
    tensor_count: usize,
    /// Names that stand for bytes that another name has too.
    tied_count: usize,
    /// Bytes of all tensors, tied ones counted once.
    bytes: u64,
    dtypes: BTreeMap<Dtype, Share>,
    files: Vec<FileRow<'a>>,
    /// Those that were asked for, by file and offset.
    tensors: Vec<TensorRow<'a>>,
}

/// A dtype's part of a checkpoint.
#[derive(Default, Serialize)]
struct Share {
    tensors: usize,
    bytes: u64,
}

#[derive(Serialize)]
struct FileRow<'a> {
    name: &'a str,
    len: u64,
    tensors: usize,
}

#[derive(Serialize)]
struct TensorRow<'a> {
    name: &'a str,
    dtype: &'static str,
    shape: &'a [u64],
    #[serde(skip_serializing_if = "Option::is_none")]
    strides: Option<&'a [u64]>,
    file: &'a str,
    offset: u64,
    len: u64,
}

pub(crate) fn run(args: &InspectArgs, session: &Session) -> Result<Answer> {
    let checkpoint = args.revision.open(&args.path)?;
    let wanted = args.tensors.resolve()?.select(&checkpoint)?;
    let summary = Summary::new(&checkpoint, &wanted);
    session.answer(&summary, || summary.text())
}

impl<'a> Summary<'a> {
    fn new(checkpoint: &'a Checkpoint, wanted: &[usize]) -> Summary<'a> {
        let mut dtypes: BTreeMap<Dtype, Share> = BTreeMap::new();
        let file = |file: &'a sllm_core::DataFile| FileRow { name: file.name(), len: file.len(), tensors: 0 };
        let mut files: Vec<FileRow<'_>> = checkpoint.files().iter().map(file).collect();
        let mut tied_count = 0;
        let mut before: Option<&TensorInfo> = None;
        for tensor in checkpoint.tensors() {
            let share = dtypes.entry(tensor.dtype).or_default();
            share.tensors += 1;
            files[tensor.file].tensors += 1;
            // Tied tensors are neighbours.
            if before.is_some_and(|before| tensor.is_tied_with(before)) {
                tied_count += 1;
            } else {
                share.bytes += tensor.len;
            }
            before = Some(tensor);
        }
        let row = |&i: &usize| {
            let tensor = &checkpoint.tensors()[i];
            TensorRow {
                name: &tensor.name,
                dtype: tensor.dtype.name(),
                shape: &tensor.shape,
                strides: tensor.strides.as_deref().map(|strides| &**strides),
                file: checkpoint.files()[tensor.file].name(),
                offset: tensor.offset,
                len: tensor.len,
            }
        };
        Summary {
            path: checkpoint.path().to_string_lossy(),
            layout: checkpoint.layout().name(),
            identity: checkpoint.identity(),
            chunk_len: checkpoint.sums().map(|sums| sums.chunk_len),
            tensor_count: checkpoint.tensors().len(),
            tied_count,
            bytes: checkpoint.total_len(),
            dtypes,
            files,
            tensors: wanted.iter().map(row).collect(),
        }
    }

    fn text(&self) -> String {
        let mut text = format!("path      {}\nlayout    {}\n", printable(&self.path), self.layout);
        if let Some(identity) = self.identity {
            text += &format!("identity  {identity}\n");
        }
        if let Some(chunk_len) = self.chunk_len {
            text += &format!("chunks    of {}\n", human(chunk_len));
        }
        text += &format!("tensors   {}", self.tensor_count);
        if self.tied_count > 0 {
            text += &format!(", {} of them tied to another", self.tied_count);
        }
        text += &format!("\nbytes     {} ({})\n", self.bytes, human(self.bytes));

        let mut rows = vec![cells(["DTYPE", "TENSORS", "BYTES"])];
        let dtype_row = |(dtype, share): (&Dtype, &Share)| {
            [dtype.name().to_owned(), share.tensors.to_string(), share.bytes.to_string()]
        };
        rows.extend(self.dtypes.iter().map(dtype_row));
        table(&mut text, &rows, [Align::Left, Align::Right, Align::Right]);

        let mut rows = vec![cells(["BYTES", "TENSORS", "FILE"])];
        let file_row = |file: &FileRow<'_>| [file.len.to_string(), file.tensors.to_string(), printable(file.name)];
        rows.extend(self.files.iter().map(file_row));
        table(&mut text, &rows, [Align::Right, Align::Right, Align::Left]);

        // Names come last: they have any length.
        let mut rows = vec![cells(["DTYPE", "SHAPE", "BYTES", "OFFSET", "FILE", "NAME"])];
        rows.extend(self.tensors.iter().map(|tensor| {
            [
                tensor.dtype.to_owned(),
                shape_text(tensor),
                tensor.len.to_string(),
                tensor.offset.to_string(),
                printable(tensor.file),
                printable(tensor.name),
            ]
        }));
        use Align::{Left, Right};
        table(&mut text, &rows, [Left, Left, Right, Right, Left, Left]);
        text
    }
}

fn shape_text(tensor: &TensorRow<'_>) -> String {
    match tensor.strides {
        None => format!("{:?}", tensor.shape),
        Some(strides) => format!("{:?} strides {strides:?}", tensor.shape),
    }
}

fn cells<const N: usize>(row: [&str; N]) -> [String; N] {
    row.map(str::to_owned)
}

#[derive(Clone, Copy)]
enum Align {
    Left,
    Right,
}

/// Adds an empty line and the rows, of which the first is the head. Nothing where there is only a head.
fn table<const N: usize>(text: &mut String, rows: &[[String; N]], align: [Align; N]) {
    if rows.len() < 2 {
        return;
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    text.push('\n');
    for row in rows {
        let mut line = String::new();
        for ((cell, width), align) in row.iter().zip(widths).zip(align) {
            match align {
                Align::Left => line += &format!("{cell:<width$}  "),
                Align::Right => line += &format!("{cell:>width$}  "),
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
}
