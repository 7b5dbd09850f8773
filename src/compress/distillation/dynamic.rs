//! Matching of layers anew in each step (CoFi 3.2): each of the teacher's layers teaches the student's layer that is nearest to
//! it behind one projection, among those that are there. Which one it is stays on the device.

use serde::{Deserialize, Serialize};

use super::matches::Layer;
use super::{SUB, add_projection, scaled, total};
use crate::compress::gates::Gates;
use crate::dispatch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::tuning::DISTILLED;
use crate::nn::{Config, Model, Pass, Tap};
use crate::ops::binary::ADD;
use crate::ops::distill::{HiddenMse, Reduction};
use crate::ops::layout::{Concat, Fill, GatherRows};
use crate::ops::matmul::Matmul;
use crate::ops::reduce::ArgMax;
use crate::ops::select::Above;
use crate::ops::unary::{Function, Unary};
use crate::shape::Shape;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Which student layers a teacher's layer may choose among.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// All (version 3 of CoFi's code).
    #[default]
    Free,
    /// Those below the choice of the teacher's layer above; that choice again where there are none (version 4).
    Ascending,
}

/// The teacher's layers and what their matches count together.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Dynamic {
    /// Of the teacher, ascending; see [`Layer`].
    pub layers: Vec<Layer>,
    #[serde(default)]
    pub order: Order,
    /// Factor of the mean over `layers`.
    #[serde(default = "weight")]
    pub weight: f32,
}

fn weight() -> f32 {
    0.9
}

/// Parameter that projects the student's states to the teacher's width.
const PROJECTION: &str = "dynamic.projection.weight";

/// Distances of layers that may not be chosen, and of the one that is chosen where none may.
const NEVER: f32 = 1e30;
const RATHER_NOT: f32 = 1e28;

impl Dynamic {
    /// Numbers of the teacher's layers.
    ///
    /// # Errors
    /// `Parameter` for a layer that the teacher lacks, an order that falls, and weights that are none.
    pub fn numbers(&self, teacher: &Config) -> Result<Vec<usize>> {
        let refuse = |parameter, value: String, allowed| {
            Err(Error::Parameter { op: "dynamic matching", parameter, value, allowed })
        };
        if !(self.weight.is_finite() && self.weight >= 0.0) {
            return refuse("weight", self.weight.to_string(), "finite and not below 0");
        }
        let layers = self.layers.iter().map(|layer| layer.of(teacher)).collect::<Result<Vec<_>>>()?;
        if layers.is_empty() || !layers.windows(2).all(|pair| pair[0] < pair[1]) || layers[0] == 0 {
            return refuse("layers", format!("{layers:?}"), "layers of the teacher from 1 on, ascending");
        }
        Ok(layers)
    }
}

/// A dynamic matching of two models.
#[derive(Clone)]
pub(super) struct Matcher {
    settings: Dynamic,
    teacher: Vec<usize>,
    student: Vec<usize>,
    /// f32 `[1, L]`: [`NEVER`] for layers whose block has lost its FFN, else 0.
    lost: Tensor,
    /// 0/1 `[L, F]`: the layer of each of the student's FFNs.
    of_ffn: Tensor,
    /// 0/1 `[L, L]`: row i has the layers below i.
    below: Tensor,
    /// `[L, L]`, the identity.
    each: Tensor,
}

impl Matcher {
    /// The projection becomes a parameter of `student`.
    pub fn new(student: &mut Model, teacher: &Model, settings: &Dynamic, seed: u64) -> Result<Self> {
        let device = student.device().clone();
        let config = &student.config;
        let blocks = config.encoder..config.blocks.len();
        let layers = blocks.len();
        let feeds: Vec<usize> = (0..config.blocks.len()).filter(|&i| config.blocks[i].feeds()).collect();
        let lost: Vec<f32> = blocks.clone().map(|i| if config.blocks[i].feeds() { 0.0 } else { NEVER }).collect();
        let one = |on: bool| f32::from(u8::from(on));
        let square = |of: fn(usize, usize) -> bool| -> Vec<f32> {
            (0..layers * layers).map(|i| one(of(i / layers, i % layers))).collect()
        };
        let of_ffn: Vec<f32> = blocks.clone().flat_map(|i| feeds.iter().map(move |f| one(*f == i))).collect();
        let matcher = Self {
            settings: settings.clone(),
            teacher: settings.numbers(&teacher.config)?,
            student: (1..=layers).collect(),
            lost: Tensor::from_slice(&device, &[1, layers], &lost)?,
            of_ffn: Tensor::from_slice(&device, &[layers, feeds.len().max(1)], &of_ffn_or_zeros(of_ffn, layers))?,
            below: Tensor::from_slice(&device, &[layers, layers], &square(|i, j| j < i))?,
            each: Tensor::from_slice(&device, &[layers, layers], &square(|i, j| i == j))?,
        };
        let (from, to) = (student.config.width, teacher.config.width);
        let name = format!("{DISTILLED}{PROJECTION}");
        add_projection(student, &name, [to, from], (seed, 0xd157_c0f1))?;
        Ok(matcher)
    }

    pub fn taps(&self) -> Vec<Tap> {
        self.student.iter().map(|&layer| Tap::Hidden(layer)).collect()
    }

    pub fn teacher_taps(&self) -> Vec<Tap> {
        self.teacher.iter().map(|&layer| Tap::Hidden(layer)).collect()
    }

