//! Corpus BLEU (Papineni et al. 2002) with NIST ("exp") smoothing, equal to sacreBLEU 2.6.0.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::{BleuTokenizer, SACREBLEU_VERSION, check_pairs};
use crate::error::Result;

const ORDER: usize = 4;

/// A corpus score with what it was made of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Bleu {
    /// 0 to 100.
    pub score: f64,
    /// Modified n-gram precisions for n = 1..4, in percent, smoothed.
    pub precisions: [f64; ORDER],
    pub brevity_penalty: f64,
    /// Words in all hypotheses and in all references.
    pub hypothesis_words: u64,
    pub reference_words: u64,
    /// How to reproduce the number with the `sacrebleu` program.
    pub signature: String,
}

/// BLEU of `hypotheses` against one reference each. Counts are summed over the corpus before any division.
///
/// # Errors
/// `Error::Shape` when the two lists differ in length or are empty.
pub fn bleu<H: AsRef<str>, R: AsRef<str>>(
    hypotheses: &[H],
    references: &[R],
    tokenizer: BleuTokenizer,
) -> Result<Bleu> {
    check_pairs("bleu", hypotheses.len(), references.len())?;
    let mut counts = Counts::default();
    for (hypothesis, reference) in hypotheses.iter().zip(references) {
        counts.add(&tokenizer.words(hypothesis.as_ref()), &tokenizer.words(reference.as_ref()));
    }
    Ok(counts.score(tokenizer))
}

#[derive(Default)]
struct Counts {
    correct: [u64; ORDER],
    total: [u64; ORDER],
    hypothesis_words: u64,
    reference_words: u64,
}

impl Counts {
    fn add(&mut self, hypothesis: &[String], reference: &[String]) {
        self.hypothesis_words += hypothesis.len() as u64;
        self.reference_words += reference.len() as u64;
        for (order, (correct, total)) in self.correct.iter_mut().zip(&mut self.total).enumerate() {
            let mut unmatched: HashMap<&[String], u64> = HashMap::new();
            for ngram in reference.windows(order + 1) {
                *unmatched.entry(ngram).or_default() += 1;
            }
            for ngram in hypothesis.windows(order + 1) {
                *total += 1;
                // Clipping: an n-gram counts at most as often as the reference holds it.
                if let Some(left) = unmatched.get_mut(ngram).filter(|left| **left > 0) {
                    *left -= 1;
                    *correct += 1;
                }
            }
        }
    }

    fn score(&self, tokenizer: BleuTokenizer) -> Bleu {
        let (words, reference_words) = (self.hypothesis_words as f64, self.reference_words as f64);
        let brevity_penalty = if words >= reference_words {
            1.0
        } else if words > 0.0 {
            (1.0 - reference_words / words).exp()
        } else {
            0.0
        };
        let mut precisions = [0.0; ORDER];
        if self.correct.iter().any(|&correct| correct > 0) {
            let mut smoothing = 1.0;
            for (precision, (&correct, &total)) in precisions.iter_mut().zip(self.correct.iter().zip(&self.total)) {
                if total == 0 {
                    break;
                }
                *precision = if correct == 0 {
                    // mteval-v13a: the k-th empty order counts as 1 / 2^k of a match.
                    smoothing *= 2.0;
                    100.0 / (smoothing * total as f64)
                } else {
                    100.0 * correct as f64 / total as f64
                };
            }
        }
        // A zero precision, possible only without a single match or n-gram, makes the geometric mean zero.
        let mean_log = precisions.iter().map(|precision| precision.ln()).sum::<f64>() / ORDER as f64;
        Bleu {
            score: brevity_penalty * mean_log.exp(),
            precisions,
            brevity_penalty,
            hypothesis_words: self.hypothesis_words,
            reference_words: self.reference_words,
            signature: format!(
                "nrefs:1|case:mixed|eff:no|tok:{}|smooth:exp|version:{SACREBLEU_VERSION}",
                tokenizer.name()
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_said_scores_zero_and_the_same_text_a_hundred() {
        let reference = ["the file could not be opened"];
        assert_eq!(bleu(&[""], &reference, BleuTokenizer::Mteval13a).unwrap().score, 0.0);
        let same = bleu(&reference, &reference, BleuTokenizer::Mteval13a).unwrap();
        assert!((same.score - 100.0).abs() < 1e-9);
        assert_eq!(same.signature, "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0");
    }

    #[test]
    fn repetition_is_clipped() {
        let score = bleu(&["the the the the"], &["the cat"], BleuTokenizer::Mteval13a).unwrap();
        assert_eq!(score.precisions[0], 25.0);
    }

    #[test]
    fn lists_must_pair_up() {
        assert_eq!(bleu(&["a"], &["a", "b"], BleuTokenizer::Char).unwrap_err().code(), "E-SHAPE");
        assert_eq!(bleu::<&str, &str>(&[], &[], BleuTokenizer::Char).unwrap_err().code(), "E-SHAPE");
    }
}
