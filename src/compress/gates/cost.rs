//! What structures cost, in parameters or in time, and the size that gates lead to expect.

use std::sync::Arc;

use super::latency::LatencyTable;
use super::layout::{Layout, Level};
use crate::device::Device;
use crate::error::{Error, Result};
use crate::nn::Pass;
use crate::ops::binary::{ADD, Binary, BinaryFunction, MUL};
use crate::ops::hard_concrete::{GateValue, HardConcrete};
use crate::ops::matmul::Matmul;
use crate::ops::reduce::{Axis, Reduce, ReduceFunction};
use crate::ops::unary::{Function, Unary};
use crate::tape::Var;
use crate::tensor::Tensor;

const SUB: Binary = Binary(BinaryFunction::Sub);

/// Cost of a sublayer by its units (heads, neurons), linear between points; a sublayer that is gone costs nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve(pub Vec<(f64, f64)>);

impl Curve {
    /// `each` for every unit.
    fn proportional(each: f64) -> Self {
        Self(vec![(0.0, 0.0), (1.0, each)])
    }

    /// Beyond the last point, and before the first, as between the two nearest.
    pub fn at(&self, units: f64) -> f64 {
        let points = &self.0;
        let after = points.iter().position(|p| p.0 >= units).unwrap_or(points.len()).clamp(1, points.len().max(2) - 1);
        match (points.get(after - 1), points.get(after)) {
            (Some(a), Some(b)) => a.1 + (units - a.0) * (b.1 - a.1) / (b.0 - a.0),
            (Some(only), None) => only.1,
            _ => 0.0,
        }
    }

    /// (cost at 0 units, [(knot, change of the slope there)]): the curve is the first plus the sum of change relu(units -
    /// knot).
    fn hinges(&self) -> (f64, Vec<(f64, f64)>) {
        let slope = |pair: &[(f64, f64)]| (pair[1].1 - pair[0].1) / (pair[1].0 - pair[0].0);
        let mut before = 0.0;
        let mut hinges = Vec::new();
        for (i, pair) in self.0.windows(2).enumerate() {
            let slope = slope(pair);
            // The first line reaches back to 0 units.
            hinges.push((if i == 0 { 0.0 } else { pair[0].0 }, slope - before));
            before = slope;
        }
        (self.at(0.0), hinges)
    }
}

/// Curves of all sublayers, and whether a cost falls with the share of channels that are open.
#[derive(Clone, Debug)]
pub struct Costs {
    pub attentions: Vec<Curve>,
    pub ffns: Vec<Curve>,
    /// Parameters do; measured times are those at full width.
    pub by_channels: bool,
    /// Of everything.
    pub total: f64,
}

impl Costs {
    /// Weights of the blocks' linears by the shapes of the config, as CoFi counts: neither biases nor embeddings.
    pub fn parameters(layout: &Layout) -> Self {
        let d = layout.width as f64;
        let attentions = layout.attentions.iter().map(|a| Curve::proportional(4.0 * a.head_size as f64 * d)).collect();
        let ffns = layout.ffns.iter().map(|f| Curve::proportional((f.copies + 1) as f64 * d)).collect();
        Self::new(layout, attentions, ffns, true)
    }

    /// Measured times of sublayers by heads and neurons.
    ///
    /// # Errors
    /// Those of [`LatencyTable::check`].
    pub fn latency(layout: &Layout, table: &LatencyTable) -> Result<Self> {
        table.check(layout)?;
        let curve = |points: &[(usize, f64)]| Curve(points.iter().map(|(n, ms)| (*n as f64, *ms)).collect());
        let attentions = layout.attentions.iter().map(|_| curve(&table.attention)).collect();
        let ffns = layout.ffns.iter().map(|_| curve(&table.ffn)).collect();
        Ok(Self::new(layout, attentions, ffns, false))
    }

