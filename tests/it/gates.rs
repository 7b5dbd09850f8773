//! Gates on structures: their gradients against formulas and differences in f64, decisions, the small model, a training.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use espalier::compress::gates::{
    Cofi, Costs, Decision, Gates, LatencyTable, Layout, Level, MULTIPLIERS, Phase, Settings, decide, out_of_reach,
    shrink, soft,
};
use espalier::data::layout::Layout as Rows;
use espalier::device::{self, Device};
use espalier::nn::{Activation, Config, Model, OutputHook, Pass, Place, Positions};
use espalier::ops::binary::ADD;
use espalier::ops::gates::ScaleGroups;
use espalier::recipe::{self, Recipe};
use espalier::report;
use espalier::rng::Stream;
use espalier::tape::Var;
use espalier::tensor::Tensor;
use espalier::train::lifecycle::{Method, Micro};
use espalier::train::optimizer::Optimizer;
use espalier::train::store;
use espalier::train::trainer::{Source, loss_of, step, weighted_cross_entropy};
use espalier::{DType, Result};

use crate::distillation::enlivened;
use crate::model::{SIZE, VOCABULARY, assemble, cpu, examples, laid_out, micro, settings};
use crate::pruning::{Killed, STEPS, Steps, trained};
use crate::training::{options, tiny};

fn oracle() -> Arc<dyn Device> {
    device::open("reference").unwrap()
}

/// One model of each family with smooth activations, and how its rows are laid out.
fn families() -> Vec<(&'static str, Config, Rows)> {
    let labels: Vec<String> = (0..5).map(|i| format!("L{i}")).collect();
    let smooth = |mut config: Config| {
        config.blocks.iter_mut().for_each(|block| block.activation = Activation::Gelu);
        config
    };
    let t5 = Config { positions: Positions::Relative { buckets: 8, farthest: 6 }, ..Config::t5(SIZE, VOCABULARY) };
    let prefix = Rows::Prefix(espalier::data::batch::GmaskPosition::MaskIndex);
    let mut gated = smooth(Config::glm(SIZE, VOCABULARY));
    gated.blocks[1].activation = Activation::Geglu;
    vec![
        ("glm", smooth(Config::glm(SIZE, VOCABULARY)), prefix),
        ("gated FFN", gated, prefix),
        ("tagger", Config::bert_tagger(SIZE, VOCABULARY, labels), Rows::Tagging),
        ("t5", smooth(t5), Rows::EncoderDecoder),
    ]
}

fn batch(device: &Arc<dyn Device>, rows: Rows) -> Micro {
    let mut examples = examples(3, 1);
    if rows == Rows::Tagging {
        // A label for each token.
        examples.iter_mut().for_each(|e| e.labels = e.context.iter().map(|token| token % 5).collect());
    }
    micro(device, &laid_out(&examples, rows))
}

fn set(model: &mut Model, name: &str, values: &[f64]) {
    let dims = model.get(name).unwrap().dims().to_vec();
    let tensor = Tensor::from_f64(model.device(), &dims, DType::F32, values).unwrap();
    model.tensors.insert(name.into(), tensor);
}

/// Multiplies a place by gates of 1 for each token and head, or adds 0 to it; the leaf is kept.
struct Probe {
    place: Place,
    heads: Option<usize>,
    found: RefCell<Option<(Var, Var)>>,
}

impl OutputHook for Probe {
    fn on_structure(&self, pass: &mut Pass, place: Place, x: Var) -> Result<Var> {
        if place != self.place {
            return Ok(x);
        }
        let dims = [&x.dims()[..x.dims().len() - 1], &[self.heads.unwrap_or(x.tensor.shape().last())]].concat();
        let value = if self.heads.is_some() { 1.0 } else { 0.0 };
        let count = dims.iter().product();
        let leaf = Tensor::from_f64(x.tensor.device(), &dims, DType::F32, &vec![value; count]).unwrap();
        let leaf = pass.tape.leaf(&leaf);
        *self.found.borrow_mut() = Some((leaf.clone(), x.detach()));
        if self.heads.is_some() {
            pass.tape.first(ScaleGroups, &[&x, &leaf])
        } else {
            pass.tape.first(ADD, &[&x, &leaf])
        }
    }
}

