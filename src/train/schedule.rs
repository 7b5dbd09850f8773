//! Learning-rate schedules: pure functions of the step.

use serde::{Deserialize, Serialize};

/// Shape of the learning rate after warm-up. Rates are shares of the peak but for `InverseSquareRoot`, whose peak
/// factor is Vaswani et al.'s (2017): lr = factor d^-1/2 min(s^-1/2, s w^-3/2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum Shape {
    Constant,
    /// Down to 0 at the last step.
    #[default]
    Linear,
    /// Half a cosine down to `floor` of the peak.
    Cosine {
        #[serde(default)]
        floor: f64,
    },
    /// "Noam": needs the model's width.
    InverseSquareRoot {
        width: usize,
    },
    /// Falls linearly from the peak to `floor` of it over `start` steps (none: over a cycle), then again and again over
    /// `cycle` steps (oBERT's recipe: a restart at each pruning step). Steps are counted behind the warm-up.
    Cyclic {
        cycle: u64,
        floor: f64,
        #[serde(default)]
        start: u64,
    },
}

/// A peak, a linear warm-up, a shape.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    pub peak: f64,
    /// Steps of linear warm-up from 0.
    #[serde(default)]
    pub warmup: u64,
    #[serde(default)]
    pub shape: Shape,
}

impl Schedule {
    /// Rate of step `step` of `total`, steps counted from 1.
    pub fn rate(&self, step: u64, total: u64) -> f64 {
        let (s, w) = (step.max(1) as f64, self.warmup as f64);
        if let Shape::InverseSquareRoot { width } = self.shape {
            let w = w.max(1.0);
            return self.peak / (width.max(1) as f64).sqrt() * (1.0 / s.sqrt()).min(s * w.powf(-1.5));
        }
        if s <= w {
            return self.peak * s / w;
        }
        let span = (total.saturating_sub(self.warmup)).max(1) as f64;
        let progress = ((s - w) / span).clamp(0.0, 1.0);
        match self.shape {
            Shape::Constant | Shape::InverseSquareRoot { .. } => self.peak,
            Shape::Linear => self.peak * (1.0 - progress),
            Shape::Cosine { floor } => {
                self.peak * (floor + (1.0 - floor) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()))
            }
            Shape::Cyclic { cycle, floor, start } => {
                let done = step - self.warmup - 1;
                let cycle = if done < start { start } else { cycle.max(1) };
                let within = if done < start { done } else { (done - start) % cycle };
                self.peak * (1.0 - (1.0 - floor) * (within as f64 / cycle as f64))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use approx::assert_relative_eq;

    fn schedule(peak: f64, warmup: u64, shape: Shape) -> Schedule {
        Schedule { peak, warmup, shape }
    }

    /// LightChatGLM's "learning rate 0.9": only as a Noam factor does it make sense.
    #[test]
    fn noam_known_values() {
        let noam = |width| schedule(0.9, 40_000, Shape::InverseSquareRoot { width }).rate(40_000, 400_000);
        assert_relative_eq!(noam(4096), 7.03125e-5, max_relative = 1e-6);
        assert_relative_eq!(noam(768), 1.62380e-4, max_relative = 1e-5);
    }

    #[test]
    fn ends_and_middles() {
        let linear = schedule(1.0, 10, Shape::Linear);
        assert_relative_eq!(linear.rate(5, 110), 0.5);
        assert_relative_eq!(linear.rate(10, 110), 1.0);
        assert_relative_eq!(linear.rate(60, 110), 0.5);
        assert_relative_eq!(linear.rate(110, 110), 0.0);
        let cosine = schedule(2.0, 0, Shape::Cosine { floor: 0.1 });
        assert_relative_eq!(cosine.rate(50, 100), 2.0 * 0.55, max_relative = 1e-9);
        assert_relative_eq!(cosine.rate(100, 100), 0.2, max_relative = 1e-9);
        let cyclic = schedule(8e-5, 0, Shape::Cyclic { cycle: 4, floor: 0.1, start: 0 });
        assert_relative_eq!(cyclic.rate(1, 12), 8e-5);
        assert_relative_eq!(cyclic.rate(5, 12), 8e-5);
        assert!(cyclic.rate(4, 12) < 3e-5);
        // Three dense steps first: the restarts are at the pruning steps 3, 7, 11.
        let late = schedule(1.0, 0, Shape::Cyclic { cycle: 4, floor: 0.25, start: 3 });
        let rates: Vec<f64> = (1..=8).map(|step| late.rate(step, 12)).collect();
        assert_eq!(rates, [1.0, 0.75, 0.5, 1.0, 0.8125, 0.625, 0.4375, 1.0]);
    }
}
