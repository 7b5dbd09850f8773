//! Where to cut a model, and over how many devices to spread each stage: `determine_parallelism` of LightChatGLM's
//! Algorithm 1, by DAPPLE's latency model.
//!
//! The paper's T_update is a time that equals a degree of parallelism (its equation 4); here it is the longest of the stages'
//! AllReduce + optimizer time / parallel(S_i). The time of a step is DAPPLE's L = T_w + T_s + T_e with each stage's update
//! counted in T_e, where DAPPLE counts the AllReduce alone.

pub mod cluster;
pub mod kinds;
pub mod latency;
pub mod price;
mod search;
#[cfg(test)]
mod tests;

use std::ops::Range;

use serde::Serialize;

use super::profile::Profile;
use super::schedule::MAX_MICROS;
use super::simulate::{ChunkCost, Costs, Link};
use crate::error::{Error, Result};
pub use cluster::{Cluster, Policy};
pub use kinds::KindPrice;
pub use latency::{Ending, Latency, StageTime, latency};
pub use price::{Pricing, StagePrice};
pub use search::Cut;

/// A stage of a plan.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StagePlan {
    pub pieces: Range<usize>,
    /// Devices on each machine; a micro-batch's rows are spread over all of them.
    pub devices: Vec<usize>,
    #[serde(flatten)]
    pub price: StagePrice,
    /// K_i: micro-batches taken in before the first backward.
    pub in_flight: usize,
    /// Bytes on each of its devices.
    pub memory: f64,
    /// Seconds of a micro-batch's activations to the next stage; 0 for the last.
    pub transfer: f64,
}

impl StagePlan {
    pub fn replicas(&self) -> usize {
        self.devices.iter().sum()
    }
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    pub micro_batches: usize,
    pub stages: Vec<StagePlan>,
    /// DAPPLE's phases, the pivot's last backward counted.
    pub latency: Latency,
    pub seconds: f64,
    /// The same formula to the letter of the paper ([`Ending::Printed`]).
    pub printed_seconds: f64,
    /// T_comm: sum of the transfers of one micro-batch (LightChatGLM, equation 3).
    pub communication: f64,
    /// T_update.
    pub update: f64,
    /// D: most micro-batches in flight on a stage, where memory does not take those of policy A.
    pub limit: Option<usize>,
}

impl Plan {
    /// The plan that cuts make, with at most `limit` micro-batches in flight.
    pub fn of(pricing: &Pricing, cuts: &[Cut], limit: Option<usize>) -> Self {
        let micros = pricing.micros;
        let mut stages = Vec::with_capacity(cuts.len());
        let mut times = Vec::with_capacity(cuts.len() * 2);
        for (index, Cut { pieces, devices }) in cuts.iter().enumerate() {
            let price = pricing.stage(pieces.clone(), devices);
            let in_flight = pricing.in_flight(cuts.len() - 1 - index, limit.unwrap_or(usize::MAX));
            times.push(price.time());
            let link = cuts.get(index + 1).map(|next| pricing.link(pieces.end, devices, &next.devices));
            times.extend(link);
            stages.push(StagePlan {
                pieces: pieces.clone(),
                devices: devices.clone(),
                in_flight,
                memory: price.memory(in_flight),
                price,
                transfer: link.map_or(0.0, |l| l.forward),
            });
        }
        let derived = latency(&times, micros, Ending::Derived);
        Self {
            micro_batches: micros,
            communication: stages.iter().map(|s| s.transfer).sum(),
            update: times.iter().map(|t| t.update).fold(0.0, f64::max),
            latency: derived,
            seconds: derived.seconds(),
            printed_seconds: latency(&times, micros, Ending::Printed).seconds(),
            stages,
            limit,
        }
    }

    /// Devices that it uses: the paper's P_opt.
    pub fn devices(&self) -> usize {
        self.stages.iter().map(StagePlan::replicas).sum()
    }

    /// For the simulator, one chunk per stage: a stage's replicas as one device of their common speed. Links are different
    /// in a cluster and one in the simulator, so an output's size is given in seconds on a link of one byte per second. The
    /// devices' own time for messages is in the stages already.
    pub fn costs(&self, cluster: &Cluster) -> Costs {
        let latency = cluster.inside.latency.min(cluster.between.latency);
        let chunk = |stage: &StagePlan| ChunkCost {
            forward: stage.price.forward,
            backward_input: stage.price.backward_input,
            backward_weight: stage.price.backward_weight,
            activation_bytes: stage.price.activations,
            output_bytes: (stage.transfer - latency).max(0.0),
        };
        Costs {
            chunks: self.stages.iter().map(chunk).collect(),
            link: Link { latency, bytes_per_second: 1.0, handling: 0.0 },
            sizes: Vec::new(),
            updates: self.stages.iter().map(|s| s.price.all_reduce + s.price.optimizer).collect(),
        }
    }
}

