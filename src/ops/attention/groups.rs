//! CUDA records on warp groups of compute capability 9.0: tiles of 128 rows, copied by tensor maps in which every head of every
//! sequence is a plane.

use super::plan::{extents, optional};
use super::{Attention, Extents};
use crate::dtype::DType;
use crate::kernel::{Code, Constants, Kernel, Launch, Plan, Problem, Source, TensorMap, cuda_source};
use crate::ops::groups;

const FORWARD: Source = cuda_source!("attention_wgmma");

/// Rows of queries of a forward block, keys of a step.
const SPAN: usize = 128;
/// Rows of a box, except for those of keys in the forward direction.
const ROWS: usize = 64;

/// `HEAD` of the kernel files.
const fn constants(head: usize) -> Constants {
    if head == 64 { &[("HEAD", 64.0)] } else { &[("HEAD", 128.0)] }
}

const fn record(
    name: &'static str,
    source: Source,
    head: usize,
    fits: fn(&Problem) -> bool,
    plan: fn(&Problem) -> Plan,
) -> Kernel {
    let tensor = &["wgmma.mma_async"];
    let code = Code::Cuda { source, entry: name, constants: constants(head), arch: 90, tensor };
    Kernel { name, code, dtypes: &[DType::F16, DType::Bf16], fits, plan }
}

pub(super) const fn forward<const HEAD: usize>() -> Kernel {
    record("attention_fwd_wgmma", FORWARD, HEAD, fits_forward::<HEAD>, plan_forward::<HEAD>)
}

/// Boxes step by multiples of 16 bytes. A head dimension of at most 32 would leave half of a box empty, and few queries most of
/// a tile: small tiles of `mma` are for those, but software adapters are never in a hurry.
fn fits(p: &Problem, head: usize, rows: impl Fn(&Extents) -> usize) -> bool {
    extents(p).is_some_and(|e| {
        let planes = [e.queries, e.keys].map(|n| e.batch * n * e.heads);
        e.dim.is_multiple_of(8)
            && e.dim <= head
            && e.dim > if head == 64 { 32 } else { 64 }
            && planes.iter().all(|&n| u32::try_from(n).is_ok())
            && (rows(&e) > ROWS || p.info.software)
    })
}

fn shared_fits(p: &Problem, bytes: usize) -> bool {
    bytes as u64 <= u64::from(p.info.limits.workgroup_bytes)
}

fn fits_forward<const HEAD: usize>(p: &Problem) -> bool {
    fits(p, HEAD, |e| e.queries) && shared_fits(p, forward_shared(HEAD))
}

/// Queries, a ring of tiles of keys and values, two barriers and a number for each column.
fn forward_shared(head: usize) -> usize {
    let tile = SPAN * head * 2;
    groups::shared(512 / head, tile, tile + 16 + head * 4)
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
    let launch = Launch::linear(e.batch * e.heads * e.queries.div_ceil(SPAN), 1, p.params())
        .shared(forward_shared(HEAD))
        .slots(&[0, 1, 2, context, lengths, bias, y, lse])
        .map(map(p, &e, 0, e.queries, ROWS))
        .map(map(p, &e, 1, e.keys, SPAN))
        .map(map(p, &e, 2, e.keys, ROWS));
    Plan::of(launch)
}
