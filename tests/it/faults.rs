//! Faults of stages in threads: every one is found and named, and none hangs.

use std::time::{Duration, Instant};

use espalier::Error;
use espalier::nn::{Config, Model};
use espalier::pipeline::executor::{Pipeline, Setup};
use espalier::pipeline::fault::{Injection, Planted};
use espalier::pipeline::{Kind, Work};

use crate::model::cpu;
use crate::stages::{SIZE, STEPS, VOCABULARY, lesson, micros, setup};

/// The last of all messages has none behind it that would show the gap.
#[test]
fn a_lost_last_message_of_the_teacher_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::glm(SIZE, VOCABULARY);
    let lesson = lesson(&cpu(), &[2, 1, 1]);
    let heartbeat = Duration::from_millis(400);
    for (worker, replicas) in [(0, vec![1, 1]), (1, vec![1, 1, 1]), (1, vec![2, 1])] {
        let case = format!("worker {worker} of {replicas:?}");
        // The teacher's micro-batches of a worker are its events while nothing else runs: the last of three, or of one.
        let position = if replicas[0] == 2 { 0 } else { 2 };
        let made = setup(&config, (Kind::OneForwardOneBackward, replicas.len(), 3), replicas, folder.path());
        let planted = vec![Injection { worker, step: 0, position, what: Planted::Drop }];
        let model = Model::init(config.clone(), &cpu(), 3).unwrap();
        let mut pipeline = Pipeline::start(&model, Setup { planted, heartbeat, ..lesson.beside(made) }).unwrap();
        let began = Instant::now();
        let Err(Error::Fault { what, .. }) = pipeline.teach(&lesson.steps[0]) else { panic!("{case}: not found") };
        let took = began.elapsed();
        assert!(what.contains(&format!("lost: worker {worker} ")) && what.contains("Teacher"), "{case}: {what}");
        // The deadline is 20 s.
        assert!(took < 3 * heartbeat + Duration::from_secs(4), "{case}: {took:?}");
    }
}

/// The others notice first, because they wait; what they wait for is at fault.
#[test]
fn a_slow_stage_is_named_and_not_the_one_that_waits_for_it() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::glm(SIZE, VOCABULARY);
    let (heartbeat, deadline) = (Duration::from_millis(400), Duration::from_millis(1200));
    for worker in [1, 2] {
        let mut setup = setup(&config, (Kind::OneForwardOneBackward, 3, 4), vec![1; 3], folder.path());
        let position = places(&setup, worker, &[Work::Backward])[0];
        setup.planted = vec![Injection { worker, step: 0, position, what: Planted::Slow }];
        let model = Model::init(config.clone(), &cpu(), 3).unwrap();
        let mut pipeline = Pipeline::start(&model, Setup { heartbeat, deadline, ..setup }).unwrap();
        let outcome = pipeline.step(&micros(&cpu(), &[1, 2, 1, 1], None), &[], (0.0, 1, STEPS)).map(drop);
        let Err(Error::Fault { stage, position: at, what, .. }) = outcome else { panic!("{outcome:?}") };
        assert_eq!((stage, at), (worker, position), "{what}");
        assert!(what.contains("it is slow: ") && what.contains("did not come within 1.2 s"), "{what}");
    }
}

#[test]
fn the_flight_recorder_names_stages_and_replicas() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::glm(SIZE, VOCABULARY);
    let setup = setup(&config, (Kind::OneForwardOneBackward, 2, 3), vec![2, 1], folder.path());
    let planted = vec![Injection { worker: 1, step: 0, position: 0, what: Planted::Panic }];
    let record = setup.record.clone();
    let model = Model::init(config, &cpu(), 3).unwrap();
    let mut pipeline = Pipeline::start(&model, Setup { planted, ..setup }).unwrap();
    let outcome = pipeline.step(&micros(&cpu(), &[1, 2, 1], None), &[], (0.0, 1, STEPS)).map(drop);
    let Err(Error::Fault { stage: 0, what, .. }) = outcome else { panic!("{outcome:?}") };
    assert!(what.contains("(replica 1)"), "{what}");
    let text = std::fs::read_to_string(record).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let mut places: Vec<_> = lines.map(|l| (l["stage"].as_u64(), l["replica"].as_u64())).collect();
    places.dedup();
    assert_eq!(places, [(Some(0), Some(0)), (Some(0), Some(1)), (Some(1), None)]);
}

/// Positions of a worker's first and last event that does `work`.
pub fn places(setup: &Setup, worker: usize, work: &[Work]) -> Vec<usize> {
    let events = &setup.route.events[worker];
    let found: Vec<usize> = (0..events.len()).filter(|&i| work.contains(&events[i].work)).collect();
    found.first().into_iter().chain(found.last()).copied().collect()
}

