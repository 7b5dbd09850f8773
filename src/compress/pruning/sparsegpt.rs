//! SparseGPT (Frantar and Alistarh 2023): each linear is pruned column by column, and what a column loses is made up for by
//! the columns to its right, by the inverse of the inputs' second moments. Rounding to a grid can be done in the same pass.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::calibration::{Statistic, walk};
use super::held::keep_alive;
use super::pattern::{Pattern, matrix_dims};
use super::pruner::{Criterion, Work};
use super::selection::{Scope, pruned};
use crate::compress::curvature::inverse_factor;
use crate::compress::written;
use crate::error::{Error, Result};
use crate::ops::quant::{Grid, Scheme};
use crate::tensor::Tensor;
use crate::train::lifecycle::Micro;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Share of the mean of H's diagonal that is added to it.
    pub damping: f64,
    /// Columns that are treated together; where the pattern is unstructured, weights are compared within them.
    pub block: usize,
    /// Bits of the symmetric grid, one scale per row, that kept weights are rounded to.
    pub bits: Option<u32>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { damping: 0.01, block: 128, bits: None }
    }
}

pub struct SparseGpt {
    pub settings: Settings,
    pub micros: Vec<Micro>,
    /// With `Settings::bits`, the grid's step of each row of each weight.
    scales: BTreeMap<String, Vec<f64>>,
}

impl SparseGpt {
    pub fn new(settings: Settings, micros: Vec<Micro>) -> Self {
        Self { settings, micros, scales: BTreeMap::new() }
    }
}

/// What is pruned of a matrix `[n, k]`.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    pub pattern: Pattern,
    pub scope: Scope,
    pub sparsity: f64,
}

/// A pruned matrix: weights, which of them are kept, and the grid's step of each row.
pub struct Pruned {
    pub weights: Vec<f64>,
    pub kept: Vec<bool>,
    pub scales: Vec<f64>,
}

/// Prunes w `[n, k]`, of which `before` is kept so far, for inputs whose X^T X `[k, k]` is `gram`; a factor before it
/// changes nothing.
///
/// # Errors
/// `Error::Parameter` for settings out of range and where the damped H is not positive definite.
pub fn prune(
    [n, k]: [usize; 2],
    weights: &[f64],
    before: &[bool],
    gram: &[f64],
    target: Target,
    settings: &Settings,
) -> Result<Pruned> {
    let refuse =
        |parameter, value: String, allowed| Err(Error::Parameter { op: "SparseGPT", parameter, value, allowed });
    if settings.block == 0 || !settings.block.is_multiple_of(4) {
        return refuse("block", settings.block.to_string(), "a multiple of 4 columns");
    }
    if let Some(bits) = settings.bits.filter(|bits| !(2..=8).contains(bits)) {
        return refuse("bits", bits.to_string(), "2 to 8");
    }
    let upper = inverse_factor("SparseGPT", gram, k, settings.damping)?;
    let dead = |j: usize| gram[j * k + j] == 0.0;
    let mut w = weights.to_vec();
    w.iter_mut().enumerate().filter(|(i, _)| dead(i % k)).for_each(|(_, w)| *w = 0.0);
    let largest = |row: &[f64]| row.iter().fold(0.0f64, |most, w| most.max(w.abs()));
    let grid_of =
        |bits: u32| w.chunks(k).map(|row| Grid::symmetric(Scheme::SymmetricNarrow, bits, largest(row))).collect();
    let grids: Vec<Grid> = settings.bits.map_or_else(Vec::new, grid_of);
    let mut kept = vec![true; n * k];
    for start in (0..k).step_by(settings.block) {
        let end = (start + settings.block).min(k);
        if target.pattern == Pattern::Unstructured {
            choose([n, k], (start, end), &w, before, &upper, target, &mut kept);
        }
        // Rows are independent once it is known which of their weights go.
        w.par_chunks_mut(k).zip(kept.par_chunks_mut(k)).enumerate().for_each(|(row, (w, kept))| {
            let grid = grids.get(row);
            let mut errors = vec![0.0; end - start];
            for j in start..end {
                if target.pattern == Pattern::TwoFour && j % 4 == 0 {
                    best_pair(&w[j..j + 4], &mut kept[j..j + 4], |i| upper[(j + i) * k + j + i]);
                }
                let to = if kept[j] { grid.map_or(w[j], |grid| f64::from(grid.value(w[j]))) } else { 0.0 };
                let error = (w[j] - to) / upper[j * k + j];
                w[j] = to;
                for l in j + 1..end {
                    w[l] -= error * upper[j * k + l];
                }
                errors[j - start] = error;
            }
            // The later blocks are brought up to date at once.
            for (j, error) in (start..end).zip(&errors).filter(|(_, error)| **error != 0.0) {
                for l in end..k {
                    w[l] -= error * upper[j * k + l];
                }
            }
        });
    }
    keep_alive(kept.iter().copied(), &mut w);
    let scales = grids.iter().map(|grid| f64::from(grid.scale)).collect();
    Ok(Pruned { weights: w, kept, scales })
}

