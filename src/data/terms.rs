//! The embedded English-Chinese computer-terms set: hand-written terms and sentence frames (`datasets/`) that expand, as a pure
//! function of seed and count, to distinct grammatical pairs. It is what the main job trains on when a machine has no catalogs.

use std::collections::BTreeSet;
use std::path::Path;

use super::frame::{Frame, Rendered, Span, Term};
use super::split::{Fractions, Split};
use super::{Pair, order};
use crate::error::{Error, Result};

pub const TERMS_TSV: &str = include_str!("../../datasets/terms.en-zh.tsv");
pub const FRAMES_TSV: &str = include_str!("../../datasets/frames.en-zh.tsv");

/// Expansion size of the quick recipe.
pub const DEFAULT_COUNT: usize = 20_000;
/// Numbers that `{n}` may take; from 2, because English then takes the plural.
const NUMBERS: std::ops::RangeInclusive<usize> = 2..=60;

/// Terms by category, and the frames that use them.
#[derive(Clone, Debug)]
pub struct TermSet {
    categories: Vec<String>,
    terms: Vec<Term>,
    /// Indices of each category's terms.
    members: Vec<Vec<usize>>,
    frames: Vec<Frame>,
}

/// One expanded sentence: source English, target Chinese.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TermSentence {
    pub pair: Pair,
    /// Where the terms stand in the English side.
    pub spans: Vec<Span>,
    /// Where they stand in the Chinese side.
    pub target_spans: Vec<Span>,
    /// All sentences over the same set of terms are in the same part.
    pub split: Split,
}

impl TermSet {
    /// The set that ships with the program.
    pub fn embedded() -> Result<Self> {
        let (terms, frames) = (Path::new("datasets/terms.en-zh.tsv"), Path::new("datasets/frames.en-zh.tsv"));
        Self::parse((terms, TERMS_TSV), (frames, FRAMES_TSV))
    }

    /// Parses a set in the format of `datasets/README.md`. Errors name file, line and rule: wrong columns, a term given twice, a
    /// broken frame, or a frame that needs a form (plural, measure word) that a term of its category lacks.
    pub fn parse((terms_path, terms): (&Path, &str), (frames_path, frames): (&Path, &str)) -> Result<Self> {
        let mut set = Self { categories: Vec::new(), terms: Vec::new(), members: Vec::new(), frames: Vec::new() };
        let mut seen = BTreeSet::new();
        for (number, line) in terms.lines().enumerate().skip(1) {
            let broken = |rule: String| Error::file(terms_path, format!("line {}", number + 1), rule);
            let fields: Vec<&str> = line.split('\t').collect();
            let [category, english, plural, chinese, measure] = fields[..] else {
                return Err(broken(format!("{} columns where 5 are needed", fields.len())));
            };
            if fields.iter().any(|f| f.is_empty()) {
                return Err(broken("empty column".into()));
            }
            for name in [format!("en {english}"), format!("zh {chinese}")] {
                if !seen.insert(name.clone()) {
                    return Err(broken(format!("second term {name}")));
                }
            }
            let category = set.categories.iter().position(|c| c == category).unwrap_or_else(|| {
                set.categories.push(category.to_string());
                set.members.push(Vec::new());
                set.categories.len() - 1
            });
            let some = |text: &str| (text != "-").then(|| text.to_string());
            set.members[category].push(set.terms.len());
            set.terms.push(Term {
                category,
                english: english.to_string(),
                plural: some(plural),
                chinese: chinese.to_string(),
                measure: some(measure),
            });
        }
        for (number, line) in frames.lines().enumerate().skip(1) {
            let broken = |rule: String| Error::file(frames_path, format!("line {}", number + 1), rule);
            let (english, chinese) =
                line.split_once('\t').ok_or_else(|| broken("1 column where 2 are needed".into()))?;
            let frame = Frame::parse(english, chinese, &set.categories).map_err(broken)?;
            for (slot, &category) in frame.slots.iter().enumerate() {
                for &member in &set.members[category] {
                    if let Some(form) = frame.lacks(slot, &set.terms[member]) {
                        return Err(broken(format!("term {} has no {form}", set.terms[member].english)));
                    }
                }
            }
            set.frames.push(frame);
        }
        Ok(set)
    }

