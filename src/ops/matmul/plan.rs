//! Records of the matrix product and their launches.

use std::ops::RangeInclusive;

use super::{Epilogue, Layout, Matmul};
use crate::device::Class;
use crate::dtype::DType;
use crate::kernel::{
    Code, Constants, Kernel, Launch, MAX_GROUPS, Params, Plan, Problem, Source, TensorMap, always, cuda_source, source,
    wgsl_source,
};
use crate::ops::groups;
use crate::ops::groups::MULTIPROCESSORS;

pub(super) const SOURCE: Source = source!("matmul");

/// The rungs on warp groups stand in a file of their own.
const GROUPS: Source = cuda_source!("matmul_wgmma");

/// The rung on subgroups stands in a file of its own, joined behind the other: it needs a feature that those do not.
const LANES: Source = wgsl_source!("matmul_lanes");
/// The rung on matrix units, one file to a size of fragments, and its emulation, which verifies it where there are none.
const COOP_16: Source = wgsl_source!("matmul_coop_16");
const COOP_8: Source = wgsl_source!("matmul_coop_8");
const EMULATED: Source = wgsl_source!("matmul_coop_emulated");
/// Lanes of the subgroups that it is written for: those of software Vulkan on processors with AVX2.
const SUBGROUP: u32 = 8;

/// Rows and columns of output of one workgroup.
type Tile = (usize, usize);
const NAIVE_TILE: Tile = (8, 8);
const TILE: Tile = (64, 64);
const TALL_TILE: Tile = (128, 64);
/// Of one subgroup.
const LANES_TILE: Tile = (32, 32);
/// Of fragments of 8 x 8; of 16 x 16 it is `TILE`.
const COOP_8_TILE: Tile = (32, 32);
const TENSOR_TILE: Tile = (128, 128);
const WIDE_TILE: Tile = (128, 256);

const fn wgsl(
    name: &'static str,
    constants: Constants,
    fits: fn(&Problem) -> bool,
    plan: fn(&Problem) -> Plan,
) -> Kernel {
    let code = Code::Wgsl { source: SOURCE, entry: name, constants };
    Kernel { name, code, dtypes: DType::FLOATS, fits, plan }
}

/// An entry of both languages.
const fn gpu(name: &'static str, fits: fn(&Problem) -> bool, plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Gpu { source: SOURCE, entry: name, constants: &[] };
    Kernel { name, code, dtypes: DType::FLOATS, fits, plan }
}

/// Best first. Software adapters prefer registers without barriers; the workgroup tile is what a GPU wants and is kept
/// as a candidate everywhere, so that every device verifies it.
const NN: Constants = &[("A_ALONG_K", 1.0), ("B_ALONG_K", 0.0)];
const NT: Constants = &[("A_ALONG_K", 1.0), ("B_ALONG_K", 1.0)];
const TN: Constants = &[("A_ALONG_K", 0.0), ("B_ALONG_K", 0.0)];
const TT: Constants = &[("A_ALONG_K", 0.0), ("B_ALONG_K", 1.0)];
pub(super) const QUADS_NN: Kernel = quads(NN, |p| fits_quads(p, false, false));
pub(super) const QUADS_NT: Kernel = quads(NT, |p| fits_quads(p, false, true));
pub(super) const QUADS_TN: Kernel = quads(TN, |p| fits_quads(p, true, false));
pub(super) const QUADS_TT: Kernel = quads(TT, |p| fits_quads(p, true, true));
pub(super) const LANES_NN: Kernel = lanes(NN, |p| fits_lanes(p, false, false));
pub(super) const LANES_NT: Kernel = lanes(NT, |p| fits_lanes(p, false, true));
pub(super) const LANES_TN: Kernel = lanes(TN, |p| fits_lanes(p, true, false));
pub(super) const LANES_TT: Kernel = lanes(TT, |p| fits_lanes(p, true, true));
pub(super) const REGISTERS: Kernel =
    wgsl("matmul_fwd_v2", &[], fits_registers, |p| plan(p, "matmul_fwd_v2", TILE, FOURTH));
