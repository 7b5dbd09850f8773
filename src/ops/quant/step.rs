//! Steps that are learned or tracked: what a given step's gradient is made of, and the moving average of observed ones.

use std::any::Any;

use super::grid::{Rule, backward_input, check_range};
use super::{FakeQuant, Granularity, Grid, GridFrom, PER_INVOCATION, Scheme, map_params, wgsl};
use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Launch, Params, Plan, Problem};
use crate::op::{Array, Gradient, Op};
use crate::ops::reduce::{Axis, Reduce, ReduceFunction};
use crate::shape::{self, Meta};
use crate::tensor::Tensor;

/// What each element adds to its step's gradient (learned step size, Esser et al. 2020, Eq 3): `dy factor (q - x / s)`
/// where the level q was not clamped, `dy factor q` where it was. Inputs x, `step f32 [groups]` or `[1]`, dy; output f32 of
/// x's shape, to be summed over each step's elements.
#[derive(Clone, Copy, Debug)]
pub struct StepSlope {
    pub bits: u32,
    pub scheme: Scheme,
    pub granularity: Granularity,
    /// 1 / sqrt(N qmax) for N elements of a step (section 2.2 there).
    pub factor: f32,
}

/// step += rate (seen - step), in place, where `seen` is the step that the scale rule makes of `range f32 [groups, 2]`: the
/// moving average of an observer. A step of 0 has seen nothing and takes the first one whole; a range that is zero or not
/// finite leaves the step as it is. Symmetric schemes.
#[derive(Clone, Copy, Debug)]
pub struct TrackStep {
    pub bits: u32,
    pub scheme: Scheme,
    pub rate: f32,
}

impl FakeQuant {
    /// The gradient of a given step: a sum over its elements.
    pub(super) fn step_gradient(&self, g: &Gradient) -> Result<Tensor> {
        let (x, step, dy) = (g.input(0)?, g.input(1)?, g.grad(0)?);
        let (groups, length) = self.granularity.groups(g.op, &x.meta())?;
        let shared = step.count() == 1;
        // Of activations that share one step the count is that of features (as the paper's is), not of tokens.
        let count = if shared && self.granularity == Granularity::Token { x.shape().last() } else { length };
        let highest = self.scheme.levels(self.bits).high;
        let factor = 1.0 / (count as f32 * highest).sqrt();
        let op = StepSlope { bits: self.bits, scheme: self.scheme, granularity: self.granularity, factor };
        let slopes = g.one(&op, &[x, step, dy])?;
        let (slopes, axis) =
            if shared { (slopes, Axis::All) } else { (slopes.reshape(&[groups, length])?, Axis::Last) };
        g.one(&Reduce { function: ReduceFunction::Sum, axis }, &[&slopes])?.reshape(step.dims())
    }
}

impl StepSlope {
    fn rule(&self) -> Rule {
        (self.bits, self.scheme, self.granularity, GridFrom::Step)
    }
}

impl Op for StepSlope {
    fn name(&self) -> &'static str {
        "step_slope"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let x = backward_input(self.name(), self.rule(), inputs)?;
        Ok(vec![Meta { dtype: DType::F32, ..x }])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let length = super::group_length(self.granularity, &inputs[0]);
        let grids = Grid::all(self.scheme, self.bits, GridFrom::Step, inputs, length);
        let slope = |(i, (&x, &dy)): (usize, (&f64, &f64))| {
            let grid = &grids[i / length];
            let rounding = if grid.inside(x) { x * f64::from(grid.inverse) } else { 0.0 };
            dy * f64::from(self.factor) * (f64::from(grid.level(x)) - rounding)
        };
        vec![inputs[0].data.iter().zip(&inputs[2].data).enumerate().map(slope).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("step_slope", DType::FLOATS, cpu::step_slope),
            wgsl("step_slope", "step_slope", DType::FLOATS, plan_slope),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        let (bits, scheme, granularity, from) = self.rule();
        map_params((scheme, bits, granularity, from), inputs).f(self.factor)
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn plan_slope(p: &Problem) -> Plan {
    let items = p.outputs[0].count().div_ceil(PER_INVOCATION);
    Plan::of(Launch::linear(items, super::BLOCK, p.params()).trips(PER_INVOCATION))
}

impl Op for TrackStep {
    fn name(&self) -> &'static str {
        "track_step"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        super::check_bits(self.name(), self.bits)?;
        let [step, range] = inputs else {
            let rule = "step f32 [groups] and range f32 [groups, 2]";
            return Err(Error::Shape { op: self.name(), rule, got: shape::list(inputs) });
        };
        check_range(self.name(), step.count(), range, inputs)?;
        if !matches!(self.scheme, Scheme::SymmetricNarrow | Scheme::SymmetricFull) {
            let (op, value) = (self.name(), format!("{:?}", self.scheme));
            return Err(Error::Parameter { op, parameter: "scheme", value, allowed: "SymmetricNarrow, SymmetricFull" });
        }
        if !(0.0..=1.0).contains(&self.rate) {
            let (op, value) = (self.name(), self.rate.to_string());
            return Err(Error::Parameter { op, parameter: "rate", value, allowed: "0 to 1" });
        }
        match step.dtype {
            DType::F32 => Ok(vec![*step]),
            _ => Err(Error::Dtype { op: self.name(), expected: "f32 for step", got: shape::list(inputs) }),
        }
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let tracked = |(&step, range): (&f64, &[f64])| {
            let grid = Grid::new(self.scheme, self.bits, range[0], range[1]);
            let seen = f64::from(grid.scale);
            match step {
                _ if grid.inverse == 0.0 || seen.is_nan() => step,
                0.0 => seen,
                _ => step + f64::from(self.rate) * (seen - step),
            }
        };
        vec![inputs[0].data.iter().zip(inputs[1].data.chunks(2)).map(tracked).collect()]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("track_step", &[DType::F32], cpu::track_step),
            wgsl("track_step", "track_step", &[DType::F32], plan_track),
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        let levels = self.scheme.levels(self.bits);
        Params::new()
            .u(inputs[0].count())
            .u(1)
            .u(0)
            .f(levels.low)
            .f(levels.high)
            .f(levels.unit)
            .f(0.0)
            .u(0)
            .f(self.rate)
    }

    fn aliases(&self) -> &'static [(usize, usize)] {
        &[(0, 0)]
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn plan_track(p: &Problem) -> Plan {
    Plan::of(Launch::linear(p.inputs[0].count(), super::BLOCK, p.params()))
}
