//! What a rounded intermediate may cost, held against chains of plain ops that store every intermediate.
#![cfg(test)]

use std::sync::Arc;

use super::{Bounds, allowances, draw, judge, reference};
use crate::device::{CpuDevice, Device};
use crate::dispatch;
use crate::dtype::DType;
use crate::op::{Case, Fill, Op, Tolerance};
use crate::ops::attention::{Attention, Mask};
use crate::ops::binary::MUL;
use crate::ops::ffn::{Ffn, FfnActivation};
use crate::ops::matmul::{Epilogue, Matmul};
use crate::ops::softmax::Softmax;
use crate::ops::unary::{Function, Unary};
use crate::tensor::Tensor;

fn one(op: &dyn Op, inputs: &[&Tensor]) -> Tensor {
    dispatch::run(op, inputs).unwrap().remove(0)
}

/// The worst error of the chain's output beyond what storage itself may cost, in units of what a rounded intermediate may.
/// Without that allowance the chain must be refused.
fn worst(case: &Case, dtype: DType, seed: u64, chain: impl Fn(&[Tensor]) -> Tensor) -> f64 {
    let device: Arc<dyn Device> = Arc::new(CpuDevice::new(Some(2)).unwrap());
    let values: Vec<Vec<f64>> = case.inputs.iter().enumerate().map(|(i, input)| draw(input, seed, i)).collect();
    let upload = |(i, v): (&crate::op::Input, &Vec<f64>)| Tensor::from_f64(&device, i.meta.dims(), dtype, v).unwrap();
    let tensors: Vec<Tensor> = case.inputs.iter().zip(&values).map(upload).collect();
    let have = chain(&tensors).to_f64().unwrap();
    let want = reference(case, &values).remove(0);
    let meta = case.op.infer(&case.metas()).unwrap()[0];
    let plain = Bounds { rounded: None, ..Bounds::of(case, 0, &meta) };
    assert!(judge(case.tolerance, plain, dtype, &want, &have).is_err(), "{} {dtype}", case.op.name());
    let rms = (want.iter().map(|x| x * x).sum::<f64>() / want.len() as f64).sqrt();
    let row = meta.shape.last();
    let allowed = allowances(dtype, &want, row, rms);
    let share =
        |(i, (w, h)): (usize, (&f64, &f64))| ((h - w).abs() - 2.0 * dtype.epsilon() * w.abs()) / allowed[i / row];
    want.iter().zip(&have).enumerate().map(share).fold(0.0, f64::max)
}

/// Of the same order: the bound is at most four times what the chain needs, and no less than a quarter of it.
fn holds(case: &Case, dtype: DType, chain: impl Fn(&[Tensor]) -> Tensor) {
    for seed in 1..=3 {
        let share = worst(case, dtype, seed, &chain);
        assert!(share > 0.25 && share < 4.0, "{} {dtype} seed {seed}: {share}", case.op.name());
    }
}

#[test]
fn the_feed_forward_chain_needs_the_allowance() {
    let (d, f) = (128, 256);
    let weight = |columns: usize| Fill::Normal { mean: 0.0, deviation: 1.0 / (columns as f64).sqrt() };
    let affine = Matmul { transpose_b: true, epilogue: Epilogue::Bias, ..Matmul::default() };
    for dtype in [DType::F16, DType::Bf16] {
        let case = Case::new(Ffn { activation: FfnActivation::Gelu }, Tolerance::Contraction { k: d + f })
            .normal(&[512, d], dtype)
            .input(&[f, d], dtype, weight(d))
            .normal(&[f], dtype)
            .input(&[d, f], dtype, weight(f))
            .normal(&[d], dtype);
        holds(&case, dtype, |x| {
            let z = one(&affine, &[&x[0], &x[1], &x[2]]);
            let h = one(&Unary(Function::GeluTanh), &[&z]);
            one(&affine, &[&h, &x[3], &x[4]])
        });
    }
}

#[test]
fn the_attention_chain_needs_the_allowance() {
    let (rows, dim) = (128, 64);
    // A power of two: scaling the scores rounds nothing.
    let op = Attention { mask: Mask::None, lengths: false, bias: false, scale: 0.125, query_offset: 0 };
    for dtype in [DType::F16, DType::Bf16] {
        let shape = [1, rows, 1, dim];
        let case = Case::new(op, Tolerance::Contraction { k: rows + dim });
        let case = case.normal(&shape, dtype).normal(&shape, dtype).normal(&shape, dtype);
        holds(&case, dtype, |x| {
            let [q, k, v] = [0, 1, 2].map(|i| x[i].reshape(&[rows, dim]).unwrap());
            let scale = Tensor::from_f64(q.device(), &[1], dtype, &[0.125]).unwrap();
            let products = one(&Matmul::plain(false, true), &[&q, &k]);
            let scores = one(&MUL, &[&products, &scale]);
            one(&Matmul::plain(false, false), &[&one(&Softmax, &[&scores]), &v])
        });
    }
}
