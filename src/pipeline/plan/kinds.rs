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

/// D: the most micro-batches in flight that a policy may ask for, 0 where memory holds all it wants. `wanted` is K_i without
/// a limit for a stage with so many behind it; only stages that do not hold theirs count.
fn limit(plan: &Plan, cluster: &Cluster, wanted: fn(usize) -> usize) -> usize {
    let Some(cap) = cluster.memory else { return 0 };
    let last = plan.stages.len().saturating_sub(1);
    let short = plan.stages.iter().enumerate().filter_map(|(index, stage)| {
        let wanted = wanted(last - index).min(plan.micro_batches);
        (1..=wanted).rev().find(|k| stage.price.memory(*k) <= cap || *k == 1).filter(|k| *k < wanted)
    });
    short.min().unwrap_or(0)
}

/// Kinds that leave the plan's cut as it is, those first that are preferred among equals. Where memory holds fewer
/// micro-batches than DAPPLE's kinds take in, they are capped at what it holds.
fn candidates(plan: &Plan, cluster: &Cluster) -> Vec<Kind> {
    let a = limit(plan, cluster, |behind| behind + 1);
    let b = limit(plan, cluster, |behind| 2 * behind + 1);
    // Without a limit policy A is 1F1B.
    let capped = (a > 0).then_some(Kind::DappleA { cap: a });
    let zero_bubble = [Kind::ZeroBubbleH1, Kind::ZeroBubbleH2];
    let kinds = [Kind::OneForwardOneBackward].into_iter().chain(capped).chain([Kind::DappleB { cap: b }]);
    kinds.chain(zero_bubble).chain([Kind::GPipe, Kind::Sequential]).collect()
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
