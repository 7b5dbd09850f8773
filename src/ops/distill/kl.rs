//! Kullback-Leibler divergences between the teacher's and the student's distributions over a vocabulary.

use std::any::Any;

use super::{SOURCE, check_pair};
use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Launch, Params, Plan, Problem, always};
use crate::op::{Array, Cost, Gradient, Op, Saves};
use crate::ops::rows::{BLOCK, PLANS, gpu, rungs};
use crate::ops::vector::{self, above};
use crate::shape::Meta;
use crate::tensor::Tensor;

/// Which divergence, p the teacher's and q the student's distribution.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Direction {
    /// KL(p || q) = sum p log(p / q), Hinton et al. 2015.
    Forward,
    /// KL(q || p).
    Reverse,
    /// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1 (Agarwal et al. 2024).
    Jsd { beta: f32 },
}

impl Direction {
    pub(crate) const fn code(self) -> usize {
        match self {
            Direction::Forward => 0,
            Direction::Reverse => 1,
            Direction::Jsd { .. } => 2,
        }
    }

    pub(crate) const fn beta(self) -> f32 {
        if let Direction::Jsd { beta } = self { beta } else { 0.5 }
    }
}

/// A divergence with its temperature: the fields that [`Kl`] and the fused form over a vocabulary share.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Divergence {
    pub direction: Direction,
    pub temperature: f32,
    pub squared: bool,
}

impl Divergence {
    pub fn check(&self, op: &'static str) -> Result<()> {
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            let value = self.temperature.to_string();
            return Err(Error::Parameter { op, parameter: "temperature", value, allowed: "above 0 and finite" });
        }
        match self.direction {
            Direction::Jsd { beta } if !(beta > 0.0 && beta < 1.0) => Err(Error::Parameter {
                op,
                parameter: "beta",
                value: beta.to_string(),
                allowed: "between 0 and 1, exclusive",
            }),
            _ => Ok(()),
        }
    }

    /// T^2, or 1.
    pub fn factor(&self) -> f32 {
        if self.squared { self.temperature * self.temperature } else { 1.0 }
    }

    /// Parameter words after the extents: direction, beta, 1 / T, T^2 or 1.
    pub fn words(&self, extents: Params) -> Params {
        extents.u(self.direction.code()).f(self.direction.beta()).f(1.0 / self.temperature).f(self.factor())
    }

    /// loss, lse of the student, lse of the teacher, expectation, of one row in f64.
    pub fn score(&self, student: &[f64], teacher: &[f64], weight: f64) -> [f64; 4] {
        let (log_q, lse_s) = self.log_softmax(student);
        let (log_p, lse_t) = self.log_softmax(teacher);
        let kl = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a.exp() * (a - b)).sum::<f64>();
        let (value, expectation) = match self.direction {
            Direction::Forward => (kl(&log_p, &log_q), 0.0),
            Direction::Reverse => (kl(&log_q, &log_p), kl(&log_q, &log_p)),
            Direction::Jsd { beta } => {
                let log_m = mixture(f64::from(beta), &log_p, &log_q);
                let (p, q) = (f64::from(beta) * kl(&log_p, &log_m), (1.0 - f64::from(beta)) * kl(&log_q, &log_m));
                (p + q, q)
            }
        };
        [weight * f64::from(self.factor()) * value, lse_s, lse_t, expectation]
    }

    /// d loss / d student logits of one row in f64, from saved statistics.
    pub fn slope(&self, student: &[f64], teacher: &[f64], [lse_s, lse_t, expectation]: [f64; 3]) -> Vec<f64> {
        let t = f64::from(self.temperature);
        let log_q: Vec<f64> = student.iter().map(|z| z / t - lse_s).collect();
        let log_p: Vec<f64> = teacher.iter().map(|z| z / t - lse_t).collect();
        let pairs = log_q.iter().zip(&log_p);
        let slopes: Vec<f64> = match self.direction {
            Direction::Forward => pairs.map(|(q, p)| q.exp() - p.exp()).collect(),
            Direction::Reverse => pairs.map(|(q, p)| q.exp() * (q - p - expectation)).collect(),
            Direction::Jsd { beta } => {
                let beta = f64::from(beta);
                let log_m = mixture(beta, &log_p, &log_q);
                log_q.iter().zip(&log_m).map(|(q, m)| q.exp() * ((1.0 - beta) * (q - m) - expectation)).collect()
            }
        };
        slopes.into_iter().map(|s| s * f64::from(self.factor()) / t).collect()
    }

    fn log_softmax(&self, z: &[f64]) -> (Vec<f64>, f64) {
        let z: Vec<f64> = z.iter().map(|z| z / f64::from(self.temperature)).collect();
        let most = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let lse = most + z.iter().map(|z| (z - most).exp()).sum::<f64>().ln();
        (z.iter().map(|z| z - lse).collect(), lse)
    }
}

