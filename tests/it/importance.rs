//! Scores of heads and neurons: against differences, against each other, and their choice in rounds.

use std::cell::RefCell;
use std::sync::Arc;

use espalier::compress::structure::gates::{self, Absolute};
use espalier::compress::structure::judge::Judge;
use espalier::compress::structure::sites::{Kind, Site};
use espalier::compress::structure::{Heads, Keep, LayersMethod, Neurons, Objective, Order, Plan, Progress, Score};
use espalier::compress::structure::{normalise, prune, shrink, weights};
use espalier::device::{self, Device};
use espalier::nn::config::Size;
use espalier::nn::{Config, Model, OutputHook, Pass, Place};
use espalier::recipe::schema::layout;
use espalier::tape::Var;
use espalier::tensor::Tensor;
use espalier::train::lifecycle::Micro;

use crate::model::{VOCABULARY, cpu, examples, laid_out, micro};
use crate::structure::{families, model};

const SIZE: Size = Size { layers: 2, heads: 2, head_size: 8, ffn_width: 8, max_positions: 40 };

fn oracle() -> Arc<dyn Device> {
    device::open("reference").unwrap()
}

fn batch(model: &Model, seed: u64) -> Micro {
    let examples: Vec<_> = examples(3, seed)
        .into_iter()
        .map(|mut e| {
            // A tagger's labels are tags, one for each token.
            if model.config.encoder == 0 && layout(&model.config) == espalier::data::layout::Layout::Tagging {
                e.labels = e.context.iter().map(|token| token % 3).collect();
            }
            e
        })
        .collect();
    micro(model.device(), &laid_out(&examples, layout(&model.config)))
}

/// The model with a unit's columns multiplied.
fn scaled(model: &Model, site: &Site, unit: usize, factor: f64) -> Model {
    let part = match (site.kind, site.cross) {
        (Kind::Heads, false) => "attention.output",
        (Kind::Heads, true) => "cross.output",
        _ => "ffn.out",
    };
    let name = format!("blocks.{}.{part}.weight", site.block);
    let tensor = model.get(&name).unwrap();
    let width = *tensor.dims().last().unwrap();
    let mut values = tensor.to_f64().unwrap();
    let own = |at: &usize| (at % width) / site.size == unit;
    values.iter_mut().enumerate().filter(|(at, _)| own(at)).for_each(|(_, w)| *w *= factor);
    let mut scaled = model.duplicate().unwrap();
    let tensor = Tensor::from_f64(model.device(), tensor.dims(), espalier::DType::F32, &values).unwrap();
    scaled.tensors.insert(name, tensor);
    scaled
}

/// A gate on a unit is a factor on the columns behind it: its gradient is the loss's difference, for every loss and family.
#[test]
fn gate_gradients_equal_differences_of_every_objective() {
    let device = oracle();
    for (family, config) in families(SIZE).into_iter().enumerate() {
        let whole = model(config, &device, 3);
        let other = model(whole.config.clone(), &device, 4);
        let micro = batch(&whole, 7);
        for objective in [Objective::Labels, Objective::Entropy, Objective::DenseKl, Objective::DenseMse] {
            let judge = Judge { objective, dense: Some(&other) };
            for kind in [Kind::Heads, Kind::Neurons] {
                let sites = Site::of(&whole.config, kind);
                let micros = std::slice::from_ref(&micro);
                let scores = gates::scores(&whole, micros, &sites, (&judge, Absolute::Batch)).unwrap();
                let largest = scores.iter().flatten().fold(0.0f64, |most, s| most.max(*s));
                for (site, scores) in sites.iter().zip(&scores) {
                    for unit in [0, site.units - 1] {
                        let loss = |factor: f64| {
                            let scaled = scaled(&whole, site, unit, factor);
                            judge.backward(Pass::training(&scaled), &micro).unwrap().loss
                        };
                        let step = 1e-4;
                        let difference = (loss(1.0 + step) - loss(1.0 - step)) / (2.0 * step);
                        let error = (difference.abs() - scores[unit]).abs();
                        assert!(
                            error < 1e-4 * largest + 1e-9,
                            "family {family}, {objective:?}, {site:?}, unit {unit}: {} where differences give {difference}",
                            scores[unit]
                        );
                    }
                }
            }
        }
    }
}

