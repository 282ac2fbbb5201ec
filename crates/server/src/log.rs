//! Logs on standard error. Whoever logs never waits and never fails.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use sllm_core::{Error, Result};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Lines that wait to be written at most; later ones are counted and lost.
const WAITING: usize = 4096;

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// A JSON object a line.
    Json,
}

impl std::str::FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<LogFormat, String> {
        match text {
            "text" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            _ => Err("a log format is text or json".into()),
        }
    }
}

/// Writes what is logged in this process to standard error, by a thread of its own. Where that cannot be written to, as
/// when a disk is full or nobody reads a pipe, lines are lost and the server goes on.
pub fn log_to_stderr(format: LogFormat) -> Result<()> {
    let sink = Sink::start(io::stderr())?;
    // The subscriber would tell its own errors on standard error, and panic where that is gone.
    let logs = tracing_subscriber::fmt().with_writer(sink).with_max_level(LevelFilter::INFO).log_internal_errors(false);
    let set = match format {
        LogFormat::Text => logs.with_ansi(false).with_target(false).try_init(),
        LogFormat::Json => logs.json().flatten_event(true).with_target(false).try_init(),
    };
    set.map_err(|e| Error::Invalid(format!("logs are set up already: {e}")))
}

/// Takes lines, and gives them to the thread that writes.
#[derive(Clone)]
struct Sink {
    lines: SyncSender<Vec<u8>>,
    lost: Arc<AtomicU64>,
}

impl Sink {
    fn start(out: impl Write + Send + 'static) -> Result<Sink> {
        let (lines, waiting) = sync_channel(WAITING);
        let lost = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&lost);
        let started =
            std::thread::Builder::new().name("log".into()).spawn(move || write_lines(&waiting, &counted, out));
        started.map_err(|source| Error::Io { what: "start a thread for", path: "logs".into(), source })?;
        Ok(Sink { lines, lost })
    }
}

fn write_lines(waiting: &Receiver<Vec<u8>>, lost: &AtomicU64, mut out: impl Write) {
    for line in waiting {
        let missing = lost.swap(0, Ordering::Relaxed);
        if missing > 0 && writeln!(out, "{missing} log lines were lost").is_err() {
            lost.fetch_add(missing, Ordering::Relaxed);
        }
        if out.write_all(&line).is_err() {
            lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl<'a> MakeWriter<'a> for Sink {
    type Writer = Sink;

    fn make_writer(&'a self) -> Sink {
        self.clone()
    }
}

impl Write for Sink {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.lines.try_send(line.to_vec()) {
            Ok(()) | Err(TrySendError::Disconnected(_)) => {}
            Err(TrySendError::Full(_)) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::channel;

    use super::*;

    /// A disk that is full for the first lines.
    struct Disk {
        full_for: usize,
        written: Arc<Mutex<Vec<u8>>>,
        tell: std::sync::mpsc::Sender<()>,
    }

    impl Write for Disk {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            let _ = self.tell.send(());
            if self.full_for > 0 {
                self.full_for -= 1;
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.written.lock().unwrap().extend(line);
            Ok(line.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_that_cannot_be_written_are_counted_and_the_next_ones_are_written() {
        let (tell, told) = channel();
        let written = Arc::default();
        let mut sink = Sink::start(Disk { full_for: 2, written: Arc::clone(&written), tell }).unwrap();
        sink.write_all(b"one\n").unwrap();
        told.recv().unwrap();
        // The count of the lost line fails too, then the second line is written.
        sink.write_all(b"two\n").unwrap();
        told.recv().unwrap();
        told.recv().unwrap();
        sink.write_all(b"three\n").unwrap();
        drop(sink);
        while told.recv().is_ok() {}
        let text = String::from_utf8(written.lock().unwrap().clone()).unwrap();
        assert_eq!(text, "two\n1 log lines were lost\nthree\n");
    }

    #[test]
    fn who_logs_does_not_wait_for_a_writer_that_hangs() {
        struct Hangs(Receiver<()>);
        impl Write for Hangs {
            fn write(&mut self, line: &[u8]) -> io::Result<usize> {
                let _ = self.0.recv();
                Ok(line.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (hold, held) = channel();
        let mut sink = Sink::start(Hangs(held)).unwrap();
        for _ in 0..2 * WAITING {
            sink.write_all(b"line\n").unwrap();
        }
        assert!(sink.lost.load(Ordering::Relaxed) > 0);
        drop(hold);
    }
}
