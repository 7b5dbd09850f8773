//! Losses on logits: divergences and the squared error, with a temperature that is fixed, follows the steps or the rows,
//! and the probability shift. A vocabulary's logits exist for [`LOSS_CHUNK`] tokens at a time at most.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::schedule::{Number, TemperatureSchedule, WeightSchedule};
use super::{MUL, SUB, labelled_shares, row_scaled, total};
use crate::compress::written;
use crate::dispatch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{Head, Pass};
use crate::ops::binary::ADD;
use crate::ops::distill::{Cosine, Direction, HiddenMse, Kl, LinearKl, Reduction};
use crate::ops::layout::{Concat, Fill, ScatterAddRows, Slice};
use crate::ops::matmul::Matmul;
use crate::ops::reduce::{ArgMax, Axis, Reduce, ReduceFunction};
use crate::ops::softmax::{CrossEntropy, CrossEntropyBackward, Softmax};
use crate::ops::unary::{Cast, Function, Unary};
use crate::shape::Shape;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::train::trainer::{LOSS_CHUNK, sum};

/// What is measured between the teacher's distribution p and the student's q.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogitLoss {
    /// KL(p || q).
    #[default]
    Forward,
    /// KL(q || p).
    Reverse,
    /// beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.
    Jsd,
    /// Mean over the vocabulary of (z_S / T - z_T / T)^2 (TextBrewer's kd_mse).
    Mse,
}

/// How logits are compared.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logits {
    #[serde(default)]
    pub loss: LogitLoss,
    /// Of the Jensen-Shannon divergence.
    #[serde(default = "half")]
    pub beta: f32,
    #[serde(default = "two")]
    pub temperature: f32,
    #[serde(default)]
    pub temperature_schedule: TemperatureSchedule,
    /// Multiply by T^2, so that the gradient keeps its scale (Hinton et al. 2015; not in BMCook and TextBrewer).
    #[serde(default = "yes")]
    pub squared: bool,
    #[serde(default = "one")]
    pub weight: f32,
    #[serde(default)]
    pub schedule: WeightSchedule,
    /// Where the teacher errs, its largest logit and that of the gold label change places (TextBrewer).
    #[serde(default)]
    pub probability_shift: bool,
}

fn half() -> f32 {
    0.5
}

fn one() -> f32 {
    1.0
}

fn two() -> f32 {
    2.0
}

fn yes() -> bool {
    true
}

impl Default for Logits {
    fn default() -> Self {
        Self {
            loss: LogitLoss::Forward,
            beta: half(),
            temperature: two(),
            temperature_schedule: TemperatureSchedule::Constant,
            squared: true,
            weight: one(),
            schedule: WeightSchedule::Constant,
            probability_shift: false,
        }
    }
}

impl Logits {
    /// Refuses what cannot be computed; `cached`: the teacher's logits are its largest alone.
    pub fn check(&self, cached: bool) -> Result<()> {
        let refuse =
            |parameter, value: String, allowed| Err(Error::Parameter { op: "logits", parameter, value, allowed });
        self.temperature_schedule.check(self.temperature)?;
        if !(self.weight.is_finite() && self.weight >= 0.0) {
            return refuse("weight", self.weight.to_string(), "finite, from 0");
        }
        if self.loss == LogitLoss::Jsd && !(self.beta > 0.0 && self.beta < 1.0) {
            return refuse("beta", self.beta.to_string(), "between 0 and 1, exclusive");
        }
        if cached && self.loss == LogitLoss::Mse {
            let allowed =
                "forward, reverse or jsd with cached largest logits, which are known up to a constant of the row";
            return refuse("loss", "mse".into(), allowed);
        }
        if cached && self.temperature_schedule != TemperatureSchedule::Constant {
            let allowed = "constant with cached largest logits: their log-sum-exp is that of one temperature";
            return refuse("temperature_schedule", written(&self.temperature_schedule), allowed);
        }
        Ok(())
    }
}

/// What the teacher says of the rows.
pub(super) enum Taught {
    /// Last hidden states `[N, e]` and the head they go through, `[V, e]`, with its bias.
    Dense { hidden: Var, head: Tensor, bias: Option<Tensor> },
    /// The largest logits: see [`crate::train::lifecycle::Top`].
    Top { slots: Tensor, values: Tensor },
}

/// A loss on logits with its numbers in device memory.
#[derive(Clone)]
pub(super) struct LogitTerm {
    settings: Logits,
    /// 1 / T of the step, and T.
    inverse: Number,
    temperature: Number,
    /// Weight of the step, and its T^2 where that changes.
    factor: Number,
    epsilon: Number,
}

