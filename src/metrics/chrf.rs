//! chrF2 (Popović 2015) and chrF2++ (Popović 2017): F-score of character n-grams, equal to sacreBLEU 2.6.0.

use std::collections::HashMap;
use std::hash::Hash;

use serde::{Deserialize, Serialize};

use super::{SACREBLEU_VERSION, check_pairs, is_space};
use crate::error::Result;

const CHARACTER_ORDER: usize = 6;
/// Recall weighs this much more than precision.
const BETA: f64 = 2.0;

/// A corpus score.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Chrf {
    /// 0 to 100.
    pub score: f64,
    /// 0 for chrF, 2 for chrF++.
    pub word_order: usize,
    /// How to reproduce the number with the `sacrebleu` program.
    pub signature: String,
}

/// chrF2 with `word_order` 0, chrF2++ with 2. One reference per hypothesis; counts are summed over the corpus.
///
/// # Errors
/// `Error::Shape` when the two lists differ in length or are empty.
pub fn chrf<H: AsRef<str>, R: AsRef<str>>(hypotheses: &[H], references: &[R], word_order: usize) -> Result<Chrf> {
    check_pairs("chrf", hypotheses.len(), references.len())?;
    let mut counts = vec![Counts::default(); CHARACTER_ORDER + word_order];
    for (hypothesis, reference) in hypotheses.iter().zip(references) {
        let (hypothesis, reference) = (hypothesis.as_ref(), reference.as_ref());
        let (of_characters, of_words) = counts.split_at_mut(CHARACTER_ORDER);
        add_orders(of_characters, &characters(hypothesis), &characters(reference));
        add_orders(of_words, &words(hypothesis), &words(reference));
    }
    Ok(Chrf {
        score: f_score(&counts),
        word_order,
        signature: format!(
            "nrefs:1|case:mixed|eff:yes|nc:{CHARACTER_ORDER}|nw:{word_order}|space:no|version:{SACREBLEU_VERSION}"
        ),
    })
}

#[derive(Clone, Default)]
struct Counts {
    hypothesis: u64,
    reference: u64,
    matched: u64,
}

fn characters(segment: &str) -> Vec<char> {
    segment.chars().filter(|&c| !is_space(c)).collect()
}

/// Words with one ASCII punctuation mark split off the end, or else off the start, as the original does.
fn words(segment: &str) -> Vec<&str> {
    let mut words = Vec::new();
    for word in segment.split(is_space).filter(|word| !word.is_empty()) {
        let marks = (word.len() > 1).then(|| {
            let bytes = word.as_bytes();
            (bytes[0].is_ascii_punctuation(), bytes[bytes.len() - 1].is_ascii_punctuation())
        });
        match marks {
            Some((_, true)) => words.extend([&word[..word.len() - 1], &word[word.len() - 1..]]),
            Some((true, false)) => words.extend([&word[..1], &word[1..]]),
            _ => words.push(word),
        }
    }
    words
}

fn add_orders<T: Eq + Hash>(orders: &mut [Counts], hypothesis: &[T], reference: &[T]) {
    for (order, counts) in orders.iter_mut().enumerate() {
        let mut unmatched: HashMap<&[T], u64> = HashMap::new();
        let mut in_reference = 0;
        for ngram in reference.windows(order + 1) {
            *unmatched.entry(ngram).or_default() += 1;
            in_reference += 1;
        }
        // A segment whose reference is too short for this order cannot be wrong at it.
        if in_reference == 0 {
            continue;
        }
        counts.reference += in_reference;
        for ngram in hypothesis.windows(order + 1) {
            counts.hypothesis += 1;
            if let Some(left) = unmatched.get_mut(ngram).filter(|left| **left > 0) {
                *left -= 1;
                counts.matched += 1;
            }
        }
    }
}

/// Precision and recall are averaged over the orders that both sides have, then combined with beta.
fn f_score(counts: &[Counts]) -> f64 {
    let (mut precision, mut recall, mut orders) = (0.0, 0.0, 0.0);
    for order in counts.iter().filter(|order| order.hypothesis > 0 && order.reference > 0) {
        precision += order.matched as f64 / order.hypothesis as f64;
        recall += order.matched as f64 / order.reference as f64;
        orders += 1.0;
    }
    if precision + recall == 0.0 {
        return 0.0;
    }
    let (precision, recall) = (precision / orders, recall / orders);
    let factor = BETA * BETA;
    100.0 * (1.0 + factor) * precision * recall / (factor * precision + recall)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identical_text_is_perfect_and_disjoint_text_zero() {
        assert!((chrf(&["打开文件 now!"], &["打开文件 now!"], 2).unwrap().score - 100.0).abs() < 1e-9);
        assert_eq!(chrf(&["aaa"], &["bbb"], 0).unwrap().score, 0.0);
        assert_eq!(chrf(&[""], &[""], 2).unwrap().score, 0.0);
    }

    #[test]
    fn only_one_side_of_a_word_loses_its_punctuation() {
        assert_eq!(words("(hi) (yo , 文件。 é!"), ["(hi", ")", "(", "yo", ",", "文件。", "é", "!"]);
    }
}
