//! Generation with a key-value cache: greedy and beam search over a batch of prompts of different lengths.

use std::collections::BTreeMap;

use super::config::{Block, Positions};
use super::encoder::{self, Memory, Read};
use super::forward::{Batch, Cache, KeyValue, Pass, Reach, Source};
use super::model::{Model, missing};
use crate::dispatch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::cache::WriteRows;
use crate::shape::Meta;
use crate::tensor::Tensor;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decoding {
    /// First generated input, not part of the result.
    pub begin: u32,
    /// Ends a sequence, not part of the result.
    pub end: u32,
    pub max_tokens: usize,
    /// Hypotheses kept per prompt; 1 is greedy search.
    pub beams: usize,
    /// Scores are divided by length^penalty when hypotheses of different lengths are compared.
    pub length_penalty: f64,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    pub tokens: Vec<u32>,
    /// Sum of log-probabilities, the end token included.
    pub log_probability: f64,
    /// Whether the end token came before `max_tokens`.
    pub finished: bool,
}

/// Position and block position of generated input `i` after a context of `context` tokens.
fn position(model: &Model, context: usize, i: usize) -> (u32, u32) {
    match model.config.positions {
        // GLM: generated tokens stay at the [gMASK]'s position and count in the second dimension.
        Positions::Rotary2d => (context.saturating_sub(1) as u32, i as u32 + 1),
        _ => ((context + i) as u32, 0),
    }
}

/// Caches of all blocks as rows: row `b * capacity + s` holds key s of sequence b, a prefix first.
struct Rows {
    /// Of the decoding blocks that attend, by their places in the model.
    blocks: BTreeMap<usize, KeyValue>,
    capacity: usize,
    /// What an encoder made of the prompts, one row for each sequence.
    read: Option<Read>,
}

impl Rows {
    /// Takes over the keys and values of a prefill `[B, T, H, D]`.
    fn new(model: &Model, prefill: &BTreeMap<usize, KeyValue>, capacity: usize) -> Result<Self> {
        let device = model.device();
        let mut blocks = BTreeMap::new();
        for (&i, kv) in prefill {
            let [b, t, h, d] = kv.key.dims()[..] else {
                return Err(Error::Shape { op: "cache", rule: "[B, T, H, D]", got: kv.key.meta().to_string() });
            };
            let ids: Vec<u32> = (0..b * t).map(|r| (r / t * capacity + r % t) as u32).collect();
            let ids = Tensor::from_slice(device, &[b * t], &ids)?;
            let widen = |part: &Tensor| -> Result<Tensor> {
                let all = Tensor::zeros(device, Meta::new(&[b * capacity, h * d], part.dtype())?)?;
                dispatch::run(&WriteRows, &[&all, &part.reshape(&[b * t, h * d])?, &ids])?;
                all.reshape(&[b, capacity, h, d])
            };
            blocks.insert(i, KeyValue { key: widen(&kv.key)?, value: widen(&kv.value)? });
        }
        Ok(Self { blocks, capacity, read: None })
    }

    /// Of an encoder-decoder: nothing is decoded yet.
    fn after_reading(model: &Model, read: Read, capacity: usize) -> Result<Self> {
        let (config, b, dtype) = (&model.config, read.lengths.count(), model.get("embedding.tokens")?.dtype());
        let empty = |(i, block): (usize, &Block)| -> Result<(usize, KeyValue)> {
            let meta = Meta::new(&[b, capacity, block.heads, block.head_size], dtype)?;
            let zeros = || Tensor::zeros(model.device(), meta);
            Ok((i, KeyValue { key: zeros()?, value: zeros()? }))
        };
        let attending = config.blocks.iter().enumerate().skip(config.encoder).filter(|(_, block)| block.attends());
        let blocks = attending.map(empty).collect::<Result<_>>()?;
        Ok(Self { blocks, capacity, read: Some(read) })
    }

    /// Sequence `i` becomes a copy of sequence `from[i]`.
    fn reorder(&mut self, from: &[u32]) -> Result<()> {
        // Sequences take the place of others of the same prompt only, so what was read is copied once.
        if let Some(read) = self.read.as_mut().filter(|read| read.lengths.count() != from.len()) {
            read.reorder(from)?;
        }
        self.blocks.values_mut().try_for_each(|kv| encoder::reorder(kv, from))
    }
}

/// Log-probabilities `[rows][V]` of the next token.
type NextTokens = Vec<Vec<f64>>;

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - max).exp()).sum();
    logits.iter().map(|&x| f64::from(x - max) - sum.ln()).collect()
}

