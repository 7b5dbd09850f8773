//! Cross-entropy of logits against target indices, with an ignore mark and label smoothing.

use std::any::Any;

use super::{SOURCE, cost, log_sum_exp, words};
use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Launch, Params, Plan, Problem, always};
use crate::op::{Array, Cost, Gradient, Op, Saves};
use crate::ops::rows::{BLOCK, PLANS, gpu, rungs};
use crate::ops::vector::{self, above};
use crate::shape::{self, Meta};
use crate::tensor::Tensor;

pub use crate::cpu::IGNORE;

/// loss = lse(z) - (1 - s) z_target - s mean(z), s the label smoothing (Szegedy et al. 2016).
///
/// Inputs: logits `[n, v]` (any float type), targets u32 `[n]`. Outputs: loss and lse = log sum exp(z), f32 `[n]`; both
/// are 0 where the target is [`IGNORE`]. A target of v or more that is not `IGNORE` gives a NaN loss.
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropy {
    pub smoothing: f32,
}

/// dlogits = dloss (softmax(z) - (1 - s) onehot(target) - s / v). Inputs: logits, targets, lse and dloss f32 `[n]`.
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropyBackward {
    pub smoothing: f32,
}

pub(crate) fn check_smoothing(op: &'static str, smoothing: f32) -> Result<()> {
    if (0.0..1.0).contains(&smoothing) {
        return Ok(());
    }
    Err(Error::Parameter { op, parameter: "smoothing", value: smoothing.to_string(), allowed: "0 to below 1" })
}

/// Checks logits and targets and then `statistics` f32 vectors; gives the meta of such a vector.
fn check(op: &'static str, inputs: &[Meta], statistics: usize) -> Result<Meta> {
    let broken = |rule| Error::Shape { op, rule, got: shape::list(inputs) };
    let [logits, targets, rest @ ..] = inputs else {
        return Err(broken("logits [n, v], targets [n]"));
    };
    if !logits.dtype.is_float() || targets.dtype != DType::U32 {
        return Err(Error::Dtype { op, expected: "float logits, u32 targets", got: shape::list(inputs) });
    }
    let &[n, v] = logits.dims() else {
        return Err(broken("logits [n, v]"));
    };
    let row = Meta::new(&[n], DType::F32)?;
    if v == 0 || targets.dims() != [n] || rest.len() != statistics || rest.iter().any(|m| *m != row) {
        return Err(broken("logits [n, v], v above 0; targets and f32 statistics [n]"));
    }
    Ok(row)
}

/// The index a row is scored against: `None` to ignore it, a NaN score for one outside the row.
pub(super) fn target(value: f64) -> Option<usize> {
    (value != f64::from(IGNORE)).then_some(value as usize)
}

impl Op for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        check_smoothing(self.name(), self.smoothing)?;
        let row = check(self.name(), inputs, 0)?;
        Ok(vec![row, row])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let s = f64::from(self.smoothing);
        let rows = inputs[0].data.chunks(inputs[0].shape.last()).zip(&inputs[1].data);
        let score = |(z, &t): (&[f64], &f64)| {
            let Some(t) = target(t) else {
                return (0.0, 0.0);
            };
            let lse = log_sum_exp(z);
            let mean = z.iter().sum::<f64>() / z.len() as f64;
            (lse - (1.0 - s) * z.get(t).copied().unwrap_or(f64::NAN) - s * mean, lse)
        };
        let (loss, lse) = rows.map(score).unzip();
        vec![loss, lse]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const ROWS: [Kernel; 4] = rungs(
            SOURCE,
            "cross_entropy_fwd",
            cpu::cross_entropy,
            ["cross_entropy_fwd", "cross_entropy_fwd_v2"],
            PLANS,
        );
        const KERNELS: &[Kernel] = &above(FORWARD, ROWS);
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        words(&inputs[0], false, self.smoothing)
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[0, 1], outputs: &[1] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let op = CrossEntropyBackward { smoothing: self.smoothing };
        Ok(vec![Some(g.one(&op, &[g.input(0)?, g.input(1)?, g.output(1)?, g.grad(0)?])?), None])
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        cost(inputs, outputs)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for CrossEntropyBackward {
    fn name(&self) -> &'static str {
        "cross_entropy_bwd"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        check_smoothing(self.name(), self.smoothing)?;
        check(self.name(), inputs, 2)?;
        Ok(vec![inputs[0]])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (v, s) = (inputs[0].shape.last(), f64::from(self.smoothing));
        let [targets, lse, dloss] = [1, 2, 3].map(|i| &inputs[i].data);
        let mut dz = Vec::with_capacity(inputs[0].data.len());
        for (row, z) in inputs[0].data.chunks(v).enumerate() {
            let t = target(targets[row]);
            for (j, z) in z.iter().enumerate() {
                let onehot = f64::from(t == Some(j));
                let slope = (z - lse[row]).exp() - (1.0 - s) * onehot - s / v as f64;
                dz.push(if t.is_some() { dloss[row] * slope } else { 0.0 });
            }
        }
        vec![dz]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("cross_entropy_bwd", DType::FLOATS, cpu::cross_entropy_backward),
            vector::cuda(SOURCE, ["cross_entropy_bwd_v2"; 2], DType::FLOATS, always, |p| Plan::of(vector::parts(p))),
            gpu(SOURCE, "cross_entropy_bwd", always, elements),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        words(&inputs[0], false, self.smoothing)
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        cost(inputs, outputs)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// One pass over a row, which nothing needs twice.
const FORWARD: Kernel =
    vector::cuda(SOURCE, ["cross_entropy_fwd_v3", "cross_entropy_fwd_warp_v3"], DType::FLOATS, always, |p| {
        let entries = ["cross_entropy_fwd_warp_v3", "cross_entropy_fwd_block_v3", "cross_entropy_fwd_wide_v3"];
        Plan::of(vector::rows(p, &entries, [32; 3]))
    });

/// Four neighbouring elements per invocation: rows need no loop once their log sum exp is known.
fn elements(p: &Problem) -> Plan {
    Plan::of(Launch::linear(p.outputs[0].count().div_ceil(4), BLOCK, p.params()).trips(4))
}
