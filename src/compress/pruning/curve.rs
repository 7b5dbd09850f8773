//! How much is pruned when: a curve between two sparsities over a window of the training.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::train::schedule::Shape;

/// Sparsity between an initial s_i and a final s_f over progress p in [0, 1].
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Curve {
    /// s_f from the first pruning step on.
    Constant,
    /// s_i + (s_f - s_i) p.
    Linear,
    /// s_f + (s_i - s_f) (1 - p)^3 (Zhu and Gupta 2017).
    #[default]
    Cubic,
    /// s_f + (s_i - s_f) (1 - p)^power.
    Polynomial(f64),
}

impl Curve {
    /// Exactly `last` at p = 1 and, but for `Constant`, exactly `first` at p = 0.
    pub fn at(self, first: f64, last: f64, progress: f64) -> f64 {
        let left = 1.0 - progress.clamp(0.0, 1.0);
        let power = match self {
            Curve::Constant => return last,
            Curve::Linear => 1.0,
            Curve::Cubic => 3.0,
            Curve::Polynomial(power) => power,
        };
        if left == 1.0 { first } else { last + (first - last) * left.powf(power) }
    }
}

/// When masks change. Steps are counted from 0, the moment before the first update: dense training up to `start`, a new
/// mask at `start`, every `every` steps after it and at `end`, then training with the mask frozen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timing {
    pub curve: Curve,
    /// Sparsity of the first mask; `Curve::Constant` starts at the final one.
    pub initial: f64,
    pub start: u64,
    pub end: u64,
    /// Steps between two masks.
    pub every: u64,
}

impl Timing {
    /// One mask before the first step.
    pub const ONCE: Timing = Timing { curve: Curve::Constant, initial: 0.0, start: 0, end: 0, every: 1 };

    /// # Errors
    /// `Error::Recipe` naming the key below `key` and what it may be.
    pub fn check(&self, key: &str, sparsity: f64) -> Result<()> {
        let refuse = |field: &str, value: String, allowed: &str| {
            Err(Error::Recipe { key: format!("{key}.{field}"), value, allowed: allowed.into() })
        };
        if !(0.0..1.0).contains(&sparsity) {
            return refuse("sparsity", sparsity.to_string(), "0 to below 1");
        }
        if !(0.0..=sparsity).contains(&self.initial) {
            return refuse("initial", self.initial.to_string(), "0 to the final sparsity");
        }
        if self.start > self.end {
            return refuse("window", format!("{} to {}", self.start, self.end), "a start that is not after the end");
        }
        if self.every == 0 {
            return refuse("every", "0".into(), "at least 1 step between two masks");
        }
        match self.curve {
            Curve::Polynomial(power) if !(power.is_finite() && power > 0.0) => {
                refuse("curve", power.to_string(), "a finite power above 0")
            }
            _ => Ok(()),
        }
    }

    /// Whether a new mask is made after `step` updates.
    pub fn updates_at(&self, step: u64) -> bool {
        (self.start..=self.end).contains(&step)
            && (step == self.end || (step - self.start).is_multiple_of(self.every.max(1)))
    }

    /// The last step up to `step` at which a mask was made; `None` before the first.
    pub fn last_update(&self, step: u64) -> Option<u64> {
        if step < self.start {
            return None;
        }
        let step = step.min(self.end);
        Some(if step == self.end { step } else { step - (step - self.start) % self.every.max(1) })
    }

    /// Sparsity that the mask in force after `step` updates has; 0 while training is dense.
    pub fn sparsity(&self, last: f64, step: u64) -> f64 {
        let Some(update) = self.last_update(step) else {
            return 0.0;
        };
        let window = self.end - self.start;
        let progress = if window == 0 { 1.0 } else { (update - self.start) as f64 / window as f64 };
        self.curve.at(self.initial, last, progress)
    }

    /// The cyclic learning rate that restarts at each new mask and falls linearly to `floor` of the peak (oBERT's recipe).
    pub fn cycles(&self, floor: f64) -> Shape {
        Shape::Cyclic { cycle: self.every, floor, start: self.start }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use approx::assert_abs_diff_eq;

    #[test]
    fn cubic_oracle() {
        let cases = [(0.7, [0.7, 0.815625, 0.875, 0.896875, 0.9]), (0.0, [0.0, 0.5203125, 0.7875, 0.8859375, 0.9])];
        for (initial, want) in cases {
            for (quarter, want) in want.into_iter().enumerate() {
                assert_abs_diff_eq!(Curve::Cubic.at(initial, 0.9, quarter as f64 / 4.0), want, epsilon = 1e-15);
            }
        }
        assert_eq!(Curve::Linear.at(0.5, 0.9, 0.5), 0.7);
        assert_eq!(Curve::Constant.at(0.5, 0.9, 0.0), 0.9);
        assert_eq!(Curve::Polynomial(1.0).at(0.5, 0.9, 0.25), Curve::Linear.at(0.5, 0.9, 0.25));
    }

    /// Over seeded windows: never falls, ends at the declared sparsity, changes only where masks are made, 0 before.
    #[test]
    fn sparsity_follows_the_window() {
        let mut stream = crate::rng::Stream::new(1, 0xc0);
        for _ in 0..256 {
            let (start, length, every) = (stream.below(20) as u64, stream.below(40) as u64, 1 + stream.below(9) as u64);
            let curve = [Curve::Constant, Curve::Linear, Curve::Cubic, Curve::Polynomial(0.5)][stream.below(4)];
            let timing = Timing { curve, initial: 0.25, start, end: start + length, every };
            let mut before = 0.0;
            for step in 0..start + length + 10 {
                let now = timing.sparsity(0.8, step);
                assert!(now >= before && (now == before || timing.updates_at(step)), "{timing:?} at {step}: {now}");
                assert_eq!(now == 0.0, step < start);
                before = now;
            }
            assert_eq!(before, 0.8);
            assert_eq!(timing.sparsity(0.8, start) == 0.25, curve != Curve::Constant && length > 0);
        }
    }

    #[test]
    fn senseless_timings_are_refused_by_key() {
        let refused = |timing: Timing, sparsity| timing.check("sparsify", sparsity).unwrap_err().to_string();
        assert!(refused(Timing::ONCE, 1.0).contains("sparsify.sparsity"));
        assert!(refused(Timing { initial: 0.6, ..Timing::ONCE }, 0.5).contains("sparsify.initial"));
        assert!(refused(Timing { start: 4, end: 3, ..Timing::ONCE }, 0.5).contains("sparsify.window"));
        assert!(refused(Timing { every: 0, ..Timing::ONCE }, 0.5).contains("sparsify.every"));
        assert!(refused(Timing { curve: Curve::Polynomial(f64::NAN), ..Timing::ONCE }, 0.5).contains("sparsify.curve"));
        assert!(Timing::ONCE.check("sparsify", 0.5).is_ok());
    }
}
