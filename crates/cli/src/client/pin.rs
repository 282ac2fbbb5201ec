//! `sllm-store pin` and `sllm-store unpin`.

use super::PinArgs;
use crate::output::{Answer, Fault, Session, printable};
use crate::size::human;

pub(super) fn run(args: &PinArgs, pin: bool, session: &Session) -> Result<Answer, Fault> {
    let client = args.server.connect()?;
    let model = if pin { client.pin(&args.model)? } else { client.unpin(&args.model)? };
    let text = || {
        let state = if model.pinned { "pinned" } else { "not pinned" };
        let (name, resident, len) = (printable(&model.name), human(model.resident), human(model.len));
        format!("{name}: {state}, {resident} of {len} in the server's memory\n")
    };
    Ok(session.answer(&model, text)?)
}
