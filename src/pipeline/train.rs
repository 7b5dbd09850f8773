//! A pipeline as what takes the steps of a training.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::executor::{Pipeline, StepReport};
use crate::device::{CpuDevice, Device};
use crate::error::{Error, Result};
use crate::nn::Model;
use crate::tensor::Tensor;
use crate::train::lifecycle::{Method, Micro};
use crate::train::optimizer::Outcome;
use crate::train::stepper::{StepSettings, Stepper};

/// Called after each step with its number, its micro-batches and what was measured.
pub type OnStep = dyn FnMut(u64, &Pipeline, &[Micro], &StepReport) -> Result<()>;

pub struct Staged {
    pipeline: Pipeline,
    /// Where state is brought to on its way to a file: memory of the host, because a device that holds one stage may not
    /// hold the optimizer of all.
    home: Arc<dyn Device>,
    last: Outcome,
    /// Whether the teacher has begun: its states are a step ahead from then on.
    taught: bool,
    on_step: Box<OnStep>,
}

impl Staged {
    /// # Errors
    /// Those of opening the host's memory.
    pub fn new(pipeline: Pipeline, on_step: Box<OnStep>) -> Result<Self> {
        Ok(Self {
            pipeline,
            home: Arc::new(CpuDevice::new(Some(1))?),
            last: Outcome { loss: 0.0, norm: 0.0, failed: None },
            taught: false,
            on_step,
        })
    }
}

impl Stepper for Staged {
    fn restore(&mut self, state: &BTreeMap<String, Tensor>, step: u64) -> Result<()> {
        self.pipeline.restore(state, step)
    }

    fn hooks(&mut self, step: u64, _model: &Model, _methods: &mut [Box<dyn Method>]) -> Result<()> {
        self.pipeline.hooks(step)
    }

    fn learning_rate(&self, settings: StepSettings) -> f64 {
        self.pipeline.setup().optimizer.schedule.rate(self.pipeline.steps() + 1, settings.steps)
    }

    fn step(
        &mut self,
        _model: &Model,
        micros: Vec<Micro>,
        next: &[Micro],
        _methods: &[Box<dyn Method>],
        settings: StepSettings,
    ) -> Result<()> {
        if self.looks_ahead() && !std::mem::replace(&mut self.taught, true) {
            self.pipeline.teach(&micros)?;
        }
        let report = self.pipeline.step(&micros, next, (settings.dropout, settings.seed, settings.steps))?;
        self.last = Outcome { loss: report.loss, norm: report.norm, failed: None };
        (self.on_step)(self.pipeline.steps(), &self.pipeline, &micros, &report)
    }

    fn looks_ahead(&self) -> bool {
        self.pipeline.setup().teacher.is_some()
    }

    fn outcome(&mut self) -> Result<Outcome> {
        Ok(self.last)
    }

    /// A stage whose gradients are not finite has named them when its step ended.
    fn failure(
        &mut self,
        _model: &Model,
        (failed, _): (u64, Vec<Micro>),
        _methods: &[Box<dyn Method>],
        _settings: StepSettings,
    ) -> Result<Error> {
        self.find_non_finite(failed)
    }

    fn bring_home(&mut self, model: &mut Model) -> Result<()> {
        self.pipeline.collect(model)
    }

    fn state(&mut self) -> Result<BTreeMap<String, Tensor>> {
        self.pipeline.state(&self.home)
    }

    fn check_finite(&mut self) -> Result<()> {
        self.pipeline.check_finite()
    }

    fn find_non_finite(&mut self, step: u64) -> Result<Error> {
        match self.pipeline.check_finite() {
            Err(named) => Ok(named),
            Ok(()) => {
                let (layer, tensor) = ("model".to_string(), "loss".to_string());
                Ok(Error::NonFinite { step, layer, tensor, count: 1, index: 0 })
            }
        }
    }
}
