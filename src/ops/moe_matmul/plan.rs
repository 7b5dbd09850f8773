//! Records of the grouped products and their launches.

use crate::dtype::DType;
use crate::kernel::{Code, Kernel, Launch, MAX_GROUPS, Plan, Problem, Source, always, source};
use crate::ops::groups::MULTIPROCESSORS;

pub(super) const SOURCE: Source = source!("moe_matmul");
const BLOCK: u32 = 64;

pub(super) const FORWARD: Kernel = gpu("grouped_matmul_fwd", DType::FLOATS, plan_forward);
pub(super) const INT8: Kernel = gpu("grouped_matmul_int8_fwd", &[DType::F32], plan_int8);
pub(super) const BACKWARD_INPUT: Kernel = gpu("grouped_matmul_bwd_input", DType::FLOATS, plan_backward_input);
pub(super) const BACKWARD_WEIGHT: Kernel = gpu("grouped_matmul_bwd_weight", DType::FLOATS, plan_backward_weight);

/// Tensor instructions of compute capability 8.0 on 16-bit elements. The small tile takes every alignment.
pub(super) const FORWARD_TENSOR: Kernel =
    tensor("grouped_matmul_fwd_mma", fits_large, |p| plan_forward_tensor(p, LARGE_TILE));
pub(super) const FORWARD_TENSOR_SMALL: Kernel =
    tensor("grouped_matmul_fwd_small_mma", fits_small, |p| plan_forward_tensor(p, SMALL_TILE));
pub(super) const BACKWARD_INPUT_TENSOR: Kernel =
    tensor("grouped_matmul_bwd_input_mma", fits_large, |p| plan_backward_input_tensor(p, LARGE_TILE));
pub(super) const BACKWARD_INPUT_TENSOR_SMALL: Kernel =
    tensor("grouped_matmul_bwd_input_small_mma", fits_small, |p| plan_backward_input_tensor(p, SMALL_TILE));
pub(super) const BACKWARD_WEIGHT_TENSOR: Kernel =
    tensor("grouped_matmul_bwd_weight_mma", fits_weight_large, |p| plan_backward_weight_tensor(p, LARGE_TILE));
pub(super) const BACKWARD_WEIGHT_TENSOR_SMALL: Kernel =
    tensor("grouped_matmul_bwd_weight_small_mma", fits_weight_small, |p| plan_backward_weight_tensor(p, SMALL_TILE));

const fn gpu(entry: &'static str, dtypes: &'static [DType], plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Gpu { source: SOURCE, entry, constants: &[] };
    Kernel { name: entry, code, dtypes, fits: always, plan }
}

const fn tensor(name: &'static str, fits: fn(&Problem) -> bool, plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Cuda { source: SOURCE, entry: name, constants: &[], arch: 80, tensor: &["mma.sync"] };
    Kernel { name, code, dtypes: &[DType::F16, DType::Bf16], fits, plan }
}

/// Outputs of a block of the tensor rungs, per axis.
const LARGE_TILE: usize = 128;
const SMALL_TILE: usize = 64;

/// Rows, n, d and experts of any of the three products.
pub(super) fn extents(p: &Problem) -> [usize; 4] {
    let words = p.params();
    [0, 1, 2, 5].map(|i| words.words()[i] as usize)
}

/// Blocks of a product whose rows are sorted rows, `columns` wide: each expert may end in a tile of its own, and as offsets
/// are only known on the device, this is the most tiles that any offsets need.
fn row_groups(p: &Problem, columns: usize, tile: usize) -> [u32; 3] {
    let [rows, _, _, experts] = extents(p);
    let used = experts.min(rows);
    let tiles = (rows - used) / tile + used;
    [columns.div_ceil(tile).max(1) as u32, tiles.max(1) as u32, 1]
}

/// A column of blocks for db, then tiles of columns; tiles of n; experts.
fn weight_groups(p: &Problem, tile: usize) -> [u32; 3] {
    let [_, n, d, experts] = extents(p);
    [1 + d.div_ceil(tile) as u32, n.div_ceil(tile).max(1) as u32, experts as u32]
}

fn launchable(groups: [u32; 3]) -> bool {
    groups.iter().all(|&g| g <= MAX_GROUPS)
}

fn fits_small(p: &Problem) -> bool {
    launchable(row_groups(p, p.outputs[0].dims()[1], SMALL_TILE))
}

