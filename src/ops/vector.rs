//! Launch geometry of the rungs that move several neighbours per access: 16 bytes on CUDA, where what needs no tensor instruction
//! runs from Turing on, and four elements on software rasterizers.

use crate::device::Class;
use crate::dtype::DType;
use crate::kernel::cuda::LOWEST_ARCH;
use crate::kernel::{Code, Kernel, Launch, Plan, Problem, Source};

/// Threads of a block of the elementwise rungs.
pub(super) const BLOCK: u32 = 256;
/// Rows of a block in which a warp has a row.
const ROWS: u32 = 4;
/// Threads that share a row: a warp, a block, a block of the most threads there are.
pub(super) const TEAMS: [usize; 3] = [32, 256, 1024];
/// Vectors that a warp takes of one row in the rungs that need no sum over rows.
const PART: usize = 128;
/// Warps of a block of [`BLOCK`] threads.
const WARPS: u32 = BLOCK / 32;

/// A record of a CUDA entry; `entry` may differ from the rung's name where the plan names one of several.
pub(super) const fn cuda(
    source: Source,
    [name, entry]: [&'static str; 2],
    dtypes: &'static [DType],
    fits: fn(&Problem) -> bool,
    plan: fn(&Problem) -> Plan,
) -> Kernel {
    Kernel {
        name,
        code: Code::Cuda { source, entry, constants: &[], arch: LOWEST_ARCH, tensor: &[] },
        dtypes,
        fits,
        plan,
    }
}

/// The records of a row-wise op with a CUDA rung above them.
pub(super) const fn above(first: Kernel, rest: [Kernel; 4]) -> [Kernel; 5] {
    [first, rest[0], rest[1], rest[2], rest[3]]
}

/// Elements of an invocation of the elementwise rungs for software rasterizers, which load and store four of them at once, or
/// eight; invocations of a group.
const EACH: usize = 16;
const INVOCATIONS: u32 = 64;

/// Whether a software rasterizer can take the output by fours, a block of them at least.
pub(super) fn whole_fours(p: &Problem) -> bool {
    let count = p.outputs[0].count();
    p.info.class == Class::Cpu && count >= EACH && count.is_multiple_of(4)
}

/// Whether it can take it by eights, as words of 64 bits.
pub(super) fn whole_eights(p: &Problem) -> bool {
    whole_fours(p) && p.outputs[0].count().is_multiple_of(8) && p.info.features.i64
}

/// The launch of either.
pub(super) fn plan_blocks(p: &Problem) -> Plan {
    Plan::of(Launch::linear(p.outputs[0].count().div_ceil(EACH), INVOCATIONS, p.params()))
}

/// Elements of 16 bytes.
pub(super) fn vector(p: &Problem) -> usize {
    16 / p.element.size()
}

/// Whether rows of the first input start at multiples of 16 bytes.
pub(super) fn aligned_rows(p: &Problem) -> bool {
    p.inputs[0].shape.last().is_multiple_of(vector(p))
}

/// Elements of the aligned vectors that a row touches at most.
pub(super) fn touched(p: &Problem) -> usize {
    let length = p.inputs[0].shape.last();
    if aligned_rows(p) { length } else { length + 2 * (vector(p) - 1) }
}

/// One launch over the rows of the first input, by the first of the teams whose threads hold a row in `each` elements, or
/// by the last of `entries`.
pub(super) fn rows(p: &Problem, entries: &[&'static str], each: [usize; 3]) -> Launch {
    let team = TEAMS.iter().zip(each).position(|(threads, each)| touched(p) <= threads * each).unwrap_or(TEAMS.len());
    let team = team.min(entries.len() - 1);
    Launch::linear(p.inputs[0].shape.rows(), if team == 0 { ROWS } else { 1 }, p.params()).entry(entries[team])
}

/// One launch over parts of the rows of the first input, a warp each.
pub(super) fn parts(p: &Problem) -> Launch {
    let most = (p.inputs[0].shape.last() + 2 * (vector(p) - 1)) / vector(p);
    Launch::linear(p.inputs[0].shape.rows() * most.div_ceil(PART), WARPS, p.params())
}
