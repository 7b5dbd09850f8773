//! Who takes the steps of a training: one device, or the stages of a pipeline.

use std::collections::BTreeMap;

use super::graphs::Graphs;
use super::lifecycle::{Method, Micro};
use super::optimizer::{Optimizer, Outcome, Settings};
use super::trainer;
use crate::error::{Error, Result};
use crate::nn::Model;
use crate::tensor::Tensor;

/// What a step is told beside its micro-batches.
#[derive(Clone, Copy, Debug)]
pub struct StepSettings {
    pub dropout: f32,
    pub seed: u64,
    /// Steps of the whole training, which the learning rate goes by.
    pub steps: u64,
}

/// Takes steps. `model` is the one at home, where validation and checkpoints read it.
pub trait Stepper {
    /// Goes on from what [`Stepper::state`] gave after `step` steps.
    fn restore(&mut self, state: &BTreeMap<String, Tensor>, step: u64) -> Result<()>;

    /// The hooks' turn before the first step and after each.
    fn hooks(&mut self, step: u64, model: &Model, methods: &mut [Box<dyn Method>]) -> Result<()>;

    /// Of the next step.
    fn learning_rate(&self, settings: StepSettings) -> f64;

    /// Whether it works on the next step's micro-batches during this one.
    fn looks_ahead(&self) -> bool {
        false
    }

    /// Gradients of all micro-batches and one update; may still be under way when this returns. `next`: those of the step
    /// after it, where it looks ahead.
    fn step(
        &mut self,
        model: &Model,
        micros: Vec<Micro>,
        next: &[Micro],
        methods: &[Box<dyn Method>],
        settings: StepSettings,
    ) -> Result<()>;

    /// Steps of this session that were replayed from what was captured of an earlier one.
    fn replayed(&self) -> u64 {
        0
    }

    /// What the last step came to.
    fn outcome(&mut self) -> Result<Outcome>;

    /// The error of step `failed` with those micro-batches, after which no step has changed anything.
    fn failure(
        &mut self,
        model: &Model,
        failed: (u64, Vec<Micro>),
        methods: &[Box<dyn Method>],
        settings: StepSettings,
    ) -> Result<Error>;

    /// Brings the parameters into `model`.
    fn bring_home(&mut self, model: &mut Model) -> Result<()>;

    /// Everything beside the parameters that a resumed training needs.
    fn state(&mut self) -> Result<BTreeMap<String, Tensor>>;

    /// Refuses parameters or moments that are not finite.
    fn check_finite(&mut self) -> Result<()>;

    /// Why a loss is not finite after `step`.
    fn find_non_finite(&mut self, step: u64) -> Result<Error>;
}

/// The whole model on its device; its tensors are the optimizer's.
pub struct OneDevice {
    optimizer: Optimizer,
    graphs: Graphs,
}

impl OneDevice {
    /// `graphs`: shapes of micro-batches whose step is captured at most.
    pub fn new(model: &mut Model, settings: Settings, graphs: usize) -> Result<Self> {
        Ok(Self { optimizer: Optimizer::new(model, settings, |_| true)?, graphs: Graphs::new(graphs) })
    }
}

impl Stepper for OneDevice {
    fn restore(&mut self, state: &BTreeMap<String, Tensor>, step: u64) -> Result<()> {
        self.optimizer.restore(state, step)
    }

    fn hooks(&mut self, step: u64, model: &Model, methods: &mut [Box<dyn Method>]) -> Result<()> {
        methods.iter_mut().try_for_each(|m| m.on_update(step, model, &mut self.optimizer))
    }

    fn learning_rate(&self, settings: StepSettings) -> f64 {
        self.optimizer.learning_rate(settings.steps)
    }

    fn step(
        &mut self,
        model: &Model,
        micros: Vec<Micro>,
        _next: &[Micro],
        methods: &[Box<dyn Method>],
        settings: StepSettings,
    ) -> Result<()> {
        self.optimizer.begin(trainer::weight(&micros), settings.steps)?;
        let dropout = (settings.dropout, settings.seed);
        let mut queue = |o: &mut Optimizer, micros: &[Micro]| trainer::queue(model, o, micros, methods, dropout);
        self.graphs.step(model.device().as_ref(), &mut self.optimizer, micros, &mut queue)
    }

    fn replayed(&self) -> u64 {
        self.graphs.replayed
    }

    fn outcome(&mut self) -> Result<Outcome> {
        self.optimizer.outcome()
    }

    /// The step is run again for its gradients.
    fn failure(
        &mut self,
        model: &Model,
        (failed, micros): (u64, Vec<Micro>),
        methods: &[Box<dyn Method>],
        settings: StepSettings,
    ) -> Result<Error> {
        self.optimizer.set_counter(failed - 1)?;
        self.optimizer.forget_gradients();
        trainer::gradients(model, &mut self.optimizer, &micros, methods, (settings.dropout, settings.seed))?;
        self.optimizer.find_non_finite(failed)
    }

    fn bring_home(&mut self, _model: &mut Model) -> Result<()> {
        Ok(())
    }

    fn state(&mut self) -> Result<BTreeMap<String, Tensor>> {
        self.optimizer.state()
    }

    fn check_finite(&mut self) -> Result<()> {
        self.optimizer.check_finite()
    }

    fn find_non_finite(&mut self, step: u64) -> Result<Error> {
        self.optimizer.find_non_finite(step)
    }
}
