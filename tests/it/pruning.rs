//! Pruning: patterns, scopes and curves over many random cases, criteria on models, masks through a training.

use std::path::Path;
use std::sync::Arc;

use espalier::compress::pruning::score::{FirstOrder, Magnitude, Random};
use espalier::compress::pruning::selection::{declared, select};
use espalier::compress::pruning::wanda::{Activation, Wanda};
use espalier::compress::pruning::{Criterion, Curve, Pattern, Pruner, Scope, Settings, Timing, Work, prunable};
use espalier::device::{self, Device};
use espalier::dispatch;
use espalier::nn::{Config, Model};
use espalier::rng::Stream;
use espalier::tensor::Tensor;
use espalier::train::lifecycle::{Method, Micro};
use espalier::train::store;
use espalier::train::trainer::{Job, Source, train};
use espalier::{DType, Error, Result};

use crate::model::{SIZE, assemble, examples, micro, settings};

const VOCABULARY: usize = 37;

/// One device for all of a test: tensors of two do not meet.
pub fn cpu() -> Arc<dyn Device> {
    thread_local!(static DEVICE: Arc<dyn Device> = device::open("cpu:1").unwrap());
    DEVICE.with(Arc::clone)
}

fn tensor(device: &Arc<dyn Device>, dims: &[usize], values: &[f32]) -> Tensor {
    Tensor::from_slice(device, dims, values).unwrap()
}

pub fn model() -> Model {
    Model::init(Config::glm(SIZE, VOCABULARY), &cpu(), 3).unwrap()
}

pub fn micros(count: usize, seed: u64) -> Vec<Micro> {
    (0..count).map(|i| micro(&cpu(), &assemble(&examples(4, seed + i as u64)))).collect()
}

/// All linears of the model's blocks.
pub fn linears(model: &Model) -> Vec<String> {
    (0..model.config.blocks.len()).flat_map(Config::linears).collect()
}

const PATTERNS: [Pattern; 8] = [
    Pattern::Unstructured,
    Pattern::Block { rows: 4, columns: 1 },
    Pattern::Block { rows: 2, columns: 8 },
    Pattern::Row,
    Pattern::Column,
    Pattern::TwoFour,
    Pattern::TwoFour2d,
    Pattern::TwoFour2dFilled,
];

const SCOPES: [Scope; 3] = [Scope::Row, Scope::Layer, Scope::Global];

/// Scores with many ties, some of them zero.
fn scores(device: &Arc<dyn Device>, dims: [usize; 2], stream: &mut Stream) -> Tensor {
    let ties = stream.below(2) == 0;
    let mut draw = || if ties { stream.below(4) as f32 } else { stream.uniform() as f32 };
    let values: Vec<f32> = (0..dims[0] * dims[1]).map(|_| draw()).collect();
    tensor(device, &dims, &values)
}

/// 256 random cases each of: exactly the declared count is pruned, masks are made of whole units, every kept unit scores at
/// least as high as every pruned one it was compared with, and the lower index wins ties.
#[test]
fn selection_keeps_exactly_the_declared_count_and_the_best() {
    let device = cpu();
    let mut stream = Stream::new(11, 0x5e1);
    for case in 0..256 {
        let pattern = PATTERNS[case % PATTERNS.len()];
        let scope = SCOPES[stream.below(3)];
        let sparsity = [0.0, 0.1, 0.5, 0.73, 0.97, 1.0][stream.below(6)];
        let dims: Vec<[usize; 2]> =
            (0..1 + stream.below(3)).map(|_| [8 * (1 + stream.below(3)), 8 * (1 + stream.below(4))]).collect();
        let all: Vec<Tensor> = dims.iter().map(|&d| scores(&device, d, &mut stream)).collect();
        let names: Vec<String> = (0..dims.len()).map(|i| format!("w{i}")).collect();
        let pooled: Vec<Tensor> = all.iter().map(|s| pattern.pool(s).unwrap()).collect();
        let units = select(&names, &pooled, pattern, scope, sparsity).unwrap();
        let grids: Vec<[usize; 2]> = dims.iter().map(|&d| pattern.grid(d).unwrap()).collect();
        let gone: f64 = units.iter().flat_map(|u| u.to_f64().unwrap()).map(|kept| 1.0 - kept).sum();
        assert_eq!(gone as usize, declared(&grids, pattern, scope, sparsity), "{pattern:?} {scope:?} {sparsity}");
        for ((units, &d), grid) in units.iter().zip(&dims).zip(&grids) {
            let (mask, kept) = (pattern.expand(units, d).unwrap().to_f64().unwrap(), units.to_f64().unwrap());
            let [rows, columns] = pattern.unit(d);
            for (i, &m) in mask.iter().enumerate() {
                assert_eq!(m, kept[(i / d[1] / rows) * grid[1] + i % d[1] / columns]);
            }
        }
        if !pattern.is_24() {
            best_were_kept(&pooled, &units, scope);
        }
    }
}

