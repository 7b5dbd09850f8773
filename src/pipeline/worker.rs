//! One worker's step: its events in order, messages checked, weights updated together with all other workers.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::fault::{Injection, Planted};
use super::message::{self, Message, Purpose, Tag};
use super::part::{Part, Training};
use super::route::Route;
use super::schedule::{Event, Work};
use super::simulate::Span;
use super::teacher::TeacherPart;
use super::transport::{Gone, Transport};
use super::watch::{State, Watch};
use crate::dispatch;
use crate::error::Error;
use crate::ops::binary::{ADD, AccumulateScaled};
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
}

/// What a step gave.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Per unit of weight, the same on all workers; and the norm of all gradients.
    pub loss: f64,
    pub norm: f64,
    /// Seconds since the pipeline started; a receive lasts until its message is there.
    pub spans: Vec<Span>,
    /// Most bytes live on its device after an event that computes, beyond those at the start: activations that wait for
    /// backward.
    pub held_bytes: u64,
    /// Most bytes live at any time of the step, all of them.
    pub peak_bytes: u64,
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
    stash: HashMap<Tag, Message>,
    /// Tags of the running step that have been taken.
    taken: HashSet<Tag>,
    sent: Vec<u64>,
    received: Vec<u64>,
    position: usize,
    /// What stands there.
    event: String,
    step: u64,
}

fn plus(sum: Option<Tensor>, part: Tensor) -> Result<Tensor, Error> {
    match sum {
        None => Ok(part),
        Some(sum) => dispatch::run_one(&ADD, &[&sum, &part]),
    }
}

