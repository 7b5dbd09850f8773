//! How a student listens to its teacher.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::compress::distillation::{Dynamic, Feature, Lesson, Logits, Match, Preset, Weights};
use crate::error::{Error, Result};
use crate::nn::Config;
use crate::nn::config::Size;
use crate::recipe::check::refuse;
use crate::train::store::MANIFEST;

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
        let said = self.preset.is_some() || self.dynamic.is_some() || self.logits.is_some() || self.top_k > 0;
        said || !self.matches.is_empty() || !self.teachers.is_empty()
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
        let gold = self.gold.unwrap_or(1.0);
        let factors = [self.weights.hidden, self.weights.soft, self.weights.hard, gold];
        let sound = |x: &f32| x.is_finite() && *x >= 0.0;
        if factors.iter().all(sound) && self.temperature.is_finite() && self.temperature > 0.0 {
            if factors.iter().all(|x| *x == 0.0) && !self.layerwise() {
                let value = format!("{:?}, gold {gold}", self.weights);
                return refuse(key, value, "at least one factor above 0: with none there is nothing to learn from");
            }
            return Ok(());
        }
        let value = format!("{:?}, gold {gold}, temperature {}", self.weights, self.temperature);
        refuse(key, value, "finite factors from 0, a temperature above 0")
    }

    /// What a layerwise student of sizes `student` cannot learn from a teacher of sizes `teacher`.
    pub(in crate::recipe) fn check_layers(
        &self,
        key: &str,
        student: Size,
        teacher: Size,
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
        // Layers alone are looked at: a vocabulary is not known yet.
        let [student, own] = [student, teacher].map(|size| Config::glm(size, 1));
        for (index, m) in lesson.matches.iter().enumerate() {
            if m.tutor > self.teachers.len() {
                let allowed = format!("0, or 1 to {} for the teachers of the list", self.teachers.len());
                return refuse(&format!("{key}.matches.tutor"), m.tutor, allowed);
            }
            // Layers of other teachers are known when their files are read.
            let other = if m.tutor == 0 { &own } else { &student };
            let checked = if m.tutor == 0 { *m } else { Match { teacher: m.student, ..*m } };
            checked.taps(other, &student).map_err(|e| named(&format!("matches[{index}]"), e))?;
            let [heads, inner] = [student.blocks[0].heads, student.blocks[0].heads * student.blocks[0].head_size];
            let apart = heads != own.blocks[0].heads && m.tutor == 0;
            let whole = m.heads > 0 && inner.is_multiple_of(m.heads);
            let of_heads = m.feature != Feature::Hidden && (m.feature == Feature::Attention || !whole);
            if apart && of_heads {
                let allowed = "hidden, or query, key and value with heads that every block can be split into: the student has other heads than its teacher";
                return refuse(&format!("{key}.matches[{index}].feature"), format!("{:?}", m.feature), allowed);
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
