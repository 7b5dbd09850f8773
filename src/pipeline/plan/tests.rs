//! The planner against every plan there is, and against an even cut.

use super::*;
use crate::pipeline::profile::PieceProfile;
use crate::pipeline::schedule::{Kind, Schedule};
use crate::pipeline::simulate::{ChunkCost, simulate};
use crate::rng::Stream;

fn piece(name: &str, forward: f64, backward: f64, bytes: f64) -> PieceProfile {
    let cost = ChunkCost {
        forward,
        backward_input: backward / 2.0,
        backward_weight: backward / 2.0,
        activation_bytes: bytes * 8.0,
        output_bytes: bytes,
    };
    PieceProfile { name: name.into(), cost, split: None, parameter_bytes: bytes * 4.0 }
}

fn profile(pieces: Vec<PieceProfile>) -> Profile {
    let (model, device) = ("test".to_string(), "test".to_string());
    Profile { model, device, rows: 8, columns: 16, pieces, link: Link::FREE, update_per_byte: 0.0 }
}

/// Every way to put up to `free` devices on machines, none left out.
fn placements(free: &[usize]) -> Vec<Vec<usize>> {
    let mut all = vec![Vec::new()];
    for &most in free {
        all = all.into_iter().flat_map(|p| (0..=most).map(move |n| [&p[..], &[n]].concat())).collect();
    }
    all.retain(|p| p.iter().sum::<usize>() > 0);
    all
}

/// The least latency of all cuts into at most four stages x all replica counts x all placements.
fn brute_force(pricing: &Pricing) -> Option<Plan> {
    fn grow(pricing: &Pricing, start: usize, free: &[usize], cuts: &mut Vec<Cut>, best: &mut Option<Plan>) {
        if start == pricing.pieces() {
            let plan = Plan::of(pricing, cuts, None);
            let cap = pricing.cluster.memory.unwrap_or(f64::INFINITY);
            if plan.stages.iter().all(|s| s.memory <= cap) && best.as_ref().is_none_or(|b| plan.seconds < b.seconds) {
                *best = Some(plan);
            }
            return;
        }
        if cuts.len() == 4 {
            return;
        }
        for devices in placements(free) {
            let left: Vec<usize> = free.iter().zip(&devices).map(|(free, taken)| free - taken).collect();
            if devices.iter().sum::<usize>() > pricing.profile.rows {
                continue;
            }
            for end in start + 1..=pricing.pieces() {
                // The last stage may as well have them all; a cut without devices for the rest is none.
                if end < pricing.pieces() && left.iter().sum::<usize>() == 0 {
                    continue;
                }
                cuts.push(Cut { pieces: start..end, devices: devices.clone() });
                grow(pricing, end, &left, cuts, best);
                cuts.pop();
            }
        }
    }
    let mut best = None;
    grow(pricing, 0, &pricing.cluster.machines, &mut Vec::new(), &mut best);
    best
}

/// Any number of pieces from one to twelve, uneven, some with a heavy head, on up to four devices.
fn random_case(stream: &mut Stream) -> (Profile, Cluster, usize) {
    let count = 1 + stream.below(12);
    let uneven = stream.uniform() * 1.5;
    let mut pieces: Vec<PieceProfile> = (0..count)
        .map(|i| {
            let forward = (uneven * stream.normal()).exp();
            let backward = forward * (1.0 + 2.0 * stream.uniform());
            piece(&format!("block {i}"), forward, backward, (uneven * stream.normal()).exp())
        })
        .collect();
    if stream.below(3) == 0 {
        let head = stream.below(2) * (count - 1);
        pieces[head].cost.forward *= count as f64 / 2.0;
        pieces[head].cost.backward_input *= count as f64 / 2.0;
        pieces[head].parameter_bytes *= count as f64;
    }
    let mut profile = profile(pieces);
    profile.rows = 1 + stream.below(8);
    profile.update_per_byte = [0.0, 0.2][stream.below(2)];
    let machines =
        [&[1][..], &[2], &[3], &[4], &[2, 2], &[1, 1], &[3, 1], &[1, 2], &[1, 1, 1], &[2, 1, 1], &[1, 1, 1, 1]];
    // Messages from almost free to as long as the work.
    let speed = 10f64.powf(2.0 * stream.uniform() - 0.5);
    let link = |bytes_per_second: f64, latency: f64| Link { latency, bytes_per_second, handling: 0.0 };
    let inside = Link { handling: [0.0, 0.05][stream.below(2)], ..link(speed, 0.01) };
    let between = link(speed / (1.0 + 9.0 * stream.uniform()), 0.05);
    let mut cluster =
        Cluster { machines: machines[stream.below(machines.len())].to_vec(), inside, between, memory: None };
    let micros = 1 + stream.below(16);
    if stream.below(2) == 0 {
        let all = Pricing::new(&profile, &cluster, micros).stage(0..count, &[1, 0, 0, 0][..cluster.machines.len()]);
        cluster.memory = Some(all.memory(1) * (0.2 + stream.uniform()));
    }
    (profile, cluster, micros)
}

