//! Experts that do little are removed, physically: fewer rows, fewer router outputs.

use serde::{Deserialize, Serialize};

use super::report::masses;
use super::router::scores;
use crate::compress::structure::largest;
use crate::dispatch;
use crate::error::{Error, Result};
use crate::nn::{Batch, Experts, Model};
use crate::ops::moe::{GroupedMatmul, MoeDispatch, MoeGate};
use crate::tensor::Tensor;

/// What an expert is worth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Saliency {
    /// Mean length of its output over the tokens routed to it (REAP, Lasby et al. 2025, with MoEfication's gate of 1).
    #[default]
    Reap,
    /// Its sum of positive activations over all tokens.
    Mass,
    /// How many tokens are routed to it.
    Usage,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drop {
    /// Share of the experts of each block that go.
    pub share: f64,
    #[serde(default)]
    pub saliency: Saliency,
}

/// What is left of a block.
#[derive(Clone, Debug, PartialEq)]
pub struct Dropped {
    pub block: usize,
    pub before: usize,
    /// Experts that stay, by their old places.
    pub kept: Vec<usize>,
    /// The dropped experts' share of the saliency of all.
    pub lost: f64,
}

/// Saliency of each expert of block `i` over inputs `[rows, d]`.
pub fn saliencies(model: &Model, i: usize, inputs: &[Tensor], by: Saliency) -> Result<Vec<f64>> {
    let Experts { count, selected, threshold } = experts(model, i)?;
    let (mut sums, mut tokens) = (vec![0.0; count], vec![0usize; count]);
    for x in inputs {
        if by == Saliency::Mass {
            let (mass, _) = masses(model, i, x, count)?;
            mass.chunks(count).for_each(|token| sums.iter_mut().zip(token).for_each(|(sum, m)| *sum += m));
            continue;
        }
        let scores = scores(model, i, x)?;
        let lengths = if by == Saliency::Reap { Some(output_lengths(model, i, x, &scores)?) } else { None };
        for (token, row) in scores.chunks(count).enumerate() {
            for e in largest(row, selected) {
                if threshold.is_some_and(|t| row[e] <= f64::from(t)) {
                    continue;
                }
                tokens[e] += 1;
                sums[e] += lengths.as_ref().map_or(1.0, |l| l[token * count + e]);
            }
        }
    }
    if by == Saliency::Reap {
        sums.iter_mut().zip(tokens).for_each(|(sum, n)| *sum /= n.max(1) as f64);
    }
    Ok(sums)
}

fn experts(model: &Model, i: usize) -> Result<Experts> {
    let experts = model.config.blocks.get(i).and_then(|b| b.experts);
    experts.ok_or_else(|| Error::Shape { op: "experts", rule: "a converted block", got: format!("block {i}") })
}

/// Length of the output of each selected expert for each token, `[rows, E]`.
fn output_lengths(model: &Model, i: usize, x: &Tensor, scores: &[f64]) -> Result<Vec<f64>> {
    let Experts { count, selected: k, .. } = experts(model, i)?;
    let rows = x.dims()[0];
    let scores = Tensor::from_f64(model.device(), &[rows, count], crate::dtype::DType::F32, scores)?;
    let indices = dispatch::run(&MoeGate { k }, &[&scores])?.remove(0);
    let sorted = dispatch::run(&MoeDispatch { experts: count }, &[&indices])?;
    let part = |name: &str| model.get(&format!("blocks.{i}.ffn.experts.{name}"));
    let first = GroupedMatmul { k, relu: true, bias: true, gather: true, experts: count };
    let h = dispatch::run_one(&first, &[x, part("in.weight")?, part("in.bias")?, &sorted[0], &sorted[1]])?;
    let second = GroupedMatmul { k, relu: false, bias: false, gather: false, experts: count };
    let y = dispatch::run_one(&second, &[&h, part("out.weight")?, &sorted[0], &sorted[1]])?;
    let (width, indices, order) = (y.shape().last(), indices.to_vec::<u32>()?, sorted[0].to_vec::<u32>()?);
    let mut lengths = vec![0.0; rows * count];
    for (&slot, row) in order.iter().zip(y.to_vec::<f32>()?.chunks(width.max(1))) {
        let (slot, length) = (slot as usize, row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt());
        lengths[slot / k * count + indices[slot] as usize] = length;
    }
    Ok(lengths)
}

/// Removes from every split block the share of its experts that is worth least on the calibration batches; the lower index
/// stays on ties, and at least one does.
///
/// # Errors
/// `Error::Parameter` for a share outside 0 to 1; `Error::Shape` for a model without experts.
pub fn drop_experts(model: &mut Model, settings: Drop, calibration: &[Batch]) -> Result<Vec<Dropped>> {
    if !(settings.share >= 0.0 && settings.share < 1.0) {
        let (value, allowed) = (settings.share.to_string(), "from 0 to below 1");
        return Err(Error::Parameter { op: "drop", parameter: "share", value, allowed });
    }
    let inputs = super::report::ffn_inputs(model, calibration)?;
    let mut dropped = Vec::new();
    for (i, inputs) in inputs.iter().enumerate() {
        if !model.config.blocks[i].feeds() {
            continue;
        }
        let before = experts(model, i)?.count;
        let saliency = saliencies(model, i, inputs, settings.saliency)?;
        let gone = ((before as f64 * settings.share).round() as usize).min(before - 1);
        let kept = largest(&saliency, before - gone);
        let (all, left) = (saliency.iter().sum::<f64>(), kept.iter().map(|&e| saliency[e]).sum::<f64>());
        keep(model, i, &kept)?;
        let lost = if all > 0.0 { 1.0 - left / all } else { 0.0 };
        dropped.push(Dropped { block: i, before, kept, lost });
    }
    Ok(dropped)
}

/// Keeps these experts of block `i`, in rising order.
pub fn keep(model: &mut Model, i: usize, kept: &[usize]) -> Result<()> {
    let Experts { count, selected, threshold } = experts(model, i)?;
    if kept.is_empty() || kept.iter().any(|&e| e >= count) {
        let got = format!("{kept:?} of {count}");
        return Err(Error::Shape { op: "experts", rule: "at least one expert that exists stays", got });
    }
    let parts = ["in.weight", "in.bias", "in.step", "out.weight", "out.step"].map(|p| format!("experts.{p}"));
    // Router outputs are experts; what lies before them stays.
    let routers = ["out.weight", "out.bias", "centre.weight", "centre.bias"].map(|p| format!("router.{p}"));
    for name in parts.iter().chain(&routers).map(|part| format!("blocks.{i}.ffn.{part}")) {
        let Some(tensor) = model.tensors.get(&name) else { continue };
        let (mut dims, values) = (tensor.dims().to_vec(), tensor.to_vec::<f32>()?);
        let each = values.len() / count;
        let rows: Vec<f32> = kept.iter().flat_map(|&e| values[e * each..(e + 1) * each].iter().copied()).collect();
        // Steps lie flat: so many for each expert.
        dims[0] = dims[0] / count * kept.len();
        model.tensors.insert(name, Tensor::from_slice(model.device(), &dims, &rows)?);
    }
    let block = &mut model.config.blocks[i];
    block.ffn_width = block.ffn_width / count * kept.len();
    block.experts = Some(Experts { count: kept.len(), selected: selected.min(kept.len()), threshold });
    Ok(())
}
