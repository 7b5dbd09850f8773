//! The controller's side of workers in other processes: starts them, passes orders on, takes in answers and signs of life.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::executor::Setup;
use super::life::{Answer, Command, Encoded};
use super::packet;
use super::part::Part;
use super::post::{ALIVE_EVERY, GENERATIONS, Lane, Post};
use super::reads::Reads;
use super::watch::Watch;
use super::words::{self, Described, Start, Word};
use super::worker::Stop;
use crate::error::{Error, Result};
use crate::nn::Model;
use crate::train::trainer;

/// Where a pipeline's workers but the first run: worker n in the process of rank n.
#[derive(Clone)]
pub struct Across {
    pub post: Arc<Post>,
    /// Of all workers, by their command-line names.
    pub devices: Vec<String>,
    pub methods: Described,
}

/// Pipelines that this process has started: their letters must not be mixed up.
static STARTED: AtomicU32 = AtomicU32::new(0);

/// Silence after which a process counts as gone when the run is being stopped: a launcher that lost a process gives the
/// others a second.
const HURRIED: Duration = Duration::from_millis(500);

/// How long the others may take to stop then.
const HURRIED_STOP: Duration = Duration::from_millis(100);

/// Silence after which a process is not waited for when the program ends.
const DEAD: Duration = Duration::from_secs(3);

/// How often a worker shows what it is at.
pub(super) fn show_every(heartbeat: Duration) -> Duration {
    (heartbeat / 8).clamp(Duration::from_millis(5), Duration::from_millis(250))
}

/// Shows one worker to the other processes.
pub(super) struct Shown {
    pub post: Arc<Post>,
    pub generation: u32,
    pub watch: Arc<Watch>,
    pub worker: usize,
    /// Processes of the pipeline.
    pub count: usize,
    /// Events that rank 0 knows.
    pub told: Mutex<u64>,
}

impl Shown {
    /// To the controller, with the events since the last time; and to the others.
    pub fn show(&self) -> Result<()> {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let glance = self.watch.glance(self.worker);
        let bare = words::plain(&Word::Seen(glance.clone(), Vec::new()))?;
        for other in (1..self.count).filter(|&other| other != self.worker) {
            self.post.send(other, Lane::Control, self.generation, bare.clone());
        }
        if self.worker > 0 {
            let full = words::plain(&Word::Seen(glance, self.watch.records_since(self.worker, &mut told)))?;
            self.post.send(0, Lane::Control, self.generation, full);
        }
        Ok(())
    }
}

/// The workers of a pipeline that are in other processes.
pub(super) struct Ranks {
    post: Arc<Post>,
    generation: u32,
    count: usize,
    limit: Duration,
    /// Which of them have ended in good order.
    ended: Arc<Vec<AtomicBool>>,
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
    /// Of each worker.
    reads: Vec<Reads>,
}

/// A number for the next pipeline.
pub(super) fn number() -> u32 {
    STARTED.fetch_add(1, Relaxed) % GENERATIONS
}

impl Ranks {
    /// Starts workers 1 and on of `setup`'s route on their ranks. Where one of them cannot be started the others are told to
    /// stop, and why.
    ///
    /// # Errors
    /// `Parameter` for too few ranks or devices, `DeviceLost` for a rank that is not to be reached, those of the model.
    pub fn start(
        model: &Model,
        setup: &Setup,
        across: &Across,
        generation: u32,
        watch: &Arc<Watch>,
        answer: Sender<(usize, Answer)>,
    ) -> Result<Self> {
        let (post, route) = (across.post.clone(), &setup.route);
        let count = route.workers.len();
        if count > post.ranks() || across.devices.len() != count {
            let value = format!("{count} workers, {} devices on {} ranks", across.devices.len(), post.ranks());
            let allowed = "at most one worker per rank and a device for each";
            return Err(Error::Parameter { op: "pipeline", parameter: "workers", value, allowed });
        }
        let reads = |rank| Reads::of(&model.config, route.chunks_of(rank).values());
        let shown = Shown { post, generation, watch: watch.clone(), worker: 0, count, told: Mutex::new(0) };
        let mut ranks = Self {
            post: across.post.clone(),
            generation,
            count,
            limit: (2 * setup.heartbeat).max(5 * ALIVE_EVERY),
            ended: Arc::new((0..count).map(|_| AtomicBool::new(false)).collect()),
            stop: Arc::default(),
            reader: None,
            reads: (0..count).map(reads).collect(),
        };
        let started = (1..count).try_for_each(|rank| ranks.begin(model, setup, across, rank)).and_then(|()| {
            let (every, over, done) = (show_every(setup.heartbeat), ranks.stop.clone(), ranks.ended.clone());
            let read = move || read(&shown, every, &answer, &done, &over);
            let reader = std::thread::Builder::new().name("espalier-ranks".into()).spawn(read);
            reader.map_err(|e| Error::io("ranks thread", e))
        });
        match started {
            Ok(reader) => ranks.reader = Some(reader),
            Err(e) => {
                ranks.stop(Some(format!("error[{}]: {e}", e.code())));
                return Err(e);
            }
        }
        Ok(ranks)
    }

