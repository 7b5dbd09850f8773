//! First-order importance of structures: |sum of w dL/dw| over a structure's weights, absolute value per batch,
//! summed over calibration batches (TextPruner's formula, extended to rotary pairs and residual channels).

use std::collections::BTreeMap;

use super::judge::Judge;
use crate::error::Result;
use crate::nn::{Config, Head, Model, Pass, Positions};
use crate::tape::Grads;
use crate::tape::Var;
use crate::train::lifecycle::Micro;
use crate::train::trainer::{go_on, weighted_cross_entropy};

/// Scores of one block's structures.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BlockScores {
    /// Query-key dimensions of each head that live and die together: rotary pairs, summed over heads because a block
    /// has one frequency table. Without rotary: one entry per head dimension and head, `[heads * head_size]`.
    pub query_key: Vec<f64>,
    /// Value dimensions `[heads * head_size]`.
    pub value: Vec<f64>,
    pub neurons: Vec<f64>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Scores {
    pub blocks: Vec<BlockScores>,
    /// Residual channels `[width]`.
    pub channels: Vec<f64>,
}

/// Rotary pairs of a head as (first dimension, second dimension), in the order of the frequency table.
pub fn rotary_pairs(positions: Positions, head_size: usize) -> Vec<(usize, usize)> {
    match positions {
        Positions::Learned | Positions::Relative { .. } => Vec::new(),
        Positions::Rotary => (0..head_size / 2).map(|j| (j, j + head_size / 2)).collect(),
        Positions::Rotary2d => {
            let (half, quarter) = (head_size / 2, head_size / 4);
            (0..half).map(|j| if j < quarter { j } else { j - quarter + half }).map(|j| (j, j + quarter)).collect()
        }
    }
}

/// Scores every structure of `model` on calibration micro-batches.
pub fn score(model: &Model, micros: &[Micro]) -> Result<Scores> {
    let mut scores = Scores { blocks: vec![BlockScores::default(); model.config.blocks.len()], channels: Vec::new() };
    for micro in micros {
        go_on()?;
        let judged = Judge::LABELS.backward(Pass::training(model), micro)?;
        add_batch(model, &judged.leaves, &judged.grads, &mut scores)?;
    }
    Ok(scores)
}

/// Mean cross-entropy of a model on calibration micro-batches, in nats per token.
pub fn loss(model: &Model, micros: &[Micro]) -> Result<f64> {
    let (mut sum, mut weight) = (0.0, 0.0);
    for micro in micros {
        go_on()?;
        let mut pass = Pass::inference(model);
        let hidden = pass.hidden(&micro.batch)?;
        sum += weighted_cross_entropy(&mut pass, &hidden, &micro.targets, &micro.weights)?.tensor.to_f64()?[0];
        weight += micro.weight;
    }
    Ok(sum / f64::max(weight, 1.0))
}

/// w * dL/dw of one parameter as rows.
pub(super) struct Products {
    pub values: Vec<f64>,
    columns: usize,
}

impl Products {
    pub fn row_sums(&self) -> Vec<f64> {
        self.values.chunks(self.columns.max(1)).map(|row| row.iter().sum()).collect()
    }

    pub fn column_sums(&self) -> Vec<f64> {
        let mut sums = vec![0.0; self.columns];
        for row in self.values.chunks(self.columns.max(1)) {
            sums.iter_mut().zip(row).for_each(|(s, v)| *s += v);
        }
        sums
    }
}

pub(super) fn products(leaves: &BTreeMap<String, Var>, grads: &Grads, name: &str) -> Result<Option<Products>> {
    let Some(var) = leaves.get(name) else {
        return Ok(None);
    };
    let Some(grad) = grads.of(var).transpose()? else {
        return Ok(None);
    };
    let (w, g) = (var.tensor.to_f64()?, grad.to_f64()?);
    let columns = var.tensor.shape().last();
    Ok(Some(Products { values: w.iter().zip(&g).map(|(w, g)| w * g).collect(), columns }))
}

/// Adds |sums| element by element; an empty accumulator takes the first length.
fn accumulate(total: &mut Vec<f64>, batch: &[f64]) {
    total.resize(batch.len(), 0.0);
    total.iter_mut().zip(batch).for_each(|(t, b)| *t += b.abs());
}

