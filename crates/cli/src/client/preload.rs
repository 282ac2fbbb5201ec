//! `sllm-store preload`.

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
        preloaded.models.push(Row { model, bytes: progress.total, seconds, pinned: args.pin });
    }
    Ok(session.answer(&preloaded, || preloaded.models.iter().map(text).collect())?)
}

fn text(row: &Row<'_>) -> String {
    let Row { model, bytes, seconds, pinned } = row;
    let pinned = if *pinned { ", pinned" } else { "" };
    format!("{}: {} in the server's memory{pinned}, in {seconds:.2} s\n", printable(model), human(*bytes))
}
