//! The run report as data: what `report.json` holds and every rendering reads.
//!
//! Shares and accuracies are 0 to 1, BLEU and chrF 0 to 100, sizes in bytes, times in the unit of the name. What was not
//! measured is `None`, never zero.

use serde::{Deserialize, Serialize};

/// The schema's number, raised when a field changes its meaning.
pub const VERSION: u32 = 1;

/// Everything a report says about one run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunReport {
    pub version: u32,
    pub title: String,
    /// One sentence under the title: what was run on what.
    pub summary: String,
    /// When the run ended, as RFC 3339 text.
    pub finished: String,
    /// Wall time of the whole run.
    pub seconds: f64,
    pub machine: Machine,
    /// The resolved recipe, as TOML text.
    pub recipe: String,
    /// In the order they ran, the teacher first.
    pub stages: Vec<StageRow>,
    pub curves: Vec<LossCurve>,
    /// What a reader must know to judge the numbers.
    pub notes: Vec<String>,
    /// The command line that repeats the run.
    pub reproduce: String,
}

/// Where the numbers were measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// The kernels' device, for example "cpu" or "wgpu: llvmpipe".
    pub device: String,
    pub driver: String,
    /// A software adapter's times are not to be ranked with hardware's.
    pub software: bool,
    pub processor: String,
    pub cores: u32,
    pub memory_bytes: u64,
    pub system: String,
    /// Name and version: espalier itself, its commit, the compiler.
    pub versions: Vec<(String, String)>,
    /// Name and hash: data, tokenizer, checkpoints.
    pub hashes: Vec<(String, String)>,
}

/// One model of the run: the teacher, or what a stage made of it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageRow {
    pub name: String,
    /// A comparison such as random pruning: listed, but no step of the waterfall.
    #[serde(default)]
    pub baseline: bool,
    pub parameters: u64,
    /// Bytes of weights that one token touches, in the representation that runs.
    pub activated_bytes: u64,
    /// Bytes of all weights, in the representation that runs.
    pub total_bytes: u64,
    /// Over both directions, under teacher forcing.
    pub token_accuracy: Option<f64>,
    pub exact_match: Option<f64>,
    /// Token accuracy as a share of the teacher's.
    pub retained: Option<f64>,
    /// Nats per token.
    pub validation_loss: Option<f64>,
    pub directions: Vec<DirectionScores>,
    pub latency: Vec<Latency>,
    pub peak_memory_bytes: Option<u64>,
    /// Share of zero weights per linear, for example ("blocks.0.ffn.up", 0.5).
    pub sparsity: Vec<(String, f64)>,
    pub invariants: Vec<Invariant>,
    /// Wall time of the stage.
    pub seconds: Option<f64>,
}

/// Quality of one translation direction.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DirectionScores {
    /// For example "en-zh".
    pub direction: String,
    pub sentences: u64,
    pub token_accuracy: Option<f64>,
    pub exact_match: Option<f64>,
    /// Of a tagger: F1 over entities, as conlleval reads tags.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entity_f1: Option<f64>,
    pub bleu: Option<Score>,
    pub chrf: Option<Score>,
    /// Mean over sentences of P(target | source).
    pub sequence_probability: Option<f64>,
    /// Mean over sentences of P(target | source)^(1 / tokens).
    pub probability_per_token: Option<f64>,
    pub perplexity: Option<f64>,
}

/// A score that means nothing without the way it was computed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Score {
    pub value: f64,
    pub signature: String,
}

/// Time of one forward pass over a batch.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Latency {
    pub batch: u32,
    /// Tokens per row.
    pub length: u32,
    pub samples: u32,
    pub p5_ms: f64,
    pub p50_ms: f64,
    pub p95_ms: f64,
}

/// A promise of a stage and what was measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Invariant {
    pub name: String,
    pub measured: String,
    pub ok: bool,
}

/// Losses over the steps of one stage.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossCurve {
    pub stage: String,
    /// For example "nats/token".
    pub unit: String,
    pub points: Vec<LossPoint>,
}

