//! Structured pruning in width and depth (LightChatGLM 3.2): keep the head count, shrink the head size in whole rotary
//! pairs, d' = heads x head_size', ffn' = ffn x head_size' / head_size; keep a subset of the blocks. The student starts
//! from the surviving weights.

use std::collections::BTreeMap;

use super::importance::{Scores, rotary_pairs};
use crate::error::{Error, Result};
use crate::nn::{Block, Config, Model, Positions};
use crate::rng::Stream;
use crate::tensor::Tensor;

/// What survives of one block; indices into the teacher's.
#[derive(Clone, Debug, PartialEq)]
pub struct KeepBlock {
    pub index: usize,
    /// Rows of the query and key projections, `heads * head_size'` of them.
    pub query_key: Vec<usize>,
    pub value: Vec<usize>,
    pub neurons: Vec<usize>,
    pub inverse_frequencies: Vec<f32>,
}

/// What survives of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Keep {
    pub channels: Vec<usize>,
    pub blocks: Vec<KeepBlock>,
}

/// Target shape of a pruned model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    pub layers: usize,
    pub head_size: usize,
}

/// FFN widths are kept multiples of this: 2:4 groups, experts of 16 neurons and vector lanes stay whole.
pub const FFN_MULTIPLE: usize = 16;

/// The FFN width that keeps the teacher's d : d_ffn ratio, rounded to [`FFN_MULTIPLE`].
pub fn scaled_ffn(ffn_width: usize, head_size: usize, target: usize) -> usize {
    let exact = ffn_width as f64 * target as f64 / head_size as f64;
    ((exact / FFN_MULTIPLE as f64).round() as usize).max(1) * FFN_MULTIPLE
}

/// Indices of the `n` largest scores, ascending; among equals the lowest index wins. Exactly `n` of them.
pub fn largest(scores: &[f64], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    // Adding 0 makes the two zeros equal.
    order.sort_by(|&a, &b| (scores[b] + 0.0).total_cmp(&(scores[a] + 0.0)).then(a.cmp(&b)));
    order.truncate(n);
    order.sort_unstable();
    order
}

/// Chooses by importance. `block_losses[i]`: calibration loss without block i, the larger the more it matters.
pub fn by_importance(config: &Config, scores: &Scores, block_losses: &[f64], target: Target) -> Result<Keep> {
    check(config, target)?;
    let kept = largest(block_losses, target.layers);
    let choose = |i: usize| keep_block(config, i, &config.blocks[i], &scores.blocks[i], target.head_size);
    Ok(Keep {
        channels: largest(&scores.channels, config.blocks[0].heads * target.head_size),
        blocks: kept.into_iter().map(choose).collect(),
    })
}

/// The baseline of LightChatGLM's Fig. 4: the same shapes, chosen at random.
pub fn at_random(config: &Config, target: Target, seed: u64) -> Result<Keep> {
    check(config, target)?;
    let mut stream = Stream::new(seed, 0x5eed);
    let mut draw = |n: usize| -> Vec<f64> { (0..n).map(|_| stream.uniform()).collect() };
    let blocks = config.blocks.iter().map(|b| {
        let pairs = rotary_pairs(config.positions, b.head_size).len();
        super::importance::BlockScores {
            query_key: draw(if pairs > 0 { pairs } else { b.heads * b.head_size }),
            value: draw(b.heads * b.head_size),
            neurons: draw(b.ffn_width),
        }
    });
    let scores = Scores { blocks: blocks.collect(), channels: draw(config.width) };
    by_importance(config, &scores, &draw(config.blocks.len()), target)
}

