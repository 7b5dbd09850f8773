//! The norm of all gradients, which clips them: summed in one order wherever a model is cut, and what the update makes of it.

use super::{Group, Optimizer, Slot};
use crate::dispatch;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::binary::{ADD, MUL};
use crate::ops::optim::UpdateFactor;
use crate::ops::reduce::{Axis, Reduce, ReduceFunction};
use crate::shape::Meta;
use crate::tensor::Tensor;
use crate::train::precision::LossScale;

const SUM_SQUARES: Reduce = Reduce { function: ReduceFunction::SumSquares, axis: Axis::All };

impl Optimizer {
    /// Sums of squares of the accumulated gradients but for those of gates, f32 `[2, pieces]`: of matrices and of vectors, by
    /// the pieces that a model may be cut into. A piece is trained in one place and 0 everywhere else, so what several devices
    /// have adds up to the bits of one that trains all, wherever the cuts are.
    pub fn squares(&mut self) -> Result<Tensor> {
        self.clear_unfilled()?;
        for group in self.groups.iter().filter(|group| group.gates.is_none()) {
            let gradients = group.kept_gradients()?;
            for slots in group.slots.chunk_by(|a, b| a.piece == b.piece) {
                let (piece, start) = (slots[0].piece, slots[0].offset);
                let own = Meta::new(&[(slots.last().map_or(start, Slot::end) - start) / 4], DType::F32)?;
                let own = Tensor::over(&self.device, gradients.buffer().clone(), gradients.offset() + start, own)?;
                let sum = dispatch::run_one(&SUM_SQUARES, &[&own])?;
                let place = self.squares.offset() + 4 * (group.part as usize * self.pieces + piece);
                self.device.copy(sum.buffer(), sum.offset(), self.squares.buffer(), place, 4)?;
            }
        }
        Ok(self.squares.clone())
    }

    /// Queues the update from the sums of squares of all gradients, those of other devices' parameters included.
    pub fn apply(&mut self, squares: &Tensor, losses: &Tensor) -> Result<()> {
        let all = Reduce { function: ReduceFunction::Sum, axis: Axis::All };
        let squares = &dispatch::run_one(&all, &[squares])?.reshape(&[1])?;
        let growth = if self.scaled() { LossScale::GROWTH } else { 0 };
        let op = UpdateFactor { max_norm: self.settings.clip, growth };
        let mut gates = Vec::new();
        for group in &self.groups {
            if let Some(own) = &group.gates {
                // As the weights' factor, unclipped; before the state is that of the next step.
                let op = UpdateFactor { max_norm: 0.0, ..op };
                let squares = dispatch::run_one(&ADD, &[squares, &group.squares()?])?;
                let factor = &dispatch::run(&op, &[&squares, losses, &own.rates, &self.state.duplicate()?])?[1];
                gates.push((group, factor.clone(), &own.rates));
            }
        }
        let outputs = dispatch::run(&op, &[squares, losses, &self.rates, &self.state])?;
        let mut weights = self.groups.iter().filter(|group| group.gates.is_none());
        weights.try_for_each(|group| group.update(self.settings.rule, &outputs[1], &self.rates))?;
        gates.into_iter().try_for_each(|(group, factor, rates)| group.update(self.settings.rule, &factor, rates))
    }
}

impl Group {
    /// Those of pruned weights must not count in the norm that the kept ones are clipped by.
    fn kept_gradients(&self) -> Result<Tensor> {
        match &self.mask {
            Some(mask) => dispatch::run_one(&MUL, &[&self.gradients, mask]),
            None => Ok(self.gradients.clone()),
        }
    }

    /// Sum of squares `[1]` of the gradients.
    fn squares(&self) -> Result<Tensor> {
        dispatch::run_one(&SUM_SQUARES, &[&self.kept_gradients()?])?.reshape(&[1])
    }
}
