//! The controller's side of workers in other processes: starts them, passes orders on, takes in answers and signs of life.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::cut;
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
    /// Whether somebody chose these devices: others will not do then.
    pub named: bool,
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

/// How long a process may show no sign of life.
pub(super) fn silence_limit(heartbeat: Duration) -> Duration {
    (2 * heartbeat).max(5 * ALIVE_EVERY)
}

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
    /// Of each worker: what it reads, and its parameters.
    reads: Vec<Reads>,
    holds: Vec<BTreeSet<String>>,
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
        let holds = |rank| route.chunks_of(rank).values().flat_map(|pieces| cut::tensors_of(model, pieces)).collect();
        let shown = Shown { post, generation, watch: watch.clone(), worker: 0, count, told: Mutex::new(0) };
        let mut ranks = Self {
            post: across.post.clone(),
            generation,
            count,
            limit: silence_limit(setup.heartbeat),
            ended: Arc::new((0..count).map(|_| AtomicBool::new(false)).collect()),
            stop: Arc::default(),
            reader: None,
            reads: (0..count).map(reads).collect(),
            holds: (0..count).map(holds).collect(),
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
            device: (across.devices[rank].clone(), (!across.named).then(|| model.device().info().id.clone())),
            optimizer: setup.optimizer,
            roads: setup.direct.iter().flat_map(|direct| direct.tickets.clone()).collect(),
            recompute: setup.recompute,
            times: [setup.heartbeat, setup.deadline, setup.slow].map(|t| t.as_secs_f64()),
            run: setup.run.clone(),
            record: setup.record.clone(),
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
        let word = words::of_command(command, rank, self.reads[rank], |name| self.holds[rank].contains(name))?;
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
