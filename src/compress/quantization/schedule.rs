//! What changes while a model is trained under quantization: the bits, and whether observers still look.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// From `start` bits down to the format's, one bit less after each period (DeepSpeed's MoQ; there the period doubles).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BitSchedule {
    pub start: u32,
    /// Steps.
    pub period: u64,
    /// Each period is twice as long as the one before it.
    #[serde(default)]
    pub doubling: bool,
}

impl BitSchedule {
    /// Bits after `step` updates.
    pub fn bits(&self, step: u64, target: u32) -> u32 {
        let (mut bits, mut end, mut period) = (self.start.max(target), self.period, self.period);
        while bits > target && step >= end {
            bits -= 1;
            period = if self.doubling { period.saturating_mul(2) } else { period };
            end = end.saturating_add(period);
        }
        bits
    }

    /// # Errors
    /// `Parameter` for a start outside target ..= 8, no period, or a training that ends before the target is reached.
    pub fn check(&self, target: u32, steps: u64) -> Result<()> {
        let refuse = |parameter, value: u64, allowed| {
            Err(Error::Parameter { op: "bit schedule", parameter, value: value.to_string(), allowed })
        };
        if !(target..=8).contains(&self.start) {
            return refuse("start", self.start.into(), "the format's bits up to 8");
        }
        if self.period == 0 {
            return refuse("period", 0, "at least 1 step");
        }
        if self.bits(steps.saturating_sub(1), target) > target {
            return refuse("period", self.period, "short enough that training reaches the format's bits");
        }
        Ok(())
    }
}

/// A training under quantization.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    pub steps: u64,
    /// Steps of weights and static inputs learn (LSQ).
    pub learned: bool,
    /// Rate of the moving average that static input steps are, until the last quarter; 0: they are not tracked.
    pub tracking: f32,
    pub bits: Option<BitSchedule>,
}

impl Phase {
    /// Whether observers look at the step that follows `done` ones: not in the last quarter (Jacob et al. 2018 freeze
    /// ranges so that the weights settle under those that are deployed).
    pub fn tracks(&self, done: u64) -> bool {
        self.tracking > 0.0 && !self.learned && done < self.steps - self.steps / 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_fall_one_by_one() {
        let plain = BitSchedule { start: 8, period: 10, doubling: false };
        assert_eq!([0, 9, 10, 29, 30, 1000].map(|s| plain.bits(s, 4)), [8, 8, 7, 6, 5, 4]);
        let doubling = BitSchedule { doubling: true, ..plain };
        assert_eq!([0, 10, 29, 30, 69, 70, 150].map(|s| doubling.bits(s, 4)), [8, 7, 7, 6, 6, 5, 4]);
        assert!(plain.check(4, 41).is_ok() && plain.check(4, 40).is_err());
        assert!(BitSchedule { start: 3, ..plain }.check(4, 1000).is_err());
        assert!(BitSchedule { period: 0, ..plain }.check(4, 1000).is_err());
    }

    #[test]
    fn observers_rest_in_the_last_quarter() {
        let phase = Phase { steps: 100, learned: false, tracking: 0.01, bits: None };
        assert!(phase.tracks(0) && phase.tracks(74) && !phase.tracks(75));
        assert!(!Phase { learned: true, ..phase }.tracks(0));
    }
}
