//! Entity-level precision, recall and F1 for tagging, equal to seqeval 1.2.2 in both of its behaviours.

use std::collections::{BTreeMap, BTreeSet};

use crate::error::{Error, Result};

/// How tag sequences are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TagScheme {
    /// `B-` only where an entity touches one of its own type (CoNLL-2003's own files).
    Iob1,
    /// `B-` at every start (most redistributions).
    Iob2,
    /// `B-`, `I-`, `E-` and `S-` for single words.
    Iobes,
}

/// What counts as an entity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntityRule {
    /// conlleval's lenient reading, comparable with published scores: an orphan `I-` starts an entity.
    Conlleval,
    /// Only what the scheme allows is an entity; a tag outside the scheme is an error.
    Strict(TagScheme),
}

/// Counts for one entity type or for all.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EntityCounts {
    /// Predicted entities with the true span and type.
    pub correct: u64,
    pub predicted: u64,
    pub actual: u64,
}

impl EntityCounts {
    /// 0 when nothing was predicted.
    pub fn precision(&self) -> f64 {
        ratio(self.correct, self.predicted)
    }

    /// 0 when there was nothing to find.
    pub fn recall(&self) -> f64 {
        ratio(self.correct, self.actual)
    }

    /// Harmonic mean of precision and recall, 0 when both are.
    pub fn f1(&self) -> f64 {
        let (precision, recall) = (self.precision(), self.recall());
        if precision + recall == 0.0 { 0.0 } else { 2.0 * precision * recall / (precision + recall) }
    }
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

/// Counts per entity type, in alphabetical order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EntityReport {
    pub types: BTreeMap<String, EntityCounts>,
}

impl EntityReport {
    /// All types pooled: the number papers report.
    pub fn micro(&self) -> EntityCounts {
        self.types.values().fold(EntityCounts::default(), |sum, counts| EntityCounts {
            correct: sum.correct + counts.correct,
            predicted: sum.predicted + counts.predicted,
            actual: sum.actual + counts.actual,
        })
    }

    /// Unweighted mean F1 over the types seen on either side; `None` without any.
    pub fn macro_f1(&self) -> Option<f64> {
        let count = self.types.len();
        (count > 0).then(|| self.types.values().map(EntityCounts::f1).sum::<f64>() / count as f64)
    }
}

/// Compares tag sequences `[sentences][words]`.
///
/// # Errors
/// `Error::Shape` when the two sides differ in sentences or words; `Error::Parameter` for an empty tag, or under
/// [`EntityRule::Strict`] for a prefix outside the scheme.
pub fn entity_f1<S: AsRef<str>>(actual: &[Vec<S>], predicted: &[Vec<S>], rule: EntityRule) -> Result<EntityReport> {
    if !actual.iter().map(Vec::len).eq(predicted.iter().map(Vec::len)) {
        return Err(Error::Shape {
            op: "entity f1",
            rule: "one predicted tag per word of every sentence",
            got: format!("{} and {} sentences", actual.len(), predicted.len()),
        });
    }
    let mut report = EntityReport::default();
    for (actual, predicted) in actual.iter().zip(predicted) {
        let (actual, predicted) = (entities(actual, rule)?, entities(predicted, rule)?);
        for entity in &actual {
            let counts = report.types.entry(entity.0.to_string()).or_default();
            counts.actual += 1;
            counts.correct += u64::from(predicted.contains(entity));
        }
        for entity in &predicted {
            report.types.entry(entity.0.to_string()).or_default().predicted += 1;
        }
    }
    Ok(report)
}

/// Type, first word, one past the last word.
type Entity<'a> = (&'a str, usize, usize);

#[derive(Clone, Copy)]
struct Tag<'a> {
    prefix: char,
    kind: &'a str,
}

const OUTSIDE: Tag<'static> = Tag { prefix: 'O', kind: "_" };

fn entities<S: AsRef<str>>(tags: &[S], rule: EntityRule) -> Result<BTreeSet<Entity<'_>>> {
    let mut parsed = Vec::with_capacity(tags.len() + 1);
    for tag in tags {
        parsed.push(parse(tag.as_ref(), rule)?);
    }
    // A closing outside tag ends an entity that runs to the end of the sentence.
    parsed.push(OUTSIDE);
    Ok(match rule {
        EntityRule::Conlleval => lenient(&parsed),
        EntityRule::Strict(scheme) => strict(&parsed, scheme),
    })
}

fn parse(tag: &str, rule: EntityRule) -> Result<Tag<'_>> {
    let refuse = |allowed| Error::Parameter { op: "entity f1", parameter: "tag", value: format!("{tag:?}"), allowed };
    let mut characters = tag.chars();
    let prefix = characters.next().ok_or_else(|| refuse("a prefix and a type"))?;
    let rest = characters.as_str();
    let kind = match rule {
        EntityRule::Conlleval => rest.split_once('-').map_or(rest, |(_, kind)| kind),
        EntityRule::Strict(scheme) => {
            let (prefixes, allowed) = match scheme {
                TagScheme::Iob1 | TagScheme::Iob2 => ("IOB", "I-, B- or O"),
                TagScheme::Iobes => ("IOBES", "I-, B-, E-, S- or O"),
            };
            if !prefixes.contains(prefix) {
                return Err(refuse(allowed));
            }
            rest.trim_matches('-')
        }
    };
    Ok(Tag { prefix, kind: if kind.is_empty() { "_" } else { kind } })
}

