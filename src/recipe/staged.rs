//! `[pipeline]` of a recipe: every training in stages, cut by what its pieces cost on this machine.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::hooks::Promises;
use super::run_folder::State;
use super::stages::Context;
use crate::atomic::write_atomic;
use crate::compress::distil::Distillation;
use crate::console;
use crate::device::{self, Device, Kind as DeviceKind};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::Model;
use crate::pipeline::executor::{Pipeline as Executor, Setup, StepReport, TeacherSetup};
use crate::pipeline::predict::predict;
use crate::pipeline::profile::Profile;
use crate::pipeline::reads::Reads;
use crate::pipeline::remote::Across;
use crate::pipeline::route::Route;
use crate::pipeline::train::Staged;
use crate::pipeline::{Kind, Schedule, Timeline, cut, measure, trace};
use crate::report::gantt;
use crate::shape::Meta;
use crate::tensor::Tensor;
use crate::train::graphs;
use crate::train::lifecycle::{Micro, Teacher};
use crate::train::optimizer::Settings;
use crate::train::stepper::{OneDevice, Stepper};

/// Number of stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "\"auto\" or a number of stages")]
pub enum Stages {
    Count(usize),
    Auto(Auto),
}

/// As many as pay, by simulation; 1 where one device is faster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Auto {
    Auto,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pipeline {
    #[serde(default = "auto")]
    pub stages: Stages,
    #[serde(default = "default_schedule")]
    pub schedule: Kind,
    /// Parts that each micro-batch of the recipe (`batch` sentences) is cut into.
    #[serde(default = "default_micro_batches")]
    pub micro_batches: usize,
    /// Workers of each stage; empty: one each.
    #[serde(default)]
    pub replicas: Vec<usize>,
    /// Devices of the workers, by their command-line names; empty: shares of the run's own device.
    #[serde(default)]
    pub devices: Vec<String>,
    /// Keep the inputs of stages only and run them again in backward.
    #[serde(default)]
    pub recompute: bool,
    /// Run the teacher in the student's stages, a step ahead, instead of computing its states beforehand and keeping them: for
    /// texts that are seen once. Needs a fixed number of stages.
    #[serde(default)]
    pub teacher: bool,
    /// Seconds without a sign of progress after which a stage counts as stalled: longer than the longest kernel.
    #[serde(default = "default_heartbeat")]
    pub heartbeat: f64,
}

fn auto() -> Stages {
    Stages::Auto(Auto::Auto)
}

fn default_schedule() -> Kind {
    Kind::OneForwardOneBackward
}

fn default_micro_batches() -> usize {
    8
}

fn default_heartbeat() -> f64 {
    10.0
}

/// Stages that a recipe may ask for.
const MAX_STAGES: usize = 256;
const MAX_MICRO_BATCHES: usize = 1024;

impl Pipeline {
    /// `layers`: blocks of the smallest model that is trained.
    pub(super) fn check(&self, layers: usize) -> Result<()> {
        let refuse = |key: &str, value: String, allowed: &str| {
            Err(Error::Recipe { key: format!("pipeline.{key}"), value, allowed: allowed.into() })
        };
        if let Stages::Count(n) = self.stages
            && !(1..=MAX_STAGES).contains(&n)
        {
            return refuse("stages", n.to_string(), "\"auto\" or 1 to 256");
        }
        if let Stages::Count(n) = self.stages
            && self.schedule.chunks(n) > layers + 2
        {
            let value =
                format!("{n} stages of schedule {}, which need {} pieces", self.schedule, self.schedule.chunks(n));
            let allowed = format!(
                "at most {} pieces: the smallest model's {layers} blocks, its embedding and its head",
                layers + 2
            );
            return Err(Error::Recipe { key: "pipeline.stages".into(), value, allowed });
        }
        if !(1..=MAX_MICRO_BATCHES).contains(&self.micro_batches) {
            return refuse("micro_batches", self.micro_batches.to_string(), "1 to 1024");
        }
        if !(self.heartbeat.is_finite() && (0.05..=86_400.0).contains(&self.heartbeat)) {
            return refuse("heartbeat", self.heartbeat.to_string(), "0.05 to 86400 seconds");
        }
        if self.teacher && !matches!(self.stages, Stages::Count(2..)) {
            return refuse("teacher", "true".into(), "true only with a fixed number of at least 2 stages");
        }
        let fixed = matches!(self.stages, Stages::Count(n) if n == self.replicas.len());
        if !self.replicas.is_empty() && (!fixed || self.replicas.iter().any(|r| !(1..=MAX_STAGES).contains(r))) {
            return refuse(
                "replicas",
                format!("{:?}", self.replicas),
                "one count of 1 to 256 for each of a fixed number of stages",
            );
        }
        Ok(())
    }

