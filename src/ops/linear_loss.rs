//! Losses of a linear head, fused with its product: logits exist for one tile of tokens and vocabulary at a time, in
//! the forward pass and, computed again, in the backward pass. No buffer of tokens times vocabulary is ever held.

mod cases;
mod entropy;
mod groups;
mod kl;
mod plan;
mod predict;

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::op::{Array, Family};
use crate::shape::{self, Meta};

pub use entropy::{LinearCrossEntropy, LinearCrossEntropyBackward};
pub use kl::{LinearKl, LinearKlBackward};
pub use predict::LinearPredict;

pub static FAMILY: Family = Family { name: "linear_loss", cases: cases::cases, source: Some(plan::SOURCE) };

fn check_chunk(op: &'static str, chunk: usize) -> Result<()> {
    if chunk > 0 {
        return Ok(());
    }
    Err(Error::Parameter { op, parameter: "chunk", value: chunk.to_string(), allowed: "1 token and more" })
}

/// Checks that every pair is hidden states `[n, d]` and a head `[v, d]` of one float type, with n and v the same for
/// all pairs; gives n.
fn check_heads(op: &'static str, rule: &'static str, inputs: &[Meta], pairs: &[[usize; 2]]) -> Result<usize> {
    let broken = || Error::Shape { op, rule, got: shape::list(inputs) };
    let mut extents = None;
    for &[hidden, weight] in pairs {
        let (Some(hidden), Some(weight)) = (inputs.get(hidden), inputs.get(weight)) else {
            return Err(broken());
        };
        let (&[n, d], &[v, inner]) = (hidden.dims(), weight.dims()) else {
            return Err(broken());
        };
        if d != inner || d == 0 || v == 0 || extents.is_some_and(|e| e != (n, v)) {
            return Err(broken());
        }
        if !hidden.dtype.is_float() || weight.dtype != inputs[0].dtype || hidden.dtype != inputs[0].dtype {
            return Err(Error::Dtype {
                op,
                expected: "hidden states and heads of one float type",
                got: shape::list(inputs),
            });
        }
        extents = Some((n, v));
    }
    extents.map(|(n, _)| n).ok_or_else(broken)
}

/// Checks that inputs `which` are one value per token.
fn check_rows(op: &'static str, rule: &'static str, inputs: &[Meta], n: usize, which: &[(usize, DType)]) -> Result<()> {
    for &(index, dtype) in which {
        let fits = inputs.get(index).is_some_and(|m| m.dims() == [n] && m.dtype == dtype);
        if !fits {
            return Err(Error::Shape { op, rule, got: shape::list(inputs) });
        }
    }
    let last = which.last().map_or(0, |(index, _)| index + 1);
    if inputs.len() == last { Ok(()) } else { Err(Error::Shape { op, rule, got: shape::list(inputs) }) }
}

fn row(n: usize) -> Result<Meta> {
    Meta::new(&[n], DType::F32)
}

/// Logits hidden weightᵀ in f64, `[n, v]`.
fn logits(hidden: &Array, weight: &Array) -> Result<Array> {
    let d = hidden.shape.last();
    let dot = |h: &[f64], w: &[f64]| h.iter().zip(w).map(|(h, w)| h * w).sum::<f64>();
    let heads = weight.data.chunks(d);
    let data = hidden.data.chunks(d).flat_map(|h| heads.clone().map(move |w| dot(h, w))).collect();
    let dims = [hidden.shape.rows(), weight.shape.rows()];
    Ok(Array { shape: shape::Shape::new(&dims)?, data })
}

/// dhidden = dz weight and dweight = dzᵀ hidden in f64.
fn through(hidden: &Array, weight: &Array, dz: &[f64]) -> Vec<Vec<f64>> {
    let (d, v) = (hidden.shape.last(), weight.shape.rows());
    let (mut dhidden, mut dweight) = (vec![0.0; hidden.data.len()], vec![0.0; weight.data.len()]);
    for (i, dz) in dz.chunks(v).enumerate() {
        for (j, dz) in dz.iter().enumerate() {
            for c in 0..d {
                dhidden[i * d + c] += dz * weight.data[j * d + c];
                dweight[j * d + c] += dz * hidden.data[i * d + c];
            }
        }
    }
    vec![dhidden, dweight]
}
