//! Runs a model in stages: a thread or a process per worker, one step at a time, all of them watched.

mod fault;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::direct::Direct;
use super::fault::Injection;
use super::life::{Answer, Command, run_worker};
use super::part::{Part, Training};
use super::post::{ALIVE_EVERY, Mail};
use super::remote::{self, Across, Ranks};
use super::route::{Route, Routes};
use super::schedule::{Event, Kind, Work};
use super::simulate::{self, Span, StageUse, Timeline};
use super::transport::{Channels, Transport};
use super::watch::{Judge, Watch};
use super::worker::{Order, Report};
use crate::console;
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::Model;
use crate::tensor::Tensor;
use crate::train::lifecycle::{Method, Micro};
use crate::train::optimizer::Settings;

/// Makes a stage's hooks from its part of the model, on the thread that will use them.
pub type MakeMethods = dyn Fn(&Model) -> Result<Vec<Box<dyn Method>>> + Send + Sync;

/// How a pipeline runs.
#[derive(Clone)]
pub struct Setup {
    pub route: Arc<Route>,
    /// For steps of another number of micro-batches than the route's; `None`: there are none.
    pub kind: Option<Kind>,
    /// One per worker of this process.
    pub devices: Vec<Arc<dyn Device>>,
    pub optimizer: Settings,
    pub methods: Arc<MakeMethods>,
    pub teacher: Option<TeacherSetup>,
    /// Roads between the devices; without them tensors go through the hosts.
    pub direct: Option<Direct>,
    pub recompute: bool,
    /// No sign of progress for so long within an event is a fault: longer than the longest kernel.
    pub heartbeat: Duration,
    /// How long a message may take.
    pub deadline: Duration,
    /// How long an event may take while it makes progress.
    pub slow: Duration,
    /// Names the run in messages.
    pub run: String,
    /// Where the last events of all stages go when one fails.
    pub record: PathBuf,
    pub planted: Vec<Injection>,
    /// The step, counted from the start of this pipeline, in which every event waits for its device, so that spans are the
    /// device's work and not its queueing.
    pub timed: Option<u64>,
}

/// A teacher that runs in the same stages, a step ahead of the student.
#[derive(Clone)]
pub struct TeacherSetup {
    pub model: Arc<Model>,
    /// Pieces of each stage's part, the head left out, in the order of [`Route::teacher_stages`].
    pub cuts: Vec<Range<usize>>,
    /// Whether the student learns from its most probable tokens.
    pub hard: bool,
}

pub use super::life::Encoded;

/// What a step of the whole pipeline gave.
#[derive(Clone, Debug, Default)]
pub struct StepReport {
    /// Per unit of weight.
    pub loss: f64,
    pub norm: f64,
    /// Of each worker.
    pub workers: Vec<Report>,
    pub seconds: f64,
}

impl StepReport {
    /// The step as it went, in the form that the simulator gives; waiting for messages is no work. `replicas`: of each stage.
    pub fn timeline(&self, name: &str, replicas: &[usize]) -> Timeline {
        let waits = |e: Event| matches!(e.work, Work::ReceiveForward | Work::ReceiveBackward);
        let works = |s: &&Span| !s.activity.event().is_some_and(waits);
        let all = || self.workers.iter().flat_map(|w| w.spans.iter().filter(works));
        let begin = all().map(|s| s.start).fold(f64::INFINITY, f64::min);
        let end = all().map(|s| s.end).fold(0.0, f64::max);
        let moved = |s: &Span| Span { start: s.start - begin, end: s.end - begin, ..*s };
        let spans: Vec<Vec<Span>> =
            self.workers.iter().map(|w| w.spans.iter().filter(works).map(moved).collect()).collect();
        let stages = spans
            .iter()
            .zip(&self.workers)
            .map(|(spans, worker)| StageUse { peak_activation_bytes: worker.held_bytes as f64, ..StageUse::of(spans) });
        let workers = simulate::places(replicas);
        Timeline { name: name.into(), workers, stages: stages.collect(), spans, seconds: (end - begin).max(0.0) }
    }
}

pub struct Pipeline {
    setup: Setup,
    /// Of the workers in this process.
    commands: Vec<Sender<Command>>,
    answers: Receiver<(usize, Answer)>,
    watch: Arc<Watch>,
    threads: Vec<Option<JoinHandle<()>>>,
    /// The other workers.
    ranks: Option<Ranks>,
    judge: Judge,
    routes: Routes,
    /// Of the last step, or of the first one before it.
    current: Arc<Route>,
    compute: Option<DType>,
    step: u64,
    /// Since the start of this pipeline.
    taken: u64,
    failed: bool,
}