    /// Category names, in the order that [`Span::category`] indexes.
    pub fn categories(&self) -> &[String] {
        &self.categories
    }

    pub fn terms(&self) -> &[Term] {
        &self.terms
    }

    pub fn frame_count(&self) -> usize {
        self.frames.len()
    }

    /// The first `count` distinct sentences of the sequence that `seed` fixes; a smaller count gives a prefix of a larger one.
    /// Errors when the frames cannot express that many, or when the fractions are not usable.
    pub fn expand(&self, seed: u64, count: usize, fractions: Fractions) -> Result<Vec<TermSentence>> {
        fractions.check()?;
        let mut sentences = Vec::new();
        let mut seen = BTreeSet::new();
        // Frames take turns; small ones run dry early, and their turns then give nothing new.
        let attempts = (count as u64).saturating_mul(16).saturating_add(4096);
        for attempt in 0..attempts {
            if sentences.len() == count {
                break;
            }
            let Some(frame) = self.frames.get((attempt % self.frames.len().max(1) as u64) as usize) else { break };
            let Some(sentence) = self.fill(frame, order::hash(seed, attempt), fractions) else { continue };
            if seen.insert(sentence.pair.source.clone()) {
                sentences.push(sentence);
            }
        }
        if sentences.len() < count {
            let (parameter, value) = ("count", count.to_string());
            let allowed = "at most what terms and frames can express";
            return Err(Error::Parameter { op: "terms", parameter, value, allowed });
        }
        Ok(sentences)
    }

    /// `None` when a category lands on the same term twice in one sentence.
    fn fill(&self, frame: &Frame, draw: u64, fractions: Fractions) -> Option<TermSentence> {
        let mut chosen = Vec::with_capacity(frame.slots.len());
        for (slot, &category) in frame.slots.iter().enumerate() {
            let members = &self.members[category];
            let term = *members.get(order::below(draw, slot as u64, members.len()))?;
            if chosen.contains(&term) {
                return None;
            }
            chosen.push(term);
        }
        let terms: Vec<&Term> = chosen.iter().map(|&t| &self.terms[t]).collect();
        let number = NUMBERS.start() + order::below(draw, u64::MAX, NUMBERS.end() - NUMBERS.start() + 1);
        let Rendered { english: source, chinese: target, spans, chinese_spans } = frame.render(&terms, number);
        let mut combination: Vec<&str> = terms.iter().map(|t| t.english.as_str()).collect();
        combination.sort_unstable();
        // The part depends on the terms alone: not on the seed, so that sets of different seeds never mix their parts.
        let split = fractions.part(order::unit(order::hash_text(0, &combination.join("\t")), 0));
        Some(TermSentence { pair: Pair { source, target }, spans, target_spans: chinese_spans, split })
    }
}

#[cfg(test)]
mod tests {
    use super::super::clean::is_han;
    use super::*;

    fn expanded() -> Vec<TermSentence> {
        TermSet::embedded().unwrap().expand(1, DEFAULT_COUNT, Fractions::default()).unwrap()
    }

