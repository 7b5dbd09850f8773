//! What quantized linears are: bits, levels, which weights share a step, and what becomes of the inputs.

use serde::{Deserialize, Serialize};

use super::STEP;
use crate::dispatch;
use crate::error::{Error, Result};
use crate::nn::Model;
use crate::ops::quant::{FakeQuant, Granularity, GridFrom, Quantize, Scheme};
use crate::tensor::Tensor;

/// Bits of quantized inputs.
pub const INPUT_BITS: u32 = 8;

/// Which levels a weight may have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Levels {
    /// -(2^(b-1) - 1) ..= 2^(b-1) - 1.
    #[default]
    Uniform,
    /// -1, 0, 1 with the threshold 0.7 mean |w| over what is not pruned (Li and Liu 2016).
    Ternary,
    /// sign(w) mean |w| over what is not pruned (Rastegari et al. 2016); 0 stays 0.
    Binary,
}

/// What a quantized linear does with its input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activations {
    /// Int8, each token by its own largest magnitude.
    #[default]
    Token,
    /// Int8, by one step that calibration or training found.
    Static,
    /// As it is: weight-only.
    Float,
}

/// How linears are stored, and simulated in training. Weights are symmetric, so that a pruned one is the integer 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Format {
    /// 2 to 8; of uniform levels.
    #[serde(default = "eight")]
    pub bits: u32,
    #[serde(default)]
    pub levels: Levels,
    /// Weights along the input that share a step; 0: all of an output channel.
    #[serde(default)]
    pub group: usize,
    #[serde(default)]
    pub activations: Activations,
}

fn eight() -> u32 {
    8
}

impl Default for Format {
    /// Int8 per output channel and per token.
    fn default() -> Self {
        Self { bits: 8, levels: Levels::Uniform, group: 0, activations: Activations::Token }
    }
}

impl Format {
    /// # Errors
    /// `Parameter` for bits outside 2 ..= 8, for a group that is no multiple of 8, and for groups with integer inputs: their
    /// product is one int32 sum per output.
    pub fn check(&self) -> Result<()> {
        let refuse =
            |parameter, value: String, allowed| Err(Error::Parameter { op: "quantize", parameter, value, allowed });
        if !(2..=8).contains(&self.bits) {
            return refuse("bits", self.bits.to_string(), "2..=8");
        }
        if !self.group.is_multiple_of(8) {
            return refuse("group", self.group.to_string(), "0 or a multiple of 8");
        }
        if self.group > 0 && self.activations != Activations::Float {
            return refuse("group", self.group.to_string(), "0 where inputs are integers too");
        }
        Ok(())
    }

    /// As [`Format::check`], and that groups divide the inputs of these linears.
    pub fn check_model(&self, model: &Model, linears: &[String]) -> Result<()> {
        self.check()?;
        for linear in linears {
            if let Some(weight) = model.tensors.get(&format!("{linear}.weight")) {
                self.granularity().groups("quantize", &weight.meta())?;
            }
        }
        Ok(())
    }

    /// Bits that the levels take.
    pub fn weight_bits(&self) -> u32 {
        if self.levels == Levels::Uniform { self.bits } else { 2 }
    }

    pub fn scheme(&self) -> Scheme {
        match self.levels {
            Levels::Uniform => Scheme::SymmetricNarrow,
            Levels::Ternary => Scheme::Ternary,
            Levels::Binary => Scheme::Binary,
        }
    }

    /// The highest level.
    pub fn highest(&self) -> f64 {
        f64::from((1u32 << (self.weight_bits() - 1)) - 1)
    }

    pub fn granularity(&self) -> Granularity {
        if self.group == 0 { Granularity::Channel } else { Granularity::Group(self.group) }
    }

    /// What stores a weight; `from` its own range or a step.
    pub fn store(&self, from: GridFrom) -> Quantize {
        Quantize { bits: self.weight_bits(), scheme: self.scheme(), granularity: self.granularity(), from }
    }

    /// The simulated twin of [`Format::store`].
    pub fn simulate(&self, from: GridFrom) -> FakeQuant {
        FakeQuant { bits: self.weight_bits(), scheme: self.scheme(), granularity: self.granularity(), from }
    }
}

/// Integers i8 in the shape of a linear's weight, and f32 steps `[groups]`: by its `.step` where it has one, else by its own
/// elements.
pub fn stored(model: &Model, linear: &str, format: &Format) -> Result<(Tensor, Tensor)> {
    let weight = model.get(&format!("{linear}.weight"))?;
    let outputs = match model.tensors.get(&format!("{linear}.{STEP}")) {
        Some(step) => dispatch::run(&format.store(GridFrom::Step), &[weight, step])?,
        None => dispatch::run(&format.store(GridFrom::Own), &[weight])?,
    };
    Ok((outputs[0].clone(), outputs[1].clone()))
}

/// The weight as its integers show it.
pub fn simulated(model: &Model, linear: &str, format: &Format) -> Result<Tensor> {
    let weight = model.get(&format!("{linear}.weight"))?;
    match model.tensors.get(&format!("{linear}.{STEP}")) {
        Some(step) => dispatch::run_one(&format.simulate(GridFrom::Step), &[weight, step]),
        None => dispatch::run_one(&format.simulate(GridFrom::Own), &[weight]),
    }
}
