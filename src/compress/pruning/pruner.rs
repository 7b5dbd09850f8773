//! The life-cycle method: at the steps that its timing names it asks its criterion for masks and hands them to the
//! optimizer, which holds them on gradient, parameter and moments.

use std::collections::BTreeMap;

use super::curve::Timing;
use super::pattern::{Pattern, matrix_dims};
use super::selection::{self, Scope};
use crate::dispatch;
use crate::error::{Error, Result};
use crate::nn::Model;
use crate::ops::binary::MUL;
use crate::tensor::Tensor;
use crate::train::lifecycle::{Invariant, Method};
use crate::train::optimizer::Optimizer;

/// What is pruned to what, whatever ranks it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    pub pattern: Pattern,
    pub scope: Scope,
    /// Share of the units pruned at the end.
    pub sparsity: f64,
    pub timing: Timing,
}

/// Names of the weights of `linears` that consist of whole units of a pattern.
pub fn prunable(model: &Model, linears: &[String], pattern: Pattern) -> Vec<String> {
    let names = linears.iter().map(|linear| format!("{linear}.weight"));
    names.filter(|name| model.tensors.get(name).is_some_and(|t| pattern.divides(matrix_dims(t)))).collect()
}

/// One pruning step: what a criterion works with.
pub struct Work<'a> {
    pub model: &'a Model,
    pub weights: &'a [String],
    pub pattern: Pattern,
    pub scope: Scope,
    /// Sparsity to be reached.
    pub sparsity: f64,
    /// Sparsity reached before.
    pub before: f64,
    /// Units kept so far, per weight: grids of zeros and ones.
    pub units: &'a [Tensor],
}

impl Work<'_> {
    /// A weight f32 as rows `[n, k]`; shares its memory.
    pub fn matrix(&self, name: &str) -> Result<Tensor> {
        let weight = self.model.get(name)?;
        weight.reshape(&matrix_dims(weight))
    }

    /// Selects among all weights by scores of units, all >= 0. What is pruned stays pruned.
    pub fn select(&self, scores: &[Tensor]) -> Result<Vec<Tensor>> {
        let scores =
            scores.iter().zip(self.units).map(|(s, units)| self.demoted(s, units)).collect::<Result<Vec<_>>>()?;
        selection::select(self.weights, &scores, self.pattern, self.scope, self.sparsity)
    }

    /// As [`Work::select`] for the weight with this index alone.
    pub fn select_one(&self, index: usize, scores: &Tensor) -> Result<Tensor> {
        let scores = [self.demoted(scores, &self.units[index])?];
        let names = &self.weights[index..=index];
        let mut units = selection::select(names, &scores, self.pattern, self.scope, self.sparsity)?;
        units.pop().ok_or_else(|| Error::file("pruning", &self.weights[index], "no mask was made"))
    }

    fn demoted(&self, scores: &Tensor, units: &Tensor) -> Result<Tensor> {
        // In groups of four a pruned weight's score of 0 already ranks it last.
        if self.pattern.is_24() { Ok(scores.clone()) } else { selection::demote(scores, units) }
    }

    /// Scores of units from scores of weights f32 `[n, k]`.
    pub fn pool(&self, scores: &Tensor) -> Result<Tensor> {
        self.pattern.pool(scores)
    }

    /// Zeroes the weights that a grid prunes; gives the mask in the weight's shape.
    pub fn apply(&self, name: &str, units: &Tensor) -> Result<Tensor> {
        let weight = self.model.get(name)?;
        let mask = self.pattern.expand(units, matrix_dims(weight))?.reshape(weight.dims())?;
        weight.assign(&dispatch::run_one(&MUL, &[weight, &mask])?)?;
        Ok(mask)
    }
}

/// What ranks units.
pub trait Criterion {
    fn name(&self) -> &'static str;

    /// After every update, also between pruning steps.
    fn observe(&mut self, _model: &Model, _weights: &[String], _optimizer: &Optimizer) -> Result<()> {
        Ok(())
    }

    /// Units to keep, per weight in order: grids of zeros and ones. It may change the weights that stay.
    fn prune(&mut self, work: &Work) -> Result<Vec<Tensor>>;

    /// The grid's step of each row of the weights that it has rounded too.
    fn steps(&self) -> BTreeMap<String, Vec<f64>> {
        BTreeMap::new()
    }

    /// What a resumed training needs, by name.
    fn state(&self) -> BTreeMap<String, Tensor> {
        BTreeMap::new()
    }

    fn restore(&mut self, _state: &BTreeMap<String, Tensor>) -> Result<()> {
        Ok(())
    }
}

pub struct Pruner {
    weights: Vec<String>,
    settings: Settings,
    criterion: Box<dyn Criterion>,
    /// Units kept, per weight.
    units: Vec<Tensor>,
    /// Updates done when the last mask was made.
    made: Option<u64>,
    /// Updates that a checkpoint had behind it: what belongs to the last of them is in its state.
    resumed: Option<u64>,
}

/// Names of the units in a checkpoint.
const UNITS: &str = "pruning.units/";

impl Pruner {
    /// # Errors
    /// `Error::Shape` for a weight that is not made of whole units, `Error::File` for one that the model does not have.
    pub fn new(model: &Model, weights: Vec<String>, settings: Settings, criterion: Box<dyn Criterion>) -> Result<Self> {
        let full = |name: &String| {
            let grid = settings.pattern.grid(matrix_dims(model.get(name)?))?;
            Tensor::from_slice(model.device(), &grid, &vec![1.0f32; grid[0] * grid[1]])
        };
        let units = weights.iter().map(full).collect::<Result<_>>()?;
        Ok(Self { weights, settings, criterion, units, made: None, resumed: None })
    }

