//! Pruning by curvature: the inverse Fisher matrix and SparseGPT against closed forms in f64, then on models.

use faer::linalg::solvers::DenseSolveCore;
use faer::{Mat, Side};

use espalier::DType;
use espalier::compress::pruning::fisher::{self, Inverse, SecondOrder, Update};
use espalier::compress::pruning::sparsegpt::{self, SparseGpt, Target};
use espalier::compress::pruning::{Criterion, Curve, Pattern, Pruner, Scope, Settings, Timing, prunable};
use espalier::device::{self, Info, Limits};
use espalier::dispatch;
use espalier::nn::Model;
use espalier::ops::fisher::RankOneInverse;
use espalier::rng::Stream;
use espalier::tensor::Tensor;
use espalier::train::lifecycle::Method;

use crate::pruning::{Steps, linears, micros, model, trained};

fn normals(count: usize, stream: &mut Stream) -> Vec<f64> {
    (0..count).map(|_| stream.normal()).collect()
}

#[test]
fn a_matrix_that_no_buffer_holds_is_refused_with_its_numbers() {
    let cpu = device::open("cpu").unwrap().info().clone();
    let weights = [("small.weight".to_string(), 64), ("large.weight".to_string(), 1 << 20)];
    fisher::check_memory(&cpu, &weights, 64).unwrap();
    let small = Info { limits: Limits::webgpu(), ..cpu };
    fisher::check_memory(&small, &weights, 32).unwrap();
    let error = fisher::check_memory(&small, &weights, 64).unwrap_err().to_string();
    let said = ["sparsify.obs.block: 64", "large.weight takes 268435456 bytes", "at most 32", "134217728 bytes"];
    assert!(said.iter().all(|part| error.contains(part)), "{error}");
}

/// (damping I + 1/m sum g g^T)^-1 of one block, and its dense twin.
fn inverse(b: usize, gradients: &[Vec<f64>], damping: f64) -> (Inverse, Mat<f64>) {
    let truth = device::open("reference").unwrap();
    let start: Vec<f64> = (0..b * b).map(|i| if i / b == i % b { 1.0 / damping } else { 0.0 }).collect();
    let f = Tensor::from_f64(&truth, &[1, b, b], DType::F32, &start).unwrap();
    for g in gradients {
        let g = Tensor::from_f64(&truth, &[1, b], DType::F32, g).unwrap();
        dispatch::run(&RankOneInverse { count: gradients.len() as f32 }, &[&f, &g]).unwrap();
    }
    let m = gradients.len() as f64;
    let moment = |i: usize, j: usize| gradients.iter().map(|g| g[i] * g[j]).sum::<f64>() / m;
    let dense = Mat::from_fn(b, b, |i, j| moment(i, j) + if i == j { damping } else { 0.0 });
    (Inverse::new(b, f.to_f64().unwrap()).unwrap(), dense)
}

fn close(got: f64, want: f64, what: &str) {
    assert!((got - want).abs() <= 1e-9 * want.abs().max(1.0), "{what}: {got}, not {want}");
}

#[test]
fn rank_one_updates_give_the_inverse() {
    let mut stream = Stream::new(3, 0);
    for b in [1, 2, 5, 32] {
        let gradients: Vec<Vec<f64>> = (0..2 * b + 1).map(|_| normals(b, &mut stream)).collect();
        let (inverse, dense) = inverse(b, &gradients, 0.25);
        let want = dense.llt(Side::Lower).unwrap().inverse();
        (0..b * b).for_each(|i| close(inverse.values()[i], want[(i / b, i % b)], &format!("B = {b}, entry {i}")));
    }
    // One gradient: Sherman and Morrison's closed form.
    let g = vec![0.5, -2.0, 1.0];
    let (inverse, _) = inverse(3, std::slice::from_ref(&g), 0.1);
    let divisor = 1.0 + g.iter().map(|x| x * x).sum::<f64>() / 0.1;
    for i in 0..9 {
        let identity = if i / 3 == i % 3 { 10.0 } else { 0.0 };
        close(inverse.values()[i], identity - 100.0 * g[i / 3] * g[i % 3] / divisor, "Sherman and Morrison");
    }
}

