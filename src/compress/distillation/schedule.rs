//! How the weight of a loss and the temperature change while a student trains. Their values lie in device memory, written
//! between steps, so that a captured step goes on being the right one.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::device::Device;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// Factor of a loss over the steps of a training (TextBrewer's weight schedulers).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightSchedule {
    #[default]
    Constant,
    /// From 1 to 0.
    LinearDecay,
    /// From 0 to 1.
    LinearGrowth,
}

impl WeightSchedule {
    /// Factor of the step after `done` of `total`.
    pub fn factor(self, done: u64, total: u64) -> f64 {
        let share = (done as f64 / total.max(1) as f64).min(1.0);
        match self {
            WeightSchedule::Constant => 1.0,
            WeightSchedule::LinearDecay => 1.0 - share,
            WeightSchedule::LinearGrowth => share,
        }
    }
}

/// The temperature of soft labels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind", deny_unknown_fields)]
pub enum TemperatureSchedule {
    #[default]
    Constant,
    /// From the base temperature to `to` over the training.
    Linear { to: f32 },
    /// tau_i = T + beta (mean of w - w_i) with w_i = (1 - cos(z_S, z_T))^gamma: rows that the student has right are
    /// softened more (TextBrewer's flsw). gamma is 1 or 2.
    Flsw { beta: f32, gamma: u32 },
    /// The same with w_i = 1 / (max softmax(z_S) + 0.001): by the student's own confidence (TextBrewer's cwsm).
    Cwsm { beta: f32 },
}

impl TemperatureSchedule {
    /// Refuses what gives a temperature of 0 or below, or none.
    pub fn check(self, temperature: f32) -> Result<()> {
        let refuse = |parameter, value: String, allowed| {
            Err(Error::Parameter { op: "temperature schedule", parameter, value, allowed })
        };
        let positive = |x: f32| x > 0.0 && x.is_finite();
        if !positive(temperature) {
            return refuse("temperature", temperature.to_string(), "above 0 and finite");
        }
        match self {
            TemperatureSchedule::Linear { to } if !positive(to) => refuse("to", to.to_string(), "above 0 and finite"),
            TemperatureSchedule::Flsw { gamma, .. } if !(1..=2).contains(&gamma) => {
                refuse("gamma", gamma.to_string(), "1 or 2")
            }
            // w is at most 2^gamma: a row's temperature must not reach 0.
            TemperatureSchedule::Flsw { beta, gamma }
                if !(beta.is_finite() && beta.abs() * 2f32.powi(gamma as i32) < temperature) =>
            {
                refuse("beta", beta.to_string(), "of at most T / 2^gamma, so that every temperature is above 0")
            }
            // w lies within 1 and 1000.
            TemperatureSchedule::Cwsm { beta } if !(beta.is_finite() && beta.abs() * 999.0 < temperature) => {
                refuse("beta", beta.to_string(), "of at most T / 999, so that every temperature is above 0")
            }
            _ => Ok(()),
        }
    }

    /// Temperature of the step after `done` of `total`; of rows with one of their own, their base.
    pub fn temperature(self, base: f32, done: u64, total: u64) -> f64 {
        let share = (done as f64 / total.max(1) as f64).min(1.0);
        match self {
            TemperatureSchedule::Linear { to } => f64::from(base) + share * (f64::from(to) - f64::from(base)),
            _ => f64::from(base),
        }
    }

    pub fn by_row(self) -> bool {
        matches!(self, TemperatureSchedule::Flsw { .. } | TemperatureSchedule::Cwsm { .. })
    }
}

/// A number in device memory, f32 `[1]`.
#[derive(Clone)]
pub struct Number(Tensor);

impl Number {
    pub fn new(device: &Arc<dyn Device>, value: f64) -> Result<Self> {
        Tensor::from_slice(device, &[1], &[value as f32]).map(Self)
    }

    pub fn set(&self, value: f64) -> Result<()> {
        self.0.upload(&[value as f32])
    }

    pub fn tensor(&self) -> &Tensor {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_move_linearly_and_stay_at_the_end() {
        let values = |s: WeightSchedule| [0, 25, 50, 100, 120].map(|step| s.factor(step, 100));
        assert_eq!(values(WeightSchedule::Constant), [1.0; 5]);
        assert_eq!(values(WeightSchedule::LinearDecay), [1.0, 0.75, 0.5, 0.0, 0.0]);
        assert_eq!(values(WeightSchedule::LinearGrowth), [0.0, 0.25, 0.5, 1.0, 1.0]);
        assert_eq!(WeightSchedule::LinearDecay.factor(0, 0), 1.0);
        let linear = TemperatureSchedule::Linear { to: 1.0 };
        assert_eq!([0, 50, 100].map(|step| linear.temperature(8.0, step, 100)), [8.0, 4.5, 1.0]);
    }

    #[test]
    fn temperatures_that_could_reach_zero_are_refused() {
        use TemperatureSchedule::{Constant, Cwsm, Flsw, Linear};
        for (schedule, temperature) in [
            (Constant, 0.0),
            (Constant, f32::NAN),
            (Linear { to: 0.0 }, 2.0),
            (Flsw { beta: 1.0, gamma: 3 }, 8.0),
            (Flsw { beta: 1.0, gamma: 2 }, 4.0),
            (Flsw { beta: f32::NAN, gamma: 1 }, 4.0),
            (Cwsm { beta: 1.0 }, 8.0),
        ] {
            let error = schedule.check(temperature).unwrap_err();
            assert!(matches!(error, Error::Parameter { op: "temperature schedule", .. }), "{schedule:?}: {error}");
        }
        for (schedule, temperature) in [(Flsw { beta: 1.0, gamma: 1 }, 8.0), (Cwsm { beta: 0.005 }, 8.0)] {
            schedule.check(temperature).unwrap();
        }
    }
}
