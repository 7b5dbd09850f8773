//! Tensors between stages by roads of the devices' own. The road here is a queue in memory with NCCL's rules: one way, the same
//! sizes in the same order at both ends. NCCL itself needs GPUs.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use espalier::device::road::{End, Road, Ticket};
use espalier::device::{self, Buffer, Device};
use espalier::nn::{Config, Model};
use espalier::pipeline::direct::Direct;
use espalier::pipeline::executor::{Pipeline, Setup};
use espalier::pipeline::fault::{Injection, Planted};
use espalier::pipeline::{Kind, Work};
use espalier::{Error, Result};

use crate::faults::{places, word};
use crate::model::cpu;
use crate::stages::{self, SIZE, STEPS, VOCABULARY};

#[derive(Default)]
struct Way {
    queued: Mutex<VecDeque<Vec<u8>>>,
    came: Condvar,
    /// Bytes that have gone over it, and the ends that were made.
    used: Mutex<(usize, Vec<End>)>,
}

struct QueueRoad {
    device: Arc<dyn Device>,
    way: Arc<Way>,
    end: End,
}

impl Road for QueueRoad {
    fn send(&mut self, source: &Buffer, offset: usize, bytes: usize) -> Result<()> {
        assert_eq!(self.end, End::Sends);
        let mut content = vec![0; bytes];
        self.device.download(source, offset, &mut content)?;
        self.way.used.lock().unwrap().0 += bytes;
        self.way.queued.lock().unwrap().push_back(content);
        self.way.came.notify_one();
        Ok(())
    }

    fn receive(&mut self, target: &Buffer, offset: usize, bytes: usize) -> Result<()> {
        assert_eq!(self.end, End::Receives);
        let queued = self.way.queued.lock().unwrap();
        let limit = Duration::from_secs(20);
        let (mut queued, late) = self.way.came.wait_timeout_while(queued, limit, |q| q.is_empty()).unwrap();
        assert!(!late.timed_out(), "announced, but it does not come");
        let content = queued.pop_front().unwrap();
        assert_eq!(content.len(), bytes, "both ends queue the same sizes");
        self.device.upload(target, offset, &content)
    }
}

type Ways = Arc<BTreeMap<Vec<u8>, Arc<Way>>>;

/// A setup whose tensors go by roads, and these.
fn by_roads(setup: Setup) -> (Setup, Ways) {
    let number = std::cell::Cell::new(0u8);
    let ticket = || {
        number.set(number.get() + 1);
        Ok(Ticket(vec![number.get(); 128]))
    };
    let tickets = Direct::along(&setup.route, ticket).unwrap();
    let ways: Ways = Arc::new(tickets.values().map(|t| (t.0.clone(), Arc::default())).collect());
    let laid = ways.clone();
    let lay = move |device: &Arc<dyn Device>, ticket: &Ticket, end: End| -> Result<Box<dyn Road>> {
        let way = laid[&ticket.0].clone();
        way.used.lock().unwrap().1.push(end);
        Ok(Box::new(QueueRoad { device: device.clone(), way, end }))
    };
    (Setup { direct: Some(Direct { tickets, lay: Arc::new(lay) }), ..setup }, ways)
}

#[test]
fn roads_change_no_bit() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::glm(SIZE, VOCABULARY);
    for (kind, stages, replicas, rows) in [
        (Kind::OneForwardOneBackward, 4, vec![1; 4], vec![1, 2, 1, 2, 1]),
        (Kind::Interleaved { chunks: 2 }, 2, vec![1; 2], vec![2, 1, 1, 2]),
        (Kind::ZeroBubbleV, 3, vec![1; 3], vec![2, 1, 1, 2]),
        (Kind::GPipe, 3, vec![1, 3, 2], vec![1, 2, 1, 1, 2, 1]),
    ] {
        let made = || stages::setup(&config, (kind, stages, rows.len()), replicas.clone(), folder.path());
        let want = stages::in_stages(&config, made(), &rows, None, 0.1);
        let (setup, ways) = by_roads(made());
        let have = stages::in_stages(&config, setup, &rows, None, 0.1);
        let case = format!("{kind}, replicas {replicas:?}");
        stages::assert_equal_bits(&want, &have, &case);
        for way in ways.values() {
            let (bytes, mut ends) = way.used.lock().unwrap().clone();
            ends.sort_by_key(|end| *end == End::Receives);
            assert_eq!(ends, [End::Sends, End::Receives], "{case}");
            assert!(way.queued.lock().unwrap().is_empty(), "{case}: sent and not taken");
            // A chain has no way from its last stage to its first, and replicas may have no micro-batch in common.
            assert!(bytes > 0 || replicas.iter().any(|r| *r > 1), "{case}: a road that nothing goes over");
        }
    }
}

#[test]
fn what_goes_wrong_on_the_way_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::glm(SIZE, VOCABULARY);
    let model = Model::init(config.clone(), &cpu(), 3).unwrap();
    let micros = stages::micros(&cpu(), &[1, 2, 1, 1], None);
    for what in [Planted::Drop, Planted::Duplicate, Planted::Corrupt] {
        for worker in 0..3 {
            let made = || {
                let heartbeat = Duration::from_millis(400);
                let setup = stages::setup(&config, (Kind::OneForwardOneBackward, 3, 4), vec![1; 3], folder.path());
                Setup { heartbeat, ..by_roads(setup).0 }
            };
            let position = places(&made(), worker, &[Work::SendForward, Work::SendBackward])[0];
            let planted = vec![Injection { worker, step: 0, position, what }];
            let mut pipeline = Pipeline::start(&model, Setup { planted, ..made() }).unwrap();
            let outcome = pipeline.step(&micros, &[], (0.0, 1, STEPS)).map(drop);
            let Err(Error::Fault { what: said, .. }) = outcome else {
                panic!("{what:?} of worker {worker}: {outcome:?}");
            };
            assert!(said.contains(word(what)) && said.contains(&format!("worker {worker}")), "{what:?}: {said}");
        }
    }
}

#[test]
fn devices_without_roads_say_so() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::glm(SIZE, VOCABULARY);
    let model = Model::init(config.clone(), &cpu(), 3).unwrap();
    let setup = stages::setup(&config, (Kind::GPipe, 2, 2), vec![1; 2], folder.path());
    let tickets = Direct::along(&setup.route, || Ok(Ticket(vec![0; 128]))).unwrap();
    let Err(error) = Pipeline::start(&model, Setup { direct: Some(Direct::new(tickets)), ..setup }) else {
        panic!("a CPU has no NCCL");
    };
    assert!(error.to_string().contains("NCCL"), "{error}");
    match device::cuda::ticket() {
        Ok(ticket) => assert_eq!(ticket.0.len(), 128),
        Err(error) => assert!(error.to_string().contains("nccl"), "{error}"),
    }
}
