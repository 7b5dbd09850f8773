//! What a step will take as it is routed, from a profile: each replica of a stage with its own micro-batches.

use super::profile::Profile;
use super::route::Route;
use super::simulate::{Timeline, simulate_replicas};
use crate::error::Result;

/// The step in the simulator. `sizes`: of each micro-batch in the profile's.
///
/// # Errors
/// Those of the simulator.
pub fn predict(profile: &Profile, route: &Route, sizes: Vec<f64>) -> Result<Timeline> {
    let mut costs = profile.costs(&route.cuts, &route.schedule);
    costs.sizes = sizes;
    for (pieces, &home) in route.cuts.iter().zip(&route.schedule.homes) {
        // Every replica sends its gradients to every other one and takes in theirs.
        let others = route.replicas[home] as f64 - 1.0;
        let bytes: f64 = profile.pieces[pieces.clone()].iter().map(|piece| piece.parameter_bytes).sum();
        costs.updates[home] += others * (2.0 * profile.link.handling * bytes + profile.link.seconds(bytes));
    }
    simulate_replicas(&route.schedule, &route.replicas, &costs, true)
}