/// Every number of a loss that does not follow rows.
impl LogitTerm {
    pub fn new(settings: Logits, like: &Tensor) -> Result<Self> {
        let device = like.device();
        let term = Self {
            settings,
            inverse: Number::new(device, 1.0)?,
            temperature: Number::new(device, 1.0)?,
            factor: Number::new(device, 1.0)?,
            epsilon: Number::new(device, 1e-3)?,
        };
        term.set(0, 1)?;
        Ok(term)
    }

    /// Before the step after `done` of `total`.
    pub fn set(&self, done: u64, total: u64) -> Result<()> {
        let s = &self.settings;
        let t = s.temperature_schedule.temperature(s.temperature, done, total);
        let squared = s.squared && !s.temperature_schedule.by_row();
        self.inverse.set(1.0 / t)?;
        self.temperature.set(t)?;
        self.factor.set(f64::from(s.weight) * s.schedule.factor(done, total) * if squared { t * t } else { 1.0 })
    }

    /// The weighted sum over rows, in the unit of `weights` `[N]`; `gold` u32 `[N]`.
    pub fn loss(&self, pass: &mut Pass, rows: &Var, taught: &Taught, weights: &Tensor, gold: &Tensor) -> Result<Var> {
        let head = pass.head_weight()?;
        let bias = match pass.model.config.head {
            Head::Tagging { .. } => Some(pass.parameter("head.bias")?),
            Head::Language { .. } => None,
        };
        let loss = match (taught, self.direction()) {
            (Taught::Dense { hidden, head: other, bias: None }, Some(direction)) if self.fuses() && bias.is_none() => {
                // (h / T) Wᵀ is z / T: the temperature may change from step to step without the launch doing so.
                let inverse = pass.constant(self.inverse.tensor())?;
                let [own, teacher] = [rows, hidden].map(|h| pass.tape.first(MUL, &[h, &inverse]));
                let op = LinearKl { direction, temperature: 1.0, squared: false, chunk: LOSS_CHUNK };
                let (other, weights) = (pass.constant(other)?, Var::constant(weights.clone()));
                let losses = pass.tape.first(op, &[&own?, &head, &teacher?, &other, &weights])?;
                sum(pass, &losses)?
            }
            _ => self.chunked(pass, rows, (&head, bias.as_ref()), taught, (weights, gold))?,
        };
        pass.tape.first(MUL, &[&loss, &Var::constant(self.factor.tensor().clone())])
    }

    fn direction(&self) -> Option<Direction> {
        match self.settings.loss {
            LogitLoss::Forward => Some(Direction::Forward),
            LogitLoss::Reverse => Some(Direction::Reverse),
            LogitLoss::Jsd => Some(Direction::Jsd { beta: self.settings.beta }),
            LogitLoss::Mse => None,
        }
    }

    fn fuses(&self) -> bool {
        !self.settings.probability_shift && !self.settings.temperature_schedule.by_row()
    }

    /// A chunk of rows at a time; backward computes a chunk's logits again instead of keeping them.
    fn chunked(
        &self,
        pass: &mut Pass,
        rows: &Var,
        (head, bias): (&Var, Option<&Var>),
        taught: &Taught,
        (weights, gold): (&Tensor, &Tensor),
    ) -> Result<Var> {
        let n = rows.tensor.shape().rows();
        let of_rows = self.row_temperatures(rows, (head, bias), taught, weights)?;
        let mut terms = Vec::new();
        for start in (0..n).step_by(LOSS_CHUNK) {
            let chunk = Slice { axis: 0, start, length: LOSS_CHUNK.min(n - start) };
            let cut = |tensor: &Tensor| dispatch::run_one(&chunk, &[tensor]);
            let own = pass.tape.first(chunk, &[rows])?;
            let piece = Chunk {
                term: self.clone(),
                taught: taught.cut(&chunk)?,
                weights: cut(weights)?,
                gold: cut(gold)?,
                of_rows: of_rows.as_ref().map(|t| Ok::<_, Error>([cut(&t[0])?, cut(&t[1])?])).transpose()?,
            };
            let inputs: Vec<&Var> = [&own, head].into_iter().chain(bias).collect();
            let segment = Arc::new(move |tape: &mut Tape, vars: &[Var]| Ok(vec![piece.loss(tape, vars)?]));
            terms.extend(pass.tape.segment(segment, &inputs)?);
        }
        total(pass, terms)?.ok_or(Error::Shape { op: "logits", rule: "at least one row", got: "none".into() })
    }

