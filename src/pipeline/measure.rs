//! Takes a profile: every piece of a model run by itself on the device where a stage would run it.

use std::collections::BTreeMap;
use std::ops::Range;
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
use crate::dispatch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::pieces;
use crate::nn::{Head, Model};
use crate::ops::unary::Cast;
use crate::rng::Stream;
use crate::shape::Meta;
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

/// Profiles `model` on `device` for micro-batches like `micro`, which lies there, under the hooks of its training: a teacher's
/// loss costs at the head what gold labels do or more, fake quantization costs in every block. Meanwhile each of the
/// `neighbours` does work like a stage's, without hooks, because stages that share memory and clock slow each other. Nobody
/// holds more of the model than its share of the pieces, so what fits in stages can be measured.
///
/// # Errors
/// Those of the ops and hooks.
pub fn profile(
    model: &Model,
    device: &Arc<dyn Device>,
    micro: &Micro,
    settings: Settings,
    methods: &Make,
    neighbours: &[Arc<dyn Device>],
) -> Result<Profile> {
    let count = pieces::pieces(&model.config);
    let shares = shares(model, 1 + neighbours.len());
    let mut taken = Taken { wholes: vec![Vec::new(); count], splits: vec![Vec::new(); count], update: 0.0 };
    let finished = Finished::default();
    std::thread::scope(|scope| {
        // Whatever ends the measurement ends them too.
        let _end = finished.at_the_end();
        let work = |device: &Arc<dyn Device>, share: &Range<usize>| {
            let mut neighbour = Subject::new(model, device, share.clone(), settings)?;
            let micro = Reads::ALL.bring(micro, device)?;
            let inputs = neighbour.stand_in(&micro)?;
            while !finished.is_set() {
                neighbour.round(&micro, &inputs)?;
            }
            Ok(())
        };
        let others = neighbours.iter().zip(shares.iter().cycle().skip(1));
        let busy: Vec<_> = others.map(|(device, share)| scope.spawn(move || work(device, share))).collect();
        let mut inputs = Vec::new();
        let measured = shares.iter().try_for_each(|share| {
            let mut subject = Subject::new(model, device, share.clone(), settings)?;
            subject.part.methods = methods(&subject.part.model)?;
            inputs = subject.measure(micro, &inputs, &mut taken)?;
            Ok(())
        });
        finished.set();
        let panicked =
            |_| Error::NotAvailable { device: device.info().id.clone(), reason: "a neighbour panicked".into() };
        let ended = busy.into_iter().map(|thread| thread.join().map_err(panicked).and_then(|ended| ended));
        ended.fold(measured, Result::and)
    })?;
    let bytes: Vec<f64> = (0..count)
        .map(|p| {
            let names = cut::tensors_of(model, &(p..p + 1));
            names.iter().filter_map(|n| model.tensors.get(n)).map(|t| t.meta().bytes() as f64).sum()
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
                let two = cost_of(&taken.splits[p]);
                let mut one = cost_of(&taken.wholes[p]);
                // Shares of what was measured in one go.
                let share = two.backward_input / (two.backward_input + two.backward_weight).max(f64::MIN_POSITIVE);
                (one.backward_input, one.backward_weight) =
                    (one.backward_input * share, one.backward_input * (1.0 - share));
                let name = pieces::piece_name(&model.config, p);
                PieceProfile { name, cost: one, split: Some(two), parameter_bytes: bytes[p] }
            })
            .collect(),
        link: link(device)?,
        update_per_byte: taken.update / bytes.iter().sum::<f64>().max(1.0),
    })
}

/// Pieces that are measured together: those of an even cut over so many workers. A head that is tied to the embedding is
/// not taken from it.
fn shares(model: &Model, workers: usize) -> Vec<Range<usize>> {
    let pieces = pieces::pieces(&model.config);
    let tied = matches!(model.config.head, Head::Language { tied: true });
    cut::even(pieces, if tied { 1 } else { workers.clamp(1, pieces) })
}

/// Tells the neighbours that the measurement is over, also where it ends by a panic.
#[derive(Default)]
struct Finished(AtomicBool);

impl Finished {
    fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn at_the_end(&self) -> impl Drop {
        struct End<'a>(&'a Finished);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.set();
            }
        }
        End(self)
    }
}

/// What was measured so far, by piece; the seconds of an update of all.
struct Taken {
    wholes: Vec<Vec<Sample>>,
    splits: Vec<Vec<Sample>>,
    update: f64,
}

/// What is measured, or works beside it: some pieces in a row.
struct Subject {
    part: Part,
    pieces: Range<usize>,
    optimizer: Optimizer,
    settings: Settings,
}

/// Samples of pieces with backward in one go, in two parts, and the seconds of an update.
type Round = (Vec<Sample>, Vec<Sample>, f64);

impl Subject {
    fn new(model: &Model, device: &Arc<dyn Device>, pieces: Range<usize>, settings: Settings) -> Result<Self> {
        let chunks: BTreeMap<u32, _> = pieces.clone().map(|p| (p as u32, p..p + 1)).collect();
        let mut own = Part::model_of(model, device, &chunks)?;
        let mut optimizer = Optimizer::new(&mut own, settings, |_| true)?;
        // Once: gradients of all rounds are added up, as those of a step's micro-batches are.
        optimizer.begin(1.0, 1)?;
        Ok(Self { part: Part::new(own, chunks, &optimizer)?, pieces, optimizer, settings })
    }

