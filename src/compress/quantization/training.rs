//! Int8 quantization-aware training as an output hook: symmetric narrow fake quantization of weights per output
//! channel and of activations per token, straight-through. Symmetric, so that a pruned weight is the integer 0.

use crate::error::Result;
use crate::nn::{Model, OutputHook, Pass};
use crate::ops::quant::{FakeQuant, Granularity, Quantize, Scheme};
use crate::tape::Var;
use crate::tensor::Tensor;
use crate::train::lifecycle::{Invariant, Method};

pub struct QuantizationAware {
    pub bits: u32,
    /// Names of the linears (and expert groups) that are quantized.
    pub linears: Vec<String>,
}

impl OutputHook for QuantizationAware {
    fn on_output(&self, pass: &mut Pass, linear: &str, x: Var, weight: Var) -> Result<(Var, Var)> {
        if !self.linears.iter().any(|l| l == linear) {
            return Ok((x, weight));
        }
        let fake =
            |granularity| FakeQuant { bits: self.bits, scheme: Scheme::SymmetricNarrow, granularity, dynamic: true };
        let x = pass.tape.first(fake(Granularity::Token), &[&x])?;
        let weight = pass.tape.first(fake(Granularity::Channel), &[&weight])?;
        Ok((x, weight))
    }
}

/// The real counterpart of the hook's weight side: int8 values and one scale per output channel.
pub fn quantize_weight(weight: &Tensor, bits: u32) -> Result<(Tensor, Tensor)> {
    let op = Quantize { bits, scheme: Scheme::SymmetricNarrow, granularity: Granularity::Channel };
    let outputs = crate::dispatch::run(&op, &[weight])?;
    Ok((outputs[0].clone(), outputs[1].clone()))
}

impl Method for QuantizationAware {
    fn name(&self) -> &'static str {
        "int8 quantization-aware training"
    }

    fn on_output(&self) -> Option<&dyn OutputHook> {
        Some(self)
    }

    /// Every pruned weight is the integer zero.
    fn invariants(&self, model: &Model) -> Result<Vec<Invariant>> {
        let (mut pruned, mut wrong) = (0usize, 0usize);
        for linear in &self.linears {
            let Some(weight) = model.tensors.get(&format!("{linear}.weight")) else {
                continue;
            };
            let q = quantize_weight(weight, self.bits)?.0.to_vec::<i8>()?;
            for (w, q) in weight.to_vec::<f32>()?.iter().zip(q) {
                if *w == 0.0 {
                    pruned += 1;
                    wrong += usize::from(q != 0);
                }
            }
        }
        Ok(vec![Invariant {
            rule: "pruned weights quantize to the integer 0".into(),
            measured: format!("{wrong} of {pruned} do not"),
            holds: wrong == 0,
        }])
    }
}
