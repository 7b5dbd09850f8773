//! Prefix tuning (Li and Liang 2021): learned keys and values in front of every sequence's own, in each block. Learned as
//! they are, without the reparametrisation by a small network. Nothing of the model's own changes, whatever its weights are.

use serde::{Deserialize, Serialize};

use super::{put, refuse};
use crate::error::Result;
use crate::nn::Model;
use crate::nn::tuning::COUNTS;
use crate::rng::Stream;
use crate::tensor::Tensor;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prefix {
    /// Keys and values in front.
    #[serde(default = "default_length")]
    pub length: usize,
}

fn default_length() -> usize {
    10
}

impl Default for Prefix {
    fn default() -> Self {
        Self { length: default_length() }
    }
}

impl Prefix {
    pub(super) fn add(&self, model: &mut Model, seed: u64) -> Result<()> {
        let length = self.length;
        if length == 0 || length > model.config.max_positions {
            return refuse("length", length.to_string(), "1 to max_positions");
        }
        for (i, block) in model.config.blocks.clone().iter().enumerate().filter(|(_, block)| block.attends()) {
            let inner = block.heads * block.head_size;
            for (place, part) in ["key", "value"].into_iter().enumerate() {
                let mut stream = Stream::new(seed, 0x9ef_0000 + (2 * i + place) as u32);
                let values: Vec<f32> = (0..length * inner).map(|_| (0.02 * stream.normal()) as f32).collect();
                put(model, format!("blocks.{i}.prefix.{part}"), &[length, inner], &values)?;
            }
        }
        let most = model.config.max_positions + 1;
        let counts: Vec<u32> = (0..most).map(|n| (n + length) as u32).collect();
        let counts = Tensor::from_slice(model.device(), &[most, 1], &counts)?;
        model.tensors.insert(COUNTS.into(), counts);
        Ok(())
    }
}