    /// Takes all rounds and returns what the next piece takes in.
    fn measure(&mut self, micro: &Micro, inputs: &[Tensor], taken: &mut Taken) -> Result<Vec<Tensor>> {
        let mut updates = Vec::new();
        let mut outputs = Vec::new();
        for round in 0..=ROUNDS {
            let ((whole, split, update), left) = self.round(micro, inputs)?;
            outputs = left;
            if round == 0 {
                continue;
            }
            for (piece, (whole, split)) in self.pieces.clone().zip(whole.into_iter().zip(split)) {
                taken.wholes[piece].push(whole);
                taken.splits[piece].push(split);
            }
            updates.push(update);
        }
        taken.update += mean(updates);
        Ok(outputs)
    }

    /// Every piece with backward in one go, then in two parts, in turns so that what disturbs the machine disturbs both; and
    /// the seconds of an update. Also what goes on to the next piece.
    fn round(&mut self, micro: &Micro, inputs: &[Tensor]) -> Result<(Round, Vec<Tensor>)> {
        let device = self.part.model.device().clone();
        let compute = self.settings.precision.compute();
        let whole = Training { compute, dropout: 0.0, seed: 0, recompute: false, split: false };
        let (wholes, outputs) = self.run(micro, inputs, whole)?;
        let (splits, _) = self.run(micro, inputs, Training { split: true, ..whole })?;
        let zero = Tensor::from_slice(&device, &[1], &[0.0f32])?;
        let update = device.elapsed(&mut || self.optimizer.update(&zero))?;
        Ok(((wholes, splits, update), outputs))
    }

    /// All pieces forward, then backward, each by itself; adding its gradients to the step's is part of backward.
    fn run(&mut self, micro: &Micro, inputs: &[Tensor], training: Training) -> Result<(Vec<Sample>, Vec<Tensor>)> {
        let device = self.part.model.device().clone();
        let (part, optimizer) = (&mut self.part, &mut self.optimizer);
        let mut samples = vec![Sample::default(); self.pieces.len()];
        let mut states = inputs.to_vec();
        let head = pieces::pieces(&part.model.config) - 1;
        for (piece, sample) in self.pieces.clone().zip(&mut samples) {
            let inputs = std::mem::take(&mut states);
            let before = device.stats().bytes_live;
            let mut outputs = Vec::new();
            sample.forward = device.elapsed(&mut || {
                outputs = part.forward((piece as u32, 0), micro, inputs.clone(), training)?;
                Ok(())
            })?;
            sample.held = device.stats().bytes_live.saturating_sub(before) as f64;
            if piece < head {
                sample.output = outputs.iter().map(|t| t.meta().bytes() as f64).sum();
                states = outputs;
            }
        }
        // Gradients of the last piece's outputs: the loss has none, else any numbers of a usual size will do.
        let mut flowed = states.iter().map(numbers_like).collect::<Result<Vec<_>>>()?;
        for (piece, sample) in self.pieces.clone().zip(&mut samples).rev() {
            let at = (piece as u32, 0);
            let grads = std::mem::take(&mut flowed);
            sample.backward_input = device.elapsed(&mut || {
                if training.split {
                    flowed = part.backward_input(at, micro, grads.clone(), training)?;
                    return Ok(());
                }
                let (inputs, own) = part.backward(at, micro, grads.clone(), training)?;
                flowed = inputs;
                optimizer.accumulate(&own.leaves, &own.grads)
            })?;
        }
        if training.split {
            // After all inputs' gradients, as in a schedule: what they read has left the caches by then.
            for (piece, sample) in self.pieces.clone().zip(&mut samples).rev() {
                sample.backward_weight = device.elapsed(&mut || {
                    let own = part.backward_weight((piece as u32, 0))?;
                    optimizer.accumulate(&own.leaves, &own.grads)
                })?;
            }
        }
        Ok((samples, states))
    }

    /// In place of what the pieces before these would send.
    fn stand_in(&self, micro: &Micro) -> Result<Vec<Tensor>> {
        if self.pieces.start == 0 {
            return Ok(Vec::new());
        }
        let dims = micro.batch.tokens.dims();
        let width = self.part.model.config.width;
        let dtype = self.settings.precision.compute().unwrap_or(DType::F32);
        let like = Tensor::zeros(self.part.model.device(), Meta::new(&[dims, &[width]].concat(), dtype)?)?;
        let (count, _) = self.part.crossings(self.pieces.start as u32)?;
        (0..count).map(|_| numbers_like(&like)).collect()
    }
}

/// Normal numbers in the shape and type of a tensor: zeros may be faster than numbers.
fn numbers_like(tensor: &Tensor) -> Result<Tensor> {
    let mut stream = Stream::new(0, 0);
    let values: Vec<f32> = (0..tensor.meta().count()).map(|_| stream.normal() as f32).collect();
    let numbers = Tensor::from_slice(tensor.device(), tensor.dims(), &values)?;
    if tensor.dtype() == DType::F32 {
        Ok(numbers)
    } else {
        dispatch::run_one(&Cast { to: tensor.dtype() }, &[&numbers])
    }
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
