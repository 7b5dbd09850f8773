//! Records of WGSL and CUDA: which entries run, with which argument in which slot.

use super::{Extents, Relation, RelationBackward};
use crate::device::Class;
use crate::dtype::DType;
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, source};

pub(super) const SOURCE: Source = source!("relation");

const BLOCK: u32 = 64;
/// Rows of the other side that a row takes per iteration.
const STEP: usize = 4;
/// Dimensions of da or db that one launch sums: `DIM` in the kernels.
const RANGE: usize = 128;
/// Counts of visible keys are kept as f32.
const MAX_KEYS: usize = 1 << 24;

pub(super) const FORWARD: Kernel = record("relation_fwd", "relation_visible", fits_rows, |p| forward(p, Rung::Rows));
pub(super) const BACKWARD: Kernel = record("relation_bwd", "relation_bwd_rows", fits_rows, |p| backward(p, Rung::Rows));
pub(super) const FORWARD_TILES: Kernel =
    record("relation_fwd_v2", "relation_visible", fits_tiles, |p| forward(p, Rung::Tiles));
pub(super) const BACKWARD_TILES: Kernel =
    record("relation_bwd_v2", "relation_bwd_rows", fits_tiles, |p| backward(p, Rung::Tiles));

const fn record(
    name: &'static str,
    entry: &'static str,
    fits: fn(&Problem) -> bool,
    plan: fn(&Problem) -> Plan,
) -> Kernel {
    Kernel { name, code: Code::Gpu { source: SOURCE, entry, constants: &[] }, dtypes: DType::FLOATS, fits, plan }
}

/// A row per invocation, or a tile of rows per workgroup.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rung {
    Rows,
    Tiles,
}

/// Rows and columns of a tile of scores.
const TILE: usize = 16;

fn bound(p: &Problem) -> bool {
    let Some(e) = Extents::of(p.inputs) else { return false };
    let largest = p.inputs.iter().chain(p.outputs).map(|m| m.bytes()).max().unwrap_or(0).max(e.rows() * 16);
    e.keys < MAX_KEYS && largest as u64 <= p.info.limits.binding_bytes
}

fn within(p: &Problem, trips: usize) -> bool {
    p.info.limits.loop_budget.is_none_or(|budget| trips as u64 <= budget)
}

fn fits_rows(p: &Problem) -> bool {
    Extents::of(p.inputs).is_some_and(|e| bound(p) && within(p, row_trips(&e)))
}

/// Software rasterizers run barriers slowly; little work runs there all the same, so that it is verified.
fn fits_tiles(p: &Problem) -> bool {
    let Some(e) = Extents::of(p.inputs) else { return false };
    let little = e.rows() * e.keys <= 2048;
    (p.info.class != Class::Cpu || little) && bound(p) && within(p, tile_trips(&e))
}

/// Loop iterations of one invocation: a loop of n counts n + 1 on a software driver.
fn row_trips(e: &Extents) -> usize {
    let pass = |n: usize| n / STEP + 1 + n % STEP + 1;
    let others = e.keys.max(e.queries).div_ceil(STEP);
    others * (1 + pass(e.dim) + pass(e.teacher_dim) + e.dim.min(RANGE) + 1) + 2 * (e.dim.min(RANGE) + 1)
}

fn tile_trips(e: &Extents) -> usize {
    let pass = |n: usize| n.div_ceil(TILE) * (TILE + 2);
    let others = e.keys.max(e.queries).div_ceil(TILE);
    others * (1 + pass(e.dim) + pass(e.teacher_dim) + (RANGE / TILE + 1) * (TILE + 2)) + 64
}

/// Dimensions that each launch of backward sums.
fn ranges(dim: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..dim).step_by(RANGE).map(move |first| (first, dim.min(first + RANGE)))
}

fn range(p: &Problem, (first, last): (usize, usize)) -> Params {
    p.params().u(first).u(last)
}

/// Context and lengths, with the student standing in for what is absent: it is never read as such.
fn optional(op: &Relation) -> [usize; 2] {
    op.optional().map(|position| position.unwrap_or(0))
}

fn forward(p: &Problem, rung: Rung) -> Plan {
    let (Some(e), Some(op)) = (Extents::of(p.inputs), p.op::<Relation>()) else { return Plan::default() };
    let [context, lengths] = optional(op);
    let weights = op.weights();
    let (loss, sums, rows) = (weights + 1, weights + 2, weights + 3);
    let params = range(p, (0, e.dim));
    let visible = Launch::linear(e.batch * e.queries, BLOCK, params);
    let visible = visible.entry("relation_visible").slots(&[context, lengths, weights, rows]);
    let main = match rung {
        Rung::Rows => Launch::linear(e.rows(), BLOCK, params).entry("relation_fwd").trips(row_trips(&e)),
        Rung::Tiles => tiles(&e, e.queries, params).entry("relation_fwd_tiles").trips(tile_trips(&e)),
    };
    Plan::sequence(vec![visible, main.slots(&[0, 1, 2, 3, rows, loss, sums])]).scratch(e.batch * e.queries * 8)
}

/// One workgroup per batch element, head and tile of `extent` rows.
fn tiles(e: &Extents, extent: usize, params: Params) -> Launch {
    Launch::linear(e.batch * e.heads * extent.div_ceil(TILE), 1, params)
}

fn backward(p: &Problem, rung: Rung) -> Plan {
    let (Some(e), Some(op)) = (Extents::of(p.inputs), p.op::<RelationBackward>()) else { return Plan::default() };
    let [context, lengths] = optional(&op.0);
    let weights = op.0.weights();
    let (sums, dloss, da, db, rows) = (weights + 1, weights + 2, weights + 3, weights + 4, weights + 5);
    let first = Launch::linear(e.rows(), BLOCK, range(p, (0, e.dim)));
    let mut launches = vec![first.entry("relation_bwd_rows").slots(&[context, lengths, weights, sums, dloss, rows])];
    for part in ranges(e.dim) {
        let entries = [
            ("relation_bwd_a", "relation_bwd_a_tiles", e.queries, da),
            ("relation_bwd_b", "relation_bwd_b_tiles", e.keys, db),
        ];
        for (by_row, by_tile, extent, output) in entries {
            let launch = match rung {
                Rung::Rows => {
                    let launch = Launch::linear(e.batch * e.heads * extent, BLOCK, range(p, part));
                    launch.entry(by_row).trips(row_trips(&e))
                }
                Rung::Tiles => tiles(&e, extent, range(p, part)).entry(by_tile).trips(tile_trips(&e)),
            };
            launches.push(launch.slots(&[0, 1, 2, 3, rows, output]));
        }
    }
    Plan::sequence(launches).scratch(e.rows() * 16)
}
