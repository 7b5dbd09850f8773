//! Records of the grouped products on warp groups of compute capability 9.0: 16-bit elements, widths of whole eights, one launch
//! for all experts.

use super::plan::extents;
use super::{GroupedBackwardWeight, GroupedMatmul};
use crate::dtype::DType;
use crate::kernel::{Code, Kernel, Launch, MAX_GROUPS, Params, Plan, Problem, Source, TensorMap, cuda_source};
use crate::ops::groups;

const SOURCE: Source = cuda_source!("moe_matmul_wgmma");

/// Rows of a tile, columns of a wide and of a narrow one, k of a stage.
const ROWS: usize = 128;
const WIDE: usize = 256;
const NARROW: usize = 128;
const STAGE_K: usize = 64;
/// Columns of a block of db.
const BIAS_COLUMNS: usize = 64;
/// Experts whose list of tiles has room behind the stages.
const MOST_EXPERTS: usize = 4000;

pub(super) const FORWARD_WIDE: Kernel =
    kernel("grouped_matmul_fwd_wgmma", "grouped_gathered_wgmma", |p| fits_rows(p, WIDE), |p| forward(p, WIDE));
pub(super) const FORWARD_NARROW: Kernel = kernel(
    "grouped_matmul_fwd_narrow_wgmma",
    "grouped_gathered_narrow_wgmma",
    |p| fits_rows(p, NARROW),
    |p| forward(p, NARROW),
);
pub(super) const INPUT_WIDE: Kernel =
    kernel("grouped_matmul_bwd_input_wgmma", "grouped_input_wgmma", |p| fits_rows(p, WIDE), |p| input(p, WIDE));
pub(super) const INPUT_NARROW: Kernel = kernel(
    "grouped_matmul_bwd_input_narrow_wgmma",
    "grouped_input_narrow_wgmma",
    |p| fits_rows(p, NARROW),
    |p| input(p, NARROW),
);
pub(super) const WEIGHT_WIDE: Kernel =
    kernel("grouped_matmul_bwd_weight_wgmma", "grouped_weight_wgmma", |p| fits_weight(p, WIDE), |p| weight(p, WIDE));
pub(super) const WEIGHT_NARROW: Kernel = kernel(
    "grouped_matmul_bwd_weight_narrow_wgmma",
    "grouped_weight_narrow_wgmma",
    |p| fits_weight(p, NARROW),
    |p| weight(p, NARROW),
);

const fn kernel(
    name: &'static str,
    entry: &'static str,
    fits: fn(&Problem) -> bool,
    plan: fn(&Problem) -> Plan,
) -> Kernel {
    let code = Code::Cuda { source: SOURCE, entry, constants: &[], arch: 90, tensor: &["wgmma.mma_async"] };
    Kernel { name, code, dtypes: &[DType::F16, DType::Bf16], fits, plan }
}

/// Tensor maps and copies step by multiples of 16 bytes. A wide tile needs work for every multiprocessor, a narrow one for half
/// of them, and both columns for half their width; software adapters are never full.
fn fits(p: &Problem, tiles: usize, columns: usize, width: usize) -> bool {
    let [rows, n, d, experts] = extents(p);
    let wanted = if width == WIDE { groups::MULTIPROCESSORS } else { groups::MULTIPROCESSORS / 2 };
    let full = tiles >= wanted && columns > width / 2;
    let some = rows > 0 && experts <= MOST_EXPERTS && [n, d].iter().all(|&x| x > 0 && x.is_multiple_of(8));
    some && (full || p.info.software)
}

/// Experts should fill half of their tiles with rows. Gathered rows start at 32-bit multiples of 16 bytes.
fn fits_rows(p: &Problem, width: usize) -> bool {
    let [rows, _, _, experts] = extents(p);
    let columns = p.outputs[0].dims()[1];
    let filled = rows >= experts * ROWS / 2 || p.info.software;
    let near = p.inputs[0].count() / 8 <= u32::MAX as usize;
    filled && near && fits(p, rows.div_ceil(ROWS) * columns.div_ceil(width), columns, width)
}

fn fits_weight(p: &Problem, width: usize) -> bool {
    let [_, n, d, experts] = extents(p);
    fits(p, experts * n.div_ceil(ROWS) * d.div_ceil(width), d, width) && n.div_ceil(BIAS_COLUMNS) <= MAX_GROUPS as usize
}

