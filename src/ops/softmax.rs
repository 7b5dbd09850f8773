//! Softmax, log-softmax and cross-entropy over the last axis.

mod cases;
mod cross_entropy;

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Params, Plan, Source, always, source};
use crate::op::{Array, Cost, Family, Gradient, Op, Saves};
use crate::ops::rows::{PLANS, fours, rungs};
use crate::ops::vector::{self, above};
use crate::shape::{self, Meta};
use crate::tensor::Tensor;

pub(crate) use cases::targets;
pub(crate) use cross_entropy::check_smoothing;
pub use cross_entropy::{CrossEntropy, CrossEntropyBackward, IGNORE};

pub use super::linear_loss::{LinearCrossEntropy, LinearPredict};

pub static FAMILY: Family = Family { name: "softmax", cases: cases::cases, source: Some(SOURCE) };

const SOURCE: Source = source!("softmax");

/// A row on chip, in a warp, a small or a large block; else two passes.
const FORWARD: Kernel = vector::cuda(SOURCE, ["softmax_fwd_v3", "softmax_fwd_warp_v3"], DType::FLOATS, always, |p| {
    let entries = ["softmax_fwd_warp_v3", "softmax_fwd_block_v3", "softmax_fwd_wide_v3", "softmax_fwd_long_v3"];
    Plan::of(vector::rows(p, &entries, [32; 3]))
});
const FORWARD_RUNGS: &[Kernel] = &fours(
    SOURCE,
    "softmax_fwd_fours",
    above(FORWARD, rungs(SOURCE, "softmax_fwd", cpu::softmax, ["softmax_fwd", "softmax_fwd_v2"], PLANS)),
);
const BACKWARD: Kernel = vector::cuda(SOURCE, ["softmax_bwd_v3", "softmax_bwd_warp_v3"], DType::FLOATS, always, |p| {
    let entries = ["softmax_bwd_warp_v3", "softmax_bwd_block_v3", "softmax_bwd_wide_v3", "softmax_bwd_long_v3"];
    Plan::of(vector::rows(p, &entries, [32, 32, 16]))
});

/// y = exp(x) / sum exp(x) over the last axis; x and y `[.., v]` of one float type.
#[derive(Clone, Copy, Debug)]
pub struct Softmax;

/// y = x - log sum exp(x) over the last axis; x and y `[.., v]` of one float type.
#[derive(Clone, Copy, Debug)]
pub struct LogSoftmax;

/// Softmax: dx = y (dy - sum(dy y)); log-softmax: dx = dy - exp(y) sum(dy). Inputs y and dy of one shape.
#[derive(Clone, Copy, Debug)]
pub struct SoftmaxBackward {
    /// The backward of log-softmax.
    pub log: bool,
}

fn check(op: &'static str, inputs: &[Meta], count: usize) -> Result<Vec<Meta>> {
    let broken = |rule| Error::Shape { op, rule, got: shape::list(inputs) };
    match inputs {
        [x, ..] if !x.dtype.is_float() => Err(Error::Dtype { op, expected: "a float type", got: shape::list(inputs) }),
        [x, rest @ ..] if inputs.len() == count && rest.iter().all(|m| m == x) => {
            if x.shape.rank() > 0 && x.shape.last() > 0 { Ok(vec![*x]) } else { Err(broken("a last axis above 0")) }
        }
        _ => Err(broken(if count == 1 { "one input" } else { "y and dy of one shape and type" })),
    }
}

/// Parameter words of the row kernels: rows, v, log, smoothing.
fn words(x: &Meta, log: bool, smoothing: f32) -> Params {
    Params::new().u(x.shape.rows()).u(x.shape.last()).flag(log).f(smoothing)
}

/// Maximum of one row, and sum of exp(x - maximum), in f64.
fn exp_sum(x: &[f64]) -> (f64, f64) {
    let most = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    (most, x.iter().map(|v| (v - most).exp()).sum())
}

/// log sum exp of one row in f64.
fn log_sum_exp(x: &[f64]) -> f64 {
    let (most, sum) = exp_sum(x);
    most + sum.ln()
}

/// Reads (and writes) of the tensors, and an exponential per element.
fn cost(inputs: &[Meta], outputs: &[Meta]) -> Cost {
    let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
    Cost { flops: 5.0 * inputs[0].count() as f64, bytes }
}

impl Op for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        check(self.name(), inputs, 1)
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let rows = inputs[0].data.chunks(inputs[0].shape.last());
        let softmax = |row: &[f64]| {
            let (most, sum) = exp_sum(row);
            row.iter().map(|x| (x - most).exp() / sum).collect::<Vec<_>>()
        };
        vec![rows.flat_map(softmax).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        FORWARD_RUNGS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        words(&inputs[0], false, 0.0)
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[], outputs: &[0] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(g.one(&SoftmaxBackward { log: false }, &[g.output(0)?, g.grad(0)?])?)])
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        cost(inputs, outputs)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for LogSoftmax {
    fn name(&self) -> &'static str {
        "log_softmax"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        check(self.name(), inputs, 1)
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let rows = inputs[0].data.chunks(inputs[0].shape.last());
        let log_softmax = |row: &[f64]| {
            let (most, sum) = exp_sum(row);
            row.iter().map(|x| (x - most) - sum.ln()).collect::<Vec<_>>()
        };
        vec![rows.flat_map(log_softmax).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        FORWARD_RUNGS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        words(&inputs[0], true, 0.0)
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[], outputs: &[0] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(g.one(&SoftmaxBackward { log: true }, &[g.output(0)?, g.grad(0)?])?)])
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        cost(inputs, outputs)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for SoftmaxBackward {
    fn name(&self) -> &'static str {
        if self.log { "log_softmax_bwd" } else { "softmax_bwd" }
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        check(self.name(), inputs, 2)
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let v = inputs[0].shape.last();
        let rows = inputs[0].data.chunks(v).zip(inputs[1].data.chunks(v));
        let backward = |(y, dy): (&[f64], &[f64])| {
            let pairs = y.iter().zip(dy);
            if self.log {
                let total: f64 = dy.iter().sum();
                return pairs.map(|(y, dy)| dy - y.exp() * total).collect::<Vec<_>>();
            }
            let total: f64 = pairs.clone().map(|(y, dy)| y * dy).sum();
            pairs.map(|(y, dy)| y * (dy - total)).collect()
        };
        vec![rows.flat_map(backward).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const ROWS: [Kernel; 4] =
            rungs(SOURCE, "softmax_bwd", cpu::softmax_backward, ["softmax_bwd", "softmax_bwd_v2"], PLANS);
        const KERNELS: &[Kernel] = &above(BACKWARD, ROWS);
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        words(&inputs[0], self.log, 0.0)
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        cost(inputs, outputs)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
