//! What the controller and a worker in another process say to each other.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::direct::Way;
use super::fault::Injection;
use super::life::{Answer, Command, Encoded};
use super::packet::{self, Loose};
use super::reads::Reads;
use super::schedule::{Kind, Schedule};
use super::watch::{Glance, Record};
use super::worker::{Order, Report, Stop};
use crate::device::Device;
use crate::device::road::Ticket;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{Batch, Config};
use crate::shape::Meta;
use crate::tensor::Tensor;
use crate::train::lifecycle::{Micro, Teacher, Top};
use crate::train::optimizer::Settings;

/// What a stage's hooks are made from, in a form that reaches another process.
#[derive(Clone, Debug, Default)]
pub struct Described {
    pub text: String,
    /// Needed where the head is.
    pub tensors: Encoded,
}

/// What a worker is started with, but for its tensors.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Start {
    pub config: Config,
    pub schedule: Schedule,
    pub cuts: Vec<Range<usize>>,
    pub replicas: Vec<usize>,
    pub kind: Option<Kind>,
    /// Its name, and where the recipe names none that of the controller's own, in case there is none of that name.
    pub device: (String, Option<String>),
    pub optimizer: Settings,
    /// Tickets of the roads between workers.
    pub roads: Vec<(Way, Ticket)>,
    pub recompute: bool,
    /// Heartbeat, deadline and slow, in seconds.
    pub times: [f64; 3],
    pub run: String,
    pub record: std::path::PathBuf,
    pub planted: Vec<Injection>,
    /// Names of the model's tensors, then of those that the hooks are made from.
    pub tensors: Vec<String>,
    pub method_tensors: Vec<String>,
    pub methods: String,
}

/// A micro-batch but for its tensors, and which of those it has.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct MicroHead {
    weight: f64,
    gold: bool,
    tokens: usize,
    present: Vec<bool>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Word {
    // From the controller.
    Start(Box<Start>),
    Step {
        micros: Vec<MicroHead>,
        dropout: f32,
        seed: u64,
        weight: f64,
        total_steps: u64,
        timed: bool,
    },
    Hooks(u64),
    Collect(bool),
    Restore(Vec<String>, u64),
    CheckFinite,
    /// The pipeline is over; why, if it has not begun because another rank could not be started.
    Stop(Option<String>),
    /// The program is over, with this exit code.
    End(i32),
    // From a worker's process.
    Ready,
    Stepped(Report),
    Tensors(Vec<String>),
    Fault(String),
    NonFinite {
        step: u64,
        layer: String,
        tensor: String,
        count: usize,
        index: usize,
    },
    OutOfMemory {
        device: String,
        requested: u64,
        live: u64,
        cap: u64,
    },
    Late(String),
    Gone(usize),
    /// The worker ended without a word.
    Vanished,
    /// The pipeline is over here, too.
    Stopped,
    Bye,
    // From both.
    Seen(Glance, Vec<Record>),
}

/// What cannot be said is a mistake of this program.
pub(super) fn unsaid(reason: String) -> Error {
    Error::NotAvailable { device: "pipeline".into(), reason }
}

/// A word without tensors.
pub(super) fn plain(word: &Word) -> Result<Vec<u8>> {
    packet::encode(word, [].iter()).map_err(unsaid)
}

pub(super) fn with_tensors<'a>(word: &Word, tensors: impl Iterator<Item = &'a Loose> + Clone) -> Result<Vec<u8>> {
    packet::encode(word, tensors).map_err(unsaid)
}

/// For `worker`, which reads so much of its micro-batches and nothing of others, and holds these parameters.
pub(super) fn of_command(
    command: &Command,
    worker: usize,
    reads: Reads,
    holds: impl Fn(&str) -> bool,
) -> Result<Vec<u8>> {
    match command {
        // A teacher beside the student stays in one process.
        Command::Teach(..) => Err(unsaid("a teacher beside the student runs in one process".into())),
        Command::Step(route, micros, _, order) => {
            let (mut heads, mut tensors) = (Vec::new(), Vec::new());
            for (index, micro) in (0..).zip(micros.iter()) {
                let own = route.has(worker, index);
                let read = |(place, tensor)| Option::filter(tensor, |_: &&Tensor| own && reads.contains(place));
                let sent: Vec<Option<&Tensor>> = micro.tensors().into_iter().enumerate().map(read).collect();
                let present = sent.iter().map(Option::is_some).collect();
                heads.push(MicroHead { weight: micro.weight, gold: micro.gold, tokens: micro.tokens, present });
                for tensor in sent.into_iter().flatten() {
                    tensors.push((tensor.meta(), tensor.to_bytes()?));
                }
            }
            let Order { training, weight, total_steps, timed } = *order;
            let (dropout, seed) = (training.dropout, training.seed);
            with_tensors(&Word::Step { micros: heads, dropout, seed, weight, total_steps, timed }, tensors.iter())
        }
        Command::Hooks(step) => plain(&Word::Hooks(*step)),
        Command::Collect(state) => plain(&Word::Collect(*state)),
        Command::Restore(state, step) => {
            let own = state.iter().filter(|(name, _)| parameter_of(name).is_none_or(&holds));
            let names = own.clone().map(|(name, _)| name.clone()).collect();
            with_tensors(&Word::Restore(names, *step), own.map(|(_, tensor)| tensor))
        }
        Command::CheckFinite => plain(&Word::CheckFinite),
    }
}

