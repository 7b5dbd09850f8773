//! Hybrid data (LightChatGLM section 3.3): a source-language stream D_s and a target-language stream D_d, the five data modes
//! of its figures 5 and 6, and the weight of Eq 11.

use super::batch::{Batch, BatchOptions, Batches, Stream};
use super::order;
use super::tokenizer::SpecialIds;
use crate::error::{Error, Result};

/// What a run trains on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Mode {
    /// D_s alone (Fig 5).
    SourceOnly,
    /// D_d alone (Fig 5).
    TargetOnly,
    /// Both, weighted by Eq 11 (Fig 5 and 6).
    Hybrid,
    /// The larger of the two alone (Fig 6).
    High,
    /// The smaller of the two alone (Fig 6).
    Low,
}

impl Mode {
    pub const ALL: [Mode; 5] = [Mode::SourceOnly, Mode::TargetOnly, Mode::Hybrid, Mode::High, Mode::Low];

    pub const fn name(self) -> &'static str {
        match self {
            Mode::SourceOnly => "source_only",
            Mode::TargetOnly => "target_only",
            Mode::Hybrid => "hybrid",
            Mode::High => "high",
            Mode::Low => "low",
        }
    }

    /// The streams that this mode keeps: first D_s, then D_d. Streams of equal size count D_s as the high one.
    pub fn select(self, source: Stream, target: Stream) -> (Option<Stream>, Option<Stream>) {
        let source_is_high = source.examples.len() >= target.examples.len();
        match self {
            Mode::SourceOnly => (Some(source), None),
            Mode::TargetOnly => (None, Some(target)),
            Mode::Hybrid => (Some(source), Some(target)),
            Mode::High if source_is_high => (Some(source), None),
            Mode::Low if !source_is_high => (Some(source), None),
            Mode::High | Mode::Low => (None, Some(target)),
        }
    }
}

/// Eq 11: alpha = w_s n_s / (w_s n_s + w_d n_d), from sample counts and weights.
pub fn alpha(source_count: usize, target_count: usize, source_weight: f64, target_weight: f64) -> Result<f64> {
    for (parameter, value) in [("source_weight", source_weight), ("target_weight", target_weight)] {
        if !(value.is_finite() && value >= 0.0) {
            let (value, allowed) = (value.to_string(), "finite and not negative");
            return Err(Error::Parameter { op: "alpha", parameter, value, allowed });
        }
    }
    let (source, target) = (source_weight * source_count as f64, target_weight * target_count as f64);
    let alpha = source / (source + target);
    if !alpha.is_finite() {
        let (parameter, value) = ("weighted counts", format!("{source} and {target}"));
        return Err(Error::Parameter { op: "alpha", parameter, value, allowed: "finite, at least one above 0" });
    }
    Ok(alpha)
}

/// The w_s / w_d at which Eq 11 gives a wanted alpha.
pub fn weight_ratio(alpha: f64, source_count: usize, target_count: usize) -> Result<f64> {
    let ratio = alpha * target_count as f64 / ((1.0 - alpha) * source_count as f64);
    if !(ratio.is_finite() && ratio >= 0.0) {
        let (parameter, value) = ("alpha", format!("{alpha} of {source_count} and {target_count}"));
        return Err(Error::Parameter { op: "alpha", parameter, value, allowed: "0 to below 1, of two counts above 0" });
    }
    Ok(ratio)
}

/// Pairs of batches (D_s, D_d) for the two-stream loss of Eq 12. Both streams advance every step and reshuffle at their own epochs,
/// so the shorter one cycles; an epoch of the pair is an epoch of the longer.
#[derive(Clone, Debug)]
pub struct TwoStreams {
    source: Batches,
    target: Batches,
}

impl TwoStreams {
    /// Errors when a stream is empty.
    pub fn new(source: Stream, target: Stream, special: SpecialIds, options: BatchOptions) -> Result<Self> {
        // Streams of equal content must not walk in step.
        let other = BatchOptions { seed: order::hash(options.seed, u64::MAX), ..options.clone() };
        Ok(Self { source: Batches::new(source, special, options)?, target: Batches::new(target, special, other)? })
    }

    pub fn steps_per_epoch(&self) -> u64 {
        self.source.steps_per_epoch().max(self.target.steps_per_epoch())
    }

    pub fn pair(&mut self, step: u64) -> (Batch, Batch) {
        (self.source.batch(step), self.target.batch(step))
    }
}

#[cfg(test)]
mod tests {
    use super::super::batch::Example;
    use super::*;

