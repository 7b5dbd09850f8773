//! How a student listens to its teacher.

use serde::{Deserialize, Serialize};

use crate::compress::distillation::Weights;
use crate::error::Result;
use crate::recipe::check::refuse;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HiddenProjection {
    /// The teacher's channels that the student kept.
    #[default]
    Kept,
    /// A learned student -> teacher projection.
    Learned,
}

/// How a student listens to the teacher.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Distil {
    #[serde(default = "default_distil_weights")]
    pub weights: Weights,
    /// Factor of the gold labels' cross-entropy.
    #[serde(default = "default_gold")]
    pub gold: f32,
    #[serde(default = "default_temperature")]
    pub temperature: f32,
    #[serde(default = "super::yes")]
    pub squared: bool,
    /// Eq 10's half sum of squares (divided by the step's labels) instead of the mean.
    #[serde(default)]
    pub literal_sum: bool,
    #[serde(default)]
    pub normalised: bool,
    #[serde(default)]
    pub projection: HiddenProjection,
}

fn default_distil_weights() -> Weights {
    // Hard labels of a small teacher are often wrong. On real text gold 0.5 with hard 0.5 ended at 3.83 nats, gold 1.0
    // with hard 0.1 at 3.76; the two were changed together.
    Weights { hidden: 0.9, soft: 0.5, hard: 0.1 }
}

fn default_gold() -> f32 {
    1.0
}

fn default_temperature() -> f32 {
    2.0
}

impl Default for Distil {
    fn default() -> Self {
        Self {
            weights: default_distil_weights(),
            gold: default_gold(),
            temperature: default_temperature(),
            squared: true,
            literal_sum: false,
            normalised: false,
            projection: HiddenProjection::Kept,
        }
    }
}

impl Distil {
    pub(in crate::recipe) fn check(&self, key: &str) -> Result<()> {
        let factors = [self.weights.hidden, self.weights.soft, self.weights.hard, self.gold];
        let sound = |x: &f32| x.is_finite() && *x >= 0.0;
        if factors.iter().all(sound) && self.temperature.is_finite() && self.temperature > 0.0 {
            if factors.iter().all(|x| *x == 0.0) {
                let value = format!("{:?}, gold {}", self.weights, self.gold);
                return refuse(key, value, "at least one factor above 0: with none there is nothing to learn from");
            }
            return Ok(());
        }
        let value = format!("{:?}, gold {}, temperature {}", self.weights, self.gold, self.temperature);
        refuse(key, value, "finite factors from 0, a temperature above 0")
    }
}
