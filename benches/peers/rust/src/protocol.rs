//! One side of a comparison: it is handed inputs, runs when asked and hands back results; the asking program
//! (`benches/peers/cpu`) holds the clock and the reference. One JSON request per line on standard input, one answer per line
//! on standard output.

use std::io::{BufRead, Write};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Who can be asked.
#[derive(Serialize)]
pub struct Peer {
    pub name: &'static str,
    pub version: &'static str,
    /// Where it runs, if not on the processor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter: Option<String>,
}

impl Peer {
    pub const fn cpu(name: &'static str, version: &'static str) -> Self {
        Self { name, version, adapter: None }
    }
}

#[derive(Clone, Deserialize)]
pub struct Tensor {
    /// Of a model's weights.
    #[serde(default)]
    pub name: String,
    pub dims: Vec<usize>,
    pub dtype: String,
}

/// A case as `espalier kernels bench --list --format json` prints it.
#[derive(Clone, Deserialize)]
pub struct Case {
    pub op: String,
    pub params: String,
    pub inputs: Vec<Tensor>,
}

#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
enum Request {
    Hello,
    Open { case: Case, peer: String, slots: usize },
    Fill { slot: usize, inputs: Vec<String> },
    Run { first: usize, runs: usize },
    Read { slot: usize, outputs: Vec<String> },
    Close,
}

/// A library at work on one case, with inputs and outputs of its own for each slot.
pub trait Work {
    /// Takes other inputs, and poisons the outputs or has none left. In the memory of the old ones where the library can write
    /// into a tensor that is there; elsewhere, and for a model that is trained, tensors are new.
    fn fill(&mut self, slot: usize, inputs: Vec<Vec<u8>>);
    fn run(&mut self, slot: usize);
    fn read(&self, slot: usize) -> Vec<Vec<u8>>;
    /// What ran, for the record: a kernel's name.
    fn kernel(&self) -> String;
    /// Which of the case's outputs, in which order, come out.
    fn outputs(&self) -> Vec<usize> {
        vec![0]
    }
    /// By what the results are judged, where they are not the op's own: the product of integers without scales.
    fn computes(&self) -> Option<&'static str> {
        None
    }
}

/// `None` where the library has nothing for the case.
pub type Open = fn(peer: &str, case: &Case, slots: usize) -> Option<Box<dyn Work>>;

pub fn serve(peers: &[Peer], open: Open) {
    let (mut work, mut count): (Option<Box<dyn Work>>, usize) = (None, 1);
    for line in std::io::stdin().lock().lines() {
        let Ok(line) = line else { break };
        let answer = match serde_json::from_str(&line) {
            Ok(Request::Hello) => json!({"ok": true, "peers": peers, "software": false}),
            Ok(Request::Open { case, peer, slots }) => {
                // Before anything new is taken.
                drop(work.take());
                (work, count) = (open(&peer, &case, slots), slots);
                match &work {
                    None => json!({"skip": "the library has nothing for it"}),
                    Some(w) => {
                        json!({"ok": true, "kernel": w.kernel(), "outputs": w.outputs(), "computes": w.computes()})
                    }
                }
            }
            Ok(Request::Close) => {
                work = None;
                json!({"ok": true})
            }
            Ok(request) => match &mut work {
                Some(work) => handle(work.as_mut(), request, count),
                None => json!({"error": "no case is open"}),
            },
            Err(e) => json!({"error": e.to_string()}),
        };
        let mut stdout = std::io::stdout().lock();
        if writeln!(stdout, "{answer}").and_then(|()| stdout.flush()).is_err() {
            break;
        }
    }
}

fn handle(work: &mut dyn Work, request: Request, count: usize) -> Value {
    match request {
        Request::Fill { slot, inputs } => {
            let read: Result<Vec<Vec<u8>>, _> = inputs.iter().map(std::fs::read).collect();
            match read {
                Ok(inputs) => work.fill(slot, inputs),
                Err(e) => return json!({"error": e.to_string()}),
            }
        }
        Request::Run { first, runs } => (first..first + runs).for_each(|turn| work.run(turn % count)),
        Request::Read { slot, outputs } => {
            for (path, bytes) in outputs.iter().zip(work.read(slot)) {
                if let Err(e) = std::fs::write(path, bytes) {
                    return json!({"error": e.to_string()});
                }
            }
        }
        Request::Hello | Request::Open { .. } | Request::Close => {}
    }
    json!({"ok": true})
}

/// Little-endian elements, in memory that is kept.
#[allow(dead_code, reason = "some libraries read bytes")]
pub fn floats(target: &mut [f32], bytes: &[u8]) {
    for (x, b) in target.iter_mut().zip(bytes.chunks_exact(4)) {
        *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    }
}

pub fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}