/// Blocks of one weight: F = damping + g^2 and saliency w^2 F / 2.
#[test]
fn blocks_of_one_are_the_diagonal_fisher() {
    let (inverse, _) = inverse(1, &[vec![3.0]], 0.5);
    close(inverse.saliency(&[0], &[0.2]).unwrap(), 0.2 * 0.2 * (0.5 + 9.0) / 2.0, "saliency");
}

/// Over random blocks and subsets: the group update is the least-cost way to zero them (the slope along every kept weight
/// is 0), its cost is the group's saliency, and one weight alone is updated alike by both forms.
#[test]
fn group_updates_are_optimal() {
    let mut stream = Stream::new(8, 0);
    for _ in 0..256 {
        let b = 2 + stream.below(7);
        let gradients: Vec<Vec<f64>> = (0..3 * b).map(|_| normals(b, &mut stream)).collect();
        let (inverse, dense) = inverse(b, &gradients, 0.1);
        let before = normals(b, &mut stream);
        let kept: Vec<bool> = (0..b).map(|_| stream.below(2) == 0).collect();
        let gone: Vec<usize> = (0..b).filter(|&i| !kept[i]).collect();
        let mut after = before.clone();
        inverse.compensate(&mut after, &kept, Update::Group).unwrap();
        assert!(gone.iter().all(|&i| after[i] == 0.0));
        let moved: Vec<f64> = after.iter().zip(&before).map(|(a, b)| a - b).collect();
        let slope = |i: usize| (0..b).map(|j| dense[(i, j)] * moved[j]).sum::<f64>();
        (0..b).filter(|&i| kept[i]).for_each(|i| close(slope(i), 0.0, "slope"));
        if !gone.is_empty() {
            let cost = 0.5 * (0..b).map(|i| moved[i] * slope(i)).sum::<f64>();
            close(inverse.saliency(&gone, &before).unwrap(), cost, "saliency");
        }
        if gone.len() == 1 {
            let mut single = before.clone();
            inverse.compensate(&mut single, &kept, Update::Single).unwrap();
            single.iter().zip(&after).for_each(|(s, g)| close(*s, *g, "single"));
        }
    }
}

#[test]
fn hopeless_curvature_is_a_typed_error() {
    let flat = Inverse::new(2, vec![1.0, 2.0, 2.0, 1.0]).unwrap();
    for lost in [-1.0, 0.0, f64::NAN] {
        assert_eq!(Inverse::new(1, vec![1.0, lost]).err().unwrap().code(), "E-PARAMETER");
    }
    assert_eq!(flat.saliency(&[0, 1], &[1.0, 1.0]).unwrap_err().code(), "E-PARAMETER");
    let settings = |block, damping, recomputations| fisher::Settings {
        block,
        damping,
        recomputations,
        ..fisher::Settings::default()
    };
    let model = model();
    for (settings, micros, what) in [
        (settings(0, 1e-7, 1), micros(1, 1), "block"),
        (settings(129, 1e-7, 1), micros(1, 1), "block"),
        (settings(8, 0.0, 1), micros(1, 1), "damping"),
        (settings(8, f64::NAN, 1), micros(1, 1), "damping"),
        (settings(8, 1e-7, 0), micros(1, 1), "recomputations"),
        (settings(8, 1e-7, 1), Vec::new(), "calibration_batches"),
    ] {
        let error = fisher::inverses(&model, &["blocks.0.ffn.in.weight".into()], &micros, &settings).err().unwrap();
        assert!(error.to_string().contains(what), "{error}");
    }
}

fn error_of(w: &[f64], other: &[f64], gram: &[f64], k: usize) -> f64 {
    let rows = w.chunks(k).zip(other.chunks(k));
    rows.map(|(a, b)| (0..k * k).map(|i| (a[i / k] - b[i / k]) * gram[i] * (a[i % k] - b[i % k])).sum::<f64>()).sum()
}

fn gram(rows: usize, k: usize, stream: &mut Stream) -> Vec<f64> {
    let mixed = normals(k * k, stream);
    let x: Vec<Vec<f64>> = (0..rows)
        .map(|_| {
            let z = normals(k, stream);
            (0..k).map(|j| (0..k).map(|i| z[i] * mixed[i * k + j]).sum()).collect()
        })
        .collect();
    (0..k * k).map(|i| x.iter().map(|x| x[i / k] * x[i % k]).sum()).collect()
}