/// Takes an attention's context as it is, and the gradient that reaches it.
#[derive(Default)]
struct Contexts(RefCell<Vec<Var>>, usize);

impl OutputHook for Contexts {
    fn on_structure(&self, pass: &mut Pass, place: Place, x: Var) -> espalier::Result<Var> {
        if place != Place::Heads(self.1) {
            return Ok(x);
        }
        let leaf = pass.tape.leaf(&x.tensor);
        self.0.borrow_mut().push(leaf.clone());
        Ok(leaf)
    }
}

#[test]
fn a_gates_gradient_per_token_is_the_contexts_product_with_its_gradient() {
    let whole = model(Config::glm(SIZE, VOCABULARY), &oracle(), 3);
    let micro = batch(&whole, 7);
    let sites = Site::of(&whole.config, Kind::Heads);
    let scores =
        |absolute| gates::scores(&whole, std::slice::from_ref(&micro), &sites, (&Judge::LABELS, absolute)).unwrap();
    let [token, example, all] = [Absolute::Token, Absolute::Example, Absolute::Batch].map(scores);
    for block in 0..2 {
        let contexts = Contexts(RefCell::default(), block);
        let pass = Pass::training(&whole).hooks([&contexts as &dyn OutputHook]);
        let judged = Judge::LABELS.backward(pass, &micro).unwrap();
        let context = contexts.0.borrow()[0].clone();
        let slopes = judged.grads.of(&context).unwrap().unwrap().to_f64().unwrap();
        let (values, dims) = (context.tensor.to_f64().unwrap(), context.dims().to_vec());
        for head in 0..2 {
            let dots: Vec<f64> = (0..dims[0] * dims[1])
                .map(|row| (0..8).map(|j| row * 16 + head * 8 + j).map(|at| values[at] * slopes[at]).sum())
                .collect();
            let sum = |run: usize| dots.chunks(run).map(|run| run.iter().sum::<f64>().abs()).sum::<f64>();
            for (scores, run) in [(&token, 1), (&example, dims[1]), (&all, dims[0] * dims[1])] {
                let (have, want) = (scores[block][head], sum(run));
                assert!((have - want).abs() < 1e-7 * want.max(1e-3), "block {block}, head {head}: {have} for {want}");
            }
        }
    }
    let pairs = token.iter().flatten().zip(example.iter().flatten()).zip(all.iter().flatten());
    assert!(pairs.clone().all(|((t, e), a)| t >= e && e >= a));
    assert!(pairs.clone().any(|((t, _), a)| *t > 1.01 * a), "signs differ between tokens");
}

/// TextPruner's sums of w dL/dw over what a gate multiplies are the gate's gradient, and with ReLU the rows in front of a
/// neuron sum to the same.
#[test]
fn textpruners_formula_is_the_gate_of_a_batch() {
    for config in families(SIZE) {
        let relu = config.blocks[0].activation == espalier::nn::Activation::Relu;
        let whole = model(config, &oracle(), 5);
        let micros = [batch(&whole, 7), batch(&whole, 8)];
        for kind in [Kind::Heads, Kind::Neurons] {
            let sites = Site::of(&whole.config, kind);
            let gates = gates::scores(&whole, &micros, &sites, (&Judge::LABELS, Absolute::Batch)).unwrap();
            let columns = weights::scores(&whole, &micros, &sites, &Judge::LABELS, false).unwrap();
            let rows = weights::scores(&whole, &micros, &sites, &Judge::LABELS, true).unwrap();
            for ((gates, columns), rows) in gates.iter().zip(&columns).zip(&rows) {
                let most = gates.iter().fold(1e-12f64, |most, g| most.max(*g));
                for ((gate, column), row) in gates.iter().zip(columns).zip(rows) {
                    assert!((gate - 6.0 * column).abs() < 1e-6 * most, "{gate} for 6 examples of {column}");
                    if kind == Kind::Neurons && relu {
                        assert!((row - 2.0 * column).abs() < 1e-6 * most, "{row} for twice {column}");
                    }
                }
            }
        }
    }
}