    fn begin(&self, model: &Model, setup: &Setup, across: &Across, rank: usize) -> Result<()> {
        let route = &setup.route;
        let part = Part::model_of(model, model.device(), &route.chunks_of(rank))?;
        let mut tensors = Encoded::new();
        for (name, tensor) in &part.tensors {
            tensors.insert(name.clone(), (tensor.meta(), tensor.to_bytes()?));
        }
        let head = route.schedule.homes.last() == Some(&route.workers[rank].0);
        let own = if head { across.methods.tensors.clone() } else { Encoded::new() };
        let start = Start {
            config: model.config.clone(),
            schedule: route.schedule.clone(),
            cuts: route.cuts.clone(),
            replicas: route.replicas.clone(),
            kind: setup.kind,
            devices: [across.devices[rank].clone(), model.device().info().id.clone()],
            optimizer: setup.optimizer,
            recompute: setup.recompute,
            times: [setup.heartbeat, setup.deadline, setup.slow].map(|t| t.as_secs_f64()),
            run: setup.run.clone(),
            planted: setup.planted.clone(),
            tensors: tensors.keys().cloned().collect(),
            method_tensors: own.keys().cloned().collect(),
            methods: across.methods.text.clone(),
        };
        let word = words::with_tensors(&Word::Start(Box::new(start)), tensors.values().chain(own.values()))?;
        if self.post.send(rank, Lane::Control, self.generation, word) {
            return Ok(());
        }
        self.post.lose();
        Err(Error::DeviceLost { device: format!("rank {rank}"), reason: "the way to it is closed".into() })
    }

    /// Passes an order on to worker `rank`.
    pub fn tell(&self, rank: usize, command: &Command) -> Result<()> {
        let word = words::of_command(command, rank, self.reads[rank])?;
        self.post.send(rank, Lane::Control, self.generation, word);
        Ok(())
    }

    /// Silence that is too long.
    fn limit(&self) -> Duration {
        if trainer::STOP.load(Relaxed) { self.limit.min(HURRIED) } else { self.limit }
    }

    /// How long a rank has shown no sign of life, if that is too long.
    pub fn silent(&self, rank: usize) -> Option<Duration> {
        let silence = Some(self.post.silence(rank)).filter(|silence| *silence > self.limit());
        if silence.is_some() {
            self.post.lose();
        }
        silence
    }

    /// How long the workers may take to stop, where `usual` is enough time.
    pub fn patience(&self, usual: Duration) -> Duration {
        if trainer::STOP.load(Relaxed) { usual.min(HURRIED_STOP) } else { usual }
    }

    /// Tells all of them that it is over, and why if it has not even begun.
    pub fn stop(&self, why: Option<String>) {
        if let Ok(word) = words::plain(&Word::Stop(why)) {
            for rank in 1..self.count {
                self.post.send(rank, Lane::Control, self.generation, word.clone());
            }
        }
    }

