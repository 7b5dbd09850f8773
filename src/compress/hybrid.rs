//! Hybrid-data fine-tuning (LightChatGLM 3.3): the losses of Eq 12 and Eq 13 (Eq 11's alpha: `data::mixture`).

use serde::{Deserialize, Serialize};

/// How the student is tuned on the target-language stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StudentLoss {
    /// lambda CE(gold) + (1 - lambda) T^2 KL(teacher || student): what Eq 13's prose says, a larger lambda relying more on
    /// the student's own prediction.
    #[default]
    Corrected,
    /// Eq 13 to the letter: -(1/M) sum [lambda log f_T + (1 - lambda) log f_S]. Its first term is constant in the
    /// student, so the gradient is (1 - lambda) of plain cross-entropy.
    Literal,
}

/// Factors of (soft label, gold label) on the target-language stream.
pub fn student_factors(loss: StudentLoss, lambda: f64) -> (f64, f64) {
    match loss {
        StudentLoss::Corrected => (1.0 - lambda, lambda),
        StudentLoss::Literal => (0.0, 1.0 - lambda),
    }
}

/// Eq 12 as one weight per row: each stream's rows share its factor, so that the step's sum over rows is
/// alpha * mean(CE over source rows) + (1 - alpha) * mean(CE over target rows), and the weights sum to 1.
/// A stream without rows leaves its share to the other.
pub fn stream_weights(alpha: f64, rows: (usize, usize)) -> (f64, f64) {
    match rows {
        (0, 0) => (0.0, 0.0),
        (n, 0) => (1.0 / n as f64, 0.0),
        (0, m) => (0.0, 1.0 / m as f64),
        (n, m) => (alpha / n as f64, (1.0 - alpha) / m as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use approx::assert_relative_eq;

    #[test]
    fn lambda_weighs_the_gold_labels_in_the_corrected_form_and_shrinks_them_in_the_literal_one() {
        assert_eq!(student_factors(StudentLoss::Corrected, 0.75), (0.25, 0.75));
        assert_eq!(student_factors(StudentLoss::Literal, 0.75), (0.0, 0.25));
    }

    #[test]
    fn stream_weights_sum_to_one() {
        for rows in [(3, 5), (7, 0), (0, 2)] {
            let (s, d) = stream_weights(0.65, rows);
            assert_relative_eq!(s * rows.0 as f64 + d * rows.1 as f64, 1.0, max_relative = 1e-12);
        }
    }
}
