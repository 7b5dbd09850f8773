//! Over which devices a training is spread and where its model is cut: measured on this machine, then planned and simulated.

use std::sync::Arc;

use super::schema::{Pipeline, Stages};
use super::stages::Context;
use crate::console;
use crate::device::{self, Device, Kind as DeviceKind};
use crate::error::{Error, Result};
use crate::nn::Model;
use crate::nn::pieces;
use crate::pipeline::predict::predict;
use crate::pipeline::profile::Profile;
use crate::pipeline::route::Route;
use crate::pipeline::{Kind, Schedule, choose};
use crate::train::lifecycle::Micro;

/// A training in stages.
pub struct Spread {
    pub route: Route,
    pub profile: Profile,
    /// Of a step, predicted.
    pub seconds: f64,
    /// On one device, where that was considered.
    pub alone: Option<f64>,
}

/// The micro-batches of a step whose batches are cut into so many parts.
pub type Probe<'a> = dyn Fn(usize) -> Result<Vec<Micro>> + 'a;

/// Profiles the model on a device for micro-batches like one.
pub type Measure<'a> = dyn Fn(&Arc<dyn Device>, &[Arc<dyn Device>], &Micro) -> Result<Profile> + 'a;

/// More devices must be at least this much faster.
const WORTHWHILE: f64 = 0.95;

/// How `model` is trained in stages, as the recipe says or, where it leaves that open, as is fastest; `None`: on one device.
/// `measure` is not asked where an earlier session left its profile: a resumed training is cut as it was before.
///
/// # Errors
/// `Recipe` for stages or devices that do not go with this model; those of measuring.
pub fn spread(
    (context, pipeline): (&Context, &Pipeline),
    model: &Model,
    probe: &Probe,
    measure: &Measure,
) -> Result<Option<Spread>> {
    let search = Search { context, pipeline, model, measure };
    match pipeline.stages {
        Stages::Count(n) if pipeline.workers(n).iter().sum::<usize>() == 1 => Ok(None),
        Stages::Count(n) => search.fixed(n, &probe(pipeline.micro_batches)?).map(Some),
        Stages::Auto(_) => search.fastest(probe),
    }
}

struct Search<'a> {
    context: &'a Context<'a>,
    pipeline: &'a Pipeline,
    model: &'a Model,
    measure: &'a Measure<'a>,
}

