//! One worker's step: its events in order, between them its teacher's, then the update together with all other workers.

mod ahead;
mod messages;
mod planted;
mod update;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::direct::Roads;
use super::fault::Injection;
use super::message::{Message, Purpose, Tag};
use super::part::{Part, Training};
use super::route::Route;
use super::schedule::{Event, Work};
use super::simulate::{Activity, Span};
use super::teacher::TeacherPart;
use super::transport::Transport;
use super::watch::{State, Watch};
use crate::dispatch;
use crate::error::Error;
use crate::ops::binary::ADD;
use crate::tensor::Tensor;
use crate::train::lifecycle::Micro;
use crate::train::optimizer::Optimizer;

/// Why a worker stopped in the middle of a step.
#[derive(Debug)]
pub enum Stop {
    /// Its own fault.
    Fault(String),
    /// An error of the model or the data, to be reported as it is.
    Error(Error),
    /// Somebody else's fault.
    Cancelled,
    /// A message stays away though none is lost: whoever is slow is at fault.
    Late(String),
    /// Another worker takes no messages any more.
    Gone(usize),
    /// As if the process had gone: planted.
    Vanish,
}

impl From<Error> for Stop {
    fn from(e: Error) -> Self {
        Stop::Error(e)
    }
}

/// What a step is told.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    pub training: Training,
    /// What the loss is divided by.
    pub weight: f64,
    pub total_steps: u64,
    /// Whether every event waits for the device.
    pub timed: bool,
}

/// What a step gave.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Per unit of weight, the same on all workers; and the norm of all gradients.
    pub loss: f64,
    pub norm: f64,
    /// Seconds since the pipeline started; a receive lasts until its message is there, the teacher's work meanwhile included.
    pub spans: Vec<Span>,
    /// Most bytes live on its device after an event that computes, beyond those at the start: activations that wait for
    /// backward.
    pub held_bytes: u64,
    /// Most bytes live at any time of the step, all of them.
    pub peak_bytes: u64,
}

/// What has come and is not asked for yet.
enum Arrived {
    Bytes(Message),
    /// Queued to be there before whatever uses it.
    Tensor(Tensor),
}

pub struct Worker {
    pub index: usize,
    pub run: u64,
    pub part: Part,
    pub optimizer: Optimizer,
    pub route: Arc<Route>,
    pub transport: Box<dyn Transport>,
    pub watch: Arc<Watch>,
    pub heartbeat: Duration,
    pub deadline: Duration,
    pub planted: Vec<Injection>,
    pub teacher: Option<TeacherPart>,
    pub roads: Roads,
    stash: HashMap<Tag, Arrived>,
    /// Tags of the running step that have been taken.
    taken: HashSet<Tag>,
    sent: Vec<u64>,
    received: Vec<u64>,
    position: usize,
    /// What stands there.
    event: String,
    step: u64,
    /// What the running step was busy with so far.
    spans: Vec<Span>,
    /// The step that the teacher works for, and the micro-batches that it has done for it here.
    taught: (u64, u64),
}

fn plus(sum: Option<Tensor>, part: Tensor) -> Result<Tensor, Error> {
    match sum {
        None => Ok(part),
        Some(sum) => dispatch::run_one(&ADD, &[&sum, &part]),
    }
}

