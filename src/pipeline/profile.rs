//! What the pieces of a model cost on a device, as a file that plans are made from.

use serde::{Deserialize, Serialize};

use super::simulate::{ChunkCost, Link};

/// One piece that a cut can not divide: the embedding, a block or the head with its loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PieceProfile {
    /// "embedding", "block 3", "head".
    pub name: String,
    #[serde(flatten)]
    pub cost: ChunkCost,
    /// Bytes of its parameters.
    pub parameter_bytes: f64,
}

/// Pieces in the model's order, for one micro-batch of `rows` x `columns` tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    pub model: String,
    pub device: String,
    pub rows: usize,
    pub columns: usize,
    pub pieces: Vec<PieceProfile>,
    /// Between two stages as they are run here.
    pub link: Link,
    /// Seconds of the update per byte of parameters.
    pub update_per_byte: f64,
}