fn best_were_kept(scores: &[Tensor], units: &[Tensor], scope: Scope) {
    let pairs = |(s, u): (&Tensor, &Tensor)| {
        let values = s.to_f64().unwrap().into_iter().zip(u.to_f64().unwrap());
        values.collect::<Vec<(f64, f64)>>()
    };
    let mut groups: Vec<Vec<(f64, f64)>> = scores.iter().zip(units).map(pairs).collect();
    match scope {
        Scope::Row => {
            groups = groups
                .iter()
                .zip(scores)
                .flat_map(|(g, s)| g.chunks(s.dims()[1]).map(<[_]>::to_vec).collect::<Vec<_>>())
                .collect()
        }
        Scope::Layer => {}
        Scope::Global => groups = vec![groups.concat()],
    }
    for group in groups {
        let mut order: Vec<usize> = (0..group.len()).collect();
        order.sort_by(|&a, &b| group[b].0.total_cmp(&group[a].0));
        let kept = group.iter().filter(|(_, kept)| *kept == 1.0).count();
        assert!(order[..kept].iter().all(|&i| group[i].1 == 1.0), "{group:?}");
    }
}

#[test]
fn two_four_oracles() {
    let device = cpu();
    let mask = |pattern: Pattern, dims: [usize; 2], values: &[f32]| {
        let scores = [tensor(&device, &dims, values)];
        select(&["w".into()], &scores, pattern, Scope::Layer, 0.5).unwrap()[0].to_vec::<f32>().unwrap()
    };
    let row = [4.0, 1.0, 3.0, 2.0, 5.0, 0.0, 5.0, 1.0];
    assert_eq!(mask(Pattern::TwoFour, [1, 8], &row), [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]);
    assert_eq!(mask(Pattern::TwoFour, [1, 4], &[1.0; 4]), [1.0, 1.0, 0.0, 0.0]);
    let block = [13.0, 5.0, 4.0, 11.0, 10.0, 7.0, 14.0, 6.0, 2.0, 9.0, 1.0, 8.0, 16.0, 15.0, 3.0, 12.0];
    let kept = |pattern| {
        let mask = mask(pattern, [4, 4], &block);
        (mask.iter().sum::<f32>(), mask.iter().zip(block).map(|(m, w)| m * w).sum::<f32>())
    };
    assert_eq!(kept(Pattern::TwoFour2d), (8.0, 87.0));
    assert_eq!(kept(Pattern::TwoFour2dGreedy), (7.0, 86.0));
    assert_eq!(kept(Pattern::TwoFour2dFilled), (8.0, 87.0));
}

#[test]
fn senseless_selections_are_typed_errors() {
    let device = cpu();
    let nan = [tensor(&device, &[1, 4], &[1.0, f32::NAN, 0.0, 2.0])];
    let error = select(&["blocks.0.ffn.in.weight".into()], &nan, Pattern::Unstructured, Scope::Layer, 0.5).unwrap_err();
    assert!(matches!(&error, Error::NonFinite { index: 1, tensor, .. } if tensor.contains("ffn.in.weight")), "{error}");
    assert_eq!(Pattern::TwoFour.grid([3, 6]).unwrap_err().code(), "E-SHAPE");
    assert_eq!(Pattern::Block { rows: 3, columns: 2 }.grid([8, 8]).unwrap_err().code(), "E-SHAPE");
    assert_eq!(Pattern::Block { rows: 0, columns: 2 }.grid([8, 8]).unwrap_err().code(), "E-SHAPE");
    assert!(select(&[], &[], Pattern::Unstructured, Scope::Global, 0.5).unwrap().is_empty());
    // All zero: the declared count goes all the same, from the highest index down.
    let zero = [tensor(&device, &[1, 4], &[0.0; 4])];
    let units = select(&["w".into()], &zero, Pattern::Unstructured, Scope::Layer, 0.75).unwrap();
    assert_eq!(units[0].to_vec::<f32>().unwrap(), [1.0, 0.0, 0.0, 0.0]);
}

pub struct Steps;

impl Source for Steps {
    fn micro_batches(&self, step: u64) -> Result<Vec<Micro>> {
        Ok(micros(2, 100 + 2 * step))
    }
}

/// Kills a training at a step, as a lost process would.
pub struct Killed(pub u64);

impl Source for Killed {
    fn micro_batches(&self, step: u64) -> Result<Vec<Micro>> {
        if step == self.0 { Err(Error::file("source", step, "killed here")) } else { Steps.micro_batches(step) }
    }
}

