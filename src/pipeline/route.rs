//! Which worker does what: stages with their replicas, and the events of each.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use super::cut;
use super::schedule::{Event, Kind, Schedule, Work};
use super::validate::validate;
use crate::error::{Error, Result};
use crate::nn::Config;

/// Everything that is fixed before the first step.
#[derive(Clone, Debug)]
pub struct Route {
    pub schedule: Schedule,
    /// Pieces of each chunk.
    pub cuts: Vec<Range<usize>>,
    /// Workers of each stage: micro-batch m is worked on by number m mod replicas.
    pub replicas: Vec<usize>,
    /// Stage and replica of each worker.
    pub workers: Vec<(usize, usize)>,
    /// Events of each worker, messages included.
    pub events: Vec<Vec<Event>>,
    positions: Vec<HashMap<Event, usize>>,
}

impl Route {
    /// # Errors
    /// `Schedule` for a schedule that cannot run, `Parameter` for cuts or replicas that do not belong to it.
    pub fn new(config: &Config, schedule: &Schedule, cuts: Vec<Range<usize>>, replicas: Vec<usize>) -> Result<Self> {
        validate(schedule)?;
        cut::check(config, &cuts, &schedule.homes)?;
        let stages = schedule.stages.len();
        if replicas.len() != stages || replicas.contains(&0) {
            let value = format!("{replicas:?}");
            return Err(Error::Parameter {
                op: "pipeline",
                parameter: "replicas",
                value,
                allowed: "one count of at least 1 per stage",
            });
        }
        let workers: Vec<(usize, usize)> =
            replicas.iter().enumerate().flat_map(|(stage, &count)| (0..count).map(move |r| (stage, r))).collect();
        // Two micro-batches of one stage may be on two workers, two chunks of a micro-batch on one: what is a message between
        // stages stays one, as only stages exchange micro-batches.
        let lowered = schedule.with_messages();
        let own = |&(stage, replica): &(usize, usize)| -> Vec<Event> {
            let mine = |e: &&Event| e.micro as usize % replicas[stage] == replica;
            lowered.stages[stage].iter().filter(mine).copied().collect()
        };
        let events: Vec<Vec<Event>> = workers.iter().map(own).collect();
        let positions = events.iter().map(|list| list.iter().enumerate().map(|(i, &e)| (e, i)).collect()).collect();
        Ok(Self { schedule: lowered, cuts, replicas, workers, events, positions })
    }

    /// The worker of a chunk's micro-batch.
    pub fn worker(&self, chunk: u32, micro: u32) -> usize {
        self.on_stage(self.schedule.homes[chunk as usize], micro)
    }

    /// Chunks of a worker and their pieces.
    pub fn chunks_of(&self, worker: usize) -> BTreeMap<u32, Range<usize>> {
        let (stage, _) = self.workers[worker];
        let own = self.cuts.iter().zip(&self.schedule.homes).enumerate().filter(|(_, (_, home))| **home == stage);
        own.map(|(chunk, (pieces, _))| (chunk as u32, pieces.clone())).collect()
    }

    /// Stages in the order in which a teacher's chunks lie on them: its last one is where the student's head is.
    pub fn teacher_stages(&self) -> Vec<usize> {
        let head = self.schedule.homes.last().copied().unwrap_or(0);
        let others = (0..self.replicas.len()).filter(|&stage| stage != head);
        others.chain([head]).collect()
    }

    /// The worker of a micro-batch on a stage.
    pub fn on_stage(&self, stage: usize, micro: u32) -> usize {
        self.of_stage(stage).start + micro as usize % self.replicas[stage]
    }

    /// Whether a worker works on a micro-batch.
    pub fn has(&self, worker: usize, micro: u32) -> bool {
        self.on_stage(self.workers[worker].0, micro) == worker
    }

    /// Workers of a stage.
    pub fn of_stage(&self, stage: usize) -> Range<usize> {
        let first: usize = self.replicas[..stage].iter().sum();
        first..first + self.replicas[stage]
    }

    /// Where the sender of what `receive` waits for stands in its own list: (worker, position).
    pub fn sender(&self, receive: Event) -> Option<(usize, usize)> {
        let (work, chunk) = match receive.work {
            Work::ReceiveForward => (Work::SendForward, receive.chunk.checked_sub(1)?),
            Work::ReceiveBackward => (Work::SendBackward, receive.chunk + 1),
            _ => return None,
        };
        let worker = self.worker(chunk, receive.micro);
        let send = Event { work, chunk, micro: receive.micro };
        Some((worker, *self.positions.get(worker)?.get(&send)?))
    }
}

/// A pipeline's routes by number of micro-batches.
pub struct Routes {
    config: Config,
    /// For steps of another number of micro-batches than the first route's; `None`: there are none.
    kind: Option<Kind>,
    first: Arc<Route>,
    others: BTreeMap<usize, Arc<Route>>,
}

impl Routes {
    pub fn new(config: Config, kind: Option<Kind>, first: Arc<Route>) -> Self {
        Self { config, kind, first, others: BTreeMap::new() }
    }

    pub fn splits_backward(&self) -> bool {
        self.first.schedule.splits_backward()
    }

    /// # Errors
    /// `Parameter` for a number that the schedule is not for.
    pub fn get(&mut self, micros: usize) -> Result<Arc<Route>> {
        if micros == self.first.schedule.micros {
            return Ok(self.first.clone());
        }
        if let Some(route) = self.others.get(&micros) {
            return Ok(route.clone());
        }
        let Some(kind) = self.kind else {
            let (value, allowed) = (micros.to_string(), "as many as the schedule has");
            return Err(Error::Parameter { op: "pipeline", parameter: "micro_batches", value, allowed });
        };
        let own = &self.first;
        let schedule = Schedule::new(kind, own.replicas.len(), micros)?;
        let route = Arc::new(Route::new(&self.config, &schedule, own.cuts.clone(), own.replicas.clone())?);
        self.others.insert(micros, route.clone());
        Ok(route)
    }
}
