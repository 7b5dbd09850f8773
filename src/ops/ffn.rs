//! The feed-forward block of a transformer, both matrices and the activation in one op, forward and backward.

mod cases;
mod groups;
mod plan;
mod reference;

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Params};
use crate::op::{Array, Cost, Family, Gradient, Op, Saves};
use crate::shape::{self, Meta, Shape};
use crate::tensor::Tensor;

pub static FAMILY: Family = Family { name: "ffn", cases: cases::cases, source: Some(plan::SOURCE) };

/// What stands between the two matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FfnActivation {
    Relu,
    /// The tanh form (Hendrycks and Gimpel 2016).
    Gelu,
    /// gelu(gate) value (Shazeer 2020, "GLU variants improve transformer"); the first half of z is the gate.
    Geglu,
}

impl FfnActivation {
    /// The kernels' code.
    const fn code(self) -> usize {
        self as usize
    }

    /// Rows of w1 for each column of w2.
    pub const fn halves(self) -> usize {
        if matches!(self, FfnActivation::Geglu) { 2 } else { 1 }
    }
}

/// y = act(x w1ᵀ + b1) w2ᵀ + b2.
///
/// Inputs x `[.., d]`, w1 `[f, d]` (`[2 f, d]` for GEGLU, gate rows first), b1 `[f]` (`[2 f]`), w2 `[d2, f]`, b2 `[d2]`, one
/// float type. Outputs y `[.., d2]` and the saved z = x w1ᵀ + b1 `[.., f]` (`[.., 2 f]`), of which only y has a gradient. The hidden layer between
/// is kept in f32 whatever the storage, except where products of the storage type are faster (tensor instructions, bf16 on a
/// CPU), which multiply it rounded to that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ffn {
    pub activation: FfnActivation,
}

/// Gradients of [`Ffn`]: inputs x, w1, w2, z, dy; outputs dx, dw1, db1, dw2, db2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FfnBackward {
    pub activation: FfnActivation,
}

/// Extents: rows of x, d, f (columns of w2), columns of y.
#[derive(Clone, Copy, Debug)]
struct Extents {
    rows: usize,
    d: usize,
    f: usize,
    d2: usize,
}

fn extents(op: &'static str, activation: FfnActivation, inputs: &[Meta], [x, w1, w2]: [usize; 3]) -> Result<Extents> {
    let broken = |rule| Error::Shape { op, rule, got: shape::list(inputs) };
    let dtype = inputs[x].dtype;
    if !dtype.is_float() || inputs.iter().any(|m| m.dtype != dtype) {
        return Err(Error::Dtype { op, expected: "one float type", got: shape::list(inputs) });
    }
    let ([w1_rows, w1_columns], [d2, f]) = (inputs[w1].dims(), inputs[w2].dims()) else {
        return Err(broken("w1 and w2 are matrices"));
    };
    if inputs[x].shape.rank() == 0 || inputs[x].shape.last() != *w1_columns || *w1_rows != activation.halves() * f {
        return Err(broken("x [.., d], w1 [f, d] (geglu: [2 f, d]), w2 [d2, f]"));
    }
    Ok(Extents { rows: inputs[x].shape.rows(), d: *w1_columns, f: *f, d2: *d2 })
}

impl Op for Ffn {
    fn name(&self) -> &'static str {
        match self.activation {
            FfnActivation::Relu => "ffn_relu",
            FfnActivation::Gelu => "ffn_gelu",
            FfnActivation::Geglu => "ffn_geglu",
        }
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x, w1, b1, _, b2] = inputs else {
            return Err(Error::Shape { op: self.name(), rule: "x, w1, b1, w2, b2", got: shape::list(inputs) });
        };
        let e = extents(self.name(), self.activation, inputs, [0, 1, 3])?;
        if b1.dims() != [w1.dims()[0]] || b2.dims() != [e.d2] {
            return Err(Error::Shape {
                op: self.name(),
                rule: "one bias per row of its matrix",
                got: shape::list(inputs),
            });
        }
        let output = |last: usize| -> Result<Meta> { Ok(Meta { shape: x.shape.with_last(last)?, dtype: x.dtype }) };
        Ok(vec![output(e.d2)?, output(self.activation.halves() * e.f)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        reference::forward(self.activation, inputs)
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("ffn_fwd", DType::FLOATS, cpu::ffn),
            groups::FORWARD,
            plan::FORWARD_TENSOR,
            plan::FORWARD_TENSOR_SMALL,
            plan::FORWARD,
        ];
        KERNELS
    }

    /// Rows, d, f, d2, activation.
    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        params(extents(self.name(), self.activation, inputs, [0, 1, 3]), self.activation)
    }

    fn saves(&self) -> Saves {
        Saves { inputs: &[0, 1, 3], outputs: &[1] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let op = FfnBackward { activation: self.activation };
        let grads = g.run(&op, &[g.input(0)?, g.input(1)?, g.input(3)?, g.output(1)?, g.grad(0)?])?;
        Ok(grads.into_iter().map(Some).collect())
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        cost(extents(self.name(), self.activation, inputs, [0, 1, 3]), self.activation, 1.0, inputs, outputs)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for FfnBackward {
    fn name(&self) -> &'static str {
        match self.activation {
            FfnActivation::Relu => "ffn_relu_bwd",
            FfnActivation::Gelu => "ffn_gelu_bwd",
            FfnActivation::Geglu => "ffn_geglu_bwd",
        }
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [x, w1, w2, z, dy] = inputs else {
            return Err(Error::Shape { op: self.name(), rule: "x, w1, w2, z, dy", got: shape::list(inputs) });
        };
        let e = extents(self.name(), self.activation, inputs, [0, 1, 2])?;
        let hidden = self.activation.halves() * e.f;
        if z.shape != x.shape.with_last(hidden)? || dy.shape != x.shape.with_last(e.d2)? {
            return Err(Error::Shape {
                op: self.name(),
                rule: "z [.., f] (geglu: [.., 2 f]), dy [.., d2]",
                got: shape::list(inputs),
            });
        }
        let vector = |n: usize| -> Result<Meta> { Ok(Meta { shape: Shape::new(&[n])?, dtype: x.dtype }) };
        Ok(vec![*x, *w1, vector(hidden)?, *w2, vector(e.d2)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        reference::backward(self.activation, inputs)
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("ffn_bwd", DType::FLOATS, cpu::ffn_backward),
            groups::BACKWARD,
            plan::BACKWARD_TENSOR,
            plan::BACKWARD_TENSOR_SMALL,
            plan::BACKWARD,
        ];
        KERNELS
    }

    /// Rows, d, f, d2, activation.
    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        params(extents(self.name(), self.activation, inputs, [0, 1, 2]), self.activation)
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        cost(extents(self.name(), self.activation, inputs, [0, 1, 2]), self.activation, 2.0, inputs, outputs)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn params(extents: Result<Extents>, activation: FfnActivation) -> Params {
    let Ok(e) = extents else {
        return Params::new();
    };
    Params::new().u(e.rows).u(e.d).u(e.f).u(e.d2).u(activation.code())
}

/// Two products forward, each with two products for its gradient backward.
fn cost(extents: Result<Extents>, activation: FfnActivation, passes: f64, inputs: &[Meta], outputs: &[Meta]) -> Cost {
    let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
    let products = extents.map_or(0, |e| e.rows * e.f * (activation.halves() * e.d + e.d2));
    Cost { flops: passes * 2.0 * products as f64, bytes }
}
