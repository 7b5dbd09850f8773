//! Structured pruning: whole heads and neurons (`shrink`), blocks (`layers`), and width as LightChatGLM 3.2 has it: keep the
//! head count, shrink the head size in whole rotary pairs, d' = heads x head_size', ffn' = ffn x head_size' / head_size.
//! What stays is a [`Keep`]; [`prune`] makes the smaller model, which starts from the surviving weights.

pub mod gates;
pub mod importance;
pub mod judge;
mod keep;
mod layers;
mod prune;
pub mod select;
mod shrink;
pub mod sites;
mod vocabulary;
pub mod weights;

use importance::{BlockScores, Scores, rotary_pairs};
pub use judge::Objective;
pub use keep::{Keep, KeepBlock, KeepHeads};
pub use layers::LayersMethod;
pub use prune::{prune, without_block};
pub use select::largest;
pub use shrink::{Heads, Neurons, Order, Plan, Progress, Score, normalise, shrink};
pub use vocabulary::prune_vocabulary;

use crate::error::{Error, Result};
use crate::nn::{Config, Positions};
use crate::rng::Stream;

/// Target shape of a model whose heads all stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    pub layers: usize,
    pub head_size: usize,
    /// Channels of the residual stream; `None`: heads x head_size.
    pub width: Option<usize>,
    /// FFNs are narrowed as heads are.
    pub scale_ffn: bool,
}

impl Target {
    /// All widths in the ratio of the heads'.
    pub fn scaled(layers: usize, head_size: usize) -> Self {
        Self { layers, head_size, width: None, scale_ffn: true }
    }

    fn channels(&self, config: &Config) -> usize {
        self.width.unwrap_or(config.blocks[0].heads * self.head_size)
    }
}

/// FFN widths are kept multiples of this: 2:4 groups, experts of 16 neurons and vector lanes stay whole.
pub const FFN_MULTIPLE: usize = 16;

/// The FFN width that keeps the teacher's d : d_ffn ratio, rounded to [`FFN_MULTIPLE`].
pub fn scaled_ffn(ffn_width: usize, head_size: usize, target: usize) -> usize {
    let exact = ffn_width as f64 * target as f64 / head_size as f64;
    ((exact / FFN_MULTIPLE as f64).round() as usize).max(1) * FFN_MULTIPLE
}

/// Chooses by importance within the blocks `kept`, `target.layers` of them.
///
/// # Errors
/// `Error::Recipe` for a target that is not of this model.
pub fn by_importance(config: &Config, scores: &Scores, kept: &[usize], target: Target) -> Result<Keep> {
    check(config, target)?;
    let choose = |&i: &usize| keep_block(config, i, &scores.blocks[i], target);
    Ok(Keep { channels: largest(&scores.channels, target.channels(config)), blocks: kept.iter().map(choose).collect() })
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
    let kept = largest(&draw(config.blocks.len()), target.layers);
    by_importance(config, &scores, &kept, target)
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
    if config.blocks.iter().any(|b| b.head_size != first.head_size) {
        return rule("head_size", target.head_size, "a model whose blocks have heads of one size".into());
    }
    let channels = target.channels(config);
    if channels == 0 || channels > config.width {
        return rule("width", channels, format!("1 to {}", config.width));
    }
    Ok(())
}

fn keep_block(config: &Config, index: usize, scores: &BlockScores, target: Target) -> KeepBlock {
    let (block, head_size) = (&config.blocks[index], target.head_size);
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
    let scaled = scaled_ffn(block.ffn_width, block.head_size, head_size).min(block.ffn_width);
    let ffn = if target.scale_ffn { scaled } else { block.ffn_width };
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
    fn ffn_keeps_the_ratio() {
        assert_eq!(scaled_ffn(512, 32, 24), 384);
        assert_eq!(scaled_ffn(512, 32, 20), 320);
        assert_eq!(scaled_ffn(100, 32, 16), 48);
    }
}
