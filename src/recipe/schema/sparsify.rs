//! `[sparsify]`: zeros in weights.

use serde::{Deserialize, Serialize};

use super::{Distil, Training};
use crate::error::Result;
use crate::nn::Config;
use crate::nn::config::Size;
use crate::recipe::check::refuse;
use crate::recipe::stages::matches;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mask {
    #[default]
    OneDimensional,
    TwoDimensional,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sparsify {
    #[serde(default)]
    pub mask: Mask,
    /// Parts of linear names that are pruned; empty: all linears of all blocks.
    #[serde(default)]
    pub linears: Vec<String>,
    #[serde(default)]
    pub distil: Distil,
    pub training: Training,
}

impl Sparsify {
    /// `size`: of the model that is pruned.
    pub(in crate::recipe) fn check(&self, size: Size) -> Result<()> {
        self.training.check("sparsify.training")?;
        self.distil.check("sparsify.distil")?;
        let names: Vec<String> = (0..size.layers).flat_map(Config::linears).collect();
        if let Some(part) = self.linears.iter().find(|part| !names.iter().any(|name| matches(name, part))) {
            let allowed = format!("parts of linear names, {} to {}", names[0], names[names.len() - 1]);
            return refuse("sparsify.linears", format!("{part:?}"), allowed);
        }
        Ok(())
    }
}
