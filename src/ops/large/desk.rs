//! Sizes at which libraries for CPUs are compared: cubes, and one block of a small model. Without parts a case is checked
//! whole.

use super::dense::{attention_backward, attention_forward, product, scaled_dot};
use super::{BF16, F32, Large, POSITIVE, below};
use crate::dtype::DType;
use crate::op::{Case, Fill, Tolerance};
use crate::ops::attention::Mask;
use crate::ops::binary::{ADD, AccumulateScaled};
use crate::ops::ceiling::MultiplyAddChain;
use crate::ops::distill::{Direction, Kl, KlBackward};
use crate::ops::moe::MoeGate;
use crate::ops::norm::{LayerNorm, RmsNorm};
use crate::ops::optim::{AdamW, Sgd, StepRates};
use crate::ops::quant::{FakeQuant, Granularity, GridFrom, MatmulInt8, Scheme};
use crate::ops::softmax::{CrossEntropy, CrossEntropyBackward, Softmax};
use crate::ops::sparse_bitmap::{self, MatmulBitmap, MatmulBitmapInt8};
use crate::ops::sparse24::MatmulSparse24;
use crate::ops::sparse24_pack::{meta_words, random_meta};
use crate::ops::unary::{Function, Unary};

const NARROW: Fill = Fill::Integers { low: -127, high: 127 };
const SCALES: Fill = Fill::Uniform { low: 1e-3, high: 2e-2 };
const WEIGHT: Fill = Fill::Normal { mean: 1.0, deviation: 0.3 };
const WIDE: Fill = Fill::Normal { mean: 0.0, deviation: 3.0 };

fn whole(group: &'static str, name: String, case: Case) -> Large {
    Large::new(group, name, case, Vec::new())
}

/// Every case, ceilings first.
pub fn cases() -> Vec<Large> {
    [ceilings(), products(), reduced(), attention(), rows(), losses(), optimizer()].concat()
}

fn ceilings() -> Vec<Large> {
    let chain = Case::new(MultiplyAddChain { steps: 8192 }, Tolerance::Contraction { k: 8 });
    let scale = Case::new(Unary(Function::Scale(1.5)), Tolerance::Arithmetic);
    let add = Case::new(AccumulateScaled { factor: 0.25 }, Tolerance::Contraction { k: 2 });
    let op = Sgd { momentum: 0.9, weight_decay: 0.0, masked: false };
    let sgd = Case::new(op, Tolerance::Contraction { k: 8 }).normal(&[1 << 24], F32).normal(&[1 << 24], F32);
    let sgd = sgd.normal(&[1 << 24], F32).input(&[1], F32, Fill::Values(vec![1.0]));
    let rates = StepRates { learning_rate: 1e-3, betas: [0.9, 0.0], weight: 1.0, step: 10 }.words();
    let sgd = sgd.input(&[5], F32, Fill::Values(rates.map(f64::from).to_vec()));
    vec![
        whole("ceiling", "f32 multiply-add chain".into(), chain.normal(&[32_768], F32)),
        whole("ceiling", "read and write, 128 MB".into(), scale.normal(&[1 << 24], F32)),
        // Writing new memory reads it first on most processors, which nobody counts: work in place shows the true rate.
        whole("ceiling", "in place, 192 MB".into(), add.normal(&[1 << 24], F32).normal(&[1 << 24], F32)),
        // More streams at once than two keep more reads under way.
        whole("ceiling", "two in place of three, 320 MB".into(), sgd),
    ]
}

fn products() -> Vec<Large> {
    let cubes = |dtype| [256, 512, 1024, 2048].map(|n| product(false, false, [n; 3], dtype));
    [cubes(F32), cubes(BF16)].concat()
}

fn reduced() -> Vec<Large> {
    let int8 = |[m, n, k]: [usize; 3]| {
        let case = Case::new(MatmulInt8 { bias: false }, Tolerance::Contraction { k: 4 });
        let case = case.input(&[m, k], DType::I8, NARROW).input(&[m], F32, SCALES);
        let case = case.input(&[n, k], DType::I8, NARROW).input(&[n], F32, SCALES);
        whole("int8", format!("int8 {m} x {n} x {k}"), case)
    };
    let sparse = |[m, n, k]: [usize; 3]| {
        let case = Case::new(MatmulSparse24 { bias: false }, Tolerance::Contraction { k: k / 2 });
        let case = case.normal(&[m, k], F32).normal(&[n, k / 2], F32);
        let case = case.input(&[n, meta_words(k)], DType::U32, Fill::Custom(random_meta));
        whole("sparse", format!("2:4 {m} x {n} x {k} f32"), case)
    };
    // Of int8 whole fours are zero, which is what its kernels skip.
    let zeros = |percent: u32, dtype: DType, [m, n, k]: [usize; 3]| {
        let kept = (100 - percent) * 256 / 100;
        let case = match dtype {
            DType::I8 => {
                let case = Case::new(MatmulBitmapInt8 { bias: false }, Tolerance::Contraction { k: 4 });
                let case = case.input(&[m, k], DType::I8, NARROW).input(&[m], F32, SCALES);
                sparse_bitmap::weights(case, [n, k], dtype, kept, NARROW).input(&[n], F32, SCALES)
            }
            _ => {
                let case = Case::new(MatmulBitmap { bias: false }, Tolerance::Contraction { k });
                sparse_bitmap::weights(case.normal(&[m, k], F32), [n, k], dtype, kept, Fill::NORMAL)
            }
        };
        let kind = if dtype == DType::I8 { "int8" } else { dtype.name() };
        whole("sparse", format!("{percent} % zeros {m} x {n} x {k} {kind}"), case)
    };
    let fake_quant = |granularity, dims: [usize; 2], name: &str| {
        let from = GridFrom::Step;
        let op = FakeQuant { bits: 8, scheme: Scheme::SymmetricFull, granularity, from };
        let steps = if granularity == Granularity::Tensor { 1 } else { dims[0] };
        let case = Case::new(op, Tolerance::Exact).normal(&dims, F32);
        let case = case.input(&[steps], F32, Fill::Uniform { low: 0.01, high: 0.02 });
        whole("quant", format!("fake-quant {name} {} x {}", dims[0], dims[1]), case)
    };
    vec![
        int8([512; 3]),
        int8([1024; 3]),
        int8([2048; 3]),
        int8([128, 3072, 768]),
        int8([128, 768, 3072]),
        // The dense product of the sparse ones below.
        int8([512, 3072, 768]),
        sparse([512, 3072, 768]),
        zeros(80, F32, [512, 3072, 768]),
        zeros(90, F32, [512, 3072, 768]),
        zeros(80, DType::I8, [512, 3072, 768]),
        zeros(90, DType::I8, [512, 3072, 768]),
        fake_quant(Granularity::Tensor, [4096, 1024], "per tensor"),
        fake_quant(Granularity::Channel, [4096, 1024], "per channel"),
    ]
}