    #[test]
    fn at_least_20_000_distinct_pairs() {
        let sentences = expanded();
        assert!(sentences.len() >= 20_000);
        let sources: BTreeSet<&str> = sentences.iter().map(|s| s.pair.source.as_str()).collect();
        let targets: BTreeSet<&str> = sentences.iter().map(|s| s.pair.target.as_str()).collect();
        assert_eq!(sources.len(), sentences.len());
        assert_eq!(targets.len(), sentences.len(), "no Chinese sentence has two English ones");
        for TermSentence { pair, .. } in &sentences {
            assert!(pair.source.starts_with(|c: char| c.is_ascii_uppercase()), "{pair:?}");
            assert!(pair.source.ends_with(['.', '?']) && pair.target.ends_with(['。', '？']), "{pair:?}");
            assert!(pair.target.chars().any(is_han), "{pair:?}");
            for text in [&pair.source, &pair.target] {
                assert!(!text.contains(['{', '}', '\t']) && !text.contains("  ") && text.trim() == text, "{pair:?}");
            }
        }
    }

    #[test]
    fn expansion_is_a_pure_function_and_a_prefix() {
        let set = TermSet::embedded().unwrap();
        let expand = |seed, count| set.expand(seed, count, Fractions::default()).unwrap();
        assert_eq!(expand(5, 300), expand(5, 1000)[..300]);
        assert_ne!(expand(5, 300), expand(6, 300));
        assert!(matches!(
            set.expand(1, 100_000_000, Fractions { validation: 2.0, test: 0.0 }),
            Err(Error::Parameter { .. })
        ));
    }

    #[test]
    fn parts_are_separated_by_their_terms() {
        let set = TermSet::embedded().unwrap();
        let mut parts: std::collections::BTreeMap<Vec<String>, Split> = Default::default();
        let mut counts = [0usize; 3];
        for sentence in expanded() {
            counts[sentence.split as usize] += 1;
            let TermSentence { pair, spans, split, .. } = sentence;
            // Plurals and singulars are one term.
            let mut terms: Vec<String> = spans
                .iter()
                .map(|s| {
                    let text = pair.source[s.start..s.end].to_lowercase();
                    let same = |t: &&Term| t.english.to_lowercase() == text || t.plural.as_deref() == Some(&text);
                    set.terms()
                        .iter()
                        .filter(|t| t.category == s.category)
                        .find(same)
                        .map_or(text.clone(), |t| t.english.clone())
                })
                .collect();
            terms.sort();
            assert_eq!(*parts.entry(terms.clone()).or_insert(split), split, "{terms:?}");
        }
        for held_out in [counts[1], counts[2]] {
            assert!((600..=1400).contains(&held_out), "{counts:?}");
        }
    }

    #[test]
    fn spans_name_terms_of_their_category() {
        let set = TermSet::embedded().unwrap();
        for sentence in set.expand(2, 2000, Fractions::default()).unwrap() {
            assert!(!sentence.spans.is_empty());
            for span in &sentence.spans {
                let text = &sentence.pair.source[span.start..span.end];
                let known = set.terms().iter().any(|t| {
                    t.category == span.category
                        && (t.english.eq_ignore_ascii_case(text)
                            || t.plural.as_deref().is_some_and(|p| p.eq_ignore_ascii_case(text)))
                });
                assert!(known, "{text:?} in {:?}", sentence.pair.source);
            }
        }
    }

    #[test]
    fn broken_sets_name_the_line() {
        let parse = |terms: &str, frames: &str| {
            TermSet::parse((Path::new("t.tsv"), terms), (Path::new("f.tsv"), frames)).unwrap_err().to_string()
        };
        let head = "category\tenglish\tplural\tchinese\tmeasure\n";
        let good = format!("{head}part\tdisk\tdisks\t磁盘\t块\nload\tuse\t-\t使用率\t-\n");
        assert_eq!(parse(&format!("{head}part\tdisk\n"), ""), "t.tsv: line 2: 2 columns where 5 are needed");
        assert!(parse(&format!("{good}part\tdisk\tdisks\t盘\t块\n"), "").contains("line 4: second term en disk"));
        assert!(parse(&good, "e\tc\n{load.a}\t{load}\n").contains("f.tsv: line 2: term use has no plural"));
        assert!(parse(&good, "e\tc\nno tab\n").contains("line 2"));
    }
}
