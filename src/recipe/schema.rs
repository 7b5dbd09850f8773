//! The recipe: one TOML file that says the whole flow. Sections of stages have a file each, with their ranges.

mod distil;
mod experts;
mod hybrid;
mod model;
mod pipeline;
mod quantize;
mod sparsify;
mod structure;
mod tune;

use serde::{Deserialize, Serialize};

use super::order::Step;
use crate::train::optimizer::{Rule, Settings};
use crate::train::precision::Precision;
use crate::train::schedule::{Schedule, Shape};

pub use distil::{Distil, HiddenProjection};
pub use experts::{Experts, Slower};
pub use hybrid::Hybrid;
pub use model::{Architecture, Family, layout};
pub use pipeline::{Auto, Messages, Pipeline, Replicas, Stages};
pub use quantize::{Inputs, Method, Observer, Quantize};
pub use sparsify::{PruningMethod, Sparsify};
pub use structure::{Cost as GateCost, L0, Selection, Structure, Vocabulary};
pub use tune::Tune;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Names the run folder.
    pub name: String,
    #[serde(default = "default_seed")]
    pub seed: u64,
    /// The stages after the teacher, each that has a section once; without it structure, sparsify, quantize, experts,
    /// hybrid, tune.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<Vec<Step>>,
    pub data: Data,
    pub model: Architecture,
    pub teacher: Training,
    #[serde(default)]
    pub structure: Option<Structure>,
    #[serde(default)]
    pub sparsify: Option<Sparsify>,
    #[serde(default)]
    pub quantize: Option<Quantize>,
    #[serde(default)]
    pub experts: Option<Experts>,
    #[serde(default)]
    pub hybrid: Option<Hybrid>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tune: Option<Tune>,
    /// How every training is spread over devices; without it each runs on one.
    #[serde(default)]
    pub pipeline: Option<Pipeline>,
    #[serde(default)]
    pub evaluate: Evaluate,
}

fn default_seed() -> u64 {
    1
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Corpus {
    /// The embedded English-Chinese computer terms, expanded to this many pairs.
    Terms { pairs: usize },
    /// gettext catalogs installed on this machine (collected into the run folder).
    Catalogs {
        #[serde(default = "default_locale_root")]
        root: String,
    },
    /// A folder with train.tsv, validation.tsv and test.tsv, as `espalier data collect` writes it.
    Folder { path: String },
}

fn default_locale_root() -> String {
    "/usr/share/locale".into()
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    pub corpus: Corpus,
    /// Language codes of the pairs' sides.
    #[serde(default = "english")]
    pub source: String,
    #[serde(default = "chinese")]
    pub target: String,
    /// Byte-level BPE entries.
    pub vocabulary: usize,
    /// Longest example in tokens; longer ones are left out and counted.
    pub max_length: usize,
    /// Share of the training pairs whose reverse direction (target language to source) is labelled too: the small
    /// target-language stream D_d. The forward direction of all pairs is the source-language stream D_s.
    #[serde(default = "half")]
    pub target_share: f64,
    /// Pairs read at most, 0 for all.
    #[serde(default)]
    pub limit: usize,
}

fn english() -> String {
    "en".into()
}

fn chinese() -> String {
    "zh".into()
}

fn half() -> f64 {
    0.5
}

/// Steps and settings of one training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    pub steps: u64,
    /// Sentence pairs per micro-batch.
    pub batch: usize,
    /// Micro-batches per step.
    #[serde(default = "one")]
    pub accumulate: usize,
    pub learning_rate: f64,
    /// Share of the steps spent on warm-up.
    #[serde(default = "tenth")]
    pub warmup: f64,
    #[serde(default)]
    pub schedule: Shape,
    #[serde(default)]
    pub rule: Rule,
    #[serde(default = "default_decay")]
    pub weight_decay: f32,
    #[serde(default = "default_clip")]
    pub clip: f32,
    /// Type of products and activations; parameters and optimizer state are f32.
    #[serde(default)]
    pub precision: Precision,
    #[serde(default)]
    pub dropout: f32,
    #[serde(default)]
    pub validate_every: u64,
    #[serde(default)]
    pub checkpoint_every: u64,
}

fn one() -> usize {
    1
}

fn tenth() -> f64 {
    0.1
}

fn default_decay() -> f32 {
    0.05
}

fn default_clip() -> f32 {
    1.0
}

impl Training {
    pub fn settings(&self) -> Settings {
        let warmup = (self.steps as f64 * self.warmup).round() as u64;
        Settings {
            schedule: Schedule { peak: self.learning_rate, warmup, shape: self.schedule },
            rule: self.rule,
            weight_decay: self.weight_decay,
            clip: self.clip,
            precision: self.precision,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluate {
    /// Sentences per direction for teacher-forced measures, 0 for all.
    #[serde(default = "default_sentences")]
    pub sentences: usize,
    /// Sentences per direction that are decoded for BLEU, chrF and exact match.
    #[serde(default = "default_decoded")]
    pub decoded: usize,
    #[serde(default = "one")]
    pub beams: usize,
    #[serde(default = "default_latency_batches")]
    pub latency_batches: Vec<usize>,
    #[serde(default = "default_latency_length")]
    pub latency_length: usize,
    /// Whether compressed layers are timed on all ways to compute them, and run on the fastest.
    #[serde(default = "yes")]
    pub fastest: bool,
}

fn default_sentences() -> usize {
    400
}

fn default_decoded() -> usize {
    100
}

fn default_latency_batches() -> Vec<usize> {
    vec![1, 4, 8]
}

fn default_latency_length() -> usize {
    64
}

impl Default for Evaluate {
    fn default() -> Self {
        Self {
            sentences: default_sentences(),
            decoded: default_decoded(),
            beams: 1,
            latency_batches: default_latency_batches(),
            latency_length: default_latency_length(),
            fastest: yes(),
        }
    }
}

impl Evaluate {
    /// Tokens of the passes whose latency is measured on a model of so many positions, and one token, which generation runs on.
    pub fn rows(&self, positions: usize) -> Vec<usize> {
        let length = self.latency_length.min(positions);
        let mut rows: Vec<usize> = [1].into_iter().chain(self.latency_batches.iter().map(|b| b * length)).collect();
        rows.sort_unstable();
        rows.dedup();
        rows
    }
}

fn default_calibration() -> usize {
    16
}

fn yes() -> bool {
    true
}

/// TOML's integers are signed.
pub const MAX_SEED: u64 = i64::MAX as u64;
/// Hypotheses of a beam search: each holds a cache of keys and values.
pub const MAX_BEAMS: usize = 64;