/// Value at a place and the gradient of the leaf there.
fn probed(model: &Model, micro: &Micro, place: Place, heads: Option<usize>) -> (Vec<f64>, Vec<f64>) {
    let probe = Probe { place, heads, found: RefCell::new(None) };
    let mut pass = Pass::training(model).hooks([&probe as &dyn OutputHook]);
    let hidden = pass.hidden(&micro.batch).unwrap();
    let loss = weighted_cross_entropy(&mut pass, &hidden, &micro.targets, &micro.weights).unwrap();
    let seed = Tensor::from_f64(model.device(), loss.dims(), DType::F32, &[1.0]).unwrap();
    let (tape, _) = pass.into_leaves();
    let grads = tape.backward(&[(&loss, &seed)]).unwrap();
    let (leaf, value) = probe.found.into_inner().unwrap();
    (value.tensor.to_f64().unwrap(), grads.of(&leaf).unwrap().unwrap().to_f64().unwrap())
}

/// compression.md 6.2: |dL/d xi_h| per token equals |ctx_h . dL/d ctx_h| (Michel et al. 2019).
#[test]
fn a_head_gates_gradient_is_the_context_times_its_gradient() {
    let device = oracle();
    for (name, config, rows) in families() {
        let model = enlivened(config, &device, 3);
        let micro = batch(&device, rows);
        let mut places = vec![Place::Heads(0), Place::Heads(1)];
        places.extend(model.config.decodes(1).then_some(Place::CrossHeads(1)));
        for place in places {
            let (_, of_gates) = probed(&model, &micro, place, Some(SIZE.heads));
            let (context, gradient) = probed(&model, &micro, place, None);
            let products: Vec<f64> = context.iter().zip(&gradient).map(|(c, g)| c * g).collect();
            let dots: Vec<f64> = products.chunks(SIZE.head_size).map(|head| head.iter().sum()).collect();
            assert_eq!(of_gates.len(), dots.len());
            assert!(dots.iter().any(|d| d.abs() > 1e-6), "{name} {place:?}: nothing reaches the heads");
            for (gate, dot) in of_gates.iter().zip(&dots) {
                assert!((gate.abs() - dot.abs()).abs() < 1e-12 * dot.abs().max(1.0), "{name} {place:?}: {gate} {dot}");
            }
        }
    }
}

fn learning(target: f64) -> Settings {
    Settings { target, initial: 0.0, warm_up: 4, rate: 0.1, levels: Level::ALL.to_vec(), multiple: 4, seed: 5 }
}

fn cofi(model: &mut Model, settings: Settings) -> Cofi {
    let costs = Costs::parameters(&Layout::of(&model.config).unwrap());
    Cofi::new(model, settings, costs).unwrap()
}

/// log alphas that leave some of every level undecided.
fn drawn(model: &mut Model, seed: u64, (mean, deviation): (f64, f64)) -> BTreeMap<Level, Vec<f64>> {
    let layout = Layout::of(&model.config).unwrap();
    let mut stream = Stream::new(seed, 0x10);
    let mut all = BTreeMap::new();
    for level in Level::ALL {
        let values: Vec<f64> = (0..layout.count(level)).map(|_| mean + deviation * stream.normal()).collect();
        if model.tensors.contains_key(level.tensor()) {
            set(model, level.tensor(), &values);
        }
        all.insert(level, values);
    }
    all
}

