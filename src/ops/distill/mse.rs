//! Squared error between hidden states.

use std::any::Any;

use super::{SOURCE, check_pair, vector};
use crate::cpu;
use crate::dtype::DType;
use crate::error::Result;
use crate::kernel::{Kernel, Launch, Params, Plan, Problem, always};
use crate::op::{Array, Cost, Gradient, Op, Saves};
use crate::ops::rows::{BLOCK, gpu};
use crate::shape::{Meta, Shape};
use crate::tensor::Tensor;

/// How squared differences become one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reduction {
    /// 1/2 sum_i w_i sum_j (t_ij - s_ij)^2: Eq 10 of LightChatGLM to the letter, growing with batch and width.
    HalfSum,
    /// sum_i w_i mean_j (t_ij - s_ij)^2 / sum_i w_i.
    Mean,
}

/// Squared error of student and teacher hidden states.
///
/// Inputs: student and teacher `[n, d]` of one float type, row weights f32 `[n]`. Outputs: loss f32 `[]`, and what
/// backward needs of it, f32 `[4]`: sum of weights, mean row norms of student and teacher, and
/// sum_i w_i u_i . (u_i - v_i) of the normalised rows u, v.
#[derive(Clone, Copy, Debug)]
pub struct HiddenMse {
    pub reduction: Reduction,
    /// Divide student and teacher each by its own mean row L2 norm, weighted like the rows (BMCook). The gradient
    /// goes through the normaliser.
    pub normalised: bool,
}

/// Gradient of [`HiddenMse`] for the student. Inputs: student, teacher, weights, statistics `[4]`, dloss `[]`.
#[derive(Clone, Copy, Debug)]
pub struct HiddenMseBackward {
    pub reduction: Reduction,
    pub normalised: bool,
}

/// The factor of the weighted sum of squares.
fn factor(reduction: Reduction, d: usize, weights: f64) -> f64 {
    match reduction {
        Reduction::HalfSum => 0.5,
        Reduction::Mean if weights > 0.0 => 1.0 / (d as f64 * weights),
        // Every row is masked.
        Reduction::Mean => 0.0,
    }
}

fn inverse(x: f64) -> f64 {
    if x > 0.0 { 1.0 / x } else { 0.0 }
}

fn row_norm(row: &[f64]) -> f64 {
    row.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Sum of weights, and the normalisers of student and teacher (1 where not normalised).
fn normalisers(normalised: bool, student: &[f64], teacher: &[f64], weights: &[f64], d: usize) -> [f64; 3] {
    let total: f64 = weights.iter().sum();
    let mean = |x: &[f64]| x.chunks(d).zip(weights).map(|(row, w)| w * row_norm(row)).sum::<f64>() * inverse(total);
    if normalised { [total, mean(student), mean(teacher)] } else { [total, 1.0, 1.0] }
}

fn words(x: Shape, reduction: Reduction, normalised: bool) -> Params {
    // The shader's block ends in two words that only the divergences read.
    Params::new().u(x.rows()).u(x.last()).flag(reduction == Reduction::Mean).flag(normalised).u(0).u(0)
}

impl Op for HiddenMse {
    fn name(&self) -> &'static str {
        "hidden_mse"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        check_pair(self.name(), "student and teacher [n, d], d above 0, weights [n]", inputs, &[])?;
        Ok(vec![Meta::new(&[], DType::F32)?, vector(4)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let [student, teacher, weights] = [0, 1, 2].map(|i| inputs[i].data.as_slice());
        let d = inputs[0].shape.last();
        let [total, ms, mt] = normalisers(self.normalised, student, teacher, weights, d);
        let (mut squares, mut along) = (0.0, 0.0);
        for ((s, t), w) in student.chunks(d).zip(teacher.chunks(d)).zip(weights) {
            for (s, t) in s.iter().zip(t) {
                let (u, v) = (s * inverse(ms), t * inverse(mt));
                squares += w * (u - v).powi(2);
                along += w * u * (u - v);
            }
        }
        vec![vec![factor(self.reduction, d, total) * squares], vec![total, ms, mt, along]]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("hidden_mse_fwd", DType::FLOATS, cpu::hidden_mse),
            gpu(SOURCE, "hidden_mse_fwd", always, forward),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        words(inputs[0].shape, self.reduction, self.normalised)
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[0, 1, 2], outputs: &[1] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let op = HiddenMseBackward { reduction: self.reduction, normalised: self.normalised };
        let inputs = [g.input(0)?, g.input(1)?, g.input(2)?, g.output(1)?, g.grad(0)?];
        Ok(vec![Some(g.one(&op, &inputs)?), None, None])
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
        Cost { flops: 3.0 * inputs[0].count() as f64, bytes }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for HiddenMseBackward {
    fn name(&self) -> &'static str {
        "hidden_mse_bwd"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let rule = "student and teacher [n, d], weights [n], statistics [4], dloss []";
        check_pair(self.name(), rule, inputs, &[vector(4)?, Meta::new(&[], DType::F32)?])?;
        Ok(vec![inputs[0]])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let [student, teacher, weights, statistics, dloss] = [0, 1, 2, 3, 4].map(|i| inputs[i].data.as_slice());
        let d = inputs[0].shape.last();
        let [total, ms, mt, along] = [0, 1, 2, 3].map(|i| statistics[i]);
        let scale = 2.0 * factor(self.reduction, d, total) * dloss[0];
        let mut ds = Vec::with_capacity(student.len());
        for ((s, t), w) in student.chunks(d).zip(teacher.chunks(d)).zip(weights) {
            // d mean norm / d s = w s / (|s| sum w); 0 at a row of zeros.
            let through =
                if self.normalised { along * inverse(ms) * inverse(row_norm(s)) * inverse(total) } else { 0.0 };
            let slope =
                |(s, t): (&f64, &f64)| scale * w * ((s * inverse(ms) - t * inverse(mt)) * inverse(ms) - through * s);
            ds.extend(s.iter().zip(t).map(slope));
        }
        vec![ds]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("hidden_mse_bwd", DType::FLOATS, cpu::hidden_mse_backward),
            gpu(SOURCE, "hidden_mse_bwd", always, |p| Plan::of(rows(p))),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        words(inputs[0].shape, self.reduction, self.normalised)
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
        Cost { flops: 4.0 * inputs[0].count() as f64, bytes }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn rows(p: &Problem) -> Launch {
    let x = p.inputs[0].shape;
    Launch::linear(x.rows(), BLOCK, p.params()).trips(2 * (x.last() + x.last().div_ceil(32)))
}

/// Row norms, their means, row sums, their totals; the norms only where they are asked for.
fn forward(p: &Problem) -> Plan {
    let n = p.inputs[0].shape.rows();
    let total = |entry| Launch::new([1, 1, 1], p.params()).entry(entry).trips(n.div_ceil(128) + 8);
    let launches = [rows(p).entry("hidden_mse_norms"), total("hidden_mse_means"), rows(p), total("hidden_mse_total")];
    let normalised = p.op::<HiddenMse>().is_some_and(|op| op.normalised);
    Plan::sequence(launches.into_iter().skip(usize::from(!normalised)).collect()).scratch(n * 8).scratch(n * 8)
}