pub(super) fn add(into: &mut Vec<f64>, values: &[f64]) {
    into.resize(values.len(), 0.0);
    into.iter_mut().zip(values).for_each(|(a, b)| *a += b);
}

fn add_batch(model: &Model, leaves: &BTreeMap<String, Var>, grads: &Grads, scores: &mut Scores) -> Result<()> {
    let config = &model.config;
    let of = |name: &str| products(leaves, grads, name);
    let mut channels = vec![0.0; config.width];
    for (i, block) in config.blocks.iter().enumerate() {
        let (mut query_key, mut value, mut neurons) = (Vec::new(), Vec::new(), Vec::new());
        for part in ["query", "key", "value"] {
            let name = format!("blocks.{i}.attention.{part}");
            let target = if part == "value" { &mut value } else { &mut query_key };
            if let Some(p) = of(&format!("{name}.weight"))? {
                add(target, &p.row_sums());
                add(&mut channels, &p.column_sums());
            }
            if let Some(p) = of(&format!("{name}.bias"))? {
                add(target, &p.values);
            }
        }
        if let Some(p) = of(&format!("blocks.{i}.attention.output.weight"))? {
            add(&mut value, &p.column_sums());
            add(&mut channels, &p.row_sums());
        }
        if let Some(p) = of(&format!("blocks.{i}.ffn.in.weight"))? {
            add(&mut neurons, &fold_gated(&p.row_sums(), block.ffn_width));
            add(&mut channels, &p.column_sums());
        }
        if let Some(p) = of(&format!("blocks.{i}.ffn.in.bias"))? {
            add(&mut neurons, &fold_gated(&p.values, block.ffn_width));
        }
        if let Some(p) = of(&format!("blocks.{i}.ffn.out.weight"))? {
            add(&mut neurons, &p.column_sums());
            add(&mut channels, &p.row_sums());
        }
        let pairs = rotary_pairs(config.positions, block.head_size);
        if !pairs.is_empty() {
            let heads: Vec<&[f64]> = query_key.chunks(block.head_size).collect();
            let pair = |&(a, b): &(usize, usize)| heads.iter().map(|h| h[a] + h[b]).sum();
            query_key = pairs.iter().map(pair).collect();
        }
        let block_scores = &mut scores.blocks[i];
        accumulate(&mut block_scores.query_key, &query_key);
        accumulate(&mut block_scores.value, &value);
        accumulate(&mut block_scores.neurons, &neurons);
    }
    for name in channel_vectors(config) {
        if let Some(p) = of(&name)? {
            add(&mut channels, &p.column_sums());
        }
    }
    accumulate(&mut scores.channels, &channels);
    Ok(())
}

/// Gate and value rows of a gated FFN belong to the same neuron.
pub(super) fn fold_gated(rows: &[f64], neurons: usize) -> Vec<f64> {
    let mut folded = vec![0.0; neurons];
    for part in rows.chunks(neurons) {
        folded.iter_mut().zip(part).for_each(|(f, p)| *f += p);
    }
    folded
}

/// Parameters whose last axis is the residual stream, outside the linears.
fn channel_vectors(config: &Config) -> Vec<String> {
    let mut names = vec!["embedding.tokens".to_string()];
    if config.positions == Positions::Learned {
        names.push("embedding.positions".into());
    }
    let norms =
        (0..config.blocks.len()).flat_map(|i| [format!("blocks.{i}.norm_attention"), format!("blocks.{i}.norm_ffn")]);
    for norm in norms.chain(["norm_final".to_string()]) {
        names.extend([format!("{norm}.weight"), format!("{norm}.bias")]);
    }
    if !matches!(config.head, Head::Language { tied: true }) {
        names.push("head.weight".into());
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_follow_the_rope_kernels() {
        assert_eq!(rotary_pairs(Positions::Rotary, 8), [(0, 4), (1, 5), (2, 6), (3, 7)]);
        assert_eq!(rotary_pairs(Positions::Rotary2d, 8), [(0, 2), (1, 3), (4, 6), (5, 7)]);
    }
}
