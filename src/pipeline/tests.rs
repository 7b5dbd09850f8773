//! Published orders against their published properties.

use super::*;
use crate::error::Error;

fn timeline(kind: Kind, stages: usize, micros: usize, (f, b, w): (f64, f64, f64)) -> Timeline {
    let schedule = Schedule::new(kind, stages, micros).unwrap();
    // Chunks of one stage share its time.
    let share = (kind.chunks(stages) / stages) as f64;
    let mut costs = Costs::uniform(kind.chunks(stages), f / share, b / share, w / share);
    costs.chunks.iter_mut().for_each(|c| c.activation_bytes = 1.0 / share);
    simulate(&schedule, &costs).unwrap()
}

fn close(a: f64, b: f64) -> bool {
    (a - b).abs() <= 1e-9 * b.abs().max(1.0)
}

#[test]
fn every_kind_is_legal_for_all_small_sizes() {
    for kind in Kind::ALL.into_iter().chain([Kind::Interleaved { chunks: 3 }, Kind::DappleB { cap: 3 }]) {
        for stages in 1..=8 {
            for micros in 1..=16 {
                let schedule = Schedule::new(kind, stages, micros).unwrap();
                let peaks = validate(&schedule).unwrap_or_else(|e| panic!("{kind}, {stages} stages, {micros}: {e}"));
                assert_eq!(validate(&schedule.with_messages()).unwrap(), peaks);
                // Gradients are summed in the order of the micro-batches, whatever the kind.
                for chunk in 0..schedule.chunks() as u32 {
                    let order: Vec<u32> = schedule.stages[schedule.homes[chunk as usize]]
                        .iter()
                        .filter(|e| e.chunk == chunk && matches!(e.work, Work::Backward | Work::BackwardWeight))
                        .map(|e| e.micro)
                        .collect();
                    assert!(order.is_sorted(), "{kind}, {stages} stages, {micros} micro-batches");
                }
            }
        }
    }
}

#[test]
fn bubbles_are_the_published_ones() {
    for (f, b, w) in [(1.0, 1.0, 1.0), (1.0, 1.5, 0.5), (0.7, 1.1, 0.9)] {
        for p in 1..=8 {
            for m in 1..=16 {
                let all = f + b + w;
                let (work, bubble) = (m as f64 * all, (p - 1) as f64 * all);
                let case = format!("{p} stages, {m} micro-batches, {f} {b} {w}");
                assert!(close(timeline(Kind::Sequential, p, m, (f, b, w)).seconds, work * p as f64), "{case}");
                let fraction = (p - 1) as f64 / (m + p - 1) as f64;
                for kind in [Kind::GPipe, Kind::OneForwardOneBackward, Kind::DappleA { cap: 0 }] {
                    let t = timeline(kind, p, m, (f, b, w));
                    assert!(close(t.seconds, work + bubble), "{kind}, {case}: {}", t.seconds);
                    assert!(close(t.idle_share(), fraction), "{kind}, {case}");
                }
                for chunks in [2, 3] {
                    if m % p == 0 {
                        let t = timeline(Kind::Interleaved { chunks }, p, m, (f, b, w));
                        assert!(
                            close(t.seconds, work + bubble / chunks as f64),
                            "interleaved {chunks}, {case}: {}",
                            t.seconds
                        );
                        let fraction = (p - 1) as f64 / (chunks * m + p - 1) as f64;
                        assert!(close(t.idle_share(), fraction), "interleaved {chunks}, {case}");
                    }
                }
            }
        }
    }
    // The zero-bubble papers' figures hold for F = B = W.
    for p in 1..=8usize {
        for m in p..=20 {
            let t = timeline(Kind::ZeroBubbleH1, p, m, (1.0, 1.0, 1.0));
            assert!(close(t.seconds, (3 * m + p - 1) as f64), "zb-h1, {p} stages, {m}: {}", t.seconds);
        }
        for m in 2 * p..=24 {
            let h2 = timeline(Kind::ZeroBubbleH2, p, m, (1.0, 1.0, 1.0));
            assert!(close(h2.inner_bubble(), 0.0), "zb-h2, {p} stages, {m}: {}", h2.inner_bubble());
            let v = timeline(Kind::ZeroBubbleV, p, m, (1.0, 1.0, 1.0));
            assert!(close(v.inner_bubble(), 0.0), "zb-v, {p} stages, {m}: {}", v.inner_bubble());
        }
        // Half and two thirds of 1F1B's 6 (p - 1) at most, in chunks' units; three, six .. stages of the least memory turn
        // later to keep their pace and wait for one unit more.
        for m in 2 * p..=24 {
            let bubble = |kind| 2.0 * (timeline(kind, p, m, (1.0, 1.0, 1.0)).seconds - 3.0 * m as f64);
            let (half, least) = ([0, 2, 5, 7, 11, 13, 17, 19][p - 1], [0, 3, 9, 11, 15, 21, 23, 27][p - 1]);
            assert!(half <= 3 * (p - 1) && least <= 4 * (p - 1) + usize::from(p % 3 == 0));
            assert!(close(bubble(Kind::VHalf), half as f64), "v-half, {p} stages, {m}: {}", bubble(Kind::VHalf));
            assert!(close(bubble(Kind::VMin), least as f64), "v-min, {p} stages, {m}: {}", bubble(Kind::VMin));
        }
    }
}

