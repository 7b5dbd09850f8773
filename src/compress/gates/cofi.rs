//! The method: gates that learn, a Lagrangian that holds their expected size to a target, the small model at the end.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use super::cost::{Costs, Expectation};
use super::decision::{Decision, decide, out_of_reach, shrink};
use super::hook::{Gates, Phase};
use super::layout::{Layout, Level};
use crate::compress::structure::{Keep, KeepBlock};
use crate::compress::written;
use crate::dispatch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{Model, OutputHook, Pass, Place};
use crate::ops::binary::{ADD, Binary, BinaryFunction, MUL};
use crate::ops::hard_concrete::Clamp;
use crate::ops::layout::{Fill, Slice};
use crate::ops::reduce::{Axis, Reduce, ReduceFunction};
use crate::ops::unary::{Function, Unary};
use crate::shape::{Meta, Shape};
use crate::tape::Var;
use crate::tensor::Tensor;
use crate::train::lifecycle::{Invariant, Method, Micro};
use crate::train::optimizer::Optimizer;

const SUB: Binary = Binary(BinaryFunction::Sub);

/// Name of lambda_1 and lambda_2 among the model's tensors while they learn.
pub const MULTIPLIERS: &str = "structure.multipliers.gate";

#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// Share of the cost that goes.
    pub target: f64,
    /// Share that the target starts at; above 0 where a model goes on from a lower one.
    pub initial: f64,
    /// Updates over which the target rises linearly.
    pub warm_up: u64,
    /// Peak learning rate of log alphas and multipliers.
    pub rate: f64,
    /// What has gates.
    pub levels: Vec<Level>,
    /// Neurons and channels stay in multiples of it.
    pub multiple: usize,
    pub seed: u64,
}

/// What a training came to.
#[derive(Clone, Debug)]
pub struct Small {
    pub keep: Keep,
    pub decision: Decision,
    /// Of the cost, that stays.
    pub share: f64,
}

impl Small {
    /// Blocks of the model before that have a sublayer yet.
    pub fn blocks(&self) -> Vec<usize> {
        let left = |b: &&KeepBlock| b.attention.is_some() || b.cross.is_some() || b.neurons.is_some();
        self.keep.blocks.iter().filter(left).map(|b| b.index).collect()
    }
}

/// log alphas live in [ln 0.01, ln 100]: where a gate is as good as decided its gradient is gone, and it could not come back.
const CLAMP: Clamp = Clamp { low: -4.605_170_2, high: 4.605_170_2 };

pub struct Cofi {
    gates: Gates,
    costs: Costs,
    expectation: Expectation,
    settings: Settings,
    /// u32 `[1]`: updates done, which samples are keyed by; memory that captured steps read.
    step: Tensor,
    /// f32 `[1]`: the target at present.
    target: Tensor,
    started: bool,
    result: Arc<OnceLock<Small>>,
}

impl Cofi {
    /// Adds log alphas and multipliers to the model, which must be the one that is trained.
    ///
    /// # Errors
    /// `Error::Parameter` for a target, rate or levels that cannot be, and for a model with experts.
    pub fn new(model: &mut Model, settings: Settings, costs: Costs) -> Result<Self> {
        let layout = Layout::of(&model.config)?;
        settings.check(&layout, &costs)?;
        let device = model.device().clone();
        let levels: Vec<Level> = settings.levels.iter().copied().filter(|l| layout.count(*l) > 0).collect();
        let expectation = Expectation::new(&device, &layout, &costs, &levels)?;
        for &level in &levels {
            let values = vec![level.start(); layout.count(level)];
            let gates = Tensor::from_slice(&device, &[values.len()], &values)?;
            // A resumed training brings them with its checkpoint.
            model.tensors.entry(level.tensor().into()).or_insert(gates);
        }
        let multipliers = Tensor::from_slice(&device, &[2], &[0.0f32; 2])?;
        model.tensors.entry(MULTIPLIERS.into()).or_insert(multipliers);
        layout.check(model, &levels)?;
        let step = Tensor::zeros(&device, Meta::new(&[1], DType::U32)?)?;
        let target = Tensor::from_slice(&device, &[1], &[settings.initial as f32])?;
        let phase = Phase::Learning { seed: settings.seed, step: step.clone() };
        let gates = Gates { layout, levels, phase };
        let result = Arc::new(OnceLock::new());
        Ok(Self { gates, costs, expectation, settings, step, target, started: false, result })
    }

    /// Where the result is after the training.
    pub fn result(&self) -> Arc<OnceLock<Small>> {
        self.result.clone()
    }

    /// log alphas of every gated level, on the host.
    fn log_alphas(&self, model: &Model) -> Result<BTreeMap<Level, Vec<f64>>> {
        self.gates.levels.iter().map(|&level| Ok((level, model.get(level.tensor())?.to_f64()?))).collect()
    }

    /// The decision at present.
    pub fn decision(&self, model: &Model) -> Result<Decision> {
        let Settings { target, multiple, .. } = self.settings;
        Ok(decide(&self.gates.layout, &self.log_alphas(model)?, &self.costs, target, multiple))
    }

    /// Expected share of the cost that goes.
    pub fn expected(&self, model: &Model) -> Result<f64> {
        let mut pass = Pass::inference(model);
        Ok(1.0 - self.expectation.share(&mut pass)?.tensor.to_f64()?[0])
    }

    fn target_at(&self, step: u64) -> f64 {
        let Settings { target, initial, warm_up, .. } = self.settings;
        initial + (target - initial) * (step as f64 / warm_up.max(1) as f64).min(1.0)
    }

