//! `[structure]`: pruning of whole structures.

use serde::{Deserialize, Serialize};

use super::{Distil, Training, default_calibration};
use crate::compress::gates::Level;
use crate::compress::structure::{Heads, LayersMethod, Neurons, Objective, Order, Progress, Score, scaled_ffn};
use crate::compress::written;
use crate::error::Result;
use crate::nn::config::Size;
use crate::recipe::check::{MAX_CALIBRATION, refuse};
use crate::recipe::schema::Family;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Selection {
    #[default]
    Importance,
    /// The baseline: same shapes, random structures, no distillation.
    Random,
}

/// How structures are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// By scores, down to the sizes that the section names.
    #[default]
    Scores,
    /// By gates that learn, down to a share of the cost: see [`L0`].
    L0,
}

/// What gates are held to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cost {
    /// Weights of the blocks' linears.
    #[default]
    Parameters,
    /// Time of sublayers by their sizes.
    Latency,
}

/// CoFi: gates on sublayers, heads, neurons and channels learn while the model trains; then the model is made small.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct L0 {
    /// Share of the cost that goes.
    pub target: f64,
    /// Share that the target starts from.
    #[serde(default)]
    pub initial: f64,
    /// Share of the steps over which the target rises.
    #[serde(default = "tenth")]
    pub warm_up: f64,
    /// Peak learning rate of gates and multipliers.
    #[serde(default = "tenth")]
    pub rate: f64,
    /// What has gates; without it everything that `cost` allows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub levels: Option<Vec<Level>>,
    /// Neurons and channels stay in multiples of it.
    #[serde(default = "default_rounds")]
    pub multiple_of: usize,
    #[serde(default)]
    pub cost: Cost,
    /// A file of measured times; without it they are measured when the stage starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<String>,
    /// Under gates; `structure.training` is that of the small model.
    pub training: Training,
}

fn tenth() -> f64 {
    0.1
}

impl L0 {
    /// Levels that have gates.
    pub fn gated(&self) -> Vec<Level> {
        let all = Level::ALL.into_iter().filter(|level| self.cost == Cost::Parameters || *level != Level::Hidden);
        self.levels.clone().unwrap_or_else(|| all.collect())
    }

    fn check(&self, m: Size, pipeline: bool) -> Result<()> {
        self.training.check("structure.l0.training")?;
        if pipeline {
            return refuse(
                "structure.l0",
                "with [pipeline]",
                "one device: a gate of channels is in all stages at once",
            );
        }
        if !(self.target > 0.0 && self.target < 1.0) {
            return refuse("structure.l0.target", self.target, "above 0 and below 1");
        }
        if !(0.0..=self.target).contains(&self.initial) {
            return refuse("structure.l0.initial", self.initial, "0 to the target");
        }
        if !(0.0..=1.0).contains(&self.warm_up) {
            return refuse("structure.l0.warm_up", self.warm_up, "0 to 1");
        }
        if !(self.rate.is_finite() && self.rate > 0.0) {
            return refuse("structure.l0.rate", self.rate, "finite and above 0");
        }
        let width = m.heads * m.head_size;
        if self.multiple_of == 0
            || !m.ffn_width.is_multiple_of(self.multiple_of)
            || !width.is_multiple_of(self.multiple_of)
        {
            let allowed = format!("a divisor of the FFN width {} and the width {width}", m.ffn_width);
            return refuse("structure.l0.multiple_of", self.multiple_of, allowed);
        }
        let mut levels = self.gated();
        if self.cost == Cost::Latency && levels.contains(&Level::Hidden) {
            let allowed = "attention, ffn, heads, neurons with cost = \"latency\": times are those at full width";
            return refuse("structure.l0.levels", written(&levels), allowed);
        }
        levels.sort_unstable();
        levels.dedup();
        if levels.is_empty() || levels.len() != self.gated().len() {
            return refuse("structure.l0.levels", written(&self.gated()), "at least one, each once");
        }
        if self.table.is_some() && self.cost == Cost::Parameters {
            return refuse("structure.l0.table", "with cost = \"parameters\"", "a table with cost = \"latency\"");
        }
        Ok(())
    }
}

