//! `[quantize]`: weights and activations on a grid.

use serde::{Deserialize, Serialize};

use super::{Distil, Training};
use crate::error::Result;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantize {
    #[serde(default)]
    pub distil: Distil,
    pub training: Training,
}

impl Quantize {
    pub(in crate::recipe) fn check(&self) -> Result<()> {
        self.training.check("quantize.training")?;
        self.distil.check("quantize.distil")
    }
}
