//! Which blocks stay.

use serde::{Deserialize, Serialize};

use super::importance;
use super::prune::without_block;
use super::select::largest;
use crate::error::Result;
use crate::nn::Model;
use crate::train::lifecycle::Micro;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayersMethod {
    /// Those without which the calibration loss is largest, each left out alone.
    #[default]
    Importance,
    /// The first ones: the top is dropped (Sajjad et al. 2023).
    Top,
    /// Evenly spread from the first on: of twice as many, every other one.
    EveryOther,
    /// These.
    Subset(Vec<usize>),
}

impl LayersMethod {
    /// The blocks of `model` that stay, `count` of them, ascending.
    ///
    /// # Errors
    /// Those of the passes.
    pub fn choose(&self, model: &Model, count: usize, micros: &[Micro]) -> Result<Vec<usize>> {
        let blocks = model.config.blocks.len();
        Ok(match self {
            // Where all blocks stay there is nothing to judge, and a model of one block cannot be run without it.
            _ if count == blocks => (0..blocks).collect(),
            LayersMethod::Top => (0..count).collect(),
            LayersMethod::EveryOther => (0..count).map(|i| i * blocks / count).collect(),
            LayersMethod::Subset(subset) => subset.clone(),
            LayersMethod::Importance => {
                let judge = |i: usize| importance::loss(&without_block(model, i)?, micros);
                largest(&(0..blocks).map(judge).collect::<Result<Vec<f64>>>()?, count)
            }
        })
    }
}
