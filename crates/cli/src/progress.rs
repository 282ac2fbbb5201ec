//! Progress on standard error: a bar on a terminal, else a line every tenth.

use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use sllm_core::{Cancel, Control, Progress};

use crate::size::human;

/// The progress of one work. It goes from the screen when this is dropped.
pub(crate) struct Shown {
    display: Option<Arc<Display>>,
    cancel: Cancel,
}

enum Display {
    Bar(ProgressBar),
    Lines(Lines),
}

impl Shown {
    pub(crate) fn new(what: &'static str, quiet: bool, cancel: Cancel) -> Shown {
        let display = (!quiet).then(|| {
            Arc::new(if io::stderr().is_terminal() {
                Display::Bar(bar(what))
            } else {
                Display::Lines(Lines::new(what))
            })
        });
        Shown { display, cancel }
    }

    /// What core calls as bytes get done.
    pub(crate) fn control(&self) -> Control {
        let control = Control::new().cancelled_by(self.cancel.clone());
        match &self.display {
            None => control,
            Some(display) => {
                let display = Arc::clone(display);
                control.on_progress(move |progress| display.update(progress))
            }
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Some(Display::Bar(bar)) = self.display.as_deref() {
            bar.finish_and_clear();
        }
    }
}

impl Display {
    fn update(&self, progress: Progress) {
        match self {
            Display::Bar(bar) => {
                bar.set_length(progress.total);
                // Several threads tell of their bytes, so that these may come out of order.
                if progress.done > bar.position() {
                    bar.set_position(progress.done);
                }
            }
            Display::Lines(lines) => {
                if let Some(line) = lines.due(progress) {
                    let _ = io::stderr().write_all(line.as_bytes());
                }
            }
        }
    }
}

fn bar(what: &'static str) -> ProgressBar {
    let rate = |state: &ProgressState, out: &mut dyn std::fmt::Write| {
        let _ = write!(out, "{:.2} GB/s", state.per_sec() / 1e9);
    };
    let style =
        ProgressStyle::with_template("{msg} [{bar:30}] {binary_bytes} of {binary_total_bytes}, {gb_per_s}, ETA {eta}")
            .map(|style| style.with_key("gb_per_s", rate).progress_chars("=> "))
            .unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    bar.set_style(style);
    bar.set_message(what);
    bar
}

/// Lines where there is no terminal.
struct Lines {
    what: &'static str,
    start: Instant,
    /// Tenths told.
    told: AtomicU64,
}

impl Lines {
    fn new(what: &'static str) -> Lines {
        Lines { what, start: Instant::now(), told: AtomicU64::new(0) }
    }

    /// The line for this progress, once a tenth.
    fn due(&self, progress: Progress) -> Option<String> {
        let Progress { done, total } = progress;
        let tenth = u64::try_from(u128::from(done) * 10 / u128::from(total.max(1))).unwrap_or(10);
        if self.told.fetch_max(tenth, Ordering::Relaxed) >= tenth {
            return None;
        }
        let rate = done as f64 / 1e9 / self.start.elapsed().as_secs_f64().max(1e-9);
        Some(format!("{}: {}% ({} of {}, {rate:.2} GB/s)\n", self.what, tenth * 10, human(done), human(total)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_told_once_a_tenth_and_never_backwards() {
        let lines = Lines::new("convert");
        let told = |done| lines.due(Progress { done, total: 1000 });
        assert_eq!(told(99), None);
        assert!(told(100).unwrap().starts_with("convert: 10% (100 B of 1000 B, "));
        assert_eq!(told(150), None);
        assert!(told(555).unwrap().starts_with("convert: 50%"));
        assert_eq!(told(300), None);
        assert!(told(1000).unwrap().starts_with("convert: 100%"));
        assert_eq!(told(1000), None);
    }

    #[test]
    fn nothing_to_do_is_no_division_by_zero() {
        assert_eq!(Lines::new("load").due(Progress { done: 0, total: 0 }), None);
        assert!(Lines::new("load").due(Progress { done: u64::MAX, total: u64::MAX }).is_some());
    }
}