#[test]
fn within_two_percent_of_brute_force() {
    let mut stream = Stream::new(2024, 7);
    let (mut worst, mut sum, mut compared, mut exact): (f64, f64, usize, usize) = (1.0, 0.0, 0, 0);
    let mut simulated = Vec::new();
    for case in 0..400 {
        let (profile, cluster, micros) = random_case(&mut stream);
        let best = brute_force(&Pricing::new(&profile, &cluster, micros));
        match (plan(&profile, &cluster, micros), best) {
            (Ok(plan), Some(best)) => {
                assert!(plan.limit.is_none());
                let ratio = plan.seconds / best.seconds;
                assert!(ratio > 1.0 - 1e-9, "case {case}: {ratio}, below what exists");
                let cuts =
                    |plan: &Plan| plan.stages.iter().map(|s| (s.pieces.clone(), s.devices.clone())).collect::<Vec<_>>();
                let (found, wanted) = (cuts(&plan), cuts(&best));
                assert!(ratio <= 1.02, "case {case}: {ratio} of brute force: {found:?}, {wanted:?}, {cluster:?}");
                let schedule = Schedule::new(Kind::DappleB { cap: 0 }, plan.stages.len(), micros).unwrap();
                simulated.push(simulate(&schedule, &plan.costs(&cluster)).unwrap().seconds / plan.seconds);
                worst = worst.max(ratio);
                sum += ratio;
                compared += 1;
                exact += usize::from(ratio < 1.0 + 1e-9);
            }
            // With fewer micro-batches in flight than policy A there may still be a plan.
            (Ok(plan), None) => assert!(plan.limit.is_some(), "case {case}"),
            (Err(Error::OutOfMemory { .. }), None) => {}
            (found, best) => panic!("case {case}: {found:?} where brute force has {best:?}"),
        }
    }
    simulated.sort_by(f64::total_cmp);
    let [low, middle, high] = [0, simulated.len() / 2, simulated.len() - 1].map(|i| simulated[i]);
    println!("simulated (policy B) over L: {low:.3} to {high:.3}, median {middle:.3}");
    println!("{compared} compared: worst {worst:.4}, mean {:.5}, exact {exact}", sum / compared as f64);
    assert!(compared >= 300);
}

#[test]
fn a_heavy_head_is_planned_far_better_than_an_even_cut() {
    // Twelve blocks and a head that costs as much as six of them, as with a large vocabulary.
    let mut pieces = vec![piece("embedding", 0.1, 0.2, 1.0)];
    pieces.extend((0..12).map(|i| piece(&format!("block {i}"), 1.0, 2.0, 1.0)));
    pieces.push(piece("head", 6.0, 12.0, 1.0));
    let profile = profile(pieces);
    for (devices, micros) in [(2, 8), (4, 8), (4, 16), (4, 32)] {
        let cluster = Cluster::single(devices, Link::FREE);
        let pricing = Pricing::new(&profile, &cluster, micros);
        let count = profile.pieces.len();
        let even = |i: usize| Cut { pieces: i * count / devices..(i + 1) * count / devices, devices: vec![1] };
        let even = Plan::of(&pricing, &(0..devices).map(even).collect::<Vec<_>>(), None);
        // Without replicas: the gain is the cut's.
        let one_row = Profile { rows: 1, ..profile.clone() };
        let planned = plan(&one_row, &cluster, micros).unwrap();
        let steps = |plan: &Plan| {
            let kind = Schedule::new(Kind::OneForwardOneBackward, plan.stages.len(), micros).unwrap();
            simulate(&kind, &plan.costs(&cluster)).unwrap().seconds
        };
        let (predicted, simulated) = (even.seconds / planned.seconds, steps(&even) / steps(&planned));
        println!("{devices} devices, {micros} micro-batches: {predicted:.3} predicted, {simulated:.3} simulated");
        assert!(predicted >= 1.15 && simulated >= 1.15, "{predicted} {simulated} {planned:?}");
    }
}

#[test]
fn the_oracle_of_four_equal_stages() {
    let profile = profile((0..4).map(|i| piece(&format!("block {i}"), 1.0, 2.0, 0.0)).collect());
    let one_row = Profile { rows: 1, ..profile.clone() };
    let found = determine_parallelism(&one_row, &Cluster::single(4, Link::FREE), 8).unwrap();
    assert_eq!((found.plan.seconds, found.plan.printed_seconds, found.plan.stages.len()), (33.0, 33.0, 4));
    assert_eq!(found.plan.stages.iter().map(|s| s.in_flight).collect::<Vec<_>>(), [4, 3, 2, 1]);
    assert_eq!((found.one_device, found.one_is_better), (Some(96.0), false));
    // Zero bubble: the weight gradients fill what 1F1B leaves idle.
    assert!(found.seconds < 33.0 && found.kinds[0].seconds == 33.0, "{:?}", found.kinds);
    // Rows that can be divided and links that are free: replicas have no bubble at all.
    let found = determine_parallelism(&profile, &Cluster::single(4, Link::FREE), 8).unwrap();
    assert_eq!((found.plan.seconds, found.plan.stages.len(), found.plan.devices()), (24.0, 1, 4));
}

