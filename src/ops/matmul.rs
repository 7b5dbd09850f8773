//! Matrix product with an epilogue: batched, any transposes, f32 accumulation whatever the storage.

mod cases;
mod plan;

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Params};
use crate::op::{Array, Cost, Family, Gradient, Op, Saves};
use crate::ops::reduce::{Axis, Reduce, ReduceFunction};
use crate::ops::unary::{Function, UnaryBackward};
use crate::shape::{self, Meta, Shape};
use crate::tensor::Tensor;

pub static FAMILY: Family = Family { name: "matmul", cases: cases::cases, source: Some(plan::SOURCE) };

/// What is applied to the finished sums before they are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Epilogue {
    #[default]
    None,
    /// + bias per column.
    Bias,
    /// max(0, sum + bias).
    BiasRelu,
    /// The tanh form of GELU of sum + bias.
    BiasGelu,
}

/// y = f(op(a) op(b) + bias), or c += op(a) op(b) (+ bias) in place.
///
/// Inputs a `[.., m, k]` (`[.., k, m]` with `transpose_a`), b `[.., k, n]` (`[.., n, k]` with `transpose_b`), bias `[n]`
/// where the epilogue has one, c of the output's shape with `accumulate`; all of one float type. Leading axes of a and b
/// agree, or one of the two is a matrix shared by the whole batch. Output `[.., m, n]`. Without `transpose_a` and with
/// a shared b, all leading axes of a count as rows, and a may be a vector `[k]`.
///
/// With `accumulate` the output is c's memory; it takes no activation and has no gradient.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Matmul {
    pub transpose_a: bool,
    pub transpose_b: bool,
    pub epilogue: Epilogue,
    pub accumulate: bool,
}

/// Extents and element strides of a problem; a shared matrix has batch stride 0.
#[derive(Clone, Copy, Debug)]
struct Layout {
    batch: usize,
    m: usize,
    n: usize,
    k: usize,
    /// Steps of a from batch to batch, row to row (m) and column to column (k).
    a: [usize; 3],
    /// Steps of b from batch to batch, row to row (k) and column to column (n).
    b: [usize; 3],
}

impl Epilogue {
    pub const fn has_bias(self) -> bool {
        !matches!(self, Epilogue::None)
    }

    /// The kernels' code of the activation.
    const fn activation(self) -> usize {
        match self {
            Epilogue::None | Epilogue::Bias => 0,
            Epilogue::BiasRelu => 1,
            Epilogue::BiasGelu => 2,
        }
    }
}

impl Matmul {
    /// y = x wᵀ for x `[.., k]` and a weight `[n, k]`.
    pub const fn linear() -> Self {
        Self { transpose_a: false, transpose_b: true, epilogue: Epilogue::None, accumulate: false }
    }

    /// y = x wᵀ + bias.
    pub const fn linear_bias() -> Self {
        Self { epilogue: Epilogue::Bias, ..Self::linear() }
    }

    /// Plain a b with the given transposes.
    pub const fn plain(transpose_a: bool, transpose_b: bool) -> Self {
        Self { transpose_a, transpose_b, epilogue: Epilogue::None, accumulate: false }
    }

    /// Rows of a shared b are all rows of a.
    fn folds(&self, b: &Meta) -> bool {
        !self.transpose_a && b.shape.rank() == 2
    }

    fn layout(&self, a: &Meta, b: &Meta) -> Result<(Layout, Shape)> {
        let broken = |rule| Error::Shape { op: "matmul", rule, got: format!("{a} times {b} ({self:?})") };
        let (da, db) = (a.dims(), b.dims());
        let [lead_b @ .., b0, b1] = db else {
            return Err(broken("b has at least two axes"));
        };
        let (kb, n) = if self.transpose_b { (*b1, *b0) } else { (*b0, *b1) };
        let strides = |rows: usize, columns: usize, transposed: bool, batched: bool| {
            let batch = if batched { rows * columns } else { 0 };
            if transposed { [batch, 1, columns] } else { [batch, columns, 1] }
        };
        let b_strides = strides(*b0, *b1, self.transpose_b, !lead_b.is_empty());
        if self.folds(b) {
            let (k, m) = (a.shape.last(), a.shape.rows());
            if a.shape.rank() == 0 || k != kb {
                return Err(broken("the contracted axes agree"));
            }
            let layout = Layout { batch: 1, m, n, k, a: [0, k, 1], b: b_strides };
            return Ok((layout, a.shape.with_last(n)?));
        }
        let [lead_a @ .., a0, a1] = da else {
            return Err(broken("a has at least two axes, or is a vector times a matrix without transpose_a"));
        };
        let (m, k) = if self.transpose_a { (*a1, *a0) } else { (*a0, *a1) };
        if k != kb {
            return Err(broken("the contracted axes agree"));
        }
        if lead_a != lead_b && !lead_a.is_empty() && !lead_b.is_empty() {
            return Err(broken("leading axes agree, or one side is a matrix"));
        }
        let lead = if lead_a.is_empty() { lead_b } else { lead_a };
        let a_strides = strides(*a0, *a1, self.transpose_a, !lead_a.is_empty());
        let layout = Layout { batch: lead.iter().product(), m, n, k, a: a_strides, b: b_strides };
        Ok((layout, Shape::new(&[lead, &[m, n]].concat())?))
    }