/// Task loss with the method's term, and the gradients of gates and multipliers.
fn gradients(model: &Model, method: &Cofi, micro: &Micro) -> (f64, BTreeMap<String, Vec<f64>>) {
    let mut pass = Pass::training(model).hooks([method as &dyn OutputHook]);
    let hidden = pass.hidden(&micro.batch).unwrap();
    let loss = weighted_cross_entropy(&mut pass, &hidden, &micro.targets, &micro.weights).unwrap();
    let term = method.on_loss(&mut pass, &hidden, micro).unwrap().unwrap();
    assert_eq!(term.tensor.to_f64().unwrap()[0], 0.0);
    let loss = pass.tape.first(ADD, &[&loss, &term]).unwrap();
    let seed = Tensor::from_f64(model.device(), loss.dims(), DType::F32, &[1.0]).unwrap();
    let (tape, leaves) = pass.into_leaves();
    let grads = tape.backward(&[(&loss, &seed)]).unwrap();
    let gates = leaves.iter().filter(|(name, _)| name.ends_with(".gate"));
    let of = |(name, var): (&String, _)| (name.clone(), grads.of(var).unwrap().unwrap().to_f64().unwrap());
    (loss.tensor.to_f64().unwrap()[0], gates.map(of).collect())
}

/// The gradient of the task's loss reaches the gates of every level; the Lagrangian's leads log alphas down and multipliers up.
#[test]
fn gates_get_the_gradient_of_the_task_and_of_the_lagrangian() {
    let device = oracle();
    let mut moving = [0; 5];
    for (seed, (name, config, rows)) in families().into_iter().enumerate() {
        let mut model = enlivened(config, &device, 3);
        let method = cofi(&mut model, Settings { seed: seed as u64, ..learning(0.5) });
        let all = drawn(&mut model, 4, (0.0, 0.3));
        let micro = batch(&device, rows);
        let (_, task) = gradients(&model, &method, &micro);
        for level in Level::ALL {
            let values = &all[&level];
            for i in (0..values.len()).step_by((values.len() / 5).max(1)) {
                let loss = |h: f64| {
                    let mut copy = model.duplicate().unwrap();
                    let mut values = values.clone();
                    values[i] += h;
                    set(&mut copy, level.tensor(), &values);
                    gradients(&copy, &method, &micro).0
                };
                let (have, want) = (task[level.tensor()][i], (loss(1e-5) - loss(-1e-5)) / 2e-5);
                assert!((have - want).abs() <= 1e-6 * want.abs().max(0.1), "{name} {level:?} {i}: {have} {want}");
                moving[level as usize] += usize::from(want != 0.0);
            }
        }
        // The multipliers are 0: their gradient alone is of the Lagrangian, and is the way up.
        let apart = method.expected(&model).unwrap();
        let labels = micro.weights.to_f64().unwrap().iter().sum::<f64>();
        let of_multipliers = &task[MULTIPLIERS];
        for (have, want) in of_multipliers.iter().zip([apart, apart * apart]) {
            assert!((have + labels * want).abs() < 1e-9 * labels, "{name}: {have} {want}");
        }
        let multipliers = [0.7, 1.9];
        set(&mut model, MULTIPLIERS, &multipliers);
        let (_, both) = gradients(&model, &method, &micro);
        for level in Level::ALL {
            let i = all[&level].len() / 2;
            let lagrangian = |h: f64| {
                let mut copy = model.duplicate().unwrap();
                let mut values = all[&level].clone();
                values[i] += h;
                set(&mut copy, level.tensor(), &values);
                let apart = method.expected(&copy).unwrap();
                labels * (multipliers[0] * apart + multipliers[1] * apart * apart)
            };
            let want = (lagrangian(1e-5) - lagrangian(-1e-5)) / 2e-5;
            let have = both[level.tensor()][i] - task[level.tensor()][i];
            assert!(
                want != 0.0 && (have - want).abs() < 1e-6 * want.abs().max(1e-3),
                "{name} {level:?}: {have} {want}"
            );
        }
    }
    // Samples that are 0 or 1 have no slope; of every level some are in between.
    assert!(moving.iter().all(|&n| n > 0), "{moving:?} gates moved");
}

