//! Logs on standard error. Whoever logs never waits and never fails.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use sllm_core::{Error, Result};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::MakeWriter;

/// Lines that wait to be written at most; later ones are counted and lost.
const WAITING: usize = 4096;
/// How long the end of a process waits for them: a full pipe may never take them.
const LAST_LINES: Duration = Duration::from_secs(1);

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
/// when a disk is full or nobody reads a pipe, lines are lost and the server goes on. What is logged after the guard was
/// dropped is lost.
pub fn log_to_stderr(format: LogFormat) -> Result<LogGuard> {
    let (sink, guard) = Sink::start(io::stderr())?;
    // The subscriber would tell its own errors on standard error, and panic where that is gone.
    let logs = tracing_subscriber::fmt().with_writer(sink).with_max_level(LevelFilter::INFO).log_internal_errors(false);
    let set = match format {
        LogFormat::Text => logs.with_ansi(false).with_target(false).try_init(),
        LogFormat::Json => logs.json().flatten_event(true).with_target(false).try_init(),
    };
    set.map_err(|e| Error::Invalid(format!("logs are set up already: {e}")))?;
    Ok(guard)
}

/// Ends the log when it is dropped: waits, a second at most, until what was logged is written.
#[derive(Debug)]
#[must_use = "the last lines are lost where it is dropped before them"]
pub struct LogGuard {
    lines: Lines,
    /// Gone when the thread has ended.
    written: Receiver<()>,
    limit: Duration,
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        *self.lines.write().unwrap_or_else(PoisonError::into_inner) = None;
        let _ = self.written.recv_timeout(self.limit);
    }
}

/// To the thread that writes; `None` at the end.
type Lines = Arc<RwLock<Option<SyncSender<Vec<u8>>>>>;

/// Takes lines, and gives them to the thread that writes.
#[derive(Clone)]
struct Sink {
    lines: Lines,
    lost: Arc<AtomicU64>,
}

impl Sink {
    fn start(out: impl Write + Send + 'static) -> Result<(Sink, LogGuard)> {
        let (lines, waiting) = sync_channel(WAITING);
        let (end, written) = channel();
        let lost = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&lost);
        let write = move || write_lines(&waiting, &counted, out, end);
        let started = std::thread::Builder::new().name("log".into()).spawn(write);
        started.map_err(|source| Error::Io { what: "start a thread for", path: "logs".into(), source })?;
        let lines = Arc::new(RwLock::new(Some(lines)));
        let guard = LogGuard { lines: Arc::clone(&lines), written, limit: LAST_LINES };
        Ok((Sink { lines, lost }, guard))
    }
}

fn write_lines(waiting: &Receiver<Vec<u8>>, lost: &AtomicU64, mut out: impl Write, end: Sender<()>) {
    for line in waiting {
        tell_lost(lost, &mut out);
        if out.write_all(&line).is_err() {
            lost.fetch_add(1, Ordering::Relaxed);
        }
    }
    tell_lost(lost, &mut out);
    drop(end);
}

fn tell_lost(lost: &AtomicU64, out: &mut impl Write) {
    let missing = lost.swap(0, Ordering::Relaxed);
    if missing > 0 && writeln!(out, "{missing} log lines were lost").is_err() {
        lost.fetch_add(missing, Ordering::Relaxed);
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
        // Only the end writes there, which takes no time.
        let lines = self.lines.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(Err(TrySendError::Full(_))) = lines.as_ref().map(|lines| lines.try_send(line.to_vec())) {
            self.lost.fetch_add(1, Ordering::Relaxed);
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
        let (mut sink, mut guard) = Sink::start(Disk { full_for: 2, written: Arc::clone(&written), tell }).unwrap();
        guard.limit = Duration::from_secs(600);
        sink.write_all(b"one\n").unwrap();
        told.recv().unwrap();
        // The count of the lost line fails too, then the second line is written.
        sink.write_all(b"two\n").unwrap();
        told.recv().unwrap();
        told.recv().unwrap();
        sink.write_all(b"three\n").unwrap();
        drop(guard);
        sink.write_all(b"too late\n").unwrap();
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
        let (mut sink, mut guard) = Sink::start(Hangs(held)).unwrap();
        for _ in 0..2 * WAITING {
            sink.write_all(b"line\n").unwrap();
        }
        assert!(sink.lost.load(Ordering::Relaxed) > 0);
        // Nor does the end, for longer than it may.
        guard.limit = Duration::from_millis(1);
        drop(guard);
        drop(hold);
    }

    #[test]
    fn the_end_waits_for_what_was_logged() {
        struct Slow(Arc<AtomicU64>);
        impl Write for Slow {
            fn write(&mut self, line: &[u8]) -> io::Result<usize> {
                std::thread::sleep(Duration::from_micros(100));
                self.0.fetch_add(1, Ordering::Relaxed);
                Ok(line.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let written = Arc::default();
        let (mut sink, mut guard) = Sink::start(Slow(Arc::clone(&written))).unwrap();
        guard.limit = Duration::from_secs(600);
        for _ in 0..100 {
            sink.write_all(b"line\n").unwrap();
        }
        drop(guard);
        assert_eq!(written.load(Ordering::Relaxed), 100);
    }
}
