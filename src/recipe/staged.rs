//! What takes the steps of a training: a pipeline as the recipe's `[pipeline]` asks for, or one device.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::hooks::Promises;
use super::run_folder::State;
use super::schema::{Messages, Pipeline, Stages};
use super::spread::{Probe, Spread, sizes, spread};
use super::stages::Context;
use crate::atomic::write_atomic;
use crate::compress::distillation::Distillation;
use crate::console;
use crate::device::Device;
use crate::device::cuda::ticket;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::Model;
use crate::pipeline::direct::Direct;
use crate::pipeline::executor::{Pipeline as Executor, Setup, StepReport, TeacherSetup};
use crate::pipeline::predict::predict;
use crate::pipeline::profile::Profile;
use crate::pipeline::reads::Reads;
use crate::pipeline::remote::Across;
use crate::pipeline::train::{OnStep, Staged};
use crate::pipeline::{Timeline, cut, measure, trace};
use crate::report::gantt;
use crate::shape::Meta;
use crate::tensor::Tensor;
use crate::train::graphs;
use crate::train::lifecycle::{Micro, Teacher};
use crate::train::optimizer::Settings;
use crate::train::stepper::{OneDevice, Stepper};

/// What takes the steps, and into how many parts their batches are cut for it. `teacher`: one that runs beside the student.
///
/// # Errors
/// `Recipe` for stages that do not go with the model, its teacher or the processes; those of measuring and starting.
pub fn stepper(
    context: &Context,
    model: &mut Model,
    settings: Settings,
    probe: &Probe,
    state: &State,
    (distillation, teacher): (Option<Distillation>, Option<&Model>),
) -> Result<(Box<dyn Stepper>, usize)> {
    let shapes = graphs::shapes(model.device().as_ref());
    let one_device = |model: &mut Model, parts: usize| -> Result<(Box<dyn Stepper>, usize)> {
        Ok((Box::new(OneDevice::new(model, settings, shapes)?), parts))
    };
    let Some(pipeline) = &context.recipe.pipeline else {
        return one_device(model, 1);
    };
    let promises = Promises::new(state, distillation.as_ref());
    let profile = |device: &Arc<dyn Device>, beside: &[Arc<dyn Device>], micro: &Micro| {
        let micro = Reads::ALL.bring(micro, device)?;
        let micro = teacher.map_or(Ok(micro.clone()), |teacher| stood_in(&micro, teacher.config.width))?;
        let methods = |whole: &Model| promises.methods(whole, distillation.as_ref());
        measure::profile(model, device, &micro, settings, &methods, beside)
    };
    let Some(spread) = spread((context, pipeline), model, probe, &profile)? else {
        // Where the recipe leaves it open that is a plain training on one device, whose batches are whole.
        let parts = if matches!(pipeline.stages, Stages::Auto(_)) { 1 } else { pipeline.micro_batches };
        return one_device(model, parts);
    };
    tell(context.name, pipeline, &spread);
    let (setup, across) = setup(context, pipeline, (model, settings), &spread, (promises, distillation, teacher))?;
    let executor = Executor::start_across(model, setup, across.as_ref())?;
    let draws = draw_warm_step(context, spread.profile);
    Ok((Box::new(Staged::new(executor, draws)?), pipeline.micro_batches))
}

fn tell(name: &str, pipeline: &Pipeline, spread: &Spread) {
    let Spread { route, seconds, alone, .. } = spread;
    let cuts = route.cuts.iter().zip(&route.schedule.homes).map(|(pieces, &home)| {
        let replicas = route.replicas[home];
        let times = if replicas > 1 { format!(" x {replicas}") } else { String::new() };
        format!("{}..{}{times}", pieces.start, pieces.end)
    });
    let alone = alone.map_or(String::new(), |seconds| format!(", {:.1} ms on one device", 1e3 * seconds));
    console::tell(format_args!(
        "{name}: {} stages, pieces {}, {}, {:.1} ms a step predicted{alone}",
        route.replicas.len(),
        cuts.collect::<Vec<_>>().join(", "),
        pipeline.schedule,
        1e3 * seconds
    ));
}