    fn inputs(&self) -> usize {
        2 + usize::from(self.epilogue.has_bias()) + usize::from(self.accumulate)
    }
}

impl Op for Matmul {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let broken = |rule| Error::Shape { op: "matmul", rule, got: shape::list(inputs) };
        if inputs.len() != self.inputs() {
            return Err(broken("a, b, bias where the epilogue has one, c with accumulate"));
        }
        let dtype = inputs[0].dtype;
        if !dtype.is_float() || inputs.iter().any(|m| m.dtype != dtype) {
            return Err(Error::Dtype { op: "matmul", expected: "one float type", got: shape::list(inputs) });
        }
        if self.accumulate && self.epilogue.activation() != 0 {
            let value = format!("{:?} with accumulate", self.epilogue);
            return Err(Error::Parameter {
                op: "matmul",
                parameter: "epilogue",
                value,
                allowed: "None or Bias with accumulate",
            });
        }
        let (layout, shape) = self.layout(&inputs[0], &inputs[1])?;
        if self.epilogue.has_bias() && inputs[2].dims() != [layout.n] {
            return Err(broken("bias [n]"));
        }
        let output = Meta { shape, dtype };
        if self.accumulate && inputs[inputs.len() - 1] != output {
            return Err(broken("c of the output's shape"));
        }
        Ok(vec![output])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (a, b) = (&inputs[0], &inputs[1]);
        let (da, db) = (a.dims(), b.dims());
        let matrix = |dims: &[usize]| {
            (dims[..dims.len() - 2].iter().product::<usize>(), dims[dims.len() - 2], dims[dims.len() - 1])
        };
        let (a_batch, a0, a1) = if da.len() == 1 { (1, 1, da[0]) } else { matrix(da) };
        let (b_batch, b0, b1) = matrix(db);
        let (m, k) = if self.transpose_a { (a1, a0) } else { (a0, a1) };
        let n = if self.transpose_b { b0 } else { b1 };
        let batch = if da.len() > 2 { a_batch } else { b_batch };
        let mut y = vec![0.0; batch * m * n];
        for g in 0..batch {
            let a = &a.data[if da.len() > 2 { g * m * k } else { 0 }..];
            let b = &b.data[if db.len() > 2 { g * k * n } else { 0 }..];
            for i in 0..m {
                let row = &mut y[(g * m + i) * n..][..n];
                for q in 0..k {
                    let x = if self.transpose_a { a[q * m + i] } else { a[i * k + q] };
                    for (j, y) in row.iter_mut().enumerate() {
                        *y += x * if self.transpose_b { b[j * k + q] } else { b[q * n + j] };
                    }
                }
            }
        }
        if self.epilogue.has_bias() {
            for (i, y) in y.iter_mut().enumerate() {
                let z = *y + inputs[2].data[i % n];
                *y = match self.epilogue {
                    Epilogue::BiasRelu => Function::Relu.reference(z),
                    Epilogue::BiasGelu => Function::GeluTanh.reference(z),
                    _ => z,
                };
            }
        }
        if self.accumulate {
            y.iter_mut().zip(&inputs[inputs.len() - 1].data).for_each(|(y, c)| *y += c);
        }
        vec![y]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("matmul_fwd", DType::FLOATS, cpu::matmul),
            plan::GROUPS_PAIRS,
            plan::GROUPS_WIDE,
            plan::GROUPS_NARROW,
            plan::TENSOR,
            plan::TENSOR_SMALL,
            plan::LANES_NN,
            plan::LANES_NT,
            plan::LANES_TN,
            plan::LANES_TT,
            plan::QUADS_NN,
            plan::QUADS_NT,
            plan::QUADS_TN,
            plan::QUADS_TT,
            plan::REGISTERS,
            plan::WORKGROUP,
            plan::Tiled::<8, 8, 8>::KERNEL,
            plan::Tiled::<8, 8, 32>::KERNEL,
            plan::Tiled::<16, 8, 8>::KERNEL,
            plan::Tiled::<16, 8, 16>::KERNEL,
            plan::Tiled::<8, 16, 8>::KERNEL,
            plan::Tiled::<8, 16, 16>::KERNEL,
            plan::Tiled::<16, 16, 8>::KERNEL,
            plan::Tiled::<16, 16, 16>::KERNEL,
            // For few rows.
            plan::Tiled::<4, 16, 16>::KERNEL,
            plan::Tiled::<2, 32, 8>::KERNEL,
            plan::Tiled::<1, 32, 8>::KERNEL,
            plan::COOP_16_OF_32,
            plan::COOP_16_OF_64,
            plan::COOP_8_OF_8,
            plan::COOP_8_OF_64,
            plan::COOP_EMULATED,
            plan::NAIVE,
        ];
        KERNELS
    }

    /// m, n, k, batch, strides of a and b, activation, whether there is a bias, whether c is added to.
    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        let Ok((l, _)) = self.layout(&inputs[0], &inputs[1]) else {
            return Params::new();
        };
        let params = Params::new().u(l.m).u(l.n).u(l.k).u(l.batch);
        let params = l.a.iter().chain(&l.b).fold(params, |p, &s| p.u(s));
        params.u(self.epilogue.activation()).flag(self.epilogue.has_bias()).flag(self.accumulate)
    }

    fn aliases(&self) -> &'static [(usize, usize)] {
        match (self.accumulate, self.epilogue.has_bias()) {
            (false, _) => &[],
            (true, false) => &[(0, 2)],
            (true, true) => &[(0, 3)],
        }
    }

    /// The gradient of ReLU is read off the output's sign; that of GELU needs its argument, which is not kept but
    /// computed again (`ffn` keeps it).
    fn saves(&self) -> Saves {
        match self.epilogue {
            Epilogue::None | Epilogue::Bias => Saves { inputs: &[0, 1], outputs: &[] },
            Epilogue::BiasRelu => Saves { inputs: &[0, 1], outputs: &[0] },
            Epilogue::BiasGelu => Saves { inputs: &[0, 1, 2], outputs: &[] },
        }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        if self.accumulate {
            return Err(Error::NoGradient { op: "matmul" });
        }
        let (a, b, dy) = (g.input(0)?, g.input(1)?, g.grad(0)?);
        let recomputed;
        let dz = match self.epilogue {
            Epilogue::None | Epilogue::Bias => dy,
            Epilogue::BiasRelu => {
                recomputed = g.one(&UnaryBackward(Function::Relu), &[g.output(0)?, dy])?;
                &recomputed
            }
            Epilogue::BiasGelu => {
                let z = g.one(&Self { epilogue: Epilogue::Bias, ..*self }, &[a, b, g.input(2)?])?;
                recomputed = g.one(&UnaryBackward(Function::GeluTanh), &[&z, dy])?;
                &recomputed
            }
        };
        let da = g.needs(0).then(|| self.gradient_a(g, a, b, dz)).transpose()?;
        let db = g.needs(1).then(|| self.gradient_b(g, a, b, dz)).transpose()?;
        let mut grads = vec![da, db];
        if self.epilogue.has_bias() {
            let n = dz.shape().last();
            let rows = || sum_rows(g, &dz.reshape(&[dz.shape().rows(), n])?);
            grads.push(g.needs(2).then(rows).transpose()?);
        }
        Ok(grads)
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let k = self.layout(&inputs[0], &inputs[1]).map_or(0, |(l, _)| l.k);
        let flops = 2.0 * outputs[0].count() as f64 * k as f64;
        // c counts twice with accumulate: read and written.
        Cost { flops, bytes: inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Matmul {
    /// op(a) = a: da = dz op(b)ᵀ; op(a) = aᵀ: da = op(b) dzᵀ.
    fn gradient_a(&self, g: &Gradient, a: &Tensor, b: &Tensor, dz: &Tensor) -> Result<Tensor> {
        let da = if self.transpose_a {
            g.one(&Self::plain(self.transpose_b, true), &[b, dz])?
        } else {
            g.one(&Self::plain(false, !self.transpose_b), &[dz, b])?
        };
        shared_sum(g, da, a)
    }

    /// op(b) = b: db = op(a)ᵀ dz; op(b) = bᵀ: db = dzᵀ op(a). Folded rows make it one product over all of them.
    fn gradient_b(&self, g: &Gradient, a: &Tensor, b: &Tensor, dz: &Tensor) -> Result<Tensor> {
        let flat = |t: &Tensor| t.reshape(&[t.shape().rows(), t.shape().last()]);
        let (a, dz) = if self.folds(&b.meta()) { (&flat(a)?, &flat(dz)?) } else { (a, dz) };
        let db = if self.transpose_b {
            g.one(&Self::plain(true, self.transpose_a), &[dz, a])?
        } else {
            g.one(&Self::plain(!self.transpose_a, false), &[a, dz])?
        };
        shared_sum(g, db, b)
    }
}

/// The gradient of a matrix that the whole batch shared is the sum over the batch.
fn shared_sum(g: &Gradient, grad: Tensor, of: &Tensor) -> Result<Tensor> {
    if grad.count() == of.count() {
        return grad.reshape(of.dims());
    }
    let batch = grad.count() / of.count().max(1);
    sum_rows(g, &grad.reshape(&[batch, of.count()])?)?.reshape(of.dims())
}

/// Column sums of `[rows, columns]`.
fn sum_rows(g: &Gradient, x: &Tensor) -> Result<Tensor> {
    g.one(&Reduce { function: ReduceFunction::Sum, axis: Axis::Rows }, &[x])
}
