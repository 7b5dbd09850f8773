//! Takes a profile: every piece of a model run by itself on the device where a stage would run it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::cut;
use super::message::{self, Purpose, Tag};
use super::part::{Part, Training};
use super::profile::{PieceProfile, Profile};
use super::reads::Reads;
use super::simulate::{ChunkCost, Link};
use super::transport::{Channels, Transport};
use crate::device::Device;
use crate::error::Result;
use crate::nn::Model;
use crate::tensor::Tensor;
use crate::train::lifecycle::{Method, Micro};
use crate::train::optimizer::{Optimizer, Settings};

/// Rounds whose mean is taken; one more goes before to warm up.
const ROUNDS: usize = 9;

/// Seconds and bytes of one piece in one round.
#[derive(Clone, Copy, Default)]
struct Sample {
    forward: f64,
    backward_input: f64,
    backward_weight: f64,
    held: f64,
    output: f64,
}

/// Makes a training's hooks from the model.
type Make<'a> = dyn Fn(&Model) -> Result<Vec<Box<dyn Method>>> + 'a;

/// Profiles `model` for micro-batches like `micro`, which lies on `device` as `model` does, under the hooks of its training:
/// a teacher's loss costs at the head what gold labels do or more, fake quantization costs in every block. Meanwhile each of
/// the `neighbours` does the same work without hooks, because stages that share memory and clock slow each other.
///
/// # Errors
/// Those of the ops and hooks.
pub fn profile(
    model: &Model,
    micro: &Micro,
    settings: Settings,
    methods: &Make,
    neighbours: &[Arc<dyn Device>],
) -> Result<Profile> {
    let device = model.device().clone();
    let count = cut::pieces(&model.config);
    let mut subject = Subject::new(model, settings)?;
    subject.part.methods = methods(&subject.part.model)?;
    let (mut wholes, mut splits) = (vec![Vec::new(); count], vec![Vec::new(); count]);
    let mut updates = Vec::new();
    let finished = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let work = |device| {
            let mut neighbour = Subject::new(&model.to_device(device)?, settings)?;
            let micro = Reads::ALL.bring(micro, device)?;
            while !finished.load(Ordering::Relaxed) {
                neighbour.round(&micro)?;
            }
            Ok(())
        };
        let busy: Vec<_> = neighbours.iter().map(|device| scope.spawn(move || work(device))).collect();
        let measured = (0..=ROUNDS).try_for_each(|round| {
            let (whole, split, update) = subject.round(micro)?;
            if round > 0 {
                wholes.iter_mut().zip(whole).for_each(|(list, sample)| list.push(sample));
                splits.iter_mut().zip(split).for_each(|(list, sample)| list.push(sample));
                updates.push(update);
            }
            Ok(())
        });
        finished.store(true, Ordering::Relaxed);
        let ended: Vec<Result<()>> = busy.into_iter().filter_map(|thread| thread.join().ok()).collect();
        ended.into_iter().fold(measured, Result::and)
    })?;
    let part = &subject.part;
    let bytes: Vec<f64> = (0..count)
        .map(|p| {
            let names = cut::tensors_of(&part.model, &(p..p + 1));
            names.iter().filter_map(|n| part.model.tensors.get(n)).map(|t| t.meta().bytes() as f64).sum()
        })
        .collect();
    let dims = micro.batch.tokens.dims();
    Ok(Profile {
        model: format!(
            "{} blocks, width {}, {} parameters",
            model.config.blocks.len(),
            model.config.width,
            model.parameter_count()
        ),
        device: device.info().name.clone(),
        rows: dims[0],
        columns: dims.get(1).copied().unwrap_or(1),
        pieces: (0..count)
            .map(|p| {
                let two = cost_of(&splits[p]);
                let mut one = cost_of(&wholes[p]);
                // Shares of what was measured in one go.
                let share = two.backward_input / (two.backward_input + two.backward_weight).max(f64::MIN_POSITIVE);
                (one.backward_input, one.backward_weight) =
                    (one.backward_input * share, one.backward_input * (1.0 - share));
                let name = cut::piece_name(&model.config, p);
                PieceProfile { name, cost: one, split: Some(two), parameter_bytes: bytes[p] }
            })
            .collect(),
        link: link(&device)?,
        update_per_byte: mean(updates) / bytes.iter().sum::<f64>().max(1.0),
    })
}

/// What is measured, or works beside it.
struct Subject {
    part: Part,
    optimizer: Optimizer,
    settings: Settings,
}

impl Subject {
    fn new(model: &Model, settings: Settings) -> Result<Self> {
        let count = cut::pieces(&model.config);
        let chunks: BTreeMap<u32, _> = (0..count).map(|p| (p as u32, p..p + 1)).collect();
        let mut own = Part::model_of(model, model.device(), &chunks)?;
        let optimizer = Optimizer::new(&mut own, settings, |_| true)?;
        Ok(Self { part: Part::new(own, chunks, &optimizer)?, optimizer, settings })
    }

