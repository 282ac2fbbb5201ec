//! Answers on standard output, errors on standard error, and the exit codes.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use sllm_core::{Cancel, Error, ErrorKind, Result};

use crate::args;
use crate::progress::Shown;

/// Exit code of what was stopped by Ctrl-C, as shells have it.
pub(crate) const CANCELLED: u8 = 130;

/// How one run of the command talks.
pub(crate) struct Session {
    json: bool,
    quiet: bool,
    cancel: Cancel,
}

impl Session {
    pub(crate) fn new(typed: &args::Output, cancel: Cancel) -> Session {
        Session { json: typed.json, quiet: typed.quiet, cancel }
    }

    /// Progress of work with this name, and the flag that stops it.
    pub(crate) fn progress(&self, what: &'static str) -> Shown {
        Shown::new(what, self.quiet, self.cancel.clone())
    }

    /// Whether Ctrl-C was pressed.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancel.is_cancelled()
    }

    /// An answer, in the form that was asked for.
    pub(crate) fn answer(&self, json: &impl Serialize, text: impl FnOnce() -> String) -> Result<Answer> {
        let body = match (self.json, self.quiet) {
            (true, _) => {
                let json = serde_json::to_string(json);
                json.map_err(|e| Error::Invalid(format!("the answer cannot be written as JSON: {e}")))? + "\n"
            }
            (false, true) => String::new(),
            (false, false) => text(),
        };
        Ok(Answer { body, fault: None })
    }
}

/// What goes to standard output.
pub(crate) struct Answer {
    pub(crate) body: String,
    /// What the answer says is wrong, though the work itself was done.
    pub(crate) fault: Option<Fault>,
}

/// An error, ready to be told.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    kind: Kind,
    message: String,
    causes: Vec<String>,
    /// What else is to be known.
    note: Option<String>,
}

/// What a fault is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    /// What errors of the core are about.
    Core(ErrorKind),
    /// A store server.
    Server,
}

impl Fault {
    pub(crate) fn new(kind: ErrorKind, message: String) -> Fault {
        Fault { kind: Kind::Core(kind), message, causes: Vec::new(), note: None }
    }

    /// The fault of a conversion or an export to `target`, with what it left there.
    pub(crate) fn of_writing(error: Error, target: &Path) -> Fault {
        let mut fault = Fault::from(error);
        // What cannot be meant says nothing of the work; it may be another run's.
        if fault.kind != Kind::Core(ErrorKind::Invalid) {
            let note = |dir: PathBuf| {
                let dir = dir.display();
                format!("what was written is kept in {dir}: run this again to go on with the same source, or remove it")
            };
            fault.note = sllm_core::interrupted(target).map(note);
        }
        fault
    }

    /// The fault as an `error` object of JSON.
    pub(crate) fn object(&self) -> ErrorObject {
        let mut message = self.message.clone();
        for cause in &self.causes {
            message.push_str(": ");
            message.push_str(cause);
        }
        if let Some(note) = &self.note {
            message.push_str("; ");
            message.push_str(note);
        }
        ErrorObject { kind: self.kind.name(), message }
    }

