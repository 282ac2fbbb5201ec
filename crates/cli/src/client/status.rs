//! `sllm-store status`.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use serde::Serialize;
use sllm_client::{Job, Model, Status, StoreClient};

use super::list::{duration, text as models_text};
use super::{StatusArgs, table};
use crate::output::{Answer, Fault, Session, printable, written};
use crate::size::{count, human};

/// How often a watched status is shown.
const EVERY: Duration = Duration::from_secs(1);
/// Goes to the top left and clears the screen.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// What is told, as JSON.
#[derive(Serialize)]
struct Told<'a> {
    address: String,
    #[serde(flatten)]
    status: &'a Status,
    models: &'a [Model],
}

pub(super) fn run(args: &StatusArgs, session: &Session) -> Result<Answer, Fault> {
    let client = args.server.connect()?;
    if args.watch {
        watch(&client, session)?;
        return Ok(Answer { body: String::new(), fault: None });
    }
    let (status, models) = (client.status()?, client.list()?);
    let told = Told { address: client.address().to_string(), status: &status, models: &models };
    Ok(session.answer(&told, || text(&told.address, &status, &models))?)
}

/// Shows the status until Ctrl-C; a server that goes may come again.
fn watch(client: &StoreClient, session: &Session) -> Result<(), Fault> {
    let mut out = std::io::stdout();
    let clear = if out.is_terminal() { CLEAR } else { "" };
    while !session.is_cancelled() {
        let shown = match client.status().and_then(|status| Ok((status, client.list()?))) {
            Ok((status, models)) => text(&client.address().to_string(), &status, &models),
            Err(error) => printable(&error.chain()) + "\n",
        };
        let result = write!(out, "{clear}{shown}").and_then(|()| out.flush());
        if result.is_err() {
            return written(result);
        }
        let mut left = EVERY;
        while !left.is_zero() && !session.is_cancelled() {
            let nap = left.min(Duration::from_millis(50));
            std::thread::sleep(nap);
            left -= nap;
        }
    }
    Ok(())
}

fn text(address: &str, status: &Status, models: &[Model]) -> String {
    let Status { version, storage_path, uptime_s, pool, jobs, loads_done, loads_failed, clients, .. } = status;
    let mut text = format!(
        "server   {} at {address}, up {}, {}\nmodels   below {}\n",
        printable(version),
        duration(*uptime_s),
        count(*clients, "client"),
        printable(storage_path)
    );
    text += &format!(
        "pool     {} of {} in use, {} of it pinned; chunks of {}; {} page-locked\n",
        human(pool.resident),
        human(pool.capacity),
        human(pool.pinned),
        human(pool.chunk_len),
        human(pool.page_locked),
    );
    if let Some(refusal) = &pool.refusal {
        text += &format!("         not page-locked: {}\n", printable(refusal));
    }
    text += &format!(
        "chunks   {} found, {} read, {} evicted\nloads    {loads_done} done, {loads_failed} failed, {} running\n",
        pool.hits,
        pool.misses,
        pool.evictions,
        jobs.len()
    );
    if !jobs.is_empty() {
        let row = |job: &Job| {
            let percent = u128::from(job.done) * 100 / u128::from(job.total.max(1));
            let rate = if job.seconds > 0.0 { job.done as f64 / 1e9 / job.seconds } else { 0.0 };
            let (percent, rate) = (format!("{percent} %"), format!("{rate:.2}"));
            let seconds = format!("{:.1}", job.seconds);
            [percent, human(job.total), seconds, rate, printable(&job.target), printable(&job.model)]
        };
        let rows: Vec<_> = jobs.iter().map(row).collect();
        text += &format!("\n{}", table(["DONE", "OF", "SECONDS", "GB/S", "TO", "MODEL"], &rows));
    }
    if !models.is_empty() {
        text += &format!("\n{}", models_text(models));
    }
    text
}
