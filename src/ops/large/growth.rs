//! How time must grow with each size: what `kernels bench --growth` measures. A kernel that meets its roofline at one size and
//! falls off a cliff at the next breaks a law here.

use std::ops::RangeInclusive;

use super::dense::{attention_backward, attention_forward, product, scaled_dot};
use super::{F32, POSITIVE, below};
use crate::dtype::DType;
use crate::op::{Case, Fill, Tolerance};
use crate::ops::attention::Mask;
use crate::ops::distill::{Direction, Kl};
use crate::ops::moe_gather::{Gathered, GatheredMatmul};
use crate::ops::norm::LayerNorm;
use crate::ops::optim::{AdamW, StepRates};
use crate::ops::quant::{FakeQuant, Granularity, GridFrom, Scheme};
use crate::ops::softmax::{CrossEntropy, Softmax};
use crate::ops::sparse_bitmap::{self, MatmulBitmap};
use crate::ops::sparse24::MatmulSparse24;
use crate::ops::sparse24_pack::{meta_words, random_meta};

/// How large the sizes are: each begins where a device of that kind is busy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// A software adapter.
    Small,
    /// A processor.
    Medium,
    /// A GPU.
    Large,
}

impl Scale {
    fn of(self, usual: usize) -> usize {
        match self {
            Scale::Small => usual / 4,
            Scale::Medium => usual,
            Scale::Large => usual * 8,
        }
    }
}

/// What must hold of the times of a law's cases.
#[derive(Clone, Debug)]
pub enum Rule {
    /// The slope of log time over log size, of the three largest sizes.
    Slope(RangeInclusive<f64>),
    /// Each time as a share of the first case's, by case from the second on.
    Share(Vec<RangeInclusive<f64>>),
}

/// An op, the size that grows, and how its time must.
#[derive(Clone, Debug)]
pub struct Law {
    pub name: &'static str,
    pub variable: &'static str,
    pub rule: Rule,
    /// By rising size.
    pub cases: Vec<(f64, Case)>,
}

/// Half the width of a slope that is read off times with their noise.
const PRODUCTS: f64 = 0.1;
const STREAMS: f64 = 0.05;

fn about(slope: f64, width: f64) -> Rule {
    Rule::Slope(slope - width..=slope + width)
}

/// A law over four sizes, each twice the one before.
fn doubling(name: &'static str, variable: &'static str, rule: Rule, first: usize, case: impl Fn(usize) -> Case) -> Law {
    let cases = (0..4).map(|i| first << i).map(|size| (size as f64, case(size))).collect();
    Law { name, variable, rule, cases }
}

/// Every law, at sizes for a device of that kind.
pub fn laws(scale: Scale) -> Vec<Law> {
    [products(scale), attention(scale), rows(scale), losses(scale), sparse(scale), experts(scale)].concat()
}

fn products(scale: Scale) -> Vec<Law> {
    let first = match scale {
        Scale::Small => 64,
        Scale::Medium => 256,
        Scale::Large => 1024,
    };
    vec![doubling("f32 product", "m = n = k", about(3.0, PRODUCTS), first, |n| product(false, false, [n; 3], F32).case)]
}

fn attention(scale: Scale) -> Vec<Law> {
    let (heads, width) = (4, 64);
    let first = match scale {
        Scale::Small => 128,
        Scale::Medium => 256,
        Scale::Large => 2048,
    };
    let op = |mask| scaled_dot(mask, false, width, 0);
    let forward = |mask, s: usize| attention_forward(op(mask), [1, s, s, heads, width], F32).case;
    let backward = |s: usize| attention_backward(op(Mask::None), [1, s, s, heads, width], F32).case;
    // As many tokens in fewer, longer sequences.
    let tokens = 8 * first;
    let packed = |s: usize| attention_forward(op(Mask::None), [tokens / s, s, s, heads, width], F32).case;
    let longest = 8 * first;
    vec![
        doubling("attention", "sequence", about(2.0, PRODUCTS), first, |s| forward(Mask::None, s)),
        doubling("attention, backward", "sequence", about(2.0, PRODUCTS), first, backward),
        doubling("attention, as many tokens", "sequence", about(1.0, PRODUCTS), first, packed),
        Law {
            name: "attention, causal",
            variable: "share of the full one",
            rule: Rule::Share(vec![0.5..=0.6]),
            cases: vec![(1.0, forward(Mask::None, longest)), (0.5, forward(Mask::Causal, longest))],
        },
    ]
}

