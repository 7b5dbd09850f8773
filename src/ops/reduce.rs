//! Reductions over the last axis, over all rows or over all elements; argmax; counting of non-finite values.

mod cases;
mod plan;

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Params, Plan, Problem, Source, always, source};
use crate::op::{Array, Cost, Family, Gradient, Op, Saves};
use crate::ops::layout::Permute;
use crate::shape::{self, Meta, Shape};
use crate::tensor::Tensor;

pub static FAMILY: Family = Family { name: "reduce", cases: cases::cases, source: Some(SOURCE) };

const SOURCE: Source = source!("reduce");

/// Which function; the order is the kernels' `kind` parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReduceFunction {
    Sum,
    Mean,
    /// A NaN is not seen: [`CountNonFinite`] finds those.
    Max,
    SumSquares,
}

/// What is reduced away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Axis {
    /// `[.., n]` to `[..]`.
    Last,
    /// All leading axes: `[.., n]` to `[n]`.
    Rows,
    /// Everything, to a tensor of rank 0.
    All,
}

/// Reduction in f32, stored in the input's type. An axis of extent 0 is refused: a mean or maximum of nothing is none.
#[derive(Clone, Copy, Debug)]
pub struct Reduce {
    pub function: ReduceFunction,
    pub axis: Axis,
}

/// dx of a [`Reduce`] whose input had `shape`. Inputs: (dy) for sum and mean, (x, dy) for the sum of squares, (index of
/// the maximum u32, dy) for max.
#[derive(Clone, Copy, Debug)]
pub struct ReduceBackward {
    pub function: ReduceFunction,
    pub axis: Axis,
    pub shape: Shape,
}

/// Index of the largest element over the last axis, `[.., n]` to u32 `[..]`; the lowest index wins ties, NaN is not seen.
#[derive(Clone, Copy, Debug)]
pub struct ArgMax;

/// Counts NaN and infinities by their bits: u32 `[2]` = (count, index of the first or u32::MAX).
#[derive(Clone, Copy, Debug)]
pub struct CountNonFinite;

impl Axis {
    /// The shape as (outer, reduced, inner) extents.
    pub(crate) fn extents(self, shape: &Shape) -> (usize, usize, usize) {
        match self {
            Axis::Last => (shape.rows(), shape.last(), 1),
            Axis::Rows => (1, shape.rows(), shape.last()),
            Axis::All => (1, shape.count(), 1),
        }
    }

    fn reduced(self, shape: &Shape) -> Result<Shape> {
        match self {
            Axis::Last => Shape::new(&shape.dims()[..shape.rank().saturating_sub(1)]),
            Axis::Rows => Shape::new(&[shape.last()]),
            Axis::All => Ok(Shape::scalar()),
        }
    }
}

/// One non-empty float input, of rank 1 or more unless everything is reduced.
fn reducible<'a>(op: &'static str, inputs: &'a [Meta], axis: Axis) -> Result<&'a Meta> {
    match inputs {
        [x] if !x.dtype.is_float() => Err(Error::Dtype { op, expected: "a float type", got: x.to_string() }),
        [x] if x.count() > 0 && (x.shape.rank() > 0 || axis == Axis::All) => Ok(x),
        _ => {
            Err(Error::Shape { op, rule: "one input with an axis to reduce and no extent 0", got: shape::list(inputs) })
        }
    }
}

impl ReduceFunction {
    /// What the finished sum is multiplied by.
    fn factor(self, n: usize) -> f32 {
        if self == ReduceFunction::Mean { (1.0 / n as f64) as f32 } else { 1.0 }
    }
}