pub(super) const WORKGROUP: Kernel =
    gpu(TILED, |p| unsplit(p, Usual::RATE), |p| plan(p, TILED, Usual::TILE, Usual::RATE));
/// Fragments of 16 x 16, which GPUs have under Vulkan, in four subgroups of the largest size. They stand behind the rung that every GPU
/// runs, so that only `kernels tune` takes them, where they are faster and agree: no GPU has verified them yet, and the barriers that
/// naga writes under Vulkan's memory model say less than it asks for.
pub(super) const COOP_16_OF_32: Kernel =
    coop("matmul_coop_16", COOP_16, &[("COOP_THREADS", 128.0)], |p| fits_coop(p, 16, 1..=32), |p| coop_plan(p, TILE));
pub(super) const COOP_16_OF_64: Kernel =
    coop("matmul_coop_16", COOP_16, &[("COOP_THREADS", 256.0)], |p| fits_coop(p, 16, 33..=64), |p| coop_plan(p, TILE));
/// Fragments of 8 x 8: software Vulkan's subgroups of eight, and Metal, which names 64 for subgroups of 32, so that half of them repeat.
pub(super) const COOP_8_OF_8: Kernel =
    coop("matmul_coop_8", COOP_8, &[("COOP_THREADS", 32.0)], |p| fits_coop(p, 8, 1..=8), |p| coop_plan(p, COOP_8_TILE));
pub(super) const COOP_8_OF_64: Kernel = coop(
    "matmul_coop_8",
    COOP_8,
    &[("COOP_THREADS", 256.0)],
    |p| fits_coop(p, 8, 9..=64),
    |p| coop_plan(p, COOP_8_TILE),
);
/// Twice four subgroups, so that repeating ones are verified too.
pub(super) const COOP_EMULATED: Kernel =
    coop("matmul_coop_emulated", EMULATED, &[("COOP_THREADS", 64.0)], fits_emulated, |p| {
        plan(p, COOP_ENTRY, TILE, EMULATED_RATE)
    });
pub(super) const NAIVE: Kernel = gpu("matmul_fwd", always, |p| plan(p, "matmul_fwd", NAIVE_TILE, ONE));

/// Warp groups of compute capability 9.0 on 16-bit elements: wide tiles where they fill the GPU, in pairs of blocks that share b
/// where they fill it twice.
pub(super) const GROUPS_PAIRS: Kernel =
    groups("matmul_pairs_wgmma", fits_pairs, |p| groups_plan(p, "matmul_pairs_wgmma", WIDE_TILE));
pub(super) const GROUPS_WIDE: Kernel =
    groups("matmul_fwd_wgmma", |p| fits_groups(p, WIDE_TILE), |p| groups_plan(p, "matmul_fwd_wgmma", WIDE_TILE));
pub(super) const GROUPS_NARROW: Kernel = groups(
    "matmul_narrow_wgmma",
    |p| fits_groups(p, TENSOR_TILE),
    |p| groups_plan(p, "matmul_narrow_wgmma", TENSOR_TILE),
);

const fn groups(name: &'static str, fits: fn(&Problem) -> bool, plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Cuda { source: GROUPS, entry: name, constants: &[], arch: 90, tensor: &["wgmma.mma_async"] };
    Kernel { name, code, dtypes: &[DType::F16, DType::Bf16], fits, plan }
}

/// Tensor instructions of compute capability 8.0 on 16-bit elements, sums in f32. The small tile takes every alignment.
pub(super) const TENSOR: Kernel =
    tensor("matmul_fwd_mma", fits_tensor, |p| tensor_plan(p, "matmul_fwd_mma", TENSOR_TILE));
pub(super) const TENSOR_SMALL: Kernel =
    tensor("matmul_small_mma", always, |p| tensor_plan(p, "matmul_small_mma", TILE));

const fn tensor(name: &'static str, fits: fn(&Problem) -> bool, plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Cuda { source: SOURCE, entry: name, constants: &[], arch: 80, tensor: &["mma.sync"] };
    Kernel { name, code, dtypes: &[DType::F16, DType::Bf16], fits, plan }
}