/// log(beta p + (1 - beta) q) from logarithms.
fn mixture(beta: f64, log_p: &[f64], log_q: &[f64]) -> Vec<f64> {
    let log = |(p, q): (&f64, &f64)| {
        let (p, q) = (p + beta.ln(), q + (1.0 - beta).ln());
        p.max(q) + (-(p - q).abs()).exp().ln_1p()
    };
    log_p.iter().zip(log_q).map(log).collect()
}

/// loss_i = w_i D(p_i, q_i) (T^2), p = softmax(teacher / T), q = softmax(student / T).
///
/// Inputs: student and teacher logits `[n, v]` of one float type, row weights f32 `[n]`. Outputs, f32 `[n]`: loss, log
/// sum exp of student / T and of teacher / T, and the expectation under q that backward subtracts (0 for `Forward`).
#[derive(Clone, Copy, Debug)]
pub struct Kl {
    pub direction: Direction,
    pub temperature: f32,
    /// Multiply by T^2, so that the gradient keeps its scale over T.
    pub squared: bool,
}

/// Gradient of [`Kl`] for the student's logits. Inputs: student, teacher, weights, the three statistics, dloss `[n]`.
#[derive(Clone, Copy, Debug)]
pub struct KlBackward {
    pub direction: Direction,
    pub temperature: f32,
    pub squared: bool,
}

impl Kl {
    fn divergence(&self) -> Divergence {
        Divergence { direction: self.direction, temperature: self.temperature, squared: self.squared }
    }
}

impl KlBackward {
    fn divergence(&self) -> Divergence {
        Divergence { direction: self.direction, temperature: self.temperature, squared: self.squared }
    }
}

fn extents(x: &Meta) -> Params {
    Params::new().u(x.shape.rows()).u(x.shape.last())
}

