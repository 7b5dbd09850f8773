//! A process that is not the first: it runs one worker at a time, as the controller in rank 0 says, and nothing else.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::direct::Direct;
use super::executor::Setup;
use super::life::{Answer, Command, run_worker};
use super::packet::{self, Loose};
use super::part::Training;
use super::post::{Lane, Mail, Post};
use super::remote::{Shown, show_every, silence_limit};
use super::route::{Route, Routes};
use super::watch::{Glance, Watch};
use super::words::{self, Described, Start, Word};
use super::worker::{Order, Stop};
use crate::console;
use crate::device::{self, Device};
use crate::error::{Error, Result};
use crate::nn::Model;
use crate::tensor::Tensor;
use crate::train::lifecycle::Method;

/// Makes a stage's hooks from its part of the model and what the controller sent of them.
pub type Make = dyn Fn(&Described, &Model) -> Result<Vec<Box<dyn Method>>> + Send + Sync;

/// Devices by name: opened once.
type Devices = BTreeMap<String, Arc<dyn Device>>;

/// A pipeline's worker of this process.
struct Running {
    shown: Arc<Shown>,
    orders: Sender<Command>,
    threads: Vec<JoinHandle<()>>,
    routes: Routes,
    device: Arc<dyn Device>,
    setup: Setup,
}

/// Serves the controller until the program is over; returns its exit code. `heartbeat`: the run's.
///
/// # Errors
/// `Fault` of stage 0 when the controller is no longer to be reached, `DeviceLost` when this process's own worker is not.
pub fn serve(post: &Arc<Post>, make: &Arc<Make>, heartbeat: Duration) -> Result<i32> {
    let mut devices = Devices::new();
    let mut running: Option<Running> = None;
    let mut last = Instant::now();
    loop {
        let every = running.as_ref().map_or(Duration::from_millis(250), |r| show_every(r.setup.heartbeat));
        if last.elapsed() >= every {
            if let Some(running) = &running {
                running.shown.show()?;
            }
            last = Instant::now();
        }
        if post.silence(0) > silence_limit(heartbeat) {
            return Err(orphaned(post, running.as_ref()));
        }
        let Some(letter) = post.control(every.saturating_sub(last.elapsed())) else {
            continue;
        };
        let (word, tensors) = match packet::decode::<Word>(&letter.bytes) {
            Ok(said) => said,
            Err(what) => {
                let what = Word::Fault(format!("{what}, from rank {}", letter.rank));
                post.send(0, Lane::Control, letter.generation, words::plain(&what)?);
                continue;
            }
        };
        match word {
            Word::Seen(glance, records) => {
                let of = |r: &&Running| r.shown.generation == letter.generation && letter.rank < r.shown.count;
                if let Some(running) = running.as_ref().filter(of) {
                    running.shown.watch.told(letter.rank, &glance, records);
                }
            }
            Word::Start(start) => match Running::start(post, letter.generation, *start, &tensors, make, &mut devices) {
                Ok(started) => running = Some(started),
                Err(e) => {
                    post.send(0, Lane::Control, letter.generation, words::of_answer(&Answer::Stopped(Stop::Error(e)))?);
                }
            },
            Word::Stop(why) => {
                if let Some(why) = why {
                    console::tell(format_args!("rank {}: the pipeline does not start: {why}", post.rank()));
                }
                if let Some(running) = running.take() {
                    running.stop()?;
                }
                post.send(0, Lane::Control, letter.generation, words::plain(&Word::Stopped)?);
            }
            Word::End(code) => {
                post.send(0, Lane::Control, 0, words::plain(&Word::Bye)?);
                return Ok(code);
            }
            order => {
                if let Some(running) = &mut running
                    && let Err(e) = running.order(order, &tensors)
                {
                    post.send(0, Lane::Control, letter.generation, words::of_answer(&Answer::Stopped(Stop::Error(e)))?);
                }
            }
        }
    }
}

/// Rank 0 is gone, and with it the stage that it worked on. The first of the others writes down what is known.
fn orphaned(post: &Post, running: Option<&Running>) -> Error {
    let mut what =
        format!("its process, rank 0, is gone or silent: no sign of life for {:.1} s", post.silence(0).as_secs_f64());
    let Some(Running { shown, setup, .. }) = running else {
        let event = "between trainings".into();
        return Error::Fault { stage: 0, step: 0, position: 0, event, what, record: std::path::PathBuf::new() };
    };
    let record = setup.record.clone();
    if post.rank() == 1
        && let Err(e) = shown.watch.write(&record)
    {
        what = format!("{what}; the record could not be written: {e}");
    }
    let Glance { step, position, event, .. } = shown.watch.glance(0);
    Error::Fault { stage: 0, step, position, event, what, record }
}

fn lost(device: &str, reason: &str) -> Error {
    Error::DeviceLost { device: device.into(), reason: reason.into() }
}

fn open(devices: &mut Devices, (name, other): (String, Option<String>)) -> Result<Arc<dyn Device>> {
    if let Some(device) = devices.get(&name) {
        return Ok(device.clone());
    }
    let device = device::open(&name).or_else(|missing| other.map_or(Err(missing), |name| device::open(&name)))?;
    devices.insert(name, device.clone());
    Ok(device)
}

