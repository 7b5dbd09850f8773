//! `[experts]`: dense FFNs as routed experts.

use serde::{Deserialize, Serialize};

use super::{Distil, Training, default_calibration};
use crate::compress::experts::{Drop, Loss, Router, SIZE_MULTIPLE, Settings, Split};
use crate::compress::written;
use crate::error::Result;
use crate::nn::Activation;
use crate::nn::config::Size;
use crate::recipe::check::{MAX_CALIBRATION, MAX_RATE, refuse};

/// What becomes of experts that are slower than the dense FFN.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Slower {
    /// They stay, and the record says for how many tokens.
    #[default]
    Keep,
    /// The FFNs stay dense where experts are slower for every measured number of tokens: what is computed then follows from a
    /// measurement on the device.
    Dense,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    pub expert_size: usize,
    /// Share of the experts executed per token, at most.
    pub share: f64,
    #[serde(default)]
    pub split: Split,
    #[serde(default)]
    pub router: Router,
    #[serde(default)]
    pub router_loss: Loss,
    #[serde(default = "default_router_steps")]
    pub router_steps: usize,
    #[serde(default = "default_router_rate")]
    pub router_rate: f32,
    /// Selected experts are executed where the router expects more than this share of the most active expert's activation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold: Option<f32>,
    #[serde(default = "default_calibration")]
    pub calibration_batches: usize,
    #[serde(default)]
    pub slower: Slower,
    /// Experts that go for good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drop: Option<Drop>,
    /// Turns GELU FFNs into ReLU FFNs before they are split, and trains what that changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training: Option<Training>,
    #[serde(default)]
    pub distil: Distil,
}

fn default_router_steps() -> usize {
    300
}

fn default_router_rate() -> f32 {
    0.01
}

impl Experts {
    pub fn settings(&self, seed: u64) -> Settings {
        Settings {
            expert_size: self.expert_size,
            share: self.share,
            split: self.split,
            router: self.router,
            loss: self.router_loss,
            router_steps: self.router_steps,
            router_rate: self.router_rate,
            threshold: self.threshold,
            seed,
        }
    }

    /// `size` and `activation`: of the model that is split.
    pub(in crate::recipe) fn check(&self, size: Size, activation: Activation) -> Result<()> {
        match (&self.training, activation) {
            (None, Activation::Relu) | (Some(_), Activation::Gelu) => {}
            (None, _) => {
                let allowed = "relu for experts, which are chosen by which neurons are positive; or [experts.training], which converts gelu";
                return refuse("model.activation", written(&activation), allowed);
            }
            (Some(_), _) => {
                let allowed = "none where the model's FFNs are ReLU already: there is nothing to convert";
                return refuse("experts.training", "a training", allowed);
            }
        }
        if let Some(training) = &self.training {
            training.check("experts.training")?;
            self.distil.check("experts.distil")?;
        }
        if self.threshold.is_some_and(|t| !(0.0..1.0).contains(&t)) {
            return refuse("experts.threshold", self.threshold.unwrap_or(0.0), "0 to below 1");
        }
        if self.threshold.is_some() && self.router == Router::Similarity {
            let allowed = "none with router = \"similarity\": its scores are distances, no shares of activation";
            return refuse("experts.threshold", self.threshold.unwrap_or(0.0), allowed);
        }
        if let Some(drop) = self.drop.filter(|d| !(d.share > 0.0 && d.share < 1.0)) {
            return refuse("experts.drop.share", drop.share, "above 0 to below 1");
        }
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
