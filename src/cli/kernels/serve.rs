//! `kernels bench --serve`: our side of a comparison. Another program hands in inputs, asks for runs and takes the results
//! away; it holds the clock and the reference, so that nobody times or judges itself. One JSON request per line on standard
//! input, one answer per line on standard output; `benches/peers/cpu/contestant.py` asks, `benches/peers` has other sides.

use std::io::BufRead;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;

use super::bench::problem;
use super::measure::{self, Slot, slot};
use crate::cli::say;
use crate::device::Device;
use crate::dispatch;
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::op::Case;
use crate::ops::large::Large;

#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
enum Request {
    Hello,
    /// Fresh inputs of a case, drawn by its own distributions, into files.
    Draw {
        case: Name,
        seed: u64,
        inputs: Vec<PathBuf>,
    },
    /// The case of all that follows, in that many sets of memory.
    Open {
        case: Name,
        slots: usize,
    },
    /// Other inputs in the same memory, and poison in the outputs.
    Fill {
        slot: usize,
        inputs: Vec<PathBuf>,
    },
    /// Runs in that many slots in turn, waited for.
    Run {
        first: usize,
        runs: usize,
    },
    Read {
        slot: usize,
        outputs: Vec<PathBuf>,
    },
    Close,
}

/// What names a case in `--list`; its other fields are for those who have no table.
#[derive(Deserialize)]
struct Name {
    op: String,
    params: String,
}

struct Open<'a> {
    case: &'a Case,
    kernel: &'static Kernel,
    slots: Vec<Slot>,
}

pub fn run(device: &Arc<dyn Device>, cases: &[Large]) -> Result<()> {
    let mut open = None;
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|e| Error::io("standard input", e))?;
        let request = serde_json::from_str(&line).map_err(|e| Error::file("standard input", e.column(), &e))?;
        // What cannot be done is said; the next request may be another matter.
        let answer = answer(device, cases, &mut open, request);
        say(answer.unwrap_or_else(|e| serde_json::json!({ "error": e.to_string() })));
    }
    Ok(())
}

fn find<'a>(cases: &'a [Large], name: &Name) -> Result<&'a Case> {
    let wanted = cases.iter().map(|large| &large.case).find(|c| c.op.name() == name.op && c.label() == name.params);
    wanted.ok_or_else(|| {
        let rule = "a case of `kernels bench --list`".into();
        Error::Usage { argument: "case", value: format!("{} {}", name.op, name.params), rule }
    })
}

fn read(paths: &[PathBuf]) -> Result<Vec<Vec<u8>>> {
    paths.iter().map(|path| std::fs::read(path).map_err(|e| Error::io(path, e))).collect()
}

fn write(path: &PathBuf, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).map_err(|e| Error::io(path, e))
}

fn answer<'a>(
    device: &Arc<dyn Device>,
    cases: &'a [Large],
    open: &mut Option<Open<'a>>,
    request: Request,
) -> Result<serde_json::Value> {
    let done = serde_json::json!({ "ok": true });
    match request {
        Request::Hello => {
            let (program, info) = (env!("CARGO_PKG_VERSION"), device.info());
            return Ok(serde_json::json!({
                "ok": true, "name": "espalier", "version": program, "device": info.name, "software": info.software
            }));
        }
        Request::Draw { case, seed, inputs } => {
            for (path, bytes) in inputs.iter().zip(measure::inputs(find(cases, &case)?, seed)) {
                write(path, &bytes)?;
            }
        }
        Request::Open { case, slots } => {
            // Before anything new is taken.
            *open = None;
            let case = find(cases, &case)?;
            let inputs = case.metas();
            let outputs = case.op.infer(&inputs)?;
            let Some(kernel) = dispatch::candidates(&problem(case, &inputs, &outputs, device)).first().copied() else {
                return Ok(serde_json::json!({ "skip": "no kernel fits" }));
            };
            let zeros: Vec<Vec<u8>> = inputs.iter().map(|meta| vec![0; meta.bytes()]).collect();
            let slots = (0..slots).map(|_| slot(case, device, &zeros)).collect::<Result<_>>()?;
            *open = Some(Open { case, kernel, slots });
            let written: Vec<usize> = (0..outputs.len()).collect();
            return Ok(serde_json::json!({ "ok": true, "kernel": kernel.name, "outputs": written }));
        }
        Request::Fill { slot, inputs } => at(open, slot)?.1.refill(&read(&inputs)?)?,
        Request::Run { first, runs } => {
            let (Open { case, kernel, slots }, _) = at(open, first)?;
            for turn in first..first + runs {
                slots[turn % slots.len()].run(kernel, case)?;
            }
            device.sync()?;
        }
        Request::Read { slot, outputs } => {
            for (path, tensor) in outputs.iter().zip(&at(open, slot)?.1.outputs) {
                write(path, &tensor.to_bytes()?)?;
            }
        }
        Request::Close => *open = None,
    }
    Ok(done)
}

/// What is open, and one of its slots.
fn at<'a, 'b>(open: &'b Option<Open<'a>>, index: usize) -> Result<(&'b Open<'a>, &'b Slot)> {
    let found = open.as_ref().and_then(|o| Some((o, o.slots.get(index)?)));
    found.ok_or_else(|| {
        let rule = "an open case and one of its slots".into();
        Error::Usage { argument: "slot", value: index.to_string(), rule }
    })
}