/// The smallest w^2 / U_jj^2 of columns `start .. end` go; what went before goes first. Counts over blocks add up to the
/// declared one.
fn choose(
    [n, k]: [usize; 2],
    (start, end): (usize, usize),
    w: &[f64],
    before: &[bool],
    upper: &[f64],
    target: Target,
    kept: &mut [bool],
) {
    let rows = if target.scope == Scope::Row { 1 } else { n };
    let count = pruned(rows * end, target.sparsity) - pruned(rows * start, target.sparsity);
    let score = |i: usize| if before[i] { (w[i] / upper[i % k * k + i % k]).powi(2) } else { -1.0 };
    for first in (0..n).step_by(rows.max(1)) {
        let mut order: Vec<usize> = (first..first + rows).flat_map(|r| (start..end).map(move |c| r * k + c)).collect();
        // The lower index is kept on ties.
        order.sort_by(|&a, &b| score(a).total_cmp(&score(b)).then(b.cmp(&a)));
        order[..count].iter().for_each(|&i| kept[i] = false);
    }
}

/// Keeps the two largest w^2 / U_jj^2 of four, the lower index on ties.
fn best_pair(w: &[f64], kept: &mut [bool], diagonal: impl Fn(usize) -> f64) {
    let mut order = [0, 1, 2, 3];
    let score = |i: usize| (w[i] / diagonal(i)).powi(2);
    order.sort_by(|&a, &b| score(b).total_cmp(&score(a)));
    order[2..].iter().for_each(|&i| kept[i] = false);
}

impl Criterion for SparseGpt {
    fn name(&self) -> &'static str {
        "SparseGPT pruning"
    }

    fn steps(&self) -> BTreeMap<String, Vec<f64>> {
        self.scales.clone()
    }

    /// # Errors
    /// `Error::Parameter` for a pattern or scope that the method does not have.
    fn prune(&mut self, work: &Work) -> Result<Vec<Tensor>> {
        let refuse =
            |parameter, value: String, allowed| Error::Parameter { op: "SparseGPT", parameter, value, allowed };
        if !matches!(work.pattern, Pattern::Unstructured | Pattern::TwoFour) {
            return Err(refuse("pattern", written(&work.pattern), "unstructured or two_four"));
        }
        if work.scope == Scope::Global {
            return Err(refuse("scope", "global".into(), "row or layer: each linear is pruned by itself"));
        }
        let Self { settings, micros, scales } = self;
        let target = Target { pattern: work.pattern, scope: work.scope, sparsity: work.sparsity };
        let mut found: BTreeMap<usize, Tensor> = BTreeMap::new();
        walk(work.model, micros, Statistic::Gram, &mut |block| {
            for (index, name) in work.weights.iter().enumerate() {
                let Some(sums) = name.strip_suffix(".weight").and_then(|linear| block.get(linear)) else {
                    continue;
                };
                let (weight, matrix) = (work.model.get(name)?, work.matrix(name)?);
                if weight.dims().len() != 2 {
                    let value = format!("{name}, {:?}", weight.dims());
                    return Err(refuse("weight", value, "a matrix: prune before experts"));
                }
                let before: Vec<bool> = work.units[index].to_vec::<f32>()?.iter().map(|&kept| kept != 0.0).collect();
                let dims = matrix_dims(&matrix);
                let done = prune(dims, &matrix.to_f64()?, &before, &sums.inputs, target, settings)?;
                matrix.assign(&Tensor::from_f64(matrix.device(), &dims, matrix.dtype(), &done.weights)?)?;
                let units: Vec<f32> = done.kept.iter().map(|&kept| f32::from(u8::from(kept))).collect();
                found.insert(index, Tensor::from_slice(matrix.device(), &dims, &units)?);
                if settings.bits.is_some() {
                    scales.insert(name.clone(), done.scales);
                }
            }
            Ok(())
        })?;
        if let Some(index) = (0..work.weights.len()).find(|index| !found.contains_key(index)) {
            return Err(Error::file("calibration", &work.weights[index], "is the weight of no linear of a block"));
        }
        Ok(found.into_values().collect())
    }
}
