//! `kernels bench --serve`: our side of a comparison. Another program hands in inputs, asks for runs and takes the results
//! away; it holds the clock and the reference, so that nobody times or judges itself. One JSON request per line on standard
//! input, one answer per line on standard output; `benches/peers/cpu/contestant.py` asks, `benches/peers` has other sides.

use std::io::BufRead;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Deserialize;

use super::bench::problem;
use super::measure::{self, Slot, slot};
use super::whole::{Side, Whole};
use crate::cli::say;
use crate::device::Device;
use crate::dispatch;
use crate::error::{Error, Result};
use crate::kernel::Kernel;
use crate::op::Case;
use crate::ops::large::Large;
use crate::tensor::Tensor;

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
        #[serde(default)]
        peer: String,
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

/// The last kernel that fits, in place of the one that dispatch takes.
const NAIVE: &str = "naive rung";

/// What names a case in `--list`; its other fields are for those who have no table.
#[derive(Deserialize)]
struct Name {
    op: String,
    params: String,
}

/// An op's kernel on a set of memory.
struct OneOp<'a> {
    case: &'a Case,
    kernel: &'static Kernel,
    slot: Slot,
}

impl Side for OneOp<'_> {
    fn fill(&mut self, inputs: &[Vec<u8>]) -> Result<()> {
        self.slot.refill(inputs)
    }

    fn run(&mut self) -> Result<()> {
        self.slot.run(self.kernel, self.case)
    }

    fn read(&self) -> Result<Vec<Vec<u8>>> {
        self.slot.outputs.iter().map(Tensor::to_bytes).collect()
    }
}

/// What is open, in each set of memory.
type Sides<'a> = Vec<Box<dyn Side + 'a>>;

/// What a request may name.
#[derive(Clone, Copy)]
enum Found<'a> {
    Op(&'a Case),
    Whole(&'a Whole),
}

pub fn run(device: &Arc<dyn Device>, cases: &[Large], wholes: &[Whole]) -> Result<()> {
    let mut open = Sides::new();
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|e| Error::io("standard input", e))?;
        let request = serde_json::from_str(&line).map_err(|e| Error::file("standard input", e.column(), &e))?;
        // What cannot be done is said; the next request may be another matter.
        let answer = answer(device, (cases, wholes), &mut open, request);
        say(answer.unwrap_or_else(|e| serde_json::json!({ "error": e.to_string() })));
    }
    Ok(())
}

fn find<'a>((cases, wholes): (&'a [Large], &'a [Whole]), name: &Name) -> Result<Found<'a>> {
    let case = cases.iter().map(|large| &large.case).find(|c| c.op.name() == name.op && c.label() == name.params);
    let whole = || wholes.iter().find(|w| w.op == name.op && w.params == name.params);
    case.map(Found::Op).or_else(|| whole().map(Found::Whole)).ok_or_else(|| {
        let rule = "a case of `kernels bench --list`".into();
        Error::Usage { argument: "case", value: format!("{} {}", name.op, name.params), rule }
    })
}

/// Inputs of a case as bytes.
fn drawn(found: Found, seed: u64) -> Vec<Vec<u8>> {
    match found {
        Found::Op(case) => measure::inputs(case, seed),
        Found::Whole(whole) => {
            let bytes = |(i, (_, input)): (usize, &(_, _))| measure::encoded(input, seed, i);
            whole.inputs.iter().enumerate().map(bytes).collect()
        }
    }
}

fn read(paths: &[PathBuf]) -> Result<Vec<Vec<u8>>> {
    paths.iter().map(|path| std::fs::read(path).map_err(|e| Error::io(path, e))).collect()
}

fn write(path: &PathBuf, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).map_err(|e| Error::io(path, e))
}

fn answer<'a>(
    device: &Arc<dyn Device>,
    cases: (&'a [Large], &'a [Whole]),
    open: &mut Sides<'a>,
    request: Request,
) -> Result<serde_json::Value> {
    let done = serde_json::json!({ "ok": true });
    match request {
        Request::Hello => {
            let (program, info) = (env!("CARGO_PKG_VERSION"), device.info());
            return Ok(serde_json::json!({
                "ok": true, "name": "espalier", "version": program, "device": info.name, "driver": info.driver,
                "software": info.software
            }));
        }
        Request::Draw { case, seed, inputs } => {
            for (path, bytes) in inputs.iter().zip(drawn(find(cases, &case)?, seed)) {
                write(path, &bytes)?;
            }
        }
        Request::Open { case, peer, slots } => {
            // Before anything new is taken.
            open.clear();
            let (kernel, outputs) = match find(cases, &case)? {
                Found::Op(case) => {
                    let inputs = case.metas();
                    let outputs = case.op.infer(&inputs)?;
                    let kernels = dispatch::candidates(&problem(case, &inputs, &outputs, device));
                    let found = if peer == NAIVE { kernels.last() } else { kernels.first() };
                    let Some(kernel) = found.copied() else {
                        return Ok(serde_json::json!({ "skip": "no kernel fits" }));
                    };
                    let zeros: Vec<Vec<u8>> = inputs.iter().map(|meta| vec![0; meta.bytes()]).collect();
                    for _ in 0..slots {
                        open.push(Box::new(OneOp { case, kernel, slot: slot(case, device, &zeros)? }));
                    }
                    (kernel.name, outputs.len())
                }
                Found::Whole(whole) => {
                    open.extend((0..slots).map(|_| whole.side(device)));
                    (whole.op, whole.outputs.len())
                }
            };
            let written: Vec<usize> = (0..outputs).collect();
            return Ok(serde_json::json!({ "ok": true, "kernel": kernel, "outputs": written }));
        }
        Request::Fill { slot, inputs } => {
            at(open, slot)?.fill(&read(&inputs)?)?;
            // Nothing of it is left to a run.
            device.sync()?;
        }
        Request::Run { first, runs } => {
            at(open, first)?;
            let slots = open.len();
            for turn in first..first + runs {
                open[turn % slots].run()?;
            }
            device.sync()?;
        }
        Request::Read { slot, outputs } => {
            for (path, bytes) in outputs.iter().zip(at(open, slot)?.read()?) {
                write(path, &bytes)?;
            }
        }
        Request::Close => open.clear(),
    }
    Ok(done)
}

/// One of the sets of memory of what is open.
fn at<'a, 'b>(open: &'b mut Sides<'a>, index: usize) -> Result<&'b mut Box<dyn Side + 'a>> {
    open.get_mut(index).ok_or_else(|| {
        let rule = "an open case and one of its slots".into();
        Error::Usage { argument: "slot", value: index.to_string(), rule }
    })
}
