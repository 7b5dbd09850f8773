//! GPTQ (Frantar et al. 2023): weights are rounded column by column, and what a column's rounding breaks the columns after
//! it make good, by the curvature of the layer's squared error over calibration inputs.

use std::collections::BTreeMap;

use super::STEP;
use super::format::{Format, Levels};
use crate::compress::curvature::inverse_factor;
use crate::compress::inputs::{self, Seen};
use crate::compress::pruning::held::keep_alive;
use crate::compress::written;
use crate::dispatch;
use crate::error::{Error, Result};
use crate::nn::{Batch, Config, Model};
use crate::ops::matmul::Matmul;
use crate::ops::quant::Grid;
use crate::tensor::Tensor;
use crate::train::trainer::go_on;

/// Share of the curvature's mean diagonal that is added to all of it.
pub const DAMPING: f64 = 0.01;

/// Rounds one row of weights in order, spreading each column's error over the later ones, and gives the steps of its groups.
/// Weights that are 0 stay 0, whatever reaches them. `u` is the factor of [`inverse_factor`].
pub fn round_row(row: &mut [f64], u: &[f64], format: &Format) -> Vec<f32> {
    let k = row.len();
    let length = if format.group == 0 { k } else { format.group };
    let pruned: Vec<bool> = row.iter().map(|w| *w == 0.0).collect();
    let mut steps = Vec::with_capacity(k / length.max(1));
    let mut grid = Grid::of_step(format.scheme(), format.weight_bits(), 1.0);
    for j in 0..k {
        if j.is_multiple_of(length) {
            // Of the group as the columns before it have left it.
            let group = (j..j + length).filter(|&i| !pruned[i]);
            let largest = group.map(|i| row[i].abs()).fold(0.0, f64::max);
            grid = Grid::symmetric(format.scheme(), format.weight_bits(), largest);
            steps.push(grid.scale);
        }
        let rounded = if pruned[j] { 0.0 } else { f64::from(grid.value(row[j])) };
        let error = (row[j] - rounded) / u[j * k + j];
        row[j] = rounded;
        row[j + 1..].iter_mut().zip(&u[j * k + j + 1..(j + 1) * k]).for_each(|(w, u)| *w -= error * u);
    }
    steps
}

/// Rounds `weight [n, k]` to its format by the Gram matrix `[k, k]` of its inputs; gives weights on their grid, and steps.
pub fn round(weight: &[f64], gram: &[f64], k: usize, format: &Format, damping: f64) -> Result<(Vec<f64>, Vec<f32>)> {
    let u = inverse_factor("gptq", gram, k, damping)?;
    let (mut rounded, mut steps) = (weight.to_vec(), Vec::new());
    for row in rounded.chunks_mut(k) {
        // Inputs that never came decide nothing, and their weights are taken out.
        (0..k).filter(|j| gram[j * k + j] == 0.0).for_each(|j| row[j] = 0.0);
        steps.extend(round_row(row, &u, format));
    }
    Ok((rounded, steps))
}

/// Sum over calibration tokens of x x^T, of every linear that `visit` of `inputs` shows.
#[derive(Default)]
pub struct Grams(BTreeMap<String, Vec<f64>>);

impl Grams {
    pub fn add(&mut self, seen: &Seen) -> Result<()> {
        let gram = dispatch::run_one(&Matmul::plain(true, false), &[seen.rows, seen.rows])?.to_f64()?;
        match self.0.get_mut(seen.linear) {
            Some(sum) => sum.iter_mut().zip(gram).for_each(|(sum, g)| *sum += g),
            None => {
                self.0.insert(seen.linear.to_string(), gram);
            }
        }
        Ok(())
    }

    pub fn of(&self, linear: &str) -> Result<&Vec<f64>> {
        self.0.get(linear).ok_or_else(|| Error::file("calibration", linear, "no token reached this linear"))
    }

    pub fn clear(&mut self) {
        self.0.clear();
    }
}

