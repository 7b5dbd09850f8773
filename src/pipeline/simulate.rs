//! What a schedule costs: every event priced, stages and links as machines that do one thing at a time.

use serde::{Deserialize, Serialize};

use super::schedule::{Event, Schedule, Work};
use super::validate::{validate, walk};
use crate::error::{Error, Result};

/// One chunk of the model for one micro-batch of usual size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChunkCost {
    /// Seconds.
    pub forward: f64,
    pub backward_input: f64,
    pub backward_weight: f64,
    /// Bytes held from forward to the end of backward.
    #[serde(default)]
    pub activation_bytes: f64,
    /// Bytes of its output, and of the gradient that comes back for it.
    #[serde(default)]
    pub output_bytes: f64,
}

/// What lies between stages.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// Seconds until the first byte arrives.
    pub latency: f64,
    /// 0: as fast as one likes.
    pub bytes_per_second: f64,
    /// Seconds per byte that the sender and the receiver are each busy with a message themselves.
    #[serde(default)]
    pub handling: f64,
}

impl Link {
    /// Costs nothing.
    pub const FREE: Link = Link { latency: 0.0, bytes_per_second: 0.0, handling: 0.0 };

    pub fn seconds(&self, bytes: f64) -> f64 {
        self.latency + if self.bytes_per_second > 0.0 { bytes / self.bytes_per_second } else { 0.0 }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Costs {
    /// Per chunk.
    pub chunks: Vec<ChunkCost>,
    pub link: Link,
    /// Size of each micro-batch in usual ones; 1 for those that the list does not reach.
    pub sizes: Vec<f64>,
    /// Seconds of a stage's work after its last event: reduction over replicas and update. 0 where the list ends.
    pub updates: Vec<f64>,
}

impl Costs {
    /// Equal chunks that cost `forward`, `input` and `weight`, over links that cost nothing.
    pub fn uniform(chunks: usize, forward: f64, input: f64, weight: f64) -> Self {
        let cost = ChunkCost {
            forward,
            backward_input: input,
            backward_weight: weight,
            activation_bytes: 1.0,
            output_bytes: 0.0,
        };
        Self { chunks: vec![cost; chunks], link: Link::FREE, sizes: Vec::new(), updates: Vec::new() }
    }
}

/// What a stage was busy with.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// `None`: reduction and update.
    pub event: Option<Event>,
    /// Seconds from the step's start.
    pub start: f64,
    pub end: f64,
}

/// What became of a stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StageUse {
    /// Seconds of work.
    pub busy: f64,
    /// Start of its first work and end of its last.
    pub first: f64,
    pub last: f64,
    pub peak_activation_bytes: f64,
    /// Micro-batches of chunks held at most.
    pub peak_activations: usize,
}

/// A step, simulated or measured.
#[derive(Clone, Debug, PartialEq)]
pub struct Timeline {
    pub name: String,
    /// In order, per stage.
    pub spans: Vec<Vec<Span>>,
    pub stages: Vec<StageUse>,
    pub seconds: f64,
}

impl Timeline {
    /// Share of the stages' time in which they do nothing.
    pub fn idle_share(&self) -> f64 {
        let busy: f64 = self.stages.iter().map(|s| s.busy).sum();
        let all = self.seconds * self.stages.len() as f64;
        if all > 0.0 { 1.0 - busy / all } else { 0.0 }
    }

    /// Idle seconds between first and last work of the stage that has most of them: the bubble where the next step may
    /// begin while other stages still finish this one (zero bubble's measure).
    pub fn inner_bubble(&self) -> f64 {
        self.stages.iter().map(|s| s.last - s.first - s.busy).fold(0.0, f64::max)
    }
}

/// Prices `schedule`, with or without messages in it.
///
/// # Errors
/// `Schedule` where it cannot run, `Parameter` for costs that are not those of its chunks.
pub fn simulate(schedule: &Schedule, costs: &Costs) -> Result<Timeline> {
    simulate_as(schedule, costs, true)
}

