//! What so many devices are best used as: the planner's cuts with their replicas and the even balance without, each priced
//! as the executor runs it.

use super::plan::{self, Cluster};
use super::predict::predict;
use super::profile::Profile;
use super::route::Route;
use super::schedule::{Kind, Schedule};
use crate::error::Result;
use crate::nn::Config;

/// Devices that the planner looks at.
const MOST: usize = plan::cluster::MAX_DEVICES;

/// The fastest route of schedule `kind` over at most `devices` devices, more than one, with its seconds for a step; `None`
/// where the model cannot be cut for them. `profile`: of one of the devices. `sizes`: of the step's micro-batches in the
/// profile's.
///
/// # Errors
/// Those of planner and simulator.
pub fn fastest(
    config: &Config,
    kind: Kind,
    profile: &Profile,
    devices: usize,
    sizes: &[f64],
) -> Result<Option<(f64, Route)>> {
    let mut best: Option<(f64, Route)> = None;
    for (cuts, replicas) in candidates(kind, profile, devices, sizes.len())? {
        let schedule = Schedule::new(kind, replicas.len(), sizes.len())?;
        // Where a head is tied to its embedding not every cut is one.
        let Ok(route) = Route::new(config, &schedule, cuts, replicas) else { continue };
        let seconds = predict(profile, &route, sizes.to_vec())?.seconds;
        if best.as_ref().is_none_or(|(least, _)| seconds < *least) {
            best = Some((seconds, route));
        }
    }
    Ok(best)
}

type Candidate = (Vec<std::ops::Range<usize>>, Vec<usize>);

fn candidates(kind: Kind, profile: &Profile, devices: usize, micros: usize) -> Result<Vec<Candidate>> {
    let mut all = Vec::new();
    if kind.chunks(devices) <= profile.pieces.len() {
        all.push((profile.cuts(&Schedule::new(kind, devices, micros)?)?, vec![1; devices]));
    }
    // The planner's stages have one chunk each.
    if kind.chunks(2) == 2 && devices <= MOST {
        // Its replicas share a micro-batch's rows; those of the executor share the micro-batches, as evenly as those divide.
        let shared = Profile { rows: micros, ..profile.clone() };
        let cluster = Cluster::single(devices, profile.link);
        for plan in plan::plans(&shared, &cluster, micros)?.into_iter().filter(|plan| plan.devices() > 1) {
            let replicas = plan.stages.iter().map(plan::StagePlan::replicas).collect();
            all.push((plan.stages.into_iter().map(|stage| stage.pieces).collect(), replicas));
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::config::Size;
    use crate::pipeline::profile::PieceProfile;
    use crate::pipeline::{ChunkCost, Link};

    const SIZE: Size = Size { layers: 4, heads: 2, head_size: 8, ffn_width: 32, max_positions: 32 };

    /// An embedding, four blocks and a head that cannot be cut and costs as much as all of them.
    fn profile(link: Link) -> Profile {
        let piece = |(index, time): (usize, &f64)| PieceProfile {
            name: index.to_string(),
            cost: ChunkCost { forward: *time, backward_input: *time, backward_weight: *time, ..ChunkCost::default() },
            split: None,
            parameter_bytes: 1.0,
        };
        let pieces = [0.0, 1.0, 1.0, 1.0, 1.0, 4.0].iter().enumerate().map(piece).collect();
        let (model, device) = ("m".to_string(), "d".to_string());
        Profile { model, device, rows: 1, columns: 8, pieces, link, update_per_byte: 0.0 }
    }

    #[test]
    fn a_heavy_head_gets_two_of_three_devices() {
        let config = Config::glm(SIZE, 37);
        let profile = profile(Link::FREE);
        let sizes = [1.0; 12];
        let (seconds, route) = fastest(&config, Kind::DappleB { cap: 0 }, &profile, 3, &sizes).unwrap().unwrap();
        assert!(route.replicas.iter().sum::<usize>() == 3 && route.replicas.len() < 3, "{:?}", route.replicas);
        // Three stages without replicas are as slow as the head alone: 12 micro-batches of 12 s and the first one's blocks.
        let schedule = Schedule::new(Kind::DappleB { cap: 0 }, 3, 12).unwrap();
        let even = Route::new(&config, &schedule, profile.cuts(&schedule).unwrap(), vec![1; 3]).unwrap();
        let even = predict(&profile, &even, sizes.to_vec()).unwrap().seconds;
        assert!(seconds < 0.8 * even, "{seconds} with replicas, {even} without");
    }

    #[test]
    fn kinds_with_several_chunks_are_cut_without_replicas() {
        let config = Config::glm(SIZE, 37);
        let of = |kind, devices| fastest(&config, kind, &profile(Link::FREE), devices, &[1.0; 4]).unwrap();
        let (_, route) = of(Kind::ZeroBubbleV, 3).unwrap();
        assert_eq!((route.replicas.clone(), route.cuts.len()), (vec![1; 3], 6));
        // Eight chunks are more than there are pieces.
        assert!(of(Kind::ZeroBubbleV, 4).is_none());
        // As a row of stages six pieces take no more than six devices; the planner spreads them over more.
        assert!(of(Kind::OneForwardOneBackward, 8).is_some());
    }
}