/// What the shader's constants are where nothing is said.
type Usual = Tiled<8, 8, 16>;
const TILED: &str = "matmul_fwd_v4";

/// The workgroup rung with `DOWN` x `ACROSS` invocations of 8 x 8 outputs, `K` of k at a time, for `kernels tune`: which of them suits an
/// adapter is not known beforehand (llama.cpp's pull request 22241: one tile for all reaches 59 % of each GPU's best on average, 36 %
/// at worst).
pub(super) struct Tiled<const DOWN: usize, const ACROSS: usize, const K: usize>;

impl<const DOWN: usize, const ACROSS: usize, const K: usize> Tiled<DOWN, ACROSS, K> {
    /// An outer loop with loops that load rows of a, columns of b, and add products.
    const RATE: Rate = Rate { iterations: 8 * K / ACROSS + 8 * K / DOWN + K + 1, steps: K, end: 40 };
    const TILE: Tile = (8 * DOWN, 8 * ACROSS);
    const CONSTANTS: Constants = {
        assert!((8 * K).is_multiple_of(ACROSS) && (8 * K).is_multiple_of(DOWN), "all invocations load as much");
        &[("TILE_DOWN", DOWN as f64), ("TILE_ACROSS", ACROSS as f64), ("TILE_K", K as f64)]
    };
    pub(super) const KERNEL: Kernel = Kernel {
        name: TILED,
        code: Code::Wgsl { source: SOURCE, entry: TILED, constants: Self::CONSTANTS },
        dtypes: DType::FLOATS,
        // On software adapters small products alone, to be verified.
        fits: |p| unsplit(p, Self::RATE) && (p.info.class != Class::Cpu || little(p)),
        plan: |p| plan(p, TILED, Self::TILE, Self::RATE),
    };
}

const COOP_ENTRY: &str = "matmul_fwd_coop";

const fn coop(
    name: &'static str,
    source: Source,
    constants: Constants,
    fits: fn(&Problem) -> bool,
    plan: fn(&Problem) -> Plan,
) -> Kernel {
    let code = Code::Wgsl { source, entry: COOP_ENTRY, constants };
    Kernel { name, code, dtypes: &[DType::F16], fits, plan }
}

fn coop_plan(p: &Problem, tile: Tile) -> Plan {
    plan(p, COOP_ENTRY, tile, COOP_RATE)
}

const fn quads(constants: Constants, fits: fn(&Problem) -> bool) -> Kernel {
    wgsl("matmul_fwd_v3", constants, fits, |p| plan(p, "matmul_fwd_v3", TALL_TILE, FOURTH))
}

const fn lanes(constants: Constants, fits: fn(&Problem) -> bool) -> Kernel {
    let name = "matmul_fwd_v5";
    let code = Code::Wgsl { source: LANES, entry: name, constants };
    Kernel { name, code, dtypes: DType::FLOATS, fits, plan: |p| plan(p, "matmul_fwd_v5", LANES_TILE, FOURTH) }
}

fn layout(p: &Problem) -> Option<(Matmul, Layout)> {
    let op = *p.op::<Matmul>()?;
    Some((op, op.layout(&p.inputs[0], &p.inputs[1]).ok()?.0))
}

/// Loop iterations of one invocation: `iterations` for every `steps` of k that are begun, and at most `end` besides.
#[derive(Clone, Copy)]
struct Rate {
    iterations: usize,
    steps: usize,
    end: usize,
}

const ONE: Rate = Rate { iterations: 1, steps: 1, end: 40 };
const FOURTH: Rate = Rate { iterations: 1, steps: 4, end: 40 };
/// For two steps of fragments 16 elements to load and two products, in an outer loop; for the end four times eight elements to store.
const COOP_RATE: Rate = Rate { iterations: 19, steps: 16, end: 40 };
/// 32 elements to load and eight products of fragments in two steps, each with eight fours of sums over 16 of k; for the end four fragments, each
/// of eight fours of sums and 16 elements to store.
const EMULATED_RATE: Rate = Rate { iterations: 32 + 8 * 8 * 17 + 3, steps: 32, end: 4 * (8 * 5 + 16) };

