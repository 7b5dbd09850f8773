//! WGSL records of the feed-forward block: products over f32 scratch, so that 16-bit storage rounds only what is stored.

use super::{Extents, Ffn, FfnActivation, FfnBackward, extents};
use crate::dtype::DType;
use crate::kernel::{Code, Kernel, Launch, MAX_GROUPS, Params, Plan, Problem, Source, source};
use crate::ops::groups::MULTIPROCESSORS;

pub(super) const SOURCE: Source = source!("ffn");

pub(super) const FORWARD: Kernel = wgsl("ffn_fwd", "ffn_up", forward);
pub(super) const BACKWARD: Kernel = wgsl("ffn_bwd", "ffn_up", backward);

/// Tensor instructions of compute capability 8.0 on 16-bit elements. The small tile takes every alignment.
pub(super) const FORWARD_TENSOR: Kernel = tensor("ffn_fwd_mma", "ffn_up_mma", fits_large, |p| tensor_forward(p, true));
pub(super) const FORWARD_TENSOR_SMALL: Kernel =
    tensor("ffn_fwd_small_mma", "ffn_up_small_mma", fits, |p| tensor_forward(p, false));
pub(super) const BACKWARD_TENSOR: Kernel =
    tensor("ffn_bwd_mma", "ffn_slope_mma", fits_large, |p| tensor_backward(p, true));
pub(super) const BACKWARD_TENSOR_SMALL: Kernel =
    tensor("ffn_bwd_small_mma", "ffn_slope_small_mma", fits, |p| tensor_backward(p, false));

const fn tensor(
    name: &'static str,
    entry: &'static str,
    fits: fn(&Problem) -> bool,
    plan: fn(&Problem) -> Plan,
) -> Kernel {
    let code = Code::Cuda { source: SOURCE, entry, constants: &[], arch: 80, tensor: &["mma.sync"] };
    Kernel { name, code, dtypes: &[DType::F16, DType::Bf16], fits, plan }
}

const fn wgsl(name: &'static str, entry: &'static str, plan: fn(&Problem) -> Plan) -> Kernel {
    Kernel { name, code: Code::Gpu { source: SOURCE, entry, constants: &[] }, dtypes: DType::FLOATS, fits, plan }
}

/// Outputs of one workgroup of a product, per axis.
const TILE: usize = 64;

pub(super) fn problem(p: &Problem) -> Option<(FfnActivation, Extents)> {
    let (activation, at) = match (p.op::<Ffn>(), p.op::<FfnBackward>()) {
        (Some(op), _) => (op.activation, [0, 1, 3]),
        (_, Some(op)) => (op.activation, [0, 1, 2]),
        _ => return None,
    };
    Some((activation, extents(p.op.name(), activation, p.inputs, at).ok()?))
}

/// One invocation runs through all of k (d, f or the rows), one launch covers every output, scratch fits a binding.
pub(super) fn fits(p: &Problem) -> bool {
    problem(p).is_some_and(|(activation, e)| {
        let hidden = e.f * activation.halves();
        let longest = e.rows.max(e.d).max(hidden).max(e.d2);
        longest as u64 <= p.info.limits.loop_budget.unwrap_or(u64::MAX)
            && longest <= MAX_GROUPS as usize * TILE
            && (e.rows * hidden * 4) as u64 <= p.info.limits.binding_bytes
    })
}

/// c = a b (+ bias) by extents and steps.
struct Product {
    rows: usize,
    columns: usize,
    k: usize,
    /// Steps from row to row and from column to column.
    a: [usize; 2],
    b: [usize; 2],
    c: [usize; 2],
    bias: bool,
}

impl Product {
    fn launch(&self, entry: &'static str, slots: [usize; 4]) -> Launch {
        let groups = |extent: usize| extent.div_ceil(TILE).max(1) as u32;
        let params = Params::new().u(self.rows).u(self.columns).u(self.k);
        let params = [self.a, self.b, self.c].iter().flatten().fold(params, |p, &s| p.u(s)).flag(self.bias);
        Launch::new([groups(self.columns), groups(self.rows), 1], params).entry(entry).slots(&slots).trips(self.k)
    }
}

fn elementwise(entry: &'static str, e: &Extents, activation: FfnActivation, slots: &[usize]) -> Launch {
    let params = padded(e.rows, e.f).u(activation.code());
    Launch::linear(e.rows * e.f, 64, params).entry(entry).slots(slots)
}