const TARGETS: [Target; 3] = [
    Target { pattern: Pattern::Unstructured, scope: Scope::Layer, sparsity: 0.6 },
    Target { pattern: Pattern::Unstructured, scope: Scope::Row, sparsity: 0.5 },
    Target { pattern: Pattern::TwoFour, scope: Scope::Row, sparsity: 0.5 },
];

/// With inputs that do not hang together no column makes up for another: the ranking is Wanda's squared, w^2 H_jj.
#[test]
fn diagonal_moments_make_sparsegpt_wanda() {
    let mut stream = Stream::new(5, 0);
    for case in 0..64 {
        let (n, k) = (1 + stream.below(4), 8 * (1 + stream.below(3)));
        let squares: Vec<f64> = (0..k).map(|_| 0.1 + stream.uniform()).collect();
        let gram: Vec<f64> = (0..k * k).map(|i| if i / k == i % k { squares[i / k] } else { 0.0 }).collect();
        let w = normals(n * k, &mut stream);
        let settings = sparsegpt::Settings { damping: 0.0, block: 128, bits: None };
        let target = TARGETS[1 + case % 2];
        let done = sparsegpt::prune([n, k], &w, &vec![true; n * k], &gram, target, &settings).unwrap();
        let kept: Vec<f64> = w.iter().zip(&done.kept).map(|(w, kept)| if *kept { *w } else { 0.0 }).collect();
        assert_eq!(done.weights, kept, "no weight moves");
        let group = if target.pattern == Pattern::TwoFour { 4 } else { k };
        let wanda: Vec<f64> = w.iter().enumerate().map(|(i, w)| w.abs() * squares[i % k].sqrt()).collect();
        for (scores, kept) in wanda.chunks(group).zip(done.kept.chunks(group)) {
            let of = |which: bool| scores.iter().zip(kept).filter(move |(_, kept)| **kept == which).map(|(s, _)| *s);
            assert!(of(true).fold(f64::INFINITY, f64::min) >= of(false).fold(0.0, f64::max));
        }
    }
}

/// Random moments: exactly the declared count goes, dead inputs go to 0, what stays makes up for what went, and what was
/// pruned before stays pruned. Joint rounding leaves nothing off the grid.
#[test]
fn sparsegpt_keeps_its_counts_and_lowers_the_error() {
    let mut stream = Stream::new(6, 0);
    let (mut with, mut without) = (0.0, 0.0);
    for case in 0..256 {
        let (n, k) = (1 + stream.below(6), 4 * (1 + stream.below(8)));
        let mut gram = gram(2 * k, k, &mut stream);
        let dead = (case % 3 == 0).then(|| stream.below(k));
        if let Some(j) = dead {
            (0..k).for_each(|i| (gram[i * k + j], gram[j * k + i]) = (0.0, 0.0));
        }
        let w = normals(n * k, &mut stream);
        let target = TARGETS[case % 3];
        let settings = sparsegpt::Settings { block: 4 * (1 + stream.below(4)), ..sparsegpt::Settings::default() };
        let full = vec![true; n * k];
        let done = sparsegpt::prune([n, k], &w, &full, &gram, target, &settings).unwrap();
        let gone = done.kept.iter().filter(|kept| !**kept).count();
        let declared = match (target.pattern, target.scope) {
            (Pattern::TwoFour, _) => n * k / 2,
            (_, Scope::Row) => n * (k as f64 * 0.5).round() as usize,
            _ => (n as f64 * k as f64 * 0.6).round() as usize,
        };
        assert_eq!(gone, declared);
        assert!(done.weights.iter().zip(&done.kept).all(|(w, kept)| *kept || *w == 0.0));
        let nothing = f64::from(f32::MIN_POSITIVE);
        dead.iter().for_each(|j| assert!(done.weights.chunks(k).all(|row| row[*j].abs() <= nothing)));
        let masked: Vec<f64> = w.iter().zip(&done.kept).map(|(w, kept)| if *kept { *w } else { 0.0 }).collect();
        with += error_of(&w, &done.weights, &gram, k);
        without += error_of(&w, &masked, &gram, k);
        if target.pattern == Pattern::Unstructured {
            let more = Target { sparsity: 0.8, ..target };
            let again = sparsegpt::prune([n, k], &done.weights, &done.kept, &gram, more, &settings).unwrap();
            assert!(again.kept.iter().zip(&done.kept).all(|(now, before)| !*now || *before), "a mask grew back");
        }
        let joint = sparsegpt::Settings { bits: Some(4), ..settings };
        let rounded = sparsegpt::prune([n, k], &w, &full, &gram, target, &joint).unwrap();
        for (row, step) in rounded.weights.chunks(k).zip(&rounded.scales) {
            // As every grid has it: the integer times the step, in f32.
            let level = |w: &f64| (w / step).round() as f32;
            // A kept weight that is rounded to 0 stays next to it, in the mask.
            let near = |w: &f64, to: f64| *w == to || to == 0.0 && w.abs() == f64::from(f32::MIN_POSITIVE);
            assert!(row.iter().all(|w| near(w, f64::from(level(w) * *step as f32)) && level(w).abs() <= 7.0));
            assert!(rounded.weights.iter().zip(&rounded.kept).all(|(w, kept)| *kept == (*w != 0.0)));
        }
    }
    assert!(with < 0.7 * without, "error {with} with updates, {without} without");
}