    fn tell(&self) {
        let mut text = format!("error: {}\n", self.message);
        for cause in &self.causes {
            text.push_str("  caused by: ");
            text.push_str(cause);
            text.push('\n');
        }
        if let Some(note) = &self.note {
            text.push_str(note);
            text.push('\n');
        }
        // Names of files may hold anything; lines are our own.
        let text = printable_lines(&text);
        // Nobody is left to be told that standard error is closed.
        let _ = io::stderr().write_all(text.as_bytes());
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Fault {
        Fault { causes: causes(&error), ..Fault::new(error.kind(), error.to_string()) }
    }
}

impl From<sllm_client::Error> for Fault {
    fn from(error: sllm_client::Error) -> Fault {
        use sllm_client::{Error as Client, Refusal};
        let kind = match &error {
            Client::Core(error) => Kind::Core(error.kind()),
            Client::Cancelled => Kind::Core(ErrorKind::Cancelled),
            Client::Address { .. } | Client::Token | Client::MemoryOverTcp { .. } => Kind::Core(ErrorKind::Invalid),
            Client::Refused { refusal, .. } => match refusal {
                Refusal::NotFound => Kind::Core(ErrorKind::NotFound),
                Refusal::Invalid | Refusal::OtherFiles => Kind::Core(ErrorKind::Invalid),
                Refusal::Denied => Kind::Core(ErrorKind::Permission),
                Refusal::Corrupt => Kind::Core(ErrorKind::Corrupt),
                _ => Kind::Server,
            },
            _ => Kind::Server,
        };
        Fault { kind, message: error.to_string(), causes: causes(&error), note: None }
    }
}

fn causes(error: &dyn std::error::Error) -> Vec<String> {
    std::iter::successors(error.source(), |cause| cause.source()).map(ToString::to_string).collect()
}

#[derive(Serialize)]
pub(crate) struct ErrorObject {
    kind: &'static str,
    message: String,
}

#[derive(Serialize)]
struct OnlyError {
    error: ErrorObject,
}

/// Writes what the command found, and gives the exit code.
pub(crate) fn finish(result: Result<Answer, Fault>, json: bool) -> u8 {
    let (body, fault) = match result {
        Ok(Answer { body, fault }) => (body, fault),
        Err(fault) => (if json { error_line(&fault) } else { String::new() }, Some(fault)),
    };
    let written = write(&body);
    // What the command found goes before that it could not be written.
    exit(fault.or(written.err()))
}

/// Tells a fault, and gives the exit code.
fn exit(fault: Option<Fault>) -> u8 {
    if let Some(fault) = &fault {
        fault.tell();
    }
    fault.map_or(0, |fault| fault.kind.exit_code())
}

/// Tells a wrong argument, or the help that was asked for, and gives the exit code.
pub(crate) fn tell_usage(error: &clap::Error, json: bool) -> u8 {
    let printed = error.print();
    if !error.use_stderr() {
        return exit(written(printed.and_then(|()| io::stdout().flush())).err());
    }
    if json {
        let message = usage_message(&error.render().to_string());
        let _ = write(&error_line(&Fault::new(ErrorKind::Invalid, message)));
    }
    u8::try_from(error.exit_code()).unwrap_or(2)
}

/// What clap says on several lines, as one: which arguments are missing, what may be given, and its tips, but no usage.
fn usage_message(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let paragraphs = text.split("\n\n").filter(|part| !part.starts_with("Usage: ") && !part.starts_with("For more "));
    let lines = paragraphs.map(|part| part.split_whitespace().collect::<Vec<_>>().join(" "));
    lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

fn error_line(fault: &Fault) -> String {
    // Two strings always have a JSON form.
    serde_json::to_string(&OnlyError { error: fault.object() }).unwrap_or_default() + "\n"
}

/// Writes to standard output.
fn write(body: &str) -> Result<(), Fault> {
    let mut out = io::stdout().lock();
    written(out.write_all(body.as_bytes()).and_then(|()| out.flush()))
}

/// What became of a write to standard output. A reader that has seen enough (`| head`) is no error.
pub(crate) fn written(result: io::Result<()>) -> Result<(), Fault> {
    let error = match result {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => error,
        _ => return Ok(()),
    };
    let kind = if error.kind() == io::ErrorKind::StorageFull { ErrorKind::NoSpace } else { ErrorKind::Io };
    Err(Fault { causes: vec![error.to_string()], ..Fault::new(kind, "cannot write to standard output".into()) })
}

/// Text from a file, for a terminal: control characters are escaped.
pub(crate) fn printable(text: &str) -> String {
    escaped(text, |_| true)
}

/// The same of several lines, whose ends stay.
pub(crate) fn printable_lines(text: &str) -> String {
    escaped(text, |c| c != '\n')
}

/// A path, for a terminal.
pub(crate) fn printable_path(path: &Path) -> String {
    printable(&path.to_string_lossy())
}

fn escaped(text: &str, is_escaped: impl Fn(char) -> bool) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        if c.is_control() && is_escaped(c) {
            out.extend(c.escape_default())
        } else {
            out.push(c)
        }
        out
    })
}

impl Kind {
    fn exit_code(self) -> u8 {
        match self {
            Kind::Core(kind) => exit_code(kind),
            Kind::Server => 11,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Core(kind) => name(kind),
            Kind::Server => "server",
        }
    }
}

