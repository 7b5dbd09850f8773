//! What structures are judged by: a loss of the model's answers, and its gradient at the gates and weights in front of them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::nn::{Model, Pass};
use crate::ops::layout::GatherRows;
use crate::tape::{Grads, Var};
use crate::tensor::Tensor;
use crate::train::lifecycle::Micro;
use crate::train::trainer::weighted_cross_entropy;

/// A loss, the mean over a batch's predicted tokens. All but the first need no labels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Objective {
    /// Cross-entropy of the labels.
    #[default]
    Labels,
    /// Entropy of the model's own answers.
    Entropy,
    /// KL(p, q) from the answers p of the model before pruning (TextPruner's `use_logits`). Its gradient is 0 there, so
    /// rounds go by `entropy` until something has gone.
    DenseKl,
    /// Mean over the vocabulary of (z - z_dense)^2; whole models as above.
    DenseMse,
}

impl Objective {
    /// Whether it compares with the model before pruning.
    pub fn compares(self) -> bool {
        matches!(self, Objective::DenseKl | Objective::DenseMse)
    }
}

/// An objective and the model before pruning, where it compares with it.
#[derive(Clone, Copy)]
pub struct Judge<'a> {
    pub objective: Objective,
    pub dense: Option<&'a Model>,
}

/// A batch's loss and its gradients.
pub struct Judged {
    pub loss: f64,
    pub leaves: BTreeMap<String, Var>,
    pub grads: Grads,
}

impl Judge<'_> {
    /// By the labels alone.
    pub const LABELS: Judge<'static> = Judge { objective: Objective::Labels, dense: None };

    /// Runs a recording pass on a batch and walks back.
    ///
    /// # Errors
    /// Those of the ops; `Error::Shape` where the model to compare with is missing or has another vocabulary.
    pub fn backward(&self, mut pass: Pass, micro: &Micro) -> Result<Judged> {
        let device = pass.model.device().clone();
        let hidden = pass.hidden(&micro.batch)?;
        if self.objective == Objective::Labels {
            let loss = weighted_cross_entropy(&mut pass, &hidden, &micro.targets, &micro.weights)?;
            let share = 1.0 / micro.weight.max(1.0);
            let seed = Tensor::from_slice(&device, loss.dims(), &[share as f32])?;
            let (tape, leaves) = pass.into_leaves();
            let grads = tape.backward(&[(&loss, &seed)])?;
            return Ok(Judged { loss: share * loss.tensor.to_f64()?[0], leaves, grads });
        }
        let logits = predicted(&mut pass, &hidden, micro)?;
        let dense = match self.dense.filter(|_| self.objective.compares()) {
            Some(dense) => {
                let mut pass = Pass::inference(dense);
                let hidden = pass.hidden(&micro.batch)?;
                Some(predicted(&mut pass, &hidden, micro)?.tensor.to_f64()?)
            }
            None => None,
        };
        let width = logits.tensor.shape().last();
        let (loss, seed) = slope(self.objective, &logits.tensor.to_f64()?, dense.as_deref(), width)?;
        let seed = Tensor::from_f64(&device, logits.dims(), logits.tensor.dtype(), &seed)?;
        let (tape, leaves) = pass.into_leaves();
        let grads = tape.backward(&[(&logits, &seed)])?;
        Ok(Judged { loss, leaves, grads })
    }
}

/// Logits `[predicted tokens, V]`.
fn predicted(pass: &mut Pass, hidden: &Var, micro: &Micro) -> Result<Var> {
    let weights = micro.weights.to_f64()?;
    let ids: Vec<u32> = (0u32..).zip(&weights).filter(|(_, w)| **w > 0.0).map(|(i, _)| i).collect();
    let ids = Tensor::from_slice(pass.model.device(), &[ids.len()], &ids)?;
    let shape = hidden.tensor.shape();
    let rows = hidden.reshape(&[shape.rows(), shape.last()])?;
    let rows = pass.tape.first(GatherRows, &[&rows, &Var::constant(ids)])?;
    pass.logits(&rows)
}

/// Mean loss over rows of logits and its gradient there.
fn slope(objective: Objective, logits: &[f64], dense: Option<&[f64]>, width: usize) -> Result<(f64, Vec<f64>)> {
    if objective.compares() && dense.is_none_or(|dense| dense.len() != logits.len()) {
        let got = format!("{} and {:?}", logits.len(), dense.map(<[f64]>::len));
        return Err(Error::Shape { op: "importance", rule: "logits of the model before pruning, as many", got });
    }
    let rows = (logits.len() / width.max(1)).max(1) as f64;
    let (mut loss, mut seed) = (0.0, Vec::with_capacity(logits.len()));
    for (r, z) in logits.chunks(width.max(1)).enumerate() {
        let log_q = log_softmax(z);
        let other = dense.map(|dense| &dense[r * width..(r + 1) * width]);
        match (objective, other) {
            (Objective::DenseKl, Some(other)) => {
                let log_p = log_softmax(other);
                loss += log_p.iter().zip(&log_q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
                seed.extend(log_p.iter().zip(&log_q).map(|(p, q)| q.exp() - p.exp()));
            }
            (Objective::DenseMse, Some(other)) => {
                loss += z.iter().zip(other).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / width as f64;
                seed.extend(z.iter().zip(other).map(|(a, b)| 2.0 * (a - b) / width as f64));
            }
            _ => {
                let entropy = -log_q.iter().map(|q| q.exp() * q).sum::<f64>();
                loss += entropy;
                seed.extend(log_q.iter().map(|q| -q.exp() * (q + entropy)));
            }
        }
    }
    seed.iter_mut().for_each(|s| *s /= rows);
    Ok((loss / rows, seed))
}

fn log_softmax(z: &[f64]) -> Vec<f64> {
    let most = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum = z.iter().map(|x| (x - most).exp()).sum::<f64>().ln() + most;
    z.iter().map(|x| x - sum).collect()
}
