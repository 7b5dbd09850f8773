//! Token accuracy and exact match under teacher forcing: sums that merge over batches.

use crate::error::{Error, Result};

/// Share of target tokens predicted right.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TokenAccuracy {
    pub correct: u64,
    pub total: u64,
}

/// Share of sequences with every counted token right.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExactMatch {
    pub correct: u64,
    pub total: u64,
}

fn check(op: &'static str, predicted: &[u32], target: &[u32]) -> Result<()> {
    if predicted.len() == target.len() {
        return Ok(());
    }
    Err(Error::Shape {
        op,
        rule: "one prediction per target token",
        got: format!("{} predictions, {} targets", predicted.len(), target.len()),
    })
}

fn counted<'a>(
    predicted: &'a [u32],
    target: &'a [u32],
    ignore: Option<u32>,
) -> impl Iterator<Item = (&'a u32, &'a u32)> {
    predicted.iter().zip(target).filter(move |(_, target)| Some(**target) != ignore)
}

impl TokenAccuracy {
    /// Adds predictions `[tokens]` for targets `[tokens]`; targets equal to `ignore` do not count.
    ///
    /// # Errors
    /// `Error::Shape` when the lengths differ.
    pub fn add(&mut self, predicted: &[u32], target: &[u32], ignore: Option<u32>) -> Result<()> {
        check("token accuracy", predicted, target)?;
        for (predicted, target) in counted(predicted, target, ignore) {
            self.total += 1;
            self.correct += u64::from(predicted == target);
        }
        Ok(())
    }

    /// 0 to 1; `None` before the first counted token.
    pub fn value(&self) -> Option<f64> {
        (self.total > 0).then(|| self.correct as f64 / self.total as f64)
    }
}

impl ExactMatch {
    /// Adds one sequence under teacher forcing: it counts when all its tokens other than `ignore` are right. A
    /// sequence without a counted token is left out.
    ///
    /// # Errors
    /// `Error::Shape` when the lengths differ.
    pub fn add(&mut self, predicted: &[u32], target: &[u32], ignore: Option<u32>) -> Result<()> {
        check("exact match", predicted, target)?;
        let (mut any, mut all) = (false, true);
        for (predicted, target) in counted(predicted, target, ignore) {
            any = true;
            all &= predicted == target;
        }
        self.add_outcome(any && all, any);
        Ok(())
    }

    /// Adds one generated text, equal up to white space at its ends.
    pub fn add_text(&mut self, hypothesis: &str, reference: &str) {
        self.add_outcome(hypothesis.trim() == reference.trim(), true);
    }

    fn add_outcome(&mut self, correct: bool, counts: bool) {
        self.total += u64::from(counts);
        self.correct += u64::from(correct);
    }

    /// 0 to 1; `None` before the first counted sequence.
    pub fn value(&self) -> Option<f64> {
        (self.total > 0).then(|| self.correct as f64 / self.total as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_counts_neither_way() {
        let (mut tokens, mut exact) = (TokenAccuracy::default(), ExactMatch::default());
        for (predicted, target) in [([1, 2, 9], [1, 2, 0]), ([1, 3, 9], [1, 2, 0]), ([5, 5, 5], [0, 0, 0])] {
            tokens.add(&predicted, &target, Some(0)).unwrap();
            exact.add(&predicted, &target, Some(0)).unwrap();
        }
        assert_eq!((tokens.correct, tokens.total), (3, 4));
        assert_eq!((exact.correct, exact.total), (1, 2));
        assert_eq!(exact.value(), Some(0.5));
    }

    #[test]
    fn no_data_is_not_zero_accuracy() {
        assert_eq!(TokenAccuracy::default().value(), None);
        assert!(TokenAccuracy::default().add(&[1], &[1, 2], None).is_err());
    }

    #[test]
    fn texts_match_up_to_outer_space() {
        let mut exact = ExactMatch::default();
        exact.add_text("打开文件\n", "打开文件");
        exact.add_text("open file", "open  file");
        assert_eq!((exact.correct, exact.total), (1, 2));
    }
}
