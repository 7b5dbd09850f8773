//! WGSL records: which entries run, over which range of keys, with which argument in which slot.

use super::{Attention, AttentionBackward, Extents};
use crate::device::Class;
use crate::dtype::DType;
use crate::kernel::{Code, Kernel, Launch, MAX_GROUPS, Params, Plan, Problem, Source, source, wgsl_source};

pub(super) const SOURCE: Source = source!("attention");

pub(super) const FORWARD: Kernel = Kernel { fits: fits_forward, plan: forward, ..wgsl("attention_fwd") };
pub(super) const BACKWARD: Kernel = Kernel { fits: fits_backward, plan: backward, ..wgsl("attention_bwd_rows") };

/// Products of matrices around a softmax, two forward and five backward, in a file of their own: they need subgroups.
pub(super) const LANES: Kernel =
    Kernel { name: "attention_fwd_lanes", fits: fits_lanes, plan: lanes, ..on_lanes("attention_rows") };
pub(super) const BACKWARD_LANES: Kernel = Kernel {
    name: "attention_bwd_lanes",
    fits: fits_backward_lanes,
    plan: backward_lanes,
    ..on_lanes("attention_slopes")
};

const fn on_lanes(entry: &'static str) -> Kernel {
    let source = wgsl_source!("attention_lanes");
    let code = Code::Wgsl { source, entry, constants: &[] };
    Kernel { name: entry, code, dtypes: DType::FLOATS, fits: crate::kernel::always, plan: Plan::once }
}

const BLOCK: u32 = 64;
/// Lanes of the subgroups that the products are written for, and rows and columns of a tile of theirs.
const SUBGROUP: u32 = 8;
const TILE: usize = 32;
/// Keys (or queries) that a kernel takes per iteration of its outer loop.
const STEP: usize = 4;
/// Rows live in private arrays of this length.
const MAX_DIM: usize = 128;

const fn wgsl(entry: &'static str) -> Kernel {
    let code = Code::Gpu { source: SOURCE, entry, constants: &[] };
    Kernel { name: entry, code, dtypes: DType::FLOATS, fits: crate::kernel::always, plan: Plan::once }
}

