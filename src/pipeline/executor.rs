//! Runs a model in stages: a thread per worker, one step at a time, all of them watched.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::fault::Injection;
use super::message;
use super::part::{Part, Training, micro_on};
use super::route::Route;
use super::schedule::{Kind, Schedule, Work};
use super::simulate::{Span, StageUse, Timeline};
use super::teacher::TeacherPart;
use super::transport::{Channels, Transport};
use super::watch::{Judge, Watch};
use super::worker::{Order, Report, Stop, Worker};
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{Config, Model};
use crate::shape::Meta;
use crate::tensor::Tensor;
use crate::train::lifecycle::{Method, Micro};
use crate::train::optimizer::{Optimizer, Settings};

/// Makes a stage's hooks from its part of the model, on the thread that will use them.
pub type MakeMethods = dyn Fn(&Model) -> Result<Vec<Box<dyn Method>>> + Send + Sync;

/// How a pipeline runs.
#[derive(Clone)]
pub struct Setup {
    pub route: Arc<Route>,
    /// For steps of another number of micro-batches than the route's; `None`: there are none.
    pub kind: Option<Kind>,
    /// One per worker.
    pub devices: Vec<Arc<dyn Device>>,
    pub optimizer: Settings,
    pub methods: Arc<MakeMethods>,
    pub teacher: Option<TeacherSetup>,
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

/// Tensors by name, as bytes: what leaves a worker's device.
pub type Encoded = BTreeMap<String, (Meta, Vec<u8>)>;

enum Command {
    /// The micro-batches of the step and, for a teacher, those of the next one.
    Step(Arc<Route>, Arc<Vec<Micro>>, Arc<Vec<Micro>>, Order),
    /// The teacher's states for the first step.
    Teach(Arc<Route>, Arc<Vec<Micro>>),
    /// Hooks after the update of this number.
    Hooks(u64),
    /// Parameters, and with `true` the optimizer's state.
    Collect(bool),
    Restore(Arc<Encoded>, u64),
    CheckFinite,
}

enum Answer {
    Ready,
    Stepped(Report),
    Tensors(Encoded),
    Stopped(Stop),
}

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
    /// The step as it went, in the form that the simulator gives; waiting for messages is no work.
    pub fn timeline(&self, name: &str) -> Timeline {
        let works = |s: &&Span| s.event.is_none_or(|e| !matches!(e.work, Work::ReceiveForward | Work::ReceiveBackward));
        let all = || self.workers.iter().flat_map(|w| w.spans.iter().filter(works));
        let begin = all().map(|s| s.start).fold(f64::INFINITY, f64::min);
        let end = all().map(|s| s.end).fold(0.0, f64::max);
        let moved = |s: &Span| Span { start: s.start - begin, end: s.end - begin, ..*s };
        let spans: Vec<Vec<Span>> =
            self.workers.iter().map(|w| w.spans.iter().filter(works).map(moved).collect()).collect();
        let stages = spans.iter().zip(&self.workers).map(|(spans, worker)| StageUse {
            busy: spans.iter().map(|s| s.end - s.start).sum(),
            first: spans.first().map_or(0.0, |s| s.start),
            last: spans.last().map_or(0.0, |s| s.end),
            peak_activation_bytes: worker.held_bytes as f64,
            peak_activations: 0,
        });
        Timeline { name: name.into(), stages: stages.collect(), spans, seconds: (end - begin).max(0.0) }
    }
}

pub struct Pipeline {
    setup: Setup,
    commands: Vec<Sender<Command>>,
    answers: Receiver<(usize, Answer)>,
    watch: Arc<Watch>,
    threads: Vec<Option<JoinHandle<()>>>,
    judge: Judge,
    /// By number of micro-batches.
    routes: BTreeMap<usize, Arc<Route>>,
    /// Micro-batches of the last step.
    micros: usize,
    config: Config,
    split: bool,
    compute: Option<DType>,
    step: u64,
    failed: bool,
}