/// The plan with the least latency.
///
/// # Errors
/// `Parameter` for a profile, cluster or number of micro-batches without sense, `OutOfMemory` where no cut fits.
pub fn plan(profile: &Profile, cluster: &Cluster, micros: usize) -> Result<Plan> {
    Ok(plans(profile, cluster, micros)?.swap_remove(0))
}

/// The plans with the least latency for each number of stages, at least one, fastest first.
///
/// # Errors
/// As [`plan`].
pub fn plans(profile: &Profile, cluster: &Cluster, micros: usize) -> Result<Vec<Plan>> {
    profile.check()?;
    cluster.check()?;
    if !(1..=MAX_MICROS).contains(&micros) {
        let (parameter, allowed) = ("micro_batches", "1 to 1048576");
        return Err(Error::Parameter { op: "plan", parameter, value: micros.to_string(), allowed });
    }
    let pricing = Pricing::new(profile, cluster, micros);
    // As many micro-batches in flight as policy A asks for; fewer, and slower than the latency says, only where memory forces it.
    let fewer = (1..cluster.devices().min(micros)).rev().map(Some);
    for limit in [None].into_iter().chain(fewer) {
        let found = search::search(&pricing, limit.unwrap_or(usize::MAX));
        if !found.is_empty() {
            return Ok(found.iter().map(|cuts| Plan::of(&pricing, cuts, limit)).collect());
        }
    }
    Err(too_small(&pricing))
}

fn too_small(pricing: &Pricing) -> Error {
    let (profile, cluster) = (pricing.profile, pricing.cluster);
    let parts = cluster.devices().min(pricing.pieces());
    let need = |range: Range<usize>| {
        let price = pricing.stage(range, &[1]);
        price.memory(1)
    };
    let weight = |piece: &super::profile::PieceProfile| {
        piece.parameter_bytes * price::BYTES_PER_PARAMETER_BYTE + piece.cost.activation_bytes
    };
    let cut = profile.cut(parts, weight).unwrap_or_default();
    let requested = cut.into_iter().map(need).fold(0.0, f64::max).ceil() as u64;
    let cap = cluster.memory.unwrap_or(f64::INFINITY) as u64;
    Error::OutOfMemory { device: format!("each of {} devices", cluster.devices()), requested, live: 0, cap }
}

/// What to train on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Parallelism {
    /// Seconds of a step on one device; `None` where the model does not fit on it.
    pub one_device: Option<f64>,
    /// Bytes that one device would need.
    pub one_device_memory: f64,
    pub plan: Plan,
    /// The plan's schedules, in the simulator.
    pub kinds: Vec<KindPrice>,
    /// Index of the fastest of them that fits in memory.
    pub best: usize,
    /// Seconds of a step: the simulated ones of the best schedule.
    pub seconds: f64,
    /// Whether one device is at least as fast.
    pub one_is_better: bool,
}

/// Plans that are simulated, of those with the least latency for their number of stages.
const SIMULATED: usize = 8;

/// `determine_parallelism` of LightChatGLM's Algorithm 1 (line 3): of the plans of least latency for each number of stages
/// the one that some schedule carries out fastest, for the latency takes messages for hidden that a schedule may wait for;
/// and whether that beats one device at all.
///
/// # Errors
/// As [`plan`].
pub fn determine_parallelism(profile: &Profile, cluster: &Cluster, micros: usize) -> Result<Parallelism> {
    let mut chosen: Option<(f64, Plan, Vec<KindPrice>, usize)> = None;
    for plan in plans(profile, cluster, micros)?.into_iter().take(SIMULATED) {
        let kinds = kinds::price(&plan, cluster)?;
        let best = kinds::best(&kinds);
        let seconds = kinds.get(best).map_or(plan.seconds, |kind| kind.seconds);
        if chosen.as_ref().is_none_or(|(fastest, ..)| seconds < fastest * (1.0 - 1e-9)) {
            chosen = Some((seconds, plan, kinds, best));
        }
    }
    let pricing = Pricing::new(profile, cluster, micros);
    let (seconds, plan, kinds, best) = chosen.ok_or_else(|| too_small(&pricing))?;
    let single = Cluster { machines: vec![1], ..cluster.clone() };
    let alone = Pricing::new(profile, &single, micros);
    let alone = Plan::of(&alone, &[Cut { pieces: 0..profile.pieces.len(), devices: vec![1] }], Some(1));
    let one_device_memory = alone.stages.iter().map(|s| s.memory).fold(0.0, f64::max);
    let fits = cluster.memory.is_none_or(|cap| one_device_memory <= cap);
    let one_device = fits.then_some(alone.seconds);
    let one_is_better = one_device.is_some_and(|one| one <= seconds);
    Ok(Parallelism { one_device, one_device_memory, plan, kinds, best, seconds, one_is_better })
}
