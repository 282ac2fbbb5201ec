//! `sllm-store evict`.

use serde::Serialize;

use super::EvictArgs;
use crate::output::{Answer, Fault, Session};
use crate::size::human;

#[derive(Serialize)]
struct Evicted {
    bytes: u64,
}

pub(super) fn run(args: &EvictArgs, session: &Session) -> Result<Answer, Fault> {
    let client = args.server.connect()?;
    let bytes = match &args.model {
        Some(model) => client.evict(model)?,
        None => client.evict_all()?,
    };
    Ok(session.answer(&Evicted { bytes }, || format!("{} evicted\n", human(bytes)))?)
}
