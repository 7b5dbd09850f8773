//! `[hybrid]`: tuning on labels of both directions.

use serde::{Deserialize, Serialize};

use super::Training;
use crate::compress::hybrid::{StudentLoss, student_factors};
use crate::compress::written;
use crate::error::Result;
use crate::recipe::check::refuse;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hybrid {
    /// Task weights (w_s, w_d) of Eq 11; alpha follows from them and the streams' sizes.
    #[serde(default = "equal_weights")]
    pub stream_weights: (f64, f64),
    /// Overrides Eq 11.
    #[serde(default)]
    pub alpha: Option<f64>,
    #[serde(default = "default_lambda")]
    pub lambda: f64,
    #[serde(default)]
    pub student_loss: StudentLoss,
    #[serde(default = "default_temperature_one")]
    pub temperature: f32,
    pub teacher: Training,
    pub student: Training,
}

fn equal_weights() -> (f64, f64) {
    (1.0, 1.0)
}

fn default_lambda() -> f64 {
    0.65
}

fn default_temperature_one() -> f32 {
    1.0
}

impl Hybrid {
    pub(in crate::recipe) fn check(&self, target_share: f64) -> Result<()> {
        self.teacher.check("hybrid.teacher")?;
        self.student.check("hybrid.student")?;
        if !(0.0..=1.0).contains(&self.lambda) {
            return refuse("hybrid.lambda", self.lambda, "0 to 1");
        }
        if let Some(alpha) = self.alpha.filter(|a| !(0.0..=1.0).contains(a)) {
            return refuse("hybrid.alpha", alpha, "0 to 1");
        }
        if student_factors(self.student_loss, self.lambda) == (0.0, 0.0) {
            return refuse("hybrid.lambda", self.lambda, "below 1 for the literal loss: with 1 nothing is left of it");
        }
        let weights = [self.stream_weights.0, self.stream_weights.1];
        if weights.iter().any(|w| !w.is_finite() || *w <= 0.0) {
            return refuse("hybrid.stream_weights", written(&self.stream_weights), "finite and above 0");
        }
        if !self.temperature.is_finite() || self.temperature <= 0.0 {
            return refuse("hybrid.temperature", self.temperature, "finite and above 0");
        }
        if target_share == 0.0 {
            let allowed = "above 0 for hybrid tuning: it needs a target-language stream";
            return refuse("data.target_share", 0, allowed);
        }
        Ok(())
    }
}
