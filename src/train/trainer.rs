//! The training loop: micro-batches, loss, gradients, update; logged, resumable to the bit, stoppable.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use indicatif::{ProgressBar, ProgressStyle};

use super::events::EventWriter;
use super::lifecycle::{Method, Micro};
use super::metrics_log::{MetricEvent, MetricsLog};
use super::optimizer::{Optimizer, Outcome, Settings};
use super::stepper::{OneDevice, StepSettings, Stepper};
use super::store;
use crate::dispatch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{Head, Model, Pass};
use crate::ops::binary::{ADD, MUL};
use crate::ops::matmul::Matmul;
use crate::ops::random::Dropout;
use crate::ops::reduce::{Axis, Reduce, ReduceFunction};
use crate::ops::softmax::{CrossEntropy, LinearCrossEntropy};
use crate::tape::Var;
use crate::tensor::Tensor;

/// Set by Ctrl-C: the loop saves a checkpoint and returns `Error::Interrupted`.
pub static STOP: AtomicBool = AtomicBool::new(false);

/// For work between trainings, which starts anew where it was interrupted.
///
/// # Errors
/// `Interrupted` once somebody wants to stop.
pub fn go_on() -> Result<()> {
    if STOP.load(Relaxed) { Err(Error::Interrupted { path: "its finished stages".into() }) } else { Ok(()) }
}

/// Rows of hidden states per tile of the fused linear losses.
pub const LOSS_CHUNK: usize = 256;

/// Largest logits `[N, V]` that a loss by plain products holds, and once more as their gradient; above it the loss is fused
/// where [`Pass::by_products`] would not have it so. What WebGPU binds without being asked for more.
const LOGITS_BYTES: usize = 128 << 20;

/// Where the micro-batches of each step come from: a pure function of the step, so that resuming needs only its number.
pub trait Source {
    fn micro_batches(&self, step: u64) -> Result<Vec<Micro>>;
}

/// One stage of training.
pub struct Job<'a> {
    pub stage: &'a str,
    pub steps: u64,
    pub settings: Settings,
    pub dropout: f32,
    pub seed: u64,
    pub source: &'a dyn Source,
    /// Validation loss in nats per token, measured every `validate_every` steps and at the end.
    pub validate: &'a dyn Fn(&Model, &[Box<dyn Method>]) -> Result<f64>,
    pub validate_every: u64,
    /// 0: only when stopped.
    pub checkpoint_every: u64,
    /// Shapes of micro-batches whose step is captured at most (see `graphs`).
    pub graphs: usize,
    pub keep_checkpoints: usize,
    /// Holds metrics.jsonl, tb/ and checkpoints/ of this stage.
    pub folder: &'a Path,
    pub progress: bool,
    /// Makes what takes the steps; `None`: the model's own device does.
    pub stepper: Option<&'a dyn Fn(&mut Model) -> Result<Box<dyn Stepper>>>,
}

/// What a stage of training did.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    pub steps: u64,
    /// Steps of this session that were replayed.
    pub replayed: u64,
    /// Of all sessions that the stage took.
    pub seconds: f64,
    /// Of the sessions before this one, as their last checkpoint has it.
    pub earlier_seconds: f64,
    /// Of this session.
    pub tokens: u64,
    pub train_loss: f64,
    pub validation_loss: f64,
    pub curve: Vec<(u64, Option<f64>, Option<f64>)>,
}

/// Sums f32 rows to one value.
pub fn sum(pass: &mut Pass, rows: &Var) -> Result<Var> {
    pass.tape.first(Reduce { function: ReduceFunction::Sum, axis: Axis::All }, &[rows])
}

/// sum over rows of weight * cross-entropy. A language head is fused with the loss, so that no `[N, V]` buffer is held,
/// except where products are faster by themselves; a tagging head has few labels and a bias, so its logits are computed.
pub fn weighted_cross_entropy(pass: &mut Pass, hidden: &Var, targets: &Tensor, weights: &Tensor) -> Result<Var> {
    let shape = hidden.tensor.shape();
    let rows = hidden.reshape(&[shape.rows(), shape.last()])?;
    let targets = Var::constant(targets.clone());
    let losses = if matches!(pass.model.config.head, Head::Language { .. }) {
        let head = pass.head_weight()?;
        let logits = rows.tensor.shape().with_last(head.dims()[0])?;
        if pass.by_products(&rows) && logits.count() * DType::F32.size() <= LOGITS_BYTES {
            let logits = pass.tape.first(Matmul::linear(), &[&rows, &head])?;
            pass.tape.first(CrossEntropy { smoothing: 0.0 }, &[&logits, &targets])?
        } else {
            let op = LinearCrossEntropy { smoothing: 0.0, chunk: LOSS_CHUNK };
            pass.tape.first(op, &[&rows, &head, &targets])?
        }
    } else {
        let logits = pass.logits(&rows)?;
        pass.tape.first(CrossEntropy { smoothing: 0.0 }, &[&logits, &targets])?
    };
    let weighted = pass.tape.first(MUL, &[&losses, &Var::constant(weights.clone())])?;
    sum(pass, &weighted)
}

