//! Calibrators: from what a linear sees on calibration data to the step of its input.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::INPUT_STEP;
use super::format::INPUT_BITS;
use crate::compress::inputs;
use crate::error::{Error, Result};
use crate::nn::{Batch, Model};
use crate::ops::quant::{Grid, Scheme};
use crate::tensor::Tensor;

/// How the largest magnitude that is still told apart is chosen. Larger ones are clipped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Calibrator {
    /// The largest magnitude of all.
    #[default]
    MinMax,
    /// Moving average, of constant 0.01, of each batch's largest magnitude.
    MovingAverage,
    /// The 99.99th percentile of magnitudes.
    Percentile,
    /// Smallest Kullback-Leibler divergence of the clipped histogram from its quantized form (TensorRT; Migacz 2017).
    Entropy,
    /// Smallest mean squared error over the histogram.
    Mse,
}

/// Averaging constant of `MovingAverage`.
pub const AVERAGING: f64 = 0.01;
const PERCENTILE: f64 = 0.9999;
/// Bins of a histogram of magnitudes.
const BINS: usize = 2048;
/// Fewest bins that a range may keep.
const FIRST: usize = 128;

/// Magnitudes in bins of equal width from 0; the range doubles, and neighbours join, when a larger magnitude comes.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    top: f64,
}

impl Histogram {
    pub fn new() -> Self {
        Self { counts: vec![0; BINS], top: 0.0 }
    }

    pub fn width(&self) -> f64 {
        self.top / BINS as f64
    }

    pub fn add(&mut self, magnitudes: impl Iterator<Item = f64> + Clone) {
        let largest = magnitudes.clone().fold(0.0, f64::max);
        if self.top == 0.0 {
            self.top = largest;
        }
        while self.top > 0.0 && largest > self.top {
            let joined: Vec<u64> = self.counts.chunks(2).map(|pair| pair.iter().sum()).collect();
            self.counts = joined.into_iter().chain(std::iter::repeat_n(0, BINS / 2)).collect();
            self.top *= 2.0;
        }
        let width = self.width();
        for x in magnitudes {
            let bin = if width > 0.0 { (x / width) as usize } else { 0 };
            self.counts[bin.min(BINS - 1)] += 1;
        }
    }

    /// End of the bin below which this share of the magnitudes lies.
    pub fn percentile(&self, share: f64) -> f64 {
        let total: u64 = self.counts.iter().sum();
        let mut below = 0;
        for (bin, count) in self.counts.iter().enumerate() {
            below += count;
            if below as f64 >= share * total as f64 {
                return (bin + 1) as f64 * self.width();
            }
        }
        self.top
    }

    /// Range with the least divergence between the clipped distribution and what `levels` levels keep of it. The last of
    /// equal ones, as the published code takes it; the first bin counts as the second, because zeros are exact anyway.
    pub fn entropy(&self, levels: usize) -> f64 {
        let mut bins: Vec<f64> = self.counts.iter().map(|&c| c as f64).collect();
        bins[0] = bins[1];
        let mut best = (f64::INFINITY, BINS);
        for kept in FIRST.max(levels)..=BINS {
            let divergence = divergence(&bins, kept, levels);
            if divergence <= best.0 {
                best = (divergence, kept);
            }
        }
        best.1 as f64 * self.width()
    }

    /// Range with the least squared error of bin centres through the rounding of `bits`.
    pub fn mse(&self, bits: u32) -> f64 {
        let mut best = (f64::INFINITY, self.top);
        for kept in (FIRST..=BINS).step_by(8) {
            let range = kept as f64 * self.width();
            let grid = Grid::symmetric(Scheme::SymmetricNarrow, bits, range);
            let mut error = 0.0;
            for (bin, &count) in self.counts.iter().enumerate().filter(|(_, count)| **count > 0) {
                let centre = (bin as f64 + 0.5) * self.width();
                error += count as f64 * (f64::from(grid.value(centre)) - centre).powi(2);
            }
            if error < best.0 {
                best = (error, range);
            }
        }
        best.1
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self::new()
    }
}