pub fn trained(
    model: &mut Model,
    methods: &mut [Box<dyn Method>],
    folder: &Path,
    source: &dyn Source,
    (steps, graphs): (u64, usize),
) -> Result<()> {
    let validate = |_: &Model, _: &[Box<dyn Method>]| Ok(0.0);
    let job = Job {
        stage: "prune",
        steps,
        settings: settings(5e-3),
        dropout: 0.0,
        seed: 1,
        source,
        validate: &validate,
        validate_every: 0,
        checkpoint_every: 2,
        graphs,
        keep_checkpoints: 2,
        folder,
        progress: false,
        stepper: None,
    };
    train(model, &job, methods).map(|_| ())
}

pub const STEPS: u64 = 12;

fn gradual(pattern: Pattern, scope: Scope, sparsity: f64) -> Settings {
    let timing = Timing { curve: Curve::Cubic, initial: 0.1, start: 1, end: 8, every: 3 };
    Settings { pattern, scope, sparsity, timing }
}

type Make = fn() -> Box<dyn Criterion>;

const CRITERIA: [(&str, Make); 4] = [
    ("random", || Box::new(Random { seed: 5 })),
    ("magnitude", || Box::new(Magnitude)),
    ("first order", || Box::new(FirstOrder::new(0.9))),
    ("wanda", || Box::new(Wanda { micros: micros(2, 7) })),
];

fn pruned(make: Make, settings: Settings, source: &dyn Source, folder: &Path, graphs: usize) -> Result<Model> {
    let mut model = model();
    let weights = prunable(&model, &linears(&model), settings.pattern);
    let mut methods: Vec<Box<dyn Method>> = vec![Box::new(Pruner::new(&model, weights, settings, make()).unwrap())];
    trained(&mut model, &mut methods, folder, source, (STEPS, graphs))?;
    for invariant in methods[0].invariants(&model)? {
        assert!(invariant.holds, "{invariant:?}");
    }
    Ok(model)
}

/// Every criterion with every pattern and scope, through dense steps, a cubic window and a frozen phase.
#[test]
fn gradual_pruning_ends_at_the_declared_sparsity() {
    for (i, (_, make)) in CRITERIA.into_iter().enumerate() {
        for (j, pattern) in PATTERNS.into_iter().enumerate() {
            let scope = SCOPES[(i + j) % 3];
            pruned(make, gradual(pattern, scope, 0.7), &Steps, tempfile::tempdir().unwrap().path(), 0).unwrap();
        }
    }
    for pattern in [Pattern::Row, Pattern::Column] {
        let activation: Make = || Box::new(Activation { micros: micros(2, 7) });
        pruned(activation, gradual(pattern, Scope::Layer, 0.5), &Steps, tempfile::tempdir().unwrap().path(), 0)
            .unwrap();
    }
}

#[test]
fn a_resumed_pruning_equals_an_uninterrupted_one_to_the_bit() {
    for (name, make) in CRITERIA {
        let settings = gradual(Pattern::Unstructured, Scope::Global, 0.7);
        let bits = |model: Model| store::encode(&model.tensors).unwrap();
        let want = bits(pruned(make, settings, &Steps, tempfile::tempdir().unwrap().path(), 0).unwrap());
        for killed in [3, 4, 7, 10] {
            let folder = tempfile::tempdir().unwrap();
            assert!(pruned(make, settings, &Killed(killed), folder.path(), 0).is_err());
            let have = bits(pruned(make, settings, &Steps, folder.path(), 0).unwrap());
            assert!(want == have, "{name} killed at step {killed}: other weights");
        }
    }
}

/// A captured step reads the mask that is in force when it is replayed.
#[test]
fn replayed_steps_follow_the_masks() {
    let settings = gradual(Pattern::Unstructured, Scope::Layer, 0.6);
    let run = |graphs| {
        let model = pruned(CRITERIA[1].1, settings, &Steps, tempfile::tempdir().unwrap().path(), graphs).unwrap();
        store::encode(&model.tensors).unwrap()
    };
    assert!(run(0) == run(8), "captured steps gave other weights");
}

