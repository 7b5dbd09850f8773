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
    /// Workers of each stage; empty: one each.
    #[serde(default)]
    pub replicas: Vec<usize>,
    /// Devices of the workers, by their command-line names; empty: shares of the run's own device.
    #[serde(default)]
    pub devices: Vec<String>,
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
        let fixed = matches!(self.stages, Stages::Count(n) if n == self.replicas.len());
        if !self.replicas.is_empty() && (!fixed || self.replicas.iter().any(|r| !(1..=MAX_STAGES).contains(r))) {
            return refuse(
                "replicas",
                format!("{:?}", self.replicas),
                "one count of 1 to 256 for each of a fixed number of stages",
            );
        }
        Ok(())
    }
}