    /// Waits until all have stopped that still show signs of life, but not longer than `wait`.
    pub fn join(&mut self, wait: Duration) {
        let began = Instant::now();
        let open = |rank: &usize| !self.ended[*rank].load(Relaxed) && self.post.silence(*rank) < self.limit();
        while (1..self.count).any(|rank| open(&rank)) && began.elapsed() < wait {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.stop.store(true, Relaxed);
        if let Some(reader) = self.reader.take() {
            // Whatever ended it has been told.
            let _ = reader.join();
        }
    }
}

/// Takes in what the ranks say until all is over.
fn read(shown: &Shown, every: Duration, answer: &Sender<(usize, Answer)>, ended: &[AtomicBool], over: &AtomicBool) {
    let mut last = Instant::now();
    while !over.load(Relaxed) {
        if last.elapsed() >= every {
            // What has been said cannot fail to be said again.
            let _ = shown.show();
            last = Instant::now();
        }
        let Some(letter) = shown.post.control(every.saturating_sub(last.elapsed()).min(Duration::from_millis(20)))
        else {
            continue;
        };
        if letter.generation != shown.generation || letter.rank >= ended.len() {
            continue;
        }
        let rank = letter.rank;
        let reply = match packet::decode::<Word>(&letter.bytes) {
            Ok((Word::Seen(glance, records), _)) => {
                shown.watch.told(rank, &glance, records);
                continue;
            }
            Ok((Word::Stopped, _)) => {
                ended[rank].store(true, Relaxed);
                continue;
            }
            Ok((word, tensors)) => words::answer_of(word, tensors),
            Err(what) => Some(Answer::Stopped(Stop::Fault(format!("{what}, from rank {rank}")))),
        };
        if let Some(reply) = reply {
            let _ = answer.send((rank, reply));
        }
    }
}

/// Ends the program on all other ranks with `code`. `false` if one of them does not answer within `wait`; if one is lost the
/// others are not told, because MPI has no end that some of the ranks take part in: the launcher ends them.
pub fn end(post: &Post, code: i32, wait: Duration) -> bool {
    if post.has_lost() {
        return false;
    }
    let Ok(word) = words::plain(&Word::End(code)) else {
        return false;
    };
    (1..post.ranks()).for_each(|rank| {
        post.send(rank, Lane::Control, 0, word.clone());
    });
    let began = Instant::now();
    let mut left: Vec<usize> = (1..post.ranks()).collect();
    while !left.is_empty() && began.elapsed() < wait {
        if let Some(letter) = post.control(Duration::from_millis(20))
            && matches!(packet::decode::<Word>(&letter.bytes), Ok((Word::Bye, _)))
        {
            left.retain(|rank| *rank != letter.rank);
        }
        // One that is gone is not waited for.
        if left.iter().any(|rank| post.silence(*rank) > DEAD) {
            return false;
        }
    }
    left.is_empty()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::device;
    use crate::nn::config::Size;
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
        let cuts = cut::even(cut::pieces(config), stages);
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
            recompute: false,
            heartbeat: Duration::from_secs(5),
            deadline: Duration::from_secs(20),
            slow: Duration::from_secs(20),
            run: "test".into(),
            record: "unused".into(),
            planted: Vec::new(),
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
            let served = rank::serve(&Arc::new(second), &(Arc::new(|_: &_, _: &_| Ok(Vec::new())) as Arc<rank::Make>));
            served.map_err(|e| e.to_string())
        });
        let first = Arc::new(first);
        let across = Across { post: first.clone(), devices: vec!["cpu:1".into(); 3], methods: Described::default() };
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
            },
            targets: Tensor::from_slice(&device, &[16], &[6u32; 16]).unwrap(),
            weights: Tensor::from_slice(&device, &[16], &[1.0f32; 16]).unwrap(),
            weight: 16.0,
            gold: true,
            tokens: 16,
            teacher: None,
        };
        let training = Training { compute: None, dropout: 0.0, seed: 0, recompute: false, split: false };
        let order = Order { training, weight: 1.0, total_steps: 1 };
        let command = Command::Step(setup.route.clone(), Arc::new(vec![micro; 2]), Arc::default(), order);
        let sent = |worker: usize| {
            let reads = Reads::of(&config, setup.route.chunks_of(worker).values());
            let (word, tensors) = packet::decode::<Word>(&words::of_command(&command, worker, reads).unwrap()).unwrap();
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
}
