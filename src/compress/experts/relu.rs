//! ReLU in place of GELU (Mirzadeh et al. 2023; MoEfication's first step for BERT): the same weights under an activation that is
//! exactly 0 for negative inputs. A short training with distillation makes up for the change.

use crate::error::{Error, Result};
use crate::nn::{Activation, Model};

/// Sets the activation of every block to ReLU; gives the blocks whose it was not.
///
/// # Errors
/// `Error::Recipe` for gated FFNs, see [`super::convert`].
pub fn convert(model: &mut Model) -> Result<Vec<usize>> {
    if let Some(i) = model.config.blocks.iter().position(|b| b.activation == Activation::Geglu) {
        let allowed = format!(
            "block {i}: ungated FFNs: without its gate a gated FFN is another function, not the same one under another activation"
        );
        return Err(Error::Recipe { key: "experts.training".into(), value: "a gated FFN".into(), allowed });
    }
    let mut converted = Vec::new();
    for (i, block) in model.config.blocks.iter_mut().enumerate() {
        if block.activation == Activation::Gelu {
            block.activation = Activation::Relu;
            converted.push(i);
        }
    }
    Ok(converted)
}
