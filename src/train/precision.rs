//! Mixed precision (Micikevicius et al. 2018): products and activations in 16 bits, parameters, their gradients and the
//! optimizer's state in f32, and a factor on the loss that keeps small f16 gradients above zero.

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::ops::optim::UpdateFactor;

/// What a training computes in. Parameters are f32 in any case and cast where they are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    #[default]
    F32,
    Bf16,
    F16,
}

impl Precision {
    /// The 16-bit type of products and activations; `None` for f32.
    pub const fn compute(self) -> Option<DType> {
        match self {
            Self::F32 => None,
            Self::Bf16 => Some(DType::Bf16),
            Self::F16 => Some(DType::F16),
        }
    }
}

/// Dynamic loss scale: halved when a gradient overflows, doubled after [`LossScale::GROWTH`] good steps. It lives in device
/// memory, where `ops::optim::UpdateFactor` changes it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScale {
    pub factor: f32,
    /// Steps since it changed.
    pub good: u32,
}

impl LossScale {
    pub const GROWTH: u32 = 2000;

    /// f16 needs one; bf16 has the range of f32.
    pub fn of(precision: Precision) -> Option<Self> {
        (precision == Precision::F16).then_some(Self { factor: 65_536.0, good: 0 })
    }

    /// For a checkpoint: the factor and the good steps since it changed.
    pub fn words(self) -> [f32; 2] {
        [self.factor, self.good as f32]
    }

    pub fn from_words([factor, good]: [f32; 2]) -> Self {
        let factor = factor.clamp(UpdateFactor::LEAST_SCALE, UpdateFactor::MOST_SCALE);
        Self { factor, good: (good as u32).min(Self::GROWTH - 1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_f16_is_scaled_and_a_checkpoint_keeps_the_scale() {
        assert_eq!(LossScale::of(Precision::Bf16), None);
        let scale = LossScale { good: 7, ..LossScale::of(Precision::F16).unwrap() };
        assert_eq!(LossScale::from_words(scale.words()), scale);
        assert_eq!(LossScale::from_words([0.0, 1e9]), LossScale { factor: 1.0, good: LossScale::GROWTH - 1 });
    }
}
