//! Calibration without data: random tokens, and what the model itself says to random beginnings (LLM-QAT, Liu et al. 2023).

use std::ops::Range;

use crate::data::batch::Example;
use crate::error::Result;
use crate::nn::{Batch, Model, Pass};
use crate::rng::Stream;

/// Which examples are made.
#[derive(Clone, Debug)]
pub struct Request {
    /// Token ids that text is made of: special ones are left out.
    pub tokens: Range<u32>,
    /// Ends every context.
    pub mark: u32,
    pub examples: usize,
    /// Context tokens before the mark, and labels.
    pub lengths: (usize, usize),
    pub seed: u64,
}

fn drawn(stream: &mut Stream, tokens: &Range<u32>) -> u32 {
    tokens.start + stream.below(tokens.len()) as u32
}

/// Uniform tokens on both sides.
pub fn random(request: &Request) -> Vec<Example> {
    let mut stream = Stream::new(request.seed, 0xdf);
    let mut text = |length: usize| (0..length).map(|_| drawn(&mut stream, &request.tokens)).collect::<Vec<u32>>();
    let mut example = || {
        let context = text(request.lengths.0).into_iter().chain([request.mark]).collect();
        Example { context, labels: text(request.lengths.1) }
    };
    (0..request.examples).map(|_| example()).collect()
}

/// Random contexts with labels that the model draws token by token from its own distribution. `assemble` makes a batch of
/// examples; what the label tokens of a row are given as is left to it.
///
/// # Errors
/// What the passes give.
pub fn self_generated(
    model: &Model,
    request: &Request,
    assemble: &dyn Fn(&[Example]) -> Result<Batch>,
) -> Result<Vec<Example>> {
    let mut examples = random(request);
    examples.iter_mut().for_each(|e| e.labels.clear());
    let mut stream = Stream::new(request.seed, 0x5e1f);
    for _ in 0..request.lengths.1 {
        // The newest label stands for the one to be drawn: a row's inputs end with the label before it.
        let open: Vec<Example> = examples.iter().map(|e| with_label(e, request.tokens.start)).collect();
        let batch = assemble(&open)?;
        let mut pass = Pass::inference(model);
        let hidden = pass.hidden(&batch)?;
        let logits = pass.logits(&hidden)?.tensor;
        let (length, vocabulary) = (batch.tokens.dims()[1], logits.shape().last());
        let values = logits.to_f64()?;
        for (row, example) in examples.iter_mut().enumerate() {
            let last = row * length + example.context.len() + example.labels.len();
            let scores = &values[last * vocabulary..(last + 1) * vocabulary];
            example.labels.push(sample(scores, &request.tokens, stream.uniform()));
        }
    }
    Ok(examples)
}

fn with_label(example: &Example, label: u32) -> Example {
    let labels = example.labels.iter().copied().chain([label]).collect();
    Example { context: example.context.clone(), labels }
}

/// The token whose share of the softmax over `tokens` holds the point `at` in 0 .. 1.
fn sample(scores: &[f64], tokens: &Range<u32>, at: f64) -> u32 {
    let ids: Vec<u32> = tokens.clone().filter(|&t| (t as usize) < scores.len()).collect();
    let highest = ids.iter().map(|&t| scores[t as usize]).fold(f64::NEG_INFINITY, f64::max);
    let weight = |t: u32| (scores[t as usize] - highest).exp();
    let mut rest = at * ids.iter().map(|&t| weight(t)).sum::<f64>();
    for &token in &ids {
        rest -= weight(token);
        if rest < 0.0 {
            return token;
        }
    }
    ids.last().copied().unwrap_or(tokens.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_follow_the_softmax() {
        let scores = [9.0, 0.0, (3.0f64).ln(), 0.0];
        let count =
            |token: u32| (0..1000).filter(|i| sample(&scores, &(1..4), f64::from(*i) / 1000.0) == token).count();
        assert_eq!([0, 1, 2, 3].map(count), [0, 200, 600, 200]);
        assert_eq!(sample(&scores, &(1..4), 0.999_999), 3);
    }

    #[test]
    fn random_text_is_ordinary_and_repeatable() {
        let request = Request { tokens: 5..37, mark: 4, examples: 50, lengths: (6, 3), seed: 2 };
        let examples = random(&request);
        assert!(examples.iter().all(|e| e.context.len() == 7 && e.context[6] == 4 && e.labels.len() == 3));
        assert!(examples.iter().flat_map(|e| &e.labels).all(|t| (5..37).contains(t)));
        assert_eq!(examples, random(&request));
    }
}