#[test]
fn layers_norms_make_attentions_compare() {
    let mut scores = [3.0, 4.0];
    normalise(&mut scores);
    assert_eq!(scores, [0.6, 0.8]);
    let mut none = [0.0; 3];
    normalise(&mut none);
    assert_eq!(none, [0.0; 3]);
}

fn heads(keep: usize) -> Heads {
    toml::from_str(&format!("keep = {keep}")).unwrap()
}

fn neurons(keep: usize) -> Neurons {
    toml::from_str(&format!("keep = {keep}\nmultiple_of = 4\nfloor = 4")).unwrap()
}

fn plan(heads: Option<Heads>, ffn: Option<Neurons>) -> Plan {
    let (progress, order) = (Progress::Linear, Order::Together);
    Plan { heads, ffn, rounds: 3, progress, order, objective: Objective::Labels, seed: 1 }
}

fn counts(keep: &Keep, config: &Config) -> (Vec<usize>, Vec<usize>) {
    let small = keep.config(config).unwrap();
    let units = |kind| Site::of(&small, kind).iter().map(|site| site.units).collect();
    (units(Kind::Heads), units(Kind::Neurons))
}

/// Counts, floors and tiles hold in every mode; the same question has the same answer.
#[test]
fn rounds_end_at_the_declared_counts() {
    let size = Size { layers: 3, heads: 4, head_size: 4, ffn_width: 24, max_positions: 40 };
    for config in families(size) {
        let whole = model(config, &cpu(), 2);
        let micros = [batch(&whole, 7)];
        for order in [Order::Together, Order::HeadsFirst, Order::FfnFirst] {
            for (progress, even) in [(Progress::Linear, false), (Progress::Cubic, true)] {
                let plan = Plan {
                    order,
                    progress,
                    ..plan(Some(Heads { even, ..heads(2) }), Some(Neurons { even, ..neurons(12) }))
                };
                let keep = shrink(&whole, &micros, &plan).unwrap();
                assert_eq!(keep, shrink(&whole, &micros, &plan).unwrap());
                let (heads, neurons) = counts(&keep, &whole.config);
                assert_eq!(heads.iter().sum::<usize>(), 2 * heads.len());
                assert_eq!(neurons.iter().sum::<usize>(), 12 * neurons.len());
                assert!(heads.iter().all(|&n| n >= 1) && neurons.iter().all(|&n| n >= 4 && n % 4 == 0));
                assert!(!even || (heads.iter().all(|&n| n == 2) && neurons.iter().all(|&n| n == 12)));
                prune(&whole, &keep).unwrap();
            }
        }
    }
}

/// A head whose output is multiplied by nothing goes first, whatever scores it, and with one head at a time another one may go
/// than at once.
#[test]
fn heads_that_do_nothing_go_first() {
    let size = Size { heads: 4, ..SIZE };
    let mut whole = model(Config::glm(size, VOCABULARY), &cpu(), 2);
    let site = Site::of(&whole.config, Kind::Heads)[1];
    for head in [0, 2] {
        whole = scaled(&whole, &site, head, 0.0);
    }
    let micros = [batch(&whole, 7)];
    for score in [Score::Gate, Score::Weights] {
        let heads = Heads { keep: 3, score, per_round: Some(1), ..heads(3) };
        let keep = shrink(&whole, &micros, &Plan { rounds: 1, ..plan(Some(heads), None) }).unwrap();
        let kept = |block: usize| keep.blocks[block].attention.as_ref().unwrap().heads.clone();
        assert_eq!((kept(0), kept(1)), ((0..4).collect(), vec![1, 3]));
    }
}

