//! Learned 2:4 masks: each group of four has six gates, one per pattern, and the forward pass weighs the patterns by
//! softmax(T gates) with a sharpness T annealed from 0 until one pattern is left (the "ampere" mode of nn_pruning).

use std::collections::BTreeMap;

use super::curve::Timing;
use super::gates;
use super::pattern::{Pattern, matrix_dims};
use super::pruner::pruned_units;
use crate::cpu::PAIRS;
use crate::dispatch;
use crate::error::{Error, Result};
use crate::nn::{Model, OutputHook, Pass};
use crate::ops::binary::MUL;
use crate::ops::layout::GatherRows;
use crate::ops::matmul::Matmul;
use crate::ops::reduce::ArgMax;
use crate::ops::softmax::Softmax;
use crate::tape::Var;
use crate::tensor::Tensor;
use crate::train::lifecycle::{Invariant, Method};
use crate::train::optimizer::Optimizer;

pub struct Learned24 {
    weights: Vec<String>,
    /// `initial` and the curve are those of the sharpness.
    timing: Timing,
    /// T at the end of the window, where the masks become hard.
    sharpness: f64,
    /// Peak learning rate of the gates.
    rate: f64,
    /// f32 `[6, 4]`: the patterns, kept columns in lexicographic order.
    patterns: Tensor,
    /// f32 `[1]`: T at present; memory that captured steps read.
    present: Tensor,
    /// Masks `[n, k]` once they are hard.
    masks: Vec<Tensor>,
    started: bool,
}

/// Names of the masks in a checkpoint.
const MASKS: &str = "pruning.learned/";

impl Learned24 {
    /// Adds gates to the model, which must be the one that is trained: of each pattern the share of the group's magnitude
    /// that it keeps, so that without training the masks are those of magnitude.
    ///
    /// # Errors
    /// `Error::Shape` for a weight whose rows are no groups of four.
    pub fn new(model: &mut Model, weights: Vec<String>, timing: Timing, sharpness: f64, rate: f64) -> Result<Self> {
        for name in &weights {
            let weight = model.get(name)?;
            Pattern::TwoFour.grid(matrix_dims(weight))?;
            let values: Vec<f32> = weight.to_vec::<f32>()?.chunks(4).flat_map(shares).collect();
            gates::add(model, name, Tensor::from_slice(model.device(), &[values.len() / 6, 6], &values)?);
        }
        let kept = PAIRS.iter().flat_map(|pair| (0..4).map(move |i| f32::from(u8::from(pair.contains(&i)))));
        let patterns = Tensor::from_slice(model.device(), &[6, 4], &kept.collect::<Vec<f32>>())?;
        let present = Tensor::from_slice(model.device(), &[1], &[timing.initial as f32])?;
        Ok(Self { weights, timing, sharpness, rate, patterns, present, masks: Vec::new(), started: false })
    }

    /// The pattern with the largest gate, the lexicographically first on ties.
    fn harden(&mut self, model: &Model, optimizer: &mut Optimizer) -> Result<()> {
        for name in &self.weights {
            let best = dispatch::run_one(&ArgMax, &[model.get(&gates::of(name))?])?;
            let mask = dispatch::run_one(&GatherRows, &[&self.patterns, &best])?;
            let mask = mask.reshape(&matrix_dims(model.get(name)?))?;
            gates::freeze(model, optimizer, name, &mask)?;
            self.masks.push(mask);
        }
        optimizer.invalidate();
        Ok(())
    }

    fn hard(&self) -> bool {
        self.masks.len() == self.weights.len()
    }
}

/// Share of a group's magnitude that each pattern keeps; all alike where there is none.
fn shares(group: &[f32]) -> [f32; 6] {
    let all: f32 = group.iter().map(|w| w.abs()).sum();
    PAIRS.map(|[a, b]| if all > 0.0 { (group[a].abs() + group[b].abs()) / all } else { 0.5 })
}

impl OutputHook for Learned24 {
    fn on_output(&self, pass: &mut Pass, linear: &str, x: Var, weight: Var) -> Result<(Var, Var)> {
        let name = format!("{linear}.weight");
        if self.hard() || !self.weights.contains(&name) {
            return Ok((x, weight));
        }
        let gates = gates::variable(pass, &name)?;
        let tape = &mut pass.tape;
        let sharp = tape.first(MUL, &[&gates, &Var::constant(self.present.clone())])?;
        let chances = tape.first(Softmax, &[&sharp])?;
        let mask = tape.first(Matmul::plain(false, false), &[&chances, &Var::constant(self.patterns.clone())])?;
        Ok((x, gates::masked(tape, &weight, &mask)?))
    }
}

impl Method for Learned24 {
    fn name(&self) -> &'static str {
        "learned 2:4 sparsity"
    }

    fn on_output(&self) -> Option<&dyn OutputHook> {
        Some(self)
    }

    fn on_update(&mut self, step: u64, model: &Model, optimizer: &mut Optimizer) -> Result<()> {
        if !std::mem::replace(&mut self.started, true) {
            optimizer.set_gate_rate(self.rate);
        }
        if self.hard() {
            return Ok(());
        }
        if step >= self.timing.end {
            return self.harden(model, optimizer);
        }
        if self.timing.updates_at(step) {
            self.present.upload(&[self.timing.sparsity(self.sharpness, step) as f32])?;
        }
        Ok(())
    }

    fn state(&self) -> BTreeMap<String, Tensor> {
        let masks = self.weights.iter().zip(&self.masks);
        masks.map(|(name, mask)| (format!("{MASKS}{name}"), mask.clone())).collect()
    }

    fn restore(&mut self, state: &BTreeMap<String, Tensor>, step: u64) -> Result<()> {
        let present = match self.timing.last_update(step) {
            None => self.timing.initial,
            Some(_) => self.timing.sparsity(self.sharpness, step),
        };
        self.present.upload(&[present as f32])?;
        if step >= self.timing.end {
            let take = |name: &String| {
                let key = format!("{MASKS}{name}");
                state.get(&key).cloned().ok_or_else(|| Error::file("optimizer state", &key, "missing"))
            };
            self.masks = self.weights.iter().map(take).collect::<Result<_>>()?;
        }
        Ok(())
    }

    fn on_finish(&mut self, model: &mut Model) -> Result<()> {
        gates::remove(model, &self.weights);
        if self.hard() { Ok(()) } else { Err(gates::unfinished(self.timing.end)) }
    }

    fn invariants(&self, model: &Model) -> Result<Vec<Invariant>> {
        let mut invariants = pruned_units(model, &self.weights, &self.masks, Pattern::TwoFour)?;
        let mut worst = 0.0f64;
        for mask in &self.masks {
            let kept = mask.to_f64()?;
            worst = kept.chunks(4).map(|four| (four.iter().sum::<f64>() - 2.0).abs()).fold(worst, f64::max);
        }
        invariants.push(Invariant {
            rule: "every group of four keeps two".into(),
            measured: format!("off by {worst} at most"),
            holds: worst == 0.0,
        });
        Ok(invariants)
    }
}