    /// Weighted mean over the teacher's layers of the mean squared difference to the layer each of them chose, summed over
    /// rows by `weights` `[N]`.
    pub fn loss(
        &self,
        pass: &mut Pass,
        taught: impl Fn(usize) -> Result<Var>,
        weights: &Tensor,
    ) -> Result<Option<Var>> {
        let projection = pass.parameter(&format!("{DISTILLED}{PROJECTION}"))?;
        let mut own = Vec::with_capacity(self.student.len());
        for &layer in &self.student {
            let states = pass.hidden_at(layer)?;
            let states = pass.tape.first(Matmul::linear(), &[&states, &projection])?;
            let count = states.tensor.count();
            own.push(states.reshape(&[1, count])?);
        }
        let d = projection.dims()[0];
        let rows = own[0].tensor.count() / d;
        let lost = self.lost_now(pass)?;
        let stack = end_to_end(&mut pass.tape, own.clone())?;
        let mut chosen: Option<Tensor> = None;
        let mut terms = Vec::new();
        let op = HiddenMse { reduction: Reduction::HalfSum, normalised: false };
        let by_row = Var::constant(weights.reshape(&[rows])?);
        // From the last layer down: each choice bounds the next.
        for &layer in self.teacher.iter().rev() {
            let teacher = taught(layer)?.reshape(&[rows, d])?.detach();
            let distance = |states: &Var| -> Result<Tensor> {
                let states = states.tensor.reshape(&[rows, d])?;
                // The mean length comes second.
                let outputs = dispatch::run(&op, &[&states, &teacher.tensor, &by_row.tensor])?;
                let none = || Error::Shape { op: "dynamic matching", rule: "a distance", got: "none".into() };
                outputs.first().ok_or_else(none)?.reshape(&[1, 1])
            };
            let distances = own.iter().map(|states| distance(states).map(Var::constant)).collect::<Result<Vec<_>>>()?;
            let distances = end_to_end(&mut Tape::inference(), distances)?.tensor.reshape(&[1, own.len()])?;
            let index = self.nearest(&distances, &lost, chosen.as_ref())?;
            let states = pass.tape.first(GatherRows, &[&stack, &Var::constant(index.clone())])?;
            terms.push(pass.tape.first(op, &[&states.reshape(&[rows, d])?, &teacher, &by_row])?);
            chosen = Some(index);
        }
        let factor = self.settings.weight * 2.0 / d as f32 / self.teacher.len() as f32;
        match total(pass, terms)? {
            Some(sum) => scaled(pass, &sum.reshape(&[1])?, factor).map(Some),
            None => Ok(None),
        }
    }

    /// [`Matcher::lost`], and [`NEVER`] for layers whose FFN a gate of this pass closes.
    fn lost_now(&self, pass: &Pass) -> Result<Tensor> {
        let Some(gates) = pass.made(Gates::FFNS) else {
            return Ok(self.lost.clone());
        };
        let count = gates.tensor.count();
        if self.of_ffn.shape().last() != count {
            return Ok(self.lost.clone());
        }
        let open = dispatch::run_one(&Above { threshold: 0.0 }, &[&gates.tensor])?.reshape(&[1, count])?;
        // Closed ones: 1 - open.
        let closed = dispatch::run_one(&SUB, &[&self.ones(count)?, &open])?;
        let layers = dispatch::run_one(&Matmul::linear(), &[&closed, &self.of_ffn])?;
        let never = dispatch::run_one(&Unary(Function::Scale(NEVER)), &[&layers])?;
        dispatch::run_one(&ADD, &[&self.lost, &never])
    }

    fn ones(&self, count: usize) -> Result<Tensor> {
        let fill = Fill { value: 1.0, dims: Shape::new(&[1, count])?, dtype: DType::F32 };
        dispatch::one(dispatch::run_on(self.lost.device(), &fill, &[])?, "ones")
    }

    /// Index u32 `[1]` of the nearest layer by distances `[1, L]`, the first among equals.
    fn nearest(&self, distances: &Tensor, lost: &Tensor, above: Option<&Tensor>) -> Result<Tensor> {
        let layers = self.student.len();
        let mut distances = dispatch::run_one(&ADD, &[distances, lost])?;
        if let (Order::Ascending, Some(above)) = (self.settings.order, above) {
            let row = |table: &Tensor| dispatch::run_one(&GatherRows, &[table, above])?.reshape(&[1, layers]);
            let not_below = dispatch::run_one(&SUB, &[&self.ones(layers)?, &row(&self.below)?])?;
            let far = dispatch::run_one(&Unary(Function::Scale(RATHER_NOT)), &[&not_below])?;
            // The choice above itself is the least of these.
            let same = dispatch::run_one(&Unary(Function::Scale(-0.5 * RATHER_NOT)), &[&row(&self.each)?])?;
            let far = dispatch::run_one(&ADD, &[&far, &same])?;
            distances = dispatch::run_one(&ADD, &[&distances, &far])?;
        }
        let nearness = dispatch::run_one(&Unary(Function::Scale(-1.0)), &[&distances])?;
        dispatch::run_one(&ArgMax, &[&nearness])?.reshape(&[1])
    }
}

/// A table of zeros where no block has an FFN.
fn of_ffn_or_zeros(values: Vec<f32>, layers: usize) -> Vec<f32> {
    if values.is_empty() { vec![0.0; layers] } else { values }
}

/// Rows of all parts, which one concatenation takes seven of.
fn end_to_end(tape: &mut Tape, mut parts: Vec<Var>) -> Result<Var> {
    while parts.len() > 1 {
        let mut joined = Vec::with_capacity(parts.len().div_ceil(7));
        for part in parts.chunks(7) {
            joined.push(match part {
                [one] => one.clone(),
                several => tape.first(Concat { axis: 0 }, &several.iter().collect::<Vec<_>>())?,
            });
        }
        parts = joined;
    }
    parts.pop().ok_or(Error::Shape { op: "dynamic matching", rule: "a student with layers", got: "none".into() })
}
