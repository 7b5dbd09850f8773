//! Which schedule carries a plan out fastest: all kinds with one chunk per stage, in the simulator.

use serde::Serialize;

use super::Plan;
use super::cluster::Cluster;
use crate::error::Result;
use crate::pipeline::schedule::{Kind, Schedule};
use crate::pipeline::simulate::simulate_as;

/// A kind's simulated step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KindPrice {
    pub kind: Kind,
    pub seconds: f64,
    pub idle_share: f64,
    /// Most bytes on a device of each stage: weights, gradients, moments and activations.
    pub memory: Vec<f64>,
    pub fits: bool,
}

/// Kinds that leave the plan's cut as it is, those first that are preferred among equals. Where memory holds fewer
/// micro-batches than a kind takes in, DAPPLE's kinds are capped at what it holds.
fn candidates(plan: &Plan, cluster: &Cluster) -> Vec<Kind> {
    let stages = plan.stages.len();
    let held = |cap: f64, stage: &super::StagePlan| (cap - stage.price.parameter_state) / stage.price.activations;
    let most = cluster.memory.map_or(f64::INFINITY, |cap| {
        plan.stages.iter().filter(|s| s.price.activations > 0.0).map(|s| held(cap, s)).fold(f64::INFINITY, f64::min)
    });
    // The plan fits, so at least one micro-batch does.
    let most = (most.min(2.0 * stages as f64) as usize).max(1);
    let capped_b = if most < 2 * stages - 1 { most } else { 0 };
    let mut kinds = vec![Kind::OneForwardOneBackward, Kind::DappleB { cap: capped_b }];
    kinds.extend((most < stages).then_some(Kind::DappleA { cap: most }));
    kinds.extend([Kind::ZeroBubbleH1, Kind::ZeroBubbleH2, Kind::GPipe, Kind::Sequential]);
    kinds
}

/// # Errors
/// None for a plan that was made here; those of the simulator else.
pub fn price(plan: &Plan, cluster: &Cluster) -> Result<Vec<KindPrice>> {
    let costs = plan.costs(cluster);
    let priced = |kind| {
        let schedule = Schedule::new(kind, plan.stages.len(), plan.micro_batches)?;
        let timeline = simulate_as(&schedule, &costs, false)?;
        let memory = plan.stages.iter().zip(&timeline.stages);
        let memory: Vec<f64> = memory.map(|(s, used)| s.price.parameter_state + used.peak_activation_bytes).collect();
        // Sums of equal activations differ from their product by rounding.
        let fits = cluster.memory.is_none_or(|cap| memory.iter().all(|bytes| *bytes <= cap * (1.0 + 1e-9)));
        Ok(KindPrice { kind, seconds: timeline.seconds, idle_share: timeline.idle_share(), memory, fits })
    };
    candidates(plan, cluster).into_iter().map(priced).collect()
}

/// The fastest that fits; of equals the first.
pub fn best(kinds: &[KindPrice]) -> usize {
    let mut best = 0;
    for (index, kind) in kinds.iter().enumerate() {
        let better = kind.seconds < kinds[best].seconds * (1.0 - 1e-9) || !kinds[best].fits;
        if kind.fits && better {
            best = index;
        }
    }
    best
}
