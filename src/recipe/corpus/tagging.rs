//! The text of a tagger: generated sentences of both languages with a tag for each token. The spans are known exactly because
//! the sentences are generated (synthetic slots).

use super::{Corpus, HeldOut, Parts, Sentence, labelled, with_narrowed};
use crate::data::batch::{Example, Stream};
use crate::data::frame::Span;
use crate::data::split::{Fractions, Split};
use crate::data::tagging::{tag_names, tagged};
use crate::data::terms::{DEFAULT_COUNT, TermSentence, TermSet};
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::recipe::schema::{Family, Recipe};
use crate::train::store::CONFIG;

/// Tag names by id.
pub fn labels() -> Result<Vec<String>> {
    Ok(tag_names(TermSet::embedded()?.categories()))
}

/// Side of a sentence that is tagged.
type Side = fn(&TermSentence) -> (&str, &[Span]);

fn english(sentence: &TermSentence) -> (&str, &[Span]) {
    (&sentence.pair.source, &sentence.spans)
}

fn chinese(sentence: &TermSentence) -> (&str, &[Span]) {
    (&sentence.pair.target, &sentence.target_spans)
}

/// Two streams of tagged sentences: all training sentences in the source language, a share of them in the target language.
pub(super) fn prepare(recipe: &Recipe, count: usize) -> Result<Corpus> {
    let data = &recipe.data;
    let sentences = TermSet::embedded()?.expand(recipe.seed, count, Fractions::default())?;
    let part = |split: Split| -> Vec<TermSentence> { sentences.iter().filter(|s| s.split == split).cloned().collect() };
    let [mut train, validation, test] = [part(Split::Train), part(Split::Validation), part(Split::Test)];
    if data.limit > 0 {
        train = crate::recipe::evaluate::sample(&train, data.limit).into_iter().cloned().collect();
    }
    let pairs = |sentences: &[TermSentence]| sentences.iter().map(|s| s.pair.clone()).collect();
    let parts = Parts { train: pairs(&train), validation: pairs(&validation), test: pairs(&test), notes: Vec::new() };
    let tokenizer = Tokenizer::train(parts.texts(), data.vocabulary, &[&data.source, &data.target])?;
    let sentences = [&train[..], &validation, &test];
    with_narrowed(recipe, &parts, tokenizer, |tokenizer| encoded(recipe, &parts, sentences, tokenizer))
}

/// The tagged sentences of one side; those longer than `max_length` tokens are left out and counted.
fn stream(
    tokenizer: &Tokenizer,
    name: &str,
    sentences: &[TermSentence],
    side: Side,
    max_length: usize,
) -> Result<Stream> {
    let mut stream = Stream { name: name.into(), ..Stream::default() };
    for sentence in sentences {
        let (text, spans) = side(sentence);
        let example = tagged(tokenizer, text, spans)?;
        if example.tokens.len() > max_length {
            stream.dropped += 1;
        } else {
            stream.examples.push(Example { context: example.tokens, labels: example.tags });
        }
    }
    Ok(stream)
}

fn held_out(language: &str, validation: Stream, test: Stream) -> HeldOut {
    let sentence = |example: Example| Sentence { example, reference: String::new() };
    HeldOut {
        name: language.into(),
        target_language: language.into(),
        validation: validation.examples,
        test: test.examples.into_iter().map(sentence).collect(),
    }
}

/// Test sentences of the embedded terms for a tagger that is already trained, in the languages that its tokenizer knows.
///
/// # Errors
/// `Error::File` for a tagger of other labels.
pub fn for_evaluation(tokenizer: Tokenizer, own: &[String], max_length: usize) -> Result<Corpus> {
    let labels = labels()?;
    if own != labels {
        let rule = format!("{} labels, where the generated sentences have the {} of terms", own.len(), labels.len());
        return Err(Error::file(CONFIG, "head", rule));
    }
    let sentences = TermSet::embedded()?.expand(1, DEFAULT_COUNT, Fractions::default())?;
    let test: Vec<TermSentence> = sentences.into_iter().filter(|s| s.split == Split::Test).collect();
    let mut all = Vec::new();
    for (language, side) in [("en", english as Side), ("zh", chinese as Side)] {
        if tokenizer.language(language).is_ok() {
            let test = stream(&tokenizer, "test", &test, side, max_length)?;
            all.push(held_out(language, Stream::default(), test));
        }
    }
    Ok(Corpus {
        hash: String::new(),
        layout: Family::Tagger.layout(),
        labels,
        held_out: all,
        tokenizer,
        source: Stream::default(),
        target: Stream::default(),
        notes: Vec::new(),
        narrowed: None,
    })
}

/// The tagged sentences for training, validation and test in a tokenizer's ids.
fn encoded(
    recipe: &Recipe,
    parts: &Parts,
    [train, validation, test]: [&[TermSentence]; 3],
    tokenizer: Tokenizer,
) -> Result<Corpus> {
    let (data, count) = (&recipe.data, train.len() + validation.len() + test.len());
    let stream =
        |name: &str, sentences: &[TermSentence], side: Side| stream(&tokenizer, name, sentences, side, data.max_length);
    let shared = labelled(train, data.target_share, recipe.seed);
    let source = stream("source language", train, english)?;
    let target = stream("target language", &shared, chinese)?;
    let held_out = [(&data.source, english as Side), (&data.target, chinese as Side)].map(|(language, side)| {
        let (validation, test) = (stream("validation", validation, side)?, stream("test", test, side)?);
        Ok(held_out(language, validation, test))
    });
    let notes = vec![format!(
        "text: {count} generated sentences of computer terms (synthetic slots), {} tagged in {}, {} in {} for training; {} left \
         out as longer than {} tokens",
        source.examples.len(),
        data.source,
        target.examples.len(),
        data.target,
        source.dropped + target.dropped,
        data.max_length
    )];
    let corpus = Corpus {
        hash: parts.hash(),
        layout: recipe.model.family.layout(),
        labels: labels()?,
        held_out: held_out.into_iter().collect::<Result<_>>()?,
        tokenizer,
        source,
        target,
        notes,
        narrowed: None,
    };
    corpus.check_survivors(recipe, parts, shared.len())?;
    Ok(corpus)
}
