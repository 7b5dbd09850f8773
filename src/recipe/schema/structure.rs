//! `[structure]`: pruning of whole structures.

use serde::{Deserialize, Serialize};

use super::{Distil, Training, default_calibration};
use crate::compress::structure::{Heads, LayersMethod, Neurons, Objective, Order, Progress, Score, scaled_ffn};
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

/// Structured pruning, then recovery by distillation. Blocks go first, then heads and neurons in rounds, then widths.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Structure {
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
    pub(in crate::recipe) fn check(&self, m: Size, family: Family) -> Result<()> {
        self.training.check("structure.training")?;
        self.distil.check("structure.distil")?;
        if self.calibration_batches == 0 || self.calibration_batches > MAX_CALIBRATION {
            return refuse("structure.calibration_batches", self.calibration_batches, "1 to 100000");
        }
        if !(1..=1000).contains(&self.rounds) {
            return refuse("structure.rounds", self.rounds, "1 to 1000");
        }
        let (layers, head_size) = (self.layers(m), self.head_size(m));
        if family == Family::T5 && (layers, head_size, self.width(m)) != (m.layers, m.head_size, m.heads * m.head_size)
        {
            let value = format!("layers {layers}, head_size {head_size}, width {}", self.width(m));
            let allowed = "heads, ffn and vocabulary for model.family t5: its stacks keep their depth and widths";
            return refuse("structure", value, allowed);
        }
        if layers == 0
            || layers > m.layers
            || head_size == 0
            || head_size > m.head_size
            || !head_size.is_multiple_of(4)
        {
            let allowed = format!("layers 1 to {}, head_size a multiple of 4 up to {}", m.layers, m.head_size);
            return refuse("structure", format!("layers {layers}, head_size {head_size}"), allowed);
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
            return refuse("structure.loss", format!("{:?}", self.loss), "labels without heads or ffn that are scored");
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
        let heads = if self.heads.is_some_and(|h| !h.even) { 1 } else { pruned.heads };
        let ffn_width = self.ffn.filter(|ffn| !ffn.even).map_or(pruned.ffn_width, |ffn| ffn.multiple_of);
        Size { heads, ffn_width, ..pruned }
    }
}
