//! The recipe: one TOML file that says the whole flow. Unknown keys are refused with their line and the allowed ones.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::staged::Pipeline;
use crate::compress::distil::Weights;
use crate::compress::hybrid::StudentLoss;
use crate::error::{Error, Result};
use crate::nn::config::Size;
use crate::train::optimizer::{Rule, Settings};
use crate::train::precision::Precision;
use crate::train::schedule::{Schedule, Shape};

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Names the run folder.
    pub name: String,
    #[serde(default = "default_seed")]
    pub seed: u64,
    pub data: Data,
    pub model: Size,
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
#[serde(rename_all = "snake_case")]
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

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Selection {
    #[default]
    Importance,
    /// The baseline: same shapes, random structures, no distillation.
    Random,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HiddenProjection {
    /// The teacher's channels that the student kept.
    #[default]
    Kept,
    /// A learned student -> teacher projection.
    Learned,
}

/// How a student listens to the teacher.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Distil {
    #[serde(default = "default_distil_weights")]
    pub weights: Weights,
    /// Factor of the gold labels' cross-entropy.
    #[serde(default = "default_gold")]
    pub gold: f32,
    #[serde(default = "default_temperature")]
    pub temperature: f32,
    #[serde(default = "yes")]
    pub squared: bool,
    /// Eq 10's half sum of squares (divided by the step's labels) instead of the mean.
    #[serde(default)]
    pub literal_sum: bool,
    #[serde(default)]
    pub normalised: bool,
    #[serde(default)]
    pub projection: HiddenProjection,
}

fn default_distil_weights() -> Weights {
    // Hard labels of a small teacher are often wrong. On real text gold 0.5 with hard 0.5 ended at 3.83 nats, gold 1.0
    // with hard 0.1 at 3.76; the two were changed together.
    Weights { hidden: 0.9, soft: 0.5, hard: 0.1 }
}

fn default_gold() -> f32 {
    1.0
}

fn default_temperature() -> f32 {
    2.0
}

fn yes() -> bool {
    true
}

impl Default for Distil {
    fn default() -> Self {
        Self {
            weights: default_distil_weights(),
            gold: default_gold(),
            temperature: default_temperature(),
            squared: true,
            literal_sum: false,
            normalised: false,
            projection: HiddenProjection::Kept,
        }
    }
}

/// Structured pruning, then recovery by distillation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Structure {
    pub layers: usize,
    pub head_size: usize,
    #[serde(default)]
    pub selection: Selection,
    /// Also train the random-pruning baseline with the same steps, for the report.
    #[serde(default)]
    pub compare_random: bool,
    #[serde(default = "default_calibration")]
    pub calibration_batches: usize,
    #[serde(default)]
    pub distil: Distil,
    pub training: Training,
}

