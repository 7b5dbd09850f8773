//! Faults that a test has planted, carried out where they were planted.

use std::time::{Duration, Instant};

use super::{Stop, Worker};
use crate::dispatch;
use crate::ops::binary::ADD;
use crate::pipeline::fault::Planted;
use crate::pipeline::watch::Watch;
use crate::tensor::Tensor;

impl Worker {
    pub(super) fn planted(&mut self, kind: impl Fn(&Planted) -> bool) -> Option<Planted> {
        let at = self.planted.iter().position(|i| {
            i.worker == self.index && i.step == self.step && i.position == self.position && kind(&i.what)
        })?;
        Some(self.planted.remove(at).what)
    }

    pub(super) fn inject(&mut self) -> Result<(), Stop> {
        let nap = |watch: &Watch, time: Duration| {
            let began = Instant::now();
            while began.elapsed() < time && !watch.cancelled() {
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        match self.planted(|p| !matches!(p, Planted::Drop | Planted::Duplicate | Planted::Corrupt)) {
            None => Ok(()),
            Some(Planted::Panic) => panic!("planted"),
            Some(Planted::Exit) => Err(Stop::Vanish),
            Some(Planted::Stall) => {
                nap(&self.watch, Duration::MAX);
                Err(Stop::Cancelled)
            }
            Some(Planted::Freeze) => loop {
                std::thread::park();
            },
            Some(Planted::Slow) => {
                // Progress, but little: a launch now and then.
                while !self.watch.cancelled() {
                    nap(&self.watch, self.heartbeat / 4);
                    Tensor::from_slice(self.part.model.device(), &[1], &[0.0f32])
                        .and_then(|t| dispatch::run_one(&ADD, &[&t, &t]))?;
                }
                Err(Stop::Cancelled)
            }
            Some(_) => Ok(()),
        }
    }
}