/// The pipeline of a training, and the other processes that it runs in.
fn setup(
    context: &Context,
    pipeline: &Pipeline,
    (model, settings): (&Model, Settings),
    spread: &Spread,
    (promises, distillation, teacher): (Promises, Option<Distillation>, Option<&Model>),
) -> Result<(Setup, Option<Across>)> {
    let (home, route) = (model.device(), &spread.route);
    let refuse = |key: &str, value: String, allowed: String| {
        Err(Error::Recipe { key: format!("pipeline.{key}"), value, allowed })
    };
    let ranks = context.ranks.filter(|post| post.ranks() > 1);
    let names = pipeline.devices(home, route.workers.len())?;
    if let Some(post) = ranks.filter(|post| post.ranks() < route.workers.len()) {
        let value = format!("{} workers on {} ranks", route.workers.len(), post.ranks());
        return refuse("stages", value, "one rank for each worker: start more with mpirun -n".into());
    }
    let stages = route.replicas.len();
    if teacher.is_some() && ranks.is_some() {
        let allowed = "false across processes: the teacher's states are computed beforehand there";
        return refuse("teacher", "true".into(), allowed.into());
    }
    if let Some(short) = teacher.map(|t| t.config.blocks.len()).filter(|&blocks| blocks < stages) {
        let allowed = format!("at most {short} stages: the teacher's blocks");
        return refuse("teacher", format!("true with {stages} stages"), allowed);
    }
    let here = if ranks.is_some() { 1 } else { names.len() };
    let devices = names.iter().take(here).map(|name| pipeline.open(home, name)).collect::<Result<_>>()?;
    let direct = match pipeline.messages {
        Messages::Host => None,
        Messages::Nccl => {
            let distinct: BTreeSet<&String> = names.iter().filter(|name| name.starts_with("cuda:")).collect();
            // GPUs of processes on several machines have the same names.
            let enough = if ranks.is_some() {
                names.iter().all(|n| n.starts_with("cuda:"))
            } else {
                distinct.len() == names.len()
            };
            if !enough {
                let allowed = format!("\"host\" on {}: NCCL needs a GPU for each worker", names.join(", "));
                return refuse("messages", "nccl".into(), allowed);
            }
            Some(Direct::new(Direct::along(route, ticket)?))
        }
    };
    let across = match ranks {
        Some(post) => {
            let methods = promises.described(distillation.as_ref())?;
            Some(Across { post: post.clone(), devices: names, named: !pipeline.devices.is_empty(), methods })
        }
        None => None,
    };
    let teacher = teacher.map(|model| TeacherSetup {
        cuts: cut::teacher(&model.config, stages),
        model: Arc::new(model.clone()),
        hard: distillation.as_ref().is_some_and(|d| d.weights.hard > 0.0),
    });
    let heartbeat = Duration::from_secs_f64(pipeline.heartbeat);
    let setup = Setup {
        route: Arc::new(route.clone()),
        kind: Some(pipeline.schedule),
        devices,
        optimizer: settings,
        methods: Arc::new(move |part: &Model| promises.methods(part, distillation.as_ref())),
        teacher,
        direct,
        recompute: pipeline.recompute,
        heartbeat,
        deadline: 30 * heartbeat,
        slow: 30 * heartbeat,
        run: format!("{}/{}", context.recipe.name, context.name),
        record: context.folder.join("flight-recorder.jsonl"),
        planted: Vec::new(),
        timed: Some(WARM),
    };
    Ok((setup, across))
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

/// Draws the first step that is like all others, beside its prediction.
fn draw_warm_step(context: &Context, profile: Profile) -> Box<OnStep> {
    let mut steps = 0;
    let (folder, name) = (context.folder.to_path_buf(), context.name.to_string());
    Box::new(move |_: u64, pipeline: &Executor, micros: &[Micro], report: &StepReport| {
        steps += 1;
        if steps == WARM {
            let route = pipeline.current();
            let predicted = predict(&profile, route, sizes(&profile, micros))?;
            if let Err(e) = compare(&folder, &name, &report.timeline(&name, &route.replicas), &predicted) {
                console::tell(format_args!("warning: {name}: the step is not drawn: {e}"));
            }
        }
        Ok(())
    })
}

/// Prediction beside measurement, on standard error and as charts and a trace in the run folder.
fn compare(folder: &Path, name: &str, measured: &Timeline, predicted: &Timeline) -> Result<()> {
    write_atomic(folder.join("pipeline-measured.svg"), gantt(measured).as_bytes())?;
    write_atomic(folder.join("pipeline-predicted.svg"), gantt(predicted).as_bytes())?;
    trace::write(folder.join(trace::MEASURED), measured)?;
    trace::write(folder.join(trace::PREDICTED), predicted)?;
    console::tell(format_args!(
        "{name}: a step took {:.1} ms where {:.1} ms were predicted, {:.0} % idle ({:.0} % predicted); charts in {}",
        1e3 * measured.seconds,
        1e3 * predicted.seconds,
        100.0 * measured.idle_share(),
        100.0 * predicted.idle_share(),
        folder.display()
    ));
    if measured.seconds > UNLIKE * predicted.seconds {
        console::tell(format_args!(
            "{name}: a prediction knows the pieces one at a time, on the first device alone: it is too short where devices \
             differ or share cores (cuda-host, more stages than cores), and where a piece takes less than about a millisecond"
        ));
    }
    Ok(())
}

/// Times its prediction from which a step is explained.
const UNLIKE: f64 = 1.5;
