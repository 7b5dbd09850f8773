//! Divergence between the teacher's and the student's words, from hidden states and heads.

use std::any::Any;

use super::plan::Rung;
use super::{check_chunk, check_heads, check_rows, groups, logits, plan, row, through};
use crate::cpu;
use crate::dtype::DType;
use crate::error::Result;
use crate::kernel::{Kernel, Params};
use crate::op::{Array, Cost, Gradient, Op, Saves};
use crate::ops::distill::{Direction, Divergence, Kl, KlBackward};
use crate::shape::Meta;
use crate::tensor::Tensor;

/// [`Kl`] between the logits of a teacher and a student head, `chunk` tokens at a time.
///
/// Inputs: student hidden `[n, d_s]`, student weight `[v, d_s]`, teacher hidden `[n, d_t]`, teacher weight `[v, d_t]`
/// of one float type, row weights f32 `[n]`. Outputs, f32 `[n]`: loss, log sum exp of student / T and of teacher / T,
/// and the expectation that backward subtracts. No buffer of tokens times vocabulary is held for teacher, student or
/// gradient: at most `chunk` tokens times 2,048 words for each.
#[derive(Clone, Copy, Debug)]
pub struct LinearKl {
    pub direction: Direction,
    pub temperature: f32,
    /// Multiply by T^2, so that the gradient keeps its scale over T.
    pub squared: bool,
    /// Tokens whose logits exist at a time.
    pub chunk: usize,
}

/// Gradients of [`LinearKl`] for the student's hidden states and head.
/// Inputs: those of [`LinearKl`], its three statistics, dloss f32 `[n]`.
#[derive(Clone, Copy, Debug)]
pub struct LinearKlBackward {
    pub direction: Direction,
    pub temperature: f32,
    pub squared: bool,
    pub chunk: usize,
}

const RULE: &str = "student hidden [n, d], student weight [v, d], teacher hidden [n, e], teacher weight [v, e], one f32 [n] for each row value";

/// Parameter words of the CPU kernels: n, d_s, d_t, v, chunk, then those of the divergence.
fn words(inputs: &[Meta], chunk: usize, divergence: Divergence) -> Params {
    let [hidden, weight, teacher] = [0, 1, 2].map(|i| inputs[i].shape);
    divergence.words(Params::new().u(hidden.rows()).u(hidden.last()).u(teacher.last()).u(weight.rows()).u(chunk))
}

fn cost(inputs: &[Meta], outputs: &[Meta], student_products: f64) -> Cost {
    let [n, d, e, v] = [inputs[0].shape.rows(), inputs[0].shape.last(), inputs[2].shape.last(), inputs[1].shape.rows()]
        .map(|x| x as f64);
    let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
    Cost { flops: n * v * (2.0 * d * student_products + 2.0 * e + 12.0), bytes }
}

impl LinearKl {
    pub(super) fn divergence(&self) -> Divergence {
        Divergence { direction: self.direction, temperature: self.temperature, squared: self.squared }
    }
}

impl LinearKlBackward {
    pub(super) fn divergence(&self) -> Divergence {
        Divergence { direction: self.direction, temperature: self.temperature, squared: self.squared }
    }
}

impl Op for LinearKl {
    fn name(&self) -> &'static str {
        "linear_kl"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        self.divergence().check(self.name())?;
        check_chunk(self.name(), self.chunk)?;
        let n = check_heads(self.name(), RULE, inputs, &[[0, 1], [2, 3]])?;
        check_rows(self.name(), RULE, inputs, n, &[(4, DType::F32)])?;
        Ok(vec![row(n)?; 4])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (Ok(student), Ok(teacher)) = (logits(&inputs[0], &inputs[1]), logits(&inputs[2], &inputs[3])) else {
            return Vec::new();
        };
        let op = Kl { direction: self.direction, temperature: self.temperature, squared: self.squared };
        op.reference(&[student, teacher, inputs[4].clone()])
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("linear_kl_fwd", DType::FLOATS, cpu::linear_kl),
            groups::forward("linear_kl_fwd_wgmma", "kl_tiles_wgmma", groups::kl),
            plan::tensor("linear_kl_fwd_mma", |p| plan::kl(p, Rung::Large)),
            plan::tensor_small("linear_kl_fwd_small_mma", |p| plan::kl(p, Rung::Small)),
            plan::kernel("linear_kl_fwd", |p| plan::kl(p, Rung::Registers)),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        words(inputs, self.chunk, self.divergence())
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[0, 1, 2, 3, 4], outputs: &[1, 2, 3] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let op = LinearKlBackward {
            direction: self.direction,
            temperature: self.temperature,
            squared: self.squared,
            chunk: self.chunk,
        };
        let mut inputs = Vec::with_capacity(9);
        for i in 0..5 {
            inputs.push(g.input(i)?);
        }
        for i in 1..4 {
            inputs.push(g.output(i)?);
        }
        inputs.push(g.grad(0)?);
        Ok(g.run(&op, &inputs)?.into_iter().map(Some).chain([None, None, None]).collect())
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        cost(inputs, outputs, 1.0)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for LinearKlBackward {
    fn name(&self) -> &'static str {
        "linear_kl_bwd"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        self.divergence().check(self.name())?;
        check_chunk(self.name(), self.chunk)?;
        let n = check_heads(self.name(), RULE, inputs, &[[0, 1], [2, 3]])?;
        check_rows(self.name(), RULE, inputs, n, &[4, 5, 6, 7, 8].map(|i| (i, DType::F32)))?;
        Ok(vec![inputs[0], inputs[1]])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (Ok(student), Ok(teacher)) = (logits(&inputs[0], &inputs[1]), logits(&inputs[2], &inputs[3])) else {
            return Vec::new();
        };
        let op = KlBackward { direction: self.direction, temperature: self.temperature, squared: self.squared };
        let rows = [4, 5, 6, 7, 8].map(|i| inputs[i].clone());
        let all: Vec<Array> = [student, teacher].into_iter().chain(rows).collect();
        through(&inputs[0], &inputs[1], &op.reference(&all)[0])
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("linear_kl_bwd", DType::FLOATS, cpu::linear_kl_backward),
            groups::backward("linear_kl_bwd_wgmma", "kl_planes_wgmma", groups::kl_backward),
            plan::tensor("linear_kl_bwd_mma", |p| plan::kl_backward(p, Rung::Large)),
            plan::tensor_small("linear_kl_bwd_small_mma", |p| plan::kl_backward(p, Rung::Small)),
            plan::kernel("linear_kl_bwd", |p| plan::kl_backward(p, Rung::Registers)),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        words(inputs, self.chunk, self.divergence())
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        cost(inputs, outputs, 3.0)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
