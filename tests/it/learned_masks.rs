//! Masks that are trained: gradients of their scores against differences in f64, and what is left after a training.

use std::collections::BTreeMap;
use std::path::Path;

use espalier::compress::pruning::{
    Binariser, Curve, Learned24, Movement, Pattern, Scope, Settings, Timing, gates, prunable,
};
use espalier::device;
use espalier::nn::{Config, Model, OutputHook, Pass};
use espalier::rng::Stream;
use espalier::tensor::Tensor;
use espalier::train::lifecycle::Method;
use espalier::train::store;
use espalier::train::trainer::{loss_of, weighted_cross_entropy};
use espalier::{DType, Result};

use crate::model::{SIZE, assemble, examples, micro};
use crate::pruning::{Killed, STEPS, Steps, cpu, linears, model, trained};

/// A model in f64.
fn truth() -> Model {
    model().to_device(&device::open("reference").unwrap()).unwrap()
}

fn set(model: &mut Model, name: &str, values: &[f64]) {
    let dims = model.get(name).unwrap().dims().to_vec();
    let tensor = Tensor::from_f64(model.device(), &dims, DType::F32, values).unwrap();
    model.tensors.insert(name.into(), tensor);
}

/// Loss and the gradient of one parameter under a method's hooks.
fn gradient(model: &Model, method: &dyn Method, name: &str) -> (f64, Vec<f64>) {
    let micro = micro(model.device(), &assemble(&examples(3, 1)));
    let hooks: Vec<&dyn OutputHook> = method.on_output().into_iter().collect();
    let mut pass = Pass::training(model).hooks(hooks);
    let hidden = pass.hidden(&micro.batch).unwrap();
    let mut loss = weighted_cross_entropy(&mut pass, &hidden, &micro.targets, &micro.weights).unwrap();
    if let Some(term) = method.on_loss(&mut pass, &hidden, &micro).unwrap() {
        let add = espalier::ops::binary::Binary(espalier::ops::binary::BinaryFunction::Add);
        loss = pass.tape.first(add, &[&loss, &term]).unwrap();
    }
    let seed = Tensor::from_f64(model.device(), loss.dims(), DType::F32, &[1.0]).unwrap();
    let value = loss.tensor.to_f64().unwrap()[0];
    let (tape, leaves) = pass.into_leaves();
    let grads = tape.backward(&[(&loss, &seed)]).unwrap();
    (value, grads.of(&leaves[name]).unwrap().unwrap().to_f64().unwrap())
}

fn close(got: f64, want: f64, what: &str) {
    assert!((got - want).abs() <= 1e-6 * want.abs().max(1e-2), "{what}: {got} where differences give {want}");
}

/// dL/dS of a unit is dL/dM: the mask's entry is moved as a number, on the weights themselves.
#[test]
fn movement_scores_get_the_gradient_of_their_masks() {
    // Not of the ReLU: differences of a pruned row would meet its kink.
    let weight = "blocks.0.attention.value.weight";
    for pattern in [Pattern::Unstructured, Pattern::Block { rows: 4, columns: 2 }, Pattern::Row, Pattern::TwoFour] {
        let mut model = truth();
        let timing = Timing { end: 9, ..Timing::ONCE };
        let settings = Settings { pattern, scope: Scope::Layer, sparsity: 0.5, timing };
        let mut method = Movement::new(&mut model, vec![weight.into()], settings, Binariser::TopK, 1e-2).unwrap();
        let mut stream = Stream::new(9, 0);
        let count = model.get(&gates::of(weight)).unwrap().count();
        let scores: Vec<f64> = (0..count).map(|_| stream.normal()).collect();
        set(&mut model, &gates::of(weight), &scores);
        method.choose(0, &model).unwrap();
        let (_, gradient_of_scores) = gradient(&model, &method, &gates::of(weight));
        let dims = {
            let d = model.get(weight).unwrap().dims();
            [d[0], d[1]]
        };
        let units = method.state()[&format!("pruning.movement/{weight}")].clone();
        let (mask, values) =
            (pattern.expand(&units, dims).unwrap().to_f64().unwrap(), model.get(weight).unwrap().to_f64().unwrap());
        let [rows, columns] = pattern.unit(dims);
        let grid = pattern.grid(dims).unwrap();
        for unit in (0..count).step_by(count / 7 + 1) {
            let inside = |i: usize| (i / dims[1] / rows) * grid[1] + i % dims[1] / columns == unit;
            let moved = |h: f64| {
                let entry = |(i, (w, m)): (usize, (&f64, &f64))| w * (m + if inside(i) { h } else { 0.0 });
                let mut copy = model.duplicate().unwrap();
                set(&mut copy, weight, &values.iter().zip(&mask).enumerate().map(entry).collect::<Vec<_>>());
                loss(&copy)
            };
            close(gradient_of_scores[unit], (moved(1e-5) - moved(-1e-5)) / 2e-5, &format!("{pattern:?} unit {unit}"));
        }
    }
}