fn logits(model: &Model, micro: &Micro, hook: Option<&dyn OutputHook>) -> Vec<f64> {
    let mut pass = Pass::inference(model).hooks(hook);
    let hidden = pass.hidden(&micro.batch).unwrap();
    pass.logits(&hidden).unwrap().tensor.to_f64().unwrap()
}

/// The smaller model is the gated one: the same logits, also reloaded; with gates of channels up to the norms' epsilon.
#[test]
fn the_small_model_computes_what_decided_gates_do() {
    let device = oracle();
    for (name, config, rows) in families() {
        let mut model = enlivened(config, &device, 3);
        let layout = Layout::of(&model.config).unwrap();
        let costs = Costs::parameters(&layout);
        let micro = batch(&device, rows);
        let mut narrowed = 0;
        for seed in 0..6 {
            let mut all = drawn(&mut model, seed, (1.0, 2.0));
            let hidden = seed % 2 == 1;
            if !hidden {
                all.remove(&Level::Hidden);
            }
            let decision = decide(&layout, &all, &costs, 0.4, 4);
            let values = decision.values(&device).unwrap();
            let levels = if hidden { Level::ALL.to_vec() } else { Level::ALL[..4].to_vec() };
            let gates = Gates { layout: layout.clone(), levels, phase: Phase::Decided(values) };
            let want = logits(&model, &micro, Some(&gates));
            let (small, keep) = shrink(&model, &layout, &decision).unwrap();
            let have = logits(&small, &micro, None);
            let size = want.iter().map(|x| x.abs()).fold(0.0, f64::max);
            // Pruning stores f32.
            let bound = if hidden { 1e-4 } else { 1e-6 };
            for (have, want) in have.iter().zip(&want) {
                assert!((have - want).abs() <= bound * size, "{name} {seed}: {have} {want}");
            }
            assert!(hidden || keep.channels.len() == layout.width);
            narrowed += usize::from(keep.channels.len() < layout.width);
            assert!(small.parameter_count() < model.parameter_count());
            let share = decision.share(&layout, &costs);
            assert!(
                (share - weights(&small) / weights(&model)).abs() < 1e-12 && share <= 0.6,
                "{name} {seed}: {share}"
            );
            let folder = tempfile::tempdir().unwrap();
            let small = small.to_device(&cpu()).unwrap();
            let path = folder.path().join("model");
            store::save(&path, &store::model_files(&small).unwrap(), BTreeMap::new()).unwrap();
            let reloaded = store::load_model(&path, &cpu()).unwrap();
            let micro = batch(small.device(), rows);
            let reloaded = reloaded.to_device(small.device()).unwrap();
            assert_eq!(logits(&reloaded, &micro, None), logits(&small, &micro, None));
        }
        assert!(narrowed > 0, "{name}: no channel went");
    }
}

/// Weights of the blocks' linears.
fn weights(model: &Model) -> f64 {
    let of = |name: &String| model.get(&format!("{name}.weight")).unwrap().count();
    model.config.all_linears().iter().map(of).sum::<usize>() as f64
}