    fn workers(&self, stages: usize) -> Vec<usize> {
        if self.replicas.is_empty() { vec![1; stages] } else { self.replicas.clone() }
    }

    /// Names of a device for each of so many workers.
    fn devices(&self, home: &Arc<dyn Device>, workers: usize) -> Result<Vec<String>> {
        if !self.devices.is_empty() {
            let enough = matches!(self.stages, Stages::Auto(_)) && self.devices.len() > workers;
            if self.devices.len() != workers && !enough {
                let value = format!("{} devices for {workers} workers", self.devices.len());
                return Err(Error::Recipe {
                    key: "pipeline.devices".into(),
                    value,
                    allowed: "one for each worker".into(),
                });
            }
            return Ok(self.devices[..workers].to_vec());
        }
        let info = home.info();
        let name = |worker: usize| match info.kind {
            DeviceKind::Cpu => format!("cpu:{}", (info.threads / workers).max(1)),
            // As many GPUs as there are, in turns.
            DeviceKind::Cuda if info.id.starts_with("cuda:") => format!("cuda:{worker}"),
            _ => info.id.clone(),
        };
        Ok((0..workers).map(name).collect())
    }

    /// Opens a worker's device, or the run's own where the recipe names none and this one is missing.
    fn open(&self, home: &Arc<dyn Device>, name: &str) -> Result<Arc<dyn Device>> {
        if self.devices.is_empty() {
            return device::open(name).or_else(|_| device::open(&home.info().id));
        }
        device::open(name)
    }
}

