//! What a schedule costs: every event priced, stages and links as machines that do one thing at a time.

use std::collections::HashMap;

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

/// What a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    Event(Event),
    /// Reduction over replicas and update.
    Update,
    /// A teacher's forward for a micro-batch of the next step.
    Teacher {
        chunk: u32,
        micro: u32,
    },
}

impl Activity {
    /// The schedule's event, where it is one.
    pub fn event(self) -> Option<Event> {
        if let Self::Event(event) = self { Some(event) } else { None }
    }
}

impl std::fmt::Display for Activity {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        match self {
            Self::Event(event) => event.fmt(f),
            Self::Update => f.write_str("update"),
            Self::Teacher { chunk, micro } => write!(f, "{chunk}T{micro}"),
        }
    }
}

impl std::str::FromStr for Activity {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if text == "update" {
            return Ok(Self::Update);
        }
        let teacher = text.split_once('T').and_then(|(c, m)| Some((c.parse().ok()?, m.parse().ok()?)));
        teacher.map_or_else(|| text.parse().map(Self::Event), |(chunk, micro)| Ok(Self::Teacher { chunk, micro }))
    }
}

/// What a worker was busy with.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Span {
    pub activity: Activity,
    /// Seconds from the step's start.
    pub start: f64,
    pub end: f64,
}

/// What became of a worker.
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

impl StageUse {
    /// Of what a worker was busy with, activations left out.
    pub fn of(spans: &[Span]) -> Self {
        Self {
            busy: spans.iter().map(|s| s.end - s.start).sum(),
            first: spans.first().map_or(0.0, |s| s.start),
            last: spans.last().map_or(0.0, |s| s.end),
            ..Self::default()
        }
    }
}

/// A step, simulated or measured: a row for each worker, which is a stage or, where it has several, one of its replicas.
#[derive(Clone, Debug, PartialEq)]
pub struct Timeline {
    pub name: String,
    /// Stage and replica of each row.
    pub workers: Vec<Place>,
    /// In order, per row.
    pub spans: Vec<Vec<Span>>,
    pub stages: Vec<StageUse>,
    pub seconds: f64,
}

/// Which worker of which stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub stage: usize,
    /// Its number among the stage's replicas; `None` where the stage has one worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica: Option<usize>,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let Self { stage, replica } = self;
        match replica {
            None => write!(f, "stage {stage}"),
            Some(replica) => write!(f, "stage {stage} replica {replica}"),
        }
    }
}

impl std::str::FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let wrong = || format!("{text:?} where \"stage 0\" or \"stage 0 replica 0\" is meant");
        let rest = text.strip_prefix("stage ").ok_or_else(wrong)?;
        let (stage, replica) = rest.split_once(" replica ").map_or((rest, None), |(s, r)| (s, Some(r)));
        let number = |text: &str| text.parse().map_err(|_| wrong());
        Ok(Self { stage: number(stage)?, replica: replica.map(number).transpose()? })
    }
}

/// The workers of stages that have so many replicas.
pub fn places(replicas: &[usize]) -> Vec<Place> {
    let of = |(stage, &count): (usize, &usize)| {
        (0..count).map(move |replica| Place { stage, replica: (count > 1).then_some(replica) })
    };
    replicas.iter().enumerate().flat_map(of).collect()
}

impl Timeline {
    /// Share of the workers' time in which they do nothing.
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
    simulate_replicas(schedule, &vec![1; schedule.stages.len()], costs, keep)
}