    /// 1 / tau and tau of every row `[N]`, where rows have temperatures of their own.
    fn row_temperatures(
        &self,
        rows: &Var,
        (head, bias): (&Var, Option<&Var>),
        taught: &Taught,
        weights: &Tensor,
    ) -> Result<Option<[Tensor; 2]>> {
        let beta = match self.settings.temperature_schedule {
            TemperatureSchedule::Flsw { beta, .. } | TemperatureSchedule::Cwsm { beta } => beta,
            _ => return Ok(None),
        };
        let n = rows.tensor.shape().rows();
        let tape = &mut Tape::inference();
        let mut parts = Vec::new();
        for start in (0..n).step_by(LOSS_CHUNK) {
            let chunk = Slice { axis: 0, start, length: LOSS_CHUNK.min(n - start) };
            let own = tape.first(chunk, &[&rows.detach()])?;
            let student = logits(tape, &own, &head.detach(), bias.map(Var::detach).as_ref())?;
            let Some(teacher) = taught.cut(&chunk)?.dense(tape)? else {
                let rule = "whole logits of the teacher, for temperatures of rows";
                return Err(Error::Shape { op: "logits", rule, got: "its largest".into() });
            };
            parts.push(self.confidence(tape, &student, &teacher)?);
        }
        let mut all = joined(tape, parts)?;
        // The mean over labelled rows, whatever they weigh.
        let share = labelled_shares(tape, &Var::constant(weights.reshape(&[1, n])?))?.reshape(&[n])?;
        let mean = tape.first(MUL, &[&all, &share])?;
        let mean = tape.first(Reduce { function: ReduceFunction::Sum, axis: Axis::All }, &[&mean])?.reshape(&[1])?;
        let mean = tape.first(Unary(Function::Scale(beta)), &[&mean])?;
        let base = tape.first(ADD, &[&mean, &Var::constant(self.temperature.tensor().clone())])?;
        all = tape.first(Unary(Function::Scale(-beta)), &[&all])?;
        let temperatures = tape.first(ADD, &[&all, &base])?;
        let inverse = tape.first(Unary(Function::Reciprocal), &[&temperatures])?;
        Ok(Some([inverse.tensor, temperatures.tensor]))
    }

    /// w of rows: what their temperature goes by.
    fn confidence(&self, tape: &mut Tape, student: &Var, teacher: &Var) -> Result<Var> {
        let rows = student.tensor.shape().rows();
        match self.settings.temperature_schedule {
            TemperatureSchedule::Flsw { gamma, .. } => {
                let ones = Fill { value: 1.0, dims: Shape::new(&[rows])?, dtype: DType::F32 };
                let ones = dispatch::one(dispatch::run_on(student.tensor.device(), &ones, &[])?, "fill")?;
                let w = tape.first(Cosine, &[student, teacher, &Var::constant(ones)])?;
                if gamma == 2 { tape.first(MUL, &[&w, &w]) } else { Ok(w) }
            }
            _ => {
                let p = tape.first(Softmax, &[student])?;
                let largest = Reduce { function: ReduceFunction::Max, axis: Axis::Last };
                let p = tape.first(largest, &[&p])?;
                let p = tape.first(ADD, &[&p, &Var::constant(self.epsilon.tensor().clone())])?;
                tape.first(Unary(Function::Reciprocal), &[&p])
            }
        }
    }
}

/// Logits f32 of rows through a head and its bias.
pub(super) fn logits(tape: &mut Tape, rows: &Var, head: &Var, bias: Option<&Var>) -> Result<Var> {
    let z = match bias {
        Some(bias) => tape.first(Matmul::linear_bias(), &[rows, head, bias])?,
        None => tape.first(Matmul::linear(), &[rows, head])?,
    };
    if z.tensor.dtype() == DType::F32 { Ok(z) } else { tape.first(Cast { to: DType::F32 }, &[&z]) }
}

/// Vectors end to end; one op takes seven at most.
fn joined(tape: &mut Tape, mut parts: Vec<Var>) -> Result<Var> {
    while parts.len() > 1 {
        let join = |group: &[Var]| match group {
            [one] => Ok(one.clone()),
            many => tape.first(Concat { axis: 0 }, &many.iter().collect::<Vec<_>>()),
        };
        parts = parts.chunks(7).map(join).collect::<Result<_>>()?;
    }
    parts.pop().ok_or(Error::Shape { op: "logits", rule: "at least one row", got: "none".into() })
}

impl Taught {
    /// Of a chunk of rows.
    fn cut(&self, chunk: &Slice) -> Result<Self> {
        let cut = |tensor: &Tensor| dispatch::run_one(chunk, &[tensor]);
        Ok(match self {
            Taught::Dense { hidden, head, bias } => {
                let hidden = Var::constant(cut(&hidden.tensor)?);
                Taught::Dense { hidden, head: head.clone(), bias: bias.clone() }
            }
            Taught::Top { slots, values } => Taught::Top { slots: cut(slots)?, values: cut(values)? },
        })
    }