impl Search<'_> {
    /// Of the model on one of so many devices.
    fn profile(&self, workers: usize, micro: &Micro) -> Result<Profile> {
        let home = self.model.device();
        // One stage keeps the whole device, which is faster than a share of it.
        let names = (workers > 1).then(|| self.pipeline.devices(home, workers)).transpose()?.unwrap_or_default();
        let mut devices = names.iter().map(|name| self.pipeline.open(home, name)).collect::<Result<Vec<_>>>()?;
        if devices.is_empty() {
            devices.push(home.clone());
        }
        let device = &devices[0].info().name;
        let path = self.context.folder.join(format!("pipeline-profile-{workers}.json"));
        if path.exists() {
            let pieces = pieces::pieces(&self.model.config);
            let reason = match Profile::read(&path) {
                Ok(profile) if profile.pieces.len() == pieces && profile.device == *device => return Ok(profile),
                Ok(other) if other.device != *device => {
                    format!("{}: of {}, where this is {device}", path.display(), other.device)
                }
                Ok(other) => format!("{}: {} pieces where this model has {pieces}", path.display(), other.pieces.len()),
                Err(e) => e.to_string(),
            };
            console::warn(format_args!("{reason}; the model is measured anew and may be cut elsewhere"));
        }
        // Other processes may have machines of their own.
        let beside = if self.context.ranks.is_some() { &[] } else { &devices[1..] };
        let profile = (self.measure)(&devices[0], beside, micro)?;
        profile.write(&path)?;
        Ok(profile)
    }

    fn fixed(&self, stages: usize, micros: &[Micro]) -> Result<Spread> {
        let (kind, pieces) = (self.pipeline.schedule, pieces::pieces(&self.model.config));
        if kind.chunks(stages) > pieces {
            let value = format!("{stages} stages of schedule {kind} need {} pieces", kind.chunks(stages));
            let allowed = format!("at most the model's {pieces} pieces: embedding, blocks and head");
            return Err(Error::Recipe { key: "pipeline.stages".into(), value, allowed });
        }
        let workers = self.pipeline.workers(stages);
        let profile = self.profile(workers.iter().sum(), &micros[0])?;
        let schedule = Schedule::new(kind, stages, micros.len())?;
        let route = Route::new(&self.model.config, &schedule, profile.cuts(&schedule)?, workers)?;
        let seconds = predict(&profile, &route, sizes(&profile, micros))?.seconds;
        Ok(Spread { route, profile, seconds, alone: None })
    }

    fn fastest(&self, probe: &Probe) -> Result<Option<Spread>> {
        let home = self.model.device();
        let named = self.pipeline.devices.len();
        let given = if named == 0 { home.info().threads } else { named };
        let most = self.context.ranks.map(|post| post.ranks()).filter(|ranks| *ranks > 1).unwrap_or(given);
        // Halves of the device, quarters and so on.
        let counts = std::iter::successors(Some(2), |n| Some(2 * n)).take_while(|n| *n < most).chain([most]);
        let counts: Vec<usize> = counts.filter(|n| *n > 1).collect();
        if counts.is_empty() {
            return Ok(None);
        }
        let alone = self.alone(&probe(1)?)?;
        let micros = probe(self.pipeline.micro_batches)?;
        let mut best: Option<Spread> = None;
        for devices in counts {
            let profile = self.profile(devices, &micros[0])?;
            let (config, kind) = (&self.model.config, self.pipeline.schedule);
            let found = choose::fastest(config, kind, &profile, devices, &sizes(&profile, &micros))?;
            let least = best.as_ref().map_or(f64::INFINITY, |spread| spread.seconds);
            if let Some((seconds, route)) = found.filter(|(seconds, _)| *seconds < WORTHWHILE * least) {
                best = Some(Spread { route, profile, seconds, alone: Some(alone) });
            }
        }
        if let Some(spread) = best.as_ref().filter(|spread| spread.seconds >= WORTHWHILE * alone) {
            let (stages, devices) = (spread.route.replicas.len(), spread.route.workers.len());
            console::tell(format_args!(
                "{}: one device is better: {:.1} ms a step predicted, {:.1} ms in {stages} stages on {devices} devices",
                self.context.name,
                1e3 * alone,
                1e3 * spread.seconds
            ));
            return Ok(None);
        }
        Ok(best)
    }

    /// Seconds of a step on one device, whose batches are whole.
    fn alone(&self, micros: &[Micro]) -> Result<f64> {
        let profile = self.profile(1, &micros[0])?;
        let schedule = Schedule::new(Kind::OneForwardOneBackward, 1, micros.len())?;
        let whole = 0..pieces::pieces(&self.model.config);
        let route = Route::new(&self.model.config, &schedule, vec![whole], vec![1])?;
        Ok(predict(&profile, &route, sizes(&profile, micros))?.seconds)
    }
}

/// Sizes of micro-batches in the profile's: their time goes by positions.
pub fn sizes(profile: &Profile, micros: &[Micro]) -> Vec<f64> {
    let usual = (profile.rows * profile.columns) as f64;
    micros.iter().map(|micro| micro.batch.tokens.count() as f64 / usual).collect()
}

impl Pipeline {
    /// Workers of each of so many stages.
    pub(super) fn workers(&self, stages: usize) -> Vec<usize> {
        self.replicas.of(stages)
    }

    /// Names of a device for each of so many workers.
    pub(super) fn devices(&self, home: &Arc<dyn Device>, workers: usize) -> Result<Vec<String>> {
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
    pub(super) fn open(&self, home: &Arc<dyn Device>, name: &str) -> Result<Arc<dyn Device>> {
        if self.devices.is_empty() {
            return device::open(name).or_else(|_| device::open(&home.info().id));
        }
        device::open(name)
    }
}