/// As [`simulate_as`], with several workers for a stage: micro-batch m is worked on by number m mod replicas.
///
/// # Errors
/// As [`simulate`], and `Parameter` for replicas that are not one count of at least 1 per stage.
pub fn simulate_replicas(schedule: &Schedule, replicas: &[usize], costs: &Costs, keep: bool) -> Result<Timeline> {
    validate(schedule)?;
    if costs.chunks.len() != schedule.chunks() {
        return Err(Error::Parameter {
            op: "simulate",
            parameter: "chunks",
            value: costs.chunks.len().to_string(),
            allowed: "one cost per chunk of the schedule",
        });
    }
    if replicas.len() != schedule.stages.len() || replicas.contains(&0) {
        let (value, allowed) = (format!("{replicas:?}"), "one count of at least 1 per stage");
        return Err(Error::Parameter { op: "simulate", parameter: "replicas", value, allowed });
    }
    let lowered;
    let schedule = if schedule.has_messages() {
        schedule
    } else {
        lowered = schedule.with_messages();
        &lowered
    };
    let workers = places(replicas);
    // The first worker of each stage. A worker has its micro-batches' events in the stage's order.
    let first: Vec<usize> = replicas.iter().scan(0, |next, n| Some(std::mem::replace(next, *next + n))).collect();
    let (micros, count) = (schedule.micros, workers.len());
    let mut arrivals = [vec![0.0; schedule.chunks() * micros], vec![0.0; schedule.chunks() * micros]];
    let mut free = vec![0.0; count];
    let mut held = vec![(0.0, 0usize); count];
    let mut stages = vec![StageUse { first: f64::INFINITY, ..StageUse::default() }; count];
    let mut spans: Vec<Vec<Span>> = vec![Vec::new(); count];
    // When the link from one worker to another is free.
    let mut links: HashMap<(usize, usize), f64> = HashMap::new();
    walk(schedule, |stage, event| {
        let (chunk, micro) = (event.chunk as usize, event.micro as usize);
        let worker = first[stage] + micro % replicas[stage];
        let cost = &costs.chunks[chunk];
        let size = costs.sizes.get(micro).copied().unwrap_or(1.0);
        let mut start: f64 = free[worker];
        let (seconds, counted) = match event.work {
            Work::Forward => (cost.forward, true),
            Work::Backward => (cost.backward_input + cost.backward_weight, true),
            Work::BackwardInput => (cost.backward_input, true),
            Work::BackwardWeight => (cost.backward_weight, true),
            Work::SendForward | Work::SendBackward => {
                let (way, target) = if event.work == Work::SendForward { (0, chunk + 1) } else { (1, chunk - 1) };
                let edge = &costs.chunks[chunk.min(target)];
                let taker = schedule.homes[target];
                let link = links.entry((worker, first[taker] + micro % replicas[taker])).or_insert(0.0);
                let begins = f64::max(start + costs.link.handling * edge.output_bytes * size, *link);
                let moved = costs.link.seconds(edge.output_bytes * size);
                *link = begins + moved - costs.link.latency;
                arrivals[way][target * micros + micro] = begins + moved;
                (costs.link.handling * edge.output_bytes, false)
            }
            Work::ReceiveForward | Work::ReceiveBackward => {
                let (way, edge) = if event.work == Work::ReceiveForward { (0, chunk - 1) } else { (1, chunk) };
                start = start.max(arrivals[way][chunk * micros + micro]);
                (costs.link.handling * costs.chunks[edge].output_bytes, false)
            }
        };
        let end = start + seconds * size;
        free[worker] = end;
        let own = &mut stages[worker];
        let (bytes, number) = &mut held[worker];
        match event.work {
            Work::Forward => (*bytes, *number) = (*bytes + cost.activation_bytes * size, *number + 1),
            Work::Backward | Work::BackwardWeight => {
                (*bytes, *number) = (*bytes - cost.activation_bytes * size, *number - 1);
            }
            _ => {}
        }
        own.peak_activation_bytes = own.peak_activation_bytes.max(*bytes);
        own.peak_activations = own.peak_activations.max(*number);
        own.busy += end - start;
        if counted {
            own.first = own.first.min(start);
            own.last = own.last.max(end);
        }
        if keep && end > start {
            spans[worker].push(Span { activity: Activity::Event(event), start, end });
        }
    })?;
    for (stage, &count) in replicas.iter().enumerate() {
        let team = first[stage]..first[stage] + count;
        // Replicas exchange gradients, so none updates before all are done.
        let start = free[team.clone()].iter().copied().fold(0.0, f64::max);
        let update = costs.updates.get(stage).copied().unwrap_or(0.0);
        for worker in team {
            let own = &mut stages[worker];
            if own.first.is_infinite() {
                own.first = 0.0;
            }
            if update > 0.0 {
                own.busy += update;
                own.last = start + update;
                free[worker] = own.last;
                if keep {
                    spans[worker].push(Span { activity: Activity::Update, start, end: own.last });
                }
            }
        }
    }
    let seconds = free.iter().copied().fold(0.0, f64::max);
    Ok(Timeline { name: schedule.name.clone(), workers, spans, stages, seconds })
}