fn check(config: &Config, target: Target) -> Result<()> {
    let rule = |key: &str, value: usize, allowed: String| {
        Err(Error::Recipe { key: format!("structure.{key}"), value: value.to_string(), allowed })
    };
    if config.encoder > 0 {
        return rule("layers", target.layers, "a model of one stack: an encoder-decoder keeps its structures".into());
    }
    let Some(first) = config.blocks.first() else {
        return rule("layers", target.layers, "a model with at least one block".into());
    };
    if target.layers == 0 || target.layers > config.blocks.len() {
        return rule("layers", target.layers, format!("1 to {}", config.blocks.len()));
    }
    let step = match config.positions {
        Positions::Rotary2d => 4,
        Positions::Rotary => 2,
        Positions::Learned | Positions::Relative { .. } => 1,
    };
    if target.head_size == 0 || target.head_size > first.head_size || !target.head_size.is_multiple_of(step) {
        return rule("head_size", target.head_size, format!("a multiple of {step} from {step} to {}", first.head_size));
    }
    if config.blocks.iter().any(|b| (b.heads, b.head_size) != (first.heads, first.head_size)) {
        return rule("head_size", target.head_size, "a model whose blocks have equal heads".into());
    }
    Ok(())
}

fn keep_block(
    config: &Config,
    index: usize,
    block: &Block,
    scores: &super::importance::BlockScores,
    head_size: usize,
) -> KeepBlock {
    let per_head = |scores: &[f64]| -> Vec<usize> {
        let head = |(h, part): (usize, &[f64])| {
            largest(part, head_size).into_iter().map(move |j| h * block.head_size + j).collect::<Vec<_>>()
        };
        scores.chunks(block.head_size).enumerate().flat_map(head).collect()
    };
    let pairs = rotary_pairs(config.positions, block.head_size);
    let (query_key, inverse_frequencies) = if pairs.is_empty() {
        (per_head(&scores.query_key), Vec::new())
    } else {
        let kept = keep_pairs(config.positions, &scores.query_key, head_size);
        // A rotated part is [first of each pair.., second of each pair..]: both orders follow the frequency table.
        let parts = if config.positions == Positions::Rotary2d { 2 } else { 1 };
        let one_head: Vec<usize> = kept
            .chunks(kept.len() / parts)
            .flat_map(|part| {
                part.iter().map(|&p| pairs[p].0).chain(part.iter().map(|&p| pairs[p].1)).collect::<Vec<_>>()
            })
            .collect();
        let heads = (0..block.heads).flat_map(|h| one_head.iter().map(move |j| h * block.head_size + j));
        (heads.collect(), kept.iter().map(|&p| block.inverse_frequencies[p]).collect())
    };
    KeepBlock {
        index,
        query_key,
        value: per_head(&scores.value),
        neurons: largest(&scores.neurons, scaled_ffn(block.ffn_width, block.head_size, head_size).min(block.ffn_width)),
        inverse_frequencies,
    }
}

/// Pairs that survive: each half of a 2-D rotary head keeps its own best.
fn keep_pairs(positions: Positions, scores: &[f64], head_size: usize) -> Vec<usize> {
    if positions != Positions::Rotary2d {
        return largest(scores, head_size / 2);
    }
    let half = scores.len() / 2;
    let first = largest(&scores[..half], head_size / 4);
    let second = largest(&scores[half..], head_size / 4).into_iter().map(|p| p + half);
    first.into_iter().chain(second).collect()
}

/// A matrix's values on the host.
struct Matrix {
    values: Vec<f32>,
    dims: Vec<usize>,
}

impl Matrix {
    /// Rows and columns by index; `None` keeps all. A vector counts as one row.
    fn select(&self, rows: Option<&[usize]>, columns: Option<&[usize]>) -> Matrix {
        let width = *self.dims.last().unwrap_or(&1);
        let height = self.values.len() / width.max(1);
        let all_rows: Vec<usize> = (0..height).collect();
        let all_columns: Vec<usize> = (0..width).collect();
        let (rows, columns) = (rows.unwrap_or(&all_rows), columns.unwrap_or(&all_columns));
        let row = |&r: &usize| columns.iter().map(move |&c| self.values[r * width + c]);
        let values = rows.iter().flat_map(row).collect();
        let dims = if self.dims.len() == 1 { vec![columns.len()] } else { vec![rows.len(), columns.len()] };
        Matrix { values, dims }
    }
}

