//! A teacher's work beside the student's: a step ahead, while the student's stage would wait.

use std::time::Instant;

use super::messages::GLANCE;
use super::{Stop, Worker};
use crate::pipeline::message::{Purpose, Tag};
use crate::pipeline::simulate::{Activity, Span};
use crate::pipeline::watch::State;
use crate::train::lifecycle::Micro;

impl Worker {
    /// The teacher's states for the micro-batches of the step that comes now, with no student's work in between. Each of them
    /// counts as an event.
    pub fn teach(&mut self, micros: Vec<Micro>) -> Result<(), Stop> {
        (self.step, self.position) = (self.optimizer.steps(), 0);
        self.watch.at(self.index, (self.step, 0), State::Computing, &"teacher", "begins");
        self.look_ahead(self.step, micros);
        self.finish_teacher(true)?;
        self.watch.at(self.index, (self.step, self.position), State::Idle, &"teacher", "done");
        Ok(())
    }

    /// Takes up the teacher's work for `step`.
    pub(super) fn look_ahead(&mut self, step: u64, micros: Vec<Micro>) {
        let (route, index) = (self.route.clone(), self.index);
        let (stage, _) = route.workers[index];
        if let Some(teacher) = &mut self.teacher {
            teacher.look_ahead(micros, |micro| route.on_stage(stage, micro) == index);
        }
        self.taught = (step, 0);
    }

    /// The messages of the teacher's input for a micro-batch.
    fn teacher_tags(&self, chunk: u32, micro: u32, count: usize) -> Vec<Tag> {
        let (step, purpose) = (self.taught.0, Purpose::Teacher);
        (0..count as u32).map(|part| Tag { step, purpose, chunk, micro, part }).collect()
    }

    /// What the next piece of the teacher's work waits for: its micro-batch and messages.
    fn next_taught(&self) -> Option<(u32, Vec<Tag>)> {
        let teacher = self.teacher.as_ref()?;
        let micro = *teacher.pending.front()?;
        let inputs = if teacher.chunk == 0 { 0 } else { teacher.inputs() };
        Some((micro, self.teacher_tags(teacher.chunk, micro, inputs)))
    }

    /// Runs one piece of the teacher's work if one can run now.
    pub(super) fn advance_teacher(&mut self) -> Result<bool, Stop> {
        let Some((micro, tags)) = self.next_taught() else {
            return Ok(false);
        };
        if !tags.iter().all(|tag| self.stash.contains_key(tag)) {
            return Ok(false);
        }
        let event = format!("teacher {micro}");
        self.watch.at(self.index, (self.step, self.position), State::Computing, &event, "begins");
        let start = self.watch.seconds();
        let mut inputs = Vec::with_capacity(tags.len());
        for tag in tags {
            inputs.push(self.receive(tag, None)?);
        }
        let Some(teacher) = &mut self.teacher else {
            return Ok(false);
        };
        teacher.pending.pop_front();
        let chunk = teacher.chunk;
        let outputs = teacher.run(micro, &inputs)?;
        if let Some(&stage) = self.route.teacher_stages().get(chunk as usize + 1) {
            let to = self.route.on_stage(stage, micro);
            let tags = self.teacher_tags(chunk + 1, micro, outputs.len());
            for (tag, tensor) in tags.into_iter().zip(&outputs) {
                self.send(to, tag, tensor)?;
            }
        }
        self.taught.1 += 1;
        self.watch.taught(self.index, self.taught);
        self.spans.push(Span { activity: Activity::Teacher { chunk, micro }, start, end: self.watch.seconds() });
        Ok(true)
    }

    /// Runs what is left of the teacher's work. `alone`: no schedule runs in this step, and the teacher's micro-batches are
    /// its events.
    pub(super) fn finish_teacher(&mut self, alone: bool) -> Result<(), Stop> {
        let (mut began, mut passed) = (Instant::now(), None);
        while let Some((micro, tags)) = self.next_taught() {
            if self.advance_teacher()? {
                (began, passed) = (Instant::now(), None);
                self.position += usize::from(alone);
                continue;
            }
            if self.watch.cancelled() {
                return Err(Stop::Cancelled);
            }
            self.watch.state(self.index, State::Waiting);
            if let Some((from, frame)) = self.transport.receive(GLANCE).map_err(Stop::Fault)? {
                self.take_in(from, frame)?;
                continue;
            }
            let Some((tag, (worker, count))) = tags.first().zip(self.teacher_sender(micro)) else {
                continue;
            };
            // The last message of all has none behind it that would show the gap.
            if self.is_lost(&mut passed, self.watch.glance(worker).taught > (self.taught.0, count)) {
                return Err(Stop::Fault(super::messages::lost(worker, tag)));
            }
            if began.elapsed() > self.deadline {
                let seconds = self.deadline.as_secs_f64();
                return Err(Stop::Late(format!("{tag} did not come within {seconds:.1} s from worker {worker}")));
            }
        }
        Ok(())
    }

    /// Who sends the teacher's input for a micro-batch, and how many of its own the sender has passed on before.
    fn teacher_sender(&self, micro: u32) -> Option<(usize, u64)> {
        let stage = *self.route.teacher_stages().get(self.teacher.as_ref()?.chunk.checked_sub(1)? as usize)?;
        Some((self.route.on_stage(stage, micro), u64::from(micro) / self.route.replicas[stage] as u64))
    }
}
