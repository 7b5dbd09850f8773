//! Training batches of a GLM prefix-LM (LightChatGLM's base model), as plain vectors in row-major order.
//!
//! One example is `<from> <to> source [gMASK]` (the context, seen in both directions) followed by `[bos] target`, with the
//! target and `[eos]` as labels shifted by one. The 2-D positions are those of GLM (Du et al. 2022): the context counts
//! 0, 1, ... in block 0; the generated part stands at the mask's position and counts 1, 2, ... in the block id.

use super::Pair;
use super::bucket::{self, EpochCache};
use super::order;
use super::tokenizer::{SpecialIds, Tokenizer};
use crate::error::{Error, Result};

/// Label of a position that has none.
pub const IGNORE: u32 = u32::MAX;
/// Row lengths are padded to a multiple of this.
pub const LENGTH_MULTIPLE: usize = 8;

/// Position ids of the generated part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GmaskPosition {
    /// All at the index of the mask token.
    MaskIndex,
    /// Counting on after the context, as early ChatGLM code does for `[gMASK]`.
    Continue,
}

/// What happens to an example that is longer than the cap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OverLength {
    Drop,
    /// The longer side loses its end; a cut target has no `[eos]`.
    Truncate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    Forward,
    Backward,
    Both,
}

#[derive(Clone, Debug)]
pub struct BatchOptions {
    pub rows: usize,
    /// Cap on the tokens of one row, context and target together.
    pub max_length: usize,
    pub gmask: GmaskPosition,
    pub over_length: OverLength,
    pub seed: u64,
}

impl Default for BatchOptions {
    /// Batch 32, length 128: the downstream setting of LightChatGLM.
    fn default() -> Self {
        let (gmask, over_length) = (GmaskPosition::MaskIndex, OverLength::Drop);
        Self { rows: 32, max_length: 128, gmask, over_length, seed: 1 }
    }
}

impl BatchOptions {
    fn check(&self) -> Result<()> {
        if self.rows == 0 {
            return Err(parameter("rows", self.rows, "1 or more"));
        }
        if self.max_length < LENGTH_MULTIPLE {
            return Err(parameter("max_length", self.max_length, "8 or more"));
        }
        Ok(())
    }
}

fn parameter(parameter: &'static str, value: impl ToString, allowed: &'static str) -> Error {
    Error::Parameter { op: "batch", parameter, value: value.to_string(), allowed }
}

/// Token ids of one example: the context up to and with `[gMASK]`, and the labels (target and `[eos]`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    pub context: Vec<u32>,
    pub labels: Vec<u32>,
}

impl Example {
    /// Input positions: the context, then `[bos]` and all labels but the last.
    pub fn length(&self) -> usize {
        self.context.len() + self.labels.len()
    }
}

/// The context of a text to translate; generation continues it with `[bos]`.
pub fn context(tokenizer: &Tokenizer, from: &str, to: &str, text: &str) -> Result<Vec<u32>> {
    let mut context = vec![tokenizer.language(from)?, tokenizer.language(to)?];
    context.extend(tokenizer.encode(text)?);
    context.push(tokenizer.special().gmask);
    Ok(context)
}

/// A named source of examples: one language direction, one corpus.
#[derive(Clone, Debug, Default)]
pub struct Stream {
    pub name: String,
    pub examples: Vec<Example>,
    /// Examples left out because they were too long.
    pub dropped: u64,
    /// Examples that lost their end.
    pub truncated: u64,
}

impl Stream {
    /// Encodes pairs whose sides are in `languages.0` and `languages.1`; `Both` makes two examples of each pair.
    pub fn translation(
        name: &str,
        tokenizer: &Tokenizer,
        pairs: &[Pair],
        languages: (&str, &str),
        direction: Direction,
        options: &BatchOptions,
    ) -> Result<Self> {
        options.check()?;
        let mut stream = Self { name: name.to_string(), ..Self::default() };
        for pair in pairs {
            let (source, target) = ((languages.0, &pair.source), (languages.1, &pair.target));
            if direction != Direction::Backward {
                stream.push(tokenizer, source, target, options)?;
            }
            if direction != Direction::Forward {
                stream.push(tokenizer, target, source, options)?;
            }
        }
        Ok(stream)
    }

