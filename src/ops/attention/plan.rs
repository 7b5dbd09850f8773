//! WGSL records: which entries run, over which range of keys, with which argument in which slot.

use super::{Attention, AttentionBackward, Extents};
use crate::dtype::DType;
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem};

pub(super) const SHADER: &str = include_str!("../../../shaders/attention.wgsl");

pub(super) const FORWARD: Kernel = Kernel { fits: fits_forward, plan: forward, ..wgsl("attention_fwd") };
pub(super) const BACKWARD: Kernel = Kernel { fits: fits_backward, plan: backward, ..wgsl("attention_bwd_rows") };

const BLOCK: u32 = 64;
/// Keys (or queries) that a kernel takes per iteration of its outer loop.
const STEP: usize = 4;
/// Rows live in private arrays of this length.
const MAX_DIM: usize = 128;

const fn wgsl(entry: &'static str) -> Kernel {
    let code = Code::Wgsl { file: "attention.wgsl", text: SHADER, entry, constants: &[] };
    Kernel { name: entry, code, dtypes: DType::FLOATS, fits: crate::kernel::always, plan: Plan::once }
}

fn extents(p: &Problem) -> Option<Extents> {
    Extents::of(p.inputs.first()?, p.inputs.get(1)?)
}

/// Every tensor but the bias must fit one binding; so must the state of a split launch.
fn fits_forward(p: &Problem) -> bool {
    let Some(e) = extents(p) else { return false };
    let state = if splits(p, e.keys, |keys| forward_trips(&e, keys)).len() > 1 { state_bytes(&e) } else { 0 };
    let largest = p.inputs.iter().chain(p.outputs).map(|m| m.bytes()).max().unwrap_or(0).max(state);
    e.dim <= MAX_DIM && largest as u64 <= p.info.limits.binding_bytes
}

fn state_bytes(e: &Extents) -> usize {
    e.batch * e.heads * e.queries * (e.dim + 2) * 4
}

/// Loop iterations of one invocation over `keys` keys: two loops over D in steps of 4 with a tail of up to 3 per block
/// of keys, and the loops that load and store a row.
fn forward_trips(e: &Extents, keys: usize) -> usize {
    keys.div_ceil(STEP) * (1 + 2 * (e.dim / 4 + e.dim % 4)) + 3 * e.dim
}

/// Ranges of `0..extent`, equal but for the last, whose `trips` stay within the device's budget.
fn splits(p: &Problem, extent: usize, trips: impl Fn(usize) -> usize) -> Vec<(usize, usize)> {
    let fits = |part: usize| p.info.limits.loop_budget.is_none_or(|budget| trips(part) as u64 <= budget);
    let mut parts = 1;
    let mut part = extent;
    while part > STEP && !fits(part) {
        parts += 1;
        part = extent.div_ceil(parts).next_multiple_of(STEP);
    }
    (0..extent).step_by(part.max(1)).map(|first| (first, extent.min(first + part))).collect()
}

/// The op's parameter block and the range of one launch.
fn range(p: &Problem, (first, last): (usize, usize)) -> Params {
    p.params().u(first).u(last)
}

/// Context, lengths and bias, with q standing in for what is absent: it is read-only and never read as such.
fn optional(op: &Attention) -> [usize; 3] {
    op.optional().map(|position| position.unwrap_or(0))
}

fn forward(p: &Problem) -> Plan {
    let (Some(e), Some(op)) = (extents(p), p.op::<Attention>()) else { return Plan::default() };
    let rows = e.batch * e.heads * e.queries;
    let [context, lengths, bias] = optional(op);
    let (y, lse, state) = (op.inputs(), op.inputs() + 1, op.inputs() + 2);
    let parts = splits(p, e.keys, |keys| forward_trips(&e, keys));
    if let [whole] = parts[..] {
        let launch = Launch::linear(rows, BLOCK, range(p, whole)).trips(forward_trips(&e, e.keys));
        return Plan::of(launch.slots(&[0, 1, 2, context, lengths, bias, y, lse]));
    }
    let part = |&(first, last): &(usize, usize)| {
        let launch = Launch::linear(rows, BLOCK, range(p, (first, last))).entry("attention_fwd_part");
        launch.trips(forward_trips(&e, last - first)).slots(&[0, 1, 2, context, lengths, bias, state])
    };
    let mut launches: Vec<Launch> = parts.iter().map(part).collect();
    let finish = Launch::linear(rows, BLOCK, range(p, (0, e.keys))).entry("attention_fwd_finish");
    launches.push(finish.trips(e.dim).slots(&[state, y, lse]));
    Plan::sequence(launches).scratch(state_bytes(&e))
}

fn fits_backward(_: &Problem) -> bool {
    false
}

fn backward(p: &Problem) -> Plan {
    let _ = p.op::<AttentionBackward>();
    Plan::default()
}