fn rows(scale: Scale) -> Vec<Law> {
    let columns = 1024;
    // 8 MB of each operand on a processor.
    let first = scale.of(2048);
    let class = Tolerance::Transcendental;
    let stream = || about(1.0, STREAMS);
    let softmax = |n: usize| Case::new(Softmax, class).normal(&[n, columns], F32);
    let layer = |n: usize| {
        let case = Case::new(LayerNorm { epsilon: 1e-5 }, class).normal(&[n, columns], F32);
        case.normal(&[columns], F32).normal(&[columns], F32)
    };
    let fake = |n: usize| {
        let (scheme, granularity) = (Scheme::SymmetricFull, Granularity::Tensor);
        let op = FakeQuant { bits: 8, scheme, granularity, from: GridFrom::Step };
        let step = Fill::Uniform { low: 0.01, high: 0.02 };
        Case::new(op, Tolerance::Exact).normal(&[n, columns], F32).input(&[1], F32, step)
    };
    let adamw = |n: usize| {
        let betas = [0.9, 0.999];
        let op = AdamW { beta1: betas[0], beta2: betas[1], epsilon: 1e-8, weight_decay: 0.05, masked: false };
        let rates = StepRates { learning_rate: 1e-3, betas, weight: 1.0, step: 10 }.words();
        let case = Case::new(op, Tolerance::Contraction { k: 16 }).normal(&[n * columns], F32);
        let case = case.normal(&[n * columns], F32).normal(&[n * columns], F32).input(&[n * columns], F32, POSITIVE);
        let case = case.input(&[1], F32, Fill::Values(vec![1.0]));
        case.input(&[5], F32, Fill::Values(rates.map(f64::from).to_vec()))
    };
    let rows = "rows of 1,024";
    vec![
        doubling("softmax", rows, stream(), first, softmax),
        doubling("layer norm", rows, stream(), first, layer),
        doubling("fake quantization", rows, stream(), first, fake),
        doubling("AdamW", rows, stream(), first, adamw),
    ]
}

fn losses(scale: Scale) -> Vec<Law> {
    let n = scale.of(64);
    let first = 16_384;
    let class = Tolerance::Transcendental;
    let entropy = |v: usize| {
        let op = CrossEntropy { smoothing: 0.0 };
        Case::new(op, class).normal(&[n, v], F32).input(&[n], DType::U32, below(v))
    };
    let kl = |v: usize| {
        let op = Kl { direction: Direction::Forward, temperature: 2.0, squared: true };
        Case::new(op, class).normal(&[n, v], F32).normal(&[n, v], F32).input(&[n], F32, POSITIVE)
    };
    vec![
        doubling("cross-entropy", "vocabulary", about(1.0, STREAMS), first, entropy),
        doubling("KL divergence", "vocabulary", about(1.0, STREAMS), first, kl),
    ]
}

fn sparse(scale: Scale) -> Vec<Law> {
    let first = match scale {
        Scale::Small => 128,
        Scale::Medium => 512,
        Scale::Large => 2048,
    };
    let (m, n) = (scale.of(256), scale.of(1024));
    let pattern = |k: usize| {
        let case = Case::new(MatmulSparse24 { bias: false }, Tolerance::Contraction { k: k / 2 });
        let case = case.normal(&[m, k], F32).normal(&[n, k / 2], F32);
        case.input(&[n, meta_words(k)], DType::U32, Fill::Custom(random_meta))
    };
    let [m, n, k] = [scale.of(512), scale.of(3072), 768];
    let kept = |percent: u32| {
        let case = Case::new(MatmulBitmap { bias: false }, Tolerance::Contraction { k }).normal(&[m, k], F32);
        sparse_bitmap::weights(case, [n, k], F32, percent * 256 / 100, Fill::NORMAL)
    };
    // Of the dense product's time at most the share of weights that are there, and 15 points.
    let shares = [50, 30, 20, 10, 5];
    let density = Law {
        name: "unstructured zeros",
        variable: "share of the dense product",
        rule: Rule::Share(shares.iter().map(|&percent| 0.0..=f64::from(percent) / 100.0 + 0.15).collect()),
        cases: std::iter::once((1.0, product(false, true, [m, n, k], F32).case))
            .chain(shares.iter().map(|&percent| (f64::from(percent) / 100.0, kept(percent))))
            .collect(),
    };
    let rising = Rule::Slope(0.0..=1.0 + STREAMS);
    let mut laws = vec![doubling("2:4 product", "k", rising, first, pattern)];
    // GPUs take the dense product there: see `compress::fastest`.
    if scale == Scale::Medium {
        laws.push(density);
    }
    laws
}

fn experts(scale: Scale) -> Vec<Law> {
    let (d, k) = (256, 2);
    let gathered = |tokens: usize, experts: usize| {
        let op = GatheredMatmul(Gathered { sum: false, relu: true, threshold: None });
        let case = Case::new(op, Tolerance::Contraction { k: d }).normal(&[tokens, d], F32);
        let case = case.normal(&[experts, 64, d], F32).normal(&[experts, 64], F32);
        case.input(&[tokens, k], DType::U32, below(experts))
    };
    let tokens = scale.of(4096);
    vec![
        doubling("experts, 2 for each token", "experts", Rule::Slope(-0.1..=0.1), 8, |e| gathered(tokens, e)),
        doubling("experts, 2 of 16 for each token", "tokens", about(1.0, PRODUCTS), tokens, |t| gathered(t, 16)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes rise, shapes are those that the ops take, and each share has its case.
    #[test]
    fn laws_are_about_cases_that_there_are() {
        for scale in [Scale::Small, Scale::Medium, Scale::Large] {
            for law in laws(scale) {
                for (_, case) in &law.cases {
                    case.op.infer(&case.metas()).unwrap();
                }
                match &law.rule {
                    Rule::Slope(_) => assert!(law.cases.windows(2).all(|pair| pair[1].0 == 2.0 * pair[0].0)),
                    Rule::Share(shares) => assert_eq!(shares.len() + 1, law.cases.len()),
                }
            }
        }
    }
}
