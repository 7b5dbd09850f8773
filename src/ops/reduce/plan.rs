//! Launches of `shaders/reduce.wgsl`: trees of passes whose shape the problem alone decides, so that results are the
//! same bits on every adapter.

use std::ops::Range;

use super::{ArgMax, Axis, Reduce, ReduceBackward, ReduceFunction};
use crate::kernel::{Launch, Params, Plan, Problem, spans};

const BLOCK: u32 = 64;
/// Elements that one invocation reduces where an axis is split.
const FAN: usize = 512;
/// Longest axis that one invocation reduces alone, when there is little and when there is enough other work.
const SHORT: usize = 1024;
const LONG: usize = 4096;
const ENOUGH: usize = 4096;

/// One pass of a tree: `blocks` = outer x segments, each giving `inner` results.
#[derive(Clone, Copy)]
struct Pass {
    outer: usize,
    n: usize,
    inner: usize,
    fan: usize,
    kind: usize,
    factor: f32,
}

impl Pass {
    fn segments(&self) -> usize {
        self.n.div_ceil(self.fan)
    }

    fn blocks(&self) -> usize {
        self.outer * self.segments()
    }

    /// Element at which block `b` starts.
    fn start(&self, b: usize) -> usize {
        (b / self.segments() * self.n + b % self.segments() * self.fan) * self.inner
    }

    /// Parameters of the launch over `blocks`, its source and target shifted by these many elements (modulo 2^32).
    fn params(&self, blocks: &Range<usize>, from: usize, to: usize) -> Params {
        let params = Params::new().u(blocks.len() * self.inner).u(blocks.start * self.inner).u(self.n).u(self.inner);
        params.u(self.segments()).u(self.fan).u(self.kind).u(from).u(to).f(self.factor)
    }

    fn launch(&self, entry: &'static str, blocks: &Range<usize>, from: usize, to: usize) -> Launch {
        let params = self.params(blocks, from, to);
        Launch::linear(blocks.len() * self.inner, BLOCK, params).entry(entry).trips(self.fan)
    }

    /// Launches that read elements of `size` bytes from argument 0 through windows of at most `limit` bytes. `target`
    /// is (argument, bytes per result) of a target that is windowed too.
    fn elements(&self, entry: &'static str, size: usize, limit: u64, target: Option<(usize, usize)>) -> Vec<Launch> {
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        let total = self.outer * self.n * self.inner;
        if total * size <= limit {
            return vec![self.launch(entry, &(0..self.blocks()), 0, 0)];
        }
        // A window starts up to 256 bytes early.
        let step = (limit.saturating_sub(256) / (self.fan * self.inner * size)).max(1);
        let mut launches = Vec::new();
        for first in (0..self.blocks()).step_by(step) {
            let blocks = first..self.blocks().min(first + step);
            let start = self.start(first) / (256 / size) * (256 / size);
            let end = if blocks.end == self.blocks() { total } else { self.start(blocks.end) };
            let done = first * self.inner;
            // Results are counted from `first` in the kernel.
            let (to, window) = match target {
                Some((argument, bytes)) => {
                    let aligned = done / (256 / bytes) * (256 / bytes);
                    let count = blocks.end * self.inner - aligned;
                    (done - aligned, Some((argument, aligned * bytes, count * bytes)))
                }
                None => (done, None),
            };
            let mut launch = self.launch(entry, &blocks, 0usize.wrapping_sub(start), to);
            launch = launch.window(0, start * size, (end - start) * size);
            if let Some((argument, offset, bytes)) = window {
                launch = launch.window(argument, offset, bytes);
            }
            launches.push(launch);
        }
        launches
    }
}

pub(super) fn reduce(p: &Problem) -> Plan {
    let Some(op) = p.op::<Reduce>() else { return Plan::default() };
    let (outer, n, inner) = op.axis.extents(&p.inputs[0].shape);
    let (size, limit) = (p.element.size(), p.info.limits.binding_bytes);
    let whole = if outer * inner >= ENOUGH { LONG } else { SHORT };
    let fan = if n <= whole { n } else { FAN };
    let kind = op.function as usize;
    let mut pass = Pass { outer, n, inner, fan, kind, factor: op.function.factor(n) };
    if pass.segments() == 1 {
        return Plan::sequence(pass.elements("reduce_fwd", size, limit, Some((1, size))));
    }
    let mut launches = pass.elements("reduce_first", size, limit, None);
    // Later passes read one region of the scratch buffer and write the next.
    let (mut from, mut to) = (0, pass.blocks() * inner);
    loop {
        let n = pass.segments();
        // Squares are squared once.
        let kind = if op.function == ReduceFunction::SumSquares { ReduceFunction::Sum as usize } else { kind };
        pass = Pass { n, fan: FAN.min(n), kind, ..pass };
        let blocks = 0..pass.blocks();
        if pass.segments() == 1 {
            launches.push(pass.launch("reduce_last", &blocks, from, 0));
            return Plan::sequence(launches).scratch(to * 4);
        }
        launches.push(pass.launch("reduce_next", &blocks, from, to));
        (from, to) = (to, to + pass.blocks() * inner);
    }
}

