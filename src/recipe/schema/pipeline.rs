//! `[pipeline]`: trainings in stages.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Recipe;
use crate::error::{Error, Result};
use crate::pipeline::Kind;

/// Number of stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "\"auto\" or a number of stages")]
pub enum Stages {
    Count(usize),
    Auto(Auto),
}

/// As many as pay, replicas of stages included, by the planner and the simulator; one device where that is faster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Auto {
    Auto,
}

/// Workers of each stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "a number of workers for every stage, or a list with one for each")]
pub enum Replicas {
    All(usize),
    /// Empty: one each.
    Each(Vec<usize>),
}

impl Default for Replicas {
    fn default() -> Self {
        Self::All(1)
    }
}

impl Replicas {
    /// Those of so many stages.
    pub fn of(&self, stages: usize) -> Vec<usize> {
        match self {
            Self::All(count) => vec![*count; stages],
            Self::Each(counts) if counts.is_empty() => vec![1; stages],
            Self::Each(counts) => counts.clone(),
        }
    }
}

/// The way of a tensor from stage to stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Messages {
    /// Through the hosts, under a checksum; between any devices.
    #[default]
    Host,
    /// From GPU to GPU by NCCL; each worker needs a GPU of its own.
    Nccl,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pipeline {
    #[serde(default = "auto")]
    pub stages: Stages,
    #[serde(default = "default_schedule")]
    pub schedule: Kind,
    /// Parts that each micro-batch of the recipe (`batch` sentences) is cut into.
    #[serde(default = "default_micro_batches")]
    pub micro_batches: usize,
    /// Workers of the stages, for a fixed number of stages.
    #[serde(default)]
    pub replicas: Replicas,
    /// Devices of the workers, by their command-line names; empty: shares of the run's own device.
    #[serde(default)]
    pub devices: Vec<String>,
    /// How tensors go from stage to stage.
    #[serde(default)]
    pub messages: Messages,
    /// Keep the inputs of stages only and run them again in backward.
    #[serde(default)]
    pub recompute: bool,
    /// Run the teacher in the student's stages, a step ahead, instead of computing its states beforehand and keeping them: for
    /// texts that are seen once. Needs a fixed number of stages.
    #[serde(default)]
    pub teacher: bool,
    /// Seconds without a sign of progress after which a stage counts as stalled: longer than the longest kernel.
    #[serde(default = "default_heartbeat")]
    pub heartbeat: f64,
}

fn auto() -> Stages {
    Stages::Auto(Auto::Auto)
}

fn default_schedule() -> Kind {
    Kind::OneForwardOneBackward
}

fn default_micro_batches() -> usize {
    8
}

fn default_heartbeat() -> f64 {
    10.0
}

/// Stages that a recipe may ask for.
const MAX_STAGES: usize = 256;
const MAX_MICRO_BATCHES: usize = 1024;

impl Recipe {
    /// How long any process of this run may show no sign of progress.
    pub fn heartbeat(&self) -> Duration {
        Duration::from_secs_f64(self.pipeline.as_ref().map_or_else(default_heartbeat, |p| p.heartbeat))
    }
}

impl Pipeline {
    /// `layers`: blocks of the smallest model that is trained.
    pub(in crate::recipe) fn check(&self, layers: usize) -> Result<()> {
        let refuse = |key: &str, value: String, allowed: &str| {
            Err(Error::Recipe { key: format!("pipeline.{key}"), value, allowed: allowed.into() })
        };
        if let Stages::Count(n) = self.stages
            && !(1..=MAX_STAGES).contains(&n)
        {
            return refuse("stages", n.to_string(), "\"auto\" or 1 to 256");
        }
        if let Stages::Count(n) = self.stages
            && self.schedule.chunks(n) > layers + 2
        {
            let value =
                format!("{n} stages of schedule {}, which need {} pieces", self.schedule, self.schedule.chunks(n));
            let allowed = format!(
                "at most {} pieces: the smallest model's {layers} blocks, its embedding and its head",
                layers + 2
            );
            return Err(Error::Recipe { key: "pipeline.stages".into(), value, allowed });
        }
        if !(1..=MAX_MICRO_BATCHES).contains(&self.micro_batches) {
            return refuse("micro_batches", self.micro_batches.to_string(), "1 to 1024");
        }
        if !(self.heartbeat.is_finite() && (0.05..=86_400.0).contains(&self.heartbeat)) {
            return refuse("heartbeat", self.heartbeat.to_string(), "0.05 to 86400 seconds");
        }
        if self.teacher && !matches!(self.stages, Stages::Count(2..)) {
            return refuse("teacher", "true".into(), "true only with a fixed number of at least 2 stages");
        }
        let (stages, fixed) = match self.stages {
            Stages::Count(n) => (n, true),
            Stages::Auto(_) => (1, self.replicas.of(1) == [1]),
        };
        let counts = self.replicas.of(stages);
        if matches!(self.stages, Stages::Count(_)) && counts == [1] && !self.devices.is_empty() {
            let allowed = "devices of at least 2 workers; --device names the one of a single stage";
            return refuse("devices", format!("{:?} with 1 stage", self.devices), allowed);
        }
        if self.teacher && layers < stages {
            return refuse(
                "teacher",
                format!("true with {stages} stages"),
                "a stage for each of the teacher's blocks at most",
            );
        }
        if !fixed || counts.len() != stages || counts.iter().any(|r| !(1..=MAX_STAGES).contains(r)) {
            let value = match &self.replicas {
                Replicas::All(count) => count.to_string(),
                Replicas::Each(counts) => format!("{counts:?}"),
            };
            let allowed = "for a fixed number of stages 1 to 256, or a list of such counts with one for each stage";
            return refuse("replicas", value, allowed);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pipeline: &str) -> Result<Recipe> {
        Recipe::load(None, &[format!("pipeline={pipeline}")])
    }

    #[test]
    fn replicas_are_one_number_or_one_for_each_stage() {
        for (written, want) in [("2", vec![2, 2, 2]), ("[1, 2, 1]", vec![1, 2, 1]), ("[]", vec![1, 1, 1])] {
            let recipe = read(&format!("{{ stages = 3, replicas = {written} }}")).unwrap();
            assert_eq!(recipe.pipeline.as_ref().unwrap().replicas.of(3), want);
            let text = recipe.to_toml().unwrap();
            assert_eq!(Recipe::parse(std::path::Path::new("again"), &text, &[]).unwrap(), recipe);
        }
        for wrong in ["{ stages = 3, replicas = [1, 2] }", "{ stages = 3, replicas = 0 }", "{ replicas = 2 }"] {
            let error = read(wrong).unwrap_err().to_string();
            assert!(error.contains("pipeline.replicas") && error.contains("for each stage"), "{wrong}: {error}");
        }
    }
}
