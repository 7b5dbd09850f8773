//! The end of a step: gradients of replicas added up, loss and norm agreed on by all workers, weights updated.

use super::{Stop, Worker, plus};
use crate::dispatch;
use crate::ops::binary::AccumulateScaled;
use crate::pipeline::message::{Purpose, Tag};
use crate::pipeline::watch::State;
use crate::tensor::Tensor;

impl Worker {
    /// Gradients of replicas added up, loss and norm of all stages agreed on, weights updated.
    pub(super) fn update(&mut self, losses: Option<Tensor>) -> Result<(), Stop> {
        self.begin("update")?;
        let route = self.route.clone();
        let (stage, _) = route.workers[self.index];
        let replicas = route.of_stage(stage);
        if replicas.len() > 1 {
            self.reduce(replicas)?;
        }
        let device = self.part.model.device().clone();
        let zero = Tensor::from_slice(&device, &[1], &[0.0f32])?;
        let own = [self.optimizer.squares()?, losses.unwrap_or(zero)];
        let tag = |from: usize, to: usize, part: u32| Tag {
            step: self.step,
            purpose: Purpose::Totals,
            chunk: from as u32,
            micro: to as u32,
            part,
        };
        let (index, workers) = (self.index, route.workers.len());
        let tags: Vec<_> =
            (0..workers).map(|other| [0, 1].map(|part| (tag(index, other, part), tag(other, index, part)))).collect();
        for other in (0..workers).filter(|&other| other != index) {
            for (part, tensor) in own.iter().enumerate() {
                self.send(other, tags[other][part].0, tensor)?;
            }
        }
        // All add in the order of the workers. Replicas hold the same gradients, so one of them counts, but losses of their own.
        let mut totals: [Option<Tensor>; 2] = [None, None];
        for (other, &(_, replica)) in route.workers.iter().enumerate() {
            for (part, total) in totals.iter_mut().enumerate() {
                let received = if other == index {
                    own[part].clone()
                } else {
                    self.receive(tags[other][part].1, Some((other, usize::MAX)))?
                };
                if part == 1 || replica == 0 {
                    *total = Some(plus(total.take(), received)?);
                }
            }
        }
        self.watch.state(self.index, State::Computing);
        let [Some(squares), Some(losses)] = totals else {
            return Ok(());
        };
        Ok(self.optimizer.apply(&squares, &losses)?)
    }

    /// Sums gradients over the replicas of a stage, in their order on each of them.
    fn reduce(&mut self, replicas: std::ops::Range<usize>) -> Result<(), Stop> {
        let groups = self.optimizer.gradients()?;
        for (group, own) in groups.iter().enumerate() {
            let tag = |from: usize, to: usize| Tag {
                step: self.step,
                purpose: Purpose::Gradients,
                chunk: group as u32,
                micro: from as u32,
                part: to as u32,
            };
            let copy = own.duplicate()?;
            let (mut outgoing, mut incoming) = (Vec::new(), Vec::new());
            for other in replicas.clone().filter(|&other| other != self.index) {
                outgoing.push((other, tag(self.index, other)));
            }
            for from in replicas.clone() {
                incoming.push((from, tag(from, self.index)));
            }
            for (to, tag) in outgoing {
                self.send(to, tag, &copy)?;
            }
            for (i, (from, tag)) in incoming.into_iter().enumerate() {
                let part = if from == self.index { copy.clone() } else { self.receive(tag, Some((from, usize::MAX)))? };
                if i == 0 {
                    let device = own.device();
                    device.copy(part.buffer(), part.offset(), own.buffer(), own.offset(), own.meta().bytes())?;
                } else {
                    dispatch::run(&AccumulateScaled { factor: 1.0 }, &[own, &part])?;
                }
            }
        }
        Ok(())
    }
}
