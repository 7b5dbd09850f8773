//! Optimal brain surgeon with the empirical Fisher matrix in blocks (Hassibi and Stork 1993; WoodFisher, Singh and Alistarh
//! 2020; oBERT, Kurtic et al. 2022): F = damping I + 1/m sum g g^T per block of neighbouring weights.

use faer::linalg::solvers::Solve;
use faer::{Mat, Side};

use super::pattern::{Pattern, matrix_dims};
use super::pruner::{Criterion, Work};
use crate::cpu::PAIRS;
use crate::device::Info;
use crate::dispatch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{Model, Pass};
use crate::ops::fisher::{MAX_BLOCK, RankOneInverse};
use crate::ops::layout::Pad;
use crate::tensor::Tensor;
use crate::train::lifecycle::Micro;
use crate::train::trainer::weighted_cross_entropy;

/// How the weights that stay make up for those that go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Update {
    /// The sum of the updates of single weights: what oBERT's code does.
    #[default]
    Single,
    /// The exact update of all pruned weights of a block together: dw = -F^-1 E_Q ([F^-1]_QQ)^-1 w_Q.
    Group,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Weights per block, at most 128.
    pub block: usize,
    pub damping: f64,
    pub update: Update,
    /// Parts of one pruning step, each with a Fisher matrix of its own.
    pub recomputations: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self { block: 64, damping: 1e-7, update: Update::Single, recomputations: 1 }
    }
}

/// Saliency w_i^2 / (2 [F^-1]_ii), of groups 1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q. One micro-batch gives one gradient.
pub struct SecondOrder {
    pub settings: Settings,
    pub micros: Vec<Micro>,
}

/// The inverse Fisher matrix of one weight's blocks, on the host.
pub struct Inverse {
    block: usize,
    /// `[blocks, B, B]`; the last block is padded with weights that have no gradient.
    values: Vec<f64>,
}

impl Inverse {
    /// # Errors
    /// `Error::Parameter` where a diagonal entry is not above 0: f32 updates of large gradients have lost it.
    pub fn new(block: usize, values: Vec<f64>) -> Result<Self> {
        let inverse = Self { block, values };
        let lost = |i: &usize| inverse.diagonal(*i).is_nan() || inverse.diagonal(*i) <= 0.0;
        if let Some(index) = (0..inverse.values.len() / block.max(1)).find(lost) {
            let value = format!("too small: weight {index} has {} on the inverse's diagonal", inverse.diagonal(index));
            return Err(Error::Parameter { op: "OBS", parameter: "damping", value, allowed: "larger, such as 1e-5" });
        }
        Ok(inverse)
    }

    /// `[blocks, B, B]`.
    pub fn values(&self) -> &[f64] {
        &self.values
    }

    /// The matrix of the block that holds weight `index`.
    fn block_of(&self, index: usize) -> &[f64] {
        let size = self.block * self.block;
        &self.values[index / self.block * size..][..size]
    }

    pub fn diagonal(&self, index: usize) -> f64 {
        let at = index % self.block;
        self.block_of(index)[at * self.block + at]
    }

    /// ([F^-1]_QQ)^-1 w_Q for weights Q of one block.
    ///
    /// # Errors
    /// `Error::Parameter` where rounding made the block indefinite.
    fn solve(&self, q: &[usize], w: &[f64]) -> Result<Vec<f64>> {
        let (f, b) = (self.block_of(q[0]), self.block);
        let part = Mat::from_fn(q.len(), q.len(), |i, j| f[q[i] % b * b + q[j] % b]);
        let factor = part.llt(Side::Lower).map_err(|_| {
            let value = format!("too small: the block of weight {} has no inverse", q[0]);
            Error::Parameter { op: "OBS", parameter: "damping", value, allowed: "larger, such as 1e-5" }
        })?;
        let solution = factor.solve(Mat::from_fn(q.len(), 1, |i, _| w[i]));
        Ok((0..q.len()).map(|i| solution[(i, 0)]).collect())
    }

    /// 1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q; `q` are indices into `weights`, all of one block.
    pub fn saliency(&self, q: &[usize], weights: &[f64]) -> Result<f64> {
        if let [i] = *q {
            return Ok(weights[i] * weights[i] / (2.0 * self.diagonal(i)));
        }
        let w: Vec<f64> = q.iter().map(|&i| weights[i]).collect();
        Ok(0.5 * self.solve(q, &w)?.iter().zip(&w).map(|(x, w)| x * w).sum::<f64>())
    }