/// What takes the steps of a training: a pipeline as the recipe asks for, or one device where that is faster.
/// `probe`: the micro-batches of a step.
pub fn stepper(
    context: &Context,
    model: &mut Model,
    settings: Settings,
    probe: &[Micro],
    state: &State,
    (distillation, teacher): (Option<Distillation>, Option<&Model>),
) -> Result<Box<dyn Stepper>> {
    let home = model.device().clone();
    let shapes = graphs::shapes(home.as_ref());
    let one_device =
        |model: &mut Model| -> Result<Box<dyn Stepper>> { Ok(Box::new(OneDevice::new(model, settings, shapes)?)) };
    let Some(pipeline) = &context.recipe.pipeline else {
        return one_device(model);
    };
    let ranks = context.ranks.filter(|post| post.ranks() > 1);
    let pieces = cut::pieces(&model.config);
    let wanted = match pipeline.stages {
        Stages::Count(n) => vec![n],
        Stages::Auto(Auto::Auto) => {
            let given = if pipeline.devices.is_empty() { home.info().threads } else { pipeline.devices.len() };
            let workers = ranks.map_or(given, |post| post.ranks());
            // One device as it is, then halves, quarters and so on of it.
            let some = std::iter::successors(Some(1), |n| Some(2 * n)).take_while(|n| *n < workers).chain([workers]);
            some.filter(|n| pipeline.schedule.chunks(*n) <= pieces).collect()
        }
    };
    if wanted.last().is_none_or(|n| *n == 1) && pipeline.replicas.is_empty() {
        return one_device(model);
    }
    let promises = Promises::new(state, distillation.as_ref());
    let sizes: Vec<f64> = probe.iter().map(|m| size(m) / size(&probe[0])).collect();
    let mut best: Option<(f64, Route, Profile)> = None;
    for stages in wanted {
        let chunks = pipeline.schedule.chunks(stages);
        if chunks > pieces {
            let value = format!("{stages} stages of schedule {} need {chunks} pieces", pipeline.schedule);
            let allowed = format!("at most the model's {pieces} pieces: embedding, blocks and head");
            return Err(Error::Recipe { key: "pipeline.stages".into(), value, allowed });
        }
        let workers = pipeline.workers(stages);
        let names = pipeline.devices(&home, workers.iter().sum())?;
        let path = context.folder.join(format!("pipeline-profile-{stages}.json"));
        let profile = match Profile::read(&path) {
            // A resumed training is cut as it was before.
            Ok(profile) if profile.pieces.len() == pieces => profile,
            _ => {
                // One stage keeps the whole device, which is faster than a share of it.
                let alone = names.len() == 1;
                let device = if alone { home.clone() } else { pipeline.open(&home, &names[0])? };
                // Other processes have machines of their own.
                let beside = if alone || ranks.is_some() { &[] } else { &names[1..] };
                let beside: Vec<_> = beside.iter().map(|name| pipeline.open(&home, name)).collect::<Result<_>>()?;
                let part = Reads::ALL.bring(&probe[0], &device)?;
                let part = if let Some(teacher) = teacher { stood_in(&part, teacher.config.width)? } else { part };
                let methods = |whole: &Model| promises.methods(whole, distillation.as_ref());
                let profile = measure::profile(&model.to_device(&device)?, &part, settings, &methods, &beside)?;
                profile.write(&path)?;
                profile
            }
        };
        let schedule = Schedule::new(pipeline.schedule, stages, probe.len())?;
        let route = Route::new(&model.config, &schedule, profile.cuts(&schedule)?, workers)?;
        let seconds = predict(&profile, &route, sizes.clone())?.seconds;
        // More devices must pay for themselves.
        if best.as_ref().is_none_or(|(least, ..)| seconds < 0.95 * least) {
            best = Some((seconds, route, profile));
        }
    }
    let Some((predicted, route, profile)) = best else {
        return one_device(model);
    };
    if route.workers.len() == 1 {
        console::tell(format_args!(
            "{}: one device is fastest ({:.1} ms a step predicted)",
            context.name,
            1e3 * predicted
        ));
        return one_device(model);
    }
    let names = pipeline.devices(&home, route.workers.len())?;
    if let Some(post) = ranks.filter(|post| post.ranks() < route.workers.len()) {
        let value = format!("{} workers on {} ranks", route.workers.len(), post.ranks());
        let allowed = "one rank for each worker: start more with mpirun -n";
        return Err(Error::Recipe { key: "pipeline.stages".into(), value, allowed: allowed.into() });
    }
    let here = if ranks.is_some() { 1 } else { names.len() };
    let devices = names.iter().take(here).map(|name| pipeline.open(&home, name)).collect::<Result<_>>()?;
    let heartbeat = Duration::from_secs_f64(pipeline.heartbeat);
    let distillation_is_hard = distillation.as_ref().is_some_and(|d| d.weights.hard > 0.0);
    let across = match ranks {
        Some(post) => {
            let methods = promises.described(distillation.as_ref())?;
            Some(Across { post: post.clone(), devices: names, methods })
        }
        None => None,
    };
    let stages = route.replicas.len();
    if teacher.is_some() && across.is_some() {
        let allowed = "false across processes: the teacher's states are computed beforehand there".into();
        return Err(Error::Recipe { key: "pipeline.teacher".into(), value: "true".into(), allowed });
    }
    if let Some(short) = teacher.map(|t| t.config.blocks.len()).filter(|&blocks| blocks < stages) {
        let value = format!("true with {stages} stages");
        let allowed = format!("at most {short} stages: the teacher's blocks");
        return Err(Error::Recipe { key: "pipeline.teacher".into(), value, allowed });
    }
    let teacher = teacher.map(|model| TeacherSetup {
        cuts: cut::teacher(&model.config, stages),
        model: Arc::new(model.clone()),
        hard: distillation_is_hard,
    });
    let methods = move |part: &Model| promises.methods(part, distillation.as_ref());
    let setup = Setup {
        route: Arc::new(route),
        kind: Some(pipeline.schedule),
        devices,
        optimizer: settings,
        methods: Arc::new(methods),
        teacher,
        recompute: pipeline.recompute,
        heartbeat,
        deadline: 30 * heartbeat,
        slow: 30 * heartbeat,
        run: format!("{}/{}", context.recipe.name, context.name),
        record: context.folder.join("flight-recorder.jsonl"),
        planted: Vec::new(),
    };
    let cuts: Vec<String> = setup.route.cuts.iter().map(|c| format!("{}..{}", c.start, c.end)).collect();
    console::tell(format_args!(
        "{}: {} stages, pieces {}, {}, {:.1} ms a step predicted",
        context.name,
        setup.route.replicas.len(),
        cuts.join(" "),
        pipeline.schedule,
        1e3 * predicted
    ));
    let executor = Executor::start_across(model, setup, across.as_ref())?;
    let mut steps = 0;
    let (folder, name, wide) = (context.folder.to_path_buf(), context.name.to_string(), size(&probe[0]));
    let on_step = move |_: u64, pipeline: &Executor, micros: &[Micro], report: &StepReport| {
        steps += 1;
        if steps == WARM {
            let route = pipeline.current();
            let sizes = micros.iter().map(|m| size(m) / wide).collect();
            let predicted = predict(&profile, route, sizes)?;
            if let Err(e) = compare(&folder, &name, &report.timeline(&name, &route.replicas), &predicted) {
                console::tell(format_args!("warning: {name}: the step is not drawn: {e}"));
            }
        }
        Ok(())
    };
    Ok(Box::new(Staged::new(executor, &home, Box::new(on_step))))
}