fn trips(k: usize, rate: Rate) -> usize {
    k.div_ceil(rate.steps) * rate.iterations + rate.end
}

/// Longest k that one invocation may run through.
fn longest(p: &Problem, rate: Rate) -> usize {
    let rounds = |budget: u64| (budget as usize).saturating_sub(rate.end) / rate.iterations;
    p.info.limits.loop_budget.map_or(usize::MAX, |budget| rounds(budget) * rate.steps)
}

/// Whether no launch needs its k cut: only the naive rung can.
fn unsplit(p: &Problem, rate: Rate) -> bool {
    layout(p).is_some_and(|(_, l)| l.k <= longest(p, rate))
}

fn fits_registers(p: &Problem) -> bool {
    p.info.class == Class::Cpu && unsplit(p, FOURTH)
}

/// Loads of four need every row of four to start at a multiple of four; few rows leave half of a tile empty.
fn fits_quads(p: &Problem, transpose_a: bool, transpose_b: bool) -> bool {
    fits_registers(p)
        && layout(p).is_some_and(|(op, l)| {
            let quads = |extent: usize| extent > 0 && extent.is_multiple_of(4);
            let a = if transpose_a { l.m } else { l.k };
            let b = if transpose_b { l.k } else { l.n };
            (op.transpose_a, op.transpose_b) == (transpose_a, transpose_b)
                && l.m > 8
                && quads(l.k)
                && quads(a)
                && quads(b)
        })
}

/// Outputs are stored by fours; few rows leave most of a tile empty.
fn fits_lanes(p: &Problem, transpose_a: bool, transpose_b: bool) -> bool {
    p.info.features.subgroup_size == SUBGROUP
        && fits_quads(p, transpose_a, transpose_b)
        && layout(p).is_some_and(|(_, l)| l.m > LANES_TILE.0 / 2 && l.n.is_multiple_of(4))
}

/// Fragments of `size` rows and columns, for an adapter whose largest subgroups have that many `lanes`. Four of 128 would be more than a
/// workgroup.
fn fits_coop(p: &Problem, size: u32, lanes: RangeInclusive<u32>) -> bool {
    let f = &p.info.features;
    f.cooperative_matrix == size && lanes.contains(&f.largest_subgroup) && unsplit(p, COOP_RATE)
}

/// Slow, so only for small products: it is there to be verified.
fn fits_emulated(p: &Problem) -> bool {
    p.info.class == Class::Cpu && p.info.features.subgroup_size == SUBGROUP && unsplit(p, EMULATED_RATE) && little(p)
}

/// Rows of 9 by 580 and squares of 150 are little: several tiles of every shape.
fn little(p: &Problem) -> bool {
    layout(p).is_some_and(|(_, l)| tiles(&l, TILE)[2] * l.k.div_ceil(32) <= 16)
}

/// A matrix as its rows: the axis whose step is not 1, with the batch if it has one.
struct Rows {
    /// Contiguous along m or n, not along k.
    blocks: bool,
    dims: [usize; 3],
    strides: [usize; 2],
}

/// a and b of a product.
fn rows(l: &Layout) -> [Rows; 2] {
    let rows = |blocks: bool, inner: usize, outer: usize, step: usize, batch: usize| {
        let planes = if batch == 0 { 1 } else { l.batch };
        // What is never stepped over has any step: the whole matrix, in whole eights.
        let step = if outer > 1 || planes > 1 { step } else { inner.next_multiple_of(8) };
        let plane = if planes > 1 { batch } else { outer * step };
        Rows { blocks, dims: [inner, outer, planes], strides: [step, plane] }
    };
    let [batch_a, row_a, column_a] = l.a;
    let [batch_b, row_b, column_b] = l.b;
    // Where both steps are 1, an axis has one element, and rows along k need no step.
    let a = if column_a == 1 { rows(false, l.k, l.m, row_a, batch_a) } else { rows(true, l.m, l.k, column_a, batch_a) };
    let b = if row_b == 1 { rows(false, l.k, l.n, column_b, batch_b) } else { rows(true, l.n, l.k, row_b, batch_b) };
    [a, b]
}

