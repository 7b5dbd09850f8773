//! Adapters (Houlsby et al. 2019): a bottleneck behind every attention and FFN, y + W_up gelu(W_down y + b) + b'. What BMCook
//! evaluates its compressed models with.

use serde::{Deserialize, Serialize};

use super::{put, refuse, uniform};
use crate::error::Result;
use crate::nn::Model;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adapter {
    /// Of the bottleneck.
    #[serde(default = "default_width")]
    pub width: usize,
}

/// OpenDelta's, which BMCook's evaluation uses.
fn default_width() -> usize {
    24
}

impl Default for Adapter {
    fn default() -> Self {
        Self { width: default_width() }
    }
}

impl Adapter {
    /// W_up starts at 0, so that the model computes what it did.
    pub(super) fn add(&self, model: &mut Model, seed: u64) -> Result<()> {
        let (d, width) = (model.config.width, self.width);
        if width == 0 || width > d {
            return refuse("width", format!("{width} of {d} channels"), "1 to the model's width");
        }
        for block in 0..model.config.blocks.len() {
            let has = [model.config.blocks[block].attends(), model.config.blocks[block].feeds()];
            for (place, sublayer) in ["attention", "ffn"].into_iter().enumerate().filter(|(place, _)| has[*place]) {
                let name = |part: &str| format!("blocks.{block}.{sublayer}.adapter.{part}");
                let site = (2 * block + place) as u32;
                put(model, name("down.weight"), &[width, d], &uniform(seed, site, [width, d]))?;
                put(model, name("down.bias"), &[width], &vec![0.0; width])?;
                put(model, name("up.weight"), &[d, width], &vec![0.0; d * width])?;
                put(model, name("up.bias"), &[d], &vec![0.0; d])?;
            }
        }
        Ok(())
    }
}
