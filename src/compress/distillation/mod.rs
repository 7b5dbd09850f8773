//! Distillation: a student learns from what a larger model computes, beside the labels.
//!
//! [`Distillation`] compares the last hidden states and the logits with cached ones, in one device or a pipeline.
//! [`LayerwiseDistillation`] runs its teachers beside the student and compares layer by layer, by a list of matches.

pub mod cache;
pub mod dynamic;
mod last_layer;
pub mod layerwise;
pub mod logits;
pub mod matches;
pub mod presets;
mod relations;
pub mod schedule;

pub use cache::{Kept, TeacherCache, predictions};
pub use dynamic::{Dynamic, Order};
pub use last_layer::{Distillation, PROJECTION, Projection, Weights, selection};
pub use layerwise::{LayerwiseDistillation, Lessons, Tutor};
pub use logits::{LogitLoss, Logits};
pub use matches::{Direction, Feature, Layer, Match, MatchLoss, MatchProjection};
pub use presets::{Lesson, Preset};
pub use schedule::{TemperatureSchedule, WeightSchedule};

use crate::error::Result;
use crate::nn::{Model, Pass};
use crate::ops::binary::{ADD, Binary, BinaryFunction, MUL};
use crate::ops::matmul::Matmul;
use crate::ops::softmax::Softmax;
use crate::ops::unary::{Function, Unary};
use crate::rng::Stream;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

const SUB: Binary = Binary(BinaryFunction::Sub);

fn scaled(pass: &mut Pass, x: &Var, factor: f32) -> Result<Var> {
    if factor == 1.0 {
        return Ok(x.clone());
    }
    pass.tape.first(Unary(Function::Scale(factor)), &[x])
}

/// Sum of the terms; `None` of none.
fn total(pass: &mut Pass, terms: Vec<Var>) -> Result<Option<Var>> {
    let mut total: Option<Var> = None;
    for term in terms {
        total = Some(match total {
            None => term,
            Some(sum) => pass.tape.first(ADD, &[&sum, &term])?,
        });
    }
    Ok(total)
}

/// Rows `[n, d]` each times its factor of `[n]`: n products of 1 x 1 by 1 x d.
fn row_scaled(tape: &mut Tape, rows: &Var, factors: &Var) -> Result<Var> {
    let [n, d] = [rows.tensor.shape().rows(), rows.tensor.shape().last()];
    let product = Matmul::plain(false, false);
    tape.first(product, &[&factors.reshape(&[n, 1, 1])?, &rows.reshape(&[n, 1, d])?])?.reshape(rows.dims())
}

/// 1 / n of the n labelled rows (weight above 0) of each row of `weights` `[.., T]`, 0 elsewhere; evenly where none is.
fn labelled_shares(tape: &mut Tape, weights: &Var) -> Result<Var> {
    // tanh makes 0 and 1 of 0 and everything else; exp(-1e4) is 0 in f32, so the softmax divides by the number of ones.
    let large = tape.first(Unary(Function::Scale(1e30)), &[weights])?;
    let labelled = tape.first(Unary(Function::Tanh), &[&large])?;
    let apart = tape.first(Unary(Function::Scale(1e4)), &[&labelled])?;
    tape.first(Softmax, &[&apart])
}

/// A projection `[to, from]` to be learned, of small random numbers, where the student has none of this name: a resumed
/// training brings it. `seed`, and the site that its numbers are drawn at.
///
/// # Errors
/// Those of the device.
pub fn add_projection(student: &mut Model, name: &str, [to, from]: [usize; 2], (seed, site): (u64, u32)) -> Result<()> {
    if student.tensors.contains_key(name) {
        return Ok(());
    }
    let mut stream = Stream::new(seed, site);
    let values: Vec<f32> = (0..from * to).map(|_| (0.02 * stream.normal()) as f32).collect();
    let weight = Tensor::from_slice(student.device(), &[to, from], &values)?;
    student.tensors.insert(name.into(), weight);
    Ok(())
}
