//! Norms between sublayers, over all channels of the hidden stream or over those that gates leave.

use super::config::{NormKind, Residual};
use super::forward::{Pass, States};
use crate::error::Result;
use crate::ops::binary::{ADD, Binary, BinaryFunction, MUL};
use crate::ops::matmul::Matmul;
use crate::ops::norm::{AddNorm, LayerNorm, RmsNorm};
use crate::ops::reduce::{Axis, Reduce, ReduceFunction};
use crate::ops::unary::{Cast, Function, Unary};
use crate::tape::Var;

const SUB: Binary = Binary(BinaryFunction::Sub);

impl Pass<'_> {
    pub(super) fn first_norm(&mut self, name: &str, x: &Var) -> Result<States> {
        let epsilon = self.model.config.norm_epsilon;
        let weight = self.parameter(&format!("{name}.weight"))?;
        if let Some(channels) = self.counted_channels()? {
            let y = self.narrow_norm(name, x, &channels)?;
            let residual = if self.model.config.residual == Residual::Sum { x.clone() } else { y.clone() };
            return Ok(States { normed: y, residual });
        }
        let y = match self.model.config.norm {
            NormKind::Layer => {
                let bias = self.parameter(&format!("{name}.bias"))?;
                self.tape.first(LayerNorm { epsilon }, &[x, &weight, &bias])?
            }
            NormKind::Rms => self.tape.first(RmsNorm { epsilon }, &[x, &weight])?,
        };
        let residual = if self.model.config.residual == Residual::Sum { x.clone() } else { y.clone() };
        Ok(States { normed: y, residual })
    }

    /// h = x + scale * residual; y = norm(h). Without x, the output of a sublayer that the block lacks, h = scale * residual.
    pub(super) fn add_norm(&mut self, name: &str, x: Option<&Var>, residual: &Var) -> Result<States> {
        let config = &self.model.config;
        let scale = if let Residual::Normalised { scale } = config.residual { scale } else { 1.0 };
        // r + (scale - 1) r
        let (x, scale) = x.map_or((residual, scale - 1.0), |x| (x, scale));
        if let Some(channels) = self.counted_channels()? {
            let residual = self.tape.first(Unary(Function::Scale(scale)), &[residual])?;
            let sum = self.tape.first(ADD, &[x, &residual])?;
            let normed = self.narrow_norm(name, &sum, &channels)?;
            let residual = if self.model.config.residual == Residual::Sum { sum } else { normed.clone() };
            return Ok(States { normed, residual });
        }
        let op = AddNorm { epsilon: config.norm_epsilon, scale, rms: config.norm == NormKind::Rms };
        let weight = self.parameter(&format!("{name}.weight"))?;
        let outputs = if op.rms {
            self.tape.run(op, &[x, residual, &weight])?
        } else {
            let bias = self.parameter(&format!("{name}.bias"))?;
            self.tape.run(op, &[x, residual, &weight, &bias])?
        };
        let next = if self.model.config.residual == Residual::Sum { &outputs[1] } else { &outputs[0] };
        Ok(States { normed: outputs[0].clone(), residual: next.clone() })
    }

    /// Of the first hook that leaves out any.
    fn counted_channels(&mut self) -> Result<Option<Var>> {
        for hook in self.hooks.clone() {
            if let Some(channels) = hook.channels(self)? {
                return Ok(Some(channels));
            }
        }
        Ok(None)
    }

    /// The norm over the n channels where the 0/1 `channels` f32 `[d]` is 1, 0 elsewhere; `x` must be 0 there. With epsilon
    /// times d / n beside the variance.
    ///
    /// The root mean square over d channels, of which d - n are 0, is sqrt(n / d) of that over n.
    fn narrow_norm(&mut self, name: &str, x: &Var, channels: &Var) -> Result<Var> {
        let (d, epsilon) = (x.tensor.shape().last(), self.model.config.norm_epsilon);
        let all = Reduce { function: ReduceFunction::Sum, axis: Axis::All };
        let count = self.tape.first(all, &[channels])?.reshape(&[1])?;
        let share = self.tape.first(Unary(Function::Scale(1.0 / d as f32)), &[&count])?;
        // RMS of the 0/1 row itself: sqrt(n / d); so this is 1 / sqrt(n / d) where it is 1.
        let factors = self.tape.first(RmsNorm { epsilon: 0.0 }, &[channels, channels])?;
        let factors = self.tape.first(MUL, &[&factors, &share])?;
        let [factors, counted] = [&factors, channels].map(|x| self.as_computed(x));
        let (factors, counted) = (factors?, counted?);
        let weight = self.parameter(&format!("{name}.weight"))?;
        let weight = self.tape.first(MUL, &[&weight, &factors])?;
        if self.model.config.norm == NormKind::Rms {
            return self.tape.first(RmsNorm { epsilon }, &[x, &weight]);
        }
        let shape = x.tensor.shape();
        let sums = self.tape.first(Reduce { function: ReduceFunction::Sum, axis: Axis::Last }, &[x])?;
        let each = self.tape.first(Unary(Function::Reciprocal), &[&count])?;
        let each = self.as_computed(&each)?;
        let means = self.tape.first(MUL, &[&sums, &each])?;
        let column = [shape.rows(), 1];
        let means =
            self.tape.first(Matmul::plain(false, false), &[&means.reshape(&column)?, &counted.reshape(&[1, d])?])?;
        let centred = self.tape.first(SUB, &[x, &means.reshape(x.dims())?])?;
        let y = self.tape.first(RmsNorm { epsilon }, &[&centred, &weight])?;
        let bias = self.parameter(&format!("{name}.bias"))?;
        let bias = self.tape.first(MUL, &[&bias, &counted])?;
        self.tape.first(ADD, &[&y, &bias])
    }

    /// In the type that this pass computes in.
    fn as_computed(&mut self, x: &Var) -> Result<Var> {
        match self.computes() {
            Some(to) => self.tape.first(Cast { to }, &[x]),
            None => Ok(x.clone()),
        }
    }
}
