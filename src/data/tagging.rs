//! Token tagging for a BERT-like encoder: which tokens of an English sentence name a term, and of which category, as BIO tags.
//! The spans are known exactly because the sentences were generated; every report on it says "synthetic slots".

use super::batch::{IGNORE, LENGTH_MULTIPLE};
use super::bucket::{self, EpochCache};
use super::frame::Span;
use super::order;
use super::terms::TermSentence;
use super::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// Tag names by id: `O`, then `B-` and `I-` of each category.
pub fn tag_names(categories: &[String]) -> Vec<String> {
    let pairs = categories.iter().flat_map(|c| [format!("B-{c}"), format!("I-{c}")]);
    std::iter::once("O".to_string()).chain(pairs).collect()
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagExample {
    pub tokens: Vec<u32>,
    /// One tag per token, indices into [`tag_names`].
    pub tags: Vec<u32>,
}

/// Encodes sentences; the first token of a term is `B`, the others `I`.
pub fn examples<'a>(
    tokenizer: &Tokenizer,
    sentences: impl IntoIterator<Item = &'a TermSentence>,
) -> Result<Vec<TagExample>> {
    sentences.into_iter().map(|s| tagged(tokenizer, &s.pair.source, &s.spans)).collect()
}

/// Tags one text by the spans of its terms.
pub fn tagged(tokenizer: &Tokenizer, text: &str, spans: &[Span]) -> Result<TagExample> {
    let mut example = TagExample { tokens: Vec::new(), tags: Vec::new() };
    let mut before = None;
    for (token, range) in tokenizer.encode_with_ranges(text)? {
        // A leading space is part of its token, so a token belongs to a span as soon as they share a byte.
        let inside = spans.iter().position(|s| range.start < s.end && range.end > s.start);
        example.tokens.push(token);
        example.tags.push(match inside {
            None => 0,
            Some(span) => {
                let category = spans[span].category as u32;
                1 + 2 * category + u32::from(before == Some(span))
            }
        });
        before = inside;
    }
    Ok(example)
}

/// One batch, B = `rows`, T = `columns` (a multiple of 8).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TagBatch {
    pub rows: usize,
    pub columns: usize,
    /// [B, T], right-padded.
    pub tokens: Vec<u32>,
    /// [B], tokens that are no padding.
    pub lengths: Vec<u32>,
    /// [B, T], [`IGNORE`] in padding.
    pub tags: Vec<u32>,
    /// Tags that are not [`IGNORE`].
    pub token_count: usize,
}

/// Tagging batches addressed by step; every example once per epoch.
#[derive(Clone, Debug)]
pub struct TagBatches {
    examples: Vec<TagExample>,
    rows: usize,
    pad: u32,
    seed: u64,
    cache: EpochCache,
}

impl TagBatches {
    /// Errors when there is no example or `rows` is 0.
    pub fn new(examples: Vec<TagExample>, rows: usize, pad: u32, seed: u64) -> Result<Self> {
        if examples.is_empty() || rows == 0 {
            let (parameter, value) = ("examples and rows", format!("{} and {rows}", examples.len()));
            return Err(Error::Parameter { op: "tagging", parameter, value, allowed: "1 or more each" });
        }
        Ok(Self { examples, rows, pad, seed, cache: EpochCache::default() })
    }

    pub fn steps_per_epoch(&self) -> u64 {
        self.examples.len().div_ceil(self.rows) as u64
    }

    /// The batch of a step, counted from 0 over all epochs.
    pub fn batch(&mut self, step: u64) -> TagBatch {
        let (examples, rows, seed) = (&self.examples, self.rows, self.seed);
        let chosen = self.cache.at(step, examples.len().div_ceil(rows) as u64, |epoch| {
            let draws = (0..examples.len() as u32).collect();
            bucket::epoch(order::hash(seed, epoch), draws, rows, |e| examples[e as usize].tokens.len())
        });
        let chosen: Vec<&TagExample> = chosen.iter().filter_map(|&e| examples.get(e as usize)).collect();
        let longest = chosen.iter().map(|e| e.tokens.len()).max().unwrap_or(0);
        let columns = longest.next_multiple_of(LENGTH_MULTIPLE);
        let mut batch = TagBatch {
            rows: chosen.len(),
            columns,
            tokens: vec![self.pad; chosen.len() * columns],
            lengths: Vec::new(),
            tags: vec![IGNORE; chosen.len() * columns],
            token_count: 0,
        };
        for (row, example) in chosen.iter().enumerate() {
            let place = row * columns..row * columns + example.tokens.len();
            batch.tokens[place.clone()].copy_from_slice(&example.tokens);
            batch.tags[place].copy_from_slice(&example.tags);
            batch.lengths.push(example.tokens.len() as u32);
            batch.token_count += example.tokens.len();
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::super::split::Fractions;
    use super::super::terms::TermSet;
    use super::*;

    fn setup() -> (TermSet, Vec<TermSentence>, Tokenizer) {
        let set = TermSet::embedded().unwrap();
        let sentences = set.expand(1, 3000, Fractions::default()).unwrap();
        let tokenizer = Tokenizer::train(sentences.iter().map(|s| s.pair.source.as_str()), 800, &["en"]).unwrap();
        (set, sentences, tokenizer)
    }

    #[test]
    fn tags_give_back_exactly_the_terms() {
        let (set, sentences, tokenizer) = setup();
        let names = tag_names(set.categories());
        assert_eq!(names.len(), 1 + 2 * set.categories().len());
        for (sentence, example) in sentences.iter().zip(examples(&tokenizer, &sentences).unwrap()) {
            let mut found: Vec<(String, Vec<u32>)> = Vec::new();
            for (&token, &tag) in example.tokens.iter().zip(&example.tags) {
                match names[tag as usize].split_at(names[tag as usize].len().min(2)) {
                    ("B-", category) => found.push((category.to_string(), vec![token])),
                    ("I-", category) => {
                        let last = found.last_mut().expect("I follows B");
                        assert_eq!(last.0, category);
                        last.1.push(token);
                    }
                    _ => {}
                }
            }
            let expected: Vec<(String, String)> = sentence
                .spans
                .iter()
                .map(|s| (set.categories()[s.category].clone(), sentence.pair.source[s.start..s.end].to_string()))
                .collect();
            let found: Vec<(String, String)> = found
                .into_iter()
                // One token may hold the end of a term and the punctuation after it ("C++.").
                .map(|(c, t)| (c, tokenizer.decode(&t).unwrap().trim().trim_end_matches(['.', '?']).to_string()))
                .collect();
            assert_eq!(found, expected, "{}", sentence.pair.source);
        }
    }

    #[test]
    fn batches_cover_everything_once_and_repeat() {
        let (_, sentences, tokenizer) = setup();
        let examples = examples(&tokenizer, &sentences).unwrap();
        let tokens: usize = examples.iter().map(|e| e.tokens.len()).sum();
        let mut batches = TagBatches::new(examples, 32, tokenizer.special().pad, 5).unwrap();
        let mut counted = 0;
        for step in 0..batches.steps_per_epoch() {
            let batch = batches.batch(step);
            assert_eq!((batch.columns % 8, batch.tokens.len()), (0, batch.rows * batch.columns));
            assert_eq!(batch.tags.iter().filter(|&&t| t != IGNORE).count(), batch.token_count);
            counted += batch.token_count;
        }
        assert_eq!(counted, tokens);
        let late = batches.batch(1000);
        assert_eq!(batches.batch(3), batches.clone().batch(3));
        assert_eq!(late, batches.batch(1000));
        assert!(TagBatches::new(Vec::new(), 1, 0, 0).is_err());
    }
}
