//! AWQ (Lin et al. 2024): weights whose inputs are large are scaled up before rounding, by as much as makes the layer's
//! output error least, and ranges are clipped where that helps too.

use std::collections::BTreeMap;

use super::STEP;
use super::format::Format;
use super::gptq::Grams;
use super::smooth::{Site, apply, sites};
use crate::compress::inputs;
use crate::dispatch;
use crate::error::Result;
use crate::nn::{Batch, Model};
use crate::ops::binary::{Binary, BinaryFunction};
use crate::ops::matmul::Matmul;
use crate::ops::quant::{Grid, GridFrom};
use crate::ops::reduce::{Axis, Reduce, ReduceFunction};
use crate::tensor::Tensor;

/// Exponents that are tried: 0, 1/20, ... 19/20.
const EXPONENTS: usize = 20;
/// Ranges that are tried: 1, 0.95, ... of a group's largest magnitude, down to half of it.
const SHRINKS: usize = 10;

/// s_j = mean |x_j|^alpha over the square root of its extremes' product (section 3.2 there and its code).
pub fn factors(means: &[f64], alpha: f64) -> Vec<f64> {
    let raw: Vec<f64> = means.iter().map(|m| m.powf(alpha).max(1e-4)).collect();
    let (low, high) = raw.iter().fold((f64::INFINITY, 0.0f64), |(l, h), s| (l.min(*s), h.max(*s)));
    raw.iter().map(|s| s / (low * high).sqrt()).collect()
}

/// sum over calibration tokens of ((W' - W) x)^2 = tr(D G D^T), with W' = Q(W s) / s.
fn error(weight: &Tensor, gram: &Tensor, factors: &[f64], format: &Format) -> Result<f64> {
    let row = |values: Vec<f64>| Tensor::from_f64(weight.device(), &[values.len()], weight.dtype(), &values);
    let binary = |function, a: &Tensor, b: &Tensor| dispatch::run_one(&Binary(function), &[a, b]);
    let scaled = binary(BinaryFunction::Mul, weight, &row(factors.to_vec())?)?;
    let rounded = dispatch::run_one(&format.simulate(GridFrom::Own), &[&scaled])?;
    let back = binary(BinaryFunction::Mul, &rounded, &row(factors.iter().map(|s| 1.0 / s).collect())?)?;
    let difference = binary(BinaryFunction::Sub, &back, weight)?;
    let spread = dispatch::run_one(&Matmul::default(), &[&difference, gram])?;
    let products = binary(BinaryFunction::Mul, &difference, &spread)?;
    let sum = Reduce { function: ReduceFunction::Sum, axis: Axis::All };
    Ok(dispatch::run_one(&sum, &[&products])?.to_f64()?.first().copied().unwrap_or(0.0))
}

/// The factors of a site with the least error, and that error. Exponent 0 is among them: never worse than plain rounding.
fn search(model: &Model, site: &Site, (means, gram): (&[f64], &Tensor), format: &Format) -> Result<(Vec<f64>, f64)> {
    let mut best = (vec![1.0; means.len()], f64::INFINITY);
    for exponent in 0..EXPONENTS {
        let factors = factors(means, exponent as f64 / EXPONENTS as f64);
        let mut sum = 0.0;
        for linear in &site.linears {
            sum += error(model.get(&format!("{linear}.weight"))?, gram, &factors, format)?;
        }
        if sum < best.1 {
            best = (factors, sum);
        }
    }
    Ok(best)
}

/// The step of each group whose clipped range has the least error on the group's own inputs. `gram` is `[k, k]`.
pub fn clipped_steps(weight: &[f64], gram: &[f64], k: usize, format: &Format) -> Vec<f32> {
    let length = if format.group == 0 { k } else { format.group };
    let mut steps = Vec::with_capacity(weight.len() / length.max(1));
    for (index, group) in weight.chunks(length).enumerate() {
        let first = index * length % k;
        let largest = group.iter().fold(0.0f64, |m, w| m.max(w.abs()));
        let mut best = (f64::INFINITY, 1.0);
        for shrink in 0..=SHRINKS {
            let range = largest * (1.0 - shrink as f64 / (2 * SHRINKS) as f64);
            let grid = Grid::symmetric(format.scheme(), format.weight_bits(), range);
            let d: Vec<f64> = group.iter().map(|w| f64::from(grid.value(*w)) - w).collect();
            let row = |i: usize| &gram[(first + i) * k + first..][..length];
            let error: f64 = (0..length).map(|i| d[i] * row(i).iter().zip(&d).map(|(g, d)| g * d).sum::<f64>()).sum();
            if error < best.0 {
                best = (error, grid.scale);
            }
        }
        steps.push(best.1);
    }
    steps
}

