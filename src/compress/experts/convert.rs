//! Dense FFNs become routed experts: neurons are put in order, routers trained, and what was measured is reported.

use super::report::{self, BlockReport};
use super::{SIZE_MULTIPLE, Settings, router, split};
use crate::error::{Error, Result};
use crate::nn::{Activation, Batch, Config, Experts, Model, Pass};
use crate::tensor::Tensor;

/// Why an FFN cannot be split as it is.
fn check(
    activation: Activation,
    ffn_width: usize,
    settings: &Settings,
) -> std::result::Result<(), (&'static str, String, String)> {
    let refuse = |key, value: String, allowed: String| Err((key, value, allowed));
    match activation {
        Activation::Relu => {}
        Activation::Gelu => {
            let allowed =
                "ReLU FFNs, whose neurons are exactly 0 where they are off: convert them first ([experts.training])";
            return refuse("expert_size", "a GELU FFN".into(), allowed.into());
        }
        Activation::Geglu => {
            let allowed = "ungated ReLU FFNs: a gated neuron is the product of a gate that is never exactly 0 and a value, so no sum \
                           of positive activations says which experts a token needs, and leaving experts out costs quality at any size";
            return refuse("expert_size", "a gated FFN".into(), allowed.into());
        }
    }
    let size = settings.expert_size;
    if size == 0 || !size.is_multiple_of(SIZE_MULTIPLE) || !ffn_width.is_multiple_of(size) {
        return refuse(
            "expert_size",
            size.to_string(),
            format!("a multiple of {SIZE_MULTIPLE} that divides {ffn_width}"),
        );
    }
    if !(settings.share > 0.0 && settings.share <= 1.0) {
        return refuse("share", settings.share.to_string(), "above 0 to 1".into());
    }
    if settings.threshold.is_some() && settings.router == router::Router::Similarity {
        let allowed = "none with similarity, whose scores are distances and no shares of activation";
        return refuse("threshold", "a threshold".into(), allowed.into());
    }
    Ok(())
}

/// Converts every block of `model`; `calibration` batches train and judge the routers.
///
/// # Errors
/// `Error::Recipe` when an FFN is not ReLU (its neurons are never exactly off) or gated, or its width is no multiple of the
/// size; where there is nothing to calibrate on.
pub fn convert(model: &Model, settings: Settings, calibration: &[Batch]) -> Result<(Model, Vec<BlockReport>)> {
    if calibration.is_empty() {
        let allowed = "at least one batch: routers learn from what the experts do".into();
        return Err(Error::Recipe { key: "experts.calibration_batches".into(), value: "0".into(), allowed });
    }
    for (i, block) in model.config.blocks.iter().enumerate().filter(|(_, block)| block.feeds()) {
        check(block.activation, block.ffn_width, &settings).map_err(|(key, value, allowed)| Error::Recipe {
            key: format!("experts.{key}"),
            value,
            allowed: format!("block {i}: {allowed}"),
        })?;
    }
    let inputs = report::ffn_inputs(model, calibration)?;
    let mut converted = Model::new(model.config.clone(), model.tensors.clone(), model.device())?;
    let mut reports = Vec::new();
    for (i, inputs) in inputs.iter().enumerate().filter(|(i, _)| model.config.blocks[*i].feeds()) {
        let count = model.config.blocks[i].ffn_width / settings.expert_size;
        let selected = ((count as f64 * settings.share).round() as usize).clamp(1, count);
        let order = split::neuron_order(model, i, count, (settings.split, settings.seed), inputs)?;
        rearrange(&mut converted, i, count, &order)?;
        let threshold = settings.threshold.map(|share| settings.router.threshold(share, settings.loss));
        converted.config.blocks[i].experts = Some(Experts { count, selected, threshold });
        reports.push(router::train(&mut converted, i, inputs, &settings)?);
    }
    Ok((converted, reports))
}