fn default_calibration() -> usize {
    16
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mask {
    #[default]
    OneDimensional,
    TwoDimensional,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sparsify {
    #[serde(default)]
    pub mask: Mask,
    /// Parts of linear names that are pruned; empty: all linears of all blocks.
    #[serde(default)]
    pub linears: Vec<String>,
    #[serde(default)]
    pub distil: Distil,
    pub training: Training,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantize {
    #[serde(default)]
    pub distil: Distil,
    pub training: Training,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Experts {
    pub expert_size: usize,
    /// Share of the experts executed per token.
    pub share: f64,
    #[serde(default = "default_router_steps")]
    pub router_steps: usize,
    #[serde(default = "default_router_rate")]
    pub router_rate: f32,
    #[serde(default = "default_calibration")]
    pub calibration_batches: usize,
}

fn default_router_steps() -> usize {
    300
}

fn default_router_rate() -> f32 {
    0.01
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hybrid {
    /// Task weights (w_s, w_d) of Eq 11; alpha follows from them and the streams' sizes.
    #[serde(default = "equal_weights")]
    pub stream_weights: (f64, f64),
    /// Overrides Eq 11.
    #[serde(default)]
    pub alpha: Option<f64>,
    #[serde(default = "default_lambda")]
    pub lambda: f64,
    #[serde(default)]
    pub student_loss: StudentLoss,
    #[serde(default = "default_temperature_one")]
    pub temperature: f32,
    pub teacher: Training,
    pub student: Training,
}

fn equal_weights() -> (f64, f64) {
    (1.0, 1.0)
}

fn default_lambda() -> f64 {
    0.65
}

fn default_temperature_one() -> f32 {
    1.0
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
        }
    }
}

/// TOML's integers are signed.
pub const MAX_SEED: u64 = i64::MAX as u64;
/// Hypotheses of a beam search: each holds a cache of keys and values.
pub const MAX_BEAMS: usize = 64;

/// The recipe that `espalier run` takes without an argument.
pub const QUICK: &str = include_str!("../../recipes/quick.toml");

const MAX_BYTES: u64 = 16 << 20;

impl Recipe {
    /// Reads `path`, or the embedded quick recipe, and applies `--set key=value` overrides.
    pub fn load(path: Option<&Path>, overrides: &[String]) -> Result<Self> {
        match path {
            None => Self::parse(Path::new("quick.toml"), QUICK, overrides),
            Some(path) => {
                // A recipe is an argument: whatever is wrong with it is a matter of usage, not of data.
                let usage = |rule: String| Error::Usage { argument: "RECIPE", value: path.display().to_string(), rule };
                let bytes = crate::data::persist::read_capped(path, MAX_BYTES).map_err(|e| match e {
                    Error::Io { source, .. } => usage(format!("cannot be read: {source}")),
                    Error::File { rule, .. } => usage(rule),
                    other => other,
                })?;
                let text = String::from_utf8(bytes)
                    .map_err(|e| usage(format!("is not UTF-8 from byte {} on", e.utf8_error().valid_up_to() + 1)))?;
                Self::parse(path, &text, overrides)
            }
        }
    }

    pub fn parse(path: &Path, text: &str, overrides: &[String]) -> Result<Self> {
        let recipe: Recipe = if overrides.is_empty() {
            toml::from_str(text).map_err(|e| refused(path, text, &e))?
        } else {
            // Parsed once as it stands, so that its own mistakes are reported with their lines.
            toml::from_str::<Recipe>(text).map_err(|e| refused(path, text, &e))?;
            let table: toml::Table = toml::from_str(text).map_err(|e| refused(path, text, &e))?;
            overridden(table, overrides)?
        };
        recipe.check()?;
        Ok(recipe)
    }

    /// The resolved recipe as TOML.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).map_err(|e| Error::file("recipe", "serialisation", e))
    }
}

/// Applies all overrides, then reads the whole: one may bring what another needs.
fn overridden(mut table: toml::Table, overrides: &[String]) -> Result<Recipe> {
    let mut states = Vec::with_capacity(overrides.len());
    for set in overrides {
        apply(&mut table, set)?;
        states.push(table.clone());
    }
    table.try_into().map_err(|error: toml::de::Error| {
        // To blame is the first one behind the last state that reads.
        let sound = states.iter().rposition(|state| state.clone().try_into::<Recipe>().is_ok()).map_or(0, |i| i + 1);
        let blamed = states.get(sound).and_then(|state| state.clone().try_into::<Recipe>().err()).unwrap_or(error);
        let value = overrides.get(sound).cloned().unwrap_or_default();
        Error::Usage { argument: "--set", value, rule: blamed.message().trim().to_string() }
    })
}

/// A TOML error with key, line and, for an unknown key, the allowed ones.
fn refused(path: &Path, text: &str, error: &toml::de::Error) -> Error {
    let line = error.span().map(|s| text[..s.start.min(text.len())].matches('\n').count() + 1);
    let place = line.map_or_else(|| path.display().to_string(), |n| format!("{}, line {n}", path.display()));
    let message = error.message();
    let unknown = message.strip_prefix("unknown field `").or(message.strip_prefix("unknown variant `"));
    if let Some((key, rest)) = unknown.and_then(|m| m.split_once('`')) {
        let allowed = rest.trim_start_matches(", expected one of ").trim_start_matches(", expected ");
        return Error::Recipe { key: place, value: key.to_string(), allowed: allowed.to_string() };
    }
    let written = line.and_then(|n| text.lines().nth(n - 1)).unwrap_or("this file").trim();
    Error::Recipe { key: place, value: format!("\"{written}\""), allowed: message.to_string() }
}

/// Sets `a.b.c=value`; the value is TOML, or a string where it does not parse as such.
fn apply(table: &mut toml::Table, set: &str) -> Result<()> {
    let usage = |rule: &str| Error::Usage { argument: "--set", value: set.to_string(), rule: rule.to_string() };
    let (key, value) = set.split_once('=').ok_or_else(|| usage("key=value, for example teacher.steps=100"))?;
    let parsed = toml::from_str::<toml::Table>(&format!("value = {value}")).ok().and_then(|mut t| t.remove("value"));
    let value = parsed.unwrap_or_else(|| toml::Value::String(value.to_string()));
    let mut place = table;
    let parts: Vec<&str> = key.split('.').collect();
    let Some((last, parents)) = parts.split_last() else {
        return Err(usage("a key"));
    };
    for part in parents {
        let next = place.entry(part.to_string()).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        place = next.as_table_mut().ok_or_else(|| usage(&format!("{part} holds no keys")))?;
    }
    // `--set experts=false` leaves a stage out.
    if value.as_bool() == Some(false) && place.get(*last).is_some_and(toml::Value::is_table) {
        place.remove(*last);
    } else {
        place.insert(last.to_string(), value);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_recipe_parses_and_survives_its_own_form() {
        let recipe = Recipe::load(None, &[]).unwrap();
        let again = Recipe::parse(Path::new("again"), &recipe.to_toml().unwrap(), &[]).unwrap();
        assert_eq!(recipe, again);
    }

    #[test]
    fn unknown_keys_name_line_and_allowed_keys() {
        let text = QUICK.replace("[teacher]\n", "[teacher]\nstepz = 3\n");
        let error = Recipe::parse(Path::new("r.toml"), &text, &[]).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("stepz") && message.contains("line ") && message.contains("`steps`"), "{message}");
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn overrides_reach_nested_keys_and_can_leave_a_stage_out() {
        let sets = ["teacher.steps=7".to_string(), "experts=false".to_string(), "name=other".to_string()];
        let recipe = Recipe::load(None, &sets).unwrap();
        assert_eq!((recipe.teacher.steps, recipe.experts.is_none(), recipe.name.as_str()), (7, true, "other"));
        assert!(Recipe::load(None, &["teacher.steps=0".into()]).is_err());
        let sets = ["teacher.stepz=1".to_string(), "seed=3".to_string()];
        let error = Recipe::load(None, &sets).unwrap_err();
        assert!(error.to_string().starts_with("--set: teacher.stepz=1 is not usable: unknown field"), "{error}");
        let error = Recipe::load(None, &["seed=1".into(), "teacher.steps=many".into()]).unwrap_err();
        assert!(error.to_string().contains("--set: teacher.steps=many"), "{error}");
        assert!(Recipe::load(None, &["nonsense".into()]).is_err());
    }
}
