//! `[structure]`: pruning of whole structures.

use serde::{Deserialize, Serialize};

use super::{Distil, Training, default_calibration};
use crate::compress::structure::scaled_ffn;
use crate::error::Result;
use crate::nn::config::Size;
use crate::recipe::check::{MAX_CALIBRATION, refuse};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Selection {
    #[default]
    Importance,
    /// The baseline: same shapes, random structures, no distillation.
    Random,
}

/// Structured pruning, then recovery by distillation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Structure {
    pub layers: usize,
    pub head_size: usize,
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

impl Structure {
    /// `m`: of the teacher.
    pub(in crate::recipe) fn check(&self, m: Size) -> Result<()> {
        self.training.check("structure.training")?;
        self.distil.check("structure.distil")?;
        if self.calibration_batches == 0 || self.calibration_batches > MAX_CALIBRATION {
            return refuse("structure.calibration_batches", self.calibration_batches, "1 to 100000");
        }
        if self.layers == 0
            || self.layers > m.layers
            || self.head_size == 0
            || self.head_size > m.head_size
            || !self.head_size.is_multiple_of(4)
        {
            let allowed = format!("layers 1 to {}, head_size a multiple of 4 up to {}", m.layers, m.head_size);
            return refuse("structure", format!("layers {}, head_size {}", self.layers, self.head_size), allowed);
        }
        Ok(())
    }

    /// Sizes of what is left of a teacher of sizes `m`.
    pub fn pruned(&self, m: Size) -> Size {
        let ffn_width = scaled_ffn(m.ffn_width, m.head_size, self.head_size);
        Size { layers: self.layers, head_size: self.head_size, ffn_width, ..m }
    }
}