/// Tiles of outputs down, across, and in all.
fn tiles(l: &Layout, tile: Tile) -> [usize; 3] {
    let (down, across) = (l.m.div_ceil(tile.0), l.n.div_ceil(tile.1));
    [down, across, down * across * l.batch]
}

/// Tensor maps step by multiples of 16 bytes. A wide tile needs work for every multiprocessor; a narrow one is taken while
/// half of them have some, below which small tiles of `mma` spread better. Software adapters are never full.
fn fits_groups(p: &Problem, tile: Tile) -> bool {
    layout(p).is_some_and(|(_, l)| {
        let aligned = rows(&l).iter().all(|r| r.strides.iter().all(|s| s.is_multiple_of(8)));
        let wanted = if tile == WIDE_TILE { MULTIPROCESSORS } else { MULTIPROCESSORS / 2 };
        let full = tiles(&l, tile)[2] >= wanted && l.n > tile.1 / 2;
        l.k > 0 && aligned && (full || p.info.software)
    })
}

/// Pairs of blocks take two tiles down a column, so few rows of tiles may not be odd.
fn fits_pairs(p: &Problem) -> bool {
    fits_groups(p, WIDE_TILE)
        && layout(p).is_some_and(|(_, l)| {
            let [down, _, all] = tiles(&l, WIDE_TILE);
            p.info.software || (all >= 2 * MULTIPROCESSORS && (down.is_multiple_of(2) || down > 16))
        })
}

fn groups_plan(p: &Problem, entry: &'static str, tile: Tile) -> Plan {
    const STAGES: usize = 4;
    const BLOCK: usize = 64;
    let Some((op, l)) = layout(p) else {
        return Plan::default();
    };
    let [a, b] = rows(&l);
    let [down, across, all] = tiles(&l, tile);
    let pairs = entry == "matmul_pairs_wgmma";
    let blocks = if pairs { 2 * groups::pairs(p, down.div_ceil(2) * across * l.batch) } else { groups::blocks(p, all) };
    let flag = |set: bool, bit: usize| usize::from(set) << bit;
    let mode = mode(&op) | flag(a.dims[2] > 1, 4) | flag(b.dims[2] > 1, 5) | flag(a.blocks, 6) | flag(b.blocks, 7);
    let params = Params::new().u(l.m).u(l.n).u(l.k).u(mode).u(down).u(across).u(l.batch);
    let map = |slot: usize, r: &Rows, extent: usize| {
        let rows = if r.blocks { BLOCK } else { extent };
        TensorMap { slot, element: p.element, dims: r.dims, strides: r.strides, rows }
    };
    let launch = Launch::new([blocks, 1, 1], params)
        .entry(entry)
        .slots(&slots(p, &op))
        .map(map(0, &a, tile.0))
        // Of a pair each block copies one half of b.
        .map(map(1, &b, if pairs { tile.1 / 2 } else { tile.1 }))
        .shared(groups::shared(STAGES, (tile.0 + tile.1) * BLOCK * 2, 0));
    Plan::of(launch)
}

/// Copies of 16 bytes need rows that start at multiples of eight elements. Fewer tiles than multiprocessors leave some idle,
/// which small tiles do not; software adapters are never full, so that small cases verify this rung too.
fn fits_tensor(p: &Problem) -> bool {
    layout(p).is_some_and(|(_, l)| {
        // A single row is never stepped over; rows lie along the axis whose step is not 1.
        let aligned = |batch: usize, step: usize, rows: usize| {
            (rows < 2 || step.is_multiple_of(8)) && (l.batch < 2 || batch.is_multiple_of(8))
        };
        let [batch_a, row_a, column_a] = l.a;
        let [batch_b, row_b, column_b] = l.b;
        let a = if column_a == 1 { aligned(batch_a, row_a, l.m) } else { aligned(batch_a, column_a, l.k) };
        let b = if row_b == 1 { aligned(batch_b, column_b, l.n) } else { aligned(batch_b, row_b, l.k) };
        let tiles = l.batch * l.m.div_ceil(TENSOR_TILE.0) * l.n.div_ceil(TENSOR_TILE.1);
        a && b && (tiles >= MULTIPROCESSORS || p.info.software)
    })
}