/// Scales and clips the linears of every block by what the float model shows them; weights are left unrounded, with the
/// steps that round them. Sites that are not wholly in `linears` are left alone.
///
/// # Errors
/// What the passes give; `Parameter` without calibration batches.
pub fn quantize(model: &mut Model, linears: &[String], format: &Format, batches: &[Batch]) -> Result<()> {
    format.check_model(model, linears)?;
    let mut means: BTreeMap<String, (Vec<f64>, usize)> = BTreeMap::new();
    let mut grams = Grams::default();
    inputs::pass(model, batches, &mut |seen| {
        let k = seen.rows.shape().last();
        let (sums, count) = means.entry(seen.linear.to_string()).or_insert_with(|| (vec![0.0; k], 0));
        for row in seen.rows.to_f64()?.chunks(k) {
            sums.iter_mut().zip(row).for_each(|(s, x)| *s += x.abs());
            *count += 1;
        }
        grams.add(seen)
    })?;
    for i in 0..model.config.blocks.len() {
        let mut scaled: Vec<(Site, Vec<f64>)> = Vec::new();
        for site in sites(&model.config, i) {
            let wanted = site.linears.iter().all(|l| linears.contains(l));
            let Some((sums, count)) = means.get(&site.linears[0]).filter(|_| wanted) else {
                continue;
            };
            let means: Vec<f64> = sums.iter().map(|s| s / *count as f64).collect();
            let (k, gram) = (means.len(), grams.of(&site.linears[0])?);
            let dtype = model.get(&format!("{}.weight", site.linears[0]))?.dtype();
            let on_device = Tensor::from_f64(model.device(), &[k, k], dtype, gram)?;
            let (factors, _) = search(model, &site, (&means, &on_device), format)?;
            apply(model, &site, &factors)?;
            // What the scaled weights are multiplied by: x / s.
            let gram = gram.iter().enumerate().map(|(at, g)| g / (factors[at / k] * factors[at % k])).collect();
            scaled.push((site, gram));
        }
        // Clipped last: rows of a weight may have taken over the factors of a later site.
        for (site, gram) in &scaled {
            for linear in &site.linears {
                let weight = model.get(&format!("{linear}.weight"))?;
                let steps = clipped_steps(&weight.to_f64()?, gram, weight.shape().last(), format);
                let steps = Tensor::from_slice(model.device(), &[steps.len()], &steps)?;
                model.tensors.insert(format!("{linear}.{STEP}"), steps);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    #[test]
    fn clipping_is_never_worse_than_the_whole_range() {
        let (k, group) = (32, 8);
        let mut stream = Stream::new(4, 0);
        for _ in 0..64 {
            let weight: Vec<f64> = (0..2 * k).map(|_| stream.normal().powi(3)).collect();
            let x: Vec<f64> = (0..50 * k).map(|_| stream.normal()).collect();
            let mut gram = vec![0.0; k * k];
            x.chunks(k).for_each(|x| (0..k * k).for_each(|at| gram[at] += x[at / k] * x[at % k]));
            let format = Format { bits: 3, group, activations: super::super::Activations::Float, ..Format::default() };
            let steps = clipped_steps(&weight, &gram, k, &format);
            assert_eq!(steps.len(), 2 * k / group);
            for (index, (w, step)) in weight.chunks(group).zip(&steps).enumerate() {
                let first = index * group % k;
                let error = |grid: Grid| -> f64 {
                    let d: Vec<f64> = w.iter().map(|w| f64::from(grid.value(*w)) - w).collect();
                    x.chunks(k).map(|x| d.iter().zip(&x[first..]).map(|(d, x)| d * x).sum::<f64>().powi(2)).sum()
                };
                let largest = w.iter().fold(0.0f64, |m, w| m.max(w.abs()));
                let whole = error(Grid::symmetric(format.scheme(), 3, largest));
                let clipped = error(Grid::of_step(format.scheme(), 3, f64::from(*step)));
                assert!(clipped <= whole * (1.0 + 1e-9), "{clipped} {whole}");
            }
        }
    }

    #[test]
    fn factors_are_balanced_and_zero_means_are_harmless() {
        let s = factors(&[4.0, 1.0, 0.25], 0.5);
        assert!(s.iter().zip([2.0, 1.0, 0.5]).all(|(a, b)| (a - b).abs() < 1e-12), "{s:?}");
        assert!(factors(&[0.0, 1.0], 0.5).iter().all(|s| *s > 0.0 && s.is_finite()));
        assert_eq!(factors(&[3.0, 0.5], 0.0), [1.0, 1.0]);
    }
}