/// Replaces block `i`'s FFN tensors by expert tensors: in `[E, n, d]` with bias `[E, n]`, out `[E, d, n]`.
fn rearrange(model: &mut Model, i: usize, experts: usize, order: &[usize]) -> Result<()> {
    let (d, f) = (model.config.width, model.config.blocks[i].ffn_width);
    let n = f / experts;
    let device = model.device().clone();
    let name = |part: &str| format!("blocks.{i}.ffn.{part}");
    let (w_in, b_in, w_out) =
        (model.values(&name("in.weight"))?, model.values(&name("in.bias"))?, model.values(&name("out.weight"))?);
    let rows: Vec<f32> = order.iter().flat_map(|&j| w_in[j * d..(j + 1) * d].iter().copied()).collect();
    let bias: Vec<f32> = order.iter().map(|&j| b_in[j]).collect();
    let mut out = Vec::with_capacity(d * f);
    for expert in order.chunks(n) {
        for c in 0..d {
            out.extend(expert.iter().map(|&j| w_out[c * f + j]));
        }
    }
    for part in ["in.weight", "in.bias", "out.weight"] {
        model.tensors.remove(&name(part));
    }
    carry_steps(model, i, order, experts)?;
    model.tensors.insert(name("experts.in.weight"), Tensor::from_slice(&device, &[experts, n, d], &rows)?);
    model.tensors.insert(name("experts.in.bias"), Tensor::from_slice(&device, &[experts, n], &bias)?);
    model.tensors.insert(name("experts.out.weight"), Tensor::from_slice(&device, &[experts, d, n], &out)?);
    Ok(())
}

/// Quantization steps of block `i`'s FFN go with its rows: those of the neurons in their new order, those of the output
/// channels to every expert. Inputs keep theirs.
///
/// # Errors
/// `Error::Shape` for steps of groups and for `.smooth`: neurons are reordered across them, and routers see inputs unscaled.
fn carry_steps(model: &mut Model, i: usize, order: &[usize], experts: usize) -> Result<()> {
    let d = model.config.width;
    for (part, count) in [("in", order.len()), ("out", d)] {
        let (from, to) = (format!("blocks.{i}.ffn.{part}"), format!("blocks.{i}.ffn.experts.{part}"));
        if let Some(step) = model.tensors.remove(&format!("{from}.input_step")) {
            model.tensors.insert(format!("{to}.input_step"), step);
        }
        let refuse = |rule, got| Err(Error::Shape { op: "experts", rule, got });
        if model.tensors.contains_key(&format!("{from}.smooth")) {
            return refuse("no factor between inputs and weights", format!("{from}.smooth"));
        }
        let Some(step) = model.tensors.remove(&format!("{from}.step")) else {
            continue;
        };
        if step.count() != count {
            return refuse("one step per output channel", format!("{} steps of {from}", step.count()));
        }
        let values = step.to_vec::<f32>()?;
        let carried: Vec<f32> = match part {
            "in" => order.iter().map(|&j| values[j]).collect(),
            _ => values.repeat(experts),
        };
        let carried = Tensor::from_slice(model.device(), &[carried.len()], &carried)?;
        model.tensors.insert(format!("{to}.step"), carried);
    }
    Ok(())
}

/// Largest relative difference between the converted model with every expert run and the dense one.
pub fn difference_with_all_experts(dense: &Model, converted: &Model, batch: &Batch) -> Result<f64> {
    let mut config = converted.config.clone();
    for block in &mut config.blocks {
        block.experts = block.experts.map(|e| Experts { selected: e.count, threshold: None, ..e });
    }
    let all = Model::new(config, converted.tensors.clone(), converted.device())?;
    let want = Pass::inference(dense).hidden(batch)?.tensor.to_f64()?;
    let have = Pass::inference(&all).hidden(batch)?.tensor.to_f64()?;
    let scale = want.iter().fold(0.0f64, |m, x| m.max(x.abs())).max(1e-30);
    Ok(want.iter().zip(&have).fold(0.0f64, |m, (w, h)| m.max((w - h).abs())) / scale)
}

/// Names of a block's expert groups, for hooks and reports.
pub fn groups(config: &Config) -> Vec<String> {
    let blocks = config.blocks.iter().enumerate().filter(|(_, b)| b.experts.is_some());
    blocks.flat_map(|(i, _)| [format!("blocks.{i}.ffn.experts.in"), format!("blocks.{i}.ffn.experts.out")]).collect()
}
