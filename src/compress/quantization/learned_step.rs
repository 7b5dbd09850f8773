//! Learned step size quantization (LSQ, Esser et al. 2020): where steps begin. Their gradient is `ops::quant::StepSlope`.

use std::collections::BTreeMap;

use super::format::{Activations, Format, INPUT_BITS};
use super::{INPUT_STEP, STEP};
use crate::compress::inputs;
use crate::error::Result;
use crate::nn::{Batch, Model};
use crate::tensor::Tensor;

/// 2 mean |v| / sqrt(qmax) (section 2.1 there); 1 where all values are 0, as the scale rule has it.
pub fn initial(sum_of_magnitudes: f64, count: usize, highest: f64) -> f32 {
    let step = (2.0 * sum_of_magnitudes / count.max(1) as f64 / highest.sqrt()) as f32;
    if step > 0.0 { step } else { 1.0 }
}

/// Gives every linear steps to learn from: of its weight, and of its input where that is static.
pub fn begin(model: &mut Model, linears: &[String], format: &Format, batches: &[Batch]) -> Result<()> {
    for linear in linears {
        let weight = model.get(&format!("{linear}.weight"))?;
        let (groups, length) = format.granularity().groups("learned steps", &weight.meta())?;
        let values = weight.to_f64()?;
        let sum = |group: &[f64]| group.iter().map(|w| w.abs()).sum::<f64>();
        let steps: Vec<f32> = values.chunks(length).map(|g| initial(sum(g), g.len(), format.highest())).collect();
        let steps = Tensor::from_slice(model.device(), &[groups], &steps)?;
        model.tensors.insert(format!("{linear}.{STEP}"), steps);
    }
    if format.activations != Activations::Static {
        return Ok(());
    }
    let mut sums: BTreeMap<String, (f64, usize)> = BTreeMap::new();
    inputs::pass(model, batches, &mut |seen| {
        let values = seen.rows.to_f64()?;
        let (sum, count) = sums.entry(seen.linear.to_string()).or_default();
        *sum += values.iter().map(|x| x.abs()).sum::<f64>();
        *count += values.len();
        Ok(())
    })?;
    let highest = f64::from((1u32 << (INPUT_BITS - 1)) - 1);
    for linear in linears {
        let (sum, count) = sums.get(linear).copied().unwrap_or_default();
        let step = Tensor::from_slice(model.device(), &[1], &[initial(sum, count, highest)])?;
        model.tensors.insert(format!("{linear}.{INPUT_STEP}"), step);
    }
    Ok(())
}