/// Structured pruning, then recovery by distillation. Blocks go first, then heads and neurons in rounds, then widths.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Structure {
    #[serde(default, skip_serializing_if = "is_default")]
    pub method: Method,
    /// Of `method = "l0"`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub l0: Option<L0>,
    /// Blocks that stay; without it all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<usize>,
    #[serde(default, skip_serializing_if = "is_default")]
    pub layers_method: LayersMethod,
    /// Dimensions that every head keeps; the width, and without `ffn` the FFNs, follow in the same ratio. Without it all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_size: Option<usize>,
    /// Channels of the residual stream; without it the teacher's heads times `head_size`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub width: Option<usize>,
    /// Whole heads that stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heads: Option<Heads>,
    /// Neurons that stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ffn: Option<Neurons>,
    /// Heads and neurons go in so many rounds, scored anew before each.
    #[serde(default = "default_rounds", skip_serializing_if = "is_sixteen")]
    pub rounds: usize,
    #[serde(default, skip_serializing_if = "is_default")]
    pub progress: Progress,
    /// What goes first in a round; one after the other they are scored apart.
    #[serde(default, skip_serializing_if = "is_default")]
    pub order: Order,
    /// What heads and neurons are judged by.
    #[serde(default, skip_serializing_if = "is_default")]
    pub loss: Objective,
    /// Tokens that stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vocabulary: Option<Vocabulary>,
    #[serde(default)]
    pub selection: Selection,
    /// Also train the random-pruning baseline with the same steps, for the report.
    #[serde(default)]
    pub compare_random: bool,
    #[serde(default = "default_calibration")]
    pub calibration_batches: usize,
    #[serde(default)]
    pub distil: Distil,
    pub training: Training,
}

/// The tokens of a text stay, with those that they are merged from, all bytes and all special ones: no text is unknown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vocabulary {
    /// How often a token must stand in the text.
    #[serde(default = "super::one")]
    pub min_count: usize,
    /// A file whose lines are the text; without it the training text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

fn default_rounds() -> usize {
    16
}