#[test]
fn masks_survive_a_thousand_updates() {
    let mut model = model();
    let weights = prunable(&model, &["blocks.0.ffn.in".into()], Pattern::Unstructured);
    let settings = Settings { pattern: Pattern::Unstructured, scope: Scope::Row, sparsity: 0.9, timing: Timing::ONCE };
    let mut methods: Vec<Box<dyn Method>> =
        vec![Box::new(Pruner::new(&model, weights, settings, Box::new(Magnitude)).unwrap())];
    struct Same(Micro);
    impl Source for Same {
        fn micro_batches(&self, _: u64) -> Result<Vec<Micro>> {
            Ok(vec![self.0.duplicate()?])
        }
    }
    let source = Same(micros(1, 1).remove(0));
    trained(&mut model, &mut methods, tempfile::tempdir().unwrap().path(), &source, (1000, 0)).unwrap();
    assert!(methods[0].invariants(&model).unwrap().iter().all(|i| i.holds));
    let kept = model.values("blocks.0.ffn.in.weight").unwrap().iter().filter(|w| **w != 0.0).count();
    let [n, k] = [model.get("blocks.0.ffn.in.weight").unwrap().dims()[0], model.config.width];
    assert_eq!(kept, n * (k - (0.9 * k as f64).round() as usize));
}

/// Wanda's score against its definition, from activations computed apart, padding left out.
#[test]
fn wanda_scores_are_weights_times_input_norms() {
    let model = model();
    let batches = micros(2, 30);
    let name = "blocks.0.attention.query.weight".to_string();
    let mut norms = vec![0.0f64; model.config.width];
    for micro in &batches {
        let states = espalier::nn::Pass::inference(&model).enter(&micro.batch).unwrap();
        let (x, lengths) =
            (states.normed.tensor.to_f64().unwrap(), micro.batch.lengths.as_ref().unwrap().to_vec::<u32>().unwrap());
        let (t, k) = (states.normed.dims()[1], model.config.width);
        for (row, x) in x.chunks(k).enumerate().filter(|(row, _)| row % t < lengths[row / t] as usize) {
            let _ = row;
            norms.iter_mut().zip(x).for_each(|(n, x)| *n += x * x);
        }
    }
    let weight = model.get(&name).unwrap().to_f64().unwrap();
    let k = norms.len();
    let want: Vec<f64> = weight.iter().enumerate().map(|(i, w)| w.abs() * norms[i % k].sqrt()).collect();
    let units = [tensor(&cpu(), &[weight.len() / k, k], &vec![1.0; weight.len()])];
    let weights = [name];
    let work = Work {
        model: &model,
        weights: &weights,
        pattern: Pattern::Unstructured,
        scope: Scope::Row,
        sparsity: 0.5,
        before: 0.0,
        units: &units,
    };
    let mask = Wanda { micros: batches }.prune(&work).unwrap()[0].to_f64().unwrap();
    for (mask, want) in mask.chunks(k).zip(want.chunks(k)) {
        let least = mask.iter().zip(want).filter(|(m, _)| **m == 1.0).map(|(_, s)| *s).fold(f64::INFINITY, f64::min);
        let most = mask.iter().zip(want).filter(|(m, _)| **m == 0.0).map(|(_, s)| *s).fold(0.0, f64::max);
        assert!(least >= most * (1.0 - 1e-5) && mask.iter().sum::<f64>() == (k - k / 2) as f64, "{least} {most}");
    }
}

#[test]
fn activations_rank_rows_and_columns_only() {
    let model = model();
    let weights = prunable(&model, &linears(&model), Pattern::Unstructured);
    let settings = Settings { pattern: Pattern::Unstructured, scope: Scope::Row, sparsity: 0.5, timing: Timing::ONCE };
    for (criterion, what) in [
        (Box::new(Activation { micros: micros(1, 1) }) as Box<dyn Criterion>, "row or column"),
        (Box::new(Wanda { micros: Vec::new() }), "at least 1"),
        (Box::new(FirstOrder::new(0.9)), "step 1 or later"),
    ] {
        let mut copy = model.duplicate().unwrap();
        let mut methods: Vec<Box<dyn Method>> =
            vec![Box::new(Pruner::new(&copy, weights.clone(), settings, criterion).unwrap())];
        let error = trained(&mut copy, &mut methods, tempfile::tempdir().unwrap().path(), &Steps, (2, 0)).unwrap_err();
        assert!(error.to_string().contains(what), "{error}");
    }
}

#[test]
fn other_devices_select_the_same() {
    let truth = device::open("reference").unwrap();
    let mut stream = Stream::new(4, 0);
    for n in [1, 7, 64, 1000] {
        let values: Vec<f64> = (0..2 * n).map(|_| stream.below(5) as f64 - 2.0).collect();
        let of = |device: &Arc<dyn Device>| {
            let x = Tensor::from_f64(device, &[2, n], DType::F32, &values).unwrap();
            let op = espalier::ops::select::KeepLargest { keep: n / 2, magnitude: true };
            dispatch::run_one(&op, &[&x]).unwrap().to_f64().unwrap()
        };
        assert_eq!(of(&cpu()), of(&truth));
    }
}