fn column_sums(entry: &'static str, rows: usize, columns: usize, slots: &[usize]) -> Launch {
    Launch::linear(columns, 64, padded(rows, columns).u(0)).entry(entry).slots(slots).trips(rows)
}

/// The block's extents with the fields of products left at 0.
fn padded(rows: usize, columns: usize) -> Params {
    (0..7).fold(Params::new().u(rows).u(columns), |p, _| p.u(0))
}

/// Arguments: x 0, w1 1, b1 2, w2 3, b2 4, y 5, z 6; scratch: sums of z 7, h 8.
fn forward(p: &Problem) -> Plan {
    let Some((activation, e)) = problem(p) else {
        return Plan::default();
    };
    let hidden = e.f * activation.halves();
    let up = Product { rows: e.rows, columns: hidden, k: e.d, a: [e.d, 1], b: [1, e.d], c: [hidden, 1], bias: true };
    let down = Product { rows: e.rows, columns: e.d2, k: e.f, a: [e.f, 1], b: [1, e.f], c: [e.d2, 1], bias: true };
    let launches = vec![
        up.launch("ffn_up", [0, 1, 2, 7]),
        elementwise("ffn_act", &e, activation, &[7, 6, 8]),
        down.launch("ffn_down", [8, 3, 4, 5]),
    ];
    Plan::sequence(launches).scratch(e.rows * hidden * 4).scratch(e.rows * e.f * 4)
}

/// Arguments: x 0, w1 1, w2 2, z 3, dy 4, dx 5, dw1 6, db1 7, dw2 8, db2 9; scratch: dh 10, h 11, dz 12.
fn backward(p: &Problem) -> Plan {
    let Some((activation, e)) = problem(p) else {
        return Plan::default();
    };
    let hidden = e.f * activation.halves();
    // Without a bias its slot holds any readable argument.
    let dh = Product { rows: e.rows, columns: e.f, k: e.d2, a: [e.d2, 1], b: [e.f, 1], c: [e.f, 1], bias: false };
    let dx = Product { rows: e.rows, columns: e.d, k: hidden, a: [hidden, 1], b: [e.d, 1], c: [e.d, 1], bias: false };
    let dw1 = Product { rows: hidden, columns: e.d, k: e.rows, a: [1, hidden], b: [e.d, 1], c: [e.d, 1], bias: false };
    // The transpose hᵀ dy, stored by columns: the f32 side is always a.
    let dw2 = Product { rows: e.f, columns: e.d2, k: e.rows, a: [1, e.f], b: [e.d2, 1], c: [1, e.f], bias: false };
    let launches = vec![
        dh.launch("ffn_up", [4, 2, 4, 10]),
        elementwise("ffn_slope", &e, activation, &[3, 10, 11, 12]),
        dx.launch("ffn_down", [12, 1, 1, 5]),
        dw1.launch("ffn_down", [12, 0, 0, 6]),
        dw2.launch("ffn_down", [11, 4, 4, 8]),
        column_sums("ffn_sum_f32", e.rows, hidden, &[12, 7]),
        column_sums("ffn_sum", e.rows, e.d2, &[4, 9]),
    ];
    let hidden_bytes = e.rows * e.f * 4;
    Plan::sequence(launches).scratch(hidden_bytes).scratch(hidden_bytes).scratch(e.rows * hidden * 4)
}

/// Outputs of a block of the tensor rung, per axis.
const LARGE_TILE: usize = 128;

/// Whether a product of the large rung has tiles enough. Software adapters are never full, so that small cases verify the
/// large tile too.
fn many(p: &Problem, rows: usize, columns: usize) -> bool {
    p.info.software || rows.div_ceil(LARGE_TILE) * columns.div_ceil(LARGE_TILE) >= MULTIPROCESSORS
}

/// The large tile copies 16 bytes at a time from every matrix. Its plan takes the small tile for products with few outputs.
fn fits_large(p: &Problem) -> bool {
    fits(p)
        && problem(p).is_some_and(|(activation, e)| {
            [e.d, e.f, e.d2].iter().all(|n| n.is_multiple_of(8)) && many(p, e.rows, e.f * activation.halves())
        })
}