/// The multipliers bring the expected size to the target, and the decision to at least it.
#[test]
fn the_lagrangian_meets_its_target() {
    for target in [0.3, 0.7] {
        let device = cpu();
        let mut model = Model::init(Config::glm(SIZE, VOCABULARY), &device, 3).unwrap();
        let mut method = cofi(&mut model, Settings { warm_up: 20, rate: 0.1, ..learning(target) });
        let constant = espalier::train::optimizer::Settings { clip: 0.0, ..settings(1e-3) };
        let mut optimizer = Optimizer::new(&mut model, constant, |_| true).unwrap();
        method.on_update(0, &model, &mut optimizer).unwrap();
        let micros = [batch(&device, Rows::Prefix(espalier::data::batch::GmaskPosition::MaskIndex))];
        let mut methods: Vec<Box<dyn Method>> = vec![Box::new(method)];
        let mut expected = 0.0;
        for i in 0..500 {
            step(&model, &mut optimizer, &micros, &methods, (0.0, 1, 1_000_000)).unwrap();
            methods[0].on_update(i + 1, &model, &mut optimizer).unwrap();
            for level in Level::ALL {
                let clamped = model.values(level.tensor()).unwrap();
                assert!(clamped.iter().all(|x| x.abs() <= 4.605_171), "{clamped:?}");
            }
        }
        let mut copy = model.duplicate().unwrap();
        let judge = cofi(&mut copy, learning(target));
        expected += judge.expected(&copy).unwrap();
        assert!((expected - target).abs() < 0.08, "{expected} expected where {target} is wanted");
        methods[0].on_finish(&mut model).unwrap();
        let invariants = methods[0].invariants(&model).unwrap();
        assert!(invariants.len() == 1 && invariants[0].holds, "{invariants:?}");
        assert!(model.tensors.keys().all(|name| !name.ends_with(".gate")));
    }
}

fn learn(source: &dyn Source, folder: &Path, graphs: usize) -> Result<Model> {
    let mut model = Model::init(Config::glm(SIZE, VOCABULARY), &crate::pruning::cpu(), 3)?;
    let mut methods: Vec<Box<dyn Method>> = vec![Box::new(cofi(&mut model, Settings { rate: 0.3, ..learning(0.5) }))];
    trained(&mut model, &mut methods, folder, source, (STEPS, graphs))?;
    for invariant in methods[0].invariants(&model)? {
        assert!(invariant.holds, "{invariant:?}");
    }
    Ok(model)
}

/// Uninterrupted, captured and resumed trainings give the same small model to the bit.
#[test]
fn learned_gates_end_in_the_same_model_however_they_are_trained() {
    let fresh = || tempfile::tempdir().unwrap();
    let bits = |model: Result<Model>| store::encode(&model.unwrap().tensors).unwrap();
    let want = bits(learn(&Steps, fresh().path(), 0));
    assert!(want == bits(learn(&Steps, fresh().path(), 8)), "captured steps differ");
    for killed in [3, 7, 11] {
        let folder = fresh();
        assert!(learn(&Killed(killed), folder.path(), 0).is_err());
        assert!(want == bits(learn(&Steps, folder.path(), 0)), "killed at {killed}");
    }
}

/// CoFi's rule, by hand: as many go as are expected to be 0, in each group, and what stays has its soft value.
#[test]
fn decisions_follow_the_expected_number_of_zeros() {
    let config = Config::glm(SIZE, VOCABULARY);
    let layout = Layout::of(&config).unwrap();
    let costs = Costs::parameters(&layout);
    let mut all: BTreeMap<Level, Vec<f64>> = BTreeMap::new();
    // 0.05 + 0.95 expected open of the first attention's two heads, both of the second's.
    all.insert(Level::Heads, vec![-4.6, 2.0, 4.6, 4.6]);
    // 32 neurons at log alpha 0: 32 * 0.168 = 5.4 are expected to be 0, the highest indices among equals; then a multiple.
    all.insert(Level::Neurons, vec![0.0; 64]);
    let decision = decide(&layout, &all, &costs, 0.01, 1);
    assert_eq!(decision.heads, [0.0, soft(2.0), soft(4.6), soft(4.6)]);
    let open: Vec<bool> = decision.neurons.iter().map(|z| *z > 0.0).collect();
    let half = |from: usize| (open[from..from + 27].iter().all(|o| *o), open[from + 27..from + 32].iter().any(|o| *o));
    assert_eq!((half(0), half(32)), ((true, false), (true, false)));
    assert_eq!(
        decide(&layout, &all, &costs, 0.01, 4).keep(&config, &layout).blocks[0].neurons.as_ref().unwrap().len(),
        28
    );
    assert!((soft(0.0) - 0.5).abs() < 1e-15 && (soft(1.0) - 1.0 / (1.0 + (-1.2f64).exp())).abs() < 1e-15);
    // All as good as closed: what the target lets be, and a model that still runs.
    for level in Level::ALL {
        all.insert(level, vec![-4.6; layout.count(level)]);
    }
    let decision = decide(&layout, &all, &costs, 0.9, 4);
    let nothing = |all: &[bool]| all.iter().all(|open| !open);
    assert!(nothing(&decision.attentions) && nothing(&decision.ffns));
    assert_eq!(decision.channels.iter().filter(|c| **c).count(), 4);
    let model = Model::init(config, &cpu(), 3).unwrap();
    let (small, _) = shrink(&model, &layout, &decision).unwrap();
    let micro = micro(&cpu(), &assemble(&examples(2, 1))).map(|_, t| t.to_device(small.device())).unwrap();
    assert!(logits(&small, &micro, None).iter().all(|x| x.is_finite()));
    assert_eq!(weights(&small), 0.0);
}

