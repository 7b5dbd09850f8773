//! What the pieces of a model cost on a device, as a file that plans are made from.

use std::ops::Range;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::schedule::Schedule;
use super::simulate::{ChunkCost, Costs, Link};
use crate::error::{Error, Result};
use crate::json;

/// One piece that a cut can not divide: the embedding, a block or the head with its loss.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(from = "Written")]
pub struct PieceProfile {
    /// "embedding", "block 3", "head".
    pub name: String,
    /// With backward in one go; its two shares add up to that.
    #[serde(flatten)]
    pub cost: ChunkCost,
    /// With backward in two parts, which costs more in all; absent: the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<ChunkCost>,
    /// Bytes of its parameters.
    pub parameter_bytes: f64,
}

/// A piece as a file has it; flattened fields would let any other key pass.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    name: String,
    forward: f64,
    backward_input: f64,
    backward_weight: f64,
    #[serde(default)]
    activation_bytes: f64,
    #[serde(default)]
    output_bytes: f64,
    #[serde(default)]
    split: Option<ChunkCost>,
    parameter_bytes: f64,
}

impl From<Written> for PieceProfile {
    fn from(piece: Written) -> Self {
        let Written { name, forward, backward_input, backward_weight, activation_bytes, output_bytes, .. } = piece;
        let cost = ChunkCost { forward, backward_input, backward_weight, activation_bytes, output_bytes };
        Self { name, cost, split: piece.split, parameter_bytes: piece.parameter_bytes }
    }
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

/// Pieces at most; a model has one per block and two more.
pub const MAX_PIECES: usize = 1024;

/// Longest time of anything in a profile.
pub const MAX_SECONDS: f64 = 1e9;
const MAX_BYTES: f64 = 1e18;
/// Bytes per second of a link that is not free.
const MIN_SPEED: f64 = 1e-6;

impl PieceProfile {
    fn cost_of(&self, split: bool) -> &ChunkCost {
        if split { self.split.as_ref().unwrap_or(&self.cost) } else { &self.cost }
    }
}

impl Profile {
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec_pretty(self).map_err(|e| Error::file(path, "profile", e))?;
        crate::atomic::write_atomic(path, &text)
    }

