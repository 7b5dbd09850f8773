//! WGSL records of the matrix product and their launches.

use super::{Epilogue, Layout, Matmul};
use crate::dtype::DType;
use crate::kernel::{Code, Kernel, Launch, MAX_GROUPS, Params, Plan, Problem, always};

pub(super) const SHADER: &str = include_str!("../../../shaders/matmul.wgsl");

/// Output elements per workgroup and axis of the naive rung.
const NAIVE_TILE: usize = 8;

pub(super) const NAIVE: Kernel = Kernel {
    name: "matmul_fwd",
    code: Code::Wgsl { file: "matmul.wgsl", text: SHADER, entry: "matmul_fwd", constants: &[] },
    dtypes: DType::FLOATS,
    fits: always,
    plan: naive,
};

fn naive(p: &Problem) -> Plan {
    plan(p, "matmul_fwd", "matmul_part", NAIVE_TILE, 1)
}

/// Blocks of output that one launch can cover with `tile` x `tile` outputs per workgroup; k cut so that one invocation
/// stays in the loop budget at `step` elements per iteration. Only a cut k needs scratch: f32 sums of all outputs.
fn plan(p: &Problem, whole: &'static str, part: &'static str, tile: usize, step: usize) -> Plan {
    let Some(op) = p.op::<Matmul>() else {
        return Plan::default();
    };
    let Ok((l, _)) = op.layout(&p.inputs[0], &p.inputs[1]) else {
        return Plan::default();
    };
    // Half of the budget: loops of a fixed length inside an iteration may count too.
    let longest = p.info.limits.loop_budget.map_or(usize::MAX, |budget| (budget as usize / 2).max(1) * step);
    let y = p.inputs.len() - usize::from(op.accumulate);
    let bias = if op.epilogue.has_bias() { 2 } else { 0 };
    let mut launches = Vec::new();
    if l.k <= longest {
        blocks(&l, tile, |groups, at| {
            let params = params(&l, op, at, (0, l.k));
            launches
                .push(Launch::new(groups, params).entry(whole).slots(&[0, 1, bias, y]).trips(l.k.div_ceil(step) + 64));
        });
        return Plan::sequence(launches);
    }
    let scratch = p.inputs.len() + usize::from(!op.accumulate);
    for k0 in (0..l.k).step_by(longest) {
        let k1 = l.k.min(k0 + longest);
        blocks(&l, tile, |groups, at| {
            let params = params(&l, op, at, (k0, k1));
            launches.push(
                Launch::new(groups, params).entry(part).slots(&[0, 1, scratch]).trips((k1 - k0).div_ceil(step) + 64),
            );
        });
    }
    blocks(&l, NAIVE_TILE, |groups, at| {
        let params = params(&l, op, at, (0, l.k));
        launches.push(Launch::new(groups, params).entry("matmul_finish").slots(&[scratch, bias, bias, y]));
    });
    Plan::sequence(launches).scratch(l.batch * l.m * l.n * 4)
}

/// Calls `launch(groups, [first row, first column, first batch])` for blocks of at most 65,535 groups per dimension.
fn blocks(l: &Layout, tile: usize, mut launch: impl FnMut([u32; 3], [usize; 3])) {
    let most = MAX_GROUPS as usize;
    for batch in (0..l.batch).step_by(most) {
        for row in (0..l.m).step_by(most * tile) {
            for column in (0..l.n).step_by(most * tile) {
                let count = |extent: usize, first: usize, tile: usize| (extent - first).div_ceil(tile).min(most) as u32;
                let groups = [count(l.n, column, tile), count(l.m, row, tile), count(l.batch, batch, 1)];
                launch(groups, [row, column, batch]);
            }
        }
    }
}

/// `MatmulParams` of the shader.
fn params(l: &Layout, op: &Matmul, [row, column, batch]: [usize; 3], (k0, k1): (usize, usize)) -> Params {
    let mode =
        op.epilogue.activation() | usize::from(op.epilogue != Epilogue::None) << 2 | usize::from(op.accumulate) << 3;
    let params = Params::new().u(l.m).u(l.n).u(mode);
    let params = l.a.iter().chain(&l.b).fold(params, |p, &s| p.u(s));
    params.u(row).u(column).u(batch).u(k0).u(k1)
}