    fn stream(name: &str, count: u32) -> Stream {
        // The name's first letter tells the streams apart in the tokens.
        let id = u32::from(name.as_bytes()[0]) * 1000;
        let examples = (0..count).map(|i| Example { context: vec![id + i, 4], labels: vec![9; 2 + i as usize % 5] });
        Stream { name: name.into(), examples: examples.collect(), ..Stream::default() }
    }

    const SPECIAL: SpecialIds = SpecialIds { pad: 0, unk: 1, bos: 2, eos: 3, gmask: 4 };

    fn options(rows: usize) -> BatchOptions {
        BatchOptions { rows, ..BatchOptions::default() }
    }

    fn first_tokens(batch: &Batch) -> Vec<u32> {
        batch.tokens.chunks(batch.columns).map(|row| row[0]).collect()
    }

    #[test]
    fn alpha_oracles() {
        assert!((alpha(90, 10, 1.0, 1.0).unwrap() - 0.9).abs() < 1e-15);
        let ratio = weight_ratio(0.65, 90, 10).unwrap();
        assert!((ratio - 0.2063).abs() < 5e-5, "{ratio}");
        assert!((alpha(90, 10, ratio, 1.0).unwrap() - 0.65).abs() < 1e-15);
        for bad in [alpha(0, 0, 1.0, 1.0), alpha(9, 1, 0.0, 0.0), alpha(1, 1, f64::NAN, 1.0), alpha(1, 1, -1.0, 2.0)] {
            assert!(matches!(bad, Err(Error::Parameter { .. })), "{bad:?}");
        }
        assert!(weight_ratio(1.0, 1, 1).is_err() && weight_ratio(0.5, 0, 1).is_err());
    }

    #[test]
    fn modes_keep_the_streams_they_name() {
        let kept = |mode: Mode, s, d| {
            let (source, target) = mode.select(stream("source", s), stream("data", d));
            (source.is_some(), target.is_some())
        };
        let expected = [
            (Mode::SourceOnly, (true, false), (true, false)),
            (Mode::TargetOnly, (false, true), (false, true)),
            (Mode::Hybrid, (true, true), (true, true)),
            (Mode::High, (true, false), (false, true)),
            (Mode::Low, (false, true), (true, false)),
        ];
        for (mode, source_larger, target_larger) in expected {
            assert_eq!((kept(mode, 9, 3), kept(mode, 3, 9)), (source_larger, target_larger), "{mode:?}");
            assert_eq!(serde_json::to_string(&mode).unwrap(), format!("\"{}\"", mode.name()));
        }
    }

    #[test]
    fn the_shorter_stream_cycles() {
        let mut streams = TwoStreams::new(stream("long", 100), stream("short", 20), SPECIAL, options(10)).unwrap();
        assert_eq!(streams.steps_per_epoch(), 10);
        let mut counts = std::collections::BTreeMap::new();
        for step in 0..streams.steps_per_epoch() {
            let (source, target) = streams.pair(step);
            for token in first_tokens(&source).into_iter().chain(first_tokens(&target)) {
                *counts.entry(token).or_insert(0) += 1;
            }
        }
        assert_eq!(counts.len(), 120);
        for (token, count) in counts {
            assert_eq!(count, if token / 1000 == u32::from(b'l') { 1 } else { 5 }, "{token}");
        }
    }

    #[test]
    fn the_random_mix_draws_with_probability_alpha() {
        let mut batches =
            Batches::mixed(stream("source", 900), stream("data", 100), 0.65, SPECIAL, options(20)).unwrap();
        let (mut drawn, mut total) = (0, 0);
        let mut seen = std::collections::BTreeMap::new();
        for step in 0..batches.steps_per_epoch() {
            for token in first_tokens(&batches.batch(step)) {
                total += 1;
                drawn += usize::from(token / 1000 == u32::from(b's'));
                *seen.entry(token).or_insert(0) += 1;
            }
        }
        assert_eq!(total, 1000);
        // Standard deviation 15; four of them.
        assert!((590..=710).contains(&drawn), "{drawn}");
        assert!(
            seen.iter().filter(|(t, _)| **t / 1000 == u32::from(b's')).all(|(_, n)| *n == 1),
            "none twice before all once"
        );
        assert!(Batches::mixed(stream("s", 1), stream("d", 1), 1.5, SPECIAL, options(1)).is_err());
        assert!(Batches::mixed(stream("s", 1), stream("d", 0), 0.5, SPECIAL, options(1)).is_err());
    }
}
