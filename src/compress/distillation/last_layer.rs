//! Distillation as a loss hook: last-hidden-state MSE through the kept-channel map or a learned projection, soft labels
//! on the source-language stream, hard labels on the target-language stream (LightChatGLM Eq 10 and Algorithm 2).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::logits::logits;
use super::{scaled, total};
use crate::device::Device;
use crate::error::Result;
use crate::nn::{Model, Pass};
use crate::ops::distill::{Direction, HiddenMse, Kl, LinearKl, Reduction};
use crate::ops::matmul::Matmul;
use crate::tape::Var;
use crate::tensor::Tensor;
use crate::train::lifecycle::{Method, Micro, Teacher};
use crate::train::trainer::{LOSS_CHUNK, sum, weighted_cross_entropy};

/// Name of the learned projection among the student's tensors while it trains.
pub const PROJECTION: &str = "distil.projection.weight";

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Weights {
    /// Hidden-state MSE.
    pub hidden: f32,
    /// KL against the teacher's distribution on the source-language stream.
    pub soft: f32,
    /// Cross-entropy against the teacher's arg-max on the target-language stream.
    pub hard: f32,
}

/// How the student's hidden width meets the teacher's.
#[derive(Clone)]
pub enum Projection {
    /// The teacher's channels that the student kept, as a `[d_student, d_teacher]` selection by row.
    Kept(Tensor),
    /// Student -> teacher, learned ([`PROJECTION`], `[d_teacher, d_student]`).
    Learned,
    /// Equal widths.
    None,
}

#[derive(Clone)]
pub struct Distillation {
    pub weights: Weights,
    pub temperature: f32,
    /// Multiply the KL by T^2, so that its gradient keeps its scale (Hinton et al. 2015).
    pub squared: bool,
    /// `HalfSum`: Eq 10 to the letter; `Mean`: independent of batch and width.
    pub reduction: Reduction,
    pub normalised: bool,
    pub projection: Projection,
    /// The teacher's head `[V, d_teacher]`, and a tagger's bias `[labels]`.
    pub teacher_head: Tensor,
    pub teacher_bias: Option<Tensor>,
}

impl Distillation {
    /// The same on another device.
    pub fn on(&self, device: &Arc<dyn Device>) -> Result<Self> {
        Ok(Self {
            projection: match &self.projection {
                Projection::Kept(selection) => Projection::Kept(selection.to_device(device)?),
                Projection::Learned => Projection::Learned,
                Projection::None => Projection::None,
            },
            teacher_head: self.teacher_head.to_device(device)?,
            teacher_bias: self.teacher_bias.as_ref().map(|bias| bias.to_device(device)).transpose()?,
            ..*self
        })
    }

    /// The squared error in the unit of the rows' weights: with `Mean`, sum over rows of weight * mean over channels.
    /// That is half the sum times 2 / width: no factor that a launch is given depends on how many rows a batch labels.
    fn hidden_loss(&self, pass: &mut Pass, rows: &Var, teacher: &Tensor, weights: &Tensor) -> Result<Var> {
        let teacher = pass.constant(teacher)?;
        let (student, teacher) = match &self.projection {
            Projection::Kept(selection) => {
                // Selecting columns is a product with a 0/1 matrix; the teacher is a constant, so nothing is recorded.
                let selection = pass.constant(selection)?;
                (rows.clone(), pass.tape.first(Matmul::linear(), &[&teacher, &selection])?)
            }
            Projection::Learned => {
                let projection = pass.parameter(PROJECTION)?;
                (pass.tape.first(Matmul::linear(), &[rows, &projection])?, teacher)
            }
            Projection::None => (rows.clone(), teacher),
        };
        let op = HiddenMse { reduction: Reduction::HalfSum, normalised: self.normalised };
        let loss = pass.tape.first(op, &[&student, &teacher, &Var::constant(weights.clone())])?;
        let width = student.tensor.shape().last() as f32;
        let unit = if self.reduction == Reduction::Mean { 2.0 / width } else { 1.0 };
        scaled(pass, &loss, self.weights.hidden * unit)
    }
}

impl Distillation {
    /// KL of each row. A tagger's few logits are held whole, because its head has a bias; those of a language model are
    /// computed chunk by chunk.
    fn soft_losses(&self, pass: &mut Pass, rows: &Var, teacher: &Teacher) -> Result<Var> {
        let (temperature, squared) = (self.temperature, self.squared);
        let weights = Var::constant(teacher.soft_weights.clone());
        let (hidden, teacher_head) = (pass.constant(&teacher.hidden)?, pass.constant(&self.teacher_head)?);
        let head = pass.head_weight()?;
        let Some(teacher_bias) = &self.teacher_bias else {
            let op = LinearKl { direction: Direction::Forward, temperature, squared, chunk: LOSS_CHUNK };
            return pass.tape.first(op, &[rows, &head, &hidden, &teacher_head, &weights]);
        };
        let (bias, teacher_bias) = (pass.parameter("head.bias")?, pass.constant(teacher_bias)?);
        let own = logits(&mut pass.tape, rows, &head, Some(&bias))?;
        let teacher = logits(&mut pass.tape, &hidden, &teacher_head, Some(&teacher_bias))?;
        let op = Kl { direction: Direction::Forward, temperature, squared };
        pass.tape.first(op, &[&own, &teacher, &weights])
    }
}

/// A 0/1 matrix `[kept, width]` that selects channels.
pub fn selection(model: &Model, kept: &[usize], width: usize) -> Result<Tensor> {
    let mut values = vec![0.0f32; kept.len() * width];
    for (row, &column) in kept.iter().enumerate() {
        if let Some(v) = values.get_mut(row * width + column) {
            *v = 1.0;
        }
    }
    Tensor::from_slice(model.device(), &[kept.len(), width], &values)
}

impl Method for Distillation {
    fn name(&self) -> &'static str {
        "distillation"
    }

    /// Terms in the unit of the rows' weights: dividing by the step's weight gives the mean however the step was split.
    fn on_loss(&self, pass: &mut Pass, hidden: &Var, micro: &Micro) -> Result<Option<Var>> {
        let Some(teacher) = &micro.teacher else {
            return Ok(None);
        };
        let shape = hidden.tensor.shape();
        let rows = hidden.reshape(&[shape.rows(), shape.last()])?;
        let mut terms = Vec::new();
        if self.weights.hidden > 0.0 {
            terms.push(self.hidden_loss(pass, &rows, &teacher.hidden, &teacher.hidden_weights)?);
        }
        if self.weights.soft > 0.0 {
            let losses = self.soft_losses(pass, &rows, teacher)?;
            let total = sum(pass, &losses)?;
            terms.push(scaled(pass, &total, self.weights.soft)?);
        }
        if self.weights.hard > 0.0 {
            let total = weighted_cross_entropy(pass, hidden, &teacher.hard_targets, &teacher.hard_weights)?;
            terms.push(scaled(pass, &total, self.weights.hard)?);
        }
        total(pass, terms)
    }

    fn on_finish(&mut self, model: &mut Model) -> Result<()> {
        model.tensors.remove(PROJECTION);
        Ok(())
    }
}