#[test]
fn activations_are_the_published_ones() {
    for p in 1..=8usize {
        for m in 1..=24usize {
            let of = |kind| timeline(kind, p, m, (1.0, 1.0, 1.0)).stages;
            for (i, s) in of(Kind::GPipe).iter().enumerate() {
                assert_eq!(s.peak_activations, m, "stage {i}");
            }
            for kind in [Kind::OneForwardOneBackward, Kind::DappleA { cap: 0 }] {
                for (i, s) in of(kind).iter().enumerate() {
                    assert_eq!(s.peak_activations, m.min(p - i), "stage {i}");
                }
            }
            for (i, s) in of(Kind::DappleB { cap: 0 }).iter().enumerate() {
                assert_eq!(s.peak_activations, m.min(2 * (p - i) - 1), "stage {i}");
            }
            let most = |kind| of(kind).iter().map(|s| s.peak_activation_bytes).fold(0.0, f64::max);
            assert!(most(Kind::ZeroBubbleH1) <= p as f64);
            assert!(most(Kind::ZeroBubbleH2) <= (2 * p - 1) as f64);
            assert!(most(Kind::ZeroBubbleV) <= p as f64);
            assert!(most(Kind::VHalf) <= ((p + 2) / 2) as f64);
            assert!(most(Kind::VMin) <= ((p + 4) / 3) as f64);
            if m >= 2 * p - 1 {
                assert_eq!(most(Kind::ZeroBubbleH1), p as f64);
                assert_eq!(most(Kind::ZeroBubbleH2), (2 * p - 1) as f64);
                assert_eq!(most(Kind::ZeroBubbleV), p as f64);
                assert_eq!(most(Kind::VHalf), ((p + 2) / 2) as f64);
                assert_eq!(most(Kind::VMin), ((p + 4) / 3) as f64);
            }
            if m % p == 0 && m > p {
                for v in [2, 3] {
                    let factor = 1.0 + (p - 1) as f64 / (p * v) as f64;
                    assert!(close(most(Kind::Interleaved { chunks: v }), p as f64 * factor), "{p} {m} {v}");
                }
            }
        }
    }
}

/// The pipeline lines of the oracle list: S = 4, M = 8, F = 1, B = 2.
#[test]
fn the_oracle_of_four_stages_and_eight_micro_batches() {
    for kind in [Kind::GPipe, Kind::OneForwardOneBackward] {
        let t = timeline(kind, 4, 8, (1.0, 1.0, 1.0));
        assert_eq!(t.seconds, 33.0);
        assert!(close(t.idle_share(), 9.0 / 33.0));
    }
    let ahead = |kind| -> Vec<usize> {
        let schedule = Schedule::new(kind, 4, 8).unwrap();
        schedule.stages.iter().map(|s| s.iter().take_while(|e| e.work == Work::Forward).count()).collect()
    };
    assert_eq!(ahead(Kind::DappleA { cap: 0 }), [4, 3, 2, 1]);
    assert_eq!(ahead(Kind::DappleB { cap: 7 }), [7, 5, 3, 1]);
    assert_eq!(ahead(Kind::DappleB { cap: 4 }), [4, 4, 3, 1]);
}

