//! What `[pipeline]` will do with a training, as far as it is known before anything is measured.

use std::sync::Arc;

use super::PlannedStage;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::nn::Config;
use crate::nn::config::Size;
use crate::nn::pieces;
use crate::pipeline::{Costs, Kind, Schedule, cut, simulate};
use crate::recipe::corpus::tagging;
use crate::recipe::schema::{Messages, Pipeline, Recipe, Stages, Training};

/// How a training is spread.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct PlannedSpread {
    pub schedule: Kind,
    /// Of a step.
    pub micro_batches: usize,
    /// Workers of each stage; empty where the run chooses stages by what it measures.
    pub replicas: Vec<usize>,
    /// Bytes on a device of each stage: weights, gradients, two moments and the activations in flight, for an even cut.
    pub memory: Vec<usize>,
}

/// Bytes of weights, gradient and two moments of a parameter.
const TRAINED: usize = 16;

impl PlannedSpread {
    /// # Errors
    /// `Recipe` for stages that the model cannot be cut into; those of the schedule.
    pub(super) fn new(
        pipeline: &Pipeline,
        (size, width): (Size, usize),
        recipe: &Recipe,
        training: &Training,
    ) -> Result<Self> {
        let micro_batches = training.accumulate * pipeline.micro_batches;
        let schedule = pipeline.schedule;
        let Stages::Count(stages) = pipeline.stages else {
            return Ok(Self { schedule, micro_batches, replicas: Vec::new(), memory: Vec::new() });
        };
        let labels = tagging::labels().unwrap_or_default();
        let config = Config { width, ..recipe.model.config(size, recipe.data.vocabulary, &labels) };
        let order = Schedule::new(schedule, stages, micro_batches)?;
        let timeline = simulate(&order, &Costs::uniform(order.chunks(), 1.0, 1.0, 1.0))?;
        let cuts = cut::even(pieces::pieces(&config), order.chunks());
        let tokens = training.batch.div_ceil(pipeline.micro_batches) * recipe.data.max_length;
        let memory = (0..stages).map(|stage| {
            let chunks = || cuts.iter().zip(&order.homes).filter(|(_, home)| **home == stage).map(|(pieces, _)| pieces);
            let own = |name: &str| chunks().any(|pieces| pieces.contains(&pieces::piece_of(&config, name)));
            let parameters: usize = config
                .parameters()
                .iter()
                .filter(|(name, _)| own(name))
                .map(|(_, dims)| dims.iter().product::<usize>())
                .sum();
            let blocks: usize = chunks().map(|pieces| pieces.len()).sum();
            let chunk = super::per_token(size, config.width, blocks) / chunks().count().max(1);
            let held = timeline.stages[stage].peak_activations;
            // Run again in backward, a chunk holds its input alone, and all it computes once.
            let activations = if pipeline.recompute { held * config.width + 2 * chunk } else { (held + 1) * chunk };
            TRAINED * parameters + 4 * tokens * activations
        });
        Ok(Self { schedule, micro_batches, replicas: pipeline.replicas.of(stages), memory: memory.collect() })
    }
}

/// How every training of a plan is spread, where the recipe says that it is.
///
/// # Errors
/// Those of the schedule.
pub fn plan_spread(recipe: &Recipe, stages: &mut [PlannedStage]) -> Result<()> {
    let Some(pipeline) = &recipe.pipeline else {
        return Ok(());
    };
    for stage in stages {
        if let Some((size, training)) = &stage.training {
            stage.pipeline = Some(PlannedSpread::new(pipeline, *size, recipe, training)?);
        }
    }
    Ok(())
}

/// Refuses what the run would refuse at its first training: devices that are missing or too few, and too few processes
/// (`ranks`, where there are several).
///
/// # Errors
/// `Recipe`, and those of opening a device.
pub fn check_devices(recipe: &Recipe, home: &Arc<dyn Device>, ranks: Option<usize>) -> Result<()> {
    let Some(pipeline) = &recipe.pipeline else {
        return Ok(());
    };
    if pipeline.teacher && ranks.is_some() {
        let allowed = "false across processes: the teacher's states are computed beforehand there".into();
        return Err(Error::Recipe { key: "pipeline.teacher".into(), value: "true".into(), allowed });
    }
    let names = match pipeline.stages {
        Stages::Count(n) => {
            let workers: usize = pipeline.workers(n).iter().sum();
            if let Some(ranks) = ranks.filter(|ranks| *ranks < workers) {
                let value = format!("{workers} workers on {ranks} ranks");
                let allowed = "one rank for each worker: start more with mpirun -n".into();
                return Err(Error::Recipe { key: "pipeline.stages".into(), value, allowed });
            }
            pipeline.devices(home, workers)?
        }
        Stages::Auto(_) => pipeline.devices.clone(),
    };
    let gpus = names.iter().all(|name| name.starts_with("cuda:"));
    if pipeline.messages == Messages::Nccl && !gpus {
        let allowed = format!("\"host\" on {}: NCCL needs a GPU for each worker", names.join(", "));
        return Err(Error::Recipe { key: "pipeline.messages".into(), value: "nccl".into(), allowed });
    }
    // Among several processes each opens its own, perhaps on another machine.
    let here = if ranks.is_some() { 1 } else { names.len() };
    names.iter().take(here).try_for_each(|name| pipeline.open(home, name).map(drop))
}