/// Loss of one micro-batch with the terms of all methods: a scalar sum, to be divided by the step's weight.
fn loss(pass: &mut Pass, micro: &Micro, methods: &[Box<dyn Method>]) -> Result<Var> {
    let hidden = pass.hidden(&micro.batch)?;
    loss_of(pass, &hidden, micro, methods)
}

/// As `loss`, from final hidden states.
pub fn loss_of(pass: &mut Pass, hidden: &Var, micro: &Micro, methods: &[Box<dyn Method>]) -> Result<Var> {
    let mut total = None;
    if micro.gold {
        total = Some(weighted_cross_entropy(pass, hidden, &micro.targets, &micro.weights)?);
    }
    for method in methods {
        if let Some(term) = method.on_loss(pass, hidden, micro)? {
            total = Some(match total {
                None => term,
                Some(sum) => pass.tape.first(ADD, &[&sum, &term])?,
            });
        }
    }
    total.ok_or(Error::Shape { op: "loss", rule: "at least one loss term", got: "none".into() })
}

/// What the gradients of a step are divided by.
pub(super) fn weight(micros: &[Micro]) -> f64 {
    micros.iter().map(|m| m.weight).sum()
}

/// One step: gradients of all micro-batches, one update. Returns (loss per unit of weight, gradient norm).
pub fn step(
    model: &Model,
    optimizer: &mut Optimizer,
    micros: &[Micro],
    methods: &[Box<dyn Method>],
    (dropout, seed, steps): (f32, u64, u64),
) -> Result<(f64, f64)> {
    optimizer.begin(weight(micros), steps)?;
    queue(model, optimizer, micros, methods, (dropout, seed))?;
    match optimizer.outcome()? {
        Outcome { failed: Some(step), .. } => Err(optimizer.find_non_finite(step)?),
        Outcome { loss, norm, .. } => Ok((loss, norm)),
    }
}

/// Queues a step that has begun. Nothing here waits for the device or gives it a number that is another in the next step.
pub(super) fn queue(
    model: &Model,
    optimizer: &mut Optimizer,
    micros: &[Micro],
    methods: &[Box<dyn Method>],
    (dropout, seed): (f32, u64),
) -> Result<()> {
    let losses = gradients(model, optimizer, micros, methods, (dropout, seed))?;
    optimizer.update(&losses)
}

/// Each micro-batch of a step draws its own dropout: 1,024 sites are more than a model has sublayers.
pub fn dropout(probability: f32, seed: u64, micro: u32) -> Dropout {
    Dropout { probability, seed, site: 1024 * micro }
}

/// Accumulates the gradients of all micro-batches; gives the sum of their losses, f32 `[1]`.
pub(super) fn gradients(
    model: &Model,
    optimizer: &mut Optimizer,
    micros: &[Micro],
    methods: &[Box<dyn Method>],
    (probability, seed): (f32, u64),
) -> Result<Tensor> {
    let mut losses: Option<Tensor> = None;
    for (index, micro) in micros.iter().enumerate() {
        let dropout = dropout(probability, seed, index as u32);
        let hooks = methods.iter().filter_map(|m| m.on_output());
        let compute = optimizer.precision().compute();
        let taps = methods.iter().flat_map(|m| m.taps());
        let pass = Pass::training(model).computing(compute).hooks(hooks).tapping(taps);
        let mut pass = pass.dropout(dropout, optimizer.counter());
        let total = loss(&mut pass, micro, methods)?;
        let one = total.tensor.reshape(&[1])?;
        losses = Some(match losses {
            None => one,
            Some(sum) => dispatch::run_one(&ADD, &[&sum, &one])?,
        });
        let seed = optimizer.loss_scale(total.dims())?;
        let (tape, leaves) = pass.into_leaves();
        let grads = tape.backward(&[(&total, &seed)])?;
        optimizer.accumulate(&leaves, &grads)?;
    }
    losses.ok_or(Error::Shape { op: "step", rule: "at least one micro-batch", got: "none".into() })
}