#[test]
fn thousand_stages_take_seconds() {
    let schedule = Schedule::new(Kind::OneForwardOneBackward, 1000, 1000).unwrap();
    let t = simulate::simulate_as(&schedule, &Costs::uniform(1000, 1.0, 1.0, 1.0), false).unwrap();
    assert_eq!(t.seconds, 3.0 * 1999.0);
}

#[test]
fn planted_faults_are_refused_with_the_reason() {
    let good = || Schedule::new(Kind::OneForwardOneBackward, 3, 4).unwrap();
    let refused = |change: &dyn Fn(&mut Schedule), part: &str| {
        let mut schedule = good();
        change(&mut schedule);
        let Err(Error::Schedule { rule, .. }) = validate(&schedule) else { panic!("{part}: not refused") };
        assert!(rule.contains(part), "{rule} where {part} was meant");
    };
    refused(
        &|s| {
            s.stages[1].remove(2);
        },
        "has forward and backward",
    );
    refused(&|s| s.stages[1].swap(0, 7), "comes after forward");
    refused(&|s| s.stages[2][2] = s.stages[2][0], "twice");
    refused(&|s| s.stages[0][1].micro = 9, "4 micro-batches");
    refused(&|s| s.stages[0][1].chunk = 2, "own stage");
    refused(&|s| s.stages.clear(), "at least one stage");
    // Stage 0 wants micro-batch 0 back before it gives out number 1, stage 1 takes number 1 first.
    let late = |s: &mut Schedule| {
        *s = Schedule::new(Kind::OneForwardOneBackward, 2, 2).unwrap();
        s.stages[0] = [(Work::Forward, 0), (Work::Backward, 0), (Work::Forward, 1), (Work::Backward, 1)]
            .map(|(work, micro)| Event { work, chunk: 0, micro })
            .to_vec();
        s.stages[1] = [(Work::Forward, 1), (Work::Forward, 0), (Work::Backward, 0), (Work::Backward, 1)]
            .map(|(work, micro)| Event { work, chunk: 1, micro })
            .to_vec();
    };
    refused(&late, "deadlock");
    let with_messages = |change: &dyn Fn(&mut Schedule), part: &str| {
        let lower = |s: &mut Schedule| {
            *s = s.with_messages();
            change(s);
        };
        refused(&lower, part);
    };
    let position = |s: &Schedule, stage: usize, work| s.stages[stage].iter().position(|e| e.work == work).unwrap();
    let without = |stage: usize, work: Work| {
        move |s: &mut Schedule| {
            let at = position(s, stage, work);
            s.stages[stage].remove(at);
        }
    };
    with_messages(&without(0, Work::SendForward), "deadlock");
    with_messages(&without(1, Work::ReceiveForward), "received before");
    let twice = |s: &mut Schedule| {
        let again = s.stages[0][position(s, 0, Work::SendForward)];
        s.stages[0].push(again);
    };
    with_messages(&twice, "sent twice");
    let early = |s: &mut Schedule| {
        let at = position(s, 2, Work::SendBackward);
        s.stages[2].swap(at, at - 1);
    };
    with_messages(&early, "computed before");
    let again = |s: &mut Schedule| {
        let at = position(s, 1, Work::ReceiveForward);
        let received = s.stages[1][at];
        s.stages[1].insert(at, received);
    };
    with_messages(&again, "received twice");
}

#[test]
fn names_come_back() {
    for kind in Kind::ALL.into_iter().chain([Kind::Interleaved { chunks: 5 }, Kind::DappleA { cap: 3 }]) {
        assert_eq!(kind.to_string().parse(), Ok(kind));
    }
    assert!("interleaved:0".parse::<Kind>().is_err() && "zb".parse::<Kind>().is_err());
    for work in Work::ALL {
        let event = Event { work, chunk: 12, micro: 345 };
        assert_eq!(event.to_string().parse(), Ok(event));
    }
    for wrong in ["", "F", "0F", "F1", "0X1", "99999999999F0", "0F-1"] {
        assert!(wrong.parse::<Event>().is_err(), "{wrong}");
    }
}

