//! What every stage is doing, for those who wait for it: position, signs of life, and its last 256 events.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::simulate::{Place, places};
use crate::device::Device;
use crate::error::{Error, Result};

/// Events a worker remembers.
pub const RECORDS: usize = 256;

/// What a worker is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[repr(u8)]
pub enum State {
    /// Between steps.
    Idle = 0,
    Computing = 1,
    /// For a message.
    Waiting = 2,
}

/// One line of the flight recorder: what a worker did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    /// Since the pipeline started.
    pub seconds: f64,
    #[serde(flatten)]
    pub place: Place,
    pub step: u64,
    pub position: usize,
    pub event: String,
    pub what: String,
}

/// One worker as others see it.
pub struct Seen {
    place: Place,
    step: AtomicU64,
    position: AtomicU64,
    /// Microseconds since the pipeline started.
    since: AtomicU64,
    state: AtomicU8,
    /// Counts signs of life that are no launch of the device: those of another process.
    beats: AtomicU64,
    taught: Mutex<(u64, u64)>,
    event: Mutex<String>,
    ring: Mutex<VecDeque<Record>>,
    /// Events so far, those that are forgotten included.
    remembered: AtomicU64,
    device: Mutex<Option<Arc<dyn Device>>>,
}

/// What a worker shows of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Glance {
    pub step: u64,
    pub position: usize,
    pub state: State,
    pub event: String,
    /// Seconds in the event.
    pub seconds: f64,
    /// Grows while it makes progress within an event.
    pub progress: u64,
    /// The step that its teacher works for, and the micro-batches that it has passed on for it.
    pub taught: (u64, u64),
}

pub struct Watch {
    started: Instant,
    workers: Vec<Seen>,
    cancelled: AtomicBool,
}