    fn push(
        &mut self,
        tokenizer: &Tokenizer,
        (from, source): (&str, &String),
        (to, target): (&str, &String),
        options: &BatchOptions,
    ) -> Result<()> {
        let mut context = context(tokenizer, from, to, source)?;
        let mut labels = tokenizer.encode(target)?;
        labels.push(tokenizer.special().eos);
        if context.len() + labels.len() > options.max_length {
            if options.over_length == OverLength::Drop {
                self.dropped += 1;
                return Ok(());
            }
            let half = options.max_length / 2;
            let kept = options.max_length.saturating_sub(labels.len()).max(half).min(context.len());
            labels.truncate(options.max_length - kept);
            // The mask token ends the context whatever is cut.
            context.truncate(kept - 1);
            context.push(tokenizer.special().gmask);
            self.truncated += 1;
        }
        self.examples.push(Example { context, labels });
        Ok(())
    }

    /// How many examples have a context that `other` has too: training data that leaked into evaluation.
    pub fn overlap(&self, other: &Stream) -> usize {
        let known: std::collections::BTreeSet<&[u32]> = other.examples.iter().map(|e| e.context.as_slice()).collect();
        self.examples.iter().filter(|e| known.contains(e.context.as_slice())).count()
    }
}

/// One batch, B = `rows`, T = `columns` (a multiple of 8).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub rows: usize,
    pub columns: usize,
    /// [B, T], right-padded.
    pub tokens: Vec<u32>,
    /// [B], tokens before `[bos]`: attention is bidirectional over them and causal after.
    pub context_lengths: Vec<u32>,
    /// [B], tokens that are no padding.
    pub lengths: Vec<u32>,
    /// [B, T], the token to predict at each position; [`IGNORE`] in the context and in padding.
    pub targets: Vec<u32>,
    /// [B, T], first rotary coordinate.
    pub positions: Vec<u32>,
    /// [B, T], second rotary coordinate.
    pub blocks: Vec<u32>,
    /// What an encoder reads, where there is one.
    pub source: Option<SourceRows>,
    /// Labels that are not [`IGNORE`].
    pub token_count: usize,
}

/// The encoder's side of a batch, S = `columns`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceRows {
    pub columns: usize,
    /// [B, S], right-padded.
    pub tokens: Vec<u32>,
    /// [B], tokens that are no padding.
    pub lengths: Vec<u32>,
}

impl Batch {
    /// Some of its rows, as wide as they are.
    #[must_use]
    pub fn rows_of(&self, rows: std::ops::Range<usize>) -> Self {
        let all = |values: &[u32]| values[rows.start * self.columns..rows.end * self.columns].to_vec();
        let targets = all(&self.targets);
        Self {
            rows: rows.len(),
            columns: self.columns,
            tokens: all(&self.tokens),
            context_lengths: self.context_lengths[rows.clone()].to_vec(),
            lengths: self.lengths[rows.clone()].to_vec(),
            positions: all(&self.positions),
            blocks: all(&self.blocks),
            source: self.source.as_ref().map(|source| SourceRows {
                columns: source.columns,
                tokens: source.tokens[rows.start * source.columns..rows.end * source.columns].to_vec(),
                lengths: source.lengths[rows.clone()].to_vec(),
            }),
            token_count: targets.iter().filter(|&&t| t != IGNORE).count(),
            targets,
        }
    }

    /// Lays out examples in the given order.
    pub fn assemble(examples: &[&Example], special: SpecialIds, gmask: GmaskPosition) -> Self {
        let longest = examples.iter().map(|e| e.length()).max().unwrap_or(0);
        let columns = longest.next_multiple_of(LENGTH_MULTIPLE);
        let size = examples.len() * columns;
        let mut batch = Self {
            rows: examples.len(),
            columns,
            tokens: vec![special.pad; size],
            context_lengths: Vec::with_capacity(examples.len()),
            lengths: Vec::with_capacity(examples.len()),
            targets: vec![IGNORE; size],
            positions: vec![0; size],
            blocks: vec![0; size],
            source: None,
            token_count: 0,
        };
        for (row, example) in examples.iter().enumerate() {
            let (start, context) = (row * columns, example.context.len());
            let generated = [special.bos].into_iter().chain(example.labels.iter().copied());
            let input = example.context.iter().copied().chain(generated).take(example.length());
            for (i, token) in input.enumerate() {
                let at = start + i;
                batch.tokens[at] = token;
                batch.positions[at] = i as u32;
                if i >= context {
                    batch.targets[at] = example.labels[i - context];
                    batch.blocks[at] = (i - context + 1) as u32;
                    if gmask == GmaskPosition::MaskIndex {
                        batch.positions[at] = context.saturating_sub(1) as u32;
                    }
                }
            }
            batch.context_lengths.push(context as u32);
            batch.lengths.push(example.length() as u32);
            batch.token_count += example.labels.len();
        }
        batch
    }
}

