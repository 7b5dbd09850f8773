//! Two stacks: an encoder reads the source, and each block of the decoder looks at what it made of it.

use std::collections::BTreeMap;

use super::config::Positions;
use super::forward::{Batch, Cache, KeyValue, Pass, Place, Source};
use super::model::{Model, missing};
use crate::dispatch;
use crate::error::{Error, Result};
use crate::ops::attention::{Attention, Mask};
use crate::ops::layout::GatherRows;
use crate::ops::relative::{RelativeBias, Span};
use crate::tape::Var;
use crate::tensor::Tensor;

/// What the decoder looks at.
pub(super) enum Memory<'m> {
    /// The encoder's last hidden states `[B, S, d]` and the valid lengths u32 `[B]`.
    States(Box<Var>, Tensor),
    /// Keys and values of them, made once for many passes.
    Read(&'m Read),
}

/// Keys and values of the source `[B, S, H, D]` for each block of the decoder that looks at it, by its place in the model, and
/// valid lengths u32 `[B]`.
pub(super) struct Read {
    pub blocks: BTreeMap<usize, KeyValue>,
    pub lengths: Tensor,
}

impl Read {
    /// Runs the encoder.
    pub fn new(model: &Model, source: Source) -> Result<Self> {
        let mut pass = Pass::inference(model);
        let lengths = source.lengths.clone();
        let states = pass.encoder_states(&source)?;
        let first = model.config.encoder;
        let looks = |i: &usize| model.config.cross(*i).is_some();
        let blocks = (first..model.config.blocks.len()).filter(looks).map(|i| {
            let (key, value) = pass.source_keys(i, &states)?;
            Ok((i, KeyValue { key: key.tensor, value: value.tensor }))
        });
        Ok(Self { blocks: blocks.collect::<Result<_>>()?, lengths })
    }

    /// Row `i` becomes a copy of row `from[i]`.
    pub fn reorder(&mut self, from: &[u32]) -> Result<()> {
        let lengths = self.lengths.to_vec::<u32>()?;
        let lengths: Vec<u32> = from.iter().filter_map(|&r| lengths.get(r as usize).copied()).collect();
        self.lengths = Tensor::from_slice(self.lengths.device(), &[lengths.len()], &lengths)?;
        self.blocks.values_mut().try_for_each(|kv| reorder(kv, from))
    }
}

/// Sequence `i` of keys and values `[B, S, H, D]` becomes a copy of sequence `from[i]`.
pub(super) fn reorder(kv: &mut KeyValue, from: &[u32]) -> Result<()> {
    let ids = Tensor::from_slice(kv.key.device(), &[from.len()], from)?;
    for part in [&mut kv.key, &mut kv.value] {
        let [b, s, h, d] = part.dims()[..] else {
            return Err(Error::Shape { op: "cache", rule: "[B, S, H, D]", got: part.meta().to_string() });
        };
        let flat = part.reshape(&[b, s * h * d])?;
        *part = dispatch::run_one(&GatherRows, &[&flat, &ids])?.reshape(&[from.len(), s, h, d])?;
    }
    Ok(())
}

impl Pass<'_> {
    /// The encoder's last hidden states `[B, S, d]` of a batch's source.
    ///
    /// # Errors
    /// `Error::Shape` without a source.
    pub fn encoded(&mut self, batch: &Batch) -> Result<Var> {
        let source = batch.source.as_ref().ok_or_else(|| Error::Shape {
            op: "encoder",
            rule: "an encoder-decoder needs a source",
            got: "none".into(),
        })?;
        let states = self.encoder_states(source)?;
        self.memory = Some(Memory::States(Box::new(states.clone()), source.lengths.clone()));
        Ok(states)
    }

    fn encoder_states(&mut self, source: &Source) -> Result<Var> {
        let batch = Batch {
            tokens: source.tokens.clone(),
            // Relative positions are told by shapes.
            positions: source.tokens.clone(),
            block_positions: None,
            context: None,
            lengths: Some(source.lengths.clone()),
            source: None,
        };
        let mut states = self.enter_stack(0, &batch, 0)?;
        for i in 0..self.model.config.encoder {
            states = self.block(i, states, &batch, &mut Cache::None)?;
        }
        Ok(states.normed)
    }

    /// Keys and values `[B, S, H, D]` of the source for block `i`.
    fn source_keys(&mut self, i: usize, states: &Var) -> Result<(Var, Var)> {
        let block = &self.model.config.blocks[i];
        let heads = [states.dims()[0], states.dims()[1], block.heads_across(), block.head_size];
        let key = self.linear(&format!("blocks.{i}.cross.key"), states)?.reshape(&heads)?;
        let value = self.linear(&format!("blocks.{i}.cross.value"), states)?.reshape(&heads)?;
        Ok((key, value))
    }

    /// Cross-attention of decoding block `i`: `[B, T, d]` to `[B, T, d]`.
    pub(super) fn look(&mut self, i: usize, x: &Var) -> Result<Var> {
        let config = &self.model.config;
        let block = &config.blocks[i];
        let (b, t) = (x.dims()[0], x.dims()[1]);
        let (key, value, lengths) = match &self.memory {
            Some(Memory::States(states, lengths)) => {
                let (states, lengths) = (Var::clone(states), lengths.clone());
                let (key, value) = self.source_keys(i, &states)?;
                (key, value, lengths)
            }
            Some(Memory::Read(read)) => {
                let kv = read.blocks.get(&i).cloned().ok_or_else(|| missing(&format!("blocks.{i}.cross")))?;
                (Var::constant(kv.key), Var::constant(kv.value), read.lengths.clone())
            }
            None => {
                return Err(Error::Shape { op: "decoder", rule: "the encoder has run before", got: "nothing".into() });
            }
        };
        let heads = block.heads_across();
        let query = self.linear(&format!("blocks.{i}.cross.query"), x)?.reshape(&[b, t, heads, block.head_size])?;
        let op =
            Attention { mask: Mask::None, lengths: true, bias: false, scale: block.attention_scale, query_offset: 0 };
        let y = self.tape.first(op, &[&query, &key, &value, &Var::constant(lengths)])?;
        let y = self.gated(Place::CrossHeads(i), y.reshape(&[b, t, heads * block.head_size])?)?;
        self.linear(&format!("blocks.{i}.cross.output"), &y)
    }

    /// The bias `[H, T, S]` on scores of block `i`, where positions are relative: from a table of its own or its stack's.
    pub(super) fn distances(&mut self, i: usize, (t, s): (usize, usize), offset: usize) -> Result<Option<Var>> {
        let model = self.model;
        if !matches!(model.config.positions, Positions::Relative { .. }) {
            return Ok(None);
        }
        let table = |block: usize| format!("blocks.{block}.attention.distances");
        let owner = if model.tensors.contains_key(&table(i)) { i } else { model.config.stack(i) };
        let both_sides = i < model.config.encoder;
        let span = Span { queries: t, keys: s, query_offset: offset, both_sides };
        if let Some((.., bias)) = self.biases.iter().find(|(block, other, _)| (*block, *other) == (owner, span)) {
            return Ok(Some(bias.clone()));
        }
        let Some(ids) = model.distances(both_sides) else { return Ok(None) };
        let table = self.parameter(&table(owner))?;
        let bias = self.tape.first(RelativeBias(span), &[&table, &Var::constant(ids.clone())])?;
        self.biases.push((owner, span, bias.clone()));
        Ok(Some(bias))
    }
}
