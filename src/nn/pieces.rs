//! The chain that a model of one stack is: pieces that stay whole where it is cut, and which tensors belong to which.

use super::Config;

/// Embedding, blocks, head.
pub fn pieces(config: &Config) -> usize {
    config.blocks.len() + 2
}

/// How messages and profiles name a piece.
pub fn piece_name(config: &Config, piece: usize) -> String {
    match piece {
        0 => "embedding".into(),
        p if p <= config.blocks.len() => format!("block {}", p - 1),
        _ => "head".into(),
    }
}

/// The piece that uses a tensor. The norm in front of a block's attention is run by the piece before it, so that one tensor
/// crosses a cut where the model adds to normalised states.
pub fn piece_of(config: &Config, name: &str) -> usize {
    let layers = config.blocks.len();
    if name.starts_with("embedding.") {
        return 0;
    }
    if name.starts_with("norm_final.") {
        return layers;
    }
    let block = name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.'));
    match block.and_then(|(index, rest)| Some((index.parse::<usize>().ok()?, rest))) {
        Some((index, rest)) if rest.starts_with("norm_attention.") => index,
        Some((index, _)) => index + 1,
        None => layers + 1,
    }
}