    /// Moves the weights so that those where `kept` is false are 0 at the least cost.
    pub fn compensate(&self, weights: &mut [f64], kept: &[bool], update: Update) -> Result<()> {
        let b = self.block;
        for start in (0..weights.len()).step_by(b) {
            let end = (start + b).min(weights.len());
            let gone: Vec<usize> = (start..end).filter(|&i| !kept[i]).collect();
            if gone.iter().all(|&i| weights[i] == 0.0) {
                continue;
            }
            let factors = match update {
                Update::Single => gone.iter().map(|&i| weights[i] / self.diagonal(i)).collect(),
                Update::Group => self.solve(&gone, &gone.iter().map(|&i| weights[i]).collect::<Vec<_>>())?,
            };
            let f = self.block_of(start);
            for (&i, factor) in gone.iter().zip(factors) {
                let row = &f[i % b * b..][..b];
                weights[start..end].iter_mut().zip(row).for_each(|(w, f)| *w -= factor * f);
            }
            gone.iter().for_each(|&i| weights[i] = 0.0);
        }
        Ok(())
    }
}

/// Bytes of the inverse Fisher matrix of `count` weights in blocks of `block` on its device.
pub fn device_bytes(count: usize, block: usize) -> u64 {
    4 * (count.div_ceil(block.max(1)) * block * block) as u64
}

/// That one buffer of a device holds the matrix of each of these weights, which are named with their elements.
///
/// # Errors
/// `Error::Recipe` with the bytes and the largest block that fits.
pub fn check_memory(device: &Info, weights: &[(String, usize)], block: usize) -> Result<()> {
    let most = device.limits.binding_bytes.min(device.limits.buffer_bytes);
    let Some((name, count)) = weights.iter().max_by_key(|(_, count)| *count) else { return Ok(()) };
    let bytes = device_bytes(*count, block);
    if bytes <= most {
        return Ok(());
    }
    let fits = |b: &usize| weights.iter().all(|(_, count)| device_bytes(*count, *b) <= most);
    let largest = (1..block).rev().find(fits).map_or("another device".into(), |b| format!("at most {b}"));
    Err(Error::Recipe {
        key: "sparsify.obs.block".into(),
        value: format!("{block}, for which the inverse Fisher matrix of {name} takes {bytes} bytes,"),
        allowed: format!("{largest}: a buffer of {} has {most} bytes", device.id),
    })
}

/// Inverse Fisher matrices of `weights`, updated on the device gradient by gradient.
///
/// # Errors
/// `Error::Recipe` without micro-batches and for matrices that the device cannot hold; `Error::Parameter` for a block or
/// damping out of range.
pub fn inverses(model: &Model, weights: &[String], micros: &[Micro], settings: &Settings) -> Result<Vec<Inverse>> {
    check(settings)?;
    if micros.is_empty() {
        let (key, value) = ("calibration_batches".into(), "0".into());
        return Err(Error::Recipe { key, value, allowed: "at least 1: one batch gives one gradient".into() });
    }
    let b = settings.block;
    let identity = |blocks: usize| {
        let one = |i: usize| if i / b == i % b { (1.0 / settings.damping) as f32 } else { 0.0 };
        let values: Vec<f32> = (0..blocks).flat_map(|_| (0..b * b).map(one)).collect();
        Tensor::from_slice(model.device(), &[blocks, b, b], &values)
    };
    let counts = weights.iter().map(|name| Ok(model.get(name)?.count())).collect::<Result<Vec<_>>>()?;
    let named: Vec<(String, usize)> = weights.iter().cloned().zip(counts.iter().copied()).collect();
    check_memory(model.device().info(), &named, b)?;
    let all = counts.iter().map(|count| identity(count.div_ceil(b))).collect::<Result<Vec<_>>>()?;
    for micro in micros {
        let mut pass = Pass::training(model);
        let hidden = pass.hidden(&micro.batch)?;
        let loss = weighted_cross_entropy(&mut pass, &hidden, &micro.targets, &micro.weights)?;
        let seed = Tensor::from_f64(model.device(), loss.dims(), DType::F32, &[1.0 / micro.weight.max(1.0)])?;
        let (tape, leaves) = pass.into_leaves();
        let grads = tape.backward(&[(&loss, &seed)])?;
        for ((name, &count), inverse) in weights.iter().zip(&counts).zip(&all) {
            let Some(gradient) = leaves.get(name).and_then(|leaf| grads.of(leaf)).transpose()? else {
                continue;
            };
            let mut flat = gradient.reshape(&[count])?;
            let after = count.div_ceil(b) * b - count;
            if after > 0 {
                flat = dispatch::run_one(&Pad { axis: 0, before: 0, after }, &[&flat])?;
            }
            let op = RankOneInverse { count: micros.len() as f32 };
            dispatch::run(&op, &[inverse, &flat.reshape(&[count.div_ceil(b), b])?])?;
        }
    }
    all.iter().map(|inverse| Inverse::new(b, inverse.to_f64()?)).collect()
}