/// One product of the tensor rung: large and small entry, and outputs.
struct TensorProduct {
    entries: [&'static str; 2],
    rows: usize,
    columns: usize,
}

impl TensorProduct {
    /// The launch and the rows of its tiles. Shared memory holds four stages of both operands.
    fn launch(&self, p: &Problem, large: bool, params: Params, slots: &[usize]) -> (Launch, usize) {
        let large = large && many(p, self.rows, self.columns);
        let (entry, tile) = if large { (self.entries[0], LARGE_TILE) } else { (self.entries[1], TILE) };
        let tiles = |extent: usize| extent.div_ceil(tile).max(1) as u32;
        let launch = Launch::new([tiles(self.columns), tiles(self.rows), 1], params).entry(entry).slots(slots);
        (launch.shared(2 * tile * 4 * 32 * 2), tile)
    }
}

/// `FfnTensorParams` of the kernels.
fn tensor_params(activation: FfnActivation, e: &Extents) -> Params {
    Params::new().u(e.rows).u(e.d).u(e.f).u(e.d2).u(activation.code())
}

/// Bytes of a 16-bit matrix whose rows start at multiples of 16 bytes.
pub(super) fn aligned(rows: usize, columns: usize) -> usize {
    rows * columns.next_multiple_of(8) * 2
}

/// Arguments as in `forward`; scratch: h 7.
fn tensor_forward(p: &Problem, large: bool) -> Plan {
    let Some((activation, e)) = problem(p) else {
        return Plan::default();
    };
    let params = tensor_params(activation, &e);
    // Gates and values alternate in eights.
    let columns = if activation.halves() == 2 { 2 * e.f.next_multiple_of(8) } else { e.f };
    let up = TensorProduct { entries: ["ffn_up_mma", "ffn_up_small_mma"], rows: e.rows, columns };
    let down = TensorProduct { entries: ["ffn_down_mma", "ffn_down_small_mma"], rows: e.rows, columns: e.d2 };
    let launches =
        vec![up.launch(p, large, params, &[0, 1, 2, 6, 7]).0, down.launch(p, large, params, &[7, 3, 4, 5]).0];
    Plan::sequence(launches).scratch(aligned(e.rows, e.f))
}

/// Rows of a block of `ffn_partial_mma`, and its columns.
const PARTIAL: usize = 128;

/// Arguments as in `backward`; scratch: h 10, dz 11, sums over tiles of rows for db1 12 and db2 13.
fn tensor_backward(p: &Problem, large: bool) -> Plan {
    let Some((activation, e)) = problem(p) else {
        return Plan::default();
    };
    let hidden = e.f * activation.halves();
    let params = tensor_params(activation, &e);
    let product = |entries, rows, columns| TensorProduct { entries, rows, columns };
    let slope = product(["ffn_slope_mma", "ffn_slope_small_mma"], e.rows, e.f);
    let dx = product(["ffn_dx_mma", "ffn_dx_small_mma"], e.rows, e.d);
    let dw1 = product(["ffn_dw1_mma", "ffn_dw1_small_mma"], hidden, e.d);
    let dw2 = product(["ffn_dw2_mma", "ffn_dw2_small_mma"], e.d2, e.f);
    let (slope, tile) = slope.launch(p, large, params, &[4, 2, 3, 10, 11, 12]);
    let (tiles, parts) = (e.rows.div_ceil(tile), e.rows.div_ceil(PARTIAL));
    let groups = [e.d2.div_ceil(PARTIAL).max(1) as u32, parts.max(1) as u32, 1];
    let launches = vec![
        slope,
        dx.launch(p, large, params, &[11, 1, 5]).0,
        dw1.launch(p, large, params, &[11, 0, 6]).0,
        dw2.launch(p, large, params, &[4, 10, 8]).0,
        column_sums("ffn_sum_f32", tiles, hidden, &[12, 7]),
        Launch::new(groups, params).entry("ffn_partial_mma").slots(&[4, 13]),
        column_sums("ffn_sum_f32", parts, e.d2, &[13, 9]),
    ];
    let sums = |rows: usize, columns: usize| rows.max(1) * columns * 4;
    Plan::sequence(launches)
        .scratch(aligned(e.rows, e.f))
        .scratch(aligned(e.rows, hidden))
        .scratch(sums(tiles, hidden))
        .scratch(sums(parts, e.d2))
}