pub(super) fn argmax(p: &Problem) -> Plan {
    debug_assert!(p.op::<ArgMax>().is_some());
    let (rows, n) = (p.inputs[0].shape.rows(), p.inputs[0].shape.last());
    let (size, limit) = (p.element.size(), p.info.limits.binding_bytes);
    let fan = if n <= LONG { n } else { FAN };
    let pass = Pass { outer: rows, n, inner: 1, fan, kind: ReduceFunction::Max as usize, factor: 1.0 };
    if pass.segments() == 1 {
        return Plan::sequence(pass.elements("argmax_fwd", size, limit, Some((1, 4))));
    }
    let mut launches = pass.elements("argmax_first", size, limit, None);
    // The candidates are compared by their values, so whole rows are bound again.
    let step = if rows * n * size <= limit as usize { rows } else { (limit as usize - 256) / (n * size) };
    for first in (0..rows).step_by(step.max(1)) {
        let span = first..rows.min(first + step.max(1));
        let start = first * n / (256 / size) * (256 / size);
        let params = Params::new().u(span.len()).u(first).u(n).u(1).u(pass.segments()).u(fan).u(2);
        let params = params.u(0usize.wrapping_sub(start)).u(0).f(1.0);
        let launch = Launch::linear(span.len(), BLOCK, params).entry("argmax_last").trips(pass.segments());
        launches.push(match step < rows {
            true => launch.window(0, start * size, (span.end * n - start) * size),
            false => launch,
        });
    }
    Plan::sequence(launches).scratch(pass.blocks() * 4)
}

pub(super) fn count_non_finite(p: &Problem) -> Plan {
    let (n, size) = (p.inputs[0].count(), p.element.size());
    let mut pass = Pass { outer: 1, n, inner: 1, fan: FAN, kind: 0, factor: 1.0 };
    let mut launches = pass.elements("count_first", size, p.info.limits.binding_bytes, None);
    let (mut from, mut to) = (0, pass.blocks());
    loop {
        pass = Pass { n: pass.segments(), ..pass };
        if pass.segments() == 1 {
            launches.push(pass.launch("count_last", &(0..1), from, 0));
            return Plan::sequence(launches).scratch(to * 8);
        }
        launches.push(pass.launch("count_next", &(0..pass.blocks()), from, to));
        (from, to) = (to, to + pass.blocks());
    }
}

/// dx in binding-sized spans; x is cut alike, dy and the index of the maximum are bound whole.
pub(super) fn backward(p: &Problem) -> Plan {
    let Some(op) = p.op::<ReduceBackward>() else { return Plan::default() };
    let (_, n, inner) = Axis::extents(op.axis, &op.shape);
    let (count, size) = (p.outputs[0].count(), p.element.size());
    // Slots are (x or index, dy, dx); without a first input dy stands in for it, unread.
    let (entry, slots): (_, &[usize]) = match op.function {
        ReduceFunction::SumSquares => ("reduce_bwd_squares", &[0, 1, 2]),
        ReduceFunction::Max => ("reduce_bwd_max", &[0, 1, 2]),
        _ => ("reduce_bwd", &[0, 0, 1]),
    };
    let launches = spans(count, size, p.info.limits.binding_bytes).map(|span| {
        let params = Params::new().u(span.len()).u(span.start).u(n).u(inner).u(1).u(n).u(op.function as usize);
        let params = params.u(0).u(0).f(op.function.factor(n));
        let launch = Launch::linear(span.len(), BLOCK, params).entry(entry).slots(slots);
        if span.len() == count {
            return launch;
        }
        let launch = launch.window(p.inputs.len(), span.start * size, span.len() * size);
        match op.function {
            ReduceFunction::SumSquares => launch.window(0, span.start * size, span.len() * size),
            _ => launch,
        }
    });
    Plan::sequence(launches.collect())
}