#[test]
fn what_cannot_be_gated_is_refused_with_the_reason() {
    let model = || Model::init(Config::glm(SIZE, VOCABULARY), &cpu(), 3).unwrap();
    let layout = Layout::of(&model().config).unwrap();
    let refused = |settings: Settings| {
        let error = Cofi::new(&mut model(), settings, Costs::parameters(&layout)).err().unwrap();
        assert_eq!(error.code(), "E-PARAMETER");
        error.to_string()
    };
    assert!(refused(learning(0.0)).contains("target"));
    assert!(refused(learning(1.0)).contains("target"));
    assert!(refused(Settings { initial: 0.6, ..learning(0.5) }).contains("initial"));
    assert!(refused(Settings { rate: f64::NAN, ..learning(0.5) }).contains("rate"));
    assert!(refused(Settings { levels: Vec::new(), ..learning(0.5) }).contains("levels"));
    assert!(refused(Settings { multiple: 0, ..learning(0.5) }).contains("multiple_of"));
    // An FFN is not all that there is.
    let levels = vec![Level::Ffn];
    let most = out_of_reach(f64::INFINITY, &layout, &levels, &Costs::parameters(&layout), 1).unwrap();
    let ask = |target| Settings { levels: levels.clone(), multiple: 1, initial: 0.0, ..learning(target) };
    assert!(refused(ask(most + 1e-3)).contains(&format!("can take away {most}")));
    Cofi::new(&mut model(), ask(most), Costs::parameters(&layout)).unwrap();
    let mut routed = Config::glm(SIZE, VOCABULARY);
    routed.blocks[0].experts = Some(espalier::nn::Experts { count: 4, selected: 1, threshold: None });
    assert!(Layout::of(&routed).unwrap_err().to_string().contains("experts"));
    // Times are those at full width, and must reach every size.
    let table =
        LatencyTable { attention: vec![(1, 1.0), (2, 2.0)], ffn: vec![(8, 1.0), (32, 3.0)], ..Default::default() };
    let costs = Costs::latency(&layout, &table).unwrap();
    let error = Cofi::new(&mut model(), learning(0.5), costs).err().unwrap();
    assert!(error.to_string().contains("full width"), "{error}");
    let short = LatencyTable { ffn: vec![(8, 1.0), (16, 3.0)], ..table.clone() };
    assert!(Costs::latency(&layout, &short).unwrap_err().to_string().contains("up to 16"));
    let falling = LatencyTable { ffn: vec![(8, 4.0), (32, 3.0)], ..table };
    assert!(Costs::latency(&layout, &falling).is_err());
}

