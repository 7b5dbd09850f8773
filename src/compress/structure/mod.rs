//! Structured pruning in width and depth (LightChatGLM 3.2): keep the head count, shrink the head size in whole rotary
//! pairs, d' = heads x head_size', ffn' = ffn x head_size' / head_size; keep a subset of the blocks. The student starts
//! from the surviving weights.

pub mod importance;
mod keep;
mod prune;

use importance::{BlockScores, Scores, rotary_pairs};
pub use keep::{Keep, KeepBlock, KeepHeads};
pub use prune::{prune, without_block};

use crate::error::{Error, Result};
use crate::nn::{Block, Config, Positions};
use crate::rng::Stream;

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
        BlockScores {
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
    scores: &BlockScores,
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
    let heads = (0..block.heads).collect();
    let ffn = scaled_ffn(block.ffn_width, block.head_size, head_size).min(block.ffn_width);
    KeepBlock {
        index,
        attention: block.attends().then(|| KeepHeads { heads, query_key, value: per_head(&scores.value) }),
        cross: None,
        neurons: block.feeds().then(|| largest(&scores.neurons, ffn)),
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