/// Builds the student that `keep` describes, on the teacher's device.
pub fn prune(teacher: &Model, keep: &Keep) -> Result<Model> {
    let config = pruned_config(&teacher.config, keep);
    let mut tensors = BTreeMap::new();
    let mut put = |to: String, from: &str, rows: Option<&[usize]>, columns: Option<&[usize]>| -> Result<()> {
        let tensor = teacher.get(from)?;
        let kept = Matrix { values: tensor.to_vec()?, dims: tensor.dims().to_vec() }.select(rows, columns);
        tensors.insert(to, Tensor::from_slice(teacher.device(), &kept.dims, &kept.values)?);
        Ok(())
    };
    let channels = Some(&keep.channels[..]);
    for (name, _) in teacher.config.parameters() {
        if !name.starts_with("blocks.") {
            // A tagging head's bias runs over labels, everything else outside the blocks ends in the residual stream.
            put(name.clone(), &name, None, if name == "head.bias" { None } else { channels })?;
        }
    }
    for (i, block) in keep.blocks.iter().enumerate() {
        let gated = gated_rows(&teacher.config.blocks[block.index], &block.neurons);
        let (qk, v, neurons) = (Some(&block.query_key[..]), Some(&block.value[..]), Some(&block.neurons[..]));
        let plan = [
            ("norm_attention.weight", None, channels),
            ("norm_attention.bias", None, channels),
            ("norm_ffn.weight", None, channels),
            ("norm_ffn.bias", None, channels),
            ("attention.query.weight", qk, channels),
            ("attention.query.bias", None, qk),
            ("attention.key.weight", qk, channels),
            ("attention.key.bias", None, qk),
            ("attention.value.weight", v, channels),
            ("attention.value.bias", None, v),
            ("attention.output.weight", channels, v),
            ("attention.output.bias", None, channels),
            ("ffn.in.weight", Some(&gated[..]), channels),
            ("ffn.in.bias", None, Some(&gated[..])),
            ("ffn.out.weight", channels, neurons),
            ("ffn.out.bias", None, channels),
        ];
        for (part, rows, columns) in plan {
            let from = format!("blocks.{}.{part}", block.index);
            if teacher.tensors.contains_key(&from) {
                put(format!("blocks.{i}.{part}"), &from, rows, columns)?;
            }
        }
    }
    Model::new(config, tensors, teacher.device())
}

/// Rows of the in-projection that belong to these neurons.
fn gated_rows(block: &Block, neurons: &[usize]) -> Vec<usize> {
    let copies = Config::ffn_rows(block) / block.ffn_width;
    (0..copies).flat_map(|part| neurons.iter().map(move |n| part * block.ffn_width + n)).collect()
}

fn pruned_config(teacher: &Config, keep: &Keep) -> Config {
    let block = |kept: &KeepBlock| {
        let old = &teacher.blocks[kept.index];
        Block {
            head_size: kept.value.len() / old.heads,
            ffn_width: kept.neurons.len(),
            inverse_frequencies: kept.inverse_frequencies.clone(),
            ..old.clone()
        }
    };
    Config { width: keep.channels.len(), blocks: keep.blocks.iter().map(block).collect(), ..teacher.clone() }
}

/// The same model without block `index`: what its importance in depth is measured with.
pub fn without_block(model: &Model, index: usize) -> Result<Model> {
    let all = |n: usize| (0..n).collect::<Vec<_>>();
    let keep_all = |(i, b): (usize, &Block)| KeepBlock {
        index: i,
        query_key: all(b.heads * b.head_size),
        value: all(b.heads * b.head_size),
        neurons: all(b.ffn_width),
        inverse_frequencies: b.inverse_frequencies.clone(),
    };
    let blocks = model.config.blocks.iter().enumerate().filter(|(i, _)| *i != index).map(keep_all).collect();
    prune(model, &Keep { channels: all(model.config.width), blocks })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn largest_keeps_exactly_n_and_the_lowest_index_wins_ties() {
        assert_eq!(largest(&[1.0, 3.0, 3.0, 2.0], 2), [1, 2]);
        assert_eq!(largest(&[1.0, 1.0, 1.0], 2), [0, 1]);
        assert_eq!(largest(&[f64::NAN, 1.0], 1).len(), 1);
    }

    #[test]
    fn ffn_keeps_the_ratio() {
        assert_eq!(scaled_ffn(512, 32, 24), 384);
        assert_eq!(scaled_ffn(512, 32, 20), 320);
        assert_eq!(scaled_ffn(100, 32, 16), 48);
    }
}
