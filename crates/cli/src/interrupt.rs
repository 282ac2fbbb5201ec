//! Ctrl-C: the first one cancels the work, the second one ends the process.

use std::sync::{Mutex, Once};

use sllm_core::Cancel;

use crate::output::CANCELLED;

/// The flag of the work that runs, until it was set once.
static CURRENT: Mutex<Option<Cancel>> = Mutex::new(None);
static HANDLER: Once = Once::new();

/// A flag that the next Ctrl-C sets.
pub(crate) fn watch() -> Cancel {
    let cancel = Cancel::new();
    set(Some(cancel.clone()));
    HANDLER.call_once(|| {
        // Where the process has a handler already, that one keeps its say.
        let _ = ctrlc::set_handler(|| match set(None) {
            Some(cancel) => cancel.cancel(),
            None => std::process::exit(i32::from(CANCELLED)),
        });
    });
    cancel
}

/// The work is done: Ctrl-C ends the process.
pub(crate) fn unwatch() {
    set(None);
}

fn set(cancel: Option<Cancel>) -> Option<Cancel> {
    std::mem::replace(&mut CURRENT.lock().unwrap_or_else(|e| e.into_inner()), cancel)
}