    fn new(layout: &Layout, attentions: Vec<Curve>, ffns: Vec<Curve>, by_channels: bool) -> Self {
        let heads = layout.attentions.iter().zip(&attentions).map(|(a, curve)| curve.at(a.heads as f64));
        let neurons = layout.ffns.iter().zip(&ffns).map(|(f, curve)| curve.at(f.neurons as f64));
        let total = heads.chain(neurons).sum();
        Self { attentions, ffns, by_channels, total }
    }

    /// Share of the whole cost that is left with so many heads, neurons (of each sublayer; 0: it is gone) and channels.
    pub fn share(&self, heads: &[usize], neurons: &[usize], channels: f64) -> f64 {
        let of = |curves: &[Curve], units: &[usize]| -> f64 {
            let open = curves.iter().zip(units).filter(|(_, units)| **units > 0);
            open.map(|(curve, &units)| curve.at(units as f64)).sum()
        };
        let share = (of(&self.attentions, heads) + of(&self.ffns, neurons)) / self.total;
        if self.by_channels { share * channels } else { share }
    }
}

/// A kind of sublayer on the device: units' chances to sublayers' costs.
struct Sums {
    units: Level,
    whole: Level,
    /// 0/1 `[S K, units]`: the units of each sublayer, once for each hinge.
    members: Tensor,
    /// `[S K]`
    knots: Tensor,
    /// `[S, S K]`: changes of the slope as shares of the total.
    slopes: Tensor,
    /// `[S]`: cost at 0 units.
    fixed: Tensor,
    /// `[units]` ones, where the units have no gates.
    ones: Tensor,
}

impl Sums {
    fn new(
        device: &Arc<dyn Device>,
        (units, whole): (Level, Level),
        sublayers: &[(usize, usize)],
        curves: &[Curve],
        total: f64,
    ) -> Result<Option<Self>> {
        if sublayers.is_empty() {
            return Ok(None);
        }
        let count: usize = sublayers.iter().map(|(_, n)| n).sum();
        let hinges: Vec<(f64, Vec<(f64, f64)>)> = curves.iter().map(Curve::hinges).collect();
        let rows: usize = hinges.iter().map(|(_, h)| h.len()).sum();
        let (mut members, mut slopes) = (vec![0.0f32; rows * count], vec![0.0f32; sublayers.len() * rows]);
        let (mut knots, mut row) = (Vec::with_capacity(rows), 0);
        for (s, ((first, n), (_, hinges))) in sublayers.iter().zip(&hinges).enumerate() {
            for (knot, change) in hinges {
                members[row * count + first..][..*n].fill(1.0);
                slopes[s * rows + row] = (change / total) as f32;
                knots.push(*knot as f32);
                row += 1;
            }
        }
        let fixed: Vec<f32> = hinges.iter().map(|(fixed, _)| (fixed / total) as f32).collect();
        Ok(Some(Self {
            units,
            whole,
            members: Tensor::from_slice(device, &[rows, count], &members)?,
            knots: Tensor::from_slice(device, &[rows], &knots)?,
            slopes: Tensor::from_slice(device, &[sublayers.len(), rows], &slopes)?,
            fixed: Tensor::from_slice(device, &[sublayers.len()], &fixed)?,
            ones: Tensor::from_slice(device, &[count], &vec![1.0f32; count])?,
        }))
    }

    /// Expected share of the cost, f32 `[1]`.
    fn expected(&self, pass: &mut Pass, levels: &[Level]) -> Result<Var> {
        let constant = |tensor: &Tensor| Var::constant(tensor.clone());
        let units = chances(pass, levels, self.units)?.unwrap_or_else(|| constant(&self.ones));
        let count = units.tensor.count();
        let tape = &mut pass.tape;
        let each = tape.first(Matmul::linear(), &[&units.reshape(&[1, count])?, &constant(&self.members)])?;
        let beyond = tape.first(SUB, &[&each, &constant(&self.knots)])?;
        let beyond = tape.first(Unary(Function::Relu), &[&beyond])?;
        let costs = tape.first(Matmul::linear(), &[&beyond, &constant(&self.slopes)])?;
        let mut costs = tape.first(ADD, &[&costs, &constant(&self.fixed)])?;
        if let Some(open) = chances(pass, levels, self.whole)? {
            costs = pass.tape.first(MUL, &[&costs, &open.reshape(costs.dims())?])?;
        }
        let all = Reduce { function: ReduceFunction::Sum, axis: Axis::All };
        pass.tape.first(all, &[&costs])?.reshape(&[1])
    }
}