fn loss(model: &Model) -> f64 {
    let micro = micro(model.device(), &assemble(&examples(3, 1)));
    let mut pass = Pass::inference(model);
    let hidden = pass.hidden(&micro.batch).unwrap();
    loss_of(&mut pass, &hidden, &micro, &[]).unwrap().tensor.to_f64().unwrap()[0]
}

/// The penalty and the softmax over patterns are functions with a slope: differences of the gates themselves.
#[test]
fn gates_get_the_gradient_of_penalty_and_patterns() {
    let weight = "blocks.1.attention.value.weight";
    let timing = Timing { curve: Curve::Linear, initial: 0.0, start: 0, end: 10, every: 1 };
    let settings = Settings { pattern: Pattern::Unstructured, scope: Scope::Layer, sparsity: 0.1, timing };
    let mut model = truth();
    let mut soft =
        Movement::new(&mut model, vec![weight.into()], settings, Binariser::Threshold { penalty: 30.0 }, 1e-2).unwrap();
    let mut stream = Stream::new(2, 0);
    let count = model.get(&gates::of(weight)).unwrap().count();
    set(&mut model, &gates::of(weight), &(0..count).map(|_| stream.normal()).collect::<Vec<_>>());
    soft.choose(10, &model).unwrap();
    let (_, all) = gradient(&model, &soft, &gates::of(weight));
    let hard = Movement::new(&mut model, vec![weight.into()], settings, Binariser::TopK, 1e-2).unwrap();
    hard_units(&hard, &soft, weight);
    let (_, task) = gradient(&model, &hard, &gates::of(weight));
    let scores = model.get(&gates::of(weight)).unwrap().to_f64().unwrap();
    let micro = micro(model.device(), &assemble(&examples(3, 1)));
    for i in (0..count).step_by(17) {
        let open = 1.0 / (1.0 + (-scores[i]).exp());
        let penalty = 30.0 * micro.weight * open * (1.0 - open) / count as f64;
        close(all[i] - task[i], penalty, "penalty");
    }

    let mut model = truth();
    let mut learned = Learned24::new(&mut model, vec![weight.into()], timing, 20.0, 1e-2).unwrap();
    learned.restore(&BTreeMap::new(), 3).unwrap();
    let name = gates::of(weight);
    let values = model.get(&name).unwrap().to_f64().unwrap();
    let (_, grads) = gradient(&model, &learned, &name);
    for i in (0..values.len()).step_by(values.len() / 9) {
        let moved = |h: f64| {
            let mut copy = model.duplicate().unwrap();
            let mut values = values.clone();
            values[i] += h;
            set(&mut copy, &name, &values);
            gradient(&copy, &learned, &name).0
        };
        close(grads[i], (moved(1e-5) - moved(-1e-5)) / 2e-5, "pattern gate");
    }
}

/// Gives one method the units of the other.
fn hard_units(to: &Movement, from: &Movement, weight: &str) {
    let key = format!("pruning.movement/{weight}");
    to.state()[&key].assign(&from.state()[&key]).unwrap();
}