/// Trains `model` as `job` says, resuming from the newest checkpoint of its folder.
pub fn train(model: &mut Model, job: &Job, methods: &mut [Box<dyn Method>]) -> Result<Summary> {
    let checkpoints = job.folder.join("checkpoints");
    std::fs::create_dir_all(&checkpoints).map_err(|e| Error::io(&checkpoints, e))?;
    let resumed = restore(model, &checkpoints, job.steps)?;
    let mut stepper: Box<dyn Stepper> = match job.stepper {
        Some(make) => make(model)?,
        None => Box::new(OneDevice::new(model, job.settings, job.graphs)?),
    };
    let settings = StepSettings { dropout: job.dropout, seed: job.seed, steps: job.steps };
    let (done, earlier_seconds) = match resumed {
        Some(Resumed { step, seconds, state }) => {
            stepper.restore(&state, step)?;
            methods.iter_mut().try_for_each(|method| method.restore(&state, step))?;
            (step, seconds)
        }
        None => (0, 0.0),
    };
    stepper.hooks(done, model, methods)?;
    let (mut log, logged) = Log::open(job, done)?;
    let curve = logged_curve(&logged);
    let mut summary = Summary { steps: done, earlier_seconds, curve, ..Summary::default() };
    let mut ahead: Option<Vec<Micro>> = None;
    let started = Instant::now();
    for step_index in done..job.steps {
        let micros = match ahead.take() {
            Some(micros) => micros,
            None => job.source.micro_batches(step_index)?,
        };
        if stepper.looks_ahead() && step_index + 1 < job.steps {
            ahead = Some(job.source.micro_batches(step_index + 1)?);
        }
        let rate = stepper.learning_rate(settings);
        summary.tokens += micros.iter().map(|m| m.tokens as u64).sum::<u64>();
        stepper.step(model, micros, ahead.as_deref().unwrap_or_default(), methods, settings)?;
        let now = step_index + 1;
        stepper.hooks(now, model, methods)?;
        (summary.steps, summary.replayed) = (now, stepper.replayed());
        log.bar.set_position(now);
        let stop = STOP.load(Relaxed);
        let due = |every: u64| every > 0 && now % every == 0;
        let validates = due(job.validate_every) || now == job.steps;
        // A validated step is logged too: the curve of a resumed training is read from the log.
        let logs = validates || now % log.every == 0;
        // Between these steps the device works while the host queues what comes next.
        if !logs && !stop && !due(job.checkpoint_every) {
            continue;
        }
        let Outcome { loss, norm, failed } = stepper.outcome()?;
        if let Some(failed) = failed {
            let micros = job.source.micro_batches(failed - 1)?;
            return Err(stepper.failure(model, (failed, micros), methods, settings)?);
        }
        summary.train_loss = loss;
        let speed = summary.tokens as f64 / started.elapsed().as_secs_f64().max(1e-9);
        log.step(now, loss, norm, rate, speed, logs)?;
        if validates || stop || due(job.checkpoint_every) {
            stepper.bring_home(model)?;
        }
        let validated = validates.then(|| (job.validate)(model, methods)).transpose()?;
        if let Some(loss) = validated {
            // NaN alone is a corpus without validation text; infinity is a model that went wrong.
            if loss.is_infinite() {
                return Err(stepper.find_non_finite(now)?);
            }
            summary.validation_loss = loss;
            log.write(now, "validation", "loss", loss, "nats/token")?;
        }
        if logs {
            summary.curve.push((now, Some(loss), validated));
        }
        if now < job.steps && (stop || due(job.checkpoint_every)) {
            let seconds = earlier_seconds + started.elapsed().as_secs_f64();
            save(model, (stepper.as_mut(), methods), &checkpoints, (now, seconds), job)?;
        }
        if stop && now < job.steps {
            log.bar.abandon_with_message("stopped; saved");
            return Err(Error::Interrupted { path: checkpoints });
        }
    }
    log.bar.finish_and_clear();
    if summary.replayed > 0 {
        log.write(summary.steps, "train", "replayed", summary.replayed as f64, "steps")?;
    }
    stepper.check_finite()?;
    for method in methods.iter_mut() {
        method.on_finish(model)?;
    }
    summary.seconds = earlier_seconds + started.elapsed().as_secs_f64();
    Ok(summary)
}

/// The loss curve up to where a session starts, from what the earlier ones logged.
fn logged_curve(events: &[MetricEvent]) -> Vec<(u64, Option<f64>, Option<f64>)> {
    let mut points: BTreeMap<u64, (Option<f64>, Option<f64>)> = BTreeMap::new();
    for event in events.iter().filter(|event| event.name == "loss") {
        let point = points.entry(event.step).or_default();
        match event.split.as_str() {
            "train" => point.0 = Some(event.value),
            "validation" => point.1 = Some(event.value),
            _ => {}
        }
    }
    points.into_iter().map(|(step, (train, validation))| (step, train, validation)).collect()
}

