//! What becomes of a pipeline whose stage has stopped: the one at fault is named, the others are stopped.

use std::time::{Duration, Instant};

use super::Pipeline;
use crate::console;
use crate::error::Error;
use crate::pipeline::life::Answer;
use crate::pipeline::watch::{Glance, State};
use crate::pipeline::worker::Stop;

/// Stages that have not stopped by then are worth a word.
const SOON: Duration = Duration::from_millis(500);

impl Pipeline {
    pub(super) fn stopped(&mut self, worker: usize, stop: Stop) -> Error {
        match stop {
            Stop::Fault(what) => self.fault(worker, what),
            Stop::Error(error) => {
                let error = self.most_telling(error);
                self.tell_place(worker, &error);
                self.shut(None);
                error
            }
            Stop::Late(what) => self.late(worker, what),
            Stop::Gone(other) => self.fault(other, "it is gone without a word".into()),
            Stop::Cancelled | Stop::Vanish => self.fault(worker, "it is gone without a word".into()),
        }
    }

    /// `worker` waited too long for a message that is not lost. The one that has computed longest keeps it back, or keeps up
    /// whoever should send it.
    fn late(&mut self, worker: usize, what: String) -> Error {
        let glances = (0..self.setup.route.workers.len()).map(|other| (other, self.watch.glance(other)));
        let computing = glances.filter(|(_, glance)| glance.state == State::Computing);
        match computing.max_by(|(_, a), (_, b)| a.seconds.total_cmp(&b.seconds)) {
            Some((slow, Glance { seconds, .. })) => {
                let waiting = format!("worker {worker} waits: {what}");
                self.fault(slow, format!("it is slow: {seconds:.1} s in one event so far; {waiting}"))
            }
            None => self.fault(worker, what),
        }
    }

    /// A gradient that is not finite stops all stages at once; only the one that holds it can name it.
    fn most_telling(&mut self, first: Error) -> Error {
        let names = |e: &Error| !matches!(e, Error::NonFinite { layer, .. } if layer == "model");
        let mut told = first;
        let mut left = self.setup.route.workers.len() - 1;
        while left > 0 && !names(&told) {
            match self.answers.recv_timeout(2 * self.setup.heartbeat) {
                Ok((_, Answer::Stopped(Stop::Error(error)))) => told = error,
                Ok(_) => {}
                Err(_) => return told,
            }
            left -= 1;
        }
        told
    }

    pub(super) fn fault(&mut self, worker: usize, what: String) -> Error {
        let glance = self.watch.glance(worker);
        let record = self.setup.record.clone();
        let (stage, replica) = self.setup.route.workers[worker];
        let copy = if self.setup.route.replicas[stage] > 1 { format!(" (replica {replica})") } else { String::new() };
        // At once and again below: one that hangs may be killed before it is given up.
        let _ = self.watch.write(&record);
        self.shut(Some(&format!("pipeline stage {stage}{copy} failed: {what}")));
        let what = match self.watch.write(&record) {
            Ok(()) => format!("{what}{copy}"),
            Err(e) => format!("{what}{copy}; the record could not be written: {e}"),
        };
        Error::Fault { stage, step: glance.step, position: glance.position, event: glance.event, what, record }
    }

    /// Where an error of the model or the data came up.
    fn tell_place(&self, worker: usize, error: &Error) {
        let Glance { step, position, event, .. } = self.watch.glance(worker);
        let (stage, _) = self.setup.route.workers[worker];
        let record = &self.setup.record;
        let recorded = match self.watch.write(record) {
            Ok(()) => format!("the last events of all stages are in {}", record.display()),
            Err(e) => format!("the last events could not be written: {e}"),
        };
        let code = error.code();
        console::warn(format_args!("{code} on stage {stage}, step {step}, event {position} ({event}); {recorded}"));
    }

    /// Stops all workers, and says `why` where that takes long. One that does not listen within two heartbeats is left behind: a thread cannot be killed.
    pub(super) fn shut(&mut self, why: Option<&str>) {
        self.failed = true;
        self.watch.cancel();
        self.commands.clear();
        if let Some(ranks) = &self.ranks {
            ranks.stop(None);
        }
        let (began, mut why) = (Instant::now(), why);
        let usual = 2 * self.setup.heartbeat;
        let limit = self.ranks.as_ref().map_or(usual, |ranks| ranks.patience(usual));
        for thread in &mut self.threads {
            while thread.as_ref().is_some_and(|t| !t.is_finished()) && began.elapsed() < limit {
                std::thread::sleep(Duration::from_millis(2));
                if let Some(why) = why.take_if(|_| began.elapsed() > SOON) {
                    let most = limit.as_secs_f64();
                    console::warn(format_args!("{why}; its stages are given {most:.1} s to stop"));
                }
            }
            if let Some(thread) = thread.take_if(|t| t.is_finished()) {
                // A panic was reported where it happened.
                let _ = thread.join();
            }
        }
        // Those that hang are waited for once.
        self.threads.clear();
        if let Some(mut ranks) = self.ranks.take() {
            ranks.join(limit);
        }
    }
}