    /// As [`Criterion::steps`].
    pub fn steps(&self) -> BTreeMap<String, Vec<f64>> {
        self.criterion.steps()
    }

    /// Names of the weights and the share of their units that is pruned so far.
    pub fn report(&self) -> Result<Vec<(String, f64)>> {
        let share = |(name, units): (&String, &Tensor)| {
            let kept: f64 = units.to_f64()?.iter().sum();
            Ok((name.clone(), 1.0 - kept / units.count().max(1) as f64))
        };
        self.weights.iter().zip(&self.units).map(share).collect()
    }

    fn work<'a>(&'a self, model: &'a Model, step: u64) -> Work<'a> {
        let Settings { pattern, scope, sparsity, timing } = self.settings;
        let before = self.made.map_or(0.0, |made| timing.sparsity(sparsity, made));
        let sparsity = timing.sparsity(sparsity, step);
        Work { model, weights: &self.weights, pattern, scope, sparsity, before, units: &self.units }
    }

    /// Prunes a model that is not being trained, to the final sparsity.
    pub fn once(&mut self, model: &Model) -> Result<()> {
        self.masks(self.settings.timing.end, model).map(|_| ())
    }

    /// Makes new masks and zeroes what they prune; gives them in the weights' shapes.
    fn masks(&mut self, step: u64, model: &Model) -> Result<Vec<Tensor>> {
        // Taken out for the call, which reads the rest of the pruner.
        let mut criterion = std::mem::replace(&mut self.criterion, Box::new(super::score::Magnitude));
        let work = self.work(model, step);
        let made = criterion.prune(&work).and_then(|units| {
            let masks = work.weights.iter().zip(&units).map(|(name, units)| work.apply(name, units));
            Ok((masks.collect::<Result<Vec<_>>>()?, units))
        });
        self.criterion = criterion;
        let (masks, units) = made?;
        (self.units, self.made) = (units, Some(step));
        Ok(masks)
    }
}

impl Method for Pruner {
    fn name(&self) -> &'static str {
        self.criterion.name()
    }

    fn on_update(&mut self, step: u64, model: &Model, optimizer: &mut Optimizer) -> Result<()> {
        if self.resumed == Some(step) {
            return Ok(());
        }
        if step > 0 {
            self.criterion.observe(model, &self.weights, optimizer)?;
        }
        if self.settings.timing.updates_at(step) {
            let masks = self.masks(step, model)?;
            // Copied into the memory that captured steps read.
            self.weights.iter().zip(&masks).try_for_each(|(name, mask)| optimizer.set_mask(name, mask))?;
        }
        Ok(())
    }

    fn state(&self) -> BTreeMap<String, Tensor> {
        let mut state = self.criterion.state();
        if self.made.is_some() {
            let units = self.weights.iter().zip(&self.units);
            state.extend(units.map(|(name, units)| (format!("{UNITS}{name}"), units.clone())));
        }
        state
    }

    fn restore(&mut self, state: &BTreeMap<String, Tensor>, step: u64) -> Result<()> {
        (self.made, self.resumed) = (self.settings.timing.last_update(step), Some(step));
        if self.made.is_some() {
            for (name, units) in self.weights.iter().zip(&mut self.units) {
                let key = format!("{UNITS}{name}");
                let saved = state.get(&key).ok_or_else(|| Error::file("optimizer state", &key, "missing"))?;
                units.assign(saved)?;
            }
        }
        self.criterion.restore(state)
    }

    fn invariants(&self, model: &Model) -> Result<Vec<Invariant>> {
        let mut invariants = pruned_units(model, &self.weights, &self.units, self.settings.pattern)?;
        invariants.push(declared_units(model, &self.weights, &self.units, &self.settings)?);
        Ok(invariants)
    }
}

/// Every weight of a pruned unit is 0.
pub(super) fn pruned_units(
    model: &Model,
    weights: &[String],
    units: &[Tensor],
    pattern: Pattern,
) -> Result<Vec<Invariant>> {
    let (mut alive, mut pruned) = (0, 0);
    for (name, units) in weights.iter().zip(units) {
        let weight = model.get(name)?;
        let mask = pattern.expand(units, matrix_dims(weight))?.to_f64()?;
        let gone = weight.to_f64()?.into_iter().zip(mask).filter(|(_, kept)| *kept == 0.0).map(|(w, _)| w);
        let gone: Vec<f64> = gone.collect();
        (pruned, alive) = (pruned + gone.len(), alive + gone.iter().filter(|w| **w != 0.0).count());
    }
    let measured = format!("{alive} of {pruned} are not");
    Ok(vec![Invariant { rule: "every weight of a pruned unit is 0".into(), measured, holds: alive == 0 }])
}

/// As many units are pruned as the final sparsity declares.
pub(super) fn declared_units(
    model: &Model,
    weights: &[String],
    units: &[Tensor],
    settings: &Settings,
) -> Result<Invariant> {
    let Settings { pattern, scope, sparsity, .. } = *settings;
    let grids = weights.iter().map(|name| pattern.grid(matrix_dims(model.get(name)?))).collect::<Result<Vec<_>>>()?;
    let declared = selection::declared(&grids, pattern, scope, sparsity);
    let mut pruned = 0;
    for units in units {
        pruned += units.to_f64()?.iter().filter(|&&kept| kept == 0.0).count();
    }
    Ok(Invariant {
        rule: format!("declared sparsity: {declared} units of {} weights are pruned", weights.len()),
        measured: format!("{pruned} units"),
        // The literal greedy search is known to stop early: it prunes more than declared.
        holds: if pattern == Pattern::TwoFour2dGreedy { pruned >= declared } else { pruned == declared },
    })
}
