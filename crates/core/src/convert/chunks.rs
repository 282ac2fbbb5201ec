//! The checksummed chunks of several files, numbered through.

/// One chunk of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Place of the file.
    pub(crate) file: usize,
    /// Its number in the file.
    pub(crate) number: u64,
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// All chunks of files of given lengths.
#[derive(Debug)]
pub(crate) struct Chunks {
    chunk_len: u64,
    file_lens: Vec<u64>,
    /// How many chunks lie before each file's first; then their number in all.
    starts: Vec<u64>,
}

impl Chunks {
    pub(crate) fn new(chunk_len: u64, file_lens: impl Iterator<Item = u64>) -> Chunks {
        let mut chunks = Chunks { chunk_len, file_lens: file_lens.collect(), starts: vec![0] };
        let mut count = 0;
        for len in &chunks.file_lens {
            count += len.div_ceil(chunk_len);
            chunks.starts.push(count);
        }
        chunks
    }

    pub(crate) fn count(&self) -> u64 {
        self.starts[self.file_lens.len()]
    }

    /// Bytes of all files.
    pub(crate) fn total_len(&self) -> u64 {
        self.file_lens.iter().sum()
    }

    /// The chunk of this number, which is below [`Chunks::count`].
    pub(crate) fn get(&self, number: u64) -> Chunk {
        let file = self.starts.partition_point(|&start| start <= number) - 1;
        let number = number - self.starts[file];
        let offset = number * self.chunk_len;
        Chunk { file, number, offset, len: self.chunk_len.min(self.file_lens[file] - offset) }
    }

    /// Splits values of all chunks into those of each file.
    pub(crate) fn by_file<T: Clone>(&self, values: &[T]) -> Vec<Vec<T>> {
        let mut rest = values.iter().cloned();
        let of_file = |range: &[u64]| (range[0]..range[1]).filter_map(|_| rest.next()).collect();
        self.starts.windows(2).map(of_file).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_the_files_in_order() {
        let chunks = Chunks::new(10, [25, 0, 10, 1].into_iter());
        let all: Vec<_> =
            (0..chunks.count()).map(|i| chunks.get(i)).map(|c| (c.file, c.number, c.offset, c.len)).collect();
        assert_eq!(all, [(0, 0, 0, 10), (0, 1, 10, 10), (0, 2, 20, 5), (2, 0, 0, 10), (3, 0, 0, 1)]);
        assert_eq!(chunks.total_len(), 36);
        assert_eq!(chunks.by_file(&[1, 2, 3, 4, 5]), [vec![1, 2, 3], vec![], vec![4], vec![5]]);
        assert_eq!(Chunks::new(10, std::iter::empty()).count(), 0);
    }
}