/// In a V the middle stage sends forward to both neighbours: each way is a link of its own.
#[test]
fn every_pair_of_stages_has_a_link_of_its_own() {
    let chunks = [0, 1, 2, 2, 1, 0];
    let forward = |stage: usize| {
        let own = (0..6).filter(move |c| chunks[*c] == stage).map(|c| c as u32);
        own.clone()
            .flat_map(|chunk| (0..2).map(move |micro| Event { work: Work::Forward, chunk, micro }))
            .chain(own.rev().flat_map(|chunk| (0..2).map(move |micro| Event { work: Work::Backward, chunk, micro })))
            .collect::<Vec<_>>()
    };
    let schedule =
        Schedule { name: "v".into(), stages: (0..3).map(forward).collect(), homes: chunks.to_vec(), micros: 2 };
    let mut costs = Costs::uniform(6, 1.0, 1.0, 1.0);
    costs.link = Link { latency: 0.0, bytes_per_second: 1.0, handling: 0.0 };
    costs.chunks.iter_mut().for_each(|c| c.output_bytes = 10.0);
    let timeline = simulate(&schedule, &costs).unwrap();
    let span =
        |stage: usize, name: &str| *timeline.spans[stage].iter().find(|s| s.activity.to_string() == name).unwrap();
    // Down the V: 1 s of work and 10 s of message for each of two links, the second micro-batch 10 s behind the first.
    assert_eq!((span(1, "1F0").start, span(2, "2F0").start), (11.0, 22.0));
    assert_eq!((span(1, "1F1").start, span(2, "2F1").start), (21.0, 32.0));
    // And up again: chunk 4 of micro-batch 0 waits for chunk 3's message alone.
    assert_eq!(span(1, "4F0").start, span(2, "3F0").end + 10.0);
    assert_eq!(span(0, "5F0").start, span(1, "4F0").end + 10.0);
}

/// Two workers of a stage take its micro-batches in turns: it is as fast as one twice its speed, and each of them has a row.
#[test]
fn replicas_are_rows_of_their_own() {
    let schedule = Schedule::new(Kind::OneForwardOneBackward, 2, 8).unwrap();
    let mut costs = Costs::uniform(2, 1.0, 1.0, 1.0);
    costs.chunks[1] = ChunkCost { forward: 2.0, backward_input: 2.0, backward_weight: 2.0, ..costs.chunks[1] };
    costs.updates = vec![1.0, 3.0];
    let one = simulate::simulate_replicas(&schedule, &[1, 1], &costs, true).unwrap();
    assert_eq!(one, simulate(&schedule, &costs).unwrap());
    let two = simulate::simulate_replicas(&schedule, &[1, 2], &costs, true).unwrap();
    let rows: Vec<String> = two.workers.iter().map(ToString::to_string).collect();
    assert_eq!(rows, ["stage 0", "stage 1 replica 0", "stage 1 replica 1"]);
    for (replica, spans) in two.spans[1..].iter().enumerate() {
        let micros = spans.iter().filter_map(|s| s.activity.event());
        assert!(micros.clone().all(|e| e.micro as usize % 2 == replica) && micros.count() == 8);
    }
    // 8 micro-batches of 3 s on stage 0, 4 of 6 s on each replica, and the updates of all three.
    let busy: Vec<f64> = two.stages.iter().map(|s| s.busy).collect();
    assert_eq!(busy, [25.0, 27.0, 27.0]);
    assert!(close(two.idle_share(), 1.0 - 79.0 / (3.0 * two.seconds)));
    assert!(two.seconds < 0.8 * one.seconds, "{} with two, {} with one", two.seconds, one.seconds);
    assert!(two.stages[1].last == two.stages[2].last, "replicas update together");
    assert!(simulate::simulate_replicas(&schedule, &[1, 0], &costs, true).is_err());
}