    /// All logits, where they can be had.
    fn dense(&self, tape: &mut Tape) -> Result<Option<Var>> {
        let Taught::Dense { hidden, head, bias } = self else {
            return Ok(None);
        };
        let mut constant = |tensor: &Tensor| match hidden.tensor.dtype() {
            dtype if dtype == tensor.dtype() => Ok(Var::constant(tensor.clone())),
            to => tape.first(Cast { to }, &[&Var::constant(tensor.clone())]),
        };
        let (head, bias) = (constant(head)?, bias.as_ref().map(constant).transpose()?);
        logits(tape, hidden, &head, bias.as_ref()).map(Some)
    }
}

/// The loss of a chunk of rows, to be computed twice.
struct Chunk {
    term: LogitTerm,
    taught: Taught,
    weights: Tensor,
    gold: Tensor,
    of_rows: Option<[Tensor; 2]>,
}

impl Chunk {
    /// The sum over the rows `vars[0]`, through the head `vars[1]` and its bias.
    fn loss(&self, tape: &mut Tape, vars: &[Var]) -> Result<Var> {
        let [rows, head, bias @ ..] = vars else {
            return Err(Error::Shape { op: "logits", rule: "rows and a head", got: "fewer".into() });
        };
        let settings = &self.term.settings;
        let student = logits(tape, rows, head, bias.first())?;
        let student = self.softened(tape, &student)?;
        let mut teacher = match self.taught.dense(tape)? {
            Some(teacher) => self.softened(tape, &teacher)?,
            None => self.largest(tape, student.dims())?,
        };
        if settings.probability_shift {
            teacher = self.shifted(tape, &teacher)?;
        }
        let mut weights = Var::constant(self.weights.clone());
        if let (Some([_, temperatures]), true) = (&self.of_rows, settings.squared) {
            for _ in 0..2 {
                weights = tape.first(MUL, &[&weights, &Var::constant(temperatures.clone())])?;
            }
        }
        match self.term.direction() {
            Some(direction) => {
                let op = Kl { direction, temperature: 1.0, squared: false };
                let losses = tape.first(op, &[&student, &teacher, &weights])?;
                tape.first(Reduce { function: ReduceFunction::Sum, axis: Axis::All }, &[&losses])
            }
            None => {
                let op = HiddenMse { reduction: Reduction::HalfSum, normalised: false };
                let loss = tape.first(op, &[&student, &teacher, &weights])?;
                let mean = 2.0 / student.tensor.shape().last() as f32;
                tape.first(Unary(Function::Scale(mean)), &[&loss])
            }
        }
    }

    /// z / T.
    fn softened(&self, tape: &mut Tape, z: &Var) -> Result<Var> {
        match &self.of_rows {
            Some([inverse, _]) => row_scaled(tape, z, &Var::constant(inverse.clone())),
            None => tape.first(MUL, &[z, &Var::constant(self.term.inverse.tensor().clone())]),
        }
    }

    /// Logits that give the largest their probabilities and share out the rest evenly, up to a constant of the row.
    fn largest(&self, tape: &mut Tape, dims: &[usize]) -> Result<Var> {
        let Taught::Top { slots, values } = &self.taught else {
            return Err(Error::Shape { op: "logits", rule: "a teacher's largest logits", got: "none".into() });
        };
        let count = values.count();
        let inputs = [values.reshape(&[count, 1])?, slots.reshape(&[count])?].map(Var::constant);
        let rows = dims.iter().product();
        tape.first(ScatterAddRows { rows }, &[&inputs[0], &inputs[1]])?.reshape(dims)
    }

    /// z with the largest and the gold label's exchanged: z + (onehot(gold) - onehot(largest)) (z_largest - z_gold). The
    /// one-hots are what two cross-entropies' gradients differ by.
    fn shifted(&self, tape: &mut Tape, z: &Var) -> Result<Var> {
        let gold = Var::constant(self.gold.clone());
        let largest = tape.first(ArgMax, &[z])?;
        let entropy = CrossEntropy { smoothing: 0.0 };
        let (of_largest, of_gold) = (tape.run(entropy, &[z, &largest])?, tape.run(entropy, &[z, &gold])?);
        // -log p_gold + log p_largest. Rows without a label have weight 0.
        let apart = tape.first(SUB, &[&of_gold[0], &of_largest[0]])?;
        let backward = CrossEntropyBackward { smoothing: 0.0 };
        let lse = &of_largest[1];
        let [to, from] = [&gold, &largest].map(|target| tape.first(backward, &[z, target, lse, &apart]));
        let moved = tape.first(SUB, &[&from?, &to?])?;
        tape.first(ADD, &[z, &moved])
    }
}
