//! What the pieces of a model cost on a device, as a file that plans are made from.

use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::cut;
use super::schedule::Schedule;
use super::simulate::{ChunkCost, Costs, Link};
use crate::error::{Error, Result};

/// One piece that a cut can not divide: the embedding, a block or the head with its loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PieceProfile {
    /// "embedding", "block 3", "head".
    pub name: String,
    /// With backward in one go; its two shares add up to that.
    pub cost: ChunkCost,
    /// With backward in two parts, which costs more in all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<ChunkCost>,
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

impl Profile {
    /// Costs of chunks that are made of these pieces; `split`: backward comes in two parts.
    pub fn chunks(&self, cuts: &[Range<usize>], split: bool) -> Vec<ChunkCost> {
        let chunk = |pieces: &Range<usize>| {
            let mut sum = ChunkCost::default();
            for piece in self.pieces.get(pieces.clone()).unwrap_or_default() {
                let cost = if split { piece.split.unwrap_or(piece.cost) } else { piece.cost };
                sum.forward += cost.forward;
                sum.backward_input += cost.backward_input;
                sum.backward_weight += cost.backward_weight;
                sum.activation_bytes += cost.activation_bytes;
                sum.output_bytes = cost.output_bytes;
            }
            sum
        };
        cuts.iter().map(chunk).collect()
    }

    /// Everything the simulator asks for; `sizes`: of the micro-batches, in ones of this profile's size.
    pub fn costs(&self, schedule: &Schedule, cuts: &[Range<usize>], sizes: Vec<f64>) -> Costs {
        let mut updates = vec![0.0; schedule.stages.len()];
        for (pieces, &home) in cuts.iter().zip(&schedule.homes) {
            let bytes: f64 =
                self.pieces.get(pieces.clone()).unwrap_or_default().iter().map(|p| p.parameter_bytes).sum();
            updates[home] += bytes * self.update_per_byte;
        }
        Costs { chunks: self.chunks(cuts, schedule.splits_backward()), link: self.link, sizes, updates }
    }

    /// Cuts for a schedule's chunks whose heaviest one is as light as can be.
    pub fn cuts(&self, schedule: &Schedule) -> Vec<Range<usize>> {
        let pieces: Vec<Range<usize>> = (0..self.pieces.len()).map(|p| p..p + 1).collect();
        let costs = self.chunks(&pieces, schedule.splits_backward());
        let seconds: Vec<f64> = costs.iter().map(|c| c.forward + c.backward_input + c.backward_weight).collect();
        cut::balanced(&seconds, schedule.chunks())
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(|e| Error::file(path, "profile", e))?;
        crate::atomic::write_atomic(path, &text)
    }

    /// # Errors
    /// `File` for what is no profile.
    pub fn read(path: &Path) -> Result<Self> {
        const MAX_BYTES: u64 = 64 << 20;
        let bytes = crate::data::persist::read_capped(path, MAX_BYTES)?;
        let mut reader = serde_json::Deserializer::from_slice(&bytes);
        let profile: Self = serde_path_to_error::deserialize(&mut reader)
            .map_err(|e| Error::file(path, e.path().to_string(), e.inner().to_string()))?;
        let sound = |p: &PieceProfile| {
            [Some(p.cost), p.split].into_iter().flatten().all(|c| {
                let all = [c.forward, c.backward_input, c.backward_weight, c.activation_bytes, c.output_bytes];
                all.iter().chain([&p.parameter_bytes]).all(|x| x.is_finite() && *x >= 0.0)
            })
        };
        if profile.pieces.is_empty() || !profile.pieces.iter().all(sound) {
            return Err(Error::file(path, "pieces", "at least one piece, every figure finite and not negative"));
        }
        Ok(profile)
    }
}