fn is_sixteen(rounds: &usize) -> bool {
    *rounds == default_rounds()
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl Structure {
    /// `m`: of the teacher.
    pub(in crate::recipe) fn check(&self, m: Size, family: Family, pipeline: bool) -> Result<()> {
        self.training.check("structure.training")?;
        self.distil.check("structure.distil")?;
        self.check_method(m, pipeline)?;
        if self.calibration_batches == 0 || self.calibration_batches > MAX_CALIBRATION {
            return refuse("structure.calibration_batches", self.calibration_batches, "1 to 100000");
        }
        if !(1..=1000).contains(&self.rounds) {
            return refuse("structure.rounds", self.rounds, "1 to 1000");
        }
        let (layers, head_size) = (self.layers(m), self.head_size(m));
        if family == Family::T5 {
            for (key, left, whole) in [
                ("structure.layers", layers, m.layers),
                ("structure.head_size", head_size, m.head_size),
                ("structure.width", self.width(m), m.heads * m.head_size),
            ] {
                if left != whole {
                    let allowed = format!(
                        "{whole} for model.family t5, whose stacks keep their depth and widths: heads, ffn and vocabulary may go"
                    );
                    return refuse(key, left, allowed);
                }
            }
        }
        if layers == 0 || layers > m.layers {
            return refuse("structure.layers", layers, format!("1 to {}", m.layers));
        }
        if head_size == 0 || head_size > m.head_size || !head_size.is_multiple_of(4) {
            return refuse("structure.head_size", head_size, format!("a multiple of 4, 4 to {}", m.head_size));
        }
        if let LayersMethod::Subset(subset) = &self.layers_method {
            let ascending = subset.windows(2).all(|pair| pair[0] < pair[1]) && subset.last() < Some(&m.layers);
            if !ascending || subset.len() != layers {
                let allowed = format!("{layers} (structure.layers) of 0 to {}, ascending", m.layers - 1);
                return refuse("structure.layers_method.subset", format!("{subset:?}"), allowed);
            }
        }
        let most = m.heads * m.head_size;
        if !self.width(m).is_multiple_of(4) || self.width(m) == 0 || self.width(m) > most {
            return refuse("structure.width", self.width(m), format!("a multiple of 4 up to {most}"));
        }
        self.check_units(m)?;
        match &self.vocabulary {
            Some(v) if v.min_count == 0 => refuse("structure.vocabulary.min_count", 0, "from 1"),
            _ => Ok(()),
        }
    }

    fn check_method(&self, m: Size, pipeline: bool) -> Result<()> {
        let Some(l0) = &self.l0 else {
            return match self.method {
                Method::Scores => Ok(()),
                Method::L0 => refuse("structure.l0", "nothing", "a table with target and training for method = \"l0\""),
            };
        };
        if self.method == Method::Scores {
            return refuse("structure.method", "scores with structure.l0", "l0");
        }
        let sized = self.layers.is_some() || self.head_size.is_some() || self.width.is_some();
        if sized || self.heads.is_some() || self.ffn.is_some() {
            let allowed = "target alone with method = \"l0\": gates find the sizes";
            return refuse("structure", "layers, head_size, width, heads or ffn", allowed);
        }
        if self.compare_random || self.selection == Selection::Random {
            let allowed = "scores: structures drawn at random need sizes";
            return refuse("structure.selection", "random with method = \"l0\"", allowed);
        }
        l0.check(m, pipeline)
    }

    fn check_units(&self, m: Size) -> Result<()> {
        if let Some(heads) = &self.heads {
            if heads.keep == 0 || heads.keep > m.heads {
                return refuse("structure.heads.keep", heads.keep, format!("1 to {}", m.heads));
            }
            if heads.floor == 0 || heads.floor > heads.keep {
                return refuse("structure.heads.floor", heads.floor, format!("1 to {} (keep)", heads.keep));
            }
            if heads.per_round == Some(0) {
                return refuse("structure.heads.per_round", 0, "from 1");
            }
            if heads.even && heads.per_round.is_some() {
                let allowed = "without even: rounds that take as many of every attention are counted by rounds";
                return refuse("structure.heads.per_round", "with even", allowed);
            }
        }
        if let Some(ffn) = &self.ffn {
            if ffn.multiple_of == 0 || !m.ffn_width.is_multiple_of(ffn.multiple_of) {
                let allowed = format!("a divisor of the FFN width {}", m.ffn_width);
                return refuse("structure.ffn.multiple_of", ffn.multiple_of, allowed);
            }
            if ffn.keep == 0 || ffn.keep > m.ffn_width || !ffn.keep.is_multiple_of(ffn.multiple_of) {
                let allowed = format!("a multiple of {} (multiple_of) up to {}", ffn.multiple_of, m.ffn_width);
                return refuse("structure.ffn.keep", ffn.keep, allowed);
            }
            if ffn.floor == 0 || ffn.floor > ffn.keep {
                return refuse("structure.ffn.floor", ffn.floor, format!("1 to {} (keep)", ffn.keep));
            }
        }
        let judged = [self.heads.map(|h| h.score), self.ffn.map(|n| n.score)];
        if self.loss != Objective::Labels && judged.iter().flatten().all(|score| *score == Score::Random) {
            return refuse("structure.loss", written(&self.loss), "labels without heads or ffn that are scored");
        }
        Ok(())
    }

    /// Blocks that stay.
    pub fn layers(&self, m: Size) -> usize {
        self.layers.unwrap_or(m.layers)
    }

    /// Dimensions of a head that stay.
    pub fn head_size(&self, m: Size) -> usize {
        self.head_size.unwrap_or(m.head_size)
    }

    /// Channels that stay; with gates of channels, what their number is a multiple of.
    pub fn width_granule(&self, m: Size) -> usize {
        let gated = self.l0.as_ref().filter(|_| self.gates_channels());
        gated.map_or(self.width(m), |l0| l0.multiple_of)
    }

    /// Whether gates choose how many channels stay.
    pub(in crate::recipe) fn gates_channels(&self) -> bool {
        self.l0.as_ref().is_some_and(|l0| l0.gated().contains(&Level::Hidden))
    }

    /// Channels that stay.
    pub fn width(&self, m: Size) -> usize {
        self.width.unwrap_or(m.heads * self.head_size(m))
    }

    /// Sizes of what is left of a teacher of sizes `m`: on average, where blocks are uneven.
    pub fn pruned(&self, m: Size) -> Size {
        let scaled = scaled_ffn(m.ffn_width, m.head_size, self.head_size(m)).min(m.ffn_width);
        let ffn_width = self.ffn.map_or(scaled, |ffn| ffn.keep);
        let heads = self.heads.map_or(m.heads, |heads| heads.keep);
        Size { layers: self.layers(m), heads, head_size: self.head_size(m), ffn_width, ..m }
    }

    /// As [`Structure::pruned`], with what every block has and what all their sizes are multiples of.
    pub fn granule(&self, m: Size) -> Size {
        let pruned = self.pruned(m);
        if let Some(l0) = &self.l0 {
            return Size { heads: 1, ffn_width: l0.multiple_of, ..pruned };
        }
        let heads = if self.heads.is_some_and(|h| !h.even && h.keep < m.heads) { 1 } else { pruned.heads };
        let ffn_width =
            self.ffn.filter(|ffn| !ffn.even && ffn.keep < m.ffn_width).map_or(pruned.ffn_width, |ffn| ffn.multiple_of);
        Size { heads, ffn_width, ..pruned }
    }
}
