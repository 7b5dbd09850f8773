//! A linear layer in whatever representation its tensors have.

use super::forward::Pass;
use super::model::missing;
use crate::error::Result;
use crate::ops::matmul::{Epilogue, Matmul};
use crate::ops::quant::{Granularity, MatmulInt8, Quantize, Scheme};
use crate::ops::quant_int4::MatmulInt4;
use crate::ops::sparse24::{MatmulSparse24, MatmulSparse24Int8};
use crate::tape::Var;

/// Activations of int8 layers: symmetric narrow, one scale per token.
pub(super) const ACTIVATION: Quantize =
    Quantize { bits: 8, scheme: Scheme::SymmetricNarrow, granularity: Granularity::Token };

impl Pass<'_> {
    /// y = x W^T + b for x `[.., k]`, on the kernel of the stored representation.
    pub fn linear(&mut self, name: &str, x: &Var) -> Result<Var> {
        let bias = self.optional(&format!("{name}.bias"))?;
        if let Some(weight) = self.optional(&format!("{name}.weight"))? {
            let (x, weight) = self.hooked(name, x.clone(), weight)?;
            return match &bias {
                Some(bias) => {
                    self.tape.first(Matmul { epilogue: Epilogue::Bias, ..Matmul::linear() }, &[&x, &weight, bias])
                }
                None => self.tape.first(Matmul::linear(), &[&x, &weight]),
            };
        }
        let rows = self.rows(x)?;
        let scale = self.optional(&format!("{name}.scale"))?;
        let y = if let Some(values) = self.optional(&format!("{name}.values"))? {
            let metadata = self.optional(&format!("{name}.metadata"))?.ok_or_else(|| missing(name))?;
            match scale {
                Some(scale) => {
                    let q = self.tape.run(ACTIVATION, &[&rows])?;
                    let inputs = [&q[0], &q[1], &values, &metadata, &scale].into_iter().chain(&bias);
                    self.tape.first(MatmulSparse24Int8 { bias: bias.is_some() }, &inputs.collect::<Vec<_>>())?
                }
                None => {
                    let inputs = [&rows, &values, &metadata].into_iter().chain(&bias);
                    self.tape.first(MatmulSparse24 { bias: bias.is_some() }, &inputs.collect::<Vec<_>>())?
                }
            }
        } else if let (Some(weight), Some(scale)) = (self.optional(&format!("{name}.int8"))?, &scale) {
            let q = self.tape.run(ACTIVATION, &[&rows])?;
            let inputs = [&q[0], &q[1], &weight, scale].into_iter().chain(&bias);
            self.tape.first(MatmulInt8 { bias: bias.is_some() }, &inputs.collect::<Vec<_>>())?
        } else if let (Some(packed), Some(scale)) = (self.optional(&format!("{name}.int4"))?, &scale) {
            let group = rows.tensor.shape().last() / scale.tensor.shape().last().max(1);
            let inputs = [&rows, &packed, scale].into_iter().chain(&bias);
            self.tape.first(MatmulInt4 { group, bias: bias.is_some() }, &inputs.collect::<Vec<_>>())?
        } else {
            return Err(missing(&format!("{name}.weight")));
        };
        let mut dims = x.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = y.tensor.shape().last();
        }
        y.reshape(&dims)
    }

    /// `[.., k]` as `[rows, k]`.
    pub(super) fn rows(&self, x: &Var) -> Result<Var> {
        let shape = x.tensor.shape();
        x.reshape(&[shape.rows(), shape.last()])
    }
}
