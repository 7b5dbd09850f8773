//! The dynamic programme over cuts, replicas and placements.
//!
//! DAPPLE grows plans from the first piece on; here they grow from the last. The latency's pivot is looked for from the last
//! stage, and the micro-batches in flight on a stage depend on the stages behind it: both are then known when a stage is
//! added, so times add up without approximation and what does not fit in memory is dropped at once.

use std::collections::BTreeMap;
use std::ops::Range;

use super::cluster::{Placement, Policy};
use super::latency::Tail;
use super::price::Pricing;

/// Pieces of a stage, and its devices on each machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    pub pieces: Range<usize>,
    pub devices: Placement,
}

/// Clusters up to this size have all replica counts and the wide beam tried; larger ones powers of two and a narrow beam.
const SMALL: usize = 16;
const WIDE: usize = 32;
const NARROW: usize = 4;

/// How machines look that have the same future: equal ones may change places. Size, used devices and those of the foremost
/// stage for each machine, and the number of stages where memory makes it matter.
type Key = (Vec<(usize, usize, usize)>, usize);

/// A foremost stage of what is placed so far.
struct Node {
    cut: Cut,
    used: Placement,
    next: Option<usize>,
}

/// Pieces from some boundary to the end, placed.
#[derive(Clone, Copy)]
struct Suffix {
    tail: Tail,
    seconds: f64,
    stages: usize,
    node: usize,
}

struct Search<'a> {
    pricing: &'a Pricing<'a>,
    limit: usize,
    beam: usize,
    nodes: Vec<Node>,
    keys: BTreeMap<Key, usize>,
    /// Suffixes by the boundary they begin at and the key's number. The latency is not additive, so the best plan need not
    /// end in the best suffix: all are kept that no other dominates, up to the beam's width those that are fastest now.
    states: Vec<Vec<Vec<Suffix>>>,
    /// Whole plans: seconds and foremost stage of the fastest for each number of stages, and the fastest of all.
    plans: BTreeMap<usize, (f64, usize)>,
    fastest: f64,
}

/// The plans with the lowest latency for each number of stages, fastest first; none where none fits in memory. `limit` is D,
/// the most micro-batches in flight.
pub fn search(pricing: &Pricing, limit: usize) -> Vec<Vec<Cut>> {
    let small = pricing.cluster.devices() <= SMALL;
    let mut search = Search {
        pricing,
        limit,
        beam: if small { WIDE } else { NARROW },
        nodes: Vec::new(),
        keys: BTreeMap::new(),
        states: (0..=pricing.pieces()).map(|_| Vec::new()).collect(),
        plans: BTreeMap::new(),
        fastest: f64::INFINITY,
    };
    search.extend(pricing.pieces(), None);
    for boundary in (1..pricing.pieces()).rev() {
        for suffix in std::mem::take(&mut search.states[boundary]).into_iter().flatten() {
            search.extend(boundary, Some(suffix));
        }
    }
    let mut plans: Vec<(f64, usize)> = search.plans.values().copied().collect();
    plans.sort_by(|a, b| a.0.total_cmp(&b.0));
    let cuts = |(_, node): (f64, usize)| {
        let chain = std::iter::successors(Some(node), |node| search.nodes[*node].next);
        chain.map(|node| search.nodes[node].cut.clone()).collect()
    };
    plans.into_iter().map(cuts).collect()
}

