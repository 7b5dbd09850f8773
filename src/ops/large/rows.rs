//! Ceilings, normalisation, softmax, the optimizer: work bound by memory.

use super::{BF16, Cut, F32, Large, POSITIVE, Part, Pick};
use crate::op::{Case, Fill, Tolerance};
use crate::ops::binary::AccumulateScaled;
use crate::ops::ceiling::MultiplyAddChain;
use crate::ops::norm::{AddNorm, LayerNorm, NormBackward, RmsNorm};
use crate::ops::optim::{AdamW, StepRates};
use crate::ops::softmax::Softmax;
use crate::ops::unary::{Function, Unary};

const ROWS: &[Cut] = &[(0, Pick::Spread(12))];
const ELEMENTS: &[Cut] = &[(0, Pick::Spread(5000))];

pub(super) fn ceilings() -> Vec<Large> {
    let part = |inputs: usize| vec![Part::new(&[ELEMENTS; 2][..inputs], &[Some(ELEMENTS)])];
    let scale = Case::new(Unary(Function::Scale(1.5)), Tolerance::Arithmetic).normal(&[1 << 28], F32);
    let add = Case::new(AccumulateScaled { factor: 0.25 }, Tolerance::Contraction { k: 2 });
    let add = add.normal(&[1 << 27], F32).normal(&[1 << 27], F32);
    // As many invocations as a large GPU keeps in flight.
    let chain = Case::new(MultiplyAddChain { steps: 8192 }, Tolerance::Contraction { k: 8 }).normal(&[1 << 22], F32);
    vec![
        Large::new("ceiling", "read and write, 2 GB".into(), scale, part(1)),
        Large::new("ceiling", "read twice and write, 1.6 GB".into(), add, part(2)),
        Large::new("ceiling", "f32 multiply-add chain".into(), chain, part(1)),
    ]
}

const EPSILON: f32 = 1e-5;
const WEIGHT: Fill = Fill::Normal { mean: 1.0, deviation: 0.3 };
/// Elements of a normalised or exponentiated matrix: a quarter of a gigabyte of bf16.
const COUNT: usize = 1 << 27;

pub(super) fn norms() -> Vec<Large> {
    let mut cases = Vec::new();
    for d in [768, 1024, 4096, 16_384] {
        // 768 does not divide the count; whole blocks of rows stay.
        let rows = COUNT / d / 128 * 128;
        let dims = [rows, d];
        let name = |what: &str| format!("{what} {rows} x {d}");
        let class = Tolerance::Transcendental;

        let layer = Case::new(LayerNorm { epsilon: EPSILON }, class).normal(&dims, BF16);
        let layer = layer.input(&[d], BF16, WEIGHT).normal(&[d], BF16);
        let part = Part::new(&[ROWS, &[], &[]], &[Some(ROWS); 3]);
        cases.push(Large::new("norm", name("layernorm"), layer, vec![part]));
        cases.push(norm_backward(false, dims, name("layernorm")));

        let rms = Case::new(RmsNorm { epsilon: EPSILON }, class).normal(&dims, BF16).input(&[d], BF16, WEIGHT);
        cases.push(Large::new("norm", name("rmsnorm"), rms, vec![Part::new(&[ROWS, &[]], &[Some(ROWS); 2])]));
        cases.push(norm_backward(true, dims, name("rmsnorm")));

        let add = Case::new(AddNorm { epsilon: EPSILON, scale: 1.0, rms: true }, class);
        let add = add.normal(&dims, BF16).normal(&dims, BF16).input(&[d], BF16, WEIGHT);
        let part = Part::new(&[ROWS, ROWS, &[]], &[Some(ROWS); 3]);
        cases.push(Large::new("norm", name("add and rmsnorm"), add, vec![part]));
    }
    cases
}

fn norm_backward(rms: bool, dims: [usize; 2], name: String) -> Large {
    let [rows, d] = dims;
    let case = Case::new(NormBackward { rms }, Tolerance::Contraction { k: 16 + d.max(rows) });
    let case = case.normal(&dims, BF16).input(&[d], BF16, WEIGHT);
    let case = case.input(&[rows], F32, Fill::Normal { mean: 0.0, deviation: 0.1 });
    let case = case.input(&[rows], F32, Fill::Uniform { low: 0.5, high: 2.0 }).normal(&dims, BF16);
    // Gradients of weight and bias are sums over rows, column by column.
    let (down, across): (&[Cut], &[Cut]) = (&[(0, Pick::Spread(8))], &[(1, Pick::Spread(8))]);
    let parts = vec![
        Part::new(&[ROWS, &[], ROWS, ROWS, ROWS], &[Some(ROWS), None, None]),
        Part::new(&[across, down, &[], &[], across], &[None, Some(down), Some(down)]),
    ];
    Large::new("norm", name, case, parts)
}

pub(super) fn softmax() -> Vec<Large> {
    let one = |columns: usize| {
        let wide = Fill::Normal { mean: 0.0, deviation: 3.0 };
        let case = Case::new(Softmax, Tolerance::Transcendental).input(&[COUNT / columns, columns], BF16, wide);
        let name = format!("softmax {} x {columns}", COUNT / columns);
        Large::new("softmax", name, case, vec![Part::new(&[ROWS], &[Some(ROWS)])])
    };
    [1024, 8192, 32_768, 65_536, 131_072].map(one).into()
}

pub(super) fn optimizer() -> Vec<Large> {
    let one = |n: usize| {
        let betas = [0.9, 0.999];
        let op = AdamW { beta1: betas[0], beta2: betas[1], epsilon: 1e-8, weight_decay: 0.05, masked: false };
        let rates = StepRates { learning_rate: 1e-3, betas, weight: 1.0, step: 10 }.words();
        let case = Case::new(op, Tolerance::Contraction { k: 16 }).normal(&[n], F32).normal(&[n], F32);
        let case = case.normal(&[n], F32).input(&[n], F32, POSITIVE);
        let case = case.input(&[1], F32, Fill::Values(vec![0.37]));
        let case = case.input(&[rates.len()], F32, Fill::Values(rates.map(f64::from).to_vec()));
        let part = Part::new(&[ELEMENTS, ELEMENTS, ELEMENTS, ELEMENTS, &[], &[]], &[Some(ELEMENTS); 3]);
        Large::new("adamw", format!("adamw {n}"), case, vec![part])
    };
    [1_000_000, 16_000_000, 124_000_000, 500_000_000].map(one).into()
}