/// Runs the contexts, keeping keys and values of every block.
fn prefill(model: &Model, prompts: &[&[u32]], capacity: usize) -> Result<Rows> {
    let device = model.device();
    let (b, t) = (prompts.len(), prompts.iter().map(|p| p.len()).max().unwrap_or(0));
    let mut tokens = vec![0u32; b * t];
    for (row, prompt) in prompts.iter().enumerate() {
        tokens[row * t..row * t + prompt.len()].copy_from_slice(prompt);
    }
    let positions: Vec<u32> = (0..b * t).map(|i| (i % t) as u32).collect();
    let lengths: Vec<u32> = prompts.iter().map(|p| p.len() as u32).collect();
    let lengths = Tensor::from_slice(device, &[b], &lengths)?;
    let tokens = Tensor::from_slice(device, &[b, t], &tokens)?;
    if model.config.encoder > 0 {
        return Rows::after_reading(model, Read::new(model, Source { tokens, lengths })?, capacity);
    }
    let batch = Batch {
        tokens,
        positions: Tensor::from_slice(device, &[b, t], &positions)?,
        block_positions: Some(Tensor::zeros(device, Meta::new(&[b, t], DType::U32)?)?),
        context: Some(lengths.clone()),
        lengths: Some(lengths),
        source: None,
    };
    let mut caches = BTreeMap::new();
    Pass::inference(model).run(&batch, Cache::Collect(&mut caches))?;
    Rows::new(model, &caches, model.prefix_length() + capacity)
}

/// Feeds one token per sequence; `contexts` are the prompt lengths, `i` how many tokens were fed before.
fn advance(model: &Model, rows: &mut Rows, contexts: &[usize], fed: &[u32], i: usize) -> Result<NextTokens> {
    let device = model.device();
    let b = fed.len();
    let column = |values: Vec<u32>| Tensor::from_slice(device, &[b, 1], &values);
    let at: Vec<(u32, u32)> = contexts.iter().map(|&c| position(model, c, i)).collect();
    let batch = Batch {
        tokens: column(fed.to_vec())?,
        positions: column(at.iter().map(|p| p.0).collect())?,
        block_positions: Some(column(at.iter().map(|p| p.1).collect())?),
        context: None,
        lengths: None,
        source: None,
    };
    let before = model.prefix_length();
    let lengths: Vec<u32> = contexts.iter().map(|c| (before + c + i + 1) as u32).collect();
    let place = |(r, c): (usize, &usize)| (r * rows.capacity + before + c + i) as u32;
    let targets: Vec<u32> = contexts.iter().enumerate().map(place).collect();
    let targets = Tensor::from_slice(device, &[b], &targets)?;
    let lengths = Tensor::from_slice(device, &[b], &lengths)?;
    let mut extend = |block: usize, key: &Tensor, value: &Tensor| -> Result<KeyValue> {
        let kv = rows.blocks.get(&block).ok_or_else(|| missing(&format!("blocks.{block}.attention")))?;
        for (all, new) in [(&kv.key, key), (&kv.value, value)] {
            let [_, _, h, d] = new.dims()[..] else {
                return Err(Error::Shape { op: "cache", rule: "[B, 1, H, D]", got: new.meta().to_string() });
            };
            let flat = all.reshape(&[b * rows.capacity, h * d])?;
            dispatch::run(&WriteRows, &[&flat, &new.reshape(&[b, h * d])?, &targets])?;
        }
        Ok(kv.clone())
    };
    let mut pass = Pass::inference(model);
    pass.memory = rows.read.as_ref().map(Memory::Read);
    let hidden = pass.run(&batch, Cache::Extend(&mut extend, Reach { lengths, position: i }))?;
    let logits = pass.logits(&hidden)?.tensor.to_vec::<f32>()?;
    Ok(logits.chunks(logits.len() / b.max(1)).map(log_softmax).collect())
}

/// The `k` most probable tokens, lowest id first among equals.
fn top(log_probabilities: &[f64], k: usize) -> Vec<(usize, f64)> {
    let mut best: Vec<(usize, f64)> = Vec::with_capacity(k + 1);
    for (id, &p) in log_probabilities.iter().enumerate() {
        let place = best.partition_point(|&(_, q)| q >= p);
        if place < k {
            best.insert(place, (id, p));
            best.truncate(k);
        }
    }
    best
}

#[derive(Clone)]
struct Hypothesis {
    tokens: Vec<u32>,
    score: f64,
    finished: bool,
}

impl Hypothesis {
    fn rank(&self, penalty: f64) -> f64 {
        self.score / ((self.tokens.len() + 1) as f64).powf(penalty)
    }
}