pub(super) fn extents(p: &Problem) -> Option<Extents> {
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

/// Loop iterations of one invocation over `keys` keys: two passes over D per block of keys, and the loops that load and
/// store a row.
fn forward_trips(e: &Extents, keys: usize) -> usize {
    keys.div_ceil(STEP) * (1 + 2 * pass(e)) + row(e)
}

/// One pass over D in steps of 4 with a tail. A software driver also counts the pass in which a loop finds its end, so
/// a loop of n iterations counts n + 1.
fn pass(e: &Extents) -> usize {
    (e.dim / 4 + 1) + (e.dim % 4 + 1)
}

/// The loops that load and store the rows of an invocation, and the ends of the outer loops.
fn row(e: &Extents) -> usize {
    4 * (e.dim + 1)
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
pub(super) fn optional(op: &Attention) -> [usize; 3] {
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

/// Rows by fours, and scores of all pairs in one binding. Few queries leave most of a tile empty.
fn fits_lanes(p: &Problem) -> bool {
    let Some(e) = extents(p) else { return false };
    let largest = p.inputs.iter().chain(p.outputs).map(|m| m.bytes()).max().unwrap_or(0).max(scores_bytes(&e));
    let fours = e.dim.is_multiple_of(4) && e.keys.is_multiple_of(4) && e.dim > 0 && e.keys > 0;
    let trips = p.info.limits.loop_budget.is_none_or(|budget| lanes_trips(&e) as u64 <= budget);
    let groups =
        e.batch * e.heads <= MAX_GROUPS as usize && e.queries.max(e.keys).div_ceil(TILE) <= MAX_GROUPS as usize;
    let software = p.info.class == Class::Cpu && p.info.features.subgroup_size == SUBGROUP;
    software && fours && trips && groups && e.queries > TILE / 2 && largest as u64 <= p.info.limits.binding_bytes
}

fn scores_bytes(e: &Extents) -> usize {
    e.batch * e.heads * e.queries * e.keys * 4
}

/// Passes over a row of scores and over one of values; products take four steps at once.
fn lanes_trips(e: &Extents) -> usize {
    e.keys + e.dim + 40
}

/// A product over queries, and the search for the first tile of them that sees a key.
fn key_trips(e: &Extents) -> usize {
    e.queries + 40
}

/// One launch over tiles of `rows` by `columns` of every head.
fn tiles(e: &Extents, rows: usize, columns: usize, params: Params) -> Launch {
    let groups = [columns.div_ceil(TILE), rows.div_ceil(TILE), e.batch * e.heads].map(|n| n as u32);
    Launch::new(groups, params).trips(lanes_trips(e))
}

fn lanes(p: &Problem) -> Plan {
    let (Some(e), Some(op)) = (extents(p), p.op::<Attention>()) else { return Plan::default() };
    let (y, lse, scores) = (op.inputs(), op.inputs() + 1, op.inputs() + 2);
    let [context, lengths, bias] = optional(op);
    let rows = Launch::linear(e.batch * e.heads * e.queries, SUBGROUP, p.params()).trips(lanes_trips(&e));
    let product = |columns: usize| tiles(&e, e.queries, columns, p.params());
    Plan::sequence(vec![
        product(e.keys).entry("attention_scores").slots(&[0, 1, scores, context, lengths]),
        rows.slots(&[scores, lse, bias, context, lengths]),
        product(e.dim).entry("attention_values").slots(&[scores, 2, y, context, lengths]),
    ])
    .scratch(scores_bytes(&e))
}

/// Where the forward has such a rung, and no bias wants a gradient.
fn fits_backward_lanes(p: &Problem) -> bool {
    let within = |e: Extents| p.info.limits.loop_budget.is_none_or(|budget| key_trips(&e) as u64 <= budget);
    fits_lanes(p) && extents(p).is_some_and(within) && p.op::<AttentionBackward>().is_some_and(|op| !op.0.bias)
}

fn backward_lanes(p: &Problem) -> Plan {
    let (Some(e), Some(op)) = (extents(p), p.op::<AttentionBackward>()) else { return Plan::default() };
    let n = op.0.inputs();
    let [context, lengths, _] = optional(&op.0);
    let (y, lse, dy, dq, dk, dv, weights, slopes) = (n, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6, n + 7);
    let product = |entry, rows: usize, columns: usize, slots: [usize; 3]| {
        let [a, b, c] = slots;
        tiles(&e, rows, columns, p.params()).entry(entry).slots(&[a, b, c, context, lengths])
    };
    // dy vᵀ is as it is; the scale comes with the slopes.
    let plain = Attention { scale: 1.0, ..op.0 }.params(&p.inputs[0], &p.inputs[1]);
    let rows = Launch::linear(e.batch * e.heads * e.queries, SUBGROUP, p.params()).trips(lanes_trips(&e));
    Plan::sequence(vec![
        product("attention_scores", e.queries, e.keys, [0, 1, weights]),
        tiles(&e, e.queries, e.keys, plain).entry("attention_scores").slots(&[dy, 2, slopes, context, lengths]),
        rows.slots(&[y, dy, lse, context, lengths, weights, slopes]),
        product("attention_values", e.queries, e.dim, [slopes, 1, dq]),
        product("attention_keys", e.keys, e.dim, [slopes, 0, dk]).trips(key_trips(&e)),
        product("attention_keys", e.keys, e.dim, [weights, dy, dv]).trips(key_trips(&e)),
    ])
    .scratch(scores_bytes(&e))
    .scratch(scores_bytes(&e))
}

/// Iterations of one invocation of `bwd_q` (or `bwd_kv`, with queries for keys): two passes over D in steps of 2.
fn backward_trips(e: &Extents, extent: usize) -> usize {
    extent.div_ceil(STEP) * (1 + 2 * (e.dim / 2 + 1)) + row(e)
}

/// Ranges of keys for dq and of queries for dk and dv, and the bytes of the sums that splitting them needs.
struct Split {
    keys: Vec<(usize, usize)>,
    queries: Vec<(usize, usize)>,
    bytes: usize,
}

impl Split {
    fn of(p: &Problem, e: &Extents) -> Self {
        let keys = splits(p, e.keys, |n| backward_trips(e, n));
        let queries = splits(p, e.queries, |n| backward_trips(e, n));
        let row = e.batch * e.heads * e.dim * 4;
        let for_query = if keys.len() > 1 { e.queries * row } else { 0 };
        let for_key = if queries.len() > 1 { 2 * e.keys * row } else { 0 };
        Self { keys, queries, bytes: for_query.max(for_key) }
    }
}

fn stats_bytes(e: &Extents) -> usize {
    e.batch * e.heads * e.queries * 3 * 4
}

/// A count of visible keys is kept as f32.
const MAX_KEYS: usize = 1 << 24;

fn fits_backward(p: &Problem) -> bool {
    let Some(e) = extents(p) else { return false };
    let scratch = stats_bytes(&e).max(Split::of(p, &e).bytes);
    let largest = p.inputs.iter().chain(p.outputs).map(|m| m.bytes()).max().unwrap_or(0).max(scratch);
    let bias = p.info.limits.loop_budget.is_none_or(|budget| bias_trips(&e) as u64 <= budget);
    e.dim <= MAX_DIM && e.keys < MAX_KEYS && bias && largest as u64 <= p.info.limits.binding_bytes
}

fn bias_trips(e: &Extents) -> usize {
    e.batch * (e.dim + 2) + 1
}

fn backward(p: &Problem) -> Plan {
    let (Some(e), Some(op)) = (extents(p), p.op::<AttentionBackward>()) else { return Plan::default() };
    let n = op.0.inputs();
    let [context, lengths, bias] = optional(&op.0);
    let (y, lse, dy, dq, dk, dv, dbias) = (n, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6);
    let stats = dbias + usize::from(op.0.bias);
    let sums = stats + 1;
    let (query_rows, key_rows) = (e.batch * e.heads * e.queries, e.batch * e.heads * e.keys);
    let split = Split::of(p, &e);
    let whole = |rows: usize, extent: usize| Launch::linear(rows, BLOCK, range(p, (0, extent)));
    let mut launches = vec![whole(query_rows, 0).trips(e.dim + 1).slots(&[y, dy, lse, context, lengths, stats])];
    let store = |target: usize, (first, count): (usize, usize)| {
        let launch = Launch::linear(count, BLOCK, range(p, (first, first + count))).entry("attention_bwd_store");
        launch.slots(&[sums, target])
    };
    if split.keys.len() > 1 {
        launches.extend(split.keys.iter().map(|&(first, last)| {
            let launch = Launch::linear(query_rows, BLOCK, range(p, (first, last))).entry("attention_bwd_q_part");
            launch.trips(backward_trips(&e, last - first)).slots(&[0, 1, 2, bias, dy, stats, sums])
        }));
        launches.push(store(dq, (0, query_rows * e.dim)));
    } else {
        let launch = whole(query_rows, e.keys).entry("attention_bwd_q").trips(backward_trips(&e, e.keys));
        launches.push(launch.slots(&[0, 1, 2, bias, dy, stats, dq]));
    }
    if split.queries.len() > 1 {
        launches.extend(split.queries.iter().map(|&(first, last)| {
            let launch = Launch::linear(key_rows, BLOCK, range(p, (first, last))).entry("attention_bwd_kv_part");
            launch.trips(backward_trips(&e, last - first)).slots(&[0, 1, 2, bias, dy, stats, sums])
        }));
        launches.push(store(dk, (0, key_rows * e.dim)));
        launches.push(store(dv, (key_rows * e.dim, key_rows * e.dim)));
    } else {
        let launch = whole(key_rows, e.queries).entry("attention_bwd_kv").trips(backward_trips(&e, e.queries));
        launches.push(launch.slots(&[0, 1, 2, bias, dy, stats, dk, dv]));
    }
    if op.0.bias {
        let launch = whole(e.heads * e.queries * e.keys, 0).entry("attention_bwd_bias").trips(bias_trips(&e));
        launches.push(launch.slots(&[0, 1, 2, bias, dy, stats, dbias]));
    }
    let plan = Plan::sequence(launches).scratch(stats_bytes(&e));
    if split.bytes > 0 { plan.scratch(split.bytes) } else { plan }
}