/// Step, training loss, validation loss.
pub type LossPoint = (u64, Option<f64>, Option<f64>);

impl RunReport {
    /// Fills `retained` of every stage from token accuracies and the first stage, the teacher.
    pub fn set_retained(&mut self) {
        let teacher = self.stages.first().and_then(|stage| stage.token_accuracy).filter(|accuracy| *accuracy > 0.0);
        for stage in &mut self.stages {
            stage.retained = teacher.zip(stage.token_accuracy).map(|(teacher, own)| own / teacher);
        }
    }

    /// The teacher, and the last stage that is no baseline when it is another one.
    pub fn ends(&self) -> Option<(&StageRow, Option<&StageRow>)> {
        let teacher = self.stages.first()?;
        Some((teacher, self.stages.iter().skip(1).rfind(|stage| !stage.baseline)))
    }

    /// JSON text, ending in a line break. Numbers that are not finite become null.
    ///
    /// # Errors
    /// `Error::Io` without a path of its own should serialisation fail.
    pub fn to_json(&self) -> crate::Result<Vec<u8>> {
        let mut text =
            serde_json::to_vec_pretty(self).map_err(|error| crate::Error::io("report.json", error.into()))?;
        text.push(b'\n');
        Ok(text)
    }

    /// Reads what [`Self::to_json`] wrote. `path` is named in errors.
    ///
    /// # Errors
    /// `Error::File` with the key and position, for JSON that is no report or of another version.
    pub fn from_json(path: impl AsRef<std::path::Path>, text: &[u8]) -> crate::Result<Self> {
        let path = path.as_ref();
        let report: Self = crate::json::read(path, text)?;
        if report.version != VERSION {
            return Err(crate::Error::file(path, "version", format!("{} is not {VERSION}", report.version)));
        }
        Ok(report)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stage(name: &str, accuracy: Option<f64>, baseline: bool) -> StageRow {
        StageRow { name: name.into(), token_accuracy: accuracy, baseline, ..StageRow::default() }
    }

    #[test]
    fn retention_is_relative_to_the_first_stage_and_absent_where_unmeasured() {
        let mut report = RunReport {
            stages: vec![
                stage("teacher", Some(0.8), false),
                stage("student", Some(0.6), false),
                stage("x", None, true),
            ],
            ..RunReport::default()
        };
        report.set_retained();
        let retained: Vec<_> = report.stages.iter().map(|stage| stage.retained).collect();
        assert_eq!(retained[0], Some(1.0));
        assert!((retained[1].unwrap() - 0.75).abs() < 1e-12);
        assert_eq!(retained[2], None);
        assert_eq!(report.ends().unwrap().1.unwrap().name, "student", "a baseline is not the result");
        report.stages[0].token_accuracy = Some(0.0);
        report.set_retained();
        assert_eq!(report.stages[1].retained, None);
    }

    #[test]
    fn json_round_trip_with_values_json_cannot_hold() {
        let mut report = RunReport { version: VERSION, title: "t\u{202e}".into(), ..RunReport::default() };
        report.curves.push(LossCurve { points: vec![(1, Some(f64::NAN), None)], ..LossCurve::default() });
        let back = RunReport::from_json("r.json", &report.to_json().unwrap()).unwrap();
        assert_eq!(back.curves[0].points, [(1, None, None)]);
        assert_eq!(back.title, report.title, "data stays as it is; renderings clean it");
    }

    #[test]
    fn foreign_json_is_refused_with_its_place() {
        let place = |text: &[u8]| match RunReport::from_json("r.json", text).unwrap_err() {
            crate::Error::File { position, .. } => position,
            other => panic!("{other}"),
        };
        assert_eq!(place(b"{\"version\": 1, \"title\": 3}"), "title");
        let future = RunReport { version: 9, ..RunReport::default() };
        assert_eq!(place(&future.to_json().unwrap()), "version");
    }
}
