//! What a model gives to the reference translations: mean sequence probability, its length-fair twin, perplexity.

use crate::error::{Error, Result};

/// Sums of reference log-probabilities, in nats, that merge over batches.
///
/// The mean sequence probability is Eq 14 and 15 of LightChatGLM: Acc(D) = (1/N) sum_i P(T_i | S_i). It is a product
/// over tokens and so tiny for long sentences; the geometric mean per token undoes that, perplexity sums in log space.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct SequenceProbability {
    pub sequences: u64,
    pub tokens: u64,
    /// Sum over sequences of P(T | S).
    pub probability_sum: f64,
    /// Sum over sequences of P(T | S)^(1 / tokens).
    pub geometric_sum: f64,
    /// Sum over tokens of the log-probability.
    pub log_sum: f64,
}

impl SequenceProbability {
    /// Adds one sequence: the log-probability of each of its reference tokens given those before it, `[tokens]`, end
    /// mark included. Minus infinity is a legal log-probability.
    ///
    /// # Errors
    /// `Error::Shape` for a sequence without tokens, `Error::Parameter` for NaN or a value above zero (beyond the
    /// rounding of an f32 log-softmax).
    pub fn add(&mut self, log_probabilities: &[f32]) -> Result<()> {
        if log_probabilities.is_empty() {
            return Err(Error::Shape {
                op: "sequence probability",
                rule: "at least one token per sequence",
                got: "[0]".into(),
            });
        }
        if let Some(bad) = log_probabilities.iter().find(|p| p.is_nan() || **p > 1e-4) {
            return Err(Error::Parameter {
                op: "sequence probability",
                parameter: "log-probability",
                value: bad.to_string(),
                allowed: "-inf..=0",
            });
        }
        let count = log_probabilities.len() as f64;
        let log: f64 = log_probabilities.iter().map(|&p| f64::from(p)).sum();
        self.sequences += 1;
        self.tokens += log_probabilities.len() as u64;
        self.probability_sum += log.exp();
        self.geometric_sum += (log / count).exp();
        self.log_sum += log;
        Ok(())
    }

    /// (1/N) sum P(T_i | S_i), 0 to 1; `None` without sequences.
    pub fn mean(&self) -> Option<f64> {
        (self.sequences > 0).then(|| self.probability_sum / self.sequences as f64)
    }

    /// (1/N) sum P(T_i | S_i)^(1 / |T_i|), 0 to 1; `None` without sequences.
    pub fn geometric_mean_per_token(&self) -> Option<f64> {
        (self.sequences > 0).then(|| self.geometric_sum / self.sequences as f64)
    }

    /// exp of the mean negative log-probability over all tokens, at least 1; `None` without tokens.
    pub fn perplexity(&self) -> Option<f64> {
        (self.tokens > 0).then(|| (-self.log_sum / self.tokens as f64).exp())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand_on_two_sequences() {
        let mut measured = SequenceProbability::default();
        measured.add(&[0.5f32.ln(), 0.5f32.ln()]).unwrap();
        measured.add(&[0.8f32.ln()]).unwrap();
        assert!((measured.mean().unwrap() - (0.25 + 0.8) / 2.0).abs() < 1e-7);
        assert!((measured.geometric_mean_per_token().unwrap() - (0.5 + 0.8) / 2.0).abs() < 1e-7);
        assert!((measured.perplexity().unwrap() - (0.25f64 * 0.8).powf(-1.0 / 3.0)).abs() < 1e-6);
    }

    #[test]
    fn impossible_tokens_are_zero_and_nonsense_is_refused() {
        let mut measured = SequenceProbability::default();
        measured.add(&[f32::NEG_INFINITY, -1.0]).unwrap();
        assert_eq!(measured.mean(), Some(0.0));
        assert_eq!(measured.perplexity(), Some(f64::INFINITY));
        assert!(measured.add(&[]).is_err());
        assert!(measured.add(&[f32::NAN]).is_err());
        assert!(measured.add(&[0.5]).is_err());
        assert_eq!(measured.sequences, 1, "a refused sequence leaves no trace");
    }
}
