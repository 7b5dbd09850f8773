//! Intermediate states that a pass keeps for whoever asks: what distillation compares layer by layer.

use std::collections::{BTreeMap, BTreeSet};

use super::config::Residual;
use super::forward::{Pass, States};
use crate::error::{Error, Result};
use crate::tape::Var;

/// A place in the forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tap {
    /// 0: the embedding; i: what leaves block i - 1. The last one is behind the final norm; the others are the states that
    /// the next block adds to (what BERT and GPT-2 list as `hidden_states`).
    Hidden(usize),
    /// Queries, keys and values of a block, from 0.
    Attention(usize),
}

/// Queries and keys (rotated, where the model does) and values of a block, `[B, T, H, D]` each.
#[derive(Clone)]
pub struct Heads {
    pub query: Var,
    pub key: Var,
    pub value: Var,
    /// Factor on attention scores.
    pub scale: f32,
}

/// What was asked for, and what of it the pass has come by.
#[derive(Default)]
pub struct Taps {
    wanted: BTreeSet<Tap>,
    hidden: BTreeMap<usize, Var>,
    heads: BTreeMap<usize, Heads>,
}

impl Pass<'_> {
    /// Keeps these states on the way; without any the pass is as before.
    #[must_use]
    pub fn tapping(mut self, taps: impl IntoIterator<Item = Tap>) -> Self {
        let wanted: BTreeSet<Tap> = taps.into_iter().collect();
        self.taps = (!wanted.is_empty()).then(|| Box::new(Taps { wanted, ..Taps::default() }));
        self
    }

    pub(super) fn keep_hidden(&mut self, layer: usize, states: &States) {
        let last = layer == self.model.config.blocks.len();
        let sum = self.model.config.residual == Residual::Sum;
        if let Some(taps) = &mut self.taps
            && taps.wanted.contains(&Tap::Hidden(layer))
        {
            taps.hidden.insert(layer, if sum && !last { &states.residual } else { &states.normed }.clone());
        }
    }

    pub(super) fn keep_heads(&mut self, block: usize, [query, key, value]: [&Var; 3]) {
        let scale = self.model.config.blocks[block].attention_scale;
        if let Some(taps) = &mut self.taps
            && taps.wanted.contains(&Tap::Attention(block))
        {
            let [query, key, value] = [query, key, value].map(Var::clone);
            taps.heads.insert(block, Heads { query, key, value, scale });
        }
    }

    /// `[B, T, d]`, see [`Tap::Hidden`].
    ///
    /// # Errors
    /// `Shape` where the pass was not asked for it or has not come by it: it runs in another stage of a pipeline.
    pub fn hidden_at(&self, layer: usize) -> Result<Var> {
        let kept = self.taps.as_ref().and_then(|t| t.hidden.get(&layer)).cloned();
        kept.ok_or_else(|| not_kept(format!("hidden state {layer}")))
    }

    /// See [`Tap::Attention`].
    ///
    /// # Errors
    /// As [`Pass::hidden_at`].
    pub fn heads_at(&self, block: usize) -> Result<Heads> {
        let kept = self.taps.as_ref().and_then(|t| t.heads.get(&block)).cloned();
        kept.ok_or_else(|| not_kept(format!("attention of block {block}")))
    }
}

fn not_kept(got: String) -> Error {
    Error::Shape { op: "forward", rule: "a state that this pass was asked to keep and has run", got }
}
