//! `[tune]`: a few parameters beside the model's own.

use serde::{Deserialize, Serialize};

use super::{Distil, Training};
use crate::compress::tuning::Tuning;
use crate::error::Result;
use crate::nn::config::Size;
use crate::recipe::check::refuse;
use crate::recipe::stages::matches;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tune {
    /// Low-rank updates become part of the weights, within their masks and grids.
    #[serde(default = "super::yes")]
    pub merge: bool,
    pub method: Tuning,
    /// Also learns from the teacher.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distil: Option<Distil>,
    pub training: Training,
}

impl Tune {
    /// Whether the model is an ordinary one again after the stage.
    pub fn merges(&self) -> bool {
        self.merge && matches!(self.method, Tuning::Lora(_))
    }

    /// `size`: of the model that is tuned, and its width; `names`: its linears that are no experts by then.
    pub(in crate::recipe) fn check(
        &self,
        (size, width): (Size, usize),
        names: &[String],
        pipeline: bool,
    ) -> Result<()> {
        self.training.check("tune.training")?;
        if let Some(distil) = &self.distil {
            distil.check("tune.distil")?;
        }
        if pipeline {
            return refuse("tune", "with [pipeline]", "without it: what learns is too little to be spread over stages");
        }
        match &self.method {
            Tuning::Lora(lora) => {
                let smallest = width.min(size.heads * size.head_size).min(size.ffn_width);
                if lora.rank == 0 || lora.rank > smallest {
                    return refuse("tune.method.rank", lora.rank, format!("1 to {smallest}"));
                }
                if !lora.alpha.is_finite() {
                    return refuse("tune.method.alpha", lora.alpha, "a finite number");
                }
                if let Some(part) = lora.linears.iter().find(|part| !names.iter().any(|name| matches(name, part))) {
                    let allowed = format!(
                        "parts of names of linears that are no experts, {} to {}",
                        names[0],
                        names[names.len() - 1]
                    );
                    return refuse("tune.method.linears", format!("{part:?}"), allowed);
                }
                Ok(())
            }
            Tuning::Adapter(adapter) if adapter.width == 0 || adapter.width > width => {
                refuse("tune.method.width", adapter.width, format!("1 to {width}"))
            }
            Tuning::Prefix(prefix) if prefix.length == 0 || prefix.length > size.max_positions => {
                refuse("tune.method.length", prefix.length, format!("1 to {}", size.max_positions))
            }
            _ => Ok(()),
        }
    }
}