/// What a thread that panicked has left is still what it was.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watch {
    /// `replicas`: workers of each stage.
    pub fn new(replicas: &[usize]) -> Self {
        let seen = |place| Seen {
            place,
            step: AtomicU64::new(0),
            position: AtomicU64::new(0),
            since: AtomicU64::new(0),
            state: AtomicU8::new(State::Idle as u8),
            beats: AtomicU64::new(0),
            taught: Mutex::default(),
            event: Mutex::new("start".into()),
            ring: Mutex::new(VecDeque::with_capacity(RECORDS)),
            remembered: AtomicU64::new(0),
            device: Mutex::new(None),
        };
        Self {
            started: Instant::now(),
            workers: places(replicas).into_iter().map(seen).collect(),
            cancelled: AtomicBool::new(false),
        }
    }

    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }

    /// The device whose launches show that a worker makes progress.
    pub fn device(&self, worker: usize, device: &Arc<dyn Device>) {
        *locked(&self.workers[worker].device) = Some(device.clone());
    }

    pub fn cancel(&self) {
        self.cancelled.store(true, Relaxed);
    }

    pub fn cancelled(&self) -> bool {
        self.cancelled.load(Relaxed)
    }

    /// A worker's own note of what it does now.
    pub fn at(
        &self,
        worker: usize,
        (step, position): (u64, usize),
        state: State,
        event: &dyn std::fmt::Display,
        what: &str,
    ) {
        let seen = &self.workers[worker];
        seen.step.store(step, Relaxed);
        seen.position.store(position as u64, Relaxed);
        seen.since.store(self.started.elapsed().as_micros() as u64, Relaxed);
        seen.state.store(state as u8, Relaxed);
        let event = event.to_string();
        let what = what.to_string();
        let record = Record { seconds: self.seconds(), place: seen.place, step, position, event: event.clone(), what };
        self.remember(worker, record);
        *locked(&seen.event) = event;
    }

    pub fn state(&self, worker: usize, state: State) {
        self.workers[worker].since.store(self.started.elapsed().as_micros() as u64, Relaxed);
        self.workers[worker].state.store(state as u8, Relaxed);
    }

    /// Notes what a worker's teacher has passed on.
    pub fn taught(&self, worker: usize, taught: (u64, u64)) {
        *locked(&self.workers[worker].taught) = taught;
    }

    fn remember(&self, worker: usize, record: Record) {
        let mut ring = locked(&self.workers[worker].ring);
        if ring.len() == RECORDS {
            ring.pop_front();
        }
        self.workers[worker].remembered.fetch_add(1, Relaxed);
        ring.push_back(record);
    }

    /// What another process told of its worker.
    pub fn told(&self, worker: usize, glance: &Glance, records: Vec<Record>) {
        let seen = &self.workers[worker];
        seen.step.store(glance.step, Relaxed);
        seen.position.store(glance.position as u64, Relaxed);
        let now = self.started.elapsed().as_micros() as u64;
        seen.since.store(now.saturating_sub((glance.seconds * 1e6) as u64), Relaxed);
        seen.state.store(glance.state as u8, Relaxed);
        seen.beats.store(glance.progress, Relaxed);
        *locked(&seen.event) = glance.event.clone();
        *locked(&seen.taught) = glance.taught;
        records.into_iter().filter(|r| r.place == seen.place).for_each(|r| self.remember(worker, r));
    }

    pub fn glance(&self, worker: usize) -> Glance {
        let seen = &self.workers[worker];
        let now = self.started.elapsed().as_micros() as u64;
        let launches = locked(&seen.device).as_ref().map_or(0, |d| d.stats().launches);
        Glance {
            step: seen.step.load(Relaxed),
            position: seen.position.load(Relaxed) as usize,
            state: match seen.state.load(Relaxed) {
                1 => State::Computing,
                2 => State::Waiting,
                _ => State::Idle,
            },
            event: locked(&seen.event).clone(),
            seconds: now.saturating_sub(seen.since.load(Relaxed)) as f64 / 1e6,
            progress: launches + seen.beats.load(Relaxed),
            taught: *locked(&seen.taught),
        }
    }

    /// A worker's last events, oldest first.
    pub fn records(&self, worker: usize) -> Vec<Record> {
        locked(&self.workers[worker].ring).iter().cloned().collect()
    }

    /// Those of the last events that came after the first `told`, which becomes the number of all so far.
    pub fn records_since(&self, worker: usize, told: &mut u64) -> Vec<Record> {
        let ring = locked(&self.workers[worker].ring);
        let all = self.workers[worker].remembered.load(Relaxed);
        let new = (all.saturating_sub(*told) as usize).min(ring.len());
        *told = all;
        ring.iter().skip(ring.len() - new).cloned().collect()
    }

    /// Writes all stages' last events, one JSON object a line.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut lines = String::new();
        for worker in 0..self.workers.len() {
            for record in self.records(worker) {
                let line = serde_json::to_string(&record).map_err(|e| Error::file(path, "record", e))?;
                lines += &line;
                lines.push('\n');
            }
        }
        crate::atomic::write_atomic(path, lines.as_bytes())
    }
}

/// Judges from outside whether a worker still works.
pub struct Judge {
    progress: Vec<(u64, usize, u64, Instant)>,
    heartbeat: Duration,
    slow: Duration,
}

impl Judge {
    /// `slow`: an event may take so long while it makes progress.
    pub fn new(workers: usize, heartbeat: Duration, slow: Duration) -> Self {
        Self { progress: vec![(0, 0, 0, Instant::now()); workers], heartbeat, slow }
    }

    /// What is wrong with `worker`, if anything.
    pub fn look(&mut self, worker: usize, glance: &Glance) -> Option<String> {
        let now = (glance.step, glance.position, glance.progress);
        let (step, position, progress, since) = &mut self.progress[worker];
        if (*step, *position, *progress) != now || glance.state != State::Computing {
            (*step, *position, *progress) = now;
            *since = Instant::now();
        }
        let still = since.elapsed();
        if glance.state != State::Computing {
            return None;
        }
        if still > self.heartbeat * 3 / 2 {
            return Some(format!("it stalls: no sign of progress for {:.1} s", still.as_secs_f64()));
        }
        if still < self.heartbeat && glance.seconds > self.slow.as_secs_f64() {
            return Some(format!("it is slow: {:.1} s in one event", glance.seconds));
        }
        None
    }
}
