//! Messages of a worker: sent, waited for, and each held against what was to come.

use std::time::{Duration, Instant};

use super::{Arrived, Stop, Worker};
use crate::pipeline::fault::Planted;
use crate::pipeline::message::{self, Purpose, Tag};
use crate::pipeline::transport::Gone;
use crate::pipeline::watch::State;
use crate::tensor::Tensor;

/// How often a waiting worker looks whether the others still run.
pub(super) const GLANCE: Duration = Duration::from_millis(20);

/// What a lost message is reported as.
pub(super) fn lost(worker: usize, tag: &Tag) -> String {
    format!("a message is lost: worker {worker} has sent {tag} and it did not come")
}

impl Worker {
    pub(super) fn send(&mut self, to: usize, tag: Tag, tensor: &Tensor) -> Result<(), Stop> {
        let mut frame = if self.roads.to(to, tag.purpose).is_some() {
            message::announce(self.run, tag, self.sent[to], tensor.meta())
        } else {
            message::frame_of(self.run, tag, self.sent[to], tensor)?
        };
        self.sent[to] += 1;
        let planted = self.planted(|p| matches!(p, Planted::Drop | Planted::Duplicate | Planted::Corrupt));
        match planted {
            Some(Planted::Drop) => return Ok(()),
            Some(Planted::Duplicate) => self.transport.send(to, frame.clone()).map_err(|Gone| Stop::Gone(to))?,
            Some(Planted::Corrupt) => {
                let middle = frame.len() / 2;
                frame[middle] ^= 0x40;
            }
            _ => {}
        }
        self.transport.send(to, frame).map_err(|Gone| Stop::Gone(to))?;
        if let Some(road) = self.roads.to(to, tag.purpose) {
            road.send(tensor.buffer(), tensor.offset(), tensor.meta().bytes())?;
        }
        Ok(())
    }

    /// The tensor that `tag` names. `sender`: who sends it, and where that stands in the sender's schedule.
    pub(super) fn receive(&mut self, tag: Tag, sender: Option<(usize, usize)>) -> Result<Tensor, Stop> {
        let began = Instant::now();
        let mut passed: Option<Instant> = None;
        self.watch.state(self.index, State::Waiting);
        loop {
            if let Some(arrived) = self.stash.remove(&tag) {
                self.taken.insert(tag);
                self.watch.state(self.index, State::Computing);
                return match arrived {
                    Arrived::Bytes(m) => Ok(Tensor::from_bytes(self.part.model.device(), m.meta, m.payload())?),
                    Arrived::Tensor(tensor) => Ok(tensor),
                };
            }
            if self.watch.cancelled() {
                return Err(Stop::Cancelled);
            }
            // What has come is taken in first; then the teacher's work goes before waiting.
            let mut taken = self.transport.receive(Duration::ZERO).map_err(Stop::Fault)?;
            if taken.is_none() && tag.purpose != Purpose::Teacher && self.advance_teacher()? {
                let at = (self.step, self.position);
                self.watch.at(self.index, at, State::Waiting, &self.event, "waits on");
                continue;
            }
            if taken.is_none() {
                taken = self.transport.receive(GLANCE).map_err(Stop::Fault)?;
            }
            if let Some((from, frame)) = taken {
                self.take_in(from, frame)?;
                continue;
            }
            if let Some((worker, position)) = sender {
                let seen = self.watch.glance(worker);
                if self.is_lost(&mut passed, (seen.step, seen.position) > (self.step, position)) {
                    return Err(Stop::Fault(lost(worker, &tag)));
                }
            }
            if began.elapsed() > self.deadline {
                let from = sender
                    .map_or("?".into(), |(w, _)| format!("worker {w}, which is at {}", self.watch.glance(w).event));
                return Err(Stop::Late(format!(
                    "{tag} did not come within {:.1} s from {from}",
                    self.deadline.as_secs_f64()
                )));
            }
        }
    }

    /// Whether a message that its sender has `sent` has not come for a heartbeat. `passed`: since when that is so.
    pub(super) fn is_lost(&self, passed: &mut Option<Instant>, sent: bool) -> bool {
        sent && passed.get_or_insert_with(Instant::now).elapsed() > self.heartbeat
    }

    pub(super) fn take_in(&mut self, from: usize, frame: Vec<u8>) -> Result<(), Stop> {
        let message =
            message::decode(self.run, frame).map_err(|what| Stop::Fault(format!("{what}, from worker {from}")))?;
        let tag = message.tag;
        let expected = self.received.get(from).copied().unwrap_or(0);
        let fault = |what: String| Err(Stop::Fault(what));
        if message.sequence < expected || self.taken.contains(&tag) || self.stash.contains_key(&tag) {
            return fault(format!("a message came twice: {tag} from worker {from}"));
        }
        if message.sequence > expected {
            let lost = message.sequence - expected;
            return fault(format!("a message is lost: {lost} before {tag} from worker {from}"));
        }
        if tag.step < self.step || tag.step > self.step + 1 {
            return fault(format!("a message of another step than {}: {tag} from worker {from}", self.step));
        }
        self.received[from] = expected + 1;
        let arrived = if message.direct {
            let tensor = Tensor::empty(self.part.model.device(), message.meta)?;
            match self.roads.receive(from, &tensor) {
                Some(queued) => queued?,
                None => {
                    return fault(format!(
                        "a tensor is announced by a road that is not there: {tag} from worker {from}"
                    ));
                }
            }
            Arrived::Tensor(tensor)
        } else {
            Arrived::Bytes(message)
        };
        self.stash.insert(tag, arrived);
        Ok(())
    }
}