/// conlleval's two tests between neighbours.
fn lenient<'a>(tags: &[Tag<'a>]) -> BTreeSet<Entity<'a>> {
    let mut found = BTreeSet::new();
    // Before the first word stands an outside tag of no type.
    let mut previous = Tag { prefix: 'O', kind: "" };
    let mut start = 0;
    for (index, &tag) in tags.iter().enumerate() {
        let differs = previous.kind != tag.kind;
        let ends = matches!((previous.prefix, tag.prefix), ('E' | 'S', _) | ('B' | 'I', 'B' | 'S' | 'O'))
            || (!matches!(previous.prefix, 'O' | '.') && differs);
        let starts = matches!((previous.prefix, tag.prefix), (_, 'B' | 'S') | ('E' | 'S' | 'O', 'E' | 'I'))
            || (!matches!(tag.prefix, 'O' | '.') && differs);
        if ends {
            found.insert((previous.kind, start, index));
        }
        if starts {
            start = index;
        }
        previous = tag;
    }
    found
}

/// Follows a scheme's transitions; a run that does not close by the scheme is no entity.
fn strict<'a>(tags: &[Tag<'a>], scheme: TagScheme) -> BTreeSet<Entity<'a>> {
    let mut found = BTreeSet::new();
    let mut previous = OUTSIDE;
    let mut index = 0;
    while let Some(&first) = tags.get(index) {
        let start = index;
        index += 1;
        if scheme.starts(previous, first) {
            let mut last = first;
            while let Some(&next) = tags.get(index).filter(|next| scheme.continues(last, **next)) {
                last = next;
                index += 1;
            }
            // The closing outside tag never starts or continues, so a tag stands at `index`.
            if tags.get(index).is_some_and(|&after| scheme.ends(last, after)) {
                found.insert((first.kind, start, index));
            }
            previous = last;
        } else {
            previous = first;
        }
    }
    found
}

impl TagScheme {
    fn starts(self, previous: Tag, tag: Tag) -> bool {
        let same = previous.kind == tag.kind;
        match self {
            Self::Iob1 => match (previous.prefix, tag.prefix) {
                ('O' | 'B', 'I') => true,
                ('I', 'I') => !same,
                ('I' | 'B', 'B') => same,
                _ => false,
            },
            Self::Iob2 => tag.prefix == 'B',
            Self::Iobes => matches!(tag.prefix, 'B' | 'S'),
        }
    }

    fn continues(self, previous: Tag, tag: Tag) -> bool {
        let inside = if self == Self::Iobes { "IE" } else { "I" };
        matches!(previous.prefix, 'B' | 'I') && inside.contains(tag.prefix) && previous.kind == tag.kind
    }

    fn ends(self, previous: Tag, tag: Tag) -> bool {
        let same = previous.kind == tag.kind;
        match (self, previous.prefix, tag.prefix) {
            (Self::Iobes, prefix, _) => matches!(prefix, 'S' | 'E'),
            (_, 'I', 'O' | 'B') | (_, 'B', 'O') => true,
            (_, 'I' | 'B', 'I') => !same,
            (Self::Iob1, 'B', 'B') => same,
            (Self::Iob2, 'B', 'B') => true,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(actual: &[&str], predicted: &[&str], rule: EntityRule) -> EntityCounts {
        entity_f1(&[actual.to_vec()], &[predicted.to_vec()], rule).unwrap().micro()
    }

    #[test]
    fn an_orphan_inside_tag_is_an_entity_only_for_conlleval() {
        let (actual, predicted) = (["B-PER", "I-PER", "O"], ["I-PER", "I-PER", "O"]);
        assert_eq!(one(&actual, &predicted, EntityRule::Conlleval).f1(), 1.0);
        assert_eq!(one(&actual, &predicted, EntityRule::Strict(TagScheme::Iob2)).predicted, 0);
        assert_eq!(one(&predicted, &predicted, EntityRule::Strict(TagScheme::Iob1)).f1(), 1.0);
    }

    #[test]
    fn an_entity_may_end_the_sentence_and_an_unfinished_one_is_none() {
        let whole = one(&["B-LOC", "E-LOC"], &["B-LOC", "E-LOC"], EntityRule::Strict(TagScheme::Iobes));
        assert_eq!((whole.correct, whole.actual), (1, 1));
        assert_eq!(one(&["B-LOC", "I-LOC"], &["O", "O"], EntityRule::Strict(TagScheme::Iobes)).actual, 0);
    }

    #[test]
    fn bad_tags_and_lengths_are_errors() {
        let refused = |tag: &'static str, rule| entity_f1(&[vec![tag]], &[vec!["O"]], rule).unwrap_err().code();
        assert_eq!(refused("S-PER", EntityRule::Strict(TagScheme::Iob2)), "E-PARAMETER");
        assert_eq!(refused("", EntityRule::Conlleval), "E-PARAMETER");
        assert!(entity_f1(&[vec!["O"]], &[vec![]], EntityRule::Conlleval).is_err());
    }

    #[test]
    fn averages() {
        let actual = [vec!["B-A", "B-B", "O"]];
        let report = entity_f1(&actual, &[vec!["B-A", "O", "O"]], EntityRule::Conlleval).unwrap();
        assert_eq!(report.macro_f1(), Some(0.5));
        assert!((report.micro().f1() - 2.0 / 3.0).abs() < 1e-12);
        assert_eq!(EntityReport::default().macro_f1(), None);
    }
}
