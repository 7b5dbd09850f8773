//! Sparsity that an earlier stage made, held through a later training: the mask is read off the weights.

use super::pattern::{Pattern, matrix_dims};
use super::selection::{Scope, select};
use crate::dispatch;
use crate::error::Result;
use crate::nn::Model;
use crate::ops::binary::{Binary, BinaryFunction};
use crate::tensor::Tensor;
use crate::train::lifecycle::{Invariant, Method};
use crate::train::optimizer::Optimizer;

pub struct Held {
    weights: Vec<String>,
    pattern: Pattern,
    /// Share of the weights that is zero at least.
    sparsity: f64,
    masks: Vec<Tensor>,
}

impl Held {
    /// For 2:4 patterns the masks are the best of each group: on weights that are 2:4 already, their own. For all others
    /// they are the weights that are not 0. `sparsity`: what was declared, over all of `weights`.
    pub fn new(model: &Model, weights: Vec<String>, pattern: Pattern, sparsity: f64) -> Result<Self> {
        let mask = |name: &String| {
            let weight = model.get(name)?;
            let rows = super::pattern::absolute(&weight.reshape(&matrix_dims(weight))?)?;
            if pattern.is_24() {
                let mut masks = select(std::slice::from_ref(name), &[rows], pattern, Scope::Layer, 0.5)?;
                return masks.remove(0).reshape(weight.dims());
            }
            let kept: Vec<f32> = rows.to_vec::<f32>()?.iter().map(|&w| f32::from(u8::from(w != 0.0))).collect();
            Tensor::from_slice(weight.device(), weight.dims(), &kept)
        };
        let masks = weights.iter().map(mask).collect::<Result<_>>()?;
        Ok(Self { weights, pattern, sparsity, masks })
    }
}

impl Method for Held {
    fn name(&self) -> &'static str {
        "sparsity"
    }

    fn on_update(&mut self, step: u64, model: &Model, optimizer: &mut Optimizer) -> Result<()> {
        // The optimizer holds the masks from here on; a resumed training has them in its state but sets the same ones again.
        if step == 0 || optimizer.steps() == step {
            for (name, mask) in self.weights.iter().zip(std::mem::take(&mut self.masks)) {
                optimizer.set_mask(name, &mask)?;
                let weight = model.get(name)?;
                weight.assign(&dispatch::run_one(&Binary(BinaryFunction::Mul), &[weight, &mask])?)?;
            }
        }
        Ok(())
    }

    /// At least the declared share is zero and, for 2:4, at most two of every four along the reduction dimension are not.
    fn invariants(&self, model: &Model) -> Result<Vec<Invariant>> {
        let mut worst = 0;
        let (mut zero, mut all) = (0usize, 0usize);
        for name in &self.weights {
            let values = model.values(name)?;
            let kept = |group: &[f32]| group.iter().filter(|&&w| w != 0.0).count();
            worst = worst.max(values.chunks(4).map(kept).max().unwrap_or(0));
            zero += values.len() - kept(&values);
            all += values.len();
        }
        let mut invariants = Vec::new();
        if self.pattern.is_24() {
            let form = if self.pattern.is_two_dimensional() { "2-D" } else { "1-D" };
            invariants.push(Invariant {
                rule: format!("2:4 ({form}) along the reduction dimension of {} weights", self.weights.len()),
                measured: format!("at most {worst} of 4 non-zero"),
                holds: worst <= 2,
            });
        }
        let least = (self.sparsity * all as f64).floor() as usize;
        // A kept weight may itself be zero, never the other way round; greedy 2-D masks prune one in 32 more.
        let spare = if self.pattern == Pattern::TwoFour2dGreedy { all / 16 } else { all / 1000 + self.weights.len() };
        invariants.push(Invariant {
            rule: format!("declared sparsity {} %", 100.0 * self.sparsity),
            measured: format!("{zero} of {all} weights are zero"),
            holds: (least.saturating_sub(self.weights.len())..=least + spare).contains(&zero),
        });
        Ok(invariants)
    }
}
