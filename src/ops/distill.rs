//! Distillation losses on hidden states and logits: squared error, Kullback-Leibler divergences, cosine.
//!
//! Every loss takes one f32 weight per row: 0 masks a row, and a batch in which every row is masked has loss 0 and
//! gradient 0. The teacher is a constant: its inputs get no gradient.

mod cases;
mod cosine;
mod kl;
mod mse;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Source, source};
use crate::op::Family;
use crate::shape::{self, Meta};

pub(crate) use cases::{DIRECTIONS, WEIGHTS};
pub use cosine::{Cosine, CosineBackward};
pub(crate) use kl::Divergence;
pub use kl::{Direction, Kl, KlBackward};
pub use mse::{HiddenMse, HiddenMseBackward, Reduction};

pub use super::linear_loss::LinearKl;

pub static FAMILY: Family = Family { name: "distill", cases: cases::cases, source: Some(SOURCE) };

const SOURCE: Source = source!("distill");

/// Checks a student and a teacher `[n, d]` of one float type, the rows' weights f32 `[n]`, and what follows.
/// Gives the meta of an f32 per row.
fn check_pair(op: &'static str, rule: &'static str, inputs: &[Meta], rest: &[Meta]) -> Result<Meta> {
    let broken = || Error::Shape { op, rule, got: shape::list(inputs) };
    let [student, teacher, weight, after @ ..] = inputs else {
        return Err(broken());
    };
    if !student.dtype.is_float() || teacher.dtype != student.dtype || weight.dtype != DType::F32 {
        let expected = "student and teacher of one float type, f32 weights";
        return Err(Error::Dtype { op, expected, got: shape::list(inputs) });
    }
    let &[n, d] = student.dims() else {
        return Err(broken());
    };
    if d == 0 || teacher.shape != student.shape || weight.dims() != [n] || after != rest {
        return Err(broken());
    }
    Ok(*weight)
}

/// Meta of `n` f32.
fn vector(n: usize) -> Result<Meta> {
    Meta::new(&[n], DType::F32)
}
