//! `[sparsify]`: zeros in weights.

use serde::{Deserialize, Serialize};

use super::{Distil, Recipe, Training};
use crate::compress::pruning::{Curve, Pattern, Scope, Settings, Timing, fisher, sparsegpt};
use crate::compress::quantization::{Activations, Format};
use crate::compress::written;
use crate::error::Result;
use crate::recipe::check::{MAX_CALIBRATION, MAX_RATE, refuse};
use crate::recipe::order::Step;
use crate::recipe::stages::matches;

/// What ranks weights, or learns which of them stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PruningMethod {
    Random,
    #[default]
    Magnitude,
    /// |w dL/dw| with momentum, from the training's own gradients.
    FirstOrder,
    Wanda,
    /// Minitron's activations, for rows and columns.
    Activation,
    /// Optimal brain surgeon with a block Fisher matrix.
    Obs,
    SparseGpt,
    /// Trained scores, straight-through.
    Movement,
    /// Trained 2:4 patterns.
    Learned,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sparsify {
    #[serde(default)]
    pub method: PruningMethod,
    /// `mask` is its earlier name.
    #[serde(default, alias = "mask")]
    pub pattern: Pattern,
    /// Without it row for Wanda, as in its paper, else layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<Scope>,
    /// Share of the units that is pruned at the end.
    #[serde(default = "half")]
    pub sparsity: f64,
    #[serde(default)]
    pub curve: Curve,
    /// Sparsity of the first mask.
    #[serde(default)]
    pub initial: f64,
    /// First and last mask, as shares of the training's steps; [0, 0]: one mask before training. Without it masks are made
    /// once by 2:4 patterns and by Wanda, SparseGPT and activations, else over 7 % to 87 % of the steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<[f64; 2]>,
    /// Steps between two masks; without it 1 for learned masks, else 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every: Option<u64>,
    /// Restarts the learning rate at each mask; it falls linearly to this share of its peak in between.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cycle_floor: Option<f64>,
    /// Parts of linear names that are pruned; empty: all linears of all blocks.
    #[serde(default)]
    pub linears: Vec<String>,
    /// Batches that criteria of activations see, and gradients of OBS.
    #[serde(default = "default_calibration")]
    pub calibration_batches: usize,
    #[serde(default)]
    pub first_order: FirstOrder,
    #[serde(default)]
    pub obs: Obs,
    #[serde(default)]
    pub sparse_gpt: SparseGpt,
    #[serde(default)]
    pub movement: Movement,
    #[serde(default)]
    pub learned: Learned,
    #[serde(default)]
    pub distil: Distil,
    pub training: Training,
}

fn half() -> f64 {
    0.5
}

