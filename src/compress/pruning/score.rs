//! Criteria that need no calibration data: random, magnitude, first-order with momentum.

use std::collections::BTreeMap;

use super::pattern::absolute;
use super::pruner::{Criterion, Work};
use crate::dispatch;
use crate::error::{Error, Result};
use crate::nn::Model;
use crate::ops::binary::{AccumulateScaled, MUL};
use crate::ops::random::Uniform;
use crate::ops::unary::{Function, Unary};
use crate::rng::Site;
use crate::tensor::Tensor;
use crate::train::optimizer::Optimizer;

/// The baseline: a uniform number per unit, drawn once, so that masks of rising sparsity are nested.
pub struct Random {
    pub seed: u64,
}

impl Criterion for Random {
    fn name(&self) -> &'static str {
        "random pruning"
    }

    fn prune(&mut self, work: &Work) -> Result<Vec<Tensor>> {
        let draw = |(index, units): (usize, &Tensor)| {
            let site = Site { seed: self.seed, site: 0x9a00_0000 + index as u32, step: 0 };
            let op = Uniform { low: 0.0, high: 1.0, dims: units.shape(), site, dtype: units.dtype() };
            dispatch::one(dispatch::run_on(units.device(), &op, &[])?, "uniform")
        };
        let scores = work.units.iter().enumerate().map(draw).collect::<Result<Vec<_>>>()?;
        work.select(&scores)
    }
}

/// |w| (Han et al. 2015).
pub struct Magnitude;

impl Criterion for Magnitude {
    fn name(&self) -> &'static str {
        "magnitude pruning"
    }

    fn prune(&mut self, work: &Work) -> Result<Vec<Tensor>> {
        let score = |name: &String| work.pool(&absolute(&work.matrix(name)?)?);
        work.select(&work.weights.iter().map(score).collect::<Result<Vec<_>>>()?)
    }
}

/// S <- momentum S + |w dL/dw| after every update (Intel Neural Compressor's snip_momentum, after Lee et al. 2019). The
/// gradient is that of the update's loss per unit of weight, before clipping.
pub struct FirstOrder {
    momentum: f32,
    scores: BTreeMap<String, Tensor>,
}

/// Names of the scores in a checkpoint.
const SCORES: &str = "pruning.first_order/";

impl FirstOrder {
    pub fn new(momentum: f32) -> Self {
        Self { momentum, scores: BTreeMap::new() }
    }
}

impl Criterion for FirstOrder {
    fn name(&self) -> &'static str {
        "first-order pruning"
    }

    fn observe(&mut self, model: &Model, weights: &[String], optimizer: &Optimizer) -> Result<()> {
        // A step that overflowed the loss scale has no gradient.
        if optimizer.is_void()? {
            return Ok(());
        }
        for name in weights {
            let (gradient, factor) = optimizer.gradient(name)?;
            let product = dispatch::run_one(&MUL, &[model.get(name)?, &gradient])?;
            let product = dispatch::run_one(&Unary(Function::Scale(factor)), &[&product])?;
            let score = absolute(&product)?;
            if let Some(sum) = self.scores.get(name) {
                dispatch::run(&AccumulateScaled { factor: self.momentum }, &[&score, sum])?;
            }
            self.scores.insert(name.clone(), score);
        }
        Ok(())
    }

    /// # Errors
    /// `Error::Recipe` at step 0: there has been no gradient yet.
    fn prune(&mut self, work: &Work) -> Result<Vec<Tensor>> {
        let score = |name: &String| {
            let score = self.scores.get(name).ok_or_else(|| Error::Recipe {
                key: "pruning window".into(),
                value: "a first mask before any gradient".into(),
                allowed: "a window that starts at step 1 or later for first-order scores".into(),
            })?;
            work.pool(score)
        };
        work.select(&work.weights.iter().map(score).collect::<Result<Vec<_>>>()?)
    }

    fn state(&self) -> BTreeMap<String, Tensor> {
        self.scores.iter().map(|(name, score)| (format!("{SCORES}{name}"), score.clone())).collect()
    }

    fn restore(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let own = state.iter().filter_map(|(key, score)| Some((key.strip_prefix(SCORES)?.to_string(), score.clone())));
        self.scores = own.collect();
        Ok(())
    }
}
