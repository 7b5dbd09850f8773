//! Launch geometry that the row-wise families share: a row per invocation, or a row per workgroup.
//!
//! The rows are those of the op's first input. Both rungs make up to [`PASSES`] loops over a row.

use crate::cpu;
use crate::device::Class;
use crate::dtype::DType;
use crate::kernel::{Code, Kernel, Launch, Plan, Problem, Source};

/// Invocations per workgroup of the row-per-invocation rung.
pub(super) const BLOCK: u32 = 64;
/// Invocations of a workgroup that share one row; `GROUP` in the shaders.
const GROUP: usize = 128;
/// Elements whose sum is taken on its own; `BLOCK` in the shaders.
const SUM_BLOCK: usize = 32;
const PASSES: usize = 3;
/// Invocations per workgroup of the rung by fours: the lanes of a software driver, so that few rows still fill its threads.
const FOURS_BLOCK: u32 = 8;
/// Longest row whose sum the rung by fours takes; each of its steps adds sixteen elements to four sums.
const LONGEST_PLAIN_SUM: usize = 8192;

/// The records of one op: the CPU kernel, then a workgroup per row for GPUs, then a row per invocation for software
/// rasterizers, then the workgroup again where those must not loop so long (and, to be tested there, for little work).
pub(super) const fn rungs(
    source: Source,
    name: &'static str,
    run: fn(&cpu::Args) -> crate::error::Result<()>,
    [row, group]: [&'static str; 2],
    [row_plan, group_plan]: [fn(&Problem) -> Plan; 2],
) -> [Kernel; 4] {
    [
        Kernel::cpu(name, DType::FLOATS, run),
        gpu(source, group, on_gpu, group_plan),
        gpu(source, row, short_rows, row_plan),
        gpu(source, group, long_or_little, group_plan),
    ]
}

/// The records of an op with a rung for software rasterizers before them: a row per invocation, four neighbours a load.
pub(super) const fn fours(source: Source, entry: &'static str, rest: [Kernel; 5]) -> [Kernel; 6] {
    let code = Code::Wgsl { source, entry, constants: &[] };
    let fours = Kernel { name: entry, code, dtypes: DType::FLOATS, fits: fits_fours, plan: fours_plan };
    [fours, rest[0], rest[1], rest[2], rest[3], rest[4]]
}

/// Rows that start at multiples of four elements, short enough for sums without blocks.
fn fits_fours(p: &Problem) -> bool {
    let d = p.inputs[0].shape.last();
    p.info.class == Class::Cpu && d.is_multiple_of(4) && d <= LONGEST_PLAIN_SUM
}

fn fours_plan(p: &Problem) -> Plan {
    let x = p.inputs[0].shape;
    Plan::of(Launch::linear(x.rows(), FOURS_BLOCK, p.params()).trips(row_trips(x.last())))
}

pub(super) const fn gpu(
    source: Source,
    entry: &'static str,
    fits: fn(&Problem) -> bool,
    plan: fn(&Problem) -> Plan,
) -> Kernel {
    Kernel { name: entry, code: Code::Gpu { source, entry, constants: &[] }, dtypes: DType::FLOATS, fits, plan }
}

fn on_gpu(p: &Problem) -> bool {
    p.info.class != Class::Cpu
}

fn short_rows(p: &Problem) -> bool {
    let trips = row_trips(p.inputs[0].shape.last()) as u64;
    p.info.limits.loop_budget.is_none_or(|budget| trips <= budget)
}

fn long_or_little(p: &Problem) -> bool {
    !on_gpu(p) && (!short_rows(p) || p.inputs[0].count() <= 16_384)
}

fn row_trips(d: usize) -> usize {
    // Sums run over blocks, whose own loop counts too.
    PASSES * (d + d.div_ceil(SUM_BLOCK))
}

fn group_trips(d: usize) -> usize {
    // Each pass strides over the row and ends in a tree of log2(GROUP) steps.
    PASSES * (2 * d.div_ceil(GROUP) + 8)
}

/// One launch, a row per invocation.
pub(super) fn row_launch(p: &Problem) -> Launch {
    let x = p.inputs[0].shape;
    Launch::linear(x.rows(), BLOCK, p.params()).trips(row_trips(x.last()))
}

/// One launch, a row per workgroup.
pub(super) fn group_launch(p: &Problem) -> Launch {
    let x = p.inputs[0].shape;
    Launch::linear(x.rows(), 1, p.params()).trips(group_trips(x.last()))
}

/// The plans of an op that is one launch in either rung.
pub(super) const PLANS: [fn(&Problem) -> Plan; 2] = [|p| Plan::of(row_launch(p)), |p| Plan::of(group_launch(p))];