impl Search<'_> {
    /// Puts every possible stage that ends at `boundary` before `suffix`.
    fn extend(&mut self, boundary: usize, suffix: Option<Suffix>) {
        let cluster = self.pricing.cluster;
        let used = suffix.map_or_else(|| vec![0; cluster.machines.len()], |s| self.nodes[s.node].used.clone());
        let free = cluster.devices() - used.iter().sum::<usize>();
        let most = free.min(self.pricing.profile.rows);
        let small = cluster.devices() <= SMALL;
        // One of all machines that look alike: size, used devices and those of the neighbour.
        let neighbour = |m: usize| suffix.map_or(0, |s| self.nodes[s.node].cut.devices[m]);
        let look = |m: usize| (cluster.machines[m], used[m], neighbour(m));
        let machines = 0..cluster.machines.len();
        let firsts: Vec<usize> = machines.filter(|&m| (0..m).all(|before| look(before) != look(m))).collect();
        let firsts = if small { &firsts[..] } else { &firsts[..1] };
        let largest = cluster.machines.iter().copied().max().unwrap_or(1);
        for replicas in (1..=most).filter(|r| small || r.is_power_of_two() || *r == most) {
            let mut tried: Vec<Placement> = Vec::new();
            for (policy, first) in Policy::ALL.into_iter().flat_map(|p| firsts.iter().map(move |m| (p, *m))) {
                // The more machines are in part use, the more states there are: in large clusters one is filled before the
                // next is begun, unless a stage takes whole ones.
                let fills = policy == Policy::AppendFirst || policy == Policy::FreshFirst && replicas >= largest;
                if !small && !fills {
                    continue;
                }
                let Some(devices) = cluster.place(policy, first, &used, replicas) else { continue };
                if !tried.contains(&devices) {
                    self.extend_on(boundary, suffix, &used, &devices, free - replicas);
                    tried.push(devices);
                }
            }
        }
    }

    fn extend_on(&mut self, boundary: usize, suffix: Option<Suffix>, used: &[usize], devices: &[usize], free: usize) {
        let pricing = self.pricing;
        let rounds = pricing.rounds();
        let behind = suffix.map_or(0, |s| s.stages);
        let linked =
            suffix.map(|s| s.tail.after(pricing.link(boundary, devices, &self.nodes[s.node].cut.devices), rounds));
        let used: Placement = used.iter().zip(devices).map(|(used, new)| used + new).collect();
        let replicas: usize = devices.iter().sum();
        let share = pricing.share(replicas);
        let in_flight = pricing.in_flight(behind, self.limit);
        let key = self.key(&used, devices, behind + 1);
        for start in (0..boundary).rev() {
            if start > 0 && free == 0 {
                continue;
            }
            let price = pricing.stage_with(start..boundary, devices, share, replicas as f64);
            if pricing.cluster.memory.is_some_and(|cap| price.memory(in_flight) > cap) {
                break;
            }
            let time = price.time();
            let tail = linked.map_or_else(|| Tail::new(time, rounds), |tail| tail.after(time, rounds));
            let seconds = tail.seconds();
            if start == 0 {
                if self.plans.get(&(behind + 1)).is_none_or(|(best, _)| seconds < *best) {
                    let node = self.node(start..boundary, devices, &used, suffix);
                    self.plans.insert(behind + 1, (seconds, node));
                    self.fastest = self.fastest.min(seconds);
                }
                continue;
            }
            // Even spread over all free devices, the pieces in front keep them busy for this long.
            if rounds * pricing.work_before(start) / free as f64 >= self.fastest || tail.at_least() >= self.fastest {
                continue;
            }
            let found = Suffix { tail, seconds, stages: behind + 1, node: self.nodes.len() };
            if self.offer(start, key, found) {
                self.node(start..boundary, devices, &used, suffix);
            }
        }
    }

    fn node(&mut self, pieces: Range<usize>, devices: &[usize], used: &[usize], suffix: Option<Suffix>) -> usize {
        let cut = Cut { pieces, devices: devices.to_vec() };
        self.nodes.push(Node { cut, used: used.to_vec(), next: suffix.map(|s| s.node) });
        self.nodes.len() - 1
    }

    fn key(&mut self, used: &[usize], devices: &[usize], stages: usize) -> usize {
        let sizes = &self.pricing.cluster.machines;
        // On one machine all messages take the same link.
        let foremost = |machine: usize| if sizes.len() > 1 { devices[machine] } else { 0 };
        let mut machines: Vec<_> = (0..sizes.len()).map(|m| (sizes[m], used[m], foremost(m))).collect();
        machines.sort_unstable();
        let stages = if self.pricing.cluster.memory.is_some() { stages } else { 0 };
        let next = self.keys.len();
        *self.keys.entry((machines, stages)).or_insert(next)
    }

    /// Whether `found` is kept in its state.
    fn offer(&mut self, start: usize, key: usize, found: Suffix) -> bool {
        let states = &mut self.states[start];
        if states.len() <= key {
            states.resize_with(key + 1, Vec::new);
        }
        let beam = &mut states[key];
        if beam.iter().any(|s| s.tail.dominates(&found.tail)) {
            return false;
        }
        beam.retain(|s| !found.tail.dominates(&s.tail));
        let at = beam.partition_point(|s| s.seconds <= found.seconds);
        beam.insert(at, found);
        beam.truncate(self.beam);
        at < self.beam
    }
}