/// Continues each prompt (token ids of its context) until the end token or `max_tokens`.
///
/// # Errors
/// `Error::Shape` for an empty prompt or one that leaves no room below `max_positions`.
pub fn generate(model: &Model, prompts: &[&[u32]], decoding: &Decoding) -> Result<Vec<Generation>> {
    if prompts.is_empty() {
        return Ok(Vec::new());
    }
    let longest = prompts.iter().map(|p| p.len()).max().unwrap_or(0);
    let room = model.config.max_positions;
    if prompts.iter().any(|p| p.is_empty()) || longest + decoding.max_tokens > room {
        let got = format!("prompts up to {longest} tokens plus {} to generate, of {room}", decoding.max_tokens);
        return Err(Error::Shape { op: "generate", rule: "no empty prompt, and room below max_positions", got });
    }
    let k = decoding.beams.max(1);
    let mut rows = prefill(model, prompts, longest + decoding.max_tokens)?;
    if k > 1 {
        let from: Vec<u32> = (0..prompts.len() * k).map(|r| (r / k) as u32).collect();
        rows.reorder(&from)?;
    }
    // An encoder-decoder has its prompts elsewhere.
    let fed_before = |prompt: &[u32]| if model.config.encoder > 0 { 0 } else { prompt.len() };
    let contexts: Vec<usize> = (0..prompts.len() * k).map(|r| fed_before(prompts[r / k])).collect();
    let empty = Hypothesis { tokens: Vec::new(), score: 0.0, finished: false };
    let mut beams = vec![vec![empty; 1]; prompts.len()];
    let mut fed = vec![decoding.begin; prompts.len() * k];
    for i in 0..decoding.max_tokens {
        let next = advance(model, &mut rows, &contexts, &fed, i)?;
        let mut from = Vec::with_capacity(fed.len());
        for (p, beam) in beams.iter_mut().enumerate() {
            let parents = extend_beam(beam, &next[p * k..(p + 1) * k], decoding, k);
            for slot in 0..k {
                // Unused slots (one hypothesis at the first step) repeat a live one; their scores are never read.
                let (parent, token) = parents.get(slot).copied().unwrap_or((0, decoding.end));
                from.push((p * k + parent) as u32);
                fed[p * k + slot] = token;
            }
        }
        if beams.iter().flatten().all(|h| h.finished) {
            break;
        }
        if k > 1 {
            rows.reorder(&from)?;
        }
    }
    let best = |beam: Vec<Hypothesis>| {
        let rank = |h: &Hypothesis| h.rank(decoding.length_penalty);
        beam.into_iter().reduce(|a, b| if rank(&b) > rank(&a) { b } else { a })
    };
    let finish = |h: Hypothesis| Generation { tokens: h.tokens, log_probability: h.score, finished: h.finished };
    Ok(beams.into_iter().filter_map(best).map(finish).collect())
}

/// Replaces a beam by its `k` best continuations; returns each one's parent slot and last token.
fn extend_beam(beam: &mut Vec<Hypothesis>, next: &[Vec<f64>], decoding: &Decoding, k: usize) -> Vec<(usize, u32)> {
    let mut candidates: Vec<(Hypothesis, usize, u32)> = Vec::new();
    for (slot, hypothesis) in beam.iter().enumerate() {
        if hypothesis.finished {
            candidates.push((hypothesis.clone(), slot, decoding.end));
            continue;
        }
        for (id, p) in top(&next[slot], k) {
            let mut grown = hypothesis.clone();
            grown.score += p;
            if id as u32 == decoding.end {
                grown.finished = true;
            } else {
                grown.tokens.push(id as u32);
            }
            candidates.push((grown, slot, id as u32));
        }
    }
    // A stable sort keeps the earlier slot and the lower id first among equals.
    candidates.sort_by(|a, b| b.0.rank(decoding.length_penalty).total_cmp(&a.0.rank(decoding.length_penalty)));
    candidates.truncate(k);
    let parents = candidates.iter().map(|(_, slot, token)| (*slot, *token)).collect();
    *beam = candidates.into_iter().map(|(h, _, _)| h).collect();
    parents
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn top_prefers_the_lowest_id_among_equals() {
        assert_eq!(top(&[0.1, 0.5, 0.5, 0.2], 2), [(1, 0.5), (2, 0.5)]);
        assert_eq!(top(&[0.1], 3), [(0, 0.1)]);
    }

    #[test]
    fn log_softmax_normalises() {
        let p: f64 = log_softmax(&[1.0, 2.0, 500.0]).iter().map(|l| l.exp()).sum();
        approx::assert_relative_eq!(p, 1.0, max_relative = 1e-12);
    }
}