/// KL(P || Q): P are the first `kept` bins with all that lies above in the last one, Q what is left of them in `levels`
/// levels, spread evenly over the bins that are not empty.
fn divergence(bins: &[f64], kept: usize, levels: usize) -> f64 {
    let above: f64 = bins[kept..].iter().sum();
    let p = |i: usize| bins[i] + if i + 1 == kept { above } else { 0.0 };
    let level_of = |i: usize| (i * levels / kept).min(levels - 1);
    let mut sums = vec![(0.0, 0usize); levels];
    for (i, &count) in bins[..kept].iter().enumerate().filter(|(_, count)| **count > 0.0) {
        let (sum, filled) = &mut sums[level_of(i)];
        (*sum, *filled) = (*sum + count, *filled + 1);
    }
    let q = |i: usize| if bins[i] > 0.0 { sums[level_of(i)].0 / sums[level_of(i)].1 as f64 } else { 0.0 };
    let (total_p, total_q) = ((0..kept).map(p).sum::<f64>(), (0..kept).map(q).sum::<f64>());
    let term = |i: usize| match (p(i) / total_p, q(i) / total_q) {
        (0.0, _) => 0.0,
        (_, 0.0) => f64::INFINITY,
        (p, q) => p * (p / q).ln(),
    };
    if total_p == 0.0 { 0.0 } else { (0..kept).map(term).sum() }
}

/// What one linear's inputs came to.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    largest: f64,
    average: Option<f64>,
    histogram: Histogram,
}

impl Observed {
    /// Takes the values of one batch.
    ///
    /// # Errors
    /// `NonFinite` naming the linear.
    pub fn add(&mut self, linear: &str, values: &[f64]) -> Result<()> {
        let count = values.iter().filter(|v| !v.is_finite()).count();
        if let Some(index) = values.iter().position(|v| !v.is_finite()) {
            let (layer, tensor) = (linear.to_string(), "calibration input".to_string());
            return Err(Error::NonFinite { step: 0, layer, tensor, count, index });
        }
        let largest = values.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        self.largest = self.largest.max(largest);
        self.average = Some(self.average.map_or(largest, |a| a + AVERAGING * (largest - a)));
        self.histogram.add(values.iter().map(|v| v.abs()));
        Ok(())
    }

    /// The range that `calibrator` chooses for `bits`.
    pub fn range(&self, calibrator: Calibrator, bits: u32) -> f64 {
        let range = match calibrator {
            Calibrator::MinMax => self.largest,
            Calibrator::MovingAverage => self.average.unwrap_or(0.0),
            Calibrator::Percentile => self.histogram.percentile(PERCENTILE),
            Calibrator::Entropy => self.histogram.entropy(1 << (bits - 1)),
            Calibrator::Mse => self.histogram.mse(bits),
        };
        range.min(self.largest)
    }
}