/// Bytes of shared memory: four stages of 32 of k of both operands.
fn tensor_plan(p: &Problem, entry: &'static str, tile: Tile) -> Plan {
    // CUDA cuts no loops.
    let mut plan = plan(p, entry, tile, ONE);
    plan.launches.iter_mut().for_each(|launch| launch.shared = ((tile.0 + tile.1) * 4 * 32 * 2) as u32);
    plan
}

/// Launches over blocks of output of one tile of outputs per workgroup, k cut so that one invocation stays in the
/// loop budget. Only a cut k needs scratch: f32 sums of all outputs.
fn plan(p: &Problem, entry: &'static str, tile: Tile, rate: Rate) -> Plan {
    let Some((op, l)) = layout(p) else {
        return Plan::default();
    };
    let longest = longest(p, rate);
    let [_, _, bias, y] = slots(p, &op);
    let mut launches = Vec::new();
    if l.k <= longest {
        blocks(&l, tile, |groups, at| {
            let params = params(&l, &op, at, (0, l.k));
            launches.push(Launch::new(groups, params).entry(entry).slots(&[0, 1, bias, y]).trips(trips(l.k, rate)));
        });
        return Plan::sequence(launches);
    }
    let sums = p.inputs.len() + usize::from(!op.accumulate);
    for k0 in (0..l.k).step_by(longest) {
        let k1 = l.k.min(k0 + longest);
        blocks(&l, NAIVE_TILE, |groups, at| {
            let params = params(&l, &op, at, (k0, k1));
            launches.push(Launch::new(groups, params).entry("matmul_part").slots(&[0, 1, sums]).trips(k1 - k0));
        });
    }
    blocks(&l, NAIVE_TILE, |groups, at| {
        let params = params(&l, &op, at, (0, l.k));
        launches.push(Launch::new(groups, params).entry("matmul_finish").slots(&[sums, bias, bias, y]));
    });
    Plan::sequence(launches).scratch(l.batch * l.m * l.n * 4)
}

/// Calls `launch(groups, [first row, first column, first batch])` for blocks of at most 65,535 groups per dimension.
fn blocks(l: &Layout, tile: Tile, mut launch: impl FnMut([u32; 3], [usize; 3])) {
    let most = MAX_GROUPS as usize;
    for batch in (0..l.batch).step_by(most) {
        for row in (0..l.m).step_by(most * tile.0) {
            for column in (0..l.n).step_by(most * tile.1) {
                let count = |extent: usize, first: usize, tile: usize| (extent - first).div_ceil(tile).min(most) as u32;
                let groups = [count(l.n, column, tile.1), count(l.m, row, tile.0), count(l.batch, batch, 1)];
                launch(groups, [row, column, batch]);
            }
        }
    }
}

/// The arguments a, b, bias (a stands in where there is none) and y.
fn slots(p: &Problem, op: &Matmul) -> [usize; 4] {
    [0, 1, if op.epilogue.has_bias() { 2 } else { 0 }, p.inputs.len() - usize::from(op.accumulate)]
}

/// Activation, bias and addition as the kernels' bits.
fn mode(op: &Matmul) -> usize {
    op.epilogue.activation() | usize::from(op.epilogue != Epilogue::None) << 2 | usize::from(op.accumulate) << 3
}

/// `MatmulParams` of the shader.
fn params(l: &Layout, op: &Matmul, [row, column, batch]: [usize; 3], (k0, k1): (usize, usize)) -> Params {
    let params = Params::new().u(l.m).u(l.n).u(mode(op));
    let params = l.a.iter().chain(&l.b).fold(params, |p, &s| p.u(s));
    params.u(row).u(column).u(batch).u(k0).u(k1)
}