const OPTIMIZER: &str = "optimizer.safetensors";

/// Key of the seconds trained so far in a checkpoint's summary.
const SECONDS: &str = "seconds";

fn save(
    model: &Model,
    (stepper, methods): (&mut dyn Stepper, &[Box<dyn Method>]),
    checkpoints: &Path,
    (step, seconds): (u64, f64),
    job: &Job,
) -> Result<()> {
    stepper.check_finite()?;
    let mut files = store::model_files(model)?;
    let mut state = stepper.state()?;
    methods.iter().for_each(|method| state.extend(method.state()));
    files.push((OPTIMIZER, store::encode(&state)?));
    let summary = [
        ("stage", job.stage.to_string()),
        (store::STEP, step.to_string()),
        (SECONDS, seconds.to_string()),
        ("seed", job.seed.to_string()),
        ("device", model.device().info().name.clone()),
    ];
    let summary: BTreeMap<String, String> = summary.map(|(k, v)| (k.to_string(), v)).into();
    let path = checkpoints.join(format!("step-{step}"));
    // What has this name was passed over when the training started: it is damaged or nothing of ours.
    store::discard(&path)?;
    store::save(&path, &files, summary)?;
    store::retain(checkpoints, step, job.keep_checkpoints.max(1))
}

/// Where an earlier session stopped.
struct Resumed {
    step: u64,
    seconds: f64,
    /// The optimizer's and the methods'.
    state: BTreeMap<String, Tensor>,
}

/// Puts the newest checkpoint's parameters into `model`.
fn restore(model: &mut Model, checkpoints: &Path, steps: u64) -> Result<Option<Resumed>> {
    let Some((step, path)) = store::latest(checkpoints)? else {
        return Ok(None);
    };
    if step > steps {
        return Err(Error::file(&path, store::STEP, format!("{step} is beyond the {steps} steps of this training")));
    }
    let (manifest, files) = store::load(&path)?;
    let saved = store::model_from(&path, &files, model.device())?;
    if saved.config != model.config {
        return Err(Error::file(&path, store::CONFIG, "another model than this stage trains; use --overwrite"));
    }
    let state = files.get(OPTIMIZER).ok_or_else(|| Error::file(&path, OPTIMIZER, "missing from the manifest"))?;
    let state = store::decode(&path.join(OPTIMIZER), state, model.device())?;
    model.tensors = saved.tensors;
    let seconds = manifest.summary.get(SECONDS).and_then(|s| s.parse().ok());
    let seconds = seconds.filter(|s: &f64| s.is_finite() && *s >= 0.0).unwrap_or(0.0);
    Ok(Some(Resumed { step, seconds, state }))
}

/// Seconds since the Unix epoch.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// Metrics file, TensorBoard events and the bar a person watches.
struct Log {
    metrics: MetricsLog,
    events: EventWriter,
    bar: ProgressBar,
    every: u64,
}

impl Log {
    /// Returns also what earlier sessions logged up to step `done`.
    fn open(job: &Job, done: u64) -> Result<(Self, Vec<MetricEvent>)> {
        let (metrics, logged) = MetricsLog::open_after(job.folder.join("metrics.jsonl"), done)?;
        let events = job.folder.join("tb");
        std::fs::create_dir_all(&events).map_err(|e| Error::io(&events, e))?;
        let events = EventWriter::create(events, job.stage, now())?;
        let bar = if job.progress && crate::console::moves_cursor() {
            ProgressBar::new(job.steps)
        } else {
            ProgressBar::hidden()
        };
        let template = "{prefix:<12} [{bar:32}] {pos}/{len} {msg} ETA {eta}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(job.stage.to_string());
        bar.set_position(done);
        bar.reset_eta();
        Ok((Self { metrics, events, bar, every: (job.steps / 100).max(1) }, logged))
    }

    fn write(&mut self, step: u64, split: &str, name: &str, value: f64, unit: &str) -> Result<()> {
        let wall_time = now();
        self.events.scalar(&format!("{split}/{name}"), step, value as f32, wall_time)?;
        let event = MetricEvent { step, split: split.into(), name: name.into(), value, unit: unit.into(), wall_time };
        self.metrics.append(&event)
    }

    fn step(&mut self, step: u64, loss: f64, norm: f64, rate: f64, speed: f64, kept: bool) -> Result<()> {
        self.bar.set_message(format!("loss {loss:.3}  {speed:.0} tokens/s "));
        if kept {
            self.write(step, "train", "loss", loss, "nats/token")?;
            self.write(step, "train", "gradient_norm", norm, "")?;
            self.write(step, "train", "learning_rate", rate, "")?;
            self.write(step, "train", "speed", speed, "tokens/s")?;
        }
        Ok(())
    }
}
