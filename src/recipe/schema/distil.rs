//! How a student listens to its teacher.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::compress::distillation::{Dynamic, Feature, Lesson, Logits, Match, MatchProjection, Preset, Weights};
use crate::compress::written;
use crate::data::persist::read_capped;
use crate::error::{Error, Result};
use crate::json;
use crate::nn::config::Size;
use crate::nn::{Block, Config, Tap};
use crate::recipe::check::refuse;
use crate::train::store::{CONFIG, MANIFEST};

const MAX_CONFIG: u64 = 16 << 20;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HiddenProjection {
    /// The teacher's channels that the student kept.
    #[default]
    Kept,
    /// A learned student -> teacher projection.
    Learned,
}

/// How a student listens to the teacher: to its last hidden states and its words, as the cache has them; or, with any of
/// `preset`, `matches`, `dynamic`, `logits`, `teachers` and `top_k`, layer by layer to teachers that run beside it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Distil {
    #[serde(default = "default_distil_weights")]
    pub weights: Weights,
    /// Factor of the gold labels' cross-entropy; without it 1, or what the preset says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gold: Option<f32>,
    #[serde(default = "default_temperature")]
    pub temperature: f32,
    #[serde(default = "super::yes")]
    pub squared: bool,
    /// Eq 10's half sum of squares (divided by the step's labels) instead of the mean.
    #[serde(default)]
    pub literal_sum: bool,
    #[serde(default)]
    pub normalised: bool,
    #[serde(default)]
    pub projection: HiddenProjection,
    /// The k largest logits of each token are computed once and kept with their log-sum-exp; 0 for a teacher that runs
    /// beside the student.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub top_k: usize,
    /// Folders of saved models that teach too: logits are averaged, matches name them by `tutor` from 1 on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub teachers: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset: Option<Preset>,
    /// Beside those of the preset.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub matches: Vec<Match>,
    /// In place of the preset's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dynamic: Option<Dynamic>,
    /// In place of the preset's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logits: Option<Logits>,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

fn default_distil_weights() -> Weights {
    // Hard labels of a small teacher are often wrong. On real text gold 0.5 with hard 0.5 ended at 3.83 nats, gold 1.0
    // with hard 0.1 at 3.76; the two were changed together.
    Weights { hidden: 0.9, soft: 0.5, hard: 0.1 }
}

fn default_temperature() -> f32 {
    2.0
}

impl Default for Distil {
    fn default() -> Self {
        Self {
            weights: default_distil_weights(),
            gold: None,
            temperature: default_temperature(),
            squared: true,
            literal_sum: false,
            normalised: false,
            projection: HiddenProjection::Kept,
            top_k: 0,
            teachers: Vec::new(),
            preset: None,
            matches: Vec::new(),
            dynamic: None,
            logits: None,
        }
    }
}

impl Distil {
    /// Whether teachers run beside the student, or their largest logits are kept.
    pub fn layerwise(&self) -> bool {
        self.layerwise_key().is_some()
    }

