//! The list of layers that are compared, each with its loss, weight and projection (TextBrewer's `intermediate_matches`),
//! and the losses on hidden states.

use serde::{Deserialize, Serialize};

use super::schedule::WeightSchedule;
use super::{MUL, labelled_shares, row_scaled, scaled};
use crate::compress::written;
use crate::error::{Error, Result};
use crate::nn::{Batch, Config, Pass, Tap};
use crate::ops::distill::{Cosine, HiddenMse, Reduction};
use crate::ops::layout::Slice;
use crate::ops::matmul::Matmul;
use crate::ops::reduce::{Axis, Reduce, ReduceFunction};
use crate::ops::unary::Cast;
use crate::tape::Var;
use crate::train::trainer::sum;

/// A layer by its number: 0 is the embedding, i what block i (counted from 1) gives or does; below 0 from the end, -1 the
/// last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Layer(pub i32);

impl Layer {
    /// Its number from 0 on in a model.
    ///
    /// # Errors
    /// `Parameter` where the model has no such layer.
    pub fn of(self, config: &Config) -> Result<usize> {
        let layers = config.blocks.len() as i32;
        let number = if self.0 < 0 { layers + 1 + self.0 } else { self.0 };
        usize::try_from(number).ok().filter(|_| number <= layers).ok_or_else(|| Error::Parameter {
            op: "match",
            parameter: "layer",
            value: format!("{} of a model of {layers} blocks", self.0),
            allowed: "0 (embedding) to the number of blocks, or from the end -1 on",
        })
    }
}

/// What of a layer is compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Feature {
    /// Hidden states.
    #[default]
    Hidden,
    /// Queries against keys: attention scores.
    Attention,
    /// Relations of queries among each other (MiniLMv2); keys and values likewise.
    Query,
    Key,
    Value,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MatchLoss {
    /// Hidden: mean over channels of the squared difference. Attention and relations: mean over keys of the squared
    /// difference of scores before softmax (TinyBERT), averaged over heads.
    #[default]
    Mse,
    /// Half the sum of squares (LightChatGLM Eq 10).
    HalfSum,
    /// Mean squared difference after dividing each side by its mean row length (BMCook).
    NormalisedMse,
    /// 1 - cos (DistilBERT).
    Cosine,
    /// Squared distance of the first token's states, each divided by its length (Sun et al. 2019): 2 (1 - cos).
    Pkd,
    /// Mean squared difference of Hᵀ H / n over a sequence's n labelled tokens (Yim et al. 2017, one layer).
    Gram,
    /// Mean squared difference of H Hᵀ / d (Huang and Wang 2017, quadratic kernel).
    Mmd,
    /// KL(teacher || student) of softmaxes over keys, averaged over heads (MiniLM).
    Kl,
}

/// How widths meet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MatchProjection {
    /// None where widths are equal; the channels that the student kept, where they are known; else learned.
    #[default]
    Auto,
    None,
    /// The teacher's channels that the student kept.
    Kept,
    /// A learned linear layer without bias.
    Linear,
    /// With an activation behind it (TextBrewer).
    Relu,
    Tanh,
}

/// Which side a learned projection is on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// TextBrewer, TinyBERT.
    #[default]
    StudentToTeacher,
    /// BMCook.
    TeacherToStudent,
}

/// One pair of layers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Match {
    pub teacher: Layer,
    pub student: Layer,
    #[serde(default)]
    pub feature: Feature,
    #[serde(default)]
    pub loss: MatchLoss,
    #[serde(default = "one")]
    pub weight: f32,
    #[serde(default)]
    pub schedule: WeightSchedule,
    #[serde(default)]
    pub projection: MatchProjection,
    #[serde(default)]
    pub direction: Direction,
    /// Heads of a relation, re-split from all channels; 0: the models' own.
    #[serde(default)]
    pub heads: usize,
    /// Which of several teachers.
    #[serde(default)]
    pub tutor: usize,
}

fn one() -> f32 {
    1.0
}

impl Match {
    /// The same layers' hidden states under a loss, weight 1.
    pub fn hidden(teacher: i32, student: i32, loss: MatchLoss) -> Self {
        Self {
            teacher: Layer(teacher),
            student: Layer(student),
            feature: Feature::Hidden,
            loss,
            weight: 1.0,
            schedule: WeightSchedule::Constant,
            projection: MatchProjection::Auto,
            direction: Direction::StudentToTeacher,
            heads: 0,
            tutor: 0,
        }
    }