/// A table of times: what gates are expected to leave is the curve's value, and the decision is held to it.
#[test]
fn a_latency_table_is_measured_and_held() {
    let mut model = Model::init(Config::glm(SIZE, VOCABULARY), &cpu(), 3).unwrap();
    // As if a head took 2 ms, a neuron 0.25 ms, an FFN 1 ms by itself, everything else 5.
    let time = |model: &Model| {
        let block = |b: &espalier::nn::Block| {
            2.0 * b.heads as f64 + 0.25 * b.ffn_width as f64 + if b.feeds() { 1.0 } else { 0.0 }
        };
        Ok(5.0 + model.config.blocks.iter().map(block).sum::<f64>())
    };
    let table = LatencyTable::measure(&model, "as if", time).unwrap();
    assert_eq!(table.attention, [(1, 2.0), (2, 4.0)]);
    assert_eq!((table.ffn[0], table.ffn[7]), ((4, 2.0), (32, 9.0)));
    let layout = Layout::of(&model.config).unwrap();
    let costs = Costs::latency(&layout, &table).unwrap();
    assert!((costs.total - 26.0).abs() < 1e-12);
    assert!((costs.share(&[1, 0], &[8, 0], 1.0) - 5.0 / 26.0).abs() < 1e-12);
    let levels = Level::ALL[..4].to_vec();
    let method = Cofi::new(&mut model, Settings { levels, ..learning(0.5) }, costs.clone()).unwrap();
    let saturated = [(Level::Heads, 4), (Level::Neurons, 64), (Level::Attention, 2), (Level::Ffn, 2)];
    for (level, count) in saturated {
        let values: Vec<f64> = (0..count).map(|i| if i % 2 == 0 { 40.0 } else { -40.0 }).collect();
        set(&mut model, level.tensor(), &values);
    }
    // One head and 16 neurons of the first block's sublayers, nothing of the second's.
    let want = (2.0 + 5.0) / 26.0;
    assert!((1.0 - method.expected(&model).unwrap() - want).abs() < 1e-6);
    let decision: Decision = method.decision(&model).unwrap();
    assert!((decision.share(&layout, &costs) - want).abs() < 1e-12);
    assert_eq!((decision.attentions, decision.ffns), (vec![true, false], vec![true, false]));
}

/// The method leaves the trained loss alone where all gates are open and nothing is wanted of it.
#[test]
fn open_gates_change_nothing() {
    let device = oracle();
    for (name, config, rows) in families() {
        let mut model = enlivened(config, &device, 3);
        let micro = batch(&device, rows);
        let plain = {
            let mut pass = Pass::inference(&model);
            let hidden = pass.hidden(&micro.batch).unwrap();
            loss_of(&mut pass, &hidden, &micro, &[]).unwrap().tensor.to_f64().unwrap()[0]
        };
        let method = cofi(&mut model, learning(0.5));
        for level in Level::ALL {
            let count = model.get(level.tensor()).unwrap().count();
            set(&mut model, level.tensor(), &vec![100.0; count]);
        }
        let (gated, _) = gradients(&model, &method, &micro);
        assert!((gated - plain).abs() < 1e-9 * plain, "{name}: {gated} {plain}");
    }
}

/// In place of the usual sizes.
const GATED: &str = "structure={ method = \"l0\", l0 = { target = 0.4, rate = 0.3, training = { steps = 12, batch = 4, \
     learning_rate = 1e-3 } }, training = { steps = 4, batch = 8, learning_rate = 1e-3 } }";

