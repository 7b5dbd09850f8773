//! CUDA records on tensor instructions of compute capability 8.0: tiles of rows, one record for each head dimension that
//! registers are laid out for.

use super::plan::{extents, optional};
use super::{Attention, AttentionBackward, Extents};
use crate::dtype::DType;
use crate::kernel::{Code, Constants, Kernel, Launch, Plan, Problem, Source, cuda_source};

const FORWARD: Source = cuda_source!("attention_mma");
const BACKWARD: Source = cuda_source!("attention_bwd_mma");

/// Rows of queries in a forward block, of queries or keys in a backward block, of the statistics' block.
const ROWS: usize = 128;
const BACK: usize = 64;
const STATISTICS: usize = 16;

/// `HEAD` of the kernel files.
const fn constants(head: usize) -> Constants {
    match head {
        32 => &[("HEAD", 32.0)],
        64 => &[("HEAD", 64.0)],
        96 => &[("HEAD", 96.0)],
        _ => &[("HEAD", 128.0)],
    }
}

const fn record(
    name: &'static str,
    source: Source,
    entry: &'static str,
    head: usize,
    fits: fn(&Problem) -> bool,
    plan: fn(&Problem) -> Plan,
) -> Kernel {
    let code = Code::Cuda { source, entry, constants: constants(head), arch: 80, tensor: &["mma.sync"] };
    Kernel { name, code, dtypes: &[DType::F16, DType::Bf16], fits, plan }
}

pub(super) const fn forward<const HEAD: usize>() -> Kernel {
    record("attention_fwd_mma", FORWARD, "attention_fwd_mma", HEAD, fits_forward::<HEAD>, plan_forward::<HEAD>)
}

pub(super) const fn backward<const HEAD: usize>() -> Kernel {
    record("attention_bwd_mma", BACKWARD, "attention_bwd_kv_mma", HEAD, fits_backward::<HEAD>, plan_backward::<HEAD>)
}

/// Copies of 16 bytes need rows that start at multiples of eight elements; the next smaller record takes smaller heads.
/// Where a row sees few keys in many heads, tiles are mostly empty, and still far ahead of one thread a row.
fn fits(p: &Problem, head: usize, shared: usize) -> bool {
    extents(p).is_some_and(|e| e.dim.is_multiple_of(8) && e.dim <= head && e.dim + 32 > head)
        && shared as u64 <= u64::from(p.info.limits.workgroup_bytes)
}

fn fits_forward<const HEAD: usize>(p: &Problem) -> bool {
    fits(p, HEAD, forward_shared(HEAD))
}

fn fits_backward<const HEAD: usize>(p: &Problem) -> bool {
    fits(p, HEAD, stream_shared(HEAD).max(bias_shared(HEAD)))
}

/// Bytes of `rows` rows in shared memory.
const fn rows(rows: usize, head: usize) -> usize {
    rows * (head + 8) * 2
}

/// Queries, then keys and values of one step.
const fn forward_shared(head: usize) -> usize {
    rows(ROWS + 2 * if head <= 96 { 64 } else { 32 }, head)
}

/// Two tiles that stay, two stages of two that stream past, and the statistics of those.
const fn stream_shared(head: usize) -> usize {
    let step = if head <= 64 { 64 } else { 32 };
    rows(2 * BACK + 4 * step, head) + 4 * step * 4
}

pub(super) const fn bias_shared(head: usize) -> usize {
    rows(4 * BACK, head)
}

fn plan_forward<const HEAD: usize>(p: &Problem) -> Plan {
    let (Some(e), Some(op)) = (extents(p), p.op::<Attention>()) else { return Plan::default() };
    let [context, lengths, bias] = optional(op);
    let (y, lse) = (op.inputs(), op.inputs() + 1);
    let blocks = e.batch * e.heads * e.queries.div_ceil(ROWS);
    let launch = Launch::linear(blocks, 1, p.params()).shared(forward_shared(HEAD));
    Plan::of(launch.slots(&[0, 1, 2, context, lengths, bias, y, lse]))
}

/// Rows of statistics: queries to whole tiles, so that a tile is one aligned copy.
pub(super) fn padded_rows(e: &Extents) -> usize {
    e.batch * e.heads * e.queries.next_multiple_of(BACK)
}

/// Blocks of the statistics' entry.
pub(super) fn statistics_blocks(e: &Extents) -> usize {
    padded_rows(e) / STATISTICS
}

fn plan_backward<const HEAD: usize>(p: &Problem) -> Plan {
    let (Some(e), Some(op)) = (extents(p), p.op::<AttentionBackward>()) else { return Plan::default() };
    let n = op.0.inputs();
    let [context, lengths, bias] = optional(&op.0);
    let (y, lse, dy, dq, dk, dv, dbias) = (n, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6);
    let stats = dbias + usize::from(op.0.bias);
    let launch = |entry, blocks: usize| Launch::linear(blocks, 1, p.params()).entry(entry);
    let heads = e.batch * e.heads;
    let mut launches = vec![
        launch("attention_bwd_rows_mma", statistics_blocks(&e)).slots(&[y, dy, lse, stats]),
        launch("attention_bwd_q_mma", heads * e.queries.div_ceil(BACK))
            .shared(stream_shared(HEAD))
            .slots(&[0, 1, 2, context, lengths, bias, dy, stats, dq]),
        launch("attention_bwd_kv_mma", heads * e.keys.div_ceil(BACK))
            .shared(stream_shared(HEAD))
            .slots(&[0, 1, 2, context, lengths, bias, dy, stats, dk, dv]),
    ];
    if op.0.bias {
        let blocks = e.heads * e.queries.div_ceil(BACK) * e.keys.div_ceil(BACK);
        let launch = launch("attention_bwd_bias_mma", blocks).shared(bias_shared(HEAD));
        launches.push(launch.slots(&[0, 1, 2, context, lengths, bias, dy, stats, dbias]));
    }
    Plan::sequence(launches).scratch(2 * padded_rows(&e) * 4)
}