/// Rounds the linears of a model block by block: each block sees the inputs that the rounded ones before it give. Weights
/// are then on their grid, with the steps beside them.
///
/// # Errors
/// `Parameter` for levels that are not uniform or experts; what [`inverse_factor`] refuses.
pub fn quantize(model: &mut Model, linears: &[String], format: &Format, batches: &[Batch]) -> Result<()> {
    format.check_model(model, linears)?;
    if format.levels != Levels::Uniform {
        let value = written(&format.levels);
        return Err(Error::Parameter { op: "gptq", parameter: "levels", value, allowed: "uniform" });
    }
    let grams = std::cell::RefCell::new(Grams::default());
    let mut found: Vec<(String, Tensor)> = Vec::new();
    let here: &Model = model;
    inputs::walk(here, batches, &mut |seen| go_on().and_then(|()| grams.borrow_mut().add(seen)), &mut |block| {
        let mut grams = grams.borrow_mut();
        for linear in Config::linears(block).iter().filter(|l| linears.contains(l)) {
            let weight = here.get(&format!("{linear}.weight"))?;
            let (n, k) = (weight.shape().rows(), weight.shape().last());
            let dense = weight.to_f64()?;
            let (mut rounded, steps) = round(&dense, grams.of(linear)?, k, format, DAMPING)?;
            // Later stages read the mask off the zeros: as many as there were.
            keep_alive(dense.iter().map(|w| *w != 0.0), &mut rounded);
            weight.assign(&Tensor::from_f64(here.device(), &[n, k], weight.dtype(), &rounded)?)?;
            found.push((format!("{linear}.{STEP}"), Tensor::from_slice(here.device(), &[steps.len()], &steps)?));
        }
        grams.clear();
        Ok(())
    })?;
    model.tensors.extend(found);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    /// X^T X of `rows` correlated inputs.
    fn gram(k: usize, rows: usize, seed: u64) -> (Vec<f64>, Vec<f64>) {
        let mut stream = Stream::new(seed, 0);
        let mut x = vec![0.0; rows * k];
        for row in x.chunks_mut(k) {
            let shared = stream.normal();
            row.iter_mut().enumerate().for_each(|(j, v)| *v = stream.normal() + shared * (1.0 + j as f64 / k as f64));
        }
        let mut h = vec![0.0; k * k];
        for row in x.chunks(k) {
            for i in 0..k {
                (0..k).for_each(|j| h[i * k + j] += row[i] * row[j]);
            }
        }
        (x, h)
    }

    #[test]
    fn the_factor_squares_to_the_inverse() {
        let k = 17;
        let (_, h) = gram(k, 40, 1);
        let u = inverse_factor("gptq", &h, k, 0.0).unwrap();
        // U H^.. : (U^T U) H = I.
        for i in 0..k {
            for j in 0..k {
                let inverse = |a: usize, b: usize| (0..k).map(|m| u[m * k + a] * u[m * k + b]).sum::<f64>();
                let product: f64 = (0..k).map(|m| inverse(i, m) * h[m * k + j]).sum();
                assert!((product - f64::from(u8::from(i == j))).abs() < 1e-9, "{i} {j} {product}");
            }
            assert!(u[i * k..i * k + i].iter().all(|v| *v == 0.0), "upper");
        }
    }

    /// Eq 2 and 3 of the paper, one column at a time with the inverse recomputed for the columns left: the definition that
    /// the factor is a shortcut for.
    #[test]
    fn a_row_follows_the_definition() {
        let k = 6;
        let (_, h) = gram(k, 30, 2);
        let format = Format { bits: 3, ..Format::default() };
        let mut stream = Stream::new(5, 0);
        let row: Vec<f64> = (0..k).map(|_| stream.normal()).collect();
        let mut fast = row.clone();
        let steps = round_row(&mut fast, &inverse_factor("gptq", &h, k, 0.0).unwrap(), &format);
        let largest = row.iter().fold(0.0f64, |m, w| m.max(w.abs()));
        let grid = Grid::symmetric(format.scheme(), 3, largest);
        assert_eq!(steps, [grid.scale]);
        let mut slow = row;
        for j in 0..k {
            let left = k - j;
            let rest: Vec<f64> = (0..left * left).map(|i| h[(j + i / left) * k + j + i % left]).collect();
            let u = inverse_factor("gptq", &rest, left, 0.0).unwrap();
            let inverse = |b: usize| (0..left).map(|m| u[m * left] * u[m * left + b]).sum::<f64>();
            let error = (slow[j] - f64::from(grid.value(slow[j]))) / inverse(0);
            for b in 0..left {
                slow[j + b] -= error * inverse(b);
            }
        }
        fast.iter().zip(&slow).for_each(|(a, b)| assert!((a - b).abs() < 1e-6, "{fast:?} {slow:?}"));
    }

    /// sum of squares of X (w - w').
    fn error(x: &[f64], w: &[f64], rounded: &[f64]) -> f64 {
        let k = w.len();
        x.chunks(k).map(|x| x.iter().zip(w).zip(rounded).map(|((x, w), r)| x * (w - r)).sum::<f64>().powi(2)).sum()
    }

    #[test]
    fn rounding_with_feedback_beats_nearest_and_keeps_zeros_and_the_grid() {
        let k = 64;
        for (seed, group) in [(1, 0), (2, 16), (3, 32), (4, 0)] {
            let (x, h) = gram(k, 200, seed);
            let mut stream = Stream::new(seed, 7);
            let row: Vec<f64> = (0..k).map(|j| if j % 5 == 2 { 0.0 } else { stream.normal() }).collect();
            let format = Format { bits: 3, group, activations: super::super::Activations::Float, ..Format::default() };
            let (rounded, steps) = round(&row, &h, k, &format, DAMPING).unwrap();
            let length = if group == 0 { k } else { group };
            let nearest: Vec<f64> = row
                .chunks(length)
                .flat_map(|g| {
                    let grid = Grid::symmetric(format.scheme(), 3, g.iter().fold(0.0f64, |m, w| m.max(w.abs())));
                    g.iter().map(|w| f64::from(grid.value(*w))).collect::<Vec<_>>()
                })
                .collect();
            assert!(error(&x, &row, &rounded) < 0.7 * error(&x, &row, &nearest), "seed {seed}");
            for (j, (w, r)) in row.iter().zip(&rounded).enumerate() {
                assert!(*w != 0.0 || *r == 0.0, "pruned weight {j} revived");
                let grid = Grid::of_step(format.scheme(), 3, f64::from(steps[j / length]));
                assert_eq!(f64::from(grid.value(*r)), *r, "off the grid");
            }
        }
    }

    /// With inputs that have nothing to do with each other there is nothing to make good: rounding to nearest.
    #[test]
    fn diagonal_curvature_rounds_to_nearest() {
        let k = 8;
        let h: Vec<f64> = (0..k * k).map(|i| if i / k == i % k { 1.0 + (i % 3) as f64 } else { 0.0 }).collect();
        let row: Vec<f64> = (0..k).map(|j| 0.37 * j as f64 - 1.0).collect();
        let format = Format { bits: 4, ..Format::default() };
        let (rounded, steps) = round(&row, &h, k, &format, DAMPING).unwrap();
        let grid = Grid::of_step(format.scheme(), 4, f64::from(steps[0]));
        row.iter().zip(&rounded).for_each(|(w, r)| assert_eq!(f64::from(grid.value(*w)), *r));
    }

    #[test]
    fn degenerate_curvature_is_refused_or_defined() {
        let format = Format { bits: 4, ..Format::default() };
        let (rounded, steps) = round(&[1.0, 2.0], &[0.0; 4], 2, &format, DAMPING).unwrap();
        assert_eq!((rounded, steps), (vec![0.0, 0.0], vec![1.0]));
        for bad in [[1.0, 2.0, 2.0, 1.0], [f64::NAN, 0.0, 0.0, 1.0], [-1.0, 0.0, 0.0, 1.0]] {
            assert_eq!(inverse_factor("gptq", &bad, 2, 0.0).unwrap_err().code(), "E-PARAMETER");
        }
    }
}