    /// lambda_1 (s - t) + lambda_2 (s - t)^2 with s the expected share that goes: the gradient of log alphas leads down it,
    /// that of the multipliers up. So the value is 0: what goes down less what goes up.
    fn lagrangian(&self, pass: &mut Pass) -> Result<Var> {
        let left = self.expectation.share(pass)?;
        let tape = &mut pass.tape;
        // -(s - t) = left - (1 - t)
        let wanted = Var::constant(self.wanted()?);
        let apart = tape.first(SUB, &[&wanted, &left])?;
        let multipliers = pass.parameter(MULTIPLIERS)?;
        let term = |pass: &mut Pass, multipliers: &Var, apart: &Var| -> Result<Var> {
            let of = |pass: &mut Pass, start| pass.tape.first(Slice { axis: 0, start, length: 1 }, &[multipliers]);
            let (first, second) = (of(pass, 0)?, of(pass, 1)?);
            let linear = pass.tape.first(MUL, &[&first, apart])?;
            let square = pass.tape.first(MUL, &[apart, apart])?;
            let square = pass.tape.first(MUL, &[&second, &square])?;
            pass.tape.first(ADD, &[&linear, &square])
        };
        let down = term(pass, &multipliers.detach(), &apart)?;
        let up = term(pass, &multipliers, &apart.detach())?;
        pass.tape.first(SUB, &[&down, &up])
    }

    /// 1 - t, f32 `[1]`.
    fn wanted(&self) -> Result<Tensor> {
        let minus = Unary(Function::Scale(-1.0));
        let one = Fill { value: 1.0, dims: Shape::new(&[1])?, dtype: DType::F32 };
        let one = dispatch::one(dispatch::run_on(self.target.device(), &one, &[])?, "one")?;
        dispatch::run_one(&ADD, &[&dispatch::run_one(&minus, &[&self.target])?, &one])
    }
}

impl Settings {
    fn check(&self, layout: &Layout, costs: &Costs) -> Result<()> {
        let refuse = |parameter, value: String, allowed| {
            Err(Error::Parameter { op: "structure gates", parameter, value, allowed })
        };
        if !(0.0..1.0).contains(&self.target) || self.target == 0.0 {
            return refuse("target", self.target.to_string(), "above 0 and below 1");
        }
        if !(0.0..=self.target).contains(&self.initial) {
            return refuse("initial", self.initial.to_string(), "0 to the target");
        }
        if !(self.rate.is_finite() && self.rate > 0.0) {
            return refuse("rate", self.rate.to_string(), "finite and above 0");
        }
        if !self.levels.iter().any(|level| layout.count(*level) > 0) {
            return refuse("levels", written(&self.levels), "at least one that the model has");
        }
        if self.multiple == 0 {
            return refuse("multiple_of", "0".into(), "1 or more");
        }
        if let Some(most) = out_of_reach(self.target, layout, &self.levels, costs, self.multiple) {
            let value = format!("{}, where gates of these levels can take away {most}", self.target);
            return refuse("target", value, "at most what can be taken away");
        }
        Ok(())
    }
}

impl OutputHook for Cofi {
    fn on_structure(&self, pass: &mut Pass, place: Place, x: Var) -> Result<Var> {
        self.gates.on_structure(pass, place, x)
    }

    fn channels(&self, pass: &mut Pass) -> Result<Option<Var>> {
        self.gates.channels(pass)
    }
}

impl Method for Cofi {
    fn name(&self) -> &'static str {
        "structure gates"
    }

    fn on_output(&self) -> Option<&dyn OutputHook> {
        Some(self)
    }

    fn on_loss(&self, pass: &mut Pass, _: &Var, micro: &Micro) -> Result<Option<Var>> {
        let lagrangian = self.lagrangian(pass)?;
        // Per label, as the loss is.
        let labels = Reduce { function: ReduceFunction::Sum, axis: Axis::All };
        let labels = dispatch::run_one(&labels, &[&micro.weights])?.reshape(&[1])?;
        Ok(Some(pass.tape.first(MUL, &[&lagrangian, &Var::constant(labels)])?.reshape(&[])?))
    }

    fn on_update(&mut self, step: u64, model: &Model, optimizer: &mut Optimizer) -> Result<()> {
        if !std::mem::replace(&mut self.started, true) {
            optimizer.set_gate_rate(self.settings.rate);
        }
        self.step.upload(&[step as u32])?;
        self.target.upload(&[self.target_at(step) as f32])?;
        for level in &self.gates.levels {
            dispatch::run(&CLAMP, &[model.get(level.tensor())?])?;
        }
        Ok(())
    }

    /// Decides, and makes the model small.
    fn on_finish(&mut self, model: &mut Model) -> Result<()> {
        let decision = self.decision(model)?;
        let (small, keep) = shrink(model, &self.gates.layout, &decision)?;
        let share = decision.share(&self.gates.layout, &self.costs);
        *model = small;
        // Set once: a training finishes once.
        let _ = self.result.set(Small { keep, decision, share });
        Ok(())
    }

    fn invariants(&self, _: &Model) -> Result<Vec<Invariant>> {
        let Some(result) = self.result.get() else {
            return Ok(Vec::new());
        };
        let what = if self.costs.by_channels { "weights" } else { "measured time" };
        Ok(vec![Invariant {
            rule: format!("gates remove at least {:.1} % of the blocks' {what}", 100.0 * self.settings.target),
            measured: format!("{:.2} %", 100.0 * (1.0 - result.share)),
            holds: 1.0 - result.share >= self.settings.target - 1e-9,
        }])
    }
}
