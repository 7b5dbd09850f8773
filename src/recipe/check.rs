//! Ranges of a recipe's values: everything that could fail late is refused before the first stage runs.

use super::schema::{Distil, Recipe, Training};
use crate::compress::experts::SIZE_MULTIPLE;
use crate::compress::structure::scaled_ffn;
use crate::error::{Error, Result};
use crate::train::optimizer::Rule;

impl Training {
    fn check(&self, key: &str) -> Result<()> {
        let rule = |field: &str, value: String, allowed: &str| {
            Err(Error::Recipe { key: format!("{key}.{field}"), value, allowed: allowed.into() })
        };
        if self.steps == 0 || self.steps > 100_000_000 {
            return rule("steps", self.steps.to_string(), "1 to 100000000");
        }
        if self.batch == 0 || self.batch > 65_536 || self.accumulate == 0 {
            return rule("batch", format!("{} x {}", self.batch, self.accumulate), "1 to 65536, accumulate from 1");
        }
        if !(self.learning_rate.is_finite() && self.learning_rate > 0.0) {
            return rule("learning_rate", self.learning_rate.to_string(), "a finite rate above 0");
        }
        if !(0.0..=1.0).contains(&self.warmup) {
            return rule("warmup", self.warmup.to_string(), "0 to 1, a share of the steps");
        }
        let numbers = [self.weight_decay, self.clip];
        let betas = match self.rule {
            Rule::Adamw { beta1, beta2, epsilon } => [beta1, beta2, epsilon.min(0.5)],
            Rule::Sgd { momentum } => [momentum, 0.0, 0.5],
        };
        if numbers.iter().any(|x| !x.is_finite() || *x < 0.0) || betas.iter().any(|b| !(0.0..1.0).contains(b)) {
            let value = format!("weight_decay {}, clip {}, {:?}", self.weight_decay, self.clip, self.rule);
            return rule("rule", value, "finite and not negative; betas and momentum below 1");
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return rule("dropout", self.dropout.to_string(), "0 to below 1");
        }
        Ok(())
    }
}

impl Distil {
    fn check(&self, key: &str) -> Result<()> {
        let factors = [self.weights.hidden, self.weights.soft, self.weights.hard, self.gold];
        let sound = |x: &f32| x.is_finite() && *x >= 0.0;
        if factors.iter().all(sound) && self.temperature.is_finite() && self.temperature > 0.0 {
            return Ok(());
        }
        let value = format!("{:?}, gold {}, temperature {}", self.weights, self.gold, self.temperature);
        Err(Error::Recipe { key: key.into(), value, allowed: "finite factors from 0, a temperature above 0".into() })
    }
}

impl Recipe {
    pub(super) fn check(&self) -> Result<()> {
        let rule = |key: &str, value: String, allowed: &str| {
            Err(Error::Recipe { key: key.into(), value, allowed: allowed.into() })
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if self.name.is_empty() || self.name.len() > 128 || self.name.starts_with('.') || !self.name.chars().all(plain)
        {
            return rule("name", format!("{:?}", self.name), "1 to 128 letters, digits, '.', '_', '-', no leading dot");
        }
        if !(300..=1_000_000).contains(&self.data.vocabulary) {
            return rule(
                "data.vocabulary",
                self.data.vocabulary.to_string(),
                "300 to 1000000 (256 bytes and special tokens come first)",
            );
        }
        if !(8..=8192).contains(&self.data.max_length) || self.data.max_length > self.model.max_positions {
            return rule("data.max_length", self.data.max_length.to_string(), "8 to 8192, at most model.max_positions");
        }
        if !(0.0..=1.0).contains(&self.data.target_share) {
            return rule("data.target_share", self.data.target_share.to_string(), "0 to 1");
        }
        let m = self.model;
        let sizes = [m.layers, m.heads, m.head_size, m.ffn_width, m.max_positions];
        let most = [1024, 1024, 4096, 1 << 20, 1 << 20];
        if sizes.iter().zip(most).any(|(&n, most)| n == 0 || n > most)
            || !m.head_size.is_multiple_of(4)
            || !m.ffn_width.is_multiple_of(16)
        {
            let allowed = "from 1 to 1024 layers and heads, 4096 head_size, 1048576 ffn_width; head_size a multiple of 4 (2-D rotary), ffn_width of 16";
            return rule("model", format!("{m:?}"), allowed);
        }
        self.teacher.check("teacher")?;
        if let Some(s) = &self.structure {
            s.training.check("structure.training")?;
            s.distil.check("structure.distil")?;
            if s.calibration_batches == 0 {
                return rule("structure.calibration_batches", "0".into(), "from 1");
            }
            if s.layers == 0
                || s.layers > m.layers
                || s.head_size == 0
                || s.head_size > m.head_size
                || s.head_size % 4 != 0
            {
                let allowed = format!("layers 1 to {}, head_size a multiple of 4 up to {}", m.layers, m.head_size);
                return rule("structure", format!("layers {}, head_size {}", s.layers, s.head_size), &allowed);
            }
        }
        if let Some(s) = &self.sparsify {
            s.training.check("sparsify.training")?;
            s.distil.check("sparsify.distil")?;
        }
        if let Some(q) = &self.quantize {
            q.training.check("quantize.training")?;
            q.distil.check("quantize.distil")?;
        }
        if let Some(e) = &self.experts
            && !(e.share > 0.0 && e.share <= 1.0)
        {
            return rule("experts.share", e.share.to_string(), "above 0 to 1");
        }
        if let Some(e) = &self.experts {
            let width =
                self.structure.as_ref().map_or(m.ffn_width, |s| scaled_ffn(m.ffn_width, m.head_size, s.head_size));
            if e.expert_size == 0 || e.expert_size % SIZE_MULTIPLE != 0 || !width.is_multiple_of(e.expert_size) {
                let allowed = format!("a multiple of {SIZE_MULTIPLE} that divides the FFN width {width}");
                return rule("experts.expert_size", e.expert_size.to_string(), &allowed);
            }
            if e.calibration_batches == 0 || !e.router_rate.is_finite() || e.router_rate <= 0.0 {
                let value = format!("calibration_batches {}, router_rate {}", e.calibration_batches, e.router_rate);
                return rule("experts", value, "from 1; a finite rate above 0");
            }
        }
        if let Some(h) = &self.hybrid {
            h.teacher.check("hybrid.teacher")?;
            h.student.check("hybrid.student")?;
            if !(0.0..=1.0).contains(&h.lambda) || h.alpha.is_some_and(|a| !(0.0..=1.0).contains(&a)) {
                return rule("hybrid.lambda", format!("{} (alpha {:?})", h.lambda, h.alpha), "0 to 1");
            }
            let weights = [h.stream_weights.0, h.stream_weights.1];
            if weights.iter().any(|w| !w.is_finite() || *w <= 0.0) || !h.temperature.is_finite() || h.temperature <= 0.0
            {
                let value = format!("stream_weights {:?}, temperature {}", h.stream_weights, h.temperature);
                return rule("hybrid", value, "finite and above 0");
            }
            if self.data.target_share == 0.0 {
                return rule(
                    "data.target_share",
                    "0".into(),
                    "above 0 for hybrid tuning: it needs a target-language stream",
                );
            }
        }
        Ok(())
    }
}