#[test]
fn senseless_sparsegpt_is_refused() {
    let run = |settings, gram: &[f64]| {
        sparsegpt::prune([1, 2], &[1.0, 1.0], &[true; 2], gram, TARGETS[0], &settings).map(|_| ())
    };
    let good = sparsegpt::Settings::default();
    let identity = [1.0, 0.0, 0.0, 1.0];
    assert!(run(good, &identity).is_ok());
    for settings in [
        sparsegpt::Settings { damping: -1.0, ..good },
        sparsegpt::Settings { block: 6, ..good },
        sparsegpt::Settings { bits: Some(1), ..good },
    ] {
        assert_eq!(run(settings, &identity).unwrap_err().code(), "E-PARAMETER");
    }
    assert_eq!(
        run(sparsegpt::Settings { damping: 0.0, ..good }, &[1.0, 2.0, 2.0, 1.0]).unwrap_err().code(),
        "E-PARAMETER"
    );
    assert_eq!(run(good, &[f64::NAN; 4]).unwrap_err().code(), "E-PARAMETER");
    // All zero: every input is dead.
    assert!(run(good, &[0.0; 4]).is_ok());
}

fn prune(criterion: Box<dyn Criterion>, pattern: Pattern, scope: Scope) -> Model {
    let mut model = model();
    let timing = Timing { curve: Curve::Linear, initial: 0.3, start: 1, end: 3, every: 2 };
    let settings = Settings { pattern, scope, sparsity: 0.6, timing };
    let weights = prunable(&model, &linears(&model), pattern);
    let mut methods: Vec<Box<dyn Method>> = vec![Box::new(Pruner::new(&model, weights, settings, criterion).unwrap())];
    let folder = tempfile::tempdir().unwrap();
    trained(&mut model, &mut methods, folder.path(), &Steps, (5, 0)).unwrap();
    methods[0].invariants(&model).unwrap().iter().for_each(|invariant| assert!(invariant.holds, "{invariant:?}"));
    model
}

#[test]
fn second_order_criteria_prune_models_to_the_declared_sparsity() {
    let block4 = Pattern::Block { rows: 1, columns: 4 };
    for (pattern, scope, update, recomputations) in [
        (Pattern::Unstructured, Scope::Global, Update::Single, 3),
        (Pattern::Unstructured, Scope::Row, Update::Group, 1),
        (block4, Scope::Layer, Update::Group, 2),
        (Pattern::Block { rows: 4, columns: 2 }, Scope::Global, Update::Single, 1),
        (Pattern::TwoFour, Scope::Layer, Update::Group, 2),
        (Pattern::Row, Scope::Layer, Update::Single, 1),
    ] {
        let settings = fisher::Settings { block: 16, damping: 1e-5, update, recomputations };
        prune(Box::new(SecondOrder { settings, micros: micros(4, 50) }), pattern, scope);
    }
    for (pattern, scope) in
        [(Pattern::Unstructured, Scope::Layer), (Pattern::Unstructured, Scope::Row), (Pattern::TwoFour, Scope::Layer)]
    {
        prune(Box::new(SparseGpt::new(sparsegpt::Settings::default(), micros(2, 60))), pattern, scope);
    }
}