impl Op for Reduce {
    fn name(&self) -> &'static str {
        match self.function {
            ReduceFunction::Sum => "sum",
            ReduceFunction::Mean => "mean",
            ReduceFunction::Max => "max",
            ReduceFunction::SumSquares => "sum_squares",
        }
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let x = reducible(self.name(), inputs, self.axis)?;
        Ok(vec![Meta { shape: self.axis.reduced(&x.shape)?, dtype: x.dtype }])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (outer, n, inner) = self.axis.extents(&inputs[0].shape);
        let x = &inputs[0].data;
        let reduced = |place: usize| {
            let terms = (0..n).map(|k| x[(place / inner * n + k) * inner + place % inner]);
            match self.function {
                ReduceFunction::Sum => terms.sum(),
                ReduceFunction::Mean => terms.sum::<f64>() / n as f64,
                ReduceFunction::Max => terms.fold(f64::NEG_INFINITY, f64::max),
                ReduceFunction::SumSquares => terms.map(|x| x * x).sum(),
            }
        };
        vec![(0..outer * inner).map(reduced).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] =
            &[Kernel::cpu("reduce_fwd", DType::FLOATS, cpu::reduce), wgsl("reduce_fwd", "reduce_fwd", plan::reduce)];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        let (outer, n, inner) = self.axis.extents(&inputs[0].shape);
        Params::new().u(self.function as usize).u(outer).u(n).u(inner).f(self.function.factor(n))
    }

    fn saves(&self) -> Saves {
        match self.function {
            ReduceFunction::Max | ReduceFunction::SumSquares => Saves { inputs: &[0], outputs: &[] },
            _ => Saves::default(),
        }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let shape = g.input_metas[0].shape;
        let backward = ReduceBackward { function: self.function, axis: self.axis, shape };
        let dy = g.grad(0)?;
        Ok(vec![Some(match self.function {
            ReduceFunction::Sum | ReduceFunction::Mean => g.one(&backward, &[dy])?,
            ReduceFunction::SumSquares => g.one(&backward, &[g.input(0)?, dy])?,
            ReduceFunction::Max => {
                let (outer, n, inner) = self.axis.extents(&shape);
                let x = g.input(0)?.reshape(&[outer, n, inner])?;
                // The reduced axis is brought last; where it already is, it stays as it is.
                let rows = match inner {
                    1 => x,
                    _ => g.one(&Permute { order: vec![0, 2, 1] }, &[&x])?,
                };
                let rows = rows.reshape(&[outer * inner, n])?;
                g.one(&backward, &[&g.one(&ArgMax, &[&rows])?, dy])?
            }
        })])
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let flops = if self.function == ReduceFunction::SumSquares { 2.0 } else { 1.0 };
        Cost { flops: flops * inputs[0].count() as f64, bytes: (inputs[0].bytes() + outputs[0].bytes()) as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for ReduceBackward {
    fn name(&self) -> &'static str {
        match self.function {
            ReduceFunction::Sum => "sum_bwd",
            ReduceFunction::Mean => "mean_bwd",
            ReduceFunction::Max => "max_bwd",
            ReduceFunction::SumSquares => "sum_squares_bwd",
        }
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let places = self.axis.reduced(&self.shape)?.count();
        let fits = match (self.function, inputs) {
            (ReduceFunction::Sum | ReduceFunction::Mean, [dy]) => dy.count() == places,
            (ReduceFunction::SumSquares, [x, dy]) => {
                x.shape == self.shape && dy.count() == places && x.dtype == dy.dtype
            }
            (ReduceFunction::Max, [index, dy]) => {
                index.count() == places && dy.count() == places && index.dtype == DType::U32
            }
            _ => false,
        };
        match inputs.last() {
            Some(dy) if fits && dy.dtype.is_float() => Ok(vec![Meta { shape: self.shape, dtype: dy.dtype }]),
            _ => {
                let rule = "(dy), (x, dy) for sum_squares or (u32 index, dy) for max, dy shaped like the reduction";
                Err(Error::Shape { op: self.name(), rule, got: shape::list(inputs) })
            }
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (_, n, inner) = self.axis.extents(&self.shape);
        let (first, dy) = (&inputs[0].data, &inputs[inputs.len() - 1].data);
        let dx = |element: usize| {
            let (row, column) = (element / inner, element % inner);
            let place = row / n * inner + column;
            match self.function {
                ReduceFunction::Sum => dy[place],
                ReduceFunction::Mean => dy[place] / n as f64,
                ReduceFunction::SumSquares => 2.0 * first[element] * dy[place],
                ReduceFunction::Max if first[place] == (row % n) as f64 => dy[place],
                ReduceFunction::Max => 0.0,
            }
        };
        vec![(0..self.shape.count()).map(dx).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("reduce_bwd", DType::FLOATS, cpu::reduce_backward),
            wgsl("reduce_bwd", "reduce_bwd", plan::backward),
        ];
        KERNELS
    }

    fn params(&self, _: &[Meta], _: &[Meta]) -> Params {
        let (outer, n, inner) = self.axis.extents(&self.shape);
        Params::new().u(self.function as usize).u(outer).u(n).u(inner).f(self.function.factor(n))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for ArgMax {
    fn name(&self) -> &'static str {
        "argmax"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let x = reducible(self.name(), inputs, Axis::Last)?;
        Ok(vec![Meta { shape: Axis::Last.reduced(&x.shape)?, dtype: DType::U32 }])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let first_largest = |row: &[f64]| {
            let mut best = (f64::NEG_INFINITY, 0);
            for (index, &x) in row.iter().enumerate() {
                if x > best.0 {
                    best = (x, index);
                }
            }
            best.1 as f64
        };
        vec![inputs[0].data.chunks_exact(inputs[0].shape.last()).map(first_largest).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] =
            &[Kernel::cpu("argmax_fwd", DType::FLOATS, cpu::argmax), wgsl("argmax_fwd", "argmax_fwd", plan::argmax)];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        Params::new().u(inputs[0].shape.rows()).u(inputs[0].shape.last())
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        Cost { flops: inputs[0].count() as f64, bytes: (inputs[0].bytes() + outputs[0].bytes()) as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for CountNonFinite {
    fn name(&self) -> &'static str {
        "count_non_finite"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        reducible(self.name(), inputs, Axis::All)?;
        Ok(vec![Meta::new(&[2], DType::U32)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let x = &inputs[0].data;
        let count = x.iter().filter(|x| !x.is_finite()).count();
        let first = x.iter().position(|x| !x.is_finite()).map_or(f64::from(u32::MAX), |at| at as f64);
        vec![vec![count as f64, first]]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("count_non_finite", DType::FLOATS, cpu::count_non_finite),
            wgsl("count_non_finite", "count_first", plan::count_non_finite),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        Params::new().u(inputs[0].count())
    }

    fn cost(&self, inputs: &[Meta], _: &[Meta]) -> Cost {
        Cost { flops: inputs[0].count() as f64, bytes: inputs[0].bytes() as f64 }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

const fn wgsl(name: &'static str, entry: &'static str, plan: fn(&Problem) -> Plan) -> Kernel {
    let code = Code::Gpu { source: SOURCE, entry, constants: &[] };
    Kernel { name, code, dtypes: DType::FLOATS, fits: always, plan }
}