    /// # Errors
    /// `Io`; `File` with the key that is wrong.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let profile: Self = json::read(path, &bytes)?;
        profile.broken().map_or(Ok(profile), |(key, rule)| Err(Error::file(path, key, rule)))
    }

    /// # Errors
    /// `Parameter` for a profile that no file could bring.
    pub fn check(&self) -> Result<()> {
        self.broken().map_or(Ok(()), |(key, allowed)| {
            Err(Error::Parameter { op: "profile", parameter: "pieces", value: key, allowed })
        })
    }

    /// The first rule that does not hold, and the key it is about.
    fn broken(&self) -> Option<(String, &'static str)> {
        if !(1..=MAX_PIECES).contains(&self.pieces.len()) || self.rows == 0 || self.columns == 0 {
            return Some(("pieces".into(), "1 to 1024 pieces, at least one row and one column"));
        }
        // Far above what there is, and low enough for all sums and products of a plan to stay finite.
        let time = |seconds: f64| (0.0..=MAX_SECONDS).contains(&seconds);
        let size = |bytes: f64| (0.0..=MAX_BYTES).contains(&bytes);
        let Link { latency, bytes_per_second, handling } = self.link;
        if ![self.update_per_byte, latency, handling].into_iter().all(time)
            || !(bytes_per_second == 0.0 || (MIN_SPEED..=MAX_BYTES).contains(&bytes_per_second))
        {
            let allowed = "times from 0 to 1e9 seconds; bytes_per_second 0 or from 1e-6 to 1e18";
            return Some(("link, update_per_byte".into(), allowed));
        }
        let sound = |piece: &PieceProfile| {
            let figures = |c: &ChunkCost| {
                [c.forward, c.backward_input, c.backward_weight].into_iter().all(time)
                    && [c.activation_bytes, c.output_bytes].into_iter().all(size)
            };
            size(piece.parameter_bytes) && figures(&piece.cost) && piece.split.as_ref().is_none_or(figures)
        };
        let wrong = self.pieces.iter().position(|piece| !sound(piece))?;
        Some((format!("pieces[{wrong}]"), "times from 0 to 1e9 seconds, sizes from 0 to 1e18 bytes"))
    }

    /// What pieces cost together, on one device. `split`: with backward in two parts.
    pub fn chunk(&self, pieces: Range<usize>, split: bool) -> ChunkCost {
        let pieces = &self.pieces[pieces];
        let sum = |of: fn(&ChunkCost) -> f64| pieces.iter().map(|p| of(p.cost_of(split))).sum();
        ChunkCost {
            forward: sum(|c| c.forward),
            backward_input: sum(|c| c.backward_input),
            backward_weight: sum(|c| c.backward_weight),
            activation_bytes: sum(|c| c.activation_bytes),
            output_bytes: pieces.last().map_or(0.0, |p| p.cost.output_bytes),
        }
    }

    /// The contiguous cut into `parts` whose heaviest part is lightest.
    ///
    /// # Errors
    /// `Parameter` for more parts than pieces, or none.
    pub(super) fn cut(&self, parts: usize, weight: impl Fn(&PieceProfile) -> f64) -> Result<Vec<Range<usize>>> {
        let count = self.pieces.len();
        if !(1..=count).contains(&parts) {
            let allowed = "1 to the number of pieces in the profile";
            return Err(Error::Parameter { op: "cut", parameter: "chunks", value: parts.to_string(), allowed });
        }
        let weights: Vec<f64> = self.pieces.iter().map(weight).collect();
        // Filling each part up to a bound is best for that bound; the smallest bound that does is found by halving.
        let fill = |bound: f64| {
            let mut ranges = Vec::with_capacity(parts);
            let mut start = 0;
            for left in (0..parts).rev() {
                let mut end = start + 1;
                let mut sum = weights[start];
                while end + left < count && (left == 0 || sum + weights[end] <= bound) {
                    sum += weights[end];
                    end += 1;
                }
                if sum > bound {
                    return None;
                }
                ranges.push(start..end);
                start = end;
            }
            Some(ranges)
        };
        // All in one part, with room for rounding, so that the upper bound always works.
        let (mut low, mut high) = (0.0, weights.iter().sum::<f64>() * (1.0 + 1e-9) + f64::MIN_POSITIVE);
        for _ in 0..100 {
            let middle = low + (high - low) / 2.0;
            match fill(middle) {
                Some(_) => high = middle,
                None => low = middle,
            }
        }
        Ok(fill(high).unwrap_or_default())
    }

    /// Cuts for a schedule's chunks whose slowest one is fastest.
    ///
    /// # Errors
    /// `Parameter` for more chunks than pieces.
    pub fn cuts(&self, schedule: &Schedule) -> Result<Vec<Range<usize>>> {
        let split = schedule.splits_backward();
        let time = |piece: &PieceProfile| {
            let cost = piece.cost_of(split);
            cost.forward + cost.backward_input + cost.backward_weight
        };
        self.cut(schedule.chunks(), time)
    }

    /// Costs of a schedule's chunks with one device per stage.
    pub fn costs(&self, parts: &[Range<usize>], schedule: &Schedule) -> Costs {
        let mut updates = vec![0.0; schedule.stages.len()];
        for (part, home) in parts.iter().zip(&schedule.homes) {
            let bytes: f64 = self.pieces[part.clone()].iter().map(|p| p.parameter_bytes).sum();
            updates[*home] += bytes * self.update_per_byte;
        }
        let split = schedule.splits_backward();
        let chunks = parts.iter().map(|part| self.chunk(part.clone(), split)).collect();
        Costs { chunks, link: self.link, sizes: Vec::new(), updates }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    fn profile(times: &[f64]) -> Profile {
        let piece = |(index, time): (usize, &f64)| PieceProfile {
            name: format!("block {index}"),
            cost: ChunkCost { forward: *time, ..ChunkCost::default() },
            split: None,
            parameter_bytes: 4.0,
        };
        let pieces = times.iter().enumerate().map(piece).collect();
        let (model, device) = ("m".to_string(), "d".to_string());
        Profile { model, device, rows: 2, columns: 8, pieces, link: Link::FREE, update_per_byte: 0.0 }
    }

    #[test]
    fn files_come_back_and_broken_ones_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("profile.json");
        let good = profile(&[1.0, 2.5]);
        let text = serde_json::to_string(&good).unwrap();
        std::fs::write(&path, &text).unwrap();
        assert_eq!(Profile::read(&path).unwrap(), good);
        for (from, to, place) in [
            ("\"forward\":2.5", "\"forward\":-2.5", "pieces[1]"),
            ("\"forward\":2.5", "\"forward\":\"x\"", "pieces[1]"),
            ("\"forward\":2.5", "\"forward\":1e308", "pieces[1]"),
            ("\"forward\":2.5", "\"forward\":2.5,\"activation_byte\":3", "pieces[1].activation_byte"),
            ("\"bytes_per_second\":0.0", "\"bytes_per_second\":1e-300", "link"),
            ("\"rows\":2", "\"rows\":0", "pieces"),
            ("\"rows\":2", "\"rows\":2,\"lines\":3", "lines"),
            ("\"update_per_byte\":0.0", "\"update_per_byte\":-1", "update_per_byte"),
        ] {
            std::fs::write(&path, text.replace(from, to)).unwrap();
            let Err(Error::File { position, .. }) = Profile::read(&path) else { panic!("{to} is read") };
            assert!(position.contains(place), "{to}: {position}");
        }
        std::fs::write(&path, text + "x").unwrap();
        assert!(matches!(Profile::read(&path), Err(Error::File { .. })));
    }

    #[test]
    fn the_balanced_cut_is_the_best_of_all() {
        let mut stream = Stream::new(3, 1);
        for _ in 0..200 {
            let times: Vec<f64> = (0..2 + stream.below(7)).map(|_| stream.below(9) as f64).collect();
            let profile = profile(&times);
            for parts in 1..=times.len() {
                let slowest =
                    |cuts: &[Range<usize>]| cuts.iter().map(|r| times[r.clone()].iter().sum()).fold(0.0, f64::max);
                let cut = profile.cut(parts, |p| p.cost.forward).unwrap();
                assert!(cut.len() == parts && cut.iter().all(|r| !r.is_empty()), "{cut:?}");
                assert!(cut[0].start == 0 && cut[parts - 1].end == times.len(), "{cut:?}");
                assert!(cut.windows(2).all(|w| w[0].end == w[1].start), "{cut:?}");
                let best = every_cut(0, times.len(), parts).iter().map(|c| slowest(c)).fold(f64::INFINITY, f64::min);
                assert!(slowest(&cut) <= best + 1e-9, "{times:?} in {parts}: {cut:?}");
            }
        }
        assert!([0, 2].iter().all(|&parts| profile(&[1.0]).cut(parts, |_| 1.0).is_err()));
    }

    fn every_cut(start: usize, end: usize, parts: usize) -> Vec<Vec<Range<usize>>> {
        if parts == 1 {
            return vec![vec![start..end]];
        }
        let first = |middle: usize| {
            let rest = every_cut(middle, end, parts - 1);
            rest.into_iter().map(move |r| std::iter::once(start..middle).chain(r).collect())
        };
        (start + 1..=end - (parts - 1)).flat_map(first).collect()
    }
}
