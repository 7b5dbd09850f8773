//! Multilingual shift: what compression costs the languages that were not compressed for.

use std::collections::BTreeMap;

use crate::error::{Error, Result};

/// Sum over languages other than `source` of score minus baseline score. The baseline is the same architecture before
/// compression: measured against another architecture's baseline the number says nothing about compression.
/// Both maps go from language code to score (F1, same unit); zero means nothing was lost.
///
/// # Errors
/// `Error::Shape` when the two maps do not hold the same languages, or hold none besides the source.
pub fn mls(scores: &BTreeMap<String, f64>, baseline: &BTreeMap<String, f64>, source: &str) -> Result<f64> {
    let targets = || scores.iter().filter(|(language, _)| *language != source);
    if !scores.keys().eq(baseline.keys()) || targets().next().is_none() {
        let list = |map: &BTreeMap<String, f64>| map.keys().cloned().collect::<Vec<_>>().join(",");
        return Err(Error::Shape {
            op: "mls",
            rule: "score and baseline hold the same languages, at least one besides the source",
            got: format!("[{}] and [{}], source {source}", list(scores), list(baseline)),
        });
    }
    Ok(targets().zip(baseline.iter().filter(|(language, _)| *language != source)).map(|(a, b)| a.1 - b.1).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(entries: &[(&str, f64)]) -> BTreeMap<String, f64> {
        entries.iter().map(|&(language, score)| (language.to_string(), score)).collect()
    }

    #[test]
    fn sums_target_languages_only() {
        let base = map(&[("en", 0.91), ("es", 0.75), ("nl", 0.78)]);
        let compressed = map(&[("en", 0.50), ("es", 0.70), ("nl", 0.80)]);
        assert!((mls(&compressed, &base, "en").unwrap() - (-0.03)).abs() < 1e-12);
        assert_eq!(mls(&base, &base, "en").unwrap(), 0.0);
    }

    #[test]
    fn languages_must_agree() {
        assert!(mls(&map(&[("es", 0.7)]), &map(&[("nl", 0.7)]), "en").is_err());
        assert!(mls(&map(&[("en", 0.7)]), &map(&[("en", 0.7)]), "en").is_err());
    }
}