/// The exit code of an error. `docs/cli.md` and the help list them.
pub(crate) fn exit_code(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Corrupt => 1,
        ErrorKind::Invalid => 2,
        ErrorKind::NotFound => 3,
        ErrorKind::Format => 4,
        ErrorKind::Permission => 6,
        ErrorKind::Exists => 7,
        ErrorKind::NoSpace => 8,
        ErrorKind::Device => 9,
        ErrorKind::DeviceMemory => 10,
        ErrorKind::Cancelled => CANCELLED,
        // `Io`, and what a later version of the core may add.
        _ => 5,
    }
}

/// The kind's name in JSON.
fn name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Corrupt => "corrupt",
        ErrorKind::Invalid => "invalid",
        ErrorKind::NotFound => "not_found",
        ErrorKind::Format => "format",
        ErrorKind::Permission => "permission",
        ErrorKind::Exists => "exists",
        ErrorKind::NoSpace => "no_space",
        ErrorKind::Device => "device",
        ErrorKind::DeviceMemory => "device_memory",
        ErrorKind::Cancelled => "cancelled",
        _ => "io",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_kind_has_its_own_code_and_name() {
        let kinds = [
            ErrorKind::Io,
            ErrorKind::Permission,
            ErrorKind::Format,
            ErrorKind::NotFound,
            ErrorKind::Corrupt,
            ErrorKind::Exists,
            ErrorKind::NoSpace,
            ErrorKind::Device,
            ErrorKind::DeviceMemory,
            ErrorKind::Invalid,
            ErrorKind::Cancelled,
        ];
        let kinds: Vec<Kind> = kinds.map(Kind::Core).into_iter().chain([Kind::Server]).collect();
        assert_eq!(kinds.iter().map(|kind| kind.exit_code()).collect::<HashSet<_>>().len(), kinds.len());
        assert_eq!(kinds.iter().map(|kind| kind.name()).collect::<HashSet<_>>().len(), kinds.len());
        assert!(kinds.iter().all(|kind| kind.exit_code() != 0));
    }

    #[test]
    fn causes_are_told_in_order() {
        let source = io::Error::other("the disk is on fire");
        let fault = Fault::from(Error::Io { what: "open", path: "/m".into(), source });
        assert_eq!(fault.causes, ["the disk is on fire"]);
        assert_eq!(fault.object().message, "/m: cannot open: the disk is on fire");
    }

    #[test]
    fn what_is_kept_is_named_whatever_ended_the_work() {
        let dir = tempfile::tempdir().unwrap();
        let (target, partial) = (dir.path().join("store"), dir.path().join(".store.sllm-partial"));
        let io = |kind| Error::Io { what: "open", path: "/m/config.json".into(), source: io::Error::from(kind) };
        let ends = || {
            [
                Error::Cancelled,
                io(io::ErrorKind::NotFound),
                io(io::ErrorKind::PermissionDenied),
                io(io::ErrorKind::ConnectionReset),
                Error::Exists { path: target.clone() },
            ]
        };
        assert!(ends().into_iter().all(|error| Fault::of_writing(error, &target).note.is_none()));
        std::fs::create_dir(&partial).unwrap();
        std::fs::write(partial.join(".sllm-journal"), "").unwrap();
        for error in ends() {
            let told = format!("{error:?}");
            let note = Fault::of_writing(error, &target).note;
            assert!(note.is_some_and(|note| note.contains(partial.to_str().unwrap())), "{told}");
        }
        assert!(Fault::of_writing(Error::Invalid("another run".into()), &target).note.is_none());
    }

    #[test]
    fn control_characters_do_not_reach_a_terminal() {
        assert_eq!(printable("λ.weight\u{1b}[2J\n"), "λ.weight\\u{1b}[2J\\n");
    }

    #[test]
    fn a_usage_error_is_one_line_that_names_the_arguments() {
        let missing = "error: the following required arguments were not provided:\n  <SOURCE>\n  <TARGET>\n\n\
                       Usage: sllm-store convert <SOURCE> <TARGET>\n\nFor more information, try '--help'.\n";
        let told = "the following required arguments were not provided: <SOURCE> <TARGET>";
        assert_eq!(usage_message(missing), told);
        let unknown =
            "error: unexpected argument '--jso' found\n\n  tip: a similar argument exists: '--json'\n\nUsage: x\n";
        assert_eq!(
            usage_message(unknown),
            "unexpected argument '--jso' found; tip: a similar argument exists: '--json'"
        );
    }
}
