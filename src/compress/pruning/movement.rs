//! Movement pruning (Sanh et al. 2020): units have trained scores S, the forward pass uses W o M(S), and the gradient of the
//! mask goes straight through to the scores: dL/dS = dL/dM = (dL/dW') o W. Weights that move away from 0 gain score.

use std::collections::BTreeMap;

use super::gates;
use super::pattern::{Pattern, matrix_dims};
use super::pruner::{Settings, declared_units, pruned_units};
use super::selection::select;
use crate::compress::written;
use crate::dispatch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{Model, OutputHook, Pass};
use crate::ops::binary::{ADD, Binary, BinaryFunction, MUL};
use crate::ops::layout::{Fill, Permute};
use crate::ops::matmul::Matmul;
use crate::ops::reduce::{Axis, Reduce, ReduceFunction};
use crate::ops::select::Above;
use crate::ops::unary::{Function, Unary};
use crate::shape::Shape;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::train::lifecycle::{Invariant, Method, Micro};
use crate::train::optimizer::Optimizer;

/// How scores become masks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Binariser {
    /// The units with the largest scores, as many as the curve says.
    TopK,
    /// sigmoid(S) > tau: `Settings::sparsity` and the curve give tau, what is pruned follows. `penalty` times the mean of
    /// sigmoid(S) over all units is added to the loss per gold label, growing in step with tau.
    Threshold { penalty: f64 },
}

pub struct Movement {
    weights: Vec<String>,
    settings: Settings,
    binariser: Binariser,
    /// Peak learning rate of the scores.
    rate: f64,
    /// Units kept, grids of zeros and ones: memory that captured steps read.
    units: Vec<Tensor>,
    /// f32 `[1]`: the penalty's factor at present.
    factor: Tensor,
    started: bool,
    frozen: bool,
}

/// Names of the units in a checkpoint.
const UNITS: &str = "pruning.movement/";

fn ones(model: &Model, dims: &[usize]) -> Result<Tensor> {
    let fill = Fill { value: 1.0, dims: Shape::new(dims)?, dtype: DType::F32 };
    dispatch::one(dispatch::run_on(model.device(), &fill, &[])?, "ones")
}

impl Movement {
    /// Adds scores, all 0, to the model, which must be the one that is trained.
    ///
    /// # Errors
    /// `Error::Shape` for a weight that is not made of whole units; `Error::Parameter` for 2:4 with a threshold (nothing to
    /// choose) and for two-dimensional 2:4, whose search takes magnitudes.
    pub fn new(
        model: &mut Model,
        weights: Vec<String>,
        settings: Settings,
        binariser: Binariser,
        rate: f64,
    ) -> Result<Self> {
        let chosen = binariser == Binariser::TopK;
        if settings.pattern.is_24() && !(chosen && settings.pattern == Pattern::TwoFour) {
            let (value, allowed) = (written(&settings.pattern), "any with top-k but two-dimensional 2:4");
            return Err(Error::Parameter { op: "movement pruning", parameter: "pattern", value, allowed });
        }
        let mut units = Vec::new();
        for name in &weights {
            let grid = settings.pattern.grid(matrix_dims(model.get(name)?))?;
            units.push(ones(model, &grid)?);
            let zeros = vec![0.0f32; grid[0] * grid[1]];
            gates::add(model, name, Tensor::from_slice(model.device(), &grid, &zeros)?);
        }
        let factor = Tensor::from_slice(model.device(), &[1], &[0.0f32])?;
        Ok(Self { weights, settings, binariser, rate, units, factor, started: false, frozen: false })
    }

    /// Masks from the scores as they are after `step` updates.
    pub fn choose(&mut self, step: u64, model: &Model) -> Result<()> {
        let Settings { pattern, scope, sparsity, timing } = self.settings;
        let scores =
            self.weights.iter().map(|name| Ok(model.get(&gates::of(name))?.clone())).collect::<Result<Vec<_>>>()?;
        let now = timing.sparsity(sparsity, step);
        let units = match self.binariser {
            Binariser::TopK => select(&self.weights, &scores, pattern, scope, now)?,
            Binariser::Threshold { penalty } => {
                let share = if sparsity > 0.0 { now / sparsity } else { 0.0 };
                self.factor.upload(&[(penalty * share) as f32])?;
                // sigmoid(s) > tau where s > ln(tau / (1 - tau)).
                let logit = (now / (1.0 - now)).ln() as f32;
                let op = Above { threshold: logit.clamp(-f32::MAX, f32::MAX) };
                scores.iter().map(|s| dispatch::run_one(&op, &[s])).collect::<Result<_>>()?
            }
        };
        self.units.iter().zip(&units).try_for_each(|(own, new)| own.assign(new))
    }

    /// A grid that is exactly `units` and whose gradient is that of `scores`.
    fn straight_through(tape: &mut Tape, scores: &Var, units: &Tensor) -> Result<Var> {
        // s - s is exactly 0 for every finite s.
        let nothing = tape.first(Binary(BinaryFunction::Sub), &[scores, &scores.detach()])?;
        tape.first(ADD, &[&nothing, &Var::constant(units.clone())])
    }
}

