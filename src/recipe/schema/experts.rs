//! `[experts]`: dense FFNs as routed experts.

use serde::{Deserialize, Serialize};

use super::default_calibration;
use crate::compress::experts::SIZE_MULTIPLE;
use crate::error::Result;
use crate::nn::config::Size;
use crate::recipe::check::{MAX_CALIBRATION, MAX_RATE, refuse};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    pub expert_size: usize,
    /// Share of the experts executed per token.
    pub share: f64,
    #[serde(default = "default_router_steps")]
    pub router_steps: usize,
    #[serde(default = "default_router_rate")]
    pub router_rate: f32,
    #[serde(default = "default_calibration")]
    pub calibration_batches: usize,
}

fn default_router_steps() -> usize {
    300
}

fn default_router_rate() -> f32 {
    0.01
}

impl Experts {
    /// `size`: of the model that is split.
    pub(in crate::recipe) fn check(&self, size: Size) -> Result<()> {
        if !(self.share > 0.0 && self.share <= 1.0) {
            return refuse("experts.share", self.share, "above 0 to 1");
        }
        let width = size.ffn_width;
        if self.expert_size == 0
            || !self.expert_size.is_multiple_of(SIZE_MULTIPLE)
            || !width.is_multiple_of(self.expert_size)
        {
            let allowed = format!("a multiple of {SIZE_MULTIPLE} that divides the FFN width {width}");
            return refuse("experts.expert_size", self.expert_size, allowed);
        }
        if self.calibration_batches == 0 || self.calibration_batches > MAX_CALIBRATION {
            return refuse("experts.calibration_batches", self.calibration_batches, "1 to 100000");
        }
        if !(self.router_rate > 0.0 && f64::from(self.router_rate) <= MAX_RATE) {
            return refuse("experts.router_rate", self.router_rate, "a rate above 0, at most 1000");
        }
        if self.router_steps > 1_000_000 {
            return refuse("experts.router_steps", self.router_steps, "0 to 1000000");
        }
        Ok(())
    }
}