fn window(end: u64) -> Timing {
    Timing { curve: Curve::Cubic, initial: 0.0, start: 2, end, every: 2 }
}

type Make = fn(&mut Model) -> Box<dyn Method>;

fn movement(model: &mut Model, pattern: Pattern, scope: Scope, binariser: Binariser) -> Box<dyn Method> {
    let weights = prunable(model, &linears(model), pattern);
    let settings = Settings { pattern, scope, sparsity: 0.6, timing: window(9) };
    Box::new(Movement::new(model, weights, settings, binariser, 1e-2).unwrap())
}

const LEARNERS: [(&str, Make); 6] = [
    ("top-k", |m| movement(m, Pattern::Unstructured, Scope::Global, Binariser::TopK)),
    ("top-k rows", |m| movement(m, Pattern::Unstructured, Scope::Row, Binariser::TopK)),
    ("blocks", |m| movement(m, Pattern::Block { rows: 4, columns: 4 }, Scope::Layer, Binariser::TopK)),
    ("2:4", |m| movement(m, Pattern::TwoFour, Scope::Layer, Binariser::TopK)),
    ("threshold", |m| movement(m, Pattern::Row, Scope::Layer, Binariser::Threshold { penalty: 400.0 })),
    ("learned", |m| {
        let weights = prunable(m, &linears(m), Pattern::TwoFour);
        Box::new(Learned24::new(m, weights, window(9), 20.0, 1e-2).unwrap())
    }),
];

fn learn(make: Make, source: &dyn espalier::train::trainer::Source, folder: &Path, graphs: usize) -> Result<Model> {
    let mut model = Model::init(Config::glm(SIZE, 37), &cpu(), 3)?;
    let mut methods = vec![make(&mut model)];
    trained(&mut model, &mut methods, folder, source, (STEPS, graphs))?;
    assert!(model.tensors.keys().all(|name| !name.ends_with(".gate")), "gates are taken out again");
    for invariant in methods[0].invariants(&model)? {
        assert!(invariant.holds, "{invariant:?}");
    }
    Ok(model)
}

/// Uninterrupted, captured and resumed trainings give the same bits, and every promise holds.
#[test]
fn learned_masks_hold_their_promises_however_they_are_trained() {
    for (name, make) in LEARNERS {
        let fresh = || tempfile::tempdir().unwrap();
        let bits = |model: Result<Model>| store::encode(&model.unwrap().tensors).unwrap();
        let want = bits(learn(make, &Steps, fresh().path(), 0));
        assert!(want == bits(learn(make, &Steps, fresh().path(), 8)), "{name}: captured steps differ");
        for killed in [3, 7, 11] {
            let folder = fresh();
            assert!(learn(make, &Killed(killed), folder.path(), 0).is_err());
            assert!(want == bits(learn(make, &Steps, folder.path(), 0)), "{name}: killed at {killed}");
        }
    }
}

#[test]
fn a_window_beyond_the_training_is_refused() {
    let mut model = model();
    let timing = window(STEPS + 5);
    let learner = Learned24::new(&mut model, vec!["blocks.0.ffn.in.weight".into()], timing, 20.0, 1e-2).unwrap();
    let mut methods: Vec<Box<dyn Method>> = vec![Box::new(learner)];
    let folder = tempfile::tempdir().unwrap();
    let error = trained(&mut model, &mut methods, folder.path(), &Steps, (STEPS, 0)).unwrap_err();
    assert!(error.to_string().contains("window"), "{error}");
    let settings = Settings { pattern: Pattern::TwoFour2d, scope: Scope::Layer, sparsity: 0.5, timing };
    let weights = vec!["blocks.0.ffn.in.weight".to_string()];
    assert_eq!(
        Movement::new(&mut model, weights, settings, Binariser::TopK, 1e-2).err().unwrap().code(),
        "E-PARAMETER"
    );
}