impl Worker {
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        index: usize,
        run: u64,
        part: Part,
        optimizer: Optimizer,
        route: Arc<Route>,
        transport: Box<dyn Transport>,
        watch: Arc<Watch>,
        (heartbeat, deadline): (Duration, Duration),
    ) -> Self {
        let workers = route.workers.len();
        watch.device(index, part.model.device());
        watch.at(index, (0, 0), State::Idle, &"start", "ready");
        Self {
            index,
            run,
            part,
            optimizer,
            route,
            transport,
            watch,
            heartbeat,
            deadline,
            planted: Vec::new(),
            teacher: None,
            roads: Roads::default(),
            stash: HashMap::new(),
            taken: HashSet::new(),
            sent: vec![0; workers],
            received: vec![0; workers],
            position: 0,
            event: String::new(),
            step: 0,
            spans: Vec::new(),
            taught: (0, 0),
        }
    }

    /// Runs the schedule once and updates the weights. `micros`, and with a teacher those of the next step, lie on this
    /// worker's device.
    pub fn step(&mut self, micros: &[Micro], next: Vec<Micro>, order: Order) -> Result<Report, Stop> {
        self.step = self.optimizer.steps();
        self.optimizer.begin(order.weight, order.total_steps)?;
        self.taken.clear();
        self.spans.clear();
        if let Some(teacher) = &mut self.teacher {
            teacher.advance();
        }
        self.look_ahead(self.step + 1, next);
        let device = self.part.model.device().clone();
        device.reset_peak();
        let before = device.stats().bytes_live;
        let route = self.route.clone();
        let mut report = Report::default();
        // Inputs of chunks and gradients of their outputs, by the chunk that they are for, until it runs or they are sent.
        let mut tensors: HashMap<(Purpose, u32, u32), Vec<Tensor>> = HashMap::new();
        let mut losses: Option<Tensor> = None;
        // Micro-batches with their teacher's states, for backward too: a chunk may be run again there.
        let mut taught: HashMap<u32, Micro> = HashMap::new();
        let last = route.schedule.chunks() as u32 - 1;
        for (position, &event) in route.events[self.index].iter().enumerate() {
            self.position = position;
            let Event { work, chunk, micro } = event;
            self.begin(event)?;
            let start = self.watch.seconds();
            if work == Work::Forward
                && chunk == last
                && let Some(teacher) = &mut self.teacher
            {
                taught.insert(micro, teacher.complete(micro, &micros[micro as usize])?);
            }
            let data = taught.get(&micro).filter(|_| chunk == last).unwrap_or(&micros[micro as usize]);
            let at = (chunk, micro);
            match work {
                Work::Forward => {
                    let inputs = tensors.remove(&(Purpose::Forward, chunk, micro)).unwrap_or_default();
                    let outputs = self.part.forward(at, data, inputs, order.training)?;
                    if chunk == last {
                        for loss in outputs {
                            losses = Some(plus(losses, loss.reshape(&[1])?)?);
                        }
                    } else {
                        tensors.insert((Purpose::Forward, chunk + 1, micro), outputs);
                    }
                }
                Work::Backward | Work::BackwardInput => {
                    let flowed = tensors.remove(&(Purpose::Backward, chunk, micro)).unwrap_or_default();
                    let gradients = if work == Work::Backward {
                        let (inputs, own) = self.part.backward(at, data, flowed, order.training)?;
                        self.optimizer.accumulate(&own.leaves, &own.grads)?;
                        inputs
                    } else {
                        self.part.backward_input(at, data, flowed, order.training)?
                    };
                    if chunk > 0 {
                        tensors.insert((Purpose::Backward, chunk - 1, micro), gradients);
                    }
                }
                Work::BackwardWeight => {
                    let own = self.part.backward_weight(at)?;
                    self.optimizer.accumulate(&own.leaves, &own.grads)?;
                }
                Work::SendForward | Work::SendBackward => {
                    let (purpose, to) = if work == Work::SendForward {
                        (Purpose::Forward, chunk + 1)
                    } else {
                        (Purpose::Backward, chunk - 1)
                    };
                    let leaving = tensors.remove(&(purpose, to, micro)).unwrap_or_default();
                    for (part, tensor) in leaving.iter().enumerate() {
                        let tag = Tag { step: self.step, purpose, chunk: to, micro, part: part as u32 };
                        self.send(route.worker(to, micro), tag, tensor)?;
                    }
                }
                Work::ReceiveForward | Work::ReceiveBackward => {
                    let (inputs, outputs) = self.part.crossings(chunk)?;
                    let (purpose, count) = if work == Work::ReceiveForward {
                        (Purpose::Forward, inputs)
                    } else {
                        (Purpose::Backward, outputs)
                    };
                    let mut arrived = Vec::new();
                    for part in 0..count as u32 {
                        let tag = Tag { step: self.step, purpose, chunk, micro, part };
                        arrived.push(self.receive(tag, route.sender(event))?);
                    }
                    tensors.insert((purpose, chunk, micro), arrived);
                }
            }
            if work.computes() {
                report.held_bytes = report.held_bytes.max(device.stats().bytes_live.saturating_sub(before));
            }
            if order.timed && work.computes() {
                device.sync()?;
            }
            let end = self.watch.seconds();
            self.spans.push(Span { activity: Activity::Event(event), start, end });
        }
        self.position = route.events[self.index].len();
        self.finish_teacher(false)?;
        let start = self.watch.seconds();
        self.update(losses)?;
        let outcome = self.optimizer.outcome()?;
        if let Some(step) = outcome.failed {
            return Err(Stop::Error(self.optimizer.find_non_finite(step)?));
        }
        (report.loss, report.norm) = (outcome.loss, outcome.norm);
        self.spans.push(Span { activity: Activity::Update, start, end: self.watch.seconds() });
        report.spans = std::mem::take(&mut self.spans);
        report.peak_bytes = device.stats().bytes_peak;
        self.watch.at(self.index, (self.step, self.position), State::Idle, &"end of step", "done");
        Ok(report)
    }

    fn begin(&mut self, event: impl std::fmt::Display) -> Result<(), Stop> {
        if self.watch.cancelled() {
            return Err(Stop::Cancelled);
        }
        self.event = event.to_string();
        self.watch.at(self.index, (self.step, self.position), State::Computing, &self.event, "begins");
        self.inject()
    }
}