/// P(z != 0) of a level's gates; `None` where it has none.
fn chances(pass: &mut Pass, levels: &[Level], level: Level) -> Result<Option<Var>> {
    if !levels.contains(&level) {
        return Ok(None);
    }
    let log_alpha = pass.parameter(level.tensor())?;
    pass.tape.first(HardConcrete(GateValue::Open), &[&log_alpha]).map(Some)
}

/// The expected size of a gated model as a function of its log alphas.
pub(super) struct Expectation {
    sums: Vec<Sums>,
    levels: Vec<Level>,
}

impl Expectation {
    /// # Errors
    /// `Error::Parameter` for gates of channels with measured times.
    pub fn new(device: &Arc<dyn Device>, layout: &Layout, costs: &Costs, levels: &[Level]) -> Result<Self> {
        if levels.contains(&Level::Hidden) && !costs.by_channels {
            let (value, allowed) =
                ("hidden".into(), "attention, ffn, heads, neurons: times are measured at full width");
            return Err(Error::Parameter { op: "structure gates", parameter: "levels", value, allowed });
        }
        let heads: Vec<(usize, usize)> = layout.attentions.iter().map(|a| (a.first, a.heads)).collect();
        let neurons: Vec<(usize, usize)> = layout.ffns.iter().map(|f| (f.first, f.neurons)).collect();
        let sums = [
            Sums::new(device, (Level::Heads, Level::Attention), &heads, &costs.attentions, costs.total)?,
            Sums::new(device, (Level::Neurons, Level::Ffn), &neurons, &costs.ffns, costs.total)?,
        ];
        Ok(Self { sums: sums.into_iter().flatten().collect(), levels: levels.to_vec() })
    }

    /// Expected share of the cost that is left, f32 `[1]`: sublayer by sublayer P(sublayer) cost(sum of P(unit)), times the
    /// mean P(channel) (the sum over all outer products is that product of sums).
    pub fn share(&self, pass: &mut Pass) -> Result<Var> {
        let mut total: Option<Var> = None;
        for sums in &self.sums {
            let part = sums.expected(pass, &self.levels)?;
            total = Some(match total {
                None => part,
                Some(sum) => pass.tape.first(ADD, &[&sum, &part])?,
            });
        }
        let total = total.ok_or(Error::Shape { op: "structure gates", rule: "a sublayer", got: "none".into() })?;
        match chances(pass, &self.levels, Level::Hidden)? {
            None => Ok(total),
            Some(channels) => {
                let mean = Reduce { function: ReduceFunction::Mean, axis: Axis::All };
                let mean = pass.tape.first(mean, &[&channels])?.reshape(&[1])?;
                pass.tape.first(MUL, &[&total, &mean])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hinges_are_the_curve() {
        let curve = Curve(vec![(0.0, 0.5), (2.0, 1.0), (4.0, 3.0), (8.0, 4.0)]);
        let (fixed, hinges) = curve.hinges();
        for units in [0.0, 0.5, 2.0, 3.0, 4.0, 7.9, 8.0] {
            let sum: f64 = hinges.iter().map(|(knot, change)| change * f64::max(units - knot, 0.0)).sum();
            assert!((fixed + sum - curve.at(units)).abs() < 1e-12, "{units}");
        }
        assert_eq!(curve.at(3.0), 2.0);
        // A table that begins above 0 is continued to it.
        let late = Curve(vec![(1.0, 1.0), (2.0, 1.5)]);
        assert_eq!((late.at(0.0), late.hinges()), (0.5, (0.5, vec![(0.0, 0.5)])));
    }
}
