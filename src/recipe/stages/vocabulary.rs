//! Tokens that the text does not need go, of the teacher and of the student; nothing is trained.

use super::{Outcome, Student};
use crate::compress::structure::prune_vocabulary;
use crate::data::batch::Example;
use crate::data::vocabulary::VocabularyMap;
use crate::error::Result;
use crate::nn::{Config, Head, Model, Pass};
use crate::recipe::corpus::{Corpus, Narrowed, upload};
use crate::recipe::flow::Flow;
use crate::recipe::run_folder::fingerprint;
use crate::train::lifecycle::Invariant;

/// Examples on which the smaller model is held against the larger one.
const PROBE: usize = 16;

/// The teacher and the student with the smaller vocabulary, in which the flow goes on.
pub fn run<'a>(
    flow: &mut Flow<'a>,
    narrowed: &'a Narrowed,
    teacher: &Student,
    student: &Student,
) -> Result<(Student, Student)> {
    let (before, map) = (flow.corpus, &narrowed.map);
    flow.narrow(narrowed)?;
    let hash = narrowed.corpus.tokenizer.hash();
    let small = Student {
        model: prune_vocabulary(&teacher.model, &map.kept)?,
        state: teacher.state.clone(),
        fingerprint: fingerprint(&[&teacher.fingerprint, hash, "vocabulary"]),
        measured: None,
    };
    let student = flow.stage("vocabulary", &[&student.fingerprint, hash, "vocabulary"], false, |_| {
        let model = prune_vocabulary(&student.model, &map.kept)?;
        let invariants = vec![encodes(before, narrowed), answers(before, map, (&student.model, &model))?];
        let notes = vec![format!("{} of {} tokens kept", map.kept.len(), map.before)];
        let (state, curves) = (student.state.clone(), Vec::new());
        Ok(Outcome { model, state, curves, notes, invariants, earlier_seconds: 0.0 })
    })?;
    Ok((small, student))
}

/// An example in the smaller vocabulary; `None` where a token of it is gone. Labels of a tagger are no tokens.
fn mapped(example: &Example, map: &VocabularyMap, tags: bool) -> Option<Example> {
    let ids = |old: &[u32]| old.iter().map(|&id| map.id(id)).collect::<Option<Vec<u32>>>();
    let labels = if tags { example.labels.clone() } else { ids(&example.labels)? };
    Some(Example { context: ids(&example.context)?, labels })
}

/// That text of kept tokens is encoded as the map says.
fn encodes(before: &Corpus, narrowed: &Narrowed) -> Invariant {
    let (corpus, tags) = (&narrowed.corpus, !before.labels.is_empty());
    let (mut same, mut other, mut gone) = (0, 0, 0);
    for (old, new) in [(&before.source, &corpus.source), (&before.target, &corpus.target)] {
        // Both in the order of the text; longer than allowed in smaller tokens, an example may be missing.
        let mut all = new.examples.iter().peekable();
        for example in &old.examples {
            match mapped(example, &narrowed.map, tags) {
                None => gone += 1,
                Some(wanted) => {
                    let found = all.by_ref().any(|new| *new == wanted);
                    same += usize::from(found);
                    other += usize::from(!found);
                }
            }
        }
    }
    Invariant {
        rule: "text of kept tokens is encoded with the mapped ids".into(),
        measured: format!("{same} examples are, {other} are not; {gone} are written with other tokens now"),
        holds: other == 0,
    }
}

/// That the smaller model's logits are the larger one's at the kept tokens.
fn answers(before: &Corpus, map: &VocabularyMap, (large, small): (&Model, &Model)) -> Result<Invariant> {
    let tags = !before.labels.is_empty();
    let pair = |example: &'_ Example| Some((example.clone(), mapped(example, map, tags)?));
    let pairs: Vec<(Example, Example)> = before.source.examples.iter().filter_map(pair).take(PROBE).collect();
    let rule = "logits are those of the kept tokens before".to_string();
    if pairs.is_empty() {
        return Ok(Invariant { rule, measured: "no example of kept tokens alone".into(), holds: true });
    }
    let logits = |model: &Model, examples: Vec<&Example>| -> Result<Vec<f64>> {
        // Special tokens come first in both vocabularies.
        let batch = upload(model.device(), &before.layout.assemble(&examples, before.special()))?;
        let mut pass = Pass::inference(model);
        let hidden = pass.hidden(&batch)?;
        pass.logits(&hidden)?.tensor.to_f64()
    };
    let old = logits(large, pairs.iter().map(|(old, _)| old).collect())?;
    let new = logits(small, pairs.iter().map(|(_, new)| new).collect())?;
    let of_tokens = |config: &Config| matches!(config.head, Head::Language { .. });
    let wanted: Vec<f64> = if of_tokens(&large.config) {
        old.chunks(map.before).flat_map(|row| map.kept.iter().map(|&id| row[id as usize])).collect()
    } else {
        old
    };
    let scale = wanted.iter().fold(f64::MIN_POSITIVE, |most, x| most.max(x.abs()));
    let worst = wanted.iter().zip(&new).fold(0.0f64, |most, (a, b)| most.max((a - b).abs())) / scale;
    let holds = wanted.len() == new.len() && worst <= 1e-5;
    Ok(Invariant { rule, measured: format!("largest difference {worst:.1e} of the largest logit"), holds })
}
