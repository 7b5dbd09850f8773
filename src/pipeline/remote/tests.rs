//! Ranks without MPI: letters carried by threads.

use std::sync::mpsc::{Receiver, channel};

use super::*;
use crate::device;
use crate::nn::config::Size;
use crate::nn::pieces;
use crate::nn::{Batch, Config};
use crate::pipeline::part::Training;
use crate::pipeline::post::Letter;
use crate::pipeline::route::Route;
use crate::pipeline::worker::Order;
use crate::pipeline::{Kind, Schedule, cut, rank};
use crate::tensor::Tensor;
use crate::train::lifecycle::Micro;
use crate::train::schedule::{Schedule as Rates, Shape};

const SIZE: Size = Size { layers: 2, heads: 1, head_size: 8, ffn_width: 16, max_positions: 16 };

fn setup(config: &Config, stages: usize) -> Setup {
    let schedule = Schedule::new(Kind::OneForwardOneBackward, stages, 2).unwrap();
    let cuts = cut::even(pieces::pieces(config), stages);
    let peak = Rates { peak: 1e-3, warmup: 1, shape: Shape::Constant };
    let precision = crate::train::precision::Precision::F32;
    Setup {
        route: Arc::new(Route::new(config, &schedule, cuts, vec![1; stages]).unwrap()),
        kind: None,
        devices: vec![device::open("cpu:1").unwrap()],
        optimizer: crate::train::optimizer::Settings {
            schedule: peak,
            rule: Default::default(),
            weight_decay: 0.0,
            clip: 0.0,
            precision,
        },
        methods: Arc::new(|_: &Model| Ok(Vec::new())),
        teacher: None,
        direct: None,
        recompute: false,
        heartbeat: Duration::from_secs(5),
        deadline: Duration::from_secs(20),
        slow: Duration::from_secs(20),
        run: "test".into(),
        record: "unused".into(),
        planted: Vec::new(),
        timed: None,
    }
}

/// Delivers what `from` sends into `queue` until the way is closed.
fn carry(from: usize, queue: Receiver<Letter>, inbox: crate::pipeline::post::Inbox) -> JoinHandle<()> {
    std::thread::spawn(move || {
        while let Ok(letter) = queue.recv() {
            inbox.deliver(Letter { rank: from, ..letter });
        }
    })
}

#[test]
fn ranks_are_told_when_another_one_cannot_start() {
    let config = Config::glm(SIZE, 37);
    let model = Model::init(config.clone(), &device::open("cpu:1").unwrap(), 1).unwrap();
    let (queues, mut ends): (Vec<_>, Vec<_>) = (0..3).map(|_| channel()).unzip();
    let (back, answers) = channel();
    let (first, inbox) = Post::new(0, queues);
    let (second, seconds_inbox) = Post::new(1, vec![back, channel().0, channel().0]);
    // Nobody takes letters to the third any more.
    drop(ends.remove(2));
    let carriers = [carry(0, ends.remove(1), seconds_inbox), carry(1, answers, inbox)];
    let served = std::thread::spawn(move || {
        let served = rank::serve(
            &Arc::new(second),
            &(Arc::new(|_: &_, _: &_| Ok(Vec::new())) as Arc<rank::Make>),
            Duration::from_secs(20),
        );
        served.map_err(|e| e.to_string())
    });
    let first = Arc::new(first);
    let across =
        Across { post: first.clone(), devices: vec!["cpu:1".into(); 3], named: true, methods: Described::default() };
    let setup = setup(&config, 3);
    let watch = Arc::new(Watch::new(&setup.route.replicas));
    let failed = Ranks::start(&model, &setup, &across, 7, &watch, channel().0).err().unwrap();
    assert!(failed.to_string().contains("rank 2"), "{failed}");
    assert!(first.has_lost());
    // The second had started, and has stopped.
    let mut heard = Vec::new();
    let mut stopped = false;
    let began = Instant::now();
    while !stopped && began.elapsed() < Duration::from_secs(10) {
        let Some(letter) = first.control(Duration::from_millis(50)) else { continue };
        let (word, _) = packet::decode::<Word>(&letter.bytes).unwrap();
        stopped = matches!(word, Word::Stopped);
        heard.push(format!("{word:?}"));
    }
    assert!(stopped && heard.iter().any(|word| word == "Ready"), "{heard:?}");
    first.send(1, Lane::Control, 0, words::plain(&Word::End(5)).unwrap());
    assert_eq!(served.join().unwrap(), Ok(5));
    first.close();
    drop((across, first));
    carriers.into_iter().for_each(|carrier| carrier.join().unwrap());
}

#[test]
fn a_worker_is_sent_what_it_reads() {
    let config = Config::glm(SIZE, 37);
    let setup = setup(&config, 4);
    let device = device::open("cpu:1").unwrap();
    let rows = |value: u32| Tensor::from_slice(&device, &[2, 8], &[value; 16]).unwrap();
    let micro = Micro {
        batch: Batch {
            tokens: rows(1),
            positions: rows(2),
            block_positions: Some(rows(3)),
            context: Some(Tensor::from_slice(&device, &[2], &[4u32; 2]).unwrap()),
            lengths: Some(Tensor::from_slice(&device, &[2], &[8u32; 2]).unwrap()),
            source: None,
        },
        targets: Tensor::from_slice(&device, &[16], &[6u32; 16]).unwrap(),
        weights: Tensor::from_slice(&device, &[16], &[1.0f32; 16]).unwrap(),
        weight: 16.0,
        gold: true,
        tokens: 16,
        teacher: None,
    };
    let training = Training { compute: None, dropout: 0.0, seed: 0, recompute: false, split: false };
    let order = Order { training, weight: 1.0, total_steps: 1, timed: false };
    let command = Command::Step(setup.route.clone(), Arc::new(vec![micro; 2]), Arc::default(), order);
    let sent = |worker: usize| {
        let reads = Reads::of(&config, setup.route.chunks_of(worker).values());
        let (word, tensors) =
            packet::decode::<Word>(&words::of_command(&command, worker, reads, |_| true).unwrap()).unwrap();
        let Word::Step { micros, .. } = word else { panic!("{word:?}") };
        let micros = words::micros_of(&micros, &tensors, &device).unwrap();
        assert!(micros.len() == 2 && micros[1].weight == 16.0);
        tensors.iter().map(|(_, bytes)| bytes.len()).collect::<Vec<usize>>()
    };
    assert_eq!(sent(0), [64; 2]);
    assert_eq!(sent(1), [64, 64, 8, 8, 64, 64, 8, 8]);
    assert_eq!(sent(2), sent(1));
    assert_eq!(sent(3), [64; 4]);
}