impl Op for Kl {
    fn name(&self) -> &'static str {
        "kl"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        self.divergence().check(self.name())?;
        let row = check_pair(self.name(), "student and teacher [n, v], v above 0, weights [n]", inputs, &[])?;
        Ok(vec![row; 4])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let v = inputs[0].shape.last();
        let mut outputs = vec![Vec::new(); 4];
        for ((s, t), &w) in inputs[0].data.chunks(v).zip(inputs[1].data.chunks(v)).zip(&inputs[2].data) {
            for (output, value) in outputs.iter_mut().zip(self.divergence().score(s, t, w)) {
                output.push(value);
            }
        }
        outputs
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &above(FORWARD, rungs(SOURCE, "kl_fwd", cpu::kl, ["kl_fwd", "kl_fwd_v2"], PLANS));
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        self.divergence().words(extents(&inputs[0]))
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[0, 1, 2], outputs: &[1, 2, 3] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let op = KlBackward { direction: self.direction, temperature: self.temperature, squared: self.squared };
        let saved = [g.output(1)?, g.output(2)?, g.output(3)?];
        let inputs = [g.input(0)?, g.input(1)?, g.input(2)?, saved[0], saved[1], saved[2], g.grad(0)?];
        Ok(vec![Some(g.one(&op, &inputs)?), None, None])
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
        Cost { flops: 12.0 * inputs[0].count() as f64, bytes }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for KlBackward {
    fn name(&self) -> &'static str {
        "kl_bwd"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        self.divergence().check(self.name())?;
        let row = inputs.get(2).copied();
        let rest: Vec<Meta> = row.into_iter().cycle().take(4).collect();
        check_pair(self.name(), "student and teacher [n, v], weights, three statistics and dloss [n]", inputs, &rest)?;
        Ok(vec![inputs[0]])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let v = inputs[0].shape.last();
        let rows = inputs[0].data.chunks(v).zip(inputs[1].data.chunks(v)).enumerate();
        let at = |input: usize, row: usize| inputs[input].data[row];
        let slope = |(row, (s, t)): (usize, (&[f64], &[f64]))| {
            let slopes = self.divergence().slope(s, t, [at(3, row), at(4, row), at(5, row)]);
            slopes.into_iter().map(move |x| x * at(2, row) * at(6, row)).collect::<Vec<_>>()
        };
        vec![rows.flat_map(slope).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("kl_bwd", DType::FLOATS, cpu::kl_backward),
            vector::cuda(SOURCE, ["kl_bwd_v2"; 2], DType::FLOATS, always, |p| Plan::of(vector::parts(p))),
            gpu(SOURCE, "kl_bwd", always, elements),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        self.divergence().words(extents(&inputs[0]))
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
        Cost { flops: 10.0 * inputs[0].count() as f64, bytes }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// One pass over both rows.
const FORWARD: Kernel = vector::cuda(SOURCE, ["kl_fwd_v3", "kl_fwd_warp_v3"], DType::FLOATS, always, |p| {
    Plan::of(vector::rows(p, &["kl_fwd_warp_v3", "kl_fwd_block_v3", "kl_fwd_wide_v3"], [32; 3]))
});

/// Four neighbouring elements per invocation.
fn elements(p: &Problem) -> Plan {
    Plan::of(Launch::linear(p.outputs[0].count().div_ceil(4), BLOCK, p.params()).trips(4))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::Shape;

    fn array(dims: &[usize], data: &[f64]) -> Array {
        Array { shape: Shape::new(dims).unwrap(), data: data.to_vec() }
    }

    /// z_S = [0, 0], z_T = [ln 3, 0]: KL = 0.75 ln 1.5 + 0.25 ln 0.5, gradient [-0.25, 0.25].
    #[test]
    fn two_words_by_hand() {
        let inputs = [array(&[1, 2], &[0.0, 0.0]), array(&[1, 2], &[3f64.ln(), 0.0]), array(&[1], &[1.0])];
        let op = Kl { direction: Direction::Forward, temperature: 1.0, squared: true };
        let outputs = op.reference(&inputs);
        approx::assert_abs_diff_eq!(outputs[0][0], 0.130_812, epsilon = 1e-6);
        let saved: Vec<Array> = outputs[1..].iter().map(|o| array(&[1], o)).collect();
        let all: Vec<Array> = inputs.into_iter().chain(saved).chain([array(&[1], &[1.0])]).collect();
        let backward = KlBackward { direction: Direction::Forward, temperature: 1.0, squared: true };
        let slopes = &backward.reference(&all)[0];
        approx::assert_abs_diff_eq!(slopes[0], -0.25, epsilon = 1e-12);
        approx::assert_abs_diff_eq!(slopes[1], 0.25, epsilon = 1e-12);
    }

    /// d (T^2 KL) / d z = T (softmax(z_S / T) - softmax(z_T / T)).
    #[test]
    fn squared_temperature_gradient() {
        let t = 4.0;
        let (s, z) = ([0.3, -1.2, 2.0], [1.0, 0.4, -0.7]);
        let softmax = |z: &[f64]| {
            let e: Vec<f64> = z.iter().map(|z| (z / t).exp()).collect();
            let total: f64 = e.iter().sum();
            e.iter().map(|e| e / total).collect::<Vec<_>>()
        };
        let divergence = Divergence { direction: Direction::Forward, temperature: t as f32, squared: true };
        let [_, lse_s, lse_t, expectation] = divergence.score(&s, &z, 1.0);
        let got = divergence.slope(&s, &z, [lse_s, lse_t, expectation]);
        for ((got, q), p) in got.iter().zip(softmax(&s)).zip(softmax(&z)) {
            approx::assert_abs_diff_eq!(*got, t * (q - p), epsilon = 1e-12);
        }
    }

    #[test]
    fn equal_distributions_have_no_divergence() {
        let z = [0.5, -2.0, 3.0, 1.0];
        let shifted = z.map(|z| z + 7.0);
        for direction in [Direction::Forward, Direction::Reverse, Direction::Jsd { beta: 0.3 }] {
            let divergence = Divergence { direction, temperature: 2.0, squared: false };
            approx::assert_abs_diff_eq!(divergence.score(&z, &shifted, 1.0)[0], 0.0, epsilon = 1e-12);
        }
        // Between disjoint distributions JSD(1/2) is ln 2.
        let half = Divergence { direction: Direction::Jsd { beta: 0.5 }, temperature: 1.0, squared: false };
        approx::assert_abs_diff_eq!(half.score(&[80.0, 0.0], &[0.0, 80.0], 1.0)[0], 2f64.ln(), epsilon = 1e-12);
    }

    #[test]
    fn parameters_outside_their_domain_are_refused() {
        let metas = [Meta::new(&[2, 3], DType::F32), Meta::new(&[2, 3], DType::F32), Meta::new(&[2], DType::F32)];
        let metas = metas.map(Result::unwrap);
        for (direction, temperature) in [(Direction::Forward, 0.0), (Direction::Jsd { beta: 1.0 }, 1.0)] {
            let error = Kl { direction, temperature, squared: false }.infer(&metas).unwrap_err();
            assert_eq!(error.code(), "E-PARAMETER");
        }
    }
}