fn attention() -> Vec<Large> {
    let (heads, width) = (12, 64);
    let both = |s: usize| {
        let op = scaled_dot(Mask::None, false, width, 0);
        let size = [1, s, s, heads, width];
        [attention_forward(op, size, F32), attention_backward(op, size, F32)]
    };
    [128, 512, 1024, 2048].map(both).concat()
}

fn rows() -> Vec<Large> {
    let (rows, columns) = (4096, 1024);
    let dims = [rows, columns];
    let name = |what: &str| format!("{what} {rows} x {columns}");
    let of = |op: Case| op.normal(&dims, F32);
    let class = Tolerance::Transcendental;
    let softmax = Case::new(Softmax, class).input(&dims, F32, WIDE);
    let layer =
        of(Case::new(LayerNorm { epsilon: 1e-5 }, class)).input(&[columns], F32, WEIGHT).normal(&[columns], F32);
    let rms = of(Case::new(RmsNorm { epsilon: 1e-5 }, class)).input(&[columns], F32, WEIGHT);
    let gate = Case::new(MoeGate { k: 2 }, Tolerance::Exact).normal(&[8192, 64], F32);
    vec![
        whole("rows", name("softmax"), softmax),
        whole("rows", name("layernorm"), layer),
        whole("rows", name("rmsnorm"), rms),
        whole("rows", name("add"), of(Case::new(ADD, Tolerance::Arithmetic)).normal(&dims, F32)),
        whole("rows", name("gelu (tanh)"), of(Case::new(Unary(Function::GeluTanh), class))),
        whole("rows", name("gelu (erf)"), of(Case::new(Unary(Function::GeluErf), class))),
        whole("rows", "top 2 of 64, 8192 tokens".into(), gate),
    ]
}

const DIFFERENCE: &str = "the divergence is a difference of terms of the logits' size, whose roundings it keeps";

fn losses() -> Vec<Large> {
    let (n, v) = (512, 32_000);
    let class = Tolerance::Transcendental;
    let scored = |op: Case| op.input(&[n, v], F32, WIDE).input(&[n], DType::U32, below(v));
    // About the log sum exp of such logits.
    let lse = |mean: f64| Fill::Normal { mean: (v as f64).ln() + mean, deviation: 0.1 };
    let entropy = scored(Case::new(CrossEntropy { smoothing: 0.0 }, class));
    let entropy_backward = scored(Case::new(CrossEntropyBackward { smoothing: 0.0 }, class));
    let entropy_backward = entropy_backward.input(&[n], F32, lse(4.5)).normal(&[n], F32);
    let (direction, temperature, squared) = (Direction::Forward, 2.0, true);
    let pair = |op: Case| {
        let pair = op.input(&[n, v], F32, WIDE).input(&[n, v], F32, WIDE);
        pair.input(&[n], F32, POSITIVE).loosened(8.0, DIFFERENCE)
    };
    let kl = pair(Case::new(Kl { direction, temperature, squared }, class));
    let mut kl_backward = pair(Case::new(KlBackward { direction, temperature, squared }, class));
    for fill in [lse(1.1), lse(1.1), Fill::Uniform { low: 0.0, high: 0.3 }, Fill::NORMAL] {
        kl_backward = kl_backward.input(&[n], F32, fill);
    }
    vec![
        whole("losses", format!("cross-entropy {n} x {v}"), entropy),
        whole("losses", format!("cross-entropy {n} x {v}"), entropy_backward),
        whole("losses", format!("kl T=2 {n} x {v}"), kl),
        whole("losses", format!("kl T=2 {n} x {v}"), kl_backward),
    ]
}

fn optimizer() -> Vec<Large> {
    let (n, betas) = (7_077_888, [0.9, 0.999]);
    let op = AdamW { beta1: betas[0], beta2: betas[1], epsilon: 1e-8, weight_decay: 0.05, masked: false };
    let rates = StepRates { learning_rate: 1e-3, betas, weight: 1.0, step: 10 }.words();
    let case = Case::new(op, Tolerance::Contraction { k: 16 }).normal(&[n], F32).normal(&[n], F32);
    let case = case.normal(&[n], F32).input(&[n], F32, POSITIVE).input(&[1], F32, Fill::Values(vec![1.0]));
    let rates = Fill::Values(rates.map(f64::from).to_vec());
    vec![whole("optimizer", format!("adamw {n}"), case.input(&[5], F32, rates))]
}
