//! A worker's life: it answers the controller's orders until there are no more, in a thread or in a process of its own.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use super::direct::Roads;
use super::executor::{Setup, TeacherSetup};
use super::message;
use super::part::Part;
use super::reads::Reads;
use super::route::Route;
use super::teacher::TeacherPart;
use super::transport::Transport;
use super::watch::{State, Watch};
use super::words::parameter_of;
use super::worker::{Order, Report, Stop, Worker};
use crate::error::Result;
use crate::nn::Model;
use crate::shape::Meta;
use crate::tensor::Tensor;
use crate::train::lifecycle::Micro;
use crate::train::optimizer::Optimizer;

/// Tensors by name, as bytes: what leaves a worker's device.
pub type Encoded = BTreeMap<String, (Meta, Vec<u8>)>;

#[derive(Clone)]
pub(super) enum Command {
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

pub(super) enum Answer {
    Ready,
    Stepped(Report),
    Tensors(Encoded),
    Stopped(Stop),
}

/// A worker's life: answers orders until there are no more.
pub(super) fn run_worker(
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
    if let Some(direct) = &setup.direct {
        worker.roads = Roads::lay(direct, index, worker.part.model.device())?;
    }
    if let Some(TeacherSetup { model, cuts, hard }) = &setup.teacher {
        let (stage, _) = setup.route.workers[index];
        let chunk = setup.route.teacher_stages().iter().position(|&s| s == stage).unwrap_or_default();
        let device = worker.part.model.device().clone();
        worker.teacher = Some(TeacherPart::new(model, &device, (chunk, cuts), *hard)?);
    }
    worker.planted = setup.planted.iter().filter(|i| i.worker == index).copied().collect();
    Ok(worker)
}

/// Micro-batches on the worker's device, as far as it reads them.
fn own(worker: &Worker, micros: &[Micro], reads: Reads) -> Result<Vec<Micro>> {
    let device = worker.part.model.device();
    let reads = |micro: u32| if worker.route.has(worker.index, micro) { reads } else { Reads::default() };
    (0..).zip(micros).map(|(index, micro)| reads(index).bring(micro, device)).collect()
}

fn teacher_reads(worker: &Worker) -> Reads {
    worker.teacher.as_ref().map_or(Reads::default(), TeacherPart::reads)
}

/// Obeys an order, watched like any other work: one that does not end is a stall.
fn obey(worker: &mut Worker, command: Command) -> Result<Answer, Stop> {
    let event = match &command {
        Command::Step(..) | Command::Teach(..) => "taking in micro-batches",
        Command::Hooks(_) => "hooks",
        Command::Collect(_) => "bringing tensors home",
        Command::Restore(..) => "restoring",
        Command::CheckFinite => "looking for values that are not finite",
    };
    let at = (worker.optimizer.steps(), 0);
    worker.watch.at(worker.index, at, State::Computing, &event, "begins");
    let answer = carry_out(worker, command)?;
    let at = (worker.optimizer.steps(), 0);
    worker.watch.at(worker.index, at, State::Idle, &event, "done");
    Ok(answer)
}

fn carry_out(worker: &mut Worker, command: Command) -> Result<Answer, Stop> {
    match command {
        Command::Step(route, micros, next, order) => {
            worker.route = route;
            let micros = own(worker, &micros, worker.part.reads())?;
            let next = own(worker, &next, teacher_reads(worker))?;
            Ok(Answer::Stepped(worker.step(&micros, next, order)?))
        }
        Command::Teach(route, micros) => {
            worker.route = route;
            let micros = own(worker, &micros, teacher_reads(worker))?;
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
                if parameter_of(name).is_none_or(|parameter| worker.part.model.tensors.contains_key(parameter)) {
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