fn fits_weight_small(p: &Problem) -> bool {
    launchable(weight_groups(p, SMALL_TILE))
}

/// Copies of 16 bytes need rows that start at multiples of eight elements.
fn aligned(p: &Problem) -> bool {
    let [_, n, d, _] = extents(p);
    n.is_multiple_of(8) && d.is_multiple_of(8)
}

/// Large tiles where experts have rows for them and the tiles fill a GPU; software adapters are never full, so that small
/// cases verify this rung too.
fn fits_large(p: &Problem) -> bool {
    let [rows, _, _, experts] = extents(p);
    let columns = p.outputs[0].dims()[1];
    let tiles = rows.div_ceil(LARGE_TILE) * columns.div_ceil(LARGE_TILE);
    let full = rows >= experts * SMALL_TILE && tiles >= MULTIPROCESSORS;
    aligned(p) && (full || p.info.software) && launchable(row_groups(p, columns, LARGE_TILE))
}

fn fits_weight_large(p: &Problem) -> bool {
    let [_, n, d, experts] = extents(p);
    let tiles = experts * n.div_ceil(LARGE_TILE) * d.div_ceil(LARGE_TILE);
    aligned(p) && (tiles >= MULTIPROCESSORS || p.info.software) && launchable(weight_groups(p, LARGE_TILE))
}

/// Bytes of shared memory: four stages of 32 of the summed axis of both operands.
fn stages(tile: usize) -> usize {
    2 * tile * 4 * 32 * 2
}

/// Without a bias its slot holds x, which is not read there.
fn plan_forward_tensor(p: &Problem, tile: usize) -> Plan {
    let inputs = p.inputs.len();
    let bias = if inputs == 5 { 2 } else { 0 };
    let launch = Launch::new(row_groups(p, p.outputs[0].dims()[1], tile), p.params()).shared(stages(tile));
    Plan::of(launch.slots(&[0, 1, bias, inputs - 2, inputs - 1, inputs]))
}

fn plan_backward_input_tensor(p: &Problem, tile: usize) -> Plan {
    Plan::of(Launch::new(row_groups(p, p.outputs[0].dims()[1], tile), p.params()).shared(stages(tile)))
}

fn plan_backward_weight_tensor(p: &Problem, tile: usize) -> Plan {
    Plan::of(Launch::new(weight_groups(p, tile), p.params()).shared(stages(tile)))
}

/// Iterations of the search for a row's expert.
fn search(p: &Problem) -> usize {
    p.params().words()[5] as usize
}

/// Four columns of one row per invocation; without a bias its slot holds x, which is not read there.
fn plan_forward(p: &Problem) -> Plan {
    let (inputs, [rows, n]) = (p.inputs.len(), [0, 1].map(|axis| p.outputs[0].dims()[axis]));
    let bias = if inputs == 5 { 2 } else { 0 };
    let launch = Launch::linear(rows * n.div_ceil(4), BLOCK, p.params());
    let trips = p.inputs[0].dims()[1] + search(p) + 4;
    Plan::of(launch.slots(&[0, 1, bias, inputs - 2, inputs - 1, inputs]).trips(trips))
}

fn plan_int8(p: &Problem) -> Plan {
    let inputs = p.inputs.len();
    let bias = if inputs == 7 { 4 } else { 3 };
    let launch = Launch::linear(p.outputs[0].count(), BLOCK, p.params());
    let slots = [0, 1, 2, 3, bias, inputs - 2, inputs - 1, inputs];
    Plan::of(launch.slots(&slots).trips(p.inputs[0].dims()[1].div_ceil(4) + search(p)))
}

fn plan_backward_input(p: &Problem) -> Plan {
    let launch = Launch::linear(p.outputs[0].count(), BLOCK, p.params());
    Plan::of(launch.trips(p.inputs[0].dims()[1] + search(p)))
}

/// One expert may have every row: its sums run over all of them.
fn plan_backward_weight(p: &Problem) -> Plan {
    let rows = p.inputs[0].dims()[0];
    let weight = Launch::linear(p.outputs[0].count(), BLOCK, p.params()).trips(rows);
    let bias = Launch::linear(p.outputs[1].count(), BLOCK, p.params()).entry("grouped_matmul_bwd_bias");
    Plan::sequence(vec![weight, bias.slots(&[0, 1, 2, 3, 5]).trips(rows)])
}