    /// The first of the keys that make it so.
    pub(in crate::recipe) fn layerwise_key(&self) -> Option<&'static str> {
        let keys = [
            ("preset", self.preset.is_some()),
            ("matches", !self.matches.is_empty()),
            ("dynamic", self.dynamic.is_some()),
            ("logits", self.logits.is_some()),
            ("teachers", !self.teachers.is_empty()),
            ("top_k", self.top_k > 0),
        ];
        keys.into_iter().find_map(|(key, said)| said.then_some(key))
    }

    /// Everything that a layerwise student of so many blocks learns from.
    pub fn lesson(&self, student: usize, teacher: usize) -> Lesson {
        let preset = self.preset.map(|preset| preset.lesson(student, teacher));
        let mut lesson = preset.unwrap_or(Lesson { matches: Vec::new(), dynamic: None, logits: None, gold: 1.0 });
        lesson.matches.extend(&self.matches);
        lesson.dynamic = self.dynamic.clone().or(lesson.dynamic);
        let only = lesson.matches.is_empty() && lesson.dynamic.is_none() && self.layerwise();
        // Teachers and kept logits without a word on the loss are listened to in the usual way.
        lesson.logits = self.logits.or(lesson.logits).or(only.then(Logits::default));
        lesson.gold = self.gold.unwrap_or(lesson.gold);
        lesson
    }

    /// Factor of the gold labels' cross-entropy for a student of so many blocks.
    pub fn gold(&self, student: usize, teacher: usize) -> f32 {
        self.lesson(student, teacher).gold
    }

    pub(in crate::recipe) fn check(&self, key: &str) -> Result<()> {
        let factors = [
            ("weights.hidden", self.weights.hidden),
            ("weights.soft", self.weights.soft),
            ("weights.hard", self.weights.hard),
            ("gold", self.gold.unwrap_or(1.0)),
        ];
        if let Some((field, x)) = factors.iter().find(|(_, x)| !(x.is_finite() && *x >= 0.0)) {
            return refuse(&format!("{key}.{field}"), x, "finite, from 0");
        }
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return refuse(&format!("{key}.temperature"), self.temperature, "finite and above 0");
        }
        if factors.iter().all(|(_, x)| *x == 0.0) && !self.layerwise() {
            let allowed = "at least one factor above 0: with none there is nothing to learn from";
            return refuse(key, "weights and gold of 0", allowed);
        }
        Ok(())
    }

    /// What a layerwise student of sizes `student` cannot learn from a teacher of sizes `teacher`, each with its width; a
    /// student's that gates choose is not known.
    pub(in crate::recipe) fn check_layers(
        &self,
        key: &str,
        (student, width): (Size, Option<usize>),
        (teacher, whole): (Size, usize),
        pipeline: bool,
    ) -> Result<()> {
        if !self.layerwise() {
            return Ok(());
        }
        let plain = Self {
            gold: self.gold,
            top_k: self.top_k,
            teachers: self.teachers.clone(),
            preset: self.preset,
            matches: self.matches.clone(),
            dynamic: self.dynamic.clone(),
            logits: self.logits,
            ..Self::default()
        };
        if *self != plain {
            let allowed =
                "with preset, matches, logits, teachers or top_k: weights, temperature and projections are theirs";
            return refuse(key, "weights, temperature, squared, literal_sum, normalised or projection", allowed);
        }
        if pipeline {
            return refuse(
                key,
                "preset, matches, logits, teachers or top_k",
                "without [pipeline]: the teacher runs beside the whole student",
            );
        }
        let lesson = self.lesson(student.layers, teacher.layers);
        let layers = !lesson.matches.is_empty() || lesson.dynamic.is_some();
        if self.top_k > 0 && (layers || !self.teachers.is_empty()) {
            return refuse(
                &format!("{key}.top_k"),
                self.top_k,
                "0 with matches or more teachers: kept logits say nothing of layers",
            );
        }
        let missing = |path: &&String| !Path::new(path.as_str()).join(MANIFEST).is_file();
        if let Some(path) = self.teachers.iter().find(missing) {
            return refuse(&format!("{key}.teachers"), format!("{path:?}"), "folders of saved models");
        }
        let named = |field: &str, error: Error| match error {
            Error::Parameter { parameter, value, allowed, .. } => {
                Error::Recipe { key: format!("{key}.{field}.{parameter}"), value, allowed: allowed.into() }
            }
            other => other,
        };
        if let Some(logits) = &lesson.logits {
            logits.check(self.top_k > 0).map_err(|e| named("logits", e))?;
        }
        // Shapes alone are looked at: a vocabulary is not known yet.
        let [student, own] = [student, teacher].map(|size| Config::glm(size, 1));
        let own = Config { width: whole, ..own };
        let tutors = self.teachers.iter().map(|path| tutor(path)).collect::<Result<Vec<_>>>()?;
        for (index, m) in lesson.matches.iter().enumerate() {
            let key = format!("{key}.matches[{index}]");
            let Some(teacher) = [&own].into_iter().chain(&tutors).nth(m.tutor) else {
                let allowed = format!("0, or 1 to {} for the teachers of the list", tutors.len());
                return refuse(&format!("{key}.tutor"), m.tutor, allowed);
            };
            for (field, layer, config) in [("teacher", m.teacher, teacher), ("student", m.student, &student)] {
                if layer.of(config).is_err() {
                    let allowed = format!("0 to {} (blocks), or from the end -1 on", config.blocks.len());
                    return refuse(&format!("{key}.{field}"), layer.0, allowed);
                }
            }
            let [tap, _] = m.taps(teacher, &student).map_err(|e| named(&format!("matches[{index}]"), e))?;
            match tap {
                Tap::Hidden(_) => check_widths(&key, m, width, teacher.width)?,
                Tap::Attention(block) => check_heads(&key, m, &student.blocks[0], &teacher.blocks[block])?,
            }
        }
        if let Some(dynamic) = &lesson.dynamic {
            dynamic.numbers(&own).map_err(|e| named("dynamic", e))?;
        }
        if lesson.matches.iter().all(|m| m.weight == 0.0)
            && lesson.dynamic.as_ref().is_none_or(|d| d.weight == 0.0)
            && lesson.logits.is_none_or(|l| l.weight == 0.0)
            && lesson.gold == 0.0
        {
            return refuse(key, "no loss at all", "a weight above 0: with none there is nothing to learn from");
        }
        Ok(())
    }
}

/// Sizes of a saved model.
fn tutor(path: &str) -> Result<Config> {
    let file = Path::new(path).join(CONFIG);
    let config: Config = json::read(&file, &read_capped(&file, MAX_CONFIG)?)?;
    config.check(&file)?;
    Ok(config)
}

/// That hidden states of these widths can meet: what a training would refuse when it starts.
fn check_widths(key: &str, m: &Match, student: Option<usize>, teacher: usize) -> Result<()> {
    let key = format!("{key}.projection");
    match m.projection {
        MatchProjection::None if student != Some(teacher) => {
            let own = student.map_or("as many as gates leave".into(), |width| width.to_string());
            let value = format!("none where the student has {own} channels and the teacher {teacher}");
            refuse(&key, value, "auto, kept, linear, relu or tanh where widths differ")
        }
        MatchProjection::Kept if m.tutor > 0 => {
            let allowed = "auto, none, linear, relu or tanh: of this teacher's channels the student kept none";
            refuse(&key, "kept", allowed)
        }
        _ => Ok(()),
    }
}

/// That attention and relations of these blocks have as many heads, or can be split into as many.
fn check_heads(key: &str, m: &Match, student: &Block, teacher: &Block) -> Result<()> {
    let channels = [student, teacher].map(|block| block.heads * block.head_size);
    let split = m.heads > 0 && channels.iter().all(|channels| channels.is_multiple_of(m.heads));
    if student.heads != teacher.heads && (m.feature == Feature::Attention || !split) {
        let allowed = "hidden, or query, key and value with heads that every block can be split into: the student has other heads than its teacher";
        return refuse(&format!("{key}.feature"), written(&m.feature), allowed);
    }
    if m.heads > 0 && !split {
        let allowed =
            format!("0, or a divisor of {} and {}, the channels of both attentions", channels[0], channels[1]);
        return refuse(&format!("{key}.heads"), m.heads, allowed);
    }
    Ok(())
}