/// A micro-batch that waits for its teacher with states and labels of the right size, for a profile of what the head costs.
fn stood_in(micro: &Micro, width: usize) -> Result<Micro> {
    let Some(teacher) = &micro.teacher else {
        return Ok(micro.clone());
    };
    let hidden = Tensor::zeros(micro.targets.device(), Meta::new(&[micro.targets.count(), width], DType::F32)?)?;
    let teacher = Teacher { hidden, hard_targets: micro.targets.clone(), ..teacher.clone() };
    Ok(Micro { teacher: Some(teacher), ..micro.clone() })
}

/// The step of a session that is drawn and compared with its prediction: the first ones fill memory pools.
const WARM: u64 = 4;

/// Prediction beside measurement, on standard error and as charts and a trace in the run folder.
fn compare(folder: &Path, name: &str, measured: &Timeline, predicted: &Timeline) -> Result<()> {
    write_atomic(folder.join("pipeline-measured.svg"), gantt(measured).as_bytes())?;
    write_atomic(folder.join("pipeline-predicted.svg"), gantt(predicted).as_bytes())?;
    trace::write(folder.join("pipeline-trace.json"), measured)?;
    console::tell(format_args!(
        "{name}: a step took {:.1} ms where {:.1} ms were predicted, {:.0} % idle ({:.0} % predicted); charts in {}",
        1e3 * measured.seconds,
        1e3 * predicted.seconds,
        100.0 * measured.idle_share(),
        100.0 * predicted.idle_share(),
        folder.display()
    ));
    Ok(())
}

/// Positions of a micro-batch, which its time goes by.
fn size(micro: &Micro) -> f64 {
    micro.batch.tokens.count() as f64
}
