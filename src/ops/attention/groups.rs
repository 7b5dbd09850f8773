//! CUDA records on warp groups of compute capability 9.0: tiles of 128 rows, copied by tensor maps in which every head of every
//! sequence is a plane.

use super::plan::{extents, optional};
use super::tensor::{bias_shared, padded_rows, statistics_blocks};
use super::{Attention, AttentionBackward, Extents};
use crate::dtype::DType;
use crate::kernel::{Code, Constants, Kernel, Launch, Plan, Problem, Source, TensorMap, cuda_source};
use crate::ops::groups;

const FORWARD: Source = cuda_source!("attention_wgmma");
const BACKWARD: Source = cuda_source!("attention_bwd_wgmma");

/// Rows of a block; keys of a forward step.
const SPAN: usize = 128;
/// The most queries and keys of a head with tiles that blocks walk over.
const WALKED: usize = 4096;
/// Rows of a box, except for those of keys in the forward direction.
const ROWS: usize = 64;

/// `HEAD` of the kernel files.
const fn constants(head: usize) -> Constants {
    if head == 64 { &[("HEAD", 64.0)] } else { &[("HEAD", 128.0)] }
}

const fn record(
    name: &'static str,
    source: Source,
    entry: &'static str,
    head: usize,
    fits: fn(&Problem) -> bool,
    plan: fn(&Problem) -> Plan,
) -> Kernel {
    let tensor = &["wgmma.mma_async"];
    let code = Code::Cuda { source, entry, constants: constants(head), arch: 90, tensor };
    Kernel { name, code, dtypes: &[DType::F16, DType::Bf16], fits, plan }
}

pub(super) const fn forward<const HEAD: usize>() -> Kernel {
    let name = "attention_fwd_wgmma";
    record(name, FORWARD, name, HEAD, fits_forward::<HEAD>, plan_forward::<HEAD>)
}

pub(super) const fn backward<const HEAD: usize>() -> Kernel {
    record(
        "attention_bwd_wgmma",
        BACKWARD,
        "attention_bwd_kv_wgmma",
        HEAD,
        fits_backward::<HEAD>,
        plan_backward::<HEAD>,
    )
}

/// Boxes step by multiples of 16 bytes. A head dimension of at most 32 would leave half of a box empty, and few queries most of
/// a tile: small tiles of `mma` are for those, but software adapters are never in a hurry.
fn fits(p: &Problem, head: usize, rows: impl Fn(&Extents) -> usize) -> bool {
    extents(p).is_some_and(|e| {
        let planes = [e.queries, e.keys].map(|n| e.batch * n * e.heads);
        e.dim.is_multiple_of(8)
            && e.dim <= head
            && e.dim > if head == 64 { 32 } else { 64 }
            && planes.iter().all(|&n| i32::try_from(n).is_ok())
            && (rows(&e) > ROWS || p.info.software)
    })
}

fn shared_fits(p: &Problem, bytes: usize) -> bool {
    bytes as u64 <= u64::from(p.info.limits.workgroup_bytes)
}

fn fits_forward<const HEAD: usize>(p: &Problem) -> bool {
    fits(p, HEAD, |e| e.queries) && shared_fits(p, forward_shared(HEAD))
}

fn fits_backward<const HEAD: usize>(p: &Problem) -> bool {
    fits(p, HEAD, |e| e.queries.min(e.keys)) && shared_fits(p, backward_shared(HEAD).max(bias_shared(HEAD)))
}

/// Queries, a ring of tiles of keys and values, three barriers, and a word for each tile of the ring and each column of it.
fn forward_shared(head: usize) -> usize {
    let (tile, ring) = (SPAN * head * 2, 512 / head);
    groups::shared(ring, tile, tile + 3 * 8 + ring * (head + 1) * 4)
}

/// Two tensors' rows, a ring of stages of two tiles of 64 rows and their statistics, three barriers.
fn backward_shared(head: usize) -> usize {
    let tile = ROWS * head * 2;
    groups::shared(4, 2 * tile + 1024, 4 * tile + 3 * 8)
}

/// Blocks for tiles of `rows` rows of every head. Those that walk over tiles copy for the next one while they finish one; one block
/// per tile spreads long ones better.
fn tiles(p: &Problem, e: &Extents, rows: usize) -> Launch {
    let tiles = e.batch * e.heads * rows.div_ceil(SPAN);
    if e.queries.max(e.keys) <= WALKED {
        Launch::new([groups::blocks(p, tiles), 1, 1], p.params())
    } else {
        Launch::linear(tiles, 1, p.params())
    }
}

/// Boxes of `rows` rows of a tensor [B, extent, H, D]. Planes overlap: one more starts at each head of each row, and only those
/// of the first row are used.
fn map(p: &Problem, e: &Extents, slot: usize, extent: usize, rows: usize) -> TensorMap {
    let planes = (e.batch - 1) * extent * e.heads + e.heads;
    let dims = [e.dim, extent, planes];
    TensorMap { slot, element: p.element, dims, strides: [e.heads * e.dim, e.dim], rows }
}

fn plan_forward<const HEAD: usize>(p: &Problem) -> Plan {
    let (Some(e), Some(op)) = (extents(p), p.op::<Attention>()) else { return Plan::default() };
    let [context, lengths, bias] = optional(op);
    let (y, lse) = (op.inputs(), op.inputs() + 1);
    let launch = tiles(p, &e, e.queries)
        .shared(forward_shared(HEAD))
        .slots(&[0, 1, 2, context, lengths, bias, y, lse])
        .map(map(p, &e, 0, e.queries, ROWS))
        .map(map(p, &e, 1, e.keys, SPAN))
        .map(map(p, &e, 2, e.keys, ROWS));
    Plan::of(launch)
}

fn plan_backward<const HEAD: usize>(p: &Problem) -> Plan {
    let (Some(e), Some(op)) = (extents(p), p.op::<AttentionBackward>()) else { return Plan::default() };
    let n = op.0.inputs();
    let [context, lengths, bias] = optional(&op.0);
    let (y, lse, dy, dq, dk, dv, dbias) = (n, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6);
    let stats = dbias + usize::from(op.0.bias);
    let launch = |entry, blocks: usize| Launch::linear(blocks, 1, p.params()).entry(entry);
    // Slots 0, 1, 2 and 6 of both streaming entries are q, k, v and dy.
    let stream = |entry, rows: usize, outputs: &[usize]| {
        let slots = [&[0, 1, 2, context, lengths, bias, dy, stats], outputs].concat();
        tiles(p, &e, rows)
            .entry(entry)
            .shared(backward_shared(HEAD))
            .slots(&slots)
            .map(map(p, &e, 0, e.queries, ROWS))
            .map(map(p, &e, 1, e.keys, ROWS))
            .map(map(p, &e, 2, e.keys, ROWS))
            .map(map(p, &e, 6, e.queries, ROWS))
    };
    let mut launches = vec![
        launch("attention_bwd_rows_wgmma", statistics_blocks(&e)).slots(&[y, dy, lse, stats]),
        stream("attention_bwd_q_wgmma", e.queries, &[dq]),
        stream("attention_bwd_kv_wgmma", e.keys, &[dk, dv]),
    ];
    if op.0.bias {
        let blocks = e.heads * e.queries.div_ceil(ROWS) * e.keys.div_ceil(ROWS);
        let launch = launch("attention_bwd_bias_wgmma", blocks).shared(bias_shared(HEAD));
        launches.push(launch.slots(&[0, 1, 2, context, lengths, bias, dy, stats, dbias]));
    }
    Plan::sequence(launches).scratch(2 * padded_rows(&e) * 4)
}
