//! What a run of pieces costs as a stage on a set of devices.

use std::ops::Range;

use serde::Serialize;

use super::cluster::Cluster;
use super::latency::StageTime;
use crate::pipeline::profile::{PieceProfile, Profile};

/// Training in f32 holds weight, gradient and the two moments of Adam: 16 bytes for 4 of weight.
pub const BYTES_PER_PARAMETER_BYTE: f64 = 4.0;

/// A stage for one micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StagePrice {
    /// Seconds, with the devices' own time for messages.
    pub forward: f64,
    pub backward_input: f64,
    pub backward_weight: f64,
    /// Seconds of AllReduce over its replicas, and of the update.
    pub all_reduce: f64,
    pub optimizer: f64,
    /// Bytes on each replica: weights, gradients and moments; activations of one micro-batch.
    pub parameter_state: f64,
    pub activations: f64,
}

impl StagePrice {
    pub fn time(&self) -> StageTime {
        StageTime {
            forward: self.forward,
            backward: self.backward_input + self.backward_weight,
            update: self.all_reduce + self.optimizer,
        }
    }

    /// Bytes of a device with so many micro-batches in flight.
    pub fn memory(&self, in_flight: usize) -> f64 {
        self.parameter_state + in_flight as f64 * self.activations
    }
}

/// A profile summed up so that any run of pieces is priced in constant time.
pub struct Pricing<'a> {
    pub profile: &'a Profile,
    pub cluster: &'a Cluster,
    pub micros: usize,
    /// Sums over the pieces before each one.
    forward: Vec<f64>,
    backward_input: Vec<f64>,
    backward_weight: Vec<f64>,
    activations: Vec<f64>,
    parameters: Vec<f64>,
}

impl<'a> Pricing<'a> {
    pub fn new(profile: &'a Profile, cluster: &'a Cluster, micros: usize) -> Self {
        let sums = |of: fn(&PieceProfile) -> f64| {
            let mut sum = 0.0;
            let after = profile.pieces.iter().map(|piece| {
                sum += of(piece);
                sum
            });
            [0.0].into_iter().chain(after).collect()
        };
        Self {
            profile,
            cluster,
            micros,
            forward: sums(|p| p.cost.forward),
            backward_input: sums(|p| p.cost.backward_input),
            backward_weight: sums(|p| p.cost.backward_weight),
            activations: sums(|p| p.cost.activation_bytes),
            parameters: sums(|p| p.parameter_bytes),
        }
    }

    pub fn pieces(&self) -> usize {
        self.profile.pieces.len()
    }

    /// Seconds of forward and backward of the pieces before `end`, for one micro-batch on one device.
    pub fn work_before(&self, end: usize) -> f64 {
        self.forward[end] + self.backward_input[end] + self.backward_weight[end]
    }

    /// M - 1.
    pub fn rounds(&self) -> f64 {
        self.micros.saturating_sub(1) as f64
    }

    /// The part of a micro-batch that the replica with most rows has: rows are not divided.
    pub fn share(&self, replicas: usize) -> f64 {
        self.profile.rows.div_ceil(replicas) as f64 / self.profile.rows as f64
    }

    /// Bytes of activations between the pieces on either side of a boundary; none at the model's ends.
    pub fn crossing(&self, boundary: usize) -> f64 {
        if boundary == 0 || boundary == self.pieces() {
            return 0.0;
        }
        self.profile.pieces[boundary - 1].cost.output_bytes
    }

    /// `pieces` on `devices` (a count per machine).
    pub fn stage(&self, pieces: Range<usize>, devices: &[usize]) -> StagePrice {
        let replicas: usize = devices.iter().sum();
        self.stage_with(pieces, devices, self.share(replicas), replicas as f64)
    }

    /// As [`Pricing::stage`] with what does not depend on the pieces given: the search asks for all runs of pieces.
    pub fn stage_with(&self, pieces: Range<usize>, devices: &[usize], share: f64, replicas: f64) -> StagePrice {
        let Range { start, end } = pieces;
        let sum = |sums: &[f64]| sums[end] - sums[start];
        let handling = self.cluster.inside.handling * (self.crossing(start) + self.crossing(end));
        let bytes = sum(&self.parameters);
        StagePrice {
            forward: sum(&self.forward) * share + handling,
            backward_input: sum(&self.backward_input) * share + handling,
            backward_weight: sum(&self.backward_weight) * share,
            all_reduce: self.cluster.all_reduce(devices, bytes),
            optimizer: self.profile.update_per_byte * bytes / replicas,
            parameter_state: BYTES_PER_PARAMETER_BYTE * bytes,
            activations: sum(&self.activations) * share,
        }
    }

    /// The link at a boundary.
    pub fn link(&self, boundary: usize, from: &[usize], to: &[usize]) -> StageTime {
        let seconds = self.cluster.transfer(from, to, self.crossing(boundary));
        StageTime { forward: seconds, backward: seconds, update: 0.0 }
    }

    /// K_i of policy A with `behind` stages after it: min(S - i, M, D).
    pub fn in_flight(&self, behind: usize, limit: usize) -> usize {
        (behind + 1).min(self.micros).min(limit)
    }
}