/// How often a waiting worker looks whether the others still run.
const GLANCE: Duration = Duration::from_millis(20);

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
            stash: HashMap::new(),
            taken: HashSet::new(),
            sent: vec![0; workers],
            received: vec![0; workers],
            position: 0,
            event: String::new(),
            step: 0,
        }
    }

    /// The teacher's states for the next step's micro-batches, with no student's work in between.
    pub fn teach(&mut self, next: Vec<Micro>) -> Result<(), Stop> {
        self.step = self.optimizer.steps();
        self.watch.at(self.index, (self.step, 0), State::Computing, &"teacher", "begins");
        self.look_ahead(next);
        self.finish_teacher()?;
        self.watch.at(self.index, (self.step, 0), State::Idle, &"teacher", "done");
        Ok(())
    }

    fn look_ahead(&mut self, next: Vec<Micro>) {
        let (route, index) = (self.route.clone(), self.index);
        let (stage, _) = route.workers[index];
        if let Some(teacher) = &mut self.teacher {
            teacher.look_ahead(next, |micro| route.on_stage(stage, micro) == index);
        }
    }

    /// The messages of the teacher's input for a micro-batch.
    fn teacher_tags(&self, chunk: u32, micro: u32, count: usize) -> Vec<Tag> {
        let tag = |part| Tag { step: self.step + 1, purpose: Purpose::Teacher, chunk, micro, part };
        (0..count as u32).map(tag).collect()
    }

    /// Runs one piece of the teacher's work if one can run now.
    fn advance_teacher(&mut self) -> Result<bool, Stop> {
        let Some(teacher) = &self.teacher else {
            return Ok(false);
        };
        let Some(&micro) = teacher.pending.front() else {
            return Ok(false);
        };
        let tags =
            if teacher.chunk == 0 { Vec::new() } else { self.teacher_tags(teacher.chunk, micro, teacher.inputs()) };
        if !tags.iter().all(|tag| self.stash.contains_key(tag)) {
            return Ok(false);
        }
        self.watch.at(
            self.index,
            (self.step, self.position),
            State::Computing,
            &format_args!("teacher {micro}"),
            "begins",
        );
        let mut inputs = Vec::with_capacity(tags.len());
        for tag in tags {
            inputs.push(self.receive(tag, None)?);
        }
        let Some(teacher) = &mut self.teacher else {
            return Ok(false);
        };
        teacher.pending.pop_front();
        let chunk = teacher.chunk;
        let outputs = teacher.run(micro, &inputs)?;
        if let Some(&stage) = self.route.teacher_stages().get(chunk as usize + 1) {
            let to = self.route.on_stage(stage, micro);
            let tags = self.teacher_tags(chunk + 1, micro, outputs.len());
            for (tag, tensor) in tags.into_iter().zip(&outputs) {
                self.send(to, tag, tensor)?;
            }
        }
        Ok(true)
    }

    fn finish_teacher(&mut self) -> Result<(), Stop> {
        let mut began = Instant::now();
        while self.teacher.as_ref().is_some_and(|t| !t.pending.is_empty()) {
            if self.advance_teacher()? {
                began = Instant::now();
                continue;
            }
            if self.watch.cancelled() {
                return Err(Stop::Cancelled);
            }
            self.watch.state(self.index, State::Waiting);
            if let Some((from, frame)) = self.transport.receive(GLANCE).map_err(Stop::Fault)? {
                self.take_in(from, frame)?;
            } else if began.elapsed() > self.deadline {
                return Err(Stop::Fault(format!(
                    "the teacher's states did not come within {:.0} s",
                    self.deadline.as_secs_f64()
                )));
            }
        }
        Ok(())
    }

    /// Runs the schedule once and updates the weights. `micros`, and with a teacher those of the next step, lie on this
    /// worker's device.
    pub fn step(&mut self, micros: &[Micro], next: Vec<Micro>, order: Order) -> Result<Report, Stop> {
        self.step = self.optimizer.steps();
        self.optimizer.begin(order.weight, order.total_steps)?;
        self.taken.clear();
        if let Some(teacher) = &mut self.teacher {
            teacher.advance();
        }
        self.look_ahead(next);
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
            let end = self.watch.seconds();
            report.spans.push(Span { event: Some(event), start, end });
        }
        self.position = route.events[self.index].len();
        self.finish_teacher()?;
        let start = self.watch.seconds();
        self.update(losses)?;
        let outcome = self.optimizer.outcome()?;
        if let Some(step) = outcome.failed {
            return Err(Stop::Error(self.optimizer.find_non_finite(step)?));
        }
        (report.loss, report.norm) = (outcome.loss, outcome.norm);
        report.spans.push(Span { event: None, start, end: self.watch.seconds() });
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

    /// Gradients of replicas added up, loss and norm of all stages agreed on, weights updated.
    fn update(&mut self, losses: Option<Tensor>) -> Result<(), Stop> {
        self.begin("update")?;
        let route = self.route.clone();
        let (stage, _) = route.workers[self.index];
        let replicas = route.of_stage(stage);
        if replicas.len() > 1 {
            self.reduce(replicas)?;
        }
        let device = self.part.model.device().clone();
        let zero = Tensor::from_slice(&device, &[1], &[0.0f32])?;
        let own = [self.optimizer.squares()?.unwrap_or(zero.clone()), losses.unwrap_or(zero)];
        let tag = |from: usize, to: usize, part: u32| Tag {
            step: self.step,
            purpose: Purpose::Totals,
            chunk: from as u32,
            micro: to as u32,
            part,
        };
        let (index, workers) = (self.index, route.workers.len());
        let tags: Vec<_> =
            (0..workers).map(|other| [0, 1].map(|part| (tag(index, other, part), tag(other, index, part)))).collect();
        for other in (0..workers).filter(|&other| other != index) {
            for (part, tensor) in own.iter().enumerate() {
                self.send(other, tags[other][part].0, tensor)?;
            }
        }
        // All add in the order of the workers. Replicas hold the same gradients, so one of them counts, but losses of their own.
        let mut totals: [Option<Tensor>; 2] = [None, None];
        for (other, &(_, replica)) in route.workers.iter().enumerate() {
            for (part, total) in totals.iter_mut().enumerate() {
                let received = if other == index {
                    own[part].clone()
                } else {
                    self.receive(tags[other][part].1, Some((other, usize::MAX)))?
                };
                if part == 1 || replica == 0 {
                    *total = Some(plus(total.take(), received)?);
                }
            }
        }
        self.watch.state(self.index, State::Computing);
        let [Some(squares), Some(losses)] = totals else {
            return Ok(());
        };
        Ok(self.optimizer.apply(&squares, &losses)?)
    }

    /// Sums gradients over the replicas of a stage, in their order on each of them.
    fn reduce(&mut self, replicas: std::ops::Range<usize>) -> Result<(), Stop> {
        let groups = self.optimizer.gradients()?;
        for (group, own) in groups.iter().enumerate() {
            let tag = |from: usize, to: usize| Tag {
                step: self.step,
                purpose: Purpose::Gradients,
                chunk: group as u32,
                micro: from as u32,
                part: to as u32,
            };
            let copy = own.duplicate()?;
            let (mut outgoing, mut incoming) = (Vec::new(), Vec::new());
            for other in replicas.clone().filter(|&other| other != self.index) {
                outgoing.push((other, tag(self.index, other)));
            }
            for from in replicas.clone() {
                incoming.push((from, tag(from, self.index)));
            }
            for (to, tag) in outgoing {
                self.send(to, tag, &copy)?;
            }
            for (i, (from, tag)) in incoming.into_iter().enumerate() {
                let part = if from == self.index { copy.clone() } else { self.receive(tag, Some((from, usize::MAX)))? };
                if i == 0 {
                    let device = own.device();
                    device.copy(part.buffer(), part.offset(), own.buffer(), own.offset(), own.meta().bytes())?;
                } else {
                    dispatch::run(&AccumulateScaled { factor: 1.0 }, &[own, &part])?;
                }
            }
        }
        Ok(())
    }

    fn send(&mut self, to: usize, tag: Tag, tensor: &Tensor) -> Result<(), Stop> {
        let mut frame = message::frame_of(self.run, tag, self.sent[to], tensor)?;
        self.sent[to] += 1;
        let planted = self.planted(|p| matches!(p, Planted::Drop | Planted::Duplicate | Planted::Corrupt));
        match planted {
            Some(Planted::Drop) => return Ok(()),
            Some(Planted::Duplicate) => self.transport.send(to, frame.clone()).map_err(|Gone| Stop::Gone(to))?,
            Some(Planted::Corrupt) => {
                let middle = frame.len() / 2;
                frame[middle] ^= 0x40;
            }
            _ => {}
        }
        self.transport.send(to, frame).map_err(|Gone| Stop::Gone(to))
    }

    /// The tensor that `tag` names. `sender`: who sends it, and where that stands in the sender's schedule.
    fn receive(&mut self, tag: Tag, sender: Option<(usize, usize)>) -> Result<Tensor, Stop> {
        let began = Instant::now();
        let mut passed: Option<Instant> = None;
        self.watch.state(self.index, State::Waiting);
        loop {
            if let Some(message) = self.stash.remove(&tag) {
                self.taken.insert(tag);
                self.watch.state(self.index, State::Computing);
                return Ok(Tensor::from_bytes(self.part.model.device(), message.meta, message.payload())?);
            }
            if self.watch.cancelled() {
                return Err(Stop::Cancelled);
            }
            // What has come is taken in first; then the teacher's work goes before waiting.
            let mut taken = self.transport.receive(Duration::ZERO).map_err(Stop::Fault)?;
            if taken.is_none() && tag.purpose != Purpose::Teacher && self.advance_teacher()? {
                let at = (self.step, self.position);
                self.watch.at(self.index, at, State::Waiting, &self.event, "waits on");
                continue;
            }
            if taken.is_none() {
                taken = self.transport.receive(GLANCE).map_err(Stop::Fault)?;
            }
            if let Some((from, frame)) = taken {
                self.take_in(from, frame)?;
                continue;
            }
            if let Some((worker, position)) = sender {
                let seen = self.watch.glance(worker);
                let beyond = (seen.step, seen.position) > (self.step, position);
                if beyond && passed.get_or_insert_with(Instant::now).elapsed() > self.heartbeat {
                    return Err(Stop::Fault(format!(
                        "a message is lost: worker {worker} has sent {tag} and it did not come"
                    )));
                }
            }
            if began.elapsed() > self.deadline {
                let from = sender
                    .map_or("?".into(), |(w, _)| format!("worker {w}, which is at {}", self.watch.glance(w).event));
                return Err(Stop::Fault(format!(
                    "{tag} did not come within {:.0} s from {from}",
                    self.deadline.as_secs_f64()
                )));
            }
        }
    }

    fn take_in(&mut self, from: usize, frame: Vec<u8>) -> Result<(), Stop> {
        let message =
            message::decode(self.run, frame).map_err(|what| Stop::Fault(format!("{what}, from worker {from}")))?;
        let tag = message.tag;
        let expected = self.received.get(from).copied().unwrap_or(0);
        let fault = |what: String| Err(Stop::Fault(what));
        if message.sequence < expected || self.taken.contains(&tag) || self.stash.contains_key(&tag) {
            return fault(format!("a message came twice: {tag} from worker {from}"));
        }
        if message.sequence > expected {
            let lost = message.sequence - expected;
            return fault(format!("a message is lost: {lost} before {tag} from worker {from}"));
        }
        if tag.step < self.step || tag.step > self.step + 1 {
            return fault(format!("a message of another step than {}: {tag} from worker {from}", self.step));
        }
        self.received[from] = expected + 1;
        self.stash.insert(tag, message);
        Ok(())
    }

    fn planted(&mut self, kind: impl Fn(&Planted) -> bool) -> Option<Planted> {
        let at = self.planted.iter().position(|i| {
            i.worker == self.index && i.step == self.step && i.position == self.position && kind(&i.what)
        })?;
        Some(self.planted.remove(at).what)
    }

    fn inject(&mut self) -> Result<(), Stop> {
        let nap = |watch: &Watch, time: Duration| {
            let began = Instant::now();
            while began.elapsed() < time && !watch.cancelled() {
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        match self.planted(|p| !matches!(p, Planted::Drop | Planted::Duplicate | Planted::Corrupt)) {
            None => Ok(()),
            Some(Planted::Panic) => panic!("planted"),
            Some(Planted::Exit) => Err(Stop::Vanish),
            Some(Planted::Stall) => {
                nap(&self.watch, Duration::MAX);
                Err(Stop::Cancelled)
            }
            Some(Planted::Slow) => {
                // Progress, but little: a launch now and then.
                while !self.watch.cancelled() {
                    nap(&self.watch, self.heartbeat / 4);
                    Tensor::from_slice(self.part.model.device(), &[1], &[0.0f32])
                        .and_then(|t| dispatch::run_one(&ADD, &[&t, &t]))?;
                }
                Err(Stop::Cancelled)
            }
            Some(_) => Ok(()),
        }
    }
}
