//! What the hooks of a pipeline's stage are made from, here and in another process.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::run_folder::State;
use super::stages;
use crate::compress::distillation::{Distillation, Projection, Weights};
use crate::error::{Error, Result};
use crate::nn::Model;
use crate::nn::pieces;
use crate::ops::distill::Reduction;
use crate::pipeline::executor::Encoded;
use crate::pipeline::rank::Make;
use crate::pipeline::words::Described;
use crate::tensor::Tensor;
use crate::train::lifecycle::Method;

/// What earlier stages of the flow promised, and the loss beside it.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Promises {
    state: State,
    distillation: Option<Terms>,
}

/// A distillation but for its tensors.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Terms {
    weights: Weights,
    temperature: f32,
    squared: bool,
    half_sum: bool,
    normalised: bool,
    learned: bool,
}

/// Names of a distillation's tensors on their way.
const TEACHER_HEAD: &str = "teacher_head";
const SELECTION: &str = "selection";

impl Promises {
    pub fn new(state: &State, distillation: Option<&Distillation>) -> Self {
        let terms = |d: &Distillation| Terms {
            weights: d.weights,
            temperature: d.temperature,
            squared: d.squared,
            half_sum: d.reduction == Reduction::HalfSum,
            normalised: d.normalised,
            learned: matches!(d.projection, Projection::Learned),
        };
        Self { state: state.clone(), distillation: distillation.map(terms) }
    }

    /// Hooks of the stage that has the weights in `part`.
    pub fn methods(&self, part: &Model, distillation: Option<&Distillation>) -> Result<Vec<Box<dyn Method>>> {
        let mut methods = stages::held(part, &self.state)?;
        let last = pieces::pieces(&part.config);
        let head = part.tensors.keys().any(|name| pieces::piece_of(&part.config, name) + 1 == last);
        if let Some(distillation) = distillation.filter(|_| head) {
            methods.push(Box::new(distillation.on(part.device())?));
        }
        Ok(methods)
    }

    /// All of it for another process.
    pub fn described(&self, distillation: Option<&Distillation>) -> Result<Described> {
        let mut tensors = Encoded::new();
        let mut add = |name: &str, tensor: &Tensor| -> Result<()> {
            tensors.insert(name.into(), (tensor.meta(), tensor.to_bytes()?));
            Ok(())
        };
        if let Some(distillation) = distillation {
            add(TEACHER_HEAD, &distillation.teacher_head)?;
            if let Projection::Kept(selection) = &distillation.projection {
                add(SELECTION, selection)?;
            }
        }
        let text = serde_json::to_string(self).map_err(|e| unreadable(&e))?;
        Ok(Described { text, tensors })
    }
}

fn unreadable(e: &serde_json::Error) -> Error {
    Error::NotAvailable { device: "pipeline".into(), reason: format!("hooks that cannot be sent: {e}") }
}

/// Makes hooks from what [`Promises::described`] gave.
fn made(described: &Described, part: &Model) -> Result<Vec<Box<dyn Method>>> {
    let promises: Promises = serde_json::from_str(&described.text).map_err(|e| unreadable(&e))?;
    let tensor = |name: &str| -> Result<Option<Tensor>> {
        let found = described.tensors.get(name);
        found.map(|(meta, bytes)| Tensor::from_bytes(part.device(), *meta, bytes)).transpose()
    };
    // Only the stage with the head is sent the teacher's.
    let distillation = match (promises.distillation, tensor(TEACHER_HEAD)?) {
        (Some(terms), Some(teacher_head)) => Some(Distillation {
            weights: terms.weights,
            temperature: terms.temperature,
            squared: terms.squared,
            reduction: if terms.half_sum { Reduction::HalfSum } else { Reduction::Mean },
            normalised: terms.normalised,
            projection: match tensor(SELECTION)? {
                Some(selection) => Projection::Kept(selection),
                None if terms.learned => Projection::Learned,
                None => Projection::None,
            },
            teacher_head,
        }),
        _ => None,
    };
    promises.methods(part, distillation.as_ref())
}

/// What a process that serves a pipeline makes hooks with.
pub fn maker() -> Arc<Make> {
    Arc::new(made)
}