/// Gives every linear the step of its input, found on calibration data.
pub fn input_steps(model: &mut Model, linears: &[String], batches: &[Batch], calibrator: Calibrator) -> Result<()> {
    let mut observed: BTreeMap<String, Observed> = BTreeMap::new();
    inputs::pass(model, batches, &mut |seen| {
        observed.entry(seen.linear.to_string()).or_default().add(seen.linear, &seen.rows.to_f64()?)
    })?;
    for linear in linears {
        let range = observed.get(linear).map_or(0.0, |o| o.range(calibrator, INPUT_BITS));
        // A linear that saw only zeros, or nothing, takes the step that the rule gives a group of zeros: 1.
        let step = Grid::symmetric(Scheme::SymmetricNarrow, INPUT_BITS, range).scale;
        let step = Tensor::from_slice(model.device(), &[1], &[step])?;
        model.tensors.insert(format!("{linear}.{INPUT_STEP}"), step);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    fn observed(values: &[f64]) -> Observed {
        let mut observed = Observed::default();
        observed.add("linear", values).unwrap();
        observed
    }

    #[test]
    fn a_few_outliers_are_clipped_by_all_but_min_max() {
        let mut stream = Stream::new(3, 0);
        let mut values: Vec<f64> = (0..200_000).map(|_| stream.normal()).collect();
        values.extend([40.0, -55.0]);
        let seen = observed(&values);
        assert_eq!(seen.range(Calibrator::MinMax, 8), 55.0);
        assert_eq!(seen.range(Calibrator::MovingAverage, 8), 55.0);
        let percentile = seen.range(Calibrator::Percentile, 8);
        assert!((3.5..4.6).contains(&percentile), "{percentile}");
        for calibrator in [Calibrator::Entropy, Calibrator::Mse] {
            let range = seen.range(calibrator, 8);
            assert!((2.5..45.0).contains(&range), "{calibrator:?} {range}");
        }
        // Fewer levels clip more.
        assert!(seen.range(Calibrator::Mse, 4) <= seen.range(Calibrator::Mse, 8));
    }

    /// The best range is found by trying every one.
    #[test]
    fn mse_is_no_worse_than_any_other_range_of_the_histogram() {
        let mut stream = Stream::new(9, 0);
        let values: Vec<f64> = (0..5000).map(|_| stream.normal().powi(3)).collect();
        let seen = observed(&values);
        let error = |range: f64| -> f64 {
            let grid = Grid::symmetric(Scheme::SymmetricNarrow, 4, range);
            values.iter().map(|&v| (f64::from(grid.value(v)) - v).powi(2)).sum()
        };
        let found = error(seen.range(Calibrator::Mse, 4));
        for part in 1..=16 {
            let other = error(seen.largest * f64::from(part) / 16.0);
            assert!(found <= other * 1.02, "{found} where {part}/16 of the range has {other}");
        }
    }

    #[test]
    fn moving_average_and_growing_histograms_follow_their_rules() {
        let mut seen = observed(&[1.0, -0.5]);
        seen.add("linear", &[3.0]).unwrap();
        assert!((seen.range(Calibrator::MovingAverage, 8) - 1.02).abs() < 1e-12);
        assert_eq!((seen.histogram.top, seen.histogram.counts.iter().sum::<u64>()), (4.0, 3));
        assert_eq!(seen.histogram.counts[256], 1, "0.5 of 4");
    }

    /// P over four bins that two levels cannot tell apart: by hand.
    #[test]
    fn divergence_oracle() {
        let bins = [4.0, 2.0, 1.0, 1.0, 0.0];
        // Levels {4, 2} and {1, 1}: Q = [3, 3, 1, 1] / 8 against P = [4, 2, 1, 1] / 8.
        let want = 0.5 * (4.0f64 / 3.0).ln() + 0.25 * (2.0f64 / 3.0).ln();
        assert!((divergence(&bins, 4, 2) - want).abs() < 1e-15);
        // What lies above an empty last bin cannot be represented.
        assert_eq!(divergence(&[1.0, 0.0, 5.0], 2, 2), f64::INFINITY);
    }

    #[test]
    fn degenerate_inputs_are_defined() {
        for calibrator in [
            Calibrator::MinMax,
            Calibrator::MovingAverage,
            Calibrator::Percentile,
            Calibrator::Entropy,
            Calibrator::Mse,
        ] {
            assert_eq!(observed(&[0.0; 10]).range(calibrator, 8), 0.0, "{calibrator:?}");
            assert_eq!(Observed::default().range(calibrator, 8), 0.0);
            let one = observed(&[-2.0]).range(calibrator, 8);
            assert!(one > 0.0 && one <= 2.0, "{calibrator:?} {one}");
        }
        assert_eq!(Observed::default().add("l", &[1.0, f64::NAN]).unwrap_err().code(), "E-NON-FINITE");
    }
}