/// A whole flow: gates, the small model's training, and what comes after on blocks that differ.
#[test]
fn a_recipe_learns_its_structure() {
    for sets in [&["structure.distil={ preset = \"cofi\" }"][..], &["structure.l0.cost=\"latency\""]] {
        let recipe = tiny(&[&[GATED], sets].concat());
        let folder = tempfile::tempdir().unwrap();
        let html = recipe::run(&recipe, &cpu(), &options(&folder.path().join("run"))).unwrap();
        let report = report::read(html.with_file_name("report.json")).unwrap();
        for stage in &report.stages {
            assert!(stage.invariants.iter().all(|i| i.ok), "{}: {:?}", stage.name, stage.invariants);
        }
        let row = |name: &str| report.stages.iter().find(|s| s.name == name).unwrap();
        assert!(row("gates").total_bytes < row("teacher").total_bytes);
        assert_eq!(row("gates").parameters, row("structure").parameters);
        assert!(row("gates").invariants.iter().any(|i| i.name.contains("gates remove at least 40.0 %")));
    }
}

/// Channels alone can go as far as others: rounding to multiples does not stop above the target.
#[test]
fn channels_alone_reach_what_was_declared() {
    let layout = Layout::of(&Config::glm(SIZE, VOCABULARY)).unwrap();
    let costs = Costs::parameters(&layout);
    let all = BTreeMap::from([(Level::Hidden, vec![2.0; layout.count(Level::Hidden)])]);
    for target in [0.1, 0.3, 0.6] {
        let decision = decide(&layout, &all, &costs, target, 4);
        assert!(decision.share(&layout, &costs) <= 1.0 - target, "{target}");
        assert!(decision.channels.iter().filter(|c| **c).count().is_multiple_of(4));
    }
}

#[test]
fn shapes_tell_what_gates_and_patterns_cannot_do() {
    for (sets, key, words) in [
        (
            &[GATED, "experts=false", "structure.l0.levels=[\"ffn\"]", "structure.l0.target=0.9"][..],
            "structure.l0.target",
            "at most 0.",
        ),
        (
            &["structure=false", "sparsify.pattern={ block = { rows = 7, columns = 3 } }"],
            "sparsify.pattern",
            "attention.query.weight [",
        ),
    ] {
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        let error = recipe::plan::check_shapes(&Recipe::load(None, &sets).unwrap()).unwrap_err().to_string();
        assert!(error.contains(&format!("recipe: {key}:")) && error.contains(words), "{error}");
    }
    let folder = tempfile::tempdir().unwrap();
    let table = folder.path().join("times.json");
    std::fs::write(&table, "{ \"attention\": [[0, 0.0]], \"ffn\": [[1, 1.0]] }").unwrap();
    let sets = [
        GATED.into(),
        "experts=false".into(),
        "structure.l0.cost=\"latency\"".into(),
        format!("structure.l0.table={:?}", table.to_str().unwrap()),
    ];
    let error = recipe::plan::check_shapes(&Recipe::load(None, &sets).unwrap()).unwrap_err().to_string();
    assert!(error.contains("times.json") && error.contains("structure.l0.table"), "{error}");
    recipe::plan::check_shapes(&Recipe::load(None, &[GATED.into(), "experts=false".into()]).unwrap()).unwrap();
}

#[test]
fn recipes_that_cannot_be_are_refused_by_key() {
    for (set, key) in [
        ("structure.l0.target=1.0", "structure.l0.target"),
        ("structure.l0.initial=0.9", "structure.l0.initial"),
        ("structure.l0.warm_up=1.5", "structure.l0.warm_up"),
        ("structure.l0.rate=0.0", "structure.l0.rate"),
        ("structure.l0.multiple_of=7", "structure.l0.multiple_of"),
        ("structure.l0.levels=[]", "structure.l0.levels"),
        ("structure.l0.levels=[\"heads\", \"heads\"]", "structure.l0.levels"),
        ("structure.l0.table=\"times.json\"", "structure.l0.table"),
        ("structure.method=\"scores\"", "structure.method"),
        ("structure.heads={ keep = 1 }", "structure"),
        ("structure.compare_random=true", "structure.selection"),
    ] {
        let error = Recipe::load(None, &[GATED, set].map(String::from)).unwrap_err().to_string();
        assert!(error.contains(&format!("recipe: {key}:")), "{set}: {error}");
    }
}