#[test]
fn one_device_is_said_to_be_better_where_messages_cost_more_than_they_save() {
    let profile = Profile { rows: 1, ..profile((0..4).map(|i| piece(&format!("block {i}"), 1.0, 2.0, 1.0)).collect()) };
    let slow = Link { latency: 0.0, bytes_per_second: 0.02, handling: 0.0 };
    let found = determine_parallelism(&profile, &Cluster::single(4, slow), 4).unwrap();
    assert!(found.one_is_better && found.plan.devices() == 1 && found.one_device == Some(48.0), "{found:?}");
    // It does not fit on one: two, however slow.
    let memory = Some(16.0 * 4.0 - 1.0 + 8.0 * 4.0);
    let cluster = Cluster { memory, ..Cluster::single(4, slow) };
    let found = determine_parallelism(&profile, &cluster, 4).unwrap();
    assert!(!found.one_is_better && found.one_device.is_none() && found.plan.stages.len() > 1, "{found:?}");
    assert!(found.kinds[found.best].fits);
}

#[test]
fn memory_bounds_the_micro_batches_in_flight() {
    // Parameters 16, activations 8 for each piece; a device holds one piece and one micro-batch, not two.
    let pieces = (0..3).map(|i| piece(&format!("block {i}"), 1.0, 1.0, 1.0)).collect();
    let profile = Profile { rows: 1, ..profile(pieces) };
    let cluster = |memory| Cluster { memory: Some(memory), ..Cluster::single(3, Link::FREE) };
    let tight = determine_parallelism(&profile, &cluster(24.0), 4).unwrap();
    assert_eq!((tight.plan.limit, tight.plan.stages.len()), (Some(1), 3));
    assert_eq!(tight.kinds[tight.best].kind, Kind::DappleA { cap: 1 });
    // One at a time through three stages.
    assert_eq!(tight.seconds, 24.0);
    let roomy = determine_parallelism(&profile, &cluster(1000.0), 4).unwrap();
    assert_eq!(roomy.plan.limit, None);
    assert!(roomy.seconds < tight.seconds);
    let Err(Error::OutOfMemory { requested, cap, .. }) = plan(&profile, &cluster(23.0), 4) else { panic!("fits") };
    assert_eq!((requested, cap), (24, 23));
}

#[test]
fn machines_are_used_as_their_links_suggest() {
    // Large parameters: replicas stay within a machine, whatever is cheaper to send.
    let pieces =
        (0..8).map(|i| PieceProfile { parameter_bytes: 1e9, ..piece(&format!("{i}"), 0.05, 0.1, 1e6) }).collect();
    let profile = profile(pieces);
    let link = |bytes_per_second| Link { latency: 1e-5, bytes_per_second, handling: 0.0 };
    let cluster = Cluster { machines: vec![2, 2], inside: link(25e9), between: link(1e9), memory: None };
    let found = plan(&profile, &cluster, 8).unwrap();
    assert!(found.stages.iter().all(|s| s.devices.iter().filter(|n| **n > 0).count() == 1), "{found:?}");
    assert!(found.devices() == 4 && found.communication > 0.0 && found.update > 0.0);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let good = profile(vec![piece("block", 1.0, 1.0, 1.0)]);
    let cluster = Cluster::single(2, Link::FREE);
    assert!(plan(&good, &cluster, 0).is_err() && plan(&good, &cluster, usize::MAX).is_err());
    assert!(plan(&good, &Cluster::single(65, Link::FREE), 4).is_err());
    assert!(plan(&profile(Vec::new()), &cluster, 4).is_err());
    assert!(plan(&profile(vec![piece("block", f64::NAN, 1.0, 1.0)]), &cluster, 4).is_err());
    // All costs zero is strange, and no reason to fail.
    assert!(determine_parallelism(&profile(vec![piece("block", 0.0, 0.0, 0.0); 3]), &cluster, 4).is_ok());
}

#[test]
fn large_clusters_are_planned() {
    let pieces = (0..50).map(|i| piece(&format!("{i}"), 1.0 + (i % 7) as f64 / 10.0, 2.0, 1.0)).collect();
    let profile = profile(pieces);
    let link = |bytes_per_second| Link { latency: 0.0, bytes_per_second, handling: 0.0 };
    let mut before = f64::INFINITY;
    for machines in [vec![16], vec![4; 4], vec![64], vec![8; 8]] {
        let devices = machines.iter().sum::<usize>();
        let cluster = Cluster { machines, inside: link(50.0), between: link(5.0), memory: None };
        let begun = std::time::Instant::now();
        let found = plan(&profile, &cluster, 64).unwrap();
        println!("{:?}: {:.1} s, {:?}", cluster.machines, found.seconds, begun.elapsed());
        // At least half of what so many devices could do, and never worse than fewer of them on one machine.
        assert!(found.seconds < 2.0 * 64.0 * profile.pieces.len() as f64 * 3.3 / devices as f64, "{found:?}");
        assert!(found.devices() <= devices && found.seconds < before * 1.1);
        before = found.seconds;
    }
}
