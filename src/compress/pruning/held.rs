//! Sparsity that an earlier stage made, held through a later training: the mask is read off the weights.

use std::collections::BTreeMap;

use super::pattern::{Pattern, absolute, matrix_dims};
use super::selection::{Scope, select};
use crate::dispatch;
use crate::error::Result;
use crate::nn::Model;
use crate::ops::binary::MUL;
use crate::ops::select::Above;
use crate::tensor::Tensor;
use crate::train::lifecycle::{Invariant, Method};
use crate::train::optimizer::Optimizer;

pub struct Held {
    /// Weights and how many of their elements are zero at least.
    sparse: BTreeMap<String, usize>,
    pattern: Pattern,
    masks: Vec<Tensor>,
}

impl Held {
    /// For 2:4 patterns the masks are the best of each group: on weights that are 2:4 already, their own. For all others
    /// they are the weights that are not 0.
    pub fn new(model: &Model, sparse: BTreeMap<String, usize>, pattern: Pattern) -> Result<Self> {
        let mask = |name: &String| {
            let weight = model.get(name)?;
            let rows = absolute(&weight.reshape(&matrix_dims(weight))?)?;
            if pattern.is_24() {
                let mut masks = select(std::slice::from_ref(name), &[rows], pattern, Scope::Layer, 0.5)?;
                return masks.remove(0).reshape(weight.dims());
            }
            dispatch::run_one(&Above { threshold: 0.0 }, &[&rows])?.reshape(weight.dims())
        };
        let masks = sparse.keys().map(mask).collect::<Result<_>>()?;
        Ok(Self { sparse, pattern, masks })
    }
}

/// Masks are read off the zeros: what is kept and comes out 0 stays in the mask as next to nothing, which every grid rounds
/// to 0 again.
pub fn keep_alive(kept: impl IntoIterator<Item = bool>, weights: &mut [f64]) {
    for (w, _) in weights.iter_mut().zip(kept).filter(|(w, kept)| *kept && **w == 0.0) {
        *w = f64::from(f32::MIN_POSITIVE).copysign(*w);
    }
}

impl Method for Held {
    fn name(&self) -> &'static str {
        "sparsity"
    }

    fn on_update(&mut self, step: u64, model: &Model, optimizer: &mut Optimizer) -> Result<()> {
        // The optimizer holds the masks from here on; a resumed training has them in its state but sets the same ones again.
        if step == 0 || optimizer.steps() == step {
            for (name, mask) in self.sparse.keys().zip(std::mem::take(&mut self.masks)) {
                optimizer.set_mask(name, &mask)?;
                let weight = model.get(name)?;
                weight.assign(&dispatch::run_one(&MUL, &[weight, &mask])?)?;
            }
        }
        Ok(())
    }

    /// Every weight has as many zeros as it had and, for 2:4, at most two of every four along the reduction dimension are
    /// not zero.
    fn invariants(&self, model: &Model) -> Result<Vec<Invariant>> {
        let (mut worst, mut zero, mut all, mut declared, mut revived) = (0, 0, 0, 0, 0);
        for (name, &zeros) in &self.sparse {
            let values = model.values(name)?;
            let kept = |group: &[f32]| group.iter().filter(|&&w| w != 0.0).count();
            worst = worst.max(values.chunks(4).map(kept).max().unwrap_or(0));
            let gone = values.len() - kept(&values);
            (zero, all, declared) = (zero + gone, all + values.len(), declared + zeros);
            revived += zeros.saturating_sub(gone);
        }
        let mut invariants = Vec::new();
        if self.pattern.is_24() {
            let form = if self.pattern.is_two_dimensional() { "2-D" } else { "1-D" };
            invariants.push(Invariant {
                rule: format!("2:4 ({form}) along the reduction dimension of {} weights", self.sparse.len()),
                measured: format!("at most {worst} of 4 non-zero"),
                holds: worst <= 2,
            });
        }
        invariants.push(Invariant {
            rule: format!(
                "declared sparsity {:.4} %: {declared} zeros",
                100.0 * declared as f64 / f64::max(all as f64, 1.0)
            ),
            measured: format!("{zero} of {all} weights are zero"),
            // A kept weight may itself be zero, never the other way round.
            holds: revived == 0 && zero <= declared + all / 1000,
        });
        Ok(invariants)
    }
}