/// The parameter that a tensor of the optimizer's state belongs to; `None`: to all.
pub(super) fn parameter_of(state: &str) -> Option<&str> {
    state.split_once('/').map(|(_, parameter)| parameter).filter(|parameter| !parameter.is_empty())
}

pub(super) fn of_answer(answer: &Answer) -> Result<Vec<u8>> {
    match answer {
        Answer::Ready => plain(&Word::Ready),
        Answer::Stepped(report) => plain(&Word::Stepped(report.clone())),
        Answer::Tensors(all) => with_tensors(&Word::Tensors(all.keys().cloned().collect()), all.values()),
        Answer::Stopped(stop) => plain(&match stop {
            Stop::Fault(what) => Word::Fault(what.clone()),
            Stop::Error(Error::NonFinite { step, layer, tensor, count, index }) => Word::NonFinite {
                step: *step,
                layer: layer.clone(),
                tensor: tensor.clone(),
                count: *count,
                index: *index,
            },
            Stop::Error(Error::OutOfMemory { device, requested, live, cap }) => {
                Word::OutOfMemory { device: device.clone(), requested: *requested, live: *live, cap: *cap }
            }
            Stop::Error(e) => Word::Fault(format!("error[{}]: {e}", e.code())),
            Stop::Late(what) => Word::Late(what.clone()),
            Stop::Gone(other) => Word::Gone(*other),
            Stop::Cancelled | Stop::Vanish => Word::Vanished,
        }),
    }
}

/// The answer that a worker's word is; `None` for what is none.
pub(super) fn answer_of(word: Word, tensors: Vec<Loose>) -> Option<Answer> {
    Some(match word {
        Word::Ready => Answer::Ready,
        Word::Stepped(report) => Answer::Stepped(report),
        Word::Tensors(names) => Answer::Tensors(names.into_iter().zip(tensors).collect()),
        Word::Fault(what) => Answer::Stopped(Stop::Fault(what)),
        Word::NonFinite { step, layer, tensor, count, index } => {
            Answer::Stopped(Stop::Error(Error::NonFinite { step, layer, tensor, count, index }))
        }
        Word::OutOfMemory { device, requested, live, cap } => {
            Answer::Stopped(Stop::Error(Error::OutOfMemory { device, requested, live, cap }))
        }
        Word::Late(what) => Answer::Stopped(Stop::Late(what)),
        Word::Gone(other) => Answer::Stopped(Stop::Gone(other)),
        Word::Vanished => Answer::Stopped(Stop::Vanish),
        _ => return None,
    })
}

/// The micro-batches that `heads` and `tensors` are, on `device`. What the worker does not read is one zero there.
pub(super) fn micros_of(heads: &[MicroHead], tensors: &[Loose], device: &Arc<dyn Device>) -> Result<Vec<Micro>> {
    let unread = Tensor::zeros(device, Meta::new(&[1], DType::U32)?)?;
    let mut rest = tensors.iter();
    let mut micros = Vec::new();
    for head in heads {
        let mut own = Vec::new();
        for present in &head.present {
            let loose = if *present { rest.next() } else { None };
            own.push(loose.map(|(meta, bytes)| Tensor::from_bytes(device, *meta, bytes)).transpose()?);
        }
        let [tokens, positions, block_positions, context, lengths, targets, weights, teacher @ .., _, _] =
            own.as_slice()
        else {
            return Err(unsaid("a micro-batch without its tensors".into()));
        };
        let needed = |tensor: &Option<Tensor>| tensor.clone().unwrap_or_else(|| unread.clone());
        let teacher = match teacher {
            [
                Some(hidden),
                Some(hidden_weights),
                Some(soft_weights),
                Some(hard_targets),
                Some(hard_weights),
                top @ ..,
            ] => {
                let top = match top {
                    [Some(slots), Some(values)] => Some(Top { slots: slots.clone(), values: values.clone() }),
                    _ => None,
                };
                Some(Teacher {
                    hidden: hidden.clone(),
                    hidden_weights: hidden_weights.clone(),
                    soft_weights: soft_weights.clone(),
                    hard_targets: hard_targets.clone(),
                    hard_weights: hard_weights.clone(),
                    top,
                })
            }
            _ => None,
        };
        micros.push(Micro {
            batch: Batch {
                tokens: needed(tokens),
                positions: needed(positions),
                block_positions: block_positions.clone(),
                context: context.clone(),
                lengths: lengths.clone(),
                source: None,
            },
            targets: needed(targets),
            weights: needed(weights),
            weight: head.weight,
            gold: head.gold,
            tokens: head.tokens,
            teacher,
        });
    }
    Ok(micros)
}