/// Against the model before pruning the first round goes by entropy and the later ones by what pruning changed.
#[test]
fn comparing_with_the_dense_model_needs_no_label() {
    let size = Size { heads: 4, ..SIZE };
    let whole = model(Config::glm(size, VOCABULARY), &cpu(), 2);
    let mut micro = batch(&whole, 7);
    for objective in [Objective::Entropy, Objective::DenseKl, Objective::DenseMse] {
        let plan = Plan { objective, ..plan(Some(heads(2)), Some(neurons(4))) };
        let keep = shrink(&whole, std::slice::from_ref(&micro), &plan).unwrap();
        let labels = micro.targets.to_vec::<u32>().unwrap();
        let others: Vec<u32> = labels.iter().map(|&l| if l < 30 { l + 1 } else { l }).collect();
        micro.targets = Tensor::from_slice(whole.device(), &[others.len()], &others).unwrap();
        assert_eq!(shrink(&whole, std::slice::from_ref(&micro), &plan).unwrap(), keep, "labels are not looked at");
        assert_eq!(counts(&keep, &whole.config).0.iter().sum::<usize>(), 4);
    }
    // The first round in which one goes is late; until then there is nothing that could be compared.
    let late = |objective, rounds| {
        let heads = Heads { even: true, ..heads(3) };
        let plan = Plan { objective, rounds, progress: Progress::Cubic, ..plan(Some(heads), None) };
        shrink(&whole, std::slice::from_ref(&micro), &plan).unwrap()
    };
    let by_entropy = late(Objective::Entropy, 1);
    let lowest: Vec<usize> = (0..3).collect();
    assert!(by_entropy.blocks.iter().any(|b| b.attention.as_ref().unwrap().heads != lowest));
    assert_eq!(late(Objective::DenseKl, 16), by_entropy);
    let judge = Judge { objective: Objective::DenseKl, dense: None };
    assert!(judge.backward(Pass::training(&whole), &micro).is_err());
}

#[test]
fn numbers_that_a_model_does_not_have_are_refused() {
    let whole = model(Config::glm(SIZE, VOCABULARY), &cpu(), 2);
    let micros = [batch(&whole, 7)];
    for (plan, parameter) in [
        (plan(Some(heads(0)), None), "keep"),
        (plan(Some(heads(3)), None), "keep"),
        (plan(Some(Heads { floor: 2, ..heads(1) }), None), "floor"),
        (plan(None, Some(neurons(6))), "keep"),
        (plan(None, Some(Neurons { multiple_of: 0, ..neurons(4) })), "keep"),
    ] {
        let error = shrink(&whole, &micros, &plan).unwrap_err().to_string();
        assert!(error.contains(parameter), "{error}");
    }
}

#[test]
fn blocks_are_chosen_by_their_method() {
    let size = Size { layers: 6, ..SIZE };
    let mut whole = model(Config::gpt(size, VOCABULARY), &cpu(), 2);
    // Block 4 adds nothing.
    for part in ["attention.output.weight", "attention.output.bias", "ffn.out.weight", "ffn.out.bias"] {
        let name = format!("blocks.4.{part}");
        let zeros = Tensor::zeros(whole.device(), whole.get(&name).unwrap().meta()).unwrap();
        whole.tensors.insert(name, zeros);
    }
    let micros = [batch(&whole, 7)];
    let choose = |method: LayersMethod, count| method.choose(&whole, count, &micros).unwrap();
    assert_eq!(choose(LayersMethod::Top, 4), [0, 1, 2, 3]);
    assert_eq!(choose(LayersMethod::EveryOther, 3), [0, 2, 4]);
    assert_eq!(choose(LayersMethod::EveryOther, 4), [0, 1, 3, 4]);
    assert_eq!(choose(LayersMethod::Subset(vec![1, 5]), 2), [1, 5]);
    assert_eq!(choose(LayersMethod::Importance, 6), [0, 1, 2, 3, 4, 5]);
    assert_eq!(choose(LayersMethod::Importance, 5).len(), 5);
}