fn params([rows, columns, inner]: [usize; 3], k: usize, experts: usize, mode: usize) -> Params {
    Params::new().u(rows).u(columns).u(inner).u(k).u(experts).u(mode)
}

/// A launch over `tiles`, with four stages and the list of experts behind them.
fn launch(p: &Problem, entry: [&'static str; 2], width: usize, tiles: usize, params: Params) -> Launch {
    let [_, _, _, experts] = extents(p);
    let shared = groups::shared(4, (ROWS + width) * STAGE_K * 2, 2 * (experts + 1) * 4);
    Launch::new([groups::blocks(p, tiles), 1, 1], params).entry(entry[usize::from(width == NARROW)]).shared(shared)
}

/// The most tiles that any offsets need.
fn most_tiles(p: &Problem, columns: usize, width: usize) -> usize {
    let [rows, _, _, experts] = extents(p);
    let used = experts.min(rows);
    ((rows - used) / ROWS + used) * columns.div_ceil(width)
}

/// Sorted rows, `extent` of them a box.
fn rows(p: &Problem, slot: usize, rows: usize, columns: usize, extent: usize) -> TensorMap {
    groups::matrix(slot, p.element, [rows, columns], columns, extent)
}

/// All experts' weights, a plane each.
fn weights(p: &Problem, extent: usize) -> TensorMap {
    let [_, n, d, experts] = extents(p);
    TensorMap { slot: 1, element: p.element, dims: [d, n, experts], strides: [d, n * d], rows: extent }
}

/// Without a bias its slot holds x, which is not read there.
fn forward(p: &Problem, width: usize) -> Plan {
    let Some(op) = p.op::<GroupedMatmul>() else {
        return Plan::default();
    };
    let [sorted, n, d, experts] = extents(p);
    let inputs = p.inputs.len();
    let bias = if op.bias { 2 } else { 0 };
    let mode = usize::from(op.gather) | usize::from(op.relu) << 1 | usize::from(op.bias) << 2;
    let entry = if op.gather {
        ["grouped_gathered_wgmma", "grouped_gathered_narrow_wgmma"]
    } else {
        ["grouped_sorted_wgmma", "grouped_sorted_narrow_wgmma"]
    };
    let params = params([sorted, n, d], op.k, experts, mode);
    let launch = launch(p, entry, width, most_tiles(p, n, width), params);
    let launch = launch.slots(&[0, 1, bias, inputs - 2, inputs - 1, inputs]);
    let launch = if op.gather { launch } else { launch.map(rows(p, 0, sorted, d, ROWS)) };
    Plan::of(launch.map(weights(p, width)))
}

fn input(p: &Problem, width: usize) -> Plan {
    let [sorted, n, d, experts] = extents(p);
    let entry = ["grouped_input_wgmma", "grouped_input_narrow_wgmma"];
    let launch = launch(p, entry, width, most_tiles(p, d, width), params([sorted, d, n], 1, experts, 0));
    Plan::of(launch.slots(&[0, 1, 2, 3]).map(rows(p, 0, sorted, n, ROWS)).map(weights(p, STAGE_K)))
}

/// Arguments: dz 0, x 1, order 2, offsets 3, dw 4, db 5.
fn weight(p: &Problem, width: usize) -> Plan {
    let Some(op) = p.op::<GroupedBackwardWeight>() else {
        return Plan::default();
    };
    let [sorted, n, d, experts] = extents(p);
    let params = params([sorted, d, n], op.k, experts, usize::from(op.gather));
    let entry = ["grouped_weight_wgmma", "grouped_weight_narrow_wgmma"];
    let tiles = experts * n.div_ceil(ROWS) * d.div_ceil(width);
    let weight = launch(p, entry, width, tiles, params)
        .slots(&[0, 1, 2, 3, 4])
        .map(rows(p, 0, sorted, n, STAGE_K))
        .map(rows(p, 1, p.inputs[1].dims()[0], d, STAGE_K));
    let groups = [n.div_ceil(BIAS_COLUMNS) as u32, experts as u32, 1];
    let bias = Launch::new(groups, params).entry("grouped_bias_wgmma").slots(&[0, 3, 5]);
    Plan::sequence(vec![weight, bias])
}
