//! `sllm-store preload`.

use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;

use super::PreloadArgs;
use crate::output::{Answer, Fault, Session, printable};
use crate::size::human;

#[derive(Serialize)]
struct Preloaded<'a> {
    models: Vec<Row<'a>>,
}

#[derive(Serialize)]
struct Row<'a> {
    model: &'a str,
    bytes: u64,
    /// Bytes of it that stay in the server's memory; what does not fit went through it. `None` where that is not known.
    resident: Option<u64>,
    seconds: f64,
    pinned: bool,
}

pub(super) fn run(args: &PreloadArgs, session: &Session) -> Result<Answer, Fault> {
    let client = args.server.connect()?;
    let mut preloaded = Preloaded { models: Vec::new() };
    for model in &args.models {
        let started = Instant::now();
        let shown = session.progress("preload");
        let progress = client.preload(model, args.pin, &shown.control())?;
        drop(shown);
        let seconds = started.elapsed().as_secs_f64();
        preloaded.models.push(Row { model, bytes: progress.total, resident: None, seconds, pinned: args.pin });
    }
    // The models are there: that the server does not say more is no failure of theirs.
    if let (Ok(listed), Ok(status)) = (client.list(), client.status()) {
        let below = PathBuf::from(status.storage_path);
        for row in &mut preloaded.models {
            // An absolute path stays what it is.
            let place = below.join(row.model);
            row.resident = listed.iter().find(|model| below.join(&model.name) == place).map(|model| model.resident);
        }
    }
    Ok(session.answer(&preloaded, || preloaded.models.iter().map(text).collect())?)
}

fn text(row: &Row<'_>) -> String {
    let Row { model, bytes, resident, seconds, pinned } = row;
    let pinned = if *pinned { ", pinned" } else { "" };
    let bytes = match resident {
        Some(resident) if resident < bytes => {
            format!("{} of {} in the server's memory", human(*resident), human(*bytes))
        }
        Some(_) => format!("{} in the server's memory", human(*bytes)),
        // Whether they are still there is not known.
        None => format!("{} read by the server", human(*bytes)),
    };
    format!("{}: {bytes}{pinned}, in {seconds:.2} s\n", printable(model))
}
