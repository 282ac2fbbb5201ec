//! `sllm-store list`.

use serde::Serialize;
use sllm_client::Model;

use super::{ListArgs, table};
use crate::output::{Answer, Fault, Session, printable};
use crate::size::human;

#[derive(Serialize)]
struct Listed<'a> {
    models: &'a [Model],
}

pub(super) fn run(args: &ListArgs, session: &Session) -> Result<Answer, Fault> {
    let models = args.server.connect()?.list()?;
    Ok(session.answer(&Listed { models: &models }, || text(&models))?)
}

/// Models as a table.
pub(super) fn text(models: &[Model]) -> String {
    let row = |model: &Model| {
        [
            human(model.len),
            percent(model.resident, model.len),
            if model.pinned { "yes" } else { "" }.to_owned(),
            model.loads.to_string(),
            if model.loads > 0 { String::new() } else { duration(model.idle_s) },
            model.layout.clone(),
            printable(&model.name),
        ]
    };
    let rows: Vec<_> = models.iter().map(row).collect();
    table(["SIZE", "IN MEMORY", "PINNED", "LOADS", "IDLE", "LAYOUT", "MODEL"], &rows)
}

fn percent(part: u64, all: u64) -> String {
    let percent = u128::from(part) * 100 / u128::from(all.max(1));
    format!("{percent} %")
}

/// Seconds for people.
pub(super) fn duration(seconds: f64) -> String {
    if seconds < 60.0 {
        format!("{seconds:.0} s")
    } else if seconds < 3600.0 {
        format!("{:.0} min", (seconds / 60.0).floor())
    } else {
        format!("{:.0} h {:.0} min", (seconds / 3600.0).floor(), (seconds % 3600.0 / 60.0).floor())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_as_exact_as_people_need() {
        assert_eq!(duration(0.4), "0 s");
        assert_eq!(duration(59.0), "59 s");
        assert_eq!(duration(119.0), "1 min");
        assert_eq!(duration(7290.0), "2 h 1 min");
    }

    #[test]
    fn a_percentage_is_not_rounded_up() {
        assert_eq!(percent(999, 1000), "99 %");
        assert_eq!(percent(0, 0), "0 %");
        assert_eq!(percent(u64::MAX, u64::MAX), "100 %");
    }
}
