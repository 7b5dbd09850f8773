//! Batches taken in parts: where a block's activations are more than a core's cache holds and its weights are not, the time of
//! a pass is that of carrying activations to memory and back.

use super::config::Config;
use super::forward::{Batch, Cache, Pass};
use crate::device::Kind;
use crate::dispatch;
use crate::error::Result;
use crate::ops::layout::{Concat, Slice};
use crate::tape::Var;
use crate::tensor::Tensor;

/// Bytes of a part's widest activations at most, and of a block's weights on the average, which every part reads anew: what lies near
/// a core.
const NEAR: usize = 2 << 20;
/// Inputs that [`Concat`] takes.
const JOINED: usize = 7;

impl Pass<'_> {
    /// Final hidden states `[B, T, d]`. On the CPU an inference takes large batches of a model with small weights a few
    /// sequences at a time; what is computed for a sequence does not depend on the others.
    pub fn hidden(&mut self, batch: &Batch) -> Result<Var> {
        let sequences = batch.tokens.dims()[0];
        let part = self.sequences_at_once(batch);
        if part >= sequences {
            return self.run(batch, Cache::None);
        }
        let mut parts = Vec::new();
        for start in (0..sequences).step_by(part) {
            let own = batch.part(start, part.min(sequences - start))?;
            parts.push(self.run(&own, Cache::None)?);
        }
        while parts.len() > 1 {
            let join = |some: &[Var]| match some {
                [one] => Ok(one.clone()),
                some => self.tape.first(Concat { axis: 0 }, &some.iter().collect::<Vec<_>>()),
            };
            parts = parts.chunks(JOINED).map(join).collect::<Result<_>>()?;
        }
        parts.pop().map_or_else(|| self.run(batch, Cache::None), Ok)
    }

    fn sequences_at_once(&self, batch: &Batch) -> usize {
        let (config, all) = (&self.model.config, batch.tokens.dims()[0]);
        let watched =
            self.tape.recording() || !self.hooks.is_empty() || self.taps.is_some() || self.ffn_inputs.is_some();
        // What a pass does with weights and not with tokens every part would do again: low-rank updates, experts' weights unpacked
        // from groups. A part's dropout would be that of the first one.
        let grouped = |(name, tensor): (&String, &Tensor)| name.ends_with(".scale") && tensor.dims().len() == 3;
        let once = self.tuned || self.dropout.is_some() || self.model.tensors.iter().any(grouped);
        let elsewhere = config.encoder > 0 || self.model.device().info().kind != Kind::Cpu;
        if watched || once || elsewhere || self.memory.is_some() {
            return all;
        }
        let own = self.model.tensors.iter().filter(|(name, _)| name.starts_with("blocks."));
        let weights = own.map(|(_, tensor)| tensor.meta().bytes()).sum::<usize>() + self.model.ways_bytes();
        let widest = config.blocks.iter().map(Config::ffn_rows).max().unwrap_or(0).max(config.width);
        let sequence = widest * size_of::<f32>() * batch.tokens.dims()[1];
        if weights / config.blocks.len().max(1) > NEAR { all } else { (NEAR / sequence.max(1)).clamp(1, all.max(1)) }
    }
}

impl Batch {
    /// Sequences `start .. start + length` of a batch that has no source.
    fn part(&self, start: usize, length: usize) -> Result<Self> {
        let own = |tensor: &Tensor| dispatch::run_one(&Slice { axis: 0, start, length }, &[tensor]);
        let optional = |tensor: &Option<Tensor>| tensor.as_ref().map(own).transpose();
        Ok(Self {
            tokens: own(&self.tokens)?,
            positions: own(&self.positions)?,
            block_positions: optional(&self.block_positions)?,
            context: optional(&self.context)?,
            lengths: optional(&self.lengths)?,
            source: None,
        })
    }
}