fn default_calibration() -> usize {
    16
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FirstOrder {
    pub momentum: f32,
}

impl Default for FirstOrder {
    fn default() -> Self {
        Self { momentum: 0.9 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Obs {
    pub block: usize,
    pub damping: f64,
    pub update: fisher::Update,
    pub recomputations: usize,
}

impl Default for Obs {
    fn default() -> Self {
        let fisher::Settings { block, damping, update, recomputations } = fisher::Settings::default();
        Self { block, damping, update, recomputations }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SparseGpt {
    pub block: usize,
    pub damping: f64,
    /// Rounds the kept weights to a grid of so many bits in the same pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<u32>,
}

impl Default for SparseGpt {
    fn default() -> Self {
        let sparsegpt::Settings { block, damping, bits } = sparsegpt::Settings::default();
        Self { block, damping, bits }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Movement {
    /// Peak learning rate of the scores.
    pub rate: f64,
    /// Keep what scores above a threshold instead of a count: `sparsity` is then the final threshold on sigmoid(score),
    /// and this the penalty's factor on the mean of sigmoid(score).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub penalty: Option<f64>,
}

impl Default for Movement {
    fn default() -> Self {
        Self { rate: 1e-2, penalty: None }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Learned {
    /// Peak learning rate of the patterns' gates.
    pub rate: f64,
    /// What the gates are multiplied by at the end of the window; it begins at `initial`.
    pub sharpness: f64,
}

impl Default for Learned {
    fn default() -> Self {
        Self { rate: 1e-2, sharpness: 20.0 }
    }
}

impl PruningMethod {
    /// Masks come out of the training itself.
    pub fn learns(self) -> bool {
        matches!(self, PruningMethod::Movement | PruningMethod::Learned)
    }
}

impl Sparsify {
    /// The key, with its value, by which it asks what blocks see, one after the other.
    pub(in crate::recipe) fn walks_blocks(&self) -> Option<(&'static str, String)> {
        let walks = matches!(self.method, PruningMethod::Wanda | PruningMethod::Activation | PruningMethod::SparseGpt);
        walks.then(|| ("sparsify.method", written(&self.method)))
    }

    /// What units are compared with. A whole row has nothing within it to be compared with.
    pub fn scope(&self) -> Scope {
        let by_row = self.method == PruningMethod::Wanda && self.pattern != Pattern::Row;
        self.scope.unwrap_or(if by_row { Scope::Row } else { Scope::Layer })
    }

    /// The grid of joint pruning and quantization: a step for each row of a weight, inputs as they are.
    pub fn grid(&self) -> Option<Format> {
        let bits = self.sparse_gpt.bits.filter(|_| self.method == PruningMethod::SparseGpt)?;
        Some(Format { bits, activations: Activations::Float, ..Format::default() })
    }

    /// Steps of the masks.
    pub fn timing(&self) -> Timing {
        use PruningMethod::{Activation, SparseGpt, Wanda};
        let once = matches!(self.method, Wanda | Activation | SparseGpt) || self.pattern.is_24();
        let window = match self.window {
            Some(window) => window,
            None if once && !self.method.learns() && self.method != PruningMethod::FirstOrder => [0.0, 0.0],
            None => [0.07, 0.87],
        };
        let [start, end] = window.map(|share| (share * self.training.steps as f64).round() as u64);
        let every = self.every.unwrap_or(if self.method.learns() { 1 } else { 100 });
        // Gates learn over a window even where their masks are 2:4 throughout.
        Timing { curve: self.curve, initial: self.initial, start, end, every }
    }

    pub fn settings(&self) -> Settings {
        let Self { pattern, sparsity, .. } = *self;
        Settings { pattern, scope: self.scope(), sparsity, timing: self.timing() }
    }

    /// All masks are made before training.
    pub fn at_once(&self) -> bool {
        self.timing().end == 0
    }

    /// The training with its learning rate restarted at each mask, where that is asked for.
    pub fn training(&self) -> Training {
        match self.cycle_floor {
            Some(floor) => Training { schedule: self.timing().cycles(floor), warmup: 0.0, ..self.training },
            None => self.training,
        }
    }

    /// `names`: linears of the model that is pruned; `staged`: whether training is spread over devices.
    pub(in crate::recipe) fn check(&self, names: &[String], staged: bool) -> Result<()> {
        self.training.check("sparsify.training")?;
        self.distil.check("sparsify.distil")?;
        if let Some(part) = self.linears.iter().find(|part| !names.iter().any(|name| matches(name, part))) {
            let allowed = format!("parts of linear names, {} to {}", names[0], names[names.len() - 1]);
            return refuse("sparsify.linears", format!("{part:?}"), allowed);
        }
        if let Some(window) = self.window.filter(|w| w.iter().any(|share| !(0.0..=1.0).contains(share))) {
            return refuse("sparsify.window", written(&window), "two shares of the training, 0 to 1");
        }
        if let Some(floor) = self.cycle_floor.filter(|floor| !(0.0..=1.0).contains(floor)) {
            return refuse("sparsify.cycle_floor", floor, "0 to 1, a share of the peak");
        }
        if !(1..=MAX_CALIBRATION).contains(&self.calibration_batches) {
            return refuse("sparsify.calibration_batches", self.calibration_batches, format!("1 to {MAX_CALIBRATION}"));
        }
        self.timing().check("sparsify", self.sparsity)?;
        self.check_pattern()?;
        self.check_method()?;
        if staged && !self.at_once() {
            let allowed = "[0, 0] with [pipeline]: stages hold masks, they make none";
            return refuse("sparsify.window", written(&self.window), allowed);
        }
        Ok(())
    }

    /// What stages before and after it ask of weights that it puts on a grid, and it of them.
    pub(in crate::recipe) fn check_grid(&self, recipe: &Recipe) -> Result<()> {
        let Some(bits) = self.grid().map(|format| format.bits) else {
            return Ok(());
        };
        let key = "sparsify.sparse_gpt.bits";
        if recipe.quantize.is_some() {
            return refuse(key, bits, "none with [quantize], whose grid is another one");
        }
        if !self.linears.is_empty() {
            return refuse(key, bits, "none with sparsify.linears: a model is stored in one format");
        }
        if !self.at_once() {
            let allowed = "[0, 0] with sparse_gpt.bits: weights are put on their grid once";
            return refuse("sparsify.window", written(&self.window), allowed);
        }
        let steps = recipe.steps();
        let place = |step: Step| steps.iter().position(|s| *s == step);
        if place(Step::Sparsify) < place(Step::Structure) {
            let allowed = "structure before sparsify with sparse_gpt.bits: steps belong to the tensors that it cuts";
            return refuse("order", "sparsify before structure", allowed);
        }
        Ok(())
    }

    fn check_pattern(&self) -> Result<()> {
        use PruningMethod::{Activation, Learned, Movement, SparseGpt};
        if self.pattern.is_24() && self.sparsity != 0.5 && self.method != Learned {
            return refuse("sparsify.sparsity", self.sparsity, "0.5 with a 2:4 pattern");
        }
        let allowed = match (self.method, self.pattern) {
            (_, Pattern::Block { rows, columns }) if rows == 0 || columns == 0 => "blocks of at least 1 row and column",
            (Activation, pattern) if !matches!(pattern, Pattern::Row | Pattern::Column) => {
                "row or column with activation"
            }
            (_, Pattern::Row) if self.scope() == Scope::Row => "another scope than row with it: a row has one unit",
            (SparseGpt, pattern) if !matches!(pattern, Pattern::Unstructured | Pattern::TwoFour) => {
                "unstructured or two_four with sparse_gpt"
            }
            (Learned, pattern) if pattern != Pattern::TwoFour => "two_four with learned",
            (Movement, pattern) if pattern.is_two_dimensional() => "any but two-dimensional 2:4 with movement",
            (Movement, Pattern::TwoFour) if self.movement.penalty.is_some() => "no 2:4 with a threshold",
            _ => return Ok(()),
        };
        refuse("sparsify.pattern", written(&self.pattern), allowed)
    }

    fn check_method(&self) -> Result<()> {
        use PruningMethod::{FirstOrder, Learned, Movement, Obs, SparseGpt};
        let positive = |x: f64| x.is_finite() && x > 0.0 && x <= MAX_RATE;
        match self.method {
            FirstOrder if !(0.0..1.0).contains(&self.first_order.momentum) => {
                refuse("sparsify.first_order.momentum", self.first_order.momentum, "0 to below 1")
            }
            FirstOrder if self.timing().start == 0 => {
                let allowed = "a start behind step 0 with first_order: there is no gradient before";
                refuse("sparsify.window", written(&self.window), allowed)
            }
            Movement | Learned if self.timing().end == 0 => {
                refuse("sparsify.window", written(&self.window), "an end behind step 0 for masks that are learned")
            }
            Movement if !positive(self.movement.rate) => {
                refuse("sparsify.movement.rate", self.movement.rate, "a rate above 0, at most 1000")
            }
            Movement if self.movement.penalty.is_some_and(|p| !(p.is_finite() && p >= 0.0)) => {
                refuse("sparsify.movement.penalty", written(&self.movement.penalty), "a finite number from 0")
            }
            Learned if !positive(self.learned.rate) => {
                refuse("sparsify.learned.rate", self.learned.rate, "a rate above 0, at most 1000")
            }
            Learned if !positive(self.learned.sharpness) => {
                refuse("sparsify.learned.sharpness", self.learned.sharpness, "above 0, at most 1000")
            }
            SparseGpt if self.scope() == Scope::Global => {
                refuse("sparsify.scope", "global", "row or layer with sparse_gpt: each linear is pruned by itself")
            }
            SparseGpt => {
                let settings = &self.sparse_gpt;
                if settings.block == 0 || !settings.block.is_multiple_of(4) {
                    return refuse("sparsify.sparse_gpt.block", settings.block, "a multiple of 4 columns");
                }
                if !(settings.damping.is_finite() && settings.damping >= 0.0) {
                    return refuse("sparsify.sparse_gpt.damping", settings.damping, "a finite number from 0");
                }
                match settings.bits.filter(|bits| !(2..=8).contains(bits)) {
                    Some(bits) => refuse("sparsify.sparse_gpt.bits", bits, "2 to 8"),
                    None => Ok(()),
                }
            }
            Obs if !(1..=crate::ops::fisher::MAX_BLOCK).contains(&self.obs.block) => {
                refuse("sparsify.obs.block", self.obs.block, "1 to 128")
            }
            Obs if !(self.obs.damping.is_finite() && self.obs.damping > 0.0) => {
                refuse("sparsify.obs.damping", self.obs.damping, "a finite number above 0")
            }
            Obs if !(1..=1000).contains(&self.obs.recomputations) => {
                refuse("sparsify.obs.recomputations", self.obs.recomputations, "1 to 1000")
            }
            _ => Ok(()),
        }
    }
}