impl Running {
    fn start(
        post: &Arc<Post>,
        generation: u32,
        start: Start,
        tensors: &[Loose],
        make: &Arc<Make>,
        devices: &mut Devices,
    ) -> Result<Self> {
        let worker = post.rank();
        let device = open(devices, start.device)?;
        let mut loose = tensors.iter().cloned();
        let mut own = BTreeMap::new();
        for (name, (meta, bytes)) in start.tensors.into_iter().zip(loose.by_ref()) {
            own.insert(name, Tensor::from_bytes(&device, meta, &bytes)?);
        }
        let described =
            Described { text: start.methods, tensors: start.method_tensors.into_iter().zip(loose).collect() };
        let route = Arc::new(Route::new(&start.config, &start.schedule, start.cuts, start.replicas)?);
        let routes = Routes::new(start.config.clone(), start.kind, route.clone());
        let model = Model::new(start.config, own, &device)?;
        let count = route.workers.len();
        if worker >= count {
            return Err(lost("rank", "the pipeline has no worker for it"));
        }
        let make = make.clone();
        let [heartbeat, deadline, slow] = start.times.map(Duration::from_secs_f64);
        let setup = Setup {
            route: route.clone(),
            kind: start.kind,
            devices: vec![device.clone()],
            optimizer: start.optimizer,
            methods: Arc::new(move |part: &Model| make(&described, part)),
            recompute: start.recompute,
            heartbeat,
            deadline,
            slow,
            run: start.run,
            record: start.record,
            planted: start.planted,
            timed: None,
            teacher: None,
            direct: (!start.roads.is_empty()).then(|| Direct::new(start.roads.into_iter().collect())),
        };
        let watch = Arc::new(Watch::new(&route.replicas));
        let told = Mutex::new(0);
        let shown = Arc::new(Shown { post: post.clone(), generation, watch: watch.clone(), worker, count, told });
        let ((orders, ordered), (answer, answers)) = (channel(), channel());
        let mail = Box::new(Mail { post: post.clone(), generation });
        let (chunks, own_setup) = (route.chunks_of(worker), setup.clone());
        let work = move || run_worker(worker, (model, chunks), &own_setup, mail, watch, &ordered, &answer);
        let teller = shown.clone();
        let tell = move || tell(&teller, &answers);
        let spawn = |name: String, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name).spawn(body).map_err(|e| Error::io("stage thread", e))
        };
        let threads = vec![
            spawn(format!("espalier-stage-{worker}"), Box::new(work))?,
            spawn("espalier-answers".into(), Box::new(tell))?,
        ];
        Ok(Self { shown, orders, threads, routes, device, setup })
    }

    fn order(&mut self, word: Word, tensors: &[Loose]) -> Result<()> {
        let command = match word {
            Word::Step { micros, dropout, seed, weight, total_steps, timed } => {
                let route = self.routes.get(micros.len())?;
                let training = Training {
                    compute: self.setup.optimizer.precision.compute(),
                    dropout,
                    seed,
                    recompute: self.setup.recompute,
                    split: self.routes.splits_backward(),
                };
                let micros = Arc::new(words::micros_of(&micros, tensors, &self.device)?);
                Command::Step(route, micros, Arc::default(), Order { training, weight, total_steps, timed })
            }
            Word::Hooks(step) => Command::Hooks(step),
            Word::Collect(state) => Command::Collect(state),
            Word::Restore(names, step) => {
                Command::Restore(Arc::new(names.into_iter().zip(tensors.iter().cloned()).collect()), step)
            }
            Word::CheckFinite => Command::CheckFinite,
            // Words to a controller are for another.
            _ => return Ok(()),
        };
        // A worker that has ended has said so.
        let _ = self.orders.send(command);
        Ok(())
    }

    /// Ends the worker and tells its last events.
    fn stop(self) -> Result<()> {
        self.shown.watch.cancel();
        drop(self.orders);
        let began = Instant::now();
        let limit = 2 * self.setup.heartbeat;
        for thread in self.threads {
            while !thread.is_finished() {
                if began.elapsed() > limit {
                    return Err(lost("stage", "its worker does not stop"));
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            // A panic was told as a fault.
            let _ = thread.join();
        }
        self.shown.show()
    }
}

/// Passes a worker's answers on to the controller, each after what it was at, until there are no more.
fn tell(shown: &Shown, answers: &Receiver<(usize, Answer)>) {
    let mut ended = false;
    let say = |word: Result<Vec<u8>>| {
        // What cannot be said is a mistake of this program, and that can be.
        let word = shown.show().and(word).or_else(|e| words::plain(&Word::Fault(e.to_string())));
        if let Ok(word) = word {
            shown.post.send(0, Lane::Control, shown.generation, word);
        }
    };
    while let Ok((_, answer)) = answers.recv() {
        ended |= matches!(answer, Answer::Stopped(_));
        say(words::of_answer(&answer));
    }
    if !ended && !shown.watch.cancelled() {
        say(words::plain(&Word::Vanished));
    }
}