    /// Every piece with backward in one go, then in two parts, in turns so that what disturbs the machine disturbs both; and
    /// the seconds of an update.
    fn round(&mut self, micro: &Micro) -> Result<(Vec<Sample>, Vec<Sample>, f64)> {
        let device = self.part.model.device().clone();
        let compute = self.settings.precision.compute();
        let whole = Training { compute, dropout: 0.0, seed: 0, recompute: false, split: false };
        let wholes = run(&mut self.part, micro, whole)?;
        let splits = run(&mut self.part, micro, Training { split: true, ..whole })?;
        self.optimizer.begin(1.0, 1)?;
        let zero = Tensor::from_slice(&device, &[1], &[0.0f32])?;
        let update = device.elapsed(&mut || self.optimizer.update(&zero))?;
        Ok((wholes, splits, update))
    }
}

/// All pieces forward, then backward, each by itself.
fn run(part: &mut Part, micro: &Micro, training: Training) -> Result<Vec<Sample>> {
    let device = part.model.device().clone();
    let count = cut::pieces(&part.model.config);
    let mut samples = vec![Sample::default(); count];
    let mut states = Vec::new();
    for (piece, sample) in samples.iter_mut().enumerate() {
        let inputs = std::mem::take(&mut states);
        let before = device.stats().bytes_live;
        let mut outputs = Vec::new();
        sample.forward = device.elapsed(&mut || {
            outputs = part.forward((piece as u32, 0), micro, inputs.clone(), training)?;
            Ok(())
        })?;
        sample.held = device.stats().bytes_live.saturating_sub(before) as f64;
        if piece + 1 < count {
            sample.output = outputs.iter().map(|t| t.meta().bytes() as f64).sum();
            states = outputs;
        }
    }
    let mut flowed = Vec::new();
    for (piece, sample) in samples.iter_mut().enumerate().rev() {
        let at = (piece as u32, 0);
        let grads = std::mem::take(&mut flowed);
        sample.backward_input = device.elapsed(&mut || {
            flowed = if training.split {
                part.backward_input(at, micro, grads.clone(), training)?
            } else {
                part.backward(at, micro, grads.clone(), training)?.0
            };
            Ok(())
        })?;
    }
    if training.split {
        // After all inputs' gradients, as in a schedule: what they read has left the caches by then.
        for (piece, sample) in samples.iter_mut().enumerate().rev() {
            sample.backward_weight = device.elapsed(&mut || part.backward_weight((piece as u32, 0)).map(drop))?;
        }
    }
    Ok(samples)
}

/// Without the smallest and the largest: a step's time is a sum, whose parts are sometimes slow, so their mean counts.
fn mean(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let inner = if values.len() > 2 { &values[1..values.len() - 1] } else { &values[..] };
    inner.iter().sum::<f64>() / inner.len().max(1) as f64
}

fn cost_of(samples: &[Sample]) -> ChunkCost {
    let of = |part: fn(&Sample) -> f64| mean(samples.iter().map(part).collect());
    ChunkCost {
        forward: of(|s| s.forward),
        backward_input: of(|s| s.backward_input),
        backward_weight: of(|s| s.backward_weight),
        activation_bytes: of(|s| s.held),
        output_bytes: of(|s| s.output),
    }
}

/// Messages between two threads: what each side does per byte, and how long an empty one takes.
fn link(device: &Arc<dyn Device>) -> Result<Link> {
    const BYTES: usize = 1 << 20;
    let tensor = Tensor::from_slice(device, &[BYTES / 4], &vec![1.0f32; BYTES / 4])?;
    let tag = Tag { step: 0, purpose: Purpose::Forward, chunk: 0, micro: 0, part: 0 };
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let began = Instant::now();
        let frame = message::frame_of(0, tag, 0, &tensor)?;
        if let Ok(message) = message::decode(0, frame) {
            Tensor::from_bytes(device, message.meta, message.payload())?;
        }
        times.push(began.elapsed().as_secs_f64() / 2.0 / BYTES as f64);
    }
    let mut ends = Channels::between(2);
    let (Some(mut far), Some(mut near)) = (ends.pop(), ends.pop()) else {
        return Ok(Link::FREE);
    };
    let wait = Duration::from_secs(1);
    let echo = std::thread::spawn(move || {
        while let Ok(Some((from, frame))) = far.receive(wait) {
            if frame.is_empty() || far.send(from, frame).is_err() {
                return;
            }
        }
    });
    let mut trips = Vec::new();
    for _ in 0..64 {
        let began = Instant::now();
        if near.send(1, vec![0; 8]).is_err() || !matches!(near.receive(wait), Ok(Some(_))) {
            break;
        }
        trips.push(began.elapsed().as_secs_f64() / 2.0);
    }
    let _ = near.send(1, Vec::new());
    let _ = echo.join();
    Ok(Link { latency: mean(trips), bytes_per_second: 0.0, handling: mean(times) })
}