/// Batches addressed by step.
#[derive(Clone, Debug)]
pub struct Batches {
    examples: Vec<Example>,
    /// With a second stream: where it starts, and the probability of drawing from the first.
    mixture: Option<(usize, f64)>,
    special: SpecialIds,
    options: BatchOptions,
    cache: EpochCache,
}

impl Batches {
    /// Every example once per epoch. Errors when the stream is empty.
    pub fn new(stream: Stream, special: SpecialIds, options: BatchOptions) -> Result<Self> {
        options.check()?;
        if stream.examples.is_empty() {
            return Err(parameter("stream", stream.name, "a stream with at least one example"));
        }
        Ok(Self { examples: stream.examples, mixture: None, special, options, cache: EpochCache::default() })
    }

    /// Random mix: each draw is from `first` with probability `alpha`. An epoch has as many draws as there are examples; within
    /// one, a stream repeats an example only when it is used up.
    pub fn mixed(
        first: Stream,
        second: Stream,
        alpha: f64,
        special: SpecialIds,
        options: BatchOptions,
    ) -> Result<Self> {
        if !(0.0..=1.0).contains(&alpha) {
            return Err(parameter("alpha", alpha, "0 to 1"));
        }
        let boundary = first.examples.len();
        let mut batches = Self::new(first, special, options.clone())?;
        batches.examples.extend(Self::new(second, special, options)?.examples);
        batches.mixture = Some((boundary, alpha));
        Ok(batches)
    }

    pub fn steps_per_epoch(&self) -> u64 {
        self.examples.len().div_ceil(self.options.rows) as u64
    }

    /// Which examples a step takes, by their position in the stream (of two, the first one's come first). The same step gives the
    /// same examples, in any order of calls.
    pub fn indices(&mut self, step: u64) -> Vec<u32> {
        let (examples, mixture, options) = (&self.examples, self.mixture, &self.options);
        let per_epoch = examples.len().div_ceil(options.rows) as u64;
        let chosen = self.cache.at(step, per_epoch, |epoch| {
            let seed = order::hash(options.seed, epoch);
            let draws = match mixture {
                None => (0..examples.len() as u32).collect(),
                Some((boundary, alpha)) => mixed_draws(seed, examples.len(), boundary, alpha),
            };
            bucket::epoch(seed, draws, options.rows, |e| examples[e as usize].length())
        });
        chosen.to_vec()
    }

    /// The batch of a step, counted from 0 over all epochs.
    pub fn batch(&mut self, step: u64) -> Batch {
        let chosen = self.indices(step);
        let chosen: Vec<&Example> = chosen.iter().filter_map(|&e| self.examples.get(e as usize)).collect();
        Batch::assemble(&chosen, self.special, self.options.gmask)
    }
}

fn mixed_draws(seed: u64, total: usize, boundary: usize, alpha: f64) -> Vec<u32> {
    let mut streams: [Vec<u32>; 2] = [(0..boundary as u32).collect(), (boundary as u32..total as u32).collect()];
    let seed = order::hash(seed, 2);
    for (number, stream) in streams.iter_mut().enumerate() {
        order::shuffle(order::hash(seed, number as u64), stream);
    }
    let mut used = [0usize; 2];
    (0..total as u64)
        .map(|draw| {
            let number = usize::from(order::unit(seed, draw) >= alpha);
            let at = used[number] % streams[number].len();
            used[number] += 1;
            streams[number][at]
        })
        .collect()
}
