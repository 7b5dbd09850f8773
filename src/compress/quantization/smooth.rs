//! Factors between a linear's input and its weight: what makes inputs easier to round is taken over by the weights, and the
//! float function stays the same. SmoothQuant (Xiao et al. 2023) chooses the factors here; AWQ in `awq.rs`.

use std::collections::BTreeMap;

use super::SMOOTH;
use crate::compress::inputs;
use crate::error::Result;
use crate::nn::config::{Activation, NormKind, Residual};
use crate::nn::{Batch, Config, Model};
use crate::tensor::Tensor;

/// Linears that read the same input.
#[derive(Clone, Debug, PartialEq)]
pub struct Site {
    pub linears: Vec<String>,
    source: Source,
}

/// What gives a site its input, and so can take over the division.
#[derive(Clone, Debug, PartialEq)]
enum Source {
    /// Nothing can: the input is multiplied by a vector of its own.
    Input,
    /// A norm whose output nothing else reads.
    Norm(String),
    /// Rows of a linear, from this one on: what stands between is linear in them, or positively homogeneous.
    Rows(String, usize),
}

/// The sites of block i, those that others fold into last.
pub fn sites(config: &Config, i: usize) -> Vec<Site> {
    let [query, key, value, output, ffn_in, ffn_out] = Config::linears(i);
    let block = &config.blocks[i];
    // Where normalised states are added to what comes later, a norm has a second reader.
    let norm = |name: &str| match config.residual {
        Residual::Sum => Source::Norm(format!("blocks.{i}.{name}")),
        _ => Source::Input,
    };
    let attention = [
        Site { linears: vec![output], source: Source::Rows(value.clone(), 0) },
        Site { linears: vec![query, key, value], source: norm("norm_attention") },
    ];
    if block.experts.is_some() {
        return attention.into();
    }
    let inner = match block.activation {
        Activation::Relu => Source::Rows(ffn_in.clone(), 0),
        // The second half is multiplied by the gate.
        Activation::Geglu => Source::Rows(ffn_in.clone(), block.ffn_width),
        Activation::Gelu => Source::Input,
    };
    let ffn =
        [Site { linears: vec![ffn_out], source: inner }, Site { linears: vec![ffn_in], source: norm("norm_ffn") }];
    attention.into_iter().chain(ffn).collect()
}

/// s_j = max |x_j|^alpha / max |w_j|^(1 - alpha) (Eq 4 there); 1 where either is 0.
pub fn factors(inputs: &[f64], weights: &[f64], alpha: f64) -> Vec<f64> {
    let factor = |(x, w): (&f64, &f64)| {
        let s = x.powf(alpha) / w.powf(1.0 - alpha);
        if *x > 0.0 && *w > 0.0 && s.is_finite() && s > 0.0 { s } else { 1.0 }
    };
    inputs.iter().zip(weights).map(factor).collect()
}

/// Largest magnitude of each column over the weights of a site.
pub fn column_ranges(model: &Model, site: &Site) -> Result<Vec<f64>> {
    let mut largest: Vec<f64> = Vec::new();
    for linear in &site.linears {
        let weight = model.get(&format!("{linear}.weight"))?;
        let k = weight.shape().last();
        largest.resize(k, 0.0);
        for row in weight.to_f64()?.chunks(k) {
            largest.iter_mut().zip(row).for_each(|(m, w)| *m = m.max(w.abs()));
        }
    }
    Ok(largest)
}

/// Multiplies the columns of a site's weights by `factors` and divides its input by them, where it comes from if that can
/// take it over, else by a `.smooth` vector. Zeros stay zeros.
pub fn apply(model: &mut Model, site: &Site, factors: &[f64]) -> Result<()> {
    for linear in &site.linears {
        scale(model, &format!("{linear}.weight"), |i| factors[i % factors.len()])?;
    }
    let inverse = |i: usize| 1.0 / factors[i];
    match &site.source {
        Source::Norm(norm) => {
            scale(model, &format!("{norm}.weight"), inverse)?;
            if model.config.norm == NormKind::Layer {
                scale(model, &format!("{norm}.bias"), inverse)?;
            }
            Ok(())
        }
        Source::Rows(linear, first) => {
            let k = model.get(&format!("{linear}.weight"))?.shape().last();
            let of_row = |row: usize| row.checked_sub(*first).and_then(|r| factors.get(r)).map_or(1.0, |s| 1.0 / s);
            scale(model, &format!("{linear}.weight"), |i| of_row(i / k))?;
            scale(model, &format!("{linear}.bias"), of_row)
        }
        Source::Input => {
            for linear in &site.linears {
                let name = format!("{linear}.{SMOOTH}");
                let before = model.tensors.get(&name).map(Tensor::to_f64).transpose()?;
                let value = |i: usize| before.as_ref().map_or(1.0, |b| b[i]) * inverse(i);
                let values: Vec<f64> = (0..factors.len()).map(value).collect();
                let dtype = model.get(&format!("{linear}.weight"))?.dtype();
                let values = Tensor::from_f64(model.device(), &[factors.len()], dtype, &values)?;
                model.tensors.insert(name, values);
            }
            Ok(())
        }
    }
}

/// Multiplies element i of a tensor by `factor(i)`.
fn scale(model: &mut Model, name: &str, factor: impl Fn(usize) -> f64) -> Result<()> {
    let tensor = model.get(name)?;
    let values: Vec<f64> = tensor.to_f64()?.iter().enumerate().map(|(i, v)| v * factor(i)).collect();
    let scaled = Tensor::from_f64(model.device(), tensor.dims(), tensor.dtype(), &values)?;
    model.tensors.insert(name.to_string(), scaled);
    Ok(())
}

/// SmoothQuant of every block: `alpha` says how much of the inputs' range the weights take over (0.5 in the paper).
///
/// # Errors
/// What the passes give; `Parameter` without calibration batches or with an alpha outside 0 ..= 1.
pub fn smooth(model: &mut Model, batches: &[Batch], alpha: f64) -> Result<()> {
    if !(0.0..=1.0).contains(&alpha) {
        let (parameter, value) = ("alpha", alpha.to_string());
        return Err(crate::error::Error::Parameter { op: "smooth", parameter, value, allowed: "0 to 1" });
    }
    let mut largest: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    inputs::pass(model, batches, &mut |seen| {
        let k = seen.rows.shape().last();
        let largest = largest.entry(seen.linear.to_string()).or_insert_with(|| vec![0.0; k]);
        for row in seen.rows.to_f64()?.chunks(k) {
            largest.iter_mut().zip(row).for_each(|(m, x)| *m = m.max(x.abs()));
        }
        Ok(())
    })?;
    for i in 0..model.config.blocks.len() {
        for site in sites(&model.config, i) {
            if let Some(inputs) = largest.get(&site.linears[0]) {
                let factors = factors(inputs, &column_ranges(model, &site)?, alpha);
                apply(model, &site, &factors)?;
            }
        }
    }
    Ok(())
}