/// As `Pattern::expand`, recorded: the gradient of a unit is the sum over its weights.
pub(super) fn expand(tape: &mut Tape, pattern: Pattern, units: &Var, dims: [usize; 2]) -> Result<Var> {
    let ([r, c], [rows, columns]) = (pattern.grid(dims)?, pattern.unit(dims));
    if [rows, columns] == [1, 1] {
        return units.reshape(&dims);
    }
    let fill = Fill { value: 1.0, dims: Shape::new(&[rows * columns, 1])?, dtype: DType::F32 };
    let ones = Var::constant(dispatch::one(dispatch::run_on(units.tensor.device(), &fill, &[])?, "ones")?);
    let blocks = tape.first(Matmul::linear(), &[&units.reshape(&[r * c, 1])?, &ones])?;
    let order = vec![0, 2, 1, 3];
    tape.first(Permute { order }, &[&blocks.reshape(&[r, c, rows, columns])?])?.reshape(&dims)
}

impl OutputHook for Movement {
    fn on_output(&self, pass: &mut Pass, linear: &str, x: Var, weight: Var) -> Result<(Var, Var)> {
        let found = self.weights.iter().position(|w| w.strip_suffix(".weight") == Some(linear));
        let Some(index) = found.filter(|_| !self.frozen) else {
            return Ok((x, weight));
        };
        let scores = gates::variable(pass, &self.weights[index])?;
        let units = Self::straight_through(&mut pass.tape, &scores, &self.units[index])?;
        let mask = expand(&mut pass.tape, self.settings.pattern, &units, matrix_dims(&weight.tensor))?;
        Ok((x, gates::masked(&mut pass.tape, &weight, &mask)?))
    }
}

impl Method for Movement {
    fn name(&self) -> &'static str {
        "movement pruning"
    }

    fn on_output(&self) -> Option<&dyn OutputHook> {
        Some(self)
    }

    fn on_loss(&self, pass: &mut Pass, _: &Var, micro: &Micro) -> Result<Option<Var>> {
        if self.frozen || self.binariser == Binariser::TopK || self.weights.is_empty() {
            return Ok(None);
        }
        let all: usize = self.units.iter().map(Tensor::count).sum();
        let mut total: Option<Var> = None;
        for name in &self.weights {
            let scores = gates::variable(pass, name)?;
            let open = pass.tape.first(Unary(Function::Sigmoid), &[&scores])?;
            let sum = pass.tape.first(Reduce { function: ReduceFunction::Sum, axis: Axis::All }, &[&open])?;
            total = Some(match total {
                None => sum,
                Some(total) => pass.tape.first(ADD, &[&total, &sum])?,
            });
        }
        let Some(total) = total else {
            return Ok(None);
        };
        let mean = pass.tape.first(Unary(Function::Scale((1.0 / all as f64) as f32)), &[&total])?;
        // Read by captured steps: what differs from step to step comes as tensors.
        let labels = Reduce { function: ReduceFunction::Sum, axis: Axis::All };
        let labels = dispatch::run_one(&labels, &[&micro.weights])?.reshape(&[1])?;
        let factor = dispatch::run_one(&MUL, &[&labels, &self.factor])?;
        Ok(Some(pass.tape.first(MUL, &[&mean, &Var::constant(factor)])?))
    }

    fn on_update(&mut self, step: u64, model: &Model, optimizer: &mut Optimizer) -> Result<()> {
        if !std::mem::replace(&mut self.started, true) {
            optimizer.set_gate_rate(self.rate);
        }
        if self.frozen {
            return Ok(());
        }
        let timing = self.settings.timing;
        if timing.updates_at(step) {
            self.choose(step, model)?;
        }
        if step >= timing.end {
            for (name, units) in self.weights.iter().zip(&self.units) {
                let mask = self.settings.pattern.expand(units, matrix_dims(model.get(name)?))?;
                gates::freeze(model, optimizer, name, &mask)?;
            }
            self.frozen = true;
            optimizer.invalidate();
        }
        Ok(())
    }

    fn state(&self) -> BTreeMap<String, Tensor> {
        let units = self.weights.iter().zip(&self.units);
        let mut state: BTreeMap<_, _> = units.map(|(name, units)| (format!("{UNITS}{name}"), units.clone())).collect();
        state.insert(format!("{UNITS}factor"), self.factor.clone());
        state
    }

    fn restore(&mut self, state: &BTreeMap<String, Tensor>, step: u64) -> Result<()> {
        let take = |name: &str, to: &Tensor| {
            let key = format!("{UNITS}{name}");
            to.assign(state.get(&key).ok_or_else(|| Error::file("optimizer state", &key, "missing"))?)
        };
        self.weights.iter().zip(&self.units).try_for_each(|(name, units)| take(name, units))?;
        take("factor", &self.factor)?;
        self.frozen = step >= self.settings.timing.end;
        Ok(())
    }

    fn on_finish(&mut self, model: &mut Model) -> Result<()> {
        gates::remove(model, &self.weights);
        if self.frozen { Ok(()) } else { Err(gates::unfinished(self.settings.timing.end)) }
    }

    fn invariants(&self, model: &Model) -> Result<Vec<Invariant>> {
        let mut invariants = pruned_units(model, &self.weights, &self.units, self.settings.pattern)?;
        if self.binariser == Binariser::TopK {
            invariants.push(declared_units(model, &self.weights, &self.units, &self.settings)?);
        }
        Ok(invariants)
    }
}