/// As [`simulate`]; without `keep` the timeline has no spans, for thousands of stages.
pub fn simulate_as(schedule: &Schedule, costs: &Costs, keep: bool) -> Result<Timeline> {
    let peaks = validate(schedule)?;
    if costs.chunks.len() != schedule.chunks() {
        return Err(Error::Parameter {
            op: "simulate",
            parameter: "chunks",
            value: costs.chunks.len().to_string(),
            allowed: "one cost per chunk of the schedule",
        });
    }
    let lowered;
    let schedule = if schedule.has_messages() {
        schedule
    } else {
        lowered = schedule.with_messages();
        &lowered
    };
    let (micros, count) = (schedule.micros, schedule.stages.len());
    let mut arrivals = [vec![0.0; schedule.chunks() * micros], vec![0.0; schedule.chunks() * micros]];
    let mut free = vec![0.0; count];
    let mut held = vec![0.0; count];
    let mut stages = vec![StageUse { first: f64::INFINITY, ..StageUse::default() }; count];
    let mut spans: Vec<Vec<Span>> = vec![Vec::new(); count];
    // When the link from a stage to its neighbour is free, per direction.
    let mut links = [vec![0.0; count], vec![0.0; count]];
    walk(schedule, |stage, event| {
        let (chunk, micro) = (event.chunk as usize, event.micro as usize);
        let cost = &costs.chunks[chunk];
        let size = costs.sizes.get(micro).copied().unwrap_or(1.0);
        let mut start: f64 = free[stage];
        let (seconds, counted) = match event.work {
            Work::Forward => (cost.forward, true),
            Work::Backward => (cost.backward_input + cost.backward_weight, true),
            Work::BackwardInput => (cost.backward_input, true),
            Work::BackwardWeight => (cost.backward_weight, true),
            Work::SendForward | Work::SendBackward => {
                let (way, target) = if event.work == Work::SendForward { (0, chunk + 1) } else { (1, chunk - 1) };
                let bytes = costs.chunks[chunk.min(target)].output_bytes * size;
                let handled = start + costs.link.handling * bytes;
                let begins = f64::max(handled, links[way][stage]);
                let moved = costs.link.seconds(bytes);
                links[way][stage] = begins + moved - costs.link.latency;
                arrivals[way][target * micros + micro] = begins + moved;
                (costs.link.handling * bytes / size, false)
            }
            Work::ReceiveForward | Work::ReceiveBackward => {
                let (way, edge) = if event.work == Work::ReceiveForward { (0, chunk - 1) } else { (1, chunk) };
                start = start.max(arrivals[way][chunk * micros + micro]);
                (costs.link.handling * costs.chunks[edge].output_bytes, false)
            }
        };
        let end = start + seconds * size;
        free[stage] = end;
        match event.work {
            Work::Forward => held[stage] += cost.activation_bytes * size,
            Work::Backward | Work::BackwardWeight => held[stage] -= cost.activation_bytes * size,
            _ => {}
        }
        let own = &mut stages[stage];
        own.peak_activation_bytes = own.peak_activation_bytes.max(held[stage]);
        own.busy += end - start;
        if counted {
            own.first = own.first.min(start);
            own.last = own.last.max(end);
        }
        if keep && end > start {
            spans[stage].push(Span { event: Some(event), start, end });
        }
    })?;
    for (stage, own) in stages.iter_mut().enumerate() {
        let update = costs.updates.get(stage).copied().unwrap_or(0.0);
        own.peak_activations = peaks[stage];
        if own.first.is_infinite() {
            own.first = 0.0;
        }
        if update > 0.0 {
            let start = free[stage];
            own.busy += update;
            own.last = start + update;
            free[stage] = own.last;
            if keep {
                spans[stage].push(Span { event: None, start, end: own.last });
            }
        }
    }
    let seconds = free.iter().copied().fold(0.0, f64::max);
    Ok(Timeline { name: schedule.name.clone(), spans, stages, seconds })
}