fn check(settings: &Settings) -> Result<()> {
    let refuse = |parameter, value: String, allowed| Err(Error::Parameter { op: "OBS", parameter, value, allowed });
    if !(1..=MAX_BLOCK).contains(&settings.block) {
        return refuse("block", settings.block.to_string(), "1 to 128");
    }
    if !(settings.damping.is_finite() && settings.damping > 0.0) {
        return refuse("damping", settings.damping.to_string(), "a finite number above 0");
    }
    if settings.recomputations == 0 {
        return refuse("recomputations", "0".into(), "at least 1");
    }
    Ok(())
}

impl SecondOrder {
    /// Scores of a weight's units; with 2:4, scores of weights that rank the best pair of each four first.
    fn scores(&self, work: &Work, matrix: &Tensor, inverse: &Inverse) -> Result<Tensor> {
        let (w, dims) = (matrix.to_f64()?, matrix_dims(matrix));
        let [rows, columns] = if work.pattern == Pattern::TwoFour { [1, 4] } else { work.pattern.unit(dims) };
        // A group can be judged as one where it lies within one block.
        let whole =
            rows == 1 && columns > 1 && inverse.block.is_multiple_of(columns) && dims[1].is_multiple_of(columns);
        let grouped = |scores: Vec<f64>, dims: [usize; 2]| {
            let scores: Vec<f32> = scores.into_iter().map(|s| s as f32).collect();
            Tensor::from_slice(matrix.device(), &dims, &scores)
        };
        if whole && work.pattern == Pattern::TwoFour {
            let mut scores = Vec::with_capacity(w.len());
            for start in (0..w.len()).step_by(4) {
                scores.extend(pair_scores(inverse, &w, start)?);
            }
            return grouped(scores, dims);
        }
        if whole {
            let unit = |start| inverse.saliency(&(start..start + columns).collect::<Vec<_>>(), &w);
            let scores = (0..w.len()).step_by(columns).map(unit).collect::<Result<Vec<_>>>()?;
            return grouped(scores, work.pattern.grid(dims)?);
        }
        let single = (0..w.len()).map(|i| inverse.saliency(&[i], &w)).collect::<Result<Vec<_>>>()?;
        let single = grouped(single, dims)?;
        if work.pattern.is_24() { Ok(single) } else { work.pool(&single) }
    }
}

/// 1 for the pair of a group of four that is best kept, else 0: the cost is the saliency of the other pair, and on ties
/// the lexicographically first pair stays.
fn pair_scores(inverse: &Inverse, w: &[f64], start: usize) -> Result<[f64; 4]> {
    let mut best: Option<([usize; 2], f64)> = None;
    for kept in PAIRS {
        let gone: Vec<usize> = (0..4).filter(|i| !kept.contains(i)).map(|i| start + i).collect();
        let cost = inverse.saliency(&gone, w)?;
        if best.is_none_or(|(_, least)| cost < least) {
            best = Some((kept, cost));
        }
    }
    let kept = best.map_or(PAIRS[0], |(kept, _)| kept);
    Ok(std::array::from_fn(|i| f64::from(u8::from(kept.contains(&i)))))
}

impl Criterion for SecondOrder {
    fn name(&self) -> &'static str {
        "OBS pruning"
    }

    fn prune(&mut self, work: &Work) -> Result<Vec<Tensor>> {
        check(&self.settings)?;
        // Groups of four reach their sparsity at once.
        let rounds = if work.pattern.is_24() { 1 } else { self.settings.recomputations };
        let mut units = work.units.to_vec();
        for round in 1..=rounds {
            let share = round as f64 / rounds as f64;
            let sparsity =
                if round == rounds { work.sparsity } else { work.before + (work.sparsity - work.before) * share };
            let work = Work { sparsity, units: &units, ..*work };
            let inverses = inverses(work.model, work.weights, &self.micros, &self.settings)?;
            let pairs = || work.weights.iter().zip(&inverses);
            let score = |(name, inverse): (&String, &Inverse)| self.scores(&work, &work.matrix(name)?, inverse);
            let chosen = work.select(&pairs().map(score).collect::<Result<Vec<_>>>()?)?;
            for ((name, inverse), units) in pairs().zip(&chosen) {
                let matrix = work.matrix(name)?;
                let mask = work.pattern.expand(units, matrix_dims(&matrix))?.to_f64()?;
                let kept: Vec<bool> = mask.iter().map(|&m| m != 0.0).collect();
                let mut w = matrix.to_f64()?;
                inverse.compensate(&mut w, &kept, self.settings.update)?;
                let moved = Tensor::from_f64(matrix.device(), matrix.dims(), matrix.dtype(), &w)?;
                matrix.assign(&moved)?;
            }
            units = chosen;
        }
        Ok(units)
    }
}
