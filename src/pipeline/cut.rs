//! Where a model is cut: pieces that stay whole, and which tensors belong to which.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::nn::pieces::{piece_of, pieces};
use crate::nn::{Config, Head, Model};

/// Tensors that stage or chunk `pieces` needs.
pub fn tensors_of(model: &Model, pieces: &Range<usize>) -> Vec<String> {
    model.tensors.keys().filter(|name| pieces.contains(&piece_of(&model.config, name))).cloned().collect()
}

/// Pieces of each chunk, as even as their number allows, whatever they cost.
pub fn even(pieces: usize, chunks: usize) -> Vec<Range<usize>> {
    (0..chunks).map(|c| c * pieces / chunks..(c + 1) * pieces / chunks).collect()
}

/// A teacher's blocks in as many parts, evenly; its embedding costs next to nothing and its head is not run.
pub fn teacher(config: &Config, stages: usize) -> Vec<Range<usize>> {
    let blocks = config.blocks.len();
    let edge = |stage: usize| if stage == 0 { 0 } else { 1 + stage * blocks / stages };
    (0..stages).map(|stage| edge(stage)..edge(stage + 1)).collect()
}

/// Refuses cuts that this model or number of chunks does not allow.
///
/// # Errors
/// `Parameter` for chunks that leave pieces out, overlap or are empty, and for a head tied to the embedding on another stage.
pub fn check(config: &Config, chunks: &[Range<usize>], homes: &[usize]) -> Result<()> {
    let refuse = |value: String, allowed| Err(Error::Parameter { op: "pipeline", parameter: "stages", value, allowed });
    let mut end = 0;
    for range in chunks {
        if range.start != end || range.is_empty() {
            return refuse(
                format!("{chunks:?}"),
                "every chunk has at least one piece: embedding, blocks and head in a row",
            );
        }
        end = range.end;
    }
    if end != pieces(config) || chunks.len() != homes.len() {
        return refuse(format!("{chunks:?}"), "every piece belongs to a chunk: embedding, blocks and head in a row");
    }
    let tied = matches!(config.head, Head::Language { tied: true });
    if tied && homes.first() != homes.last() {
        return refuse(
            format!("{} chunks", chunks.len()),
            "1, or schedule zb-v: this model's head is tied to its embedding, so both must be on one stage",
        );
    }
    Ok(())
}