impl Pipeline {
    /// Spreads `model` over the workers' devices and starts them.
    ///
    /// # Errors
    /// Those of the devices and hooks.
    pub fn start(model: &Model, setup: Setup) -> Result<Self> {
        let route = setup.route.clone();
        let count = route.workers.len();
        if setup.devices.len() != count {
            let value = setup.devices.len().to_string();
            return Err(Error::Parameter {
                op: "pipeline",
                parameter: "devices",
                value,
                allowed: "one device per worker",
            });
        }
        let watch = Arc::new(Watch::new(count));
        let (answer, answers) = channel();
        let (mut commands, mut threads) = (Vec::new(), Vec::new());
        for (index, transport) in Channels::between(count).into_iter().enumerate() {
            let (command, orders) = channel();
            let chunks = route.chunks_of(index);
            let part = Part::model_of(model, &setup.devices[index], &chunks)?;
            let (watch, setup, answer) = (watch.clone(), setup.clone(), answer.clone());
            let body = move || run_worker(index, (part, chunks), &setup, Box::new(transport), watch, &orders, &answer);
            let thread = std::thread::Builder::new().name(format!("espalier-stage-{index}")).spawn(body);
            threads.push(Some(thread.map_err(|e| Error::io("stage thread", e))?));
            commands.push(command);
        }
        let mut pipeline = Self {
            judge: Judge::new(count, setup.heartbeat, setup.slow),
            split: route.schedule.splits_backward(),
            compute: setup.optimizer.precision.compute(),
            routes: [(route.schedule.micros, route.clone())].into(),
            micros: route.schedule.micros,
            config: model.config.clone(),
            step: 0,
            failed: false,
            setup,
            commands,
            answers,
            watch,
            threads,
        };
        pipeline.gather()?;
        Ok(pipeline)
    }

    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// Of the last step, or of the first one before it.
    pub fn current(&self) -> &Route {
        self.routes.get(&self.micros).unwrap_or(&self.setup.route)
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// The teacher's states for `micros`, which the next step will take; nothing else runs meanwhile.
    pub fn teach(&mut self, micros: &[Micro]) -> Result<()> {
        let route = self.route(micros.len())?;
        let micros = Arc::new(micros.to_vec());
        self.ask(|_| Command::Teach(route.clone(), micros.clone())).map(drop)
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
        let route = self.route(micros.len())?;
        self.micros = micros.len();
        let weight: f64 = micros.iter().map(|m| m.weight).sum();
        let (compute, recompute, split) = (self.compute, self.setup.recompute, self.split);
        let training = Training { compute, dropout, seed, recompute, split };
        let (micros, next) = (Arc::new(micros.to_vec()), Arc::new(next.to_vec()));
        let order = Order { training, weight, total_steps };
        let answers = self.ask(|_| Command::Step(route.clone(), micros.clone(), next.clone(), order))?;
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
        self.ask(|_| Command::Hooks(step)).map(drop)
    }

    pub fn check_finite(&mut self) -> Result<()> {
        self.ask(|_| Command::CheckFinite).map(drop)
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
        for answer in self.ask(|_| Command::Collect(state))? {
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
        self.ask(|_| Command::Restore(encoded.clone(), step))?;
        self.step = step;
        Ok(())
    }

    /// The route for so many micro-batches.
    fn route(&mut self, micros: usize) -> Result<Arc<Route>> {
        if let Some(route) = self.routes.get(&micros) {
            return Ok(route.clone());
        }
        let Some(kind) = self.setup.kind else {
            let (value, allowed) = (micros.to_string(), "as many as the schedule has");
            return Err(Error::Parameter { op: "pipeline", parameter: "micro_batches", value, allowed });
        };
        let own = &self.setup.route;
        let schedule = Schedule::new(kind, own.replicas.len(), micros)?;
        let route = Arc::new(Route::new(&self.config, &schedule, own.cuts.clone(), own.replicas.clone())?);
        self.routes.insert(micros, route.clone());
        Ok(route)
    }

    fn ask(&mut self, command: impl Fn(usize) -> Command) -> Result<Vec<Answer>> {
        if self.failed {
            let reason = "a stage has failed; start the run again to go on from its last checkpoint".into();
            return Err(Error::NotAvailable { device: "pipeline".into(), reason });
        }
        for (worker, orders) in self.commands.iter().enumerate() {
            // A worker that is gone shows when its answer stays away.
            let _ = orders.send(command(worker));
        }
        self.gather()
    }

    /// One answer of every worker; watches them meanwhile.
    fn gather(&mut self) -> Result<Vec<Answer>> {
        let count = self.threads.len();
        let mut answers: Vec<Option<Answer>> = (0..count).map(|_| None).collect();
        let look = (self.setup.heartbeat / 8).clamp(Duration::from_millis(5), Duration::from_millis(250));
        while answers.iter().any(Option::is_none) {
            match self.answers.recv_timeout(look) {
                Ok((worker, Answer::Stopped(stop))) => return Err(self.stopped(worker, stop)),
                Ok((worker, answer)) => answers[worker] = Some(answer),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(self.fault(0, "all stages are gone".into())),
            }
            for worker in 0..count {
                let gone = self.threads[worker].as_ref().is_none_or(JoinHandle::is_finished);
                if gone && answers[worker].is_none() {
                    // Its last words may still be on their way.
                    match self.answers.recv_timeout(Duration::from_millis(1)) {
                        Ok((from, Answer::Stopped(stop))) => return Err(self.stopped(from, stop)),
                        Ok((from, answer)) => answers[from] = Some(answer),
                        Err(_) => return Err(self.fault(worker, "it is gone without a word".into())),
                    }
                }
                if let Some(what) = self.judge.look(worker, &self.watch.glance(worker)) {
                    return Err(self.fault(worker, what));
                }
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }

    fn stopped(&mut self, worker: usize, stop: Stop) -> Error {
        match stop {
            Stop::Fault(what) => self.fault(worker, what),
            Stop::Error(error) => {
                let error = self.most_telling(error);
                self.shut();
                error
            }
            Stop::Gone(other) => self.fault(other, "it is gone without a word".into()),
            Stop::Cancelled | Stop::Vanish => self.fault(worker, "it is gone without a word".into()),
        }
    }

    /// A gradient that is not finite stops all stages at once; only the one that holds it can name it.
    fn most_telling(&mut self, first: Error) -> Error {
        let names = |e: &Error| !matches!(e, Error::NonFinite { layer, .. } if layer == "model");
        let mut told = first;
        let mut left = self.threads.len() - 1;
        while left > 0 && !names(&told) {
            match self.answers.recv_timeout(2 * self.setup.heartbeat) {
                Ok((_, Answer::Stopped(Stop::Error(error)))) => told = error,
                Ok(_) => {}
                Err(_) => return told,
            }
            left -= 1;
        }
        told
    }

    fn fault(&mut self, worker: usize, what: String) -> Error {
        let glance = self.watch.glance(worker);
        let record = self.setup.record.clone();
        let (stage, replica) = self.setup.route.workers[worker];
        let copy = if self.setup.route.replicas[stage] > 1 { format!(" (replica {replica})") } else { String::new() };
        self.shut();
        let what = match self.watch.write(&record) {
            Ok(()) => format!("{what}{copy}"),
            Err(e) => format!("{what}{copy}; the record could not be written: {e}"),
        };
        Error::Fault { stage, step: glance.step, position: glance.position, event: glance.event, what, record }
    }

    /// Stops all workers. One that does not listen within two heartbeats is left behind: a thread cannot be killed.
    fn shut(&mut self) {
        self.failed = true;
        self.watch.cancel();
        self.commands.clear();
        let began = Instant::now();
        for thread in &mut self.threads {
            while thread.as_ref().is_some_and(|t| !t.is_finished()) && began.elapsed() < 2 * self.setup.heartbeat {
                std::thread::sleep(Duration::from_millis(2));
            }
            if let Some(thread) = thread.take_if(|t| t.is_finished()) {
                // A panic was reported where it happened.
                let _ = thread.join();
            }
        }
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        self.shut();
    }
}

/// A worker's life: answers orders until there are no more.
fn run_worker(
    index: usize,
    (model, chunks): (Model, BTreeMap<u32, Range<usize>>),
    setup: &Setup,
    transport: Box<dyn Transport>,
    watch: Arc<Watch>,
    orders: &Receiver<Command>,
    answer: &Sender<(usize, Answer)>,
) {
    let mut worker = match start_worker(index, (model, chunks), setup, transport, watch) {
        Ok(worker) => worker,
        Err(e) => {
            let _ = answer.send((index, Answer::Stopped(Stop::Error(e))));
            return;
        }
    };
    let _ = answer.send((index, Answer::Ready));
    while let Ok(order) = orders.recv() {
        let obeyed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| obey(&mut worker, order)));
        let reply = match obeyed {
            Ok(Ok(reply)) => reply,
            Ok(Err(Stop::Vanish)) => return,
            Ok(Err(stop)) => Answer::Stopped(stop),
            Err(panic) => {
                let text = panic.downcast_ref::<&str>().map(ToString::to_string);
                let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
                Answer::Stopped(Stop::Fault(format!("it panicked: {}", text.unwrap_or_default())))
            }
        };
        let ends = matches!(reply, Answer::Stopped(_));
        // Those who were told to stop have nothing to say.
        if !matches!(reply, Answer::Stopped(Stop::Cancelled)) && answer.send((index, reply)).is_err() || ends {
            return;
        }
    }
}

fn start_worker(
    index: usize,
    (mut model, chunks): (Model, BTreeMap<u32, Range<usize>>),
    setup: &Setup,
    transport: Box<dyn Transport>,
    watch: Arc<Watch>,
) -> Result<Worker> {
    let optimizer = Optimizer::new(&mut model, setup.optimizer, |_| true)?;
    let mut part = Part::new(model, chunks, &optimizer)?;
    part.methods = (setup.methods)(&part.model)?;
    let run = message::run_number(&setup.run);
    let times = (setup.heartbeat, setup.deadline);
    let mut worker = Worker::new(index, run, part, optimizer, setup.route.clone(), transport, watch, times);
    if let Some(TeacherSetup { model, cuts, hard }) = &setup.teacher {
        let (stage, _) = setup.route.workers[index];
        let chunk = setup.route.teacher_stages().iter().position(|&s| s == stage).unwrap_or_default();
        let device = worker.part.model.device().clone();
        let how = (setup.optimizer.precision.compute(), *hard);
        worker.teacher = Some(TeacherPart::new(model, &device, (chunk, cuts), how)?);
    }
    worker.planted = setup.planted.iter().filter(|i| i.worker == index).copied().collect();
    Ok(worker)
}

fn own(worker: &Worker, micros: &[Micro]) -> Result<Vec<Micro>> {
    let device = worker.part.model.device();
    micros.iter().map(|m| micro_on(m, device)).collect()
}

fn obey(worker: &mut Worker, command: Command) -> Result<Answer, Stop> {
    match command {
        Command::Step(route, micros, next, order) => {
            worker.route = route;
            let (micros, next) = (own(worker, &micros)?, own(worker, &next)?);
            Ok(Answer::Stepped(worker.step(&micros, next, order)?))
        }
        Command::Teach(route, micros) => {
            worker.route = route;
            let micros = own(worker, &micros)?;
            worker.teach(micros)?;
            Ok(Answer::Ready)
        }
        Command::Hooks(step) => {
            for method in &mut worker.part.methods {
                method.on_update(step, &worker.part.model, &mut worker.optimizer)?;
            }
            Ok(Answer::Ready)
        }
        Command::Collect(state) => {
            // A stage's replicas are equal.
            let (_, replica) = worker.route.workers[worker.index];
            let tensors = match (replica, state) {
                (0, true) => worker.optimizer.state()?,
                (0, false) => worker.part.model.tensors.clone(),
                _ => BTreeMap::new(),
            };
            let encoded = tensors.into_iter().map(|(name, t)| Ok((name, (t.meta(), t.to_bytes()?))));
            Ok(Answer::Tensors(encoded.collect::<Result<_>>()?))
        }
        Command::Restore(state, step) => {
            let device = worker.part.model.device().clone();
            let mut own = BTreeMap::new();
            for (name, (meta, bytes)) in state.iter() {
                let parameter = name.split_once('/').map_or("", |(_, parameter)| parameter);
                if parameter.is_empty() || worker.part.model.tensors.contains_key(parameter) {
                    own.insert(name.clone(), Tensor::from_bytes(&device, *meta, bytes)?);
                }
            }
            worker.optimizer.restore(&own, step)?;
            Ok(Answer::Ready)
        }
        Command::CheckFinite => {
            worker.optimizer.check_finite()?;
            Ok(Answer::Ready)
        }
    }
}
