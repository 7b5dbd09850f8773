//! Mixed precision (Micikevicius et al. 2018): products and activations in 16 bits, parameters, their gradients and the
//! optimizer's state in f32, and a factor on the loss that keeps small f16 gradients above zero.

use serde::{Deserialize, Serialize};

use crate::dtype::DType;

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

/// Dynamic loss scale: halved when a gradient overflows, doubled after [`LossScale::GROWTH`] good steps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScale {
    factor: f32,
    good: u32,
}

impl LossScale {
    const START: f32 = 65_536.0;
    const LEAST: f32 = 1.0;
    const MOST: f32 = 16_777_216.0;
    pub const GROWTH: u32 = 2000;

    /// f16 needs one; bf16 has the range of f32.
    pub fn of(precision: Precision) -> Option<Self> {
        (precision == Precision::F16).then_some(Self { factor: Self::START, good: 0 })
    }

    pub fn factor(self) -> f32 {
        self.factor
    }

    /// After a step whose gradients were finite.
    pub fn grow(&mut self) {
        self.good += 1;
        if self.good == Self::GROWTH {
            *self = Self { factor: (self.factor * 2.0).min(Self::MOST), good: 0 };
        }
    }

    /// After a step whose gradients were not. False when the scale cannot be at fault any more.
    pub fn shrink(&mut self) -> bool {
        let able = self.factor > Self::LEAST;
        *self = Self { factor: (self.factor / 2.0).max(Self::LEAST), good: 0 };
        able
    }

    /// For a checkpoint: the factor and the good steps since it changed.
    pub fn words(self) -> [f32; 2] {
        [self.factor, self.good as f32]
    }

    pub fn from_words([factor, good]: [f32; 2]) -> Self {
        Self { factor: factor.clamp(Self::LEAST, Self::MOST), good: (good as u32).min(Self::GROWTH - 1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_scale_halves_on_overflow_and_doubles_after_good_steps() {
        assert_eq!(LossScale::of(Precision::Bf16), None);
        let mut scale = LossScale::of(Precision::F16).unwrap();
        assert!(scale.shrink());
        assert_eq!(scale.factor(), 32_768.0);
        (0..LossScale::GROWTH - 1).for_each(|_| scale.grow());
        assert_eq!(scale.factor(), 32_768.0);
        assert_eq!(LossScale::from_words(scale.words()), scale);
        scale.grow();
        assert_eq!(scale.words(), [65_536.0, 0.0]);
        let mut least = LossScale::from_words([1.0, 3.0]);
        assert!(!least.shrink());
    }
}