impl Pipeline {
    /// Spreads `model` over the workers' devices and starts them.
    ///
    /// # Errors
    /// Those of the devices and hooks.
    pub fn start(model: &Model, setup: Setup) -> Result<Self> {
        Self::start_across(model, setup, None)
    }

    /// As [`Pipeline::start`], with all workers but the first in other processes where `across` says so.
    ///
    /// # Errors
    /// Those of the devices and hooks.
    pub fn start_across(model: &Model, setup: Setup, across: Option<&Across>) -> Result<Self> {
        let route = setup.route.clone();
        let count = route.workers.len();
        let here = if across.is_some() { 1 } else { count };
        if model.config.encoder > 0 {
            let reason = "an encoder-decoder is not one chain of blocks: train it on one device".into();
            return Err(Error::NotAvailable { device: "pipeline".into(), reason });
        }
        if setup.devices.len() != here {
            let value = setup.devices.len().to_string();
            return Err(Error::Parameter {
                op: "pipeline",
                parameter: "devices",
                value,
                allowed: "one device per worker",
            });
        }
        let watch = Arc::new(Watch::new(&route.replicas));
        let (answer, answers) = channel();
        let generation = remote::number();
        let start = |across| Ranks::start(model, &setup, across, generation, &watch, answer.clone());
        let ranks = across.map(start).transpose()?;
        let ends: Vec<Box<dyn Transport>> = match across {
            Some(across) => vec![Box::new(Mail { post: across.post.clone(), generation })],
            None => Channels::between(count).into_iter().map(|end| -> Box<dyn Transport> { Box::new(end) }).collect(),
        };
        let mut pipeline = Self {
            judge: Judge::new(count, setup.heartbeat, setup.slow),
            compute: setup.optimizer.precision.compute(),
            routes: Routes::new(model.config.clone(), setup.kind, route.clone()),
            current: route.clone(),
            step: 0,
            taken: 0,
            failed: false,
            setup,
            commands: Vec::new(),
            answers,
            watch,
            threads: Vec::new(),
            ranks,
        };
        for (index, transport) in ends.into_iter().enumerate() {
            let (command, orders) = channel();
            let chunks = route.chunks_of(index);
            let part = Part::model_of(model, &pipeline.setup.devices[index], &chunks)?;
            let (watch, setup, answer) = (pipeline.watch.clone(), pipeline.setup.clone(), answer.clone());
            let body = move || run_worker(index, (part, chunks), &setup, transport, watch, &orders, &answer);
            let thread = std::thread::Builder::new().name(format!("espalier-stage-{index}")).spawn(body);
            pipeline.threads.push(Some(thread.map_err(|e| Error::io("stage thread", e))?));
            pipeline.commands.push(command);
        }
        pipeline.gather(Some(Instant::now() + pipeline.setup.deadline))?;
        Ok(pipeline)
    }

    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// Of the last step, or of the first one before it.
    pub fn current(&self) -> &Route {
        &self.current
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// The teacher's states for `micros`, which the next step will take; nothing else runs meanwhile.
    pub fn teach(&mut self, micros: &[Micro]) -> Result<()> {
        let route = self.routes.get(micros.len())?;
        self.ask(&Command::Teach(route, Arc::new(micros.to_vec()))).map(drop)
    }

    /// One step over `micros`: gradients of all, one update everywhere. A teacher computes its states for `next` meanwhile.
    ///
    /// # Errors
    /// `Fault` that names the stage at fault; the pipeline takes no more steps then.
    pub fn step(
        &mut self,
        micros: &[Micro],
        next: &[Micro],
        (dropout, seed, total_steps): (f32, u64, u64),
    ) -> Result<StepReport> {
        let started = Instant::now();
        let route = self.routes.get(micros.len())?;
        self.current = route.clone();
        let weight: f64 = micros.iter().map(|m| m.weight).sum();
        let (compute, recompute, split) = (self.compute, self.setup.recompute, self.routes.splits_backward());
        let training = Training { compute, dropout, seed, recompute, split };
        let (micros, next) = (Arc::new(micros.to_vec()), Arc::new(next.to_vec()));
        self.taken += 1;
        let timed = self.setup.timed == Some(self.taken);
        let order = Order { training, weight, total_steps, timed };
        let answers = self.ask(&Command::Step(route.clone(), micros, next, order))?;
        let workers: Vec<Report> =
            answers.into_iter().map(|a| if let Answer::Stepped(r) = a { r } else { Report::default() }).collect();
        self.step += 1;
        Ok(StepReport {
            loss: workers.first().map_or(0.0, |r| r.loss),
            norm: workers.first().map_or(0.0, |r| r.norm),
            workers,
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    /// The hooks' turn after update `step`, on every stage.
    pub fn hooks(&mut self, step: u64) -> Result<()> {
        self.ask(&Command::Hooks(step)).map(drop)
    }

    pub fn check_finite(&mut self) -> Result<()> {
        self.ask(&Command::CheckFinite).map(drop)
    }

    /// Brings the parameters home into `model`.
    pub fn collect(&mut self, model: &mut Model) -> Result<()> {
        for (name, (meta, bytes)) in self.encoded(false)? {
            let tensor = Tensor::from_bytes(model.device(), meta, &bytes)?;
            model.tensors.insert(name, tensor);
        }
        Ok(())
    }

    /// The optimizers' state, on `device`.
    pub fn state(&mut self, device: &Arc<dyn Device>) -> Result<BTreeMap<String, Tensor>> {
        let all = self.encoded(true)?;
        all.into_iter().map(|(name, (meta, bytes))| Ok((name, Tensor::from_bytes(device, meta, &bytes)?))).collect()
    }

    fn encoded(&mut self, state: bool) -> Result<Encoded> {
        let mut all = Encoded::new();
        for answer in self.ask(&Command::Collect(state))? {
            if let Answer::Tensors(tensors) = answer {
                all.extend(tensors);
            }
        }
        Ok(all)
    }

    /// Restores the optimizers from what [`Pipeline::state`] gave, whatever the number of stages was then.
    pub fn restore(&mut self, state: &BTreeMap<String, Tensor>, step: u64) -> Result<()> {
        let encoded =
            state.iter().map(|(n, t)| Ok((n.clone(), (t.meta(), t.to_bytes()?)))).collect::<Result<Encoded>>()?;
        let encoded = Arc::new(encoded);
        self.ask(&Command::Restore(encoded.clone(), step))?;
        self.step = step;
        Ok(())
    }

    fn ask(&mut self, command: &Command) -> Result<Vec<Answer>> {
        if self.failed {
            let reason = "a stage has failed; start the run again to go on from its last checkpoint".into();
            return Err(Error::NotAvailable { device: "pipeline".into(), reason });
        }
        if let Some(ranks) = &self.ranks {
            let mut others = 1..self.setup.route.workers.len();
            if let Err(e) = others.try_for_each(|worker| ranks.tell(worker, command)) {
                self.shut(None);
                return Err(e);
            }
        }
        for orders in &self.commands {
            // A worker that is gone shows when its answer stays away.
            let _ = orders.send(command.clone());
        }
        self.gather(None)
    }

    /// One answer of every worker; watches them meanwhile. `until`: for answers to no work that could be watched.
    fn gather(&mut self, until: Option<Instant>) -> Result<Vec<Answer>> {
        let count = self.setup.route.workers.len();
        let mut answers: Vec<Option<Answer>> = (0..count).map(|_| None).collect();
        let mut look = remote::show_every(self.setup.heartbeat);
        if self.ranks.is_some() {
            look = look.min(ALIVE_EVERY / 2);
        }
        while answers.iter().any(Option::is_none) {
            match self.answers.recv_timeout(look) {
                Ok((worker, Answer::Stopped(stop))) => return Err(self.stopped(worker, stop)),
                Ok((worker, answer)) => answers[worker] = Some(answer),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(self.fault(0, "all stages are gone".into())),
            }
            for worker in 0..count {
                if self.is_gone(worker) && answers[worker].is_none() {
                    // Its last words may still be on their way.
                    match self.answers.recv_timeout(Duration::from_millis(1)) {
                        Ok((from, Answer::Stopped(stop))) => return Err(self.stopped(from, stop)),
                        Ok((from, answer)) => answers[from] = Some(answer),
                        Err(_) => return Err(self.fault(worker, "it is gone without a word".into())),
                    }
                }
                let silent = self.ranks.as_ref().filter(|_| worker > 0).and_then(|ranks| ranks.silent(worker));
                if let Some(silence) = silent {
                    let what =
                        format!("its process is gone or silent: no sign of life for {:.1} s", silence.as_secs_f64());
                    // At once: a launcher that has lost a process may leave no time for the whole report.
                    console::warn(format_args!("rank {worker}: {what}"));
                    return Err(self.fault(worker, what));
                }
                if answers[worker].is_none() && until.is_some_and(|until| Instant::now() > until) {
                    let what = format!("it has not started within {:.1} s", self.setup.deadline.as_secs_f64());
                    return Err(self.fault(worker, what));
                }
                if let Some(what) = self.judge.look(worker, &self.watch.glance(worker)) {
                    return Err(self.fault(worker, what));
                }
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }

    /// Whether a worker of this process has ended.
    fn is_gone(&self, worker: usize) -> bool {
        let ended = |thread: &Option<JoinHandle<()>>| thread.as_ref().is_none_or(JoinHandle::is_finished);
        self.threads.get(worker).is_some_and(ended)
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        self.shut(None);
    }
}