    /// What both passes have to keep for it, teacher first.
    ///
    /// # Errors
    /// `Parameter` for a layer that is not there, a loss that the feature has not, a weight that is no number.
    pub fn taps(&self, teacher: &Config, student: &Config) -> Result<[Tap; 2]> {
        let refuse =
            |parameter, value: String, allowed| Err(Error::Parameter { op: "match", parameter, value, allowed });
        if !(self.weight.is_finite() && self.weight >= 0.0) {
            return refuse("weight", self.weight.to_string(), "finite, from 0");
        }
        let relation = matches!(self.loss, MatchLoss::Mse | MatchLoss::Kl);
        let fits = match self.feature {
            Feature::Hidden => self.loss != MatchLoss::Kl,
            _ => relation,
        };
        if !fits {
            let value = format!("{} of {}", written(&self.loss), written(&self.feature));
            return refuse("loss", value, "mse or kl of attention and relations, anything but kl of hidden states");
        }
        let layers = [self.teacher.of(teacher)?, self.student.of(student)?];
        if self.feature == Feature::Hidden {
            return Ok(layers.map(Tap::Hidden));
        }
        if layers.contains(&0) {
            return refuse("layer", "0".into(), "1 on for attention and relations: the embedding has none");
        }
        Ok(layers.map(|layer| Tap::Attention(layer - 1)))
    }

    /// Loss of hidden states of one width, `[B, T, d]`, in the unit of the rows' weights `[B, T]`.
    pub(super) fn hidden_loss(
        &self,
        pass: &mut Pass,
        student: &Var,
        teacher: &Var,
        (batch, weights): (&Batch, &Var),
    ) -> Result<Var> {
        let shape = student.tensor.shape();
        let (n, d) = (shape.rows(), shape.last());
        let [rows, taught] = [student.reshape(&[n, d])?, teacher.reshape(&[n, d])?];
        let squares = |normalised| HiddenMse { reduction: Reduction::HalfSum, normalised };
        let mean = 2.0 / d as f32;
        let by_row = weights.reshape(&[n])?;
        match self.loss {
            MatchLoss::Mse | MatchLoss::Kl => {
                let loss = pass.tape.first(squares(false), &[&rows, &taught, &by_row])?;
                scaled(pass, &loss, mean)
            }
            MatchLoss::HalfSum => pass.tape.first(squares(false), &[&rows, &taught, &by_row]),
            MatchLoss::NormalisedMse => {
                let loss = pass.tape.first(squares(true), &[&rows, &taught, &by_row])?;
                scaled(pass, &loss, mean)
            }
            MatchLoss::Cosine => {
                let loss = pass.tape.first(Cosine, &[&rows, &taught, &by_row])?;
                sum(pass, &loss)
            }
            MatchLoss::Pkd => {
                let first = Slice { axis: 1, start: 0, length: 1 };
                let batch = student.dims()[0];
                let [own, other] = [student, teacher].map(|x| pass.tape.first(first, &[x])?.reshape(&[batch, d]));
                let sequences = labels(pass, weights)?;
                let loss = pass.tape.first(Cosine, &[&own?, &other?, &sequences])?;
                let loss = sum(pass, &loss)?;
                scaled(pass, &loss, 2.0)
            }
            MatchLoss::Gram => {
                let (sequences, shares) = (labels(pass, weights)?, labelled_shares(&mut pass.tape, weights)?);
                let [own, other] = [student, teacher].map(|x| gram(pass, x, &shares));
                let loss = pass.tape.first(squares(false), &[&own?, &other?, &sequences])?;
                scaled(pass, &loss, mean / d as f32)
            }
            MatchLoss::Mmd => super::relations::mmd(pass, student, teacher, (batch, weights)),
        }
    }
}

/// Labelled rows of each sequence, f32 `[B]` of weights `[B, T]`: what a loss that a sequence has one of counts.
fn labels(pass: &mut Pass, weights: &Var) -> Result<Var> {
    pass.tape.first(Reduce { function: ReduceFunction::Sum, axis: Axis::Last }, &[weights])
}

/// Hᵀ diag(shares) H of each sequence, as rows `[B, d d]`.
fn gram(pass: &mut Pass, hidden: &Var, shares: &Var) -> Result<Var> {
    let (batch, d) = (hidden.dims()[0], hidden.tensor.shape().last());
    let shares = match hidden.tensor.dtype() {
        dtype if dtype == shares.tensor.dtype() => shares.clone(),
        to => pass.tape.first(Cast { to }, &[shares])?,
    };
    let weighted = row_scaled(&mut pass.tape, hidden, &shares)?;
    let gram = pass.tape.first(Matmul::plain(true, false), &[&weighted, hidden])?;
    gram.reshape(&[batch, d * d])
}

/// The term times its weight.
pub(super) fn weighted(pass: &mut Pass, loss: &Var, weight: f32, factor: Option<&Var>) -> Result<Var> {
    let loss = scaled(pass, loss, weight)?;
    match factor {
        Some(factor) => pass.tape.first(MUL, &[&loss, factor]),
        None => Ok(loss),
    }
}