/// What a fault's message says of it.
pub fn word(what: Planted) -> &'static str {
    match what {
        Planted::Panic => "panicked: planted",
        Planted::Exit => "gone",
        Planted::Stall | Planted::Freeze => "stalls",
        Planted::Slow => "slow",
        Planted::Drop => "lost",
        Planted::Duplicate => "twice",
        Planted::Corrupt => "corrupted",
    }
}

#[test]
fn every_fault_is_named_and_none_hangs() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::glm(SIZE, VOCABULARY);
    let rows = [1, 2, 1, 1];
    let device = cpu();
    let model = Model::init(config.clone(), &device, 3).unwrap();
    let micros = micros(&device, &rows, None);
    let heartbeat = Duration::from_millis(400);
    let mut injected = 0;
    for worker in 0..4 {
        for what in Planted::ALL {
            let made = || Setup {
                heartbeat,
                slow: heartbeat * 3 / 2,
                ..setup(&config, (Kind::OneForwardOneBackward, 4, 4), vec![1; 4], folder.path())
            };
            let message = matches!(what, Planted::Drop | Planted::Duplicate | Planted::Corrupt);
            let mut positions = if message {
                places(&made(), worker, &[Work::SendForward, Work::SendBackward])
            } else {
                places(&made(), worker, &[Work::Forward, Work::Backward])
            };
            positions.push(made().route.events[worker].len());
            for position in positions {
                let step = (injected % 2) as u64;
                let planted = vec![Injection { worker, step, position, what }];
                let mut pipeline = Pipeline::start(&model, Setup { planted, ..made() }).unwrap();
                let began = Instant::now();
                let mut outcome = Ok(());
                for _ in 0..=step {
                    outcome = pipeline.step(&micros, &[], (0.0, 1, STEPS)).map(drop);
                }
                let case = format!("{what:?} on stage {worker} at {position} of step {step}");
                let Err(Error::Fault { stage, step: at, what: said, event, .. }) = outcome else {
                    panic!("{case}: {outcome:?}");
                };
                assert_eq!(at, step, "{case}: {said}");
                // Two to be named, one for the others to stop, and what a busy machine takes.
                assert!(
                    began.elapsed() < 3 * heartbeat + Duration::from_secs(4),
                    "{case}: {:?}, {said}",
                    began.elapsed()
                );
                // What is wrong with a message is seen by its receiver, who names the sender.
                let named = if message { said.contains(&format!("worker {worker}")) } else { stage == worker };
                assert!(named, "{case}: stage {stage} at {event}: {said}");
                assert!(said.contains(word(what)), "{case}: {said}");
                let record = std::fs::read_to_string(folder.path().join("flight-recorder.jsonl")).unwrap();
                for stage in 0..4 {
                    assert!(record.contains(&format!("\"stage\":{stage},")), "{case}: stage {stage} left no record");
                }
                assert!(pipeline.step(&micros, &[], (0.0, 1, STEPS)).is_err(), "{case}: it goes on");
                injected += 1;
            }
        }
    }
    assert!(injected >= 64, "{injected}");
}

/// A stage that hangs in its driver cannot be stopped. It is named and recorded before it is waited for, and waited for once.
#[test]
fn one_that_cannot_be_stopped_is_named_all_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::glm(SIZE, VOCABULARY);
    let model = Model::init(config.clone(), &cpu(), 3).unwrap();
    let heartbeat = Duration::from_millis(400);
    let planted = vec![Injection { worker: 1, step: 0, position: 1, what: Planted::Freeze }];
    let setup = setup(&config, (Kind::OneForwardOneBackward, 3, 4), vec![1; 3], folder.path());
    let record = setup.record.clone();
    let mut pipeline = Pipeline::start(&model, Setup { heartbeat, planted, ..setup }).unwrap();
    let watched = record.clone();
    let recorded = std::thread::spawn(move || {
        let began = Instant::now();
        while !watched.exists() && began.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(5));
        }
        Instant::now()
    });
    let outcome = pipeline.step(&micros(&cpu(), &[1, 2, 1, 1], None), &[], (0.0, 1, STEPS)).map(drop);
    let named = Instant::now();
    let Err(Error::Fault { stage: 1, what: said, .. }) = outcome else { panic!("{outcome:?}") };
    assert!(said.contains("stalls"), "{said}");
    let before = named.saturating_duration_since(recorded.join().unwrap());
    assert!(before > heartbeat, "recorded {before:?} before the hanging stage was given up");
    let began = Instant::now();
    drop(pipeline);
    assert!(began.elapsed() < heartbeat, "it is waited for again: {:?}", began.elapsed());
}
