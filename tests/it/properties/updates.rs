//! Masked updates: what is pruned stays zero in the parameter and in what the optimizer remembers.

use espalier::ops::optim::{AdamW, Sgd, StepRates};
use espalier::tensor::Tensor;

use super::{Draw, holds};

struct Problem {
    n: usize,
    mask: Vec<f32>,
    steps: u64,
    decay: f32,
    rate: f32,
}

fn problem(draw: &mut Draw) -> Problem {
    let n = draw.size(60);
    let mask = (0..n).map(|_| f32::from(u8::from(draw.below(2) == 1))).collect();
    let (steps, decay, rate) = (draw.size(12) as u64, draw.stream.uniform() as f32, draw.stream.uniform() as f32);
    Problem { n, mask, steps, decay, rate }
}

fn rates(draw: &Draw, learning_rate: f32, step: u64) -> Tensor {
    let rates = StepRates { learning_rate, betas: [0.9, 0.999], weight: 1.0, step };
    draw.tensor(&[StepRates::WORDS], &rates.words())
}

/// Parameter and memories after some steps of random gradients; `masked` or not.
fn adamw(draw: &mut Draw, p: &Problem, masked: bool, mask: &[f32]) -> [Vec<f32>; 3] {
    let op = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: p.decay, masked };
    let start = draw.values(p.n);
    let [param, m, v] = [start, vec![0.5; p.n], vec![0.25; p.n]].map(|values| draw.tensor(&[p.n], &values));
    let (mask, factor) = (draw.tensor(&[p.n], mask), draw.tensor(&[1], &[1.0]));
    for step in 1..=p.steps {
        let values = draw.values(p.n);
        let (grad, rates) = (draw.tensor(&[p.n], &values), rates(draw, p.rate, step));
        let mut inputs = vec![&param, &grad, &m, &v, &factor, &rates];
        inputs.extend(masked.then_some(&mask));
        draw.run(&op, &inputs);
    }
    [param, m, v].map(|tensor| tensor.to_vec().unwrap())
}

#[test]
fn adamw_revives_nothing() {
    holds("masked AdamW", |draw| {
        let p = problem(draw);
        for state in adamw(draw, &p, true, &p.mask) {
            assert!(state.iter().zip(&p.mask).all(|(x, kept)| *kept == 1.0 || *x == 0.0), "{state:?}");
        }
    });
}

#[test]
fn a_mask_that_keeps_everything_changes_nothing() {
    holds("mask of ones", |draw| {
        let p = problem(draw);
        let stream = draw.stream.clone();
        let plain = adamw(draw, &p, false, &p.mask);
        draw.stream = stream;
        assert_eq!(adamw(draw, &p, true, &vec![1.0; p.n]), plain);
    });
}

#[test]
fn sgd_revives_nothing() {
    holds("masked SGD", |draw| {
        let p = problem(draw);
        let op = Sgd { momentum: 0.9, weight_decay: p.decay, masked: true };
        let start = draw.values(p.n);
        let [param, velocity] = [start, vec![0.5; p.n]].map(|values| draw.tensor(&[p.n], &values));
        let (mask, factor) = (draw.tensor(&[p.n], &p.mask), draw.tensor(&[1], &[1.0]));
        for step in 1..=p.steps {
            let values = draw.values(p.n);
            let (grad, rates) = (draw.tensor(&[p.n], &values), rates(draw, p.rate, step));
            draw.run(&op, &[&param, &grad, &velocity, &factor, &rates, &mask]);
        }
        for state in [param, velocity] {
            let state: Vec<f32> = state.to_vec().unwrap();
            assert!(state.iter().zip(&p.mask).all(|(x, kept)| *kept == 1.0 || *x == 0.0));
        }
    });
}

#[test]
fn a_factor_of_zero_is_no_update() {
    holds("skipped update", |draw| {
        let p = problem(draw);
        let op = AdamW { beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: p.decay, masked: false };
        let [a, b, c, g] = [(); 4].map(|()| draw.values(p.n));
        let [param, m, v, grad] = [&a, &b, &c, &g].map(|values| draw.tensor(&[p.n], values));
        let rates = rates(draw, p.rate, 1);
        draw.run(&op, &[&param, &grad, &m, &v, &draw.tensor(&[1], &[0.0]), &rates]);
        assert_eq!([param, m, v].map(|t| t.to_vec::<f32>().unwrap()), [a, b, c]);
    });
}
