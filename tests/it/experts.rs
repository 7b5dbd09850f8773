//! Experts: what a split may not change, what routers and thresholds do, and what is refused.

use std::sync::{Arc, LazyLock};

use espalier::compress::experts::{
    BlockReport, Drop, Loss, Router, Saliency, Settings, Split, convert, difference_with_all_experts, drop, relu,
    report, router,
};
use espalier::compress::freeze::{Form, freeze};
use espalier::compress::quantization::Format;
use espalier::device::{self, Device};
use espalier::error::Error;
use espalier::nn::config::Size;
use espalier::nn::{Activation, Batch, Config, Model, Pass};
use espalier::report::bench::quantile;
use espalier::rng::Stream;
use espalier::tape::Var;
use espalier::tensor::Tensor;
use espalier::train::store;

use crate::training::{options, tiny};

/// One device for all: tensors of two do not meet.
fn cpu() -> Arc<dyn Device> {
    static CPU: LazyLock<Arc<dyn Device>> = LazyLock::new(|| device::open("cpu").unwrap());
    CPU.clone()
}

const SIZE: Size = Size { layers: 2, heads: 2, head_size: 8, ffn_width: 64, max_positions: 16 };

fn oracle() -> Arc<dyn Device> {
    device::open("reference").unwrap()
}

fn settings() -> Settings {
    Settings { expert_size: 16, share: 0.5, router_steps: 20, router_rate: 0.01, seed: 3, ..Settings::default() }
}

fn config(activation: Activation) -> Config {
    let mut config = Config::gpt(SIZE, 40);
    config.blocks.iter_mut().for_each(|b| b.activation = activation);
    config
}

/// ReLU blocks whose neurons have biases, so that some are off.
fn model(device: &Arc<dyn Device>) -> Model {
    let mut model = Model::init(config(Activation::Relu), device, 5).unwrap();
    let mut stream = Stream::new(1, 0);
    for i in 0..SIZE.layers {
        let values: Vec<f64> = (0..SIZE.ffn_width).map(|_| 0.05 * stream.normal()).collect();
        let dtype = model.get(&format!("blocks.{i}.ffn.in.bias")).unwrap().dtype();
        let bias = Tensor::from_f64(device, &[SIZE.ffn_width], dtype, &values).unwrap();
        model.tensors.insert(format!("blocks.{i}.ffn.in.bias"), bias);
    }
    model
}

fn batches(device: &Arc<dyn Device>) -> Vec<Batch> {
    let batch = |seed: u64| {
        let mut stream = Stream::new(seed, 0);
        let tokens: Vec<u32> = (0..24).map(|_| stream.below(40) as u32).collect();
        let positions: Vec<u32> = (0..24).map(|i| i % 12).collect();
        Batch {
            tokens: Tensor::from_slice(device, &[2, 12], &tokens).unwrap(),
            positions: Tensor::from_slice(device, &[2, 12], &positions).unwrap(),
            block_positions: None,
            context: None,
            lengths: None,
            source: None,
        }
    };
    (0..3).map(batch).collect()
}

fn hidden(model: &Model, grouped: bool) -> Vec<f64> {
    let batch = &batches(model.device())[0];
    Pass::inference(model).grouped(grouped).hidden(batch).unwrap().tensor.to_f64().unwrap()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    let most = a.iter().fold(1e-30f64, |m, x| m.max(x.abs()));
    a.iter().zip(b).fold(0.0f64, |m, (a, b)| m.max((a - b).abs())) / most
}

/// `blocks[..].experts` of a model, changed.
fn with(model: &Model, change: impl Fn(&mut espalier::nn::Experts)) -> Model {
    let mut model = model.duplicate().unwrap();
    model.config.blocks.iter_mut().filter_map(|b| b.experts.as_mut()).for_each(change);
    model
}

#[test]
fn all_experts_are_the_dense_model_whatever_splits_and_routes_them() {
    for split in [Split::Clusters, Split::Random, Split::CoActivation] {
        for router in [Router::Mlp, Router::Similarity, Router::Oracle] {
            let dense = model(&cpu());
            let (converted, reports) =
                convert(&dense, Settings { split, router, ..settings() }, &batches(&cpu())).unwrap();
            let difference = difference_with_all_experts(&dense, &converted, &batches(&cpu())[0]).unwrap();
            assert!(difference < 1e-5, "{split:?} {router:?}: {difference}");
            let all = reports.iter().all(|r| r.captured <= r.captured_by_oracle + 1e-12 && r.captured > 0.3);
            assert!(all && reports.len() == 2, "{reports:?}");
            if router == Router::Oracle {
                assert!(reports.iter().all(|r| r.captured_by_oracle - r.captured < 1e-6), "{reports:?}");
            }
        }
    }
}

/// Oracle line of MoEfication: with ReLU, experts without positive activation can go.
#[test]
fn experts_without_positive_activation_change_nothing() {
    let all = Settings { share: 1.0, router: Router::Oracle, ..settings() };
    let (mut split, _) = convert(&model(&cpu()), all, &batches(&cpu())).unwrap();
    // Experts 1 and 3 of the first block never fire.
    let name = "blocks.0.ffn.experts.in.bias";
    let mut bias = split.values(name).unwrap();
    bias.chunks_mut(16).skip(1).step_by(2).for_each(|expert| expert.fill(-1e3));
    split.tensors.insert(name.into(), Tensor::from_slice(&cpu(), &[4, 16], &bias).unwrap());
    for (device, bound) in [(cpu(), 1e-6), (oracle(), 1e-13)] {
        let split = split.to_device(&device).unwrap();
        let want = hidden(&split, false);
        for grouped in [false, true] {
            let above = with(&split, |e| e.threshold = Some(0.0));
            assert!(distance(&want, &hidden(&above, grouped)) < bound, "{grouped}");
            let few = with(&above, |e| e.selected = 1);
            assert!(distance(&want, &hidden(&few, grouped)) > bound, "one expert is not enough");
        }
    }
    // The same experts, gone for good.
    let inputs = report::ffn_inputs(&split, &batches(&cpu())).unwrap();
    let mass = drop::saliencies(&split, 0, &inputs[0], Saliency::Mass).unwrap();
    let live: Vec<usize> = (0..4).filter(|&e| mass[e] > 0.0).collect();
    assert_eq!(live, [0, 2], "{mass:?}");
    let want = hidden(&split, false);
    drop::keep(&mut split, 0, &live).unwrap();
    assert_eq!(split.config.blocks[0].ffn_width, 32);
    assert!(distance(&want, &hidden(&split, false)) < 1e-6);
}

/// That all experts are the dense FFN is a promise of the split; what a threshold leaves out is not part of it.
#[test]
fn all_experts_are_the_dense_ffn_whatever_the_threshold() {
    let dense = model(&cpu());
    let own = Settings { router: Router::Oracle, threshold: Some(0.5), ..settings() };
    let (split, _) = convert(&dense, own, &batches(&cpu())).unwrap();
    let difference = difference_with_all_experts(&dense, &split, &batches(&cpu())[0]).unwrap();
    assert!(difference < 1e-5, "{difference}");
}

#[test]
fn a_threshold_executes_fewer_experts_and_says_how_many() {
    let (dense, batches) = (model(&cpu()), batches(&cpu()));
    let run = |threshold| -> Vec<BlockReport> {
        let own = Settings { router: Router::Oracle, share: 1.0, threshold, ..settings() };
        convert(&dense, own, &batches).unwrap().1
    };
    let (all, few) = (run(None), run(Some(0.5)));
    assert!(all.iter().all(|r| r.executed == 4.0));
    assert!(few.iter().all(|r| r.executed < 4.0), "{few:?}");
    assert!(few[0].note().contains("below the threshold"));
}

#[test]
fn a_split_is_a_function_of_its_seed() {
    for split in [Split::Clusters, Split::Random, Split::CoActivation] {
        let make = |seed| {
            let own = Settings { split, seed, ..settings() };
            let (model, _) = convert(&model(&cpu()), own, &batches(&cpu())).unwrap();
            model.tensors.values().map(|t| t.to_bytes().unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(make(3), make(3), "{split:?}");
        assert_eq!(split == Split::Random, make(3) != make(4), "{split:?}");
    }
}

#[test]
fn dead_neurons_and_one_expert_are_no_exceptions() {
    let mut dead = model(&cpu());
    for i in 0..SIZE.layers {
        let bias = Tensor::from_slice(&cpu(), &[64], &[-1e3f32; 64]).unwrap();
        dead.tensors.insert(format!("blocks.{i}.ffn.in.bias"), bias);
    }
    for split in [Split::Clusters, Split::Random, Split::CoActivation] {
        let (split, reports) = convert(&dead, Settings { split, ..settings() }, &batches(&cpu())).unwrap();
        assert!(reports.iter().all(|r| r.active == 0.0 && r.captured == 1.0), "{reports:?}");
        assert!(distance(&hidden(&dead, false), &hidden(&split, false)) < 1e-6);
        let mut split = split;
        let drop = Drop { share: 0.5, saliency: Saliency::Reap };
        let dropped = drop::drop_experts(&mut split, drop, &batches(&cpu())).unwrap();
        // Ties: the lower index stays.
        assert!(dropped.iter().all(|d| d.kept == [0, 1] && d.lost == 0.0), "{dropped:?}");
    }
    let (one, reports) = convert(&model(&cpu()), Settings { expert_size: 64, ..settings() }, &batches(&cpu())).unwrap();
    assert!(reports.iter().all(|r| (r.experts, r.selected, r.captured) == (1, 1, 1.0)));
    assert!(distance(&hidden(&model(&cpu()), false), &hidden(&one, false)) < 1e-5);
}

#[test]
fn what_cannot_be_split_is_refused_with_the_reason() {
    let refused = |activation, settings: Settings| match convert(
        &Model::init(config(activation), &cpu(), 1).unwrap(),
        settings,
        &batches(&cpu()),
    ) {
        Err(Error::Recipe { allowed, .. }) => allowed,
        _ => panic!("{activation:?} {settings:?}"),
    };
    assert!(refused(Activation::Gelu, settings()).contains("[experts.training]"));
    assert!(refused(Activation::Geglu, settings()).contains("never exactly 0"));
    assert!(refused(Activation::Relu, Settings { expert_size: 24, ..settings() }).contains("divides 64"));
    assert!(refused(Activation::Relu, Settings { share: 0.0, ..settings() }).contains("above 0"));
    let distances = Settings { router: Router::Similarity, threshold: Some(0.1), ..settings() };
    assert!(refused(Activation::Relu, distances).contains("distances"));
    assert!(convert(&model(&cpu()), settings(), &[]).is_err());
    assert!(relu::convert(&mut Model::init(config(Activation::Geglu), &cpu(), 1).unwrap()).is_err());
    let mut gelu = Model::init(config(Activation::Gelu), &cpu(), 1).unwrap();
    assert_eq!(relu::convert(&mut gelu).unwrap(), [0, 1]);
    assert!(convert(&gelu, settings(), &batches(&cpu())).is_ok());
}

#[test]
fn few_tokens_read_their_experts_where_they_lie_with_the_same_result() {
    let (split, _) = convert(&model(&cpu()), settings(), &batches(&cpu())).unwrap();
    let int8 = freeze(&split, Form { sparse: false, quantized: Some(Format::default()) }).unwrap();
    for model in [&split, &int8, &with(&split, |e| e.threshold = Some(0.4)), &with(&int8, |e| e.threshold = Some(0.4))]
    {
        assert!(Pass::gathers_tokens(model, 0, 24));
        assert!(distance(&hidden(model, true), &hidden(model, false)) < 1e-5);
    }
    // Weight-only experts are unpacked for the sorted kernels.
    let groups =
        Format { activations: espalier::compress::quantization::Activations::Float, group: 16, ..Format::default() };
    let packed = freeze(&split, Form { sparse: false, quantized: Some(groups) }).unwrap();
    assert!(!Pass::gathers_tokens(&packed, 0, 1));
    assert!(distance(&hidden(&split, true), &hidden(&packed, false)) < 0.1);
}

#[test]
fn every_form_is_saved_and_reloaded_with_the_same_result() {
    for router in [Router::Mlp, Router::Similarity, Router::Oracle] {
        let own = Settings { router, threshold: (router != Router::Similarity).then_some(0.1), ..settings() };
        let (mut split, _) = convert(&model(&cpu()), own, &batches(&cpu())).unwrap();
        drop::drop_experts(&mut split, Drop { share: 0.25, saliency: Saliency::Usage }, &batches(&cpu())).unwrap();
        let before = split.total_bytes();
        let files = store::model_files(&split).unwrap();
        let files = files.into_iter().map(|(name, bytes)| (name.to_string(), bytes)).collect();
        let again = store::model_from(std::path::Path::new("memory"), &files, &cpu()).unwrap();
        assert_eq!(hidden(&split, false), hidden(&again, false), "{router:?}");
        assert_eq!(again.config.blocks[0].experts.unwrap().count, 3);
        let whole = convert(&model(&cpu()), own, &batches(&cpu())).unwrap().0;
        assert!(before < whole.total_bytes());
        // Half of the experts, but an oracle reads every row of the in-projection.
        let halves = if router == Router::Oracle { 3 } else { 2 };
        let experts = whole.tensors.iter().filter(|(n, _)| n.contains(".ffn.experts.") && n.ends_with(".weight"));
        let dense: usize = experts.map(|(_, t)| t.meta().bytes()).sum();
        let all = with(&whole, |e| e.selected = e.count).activated_bytes();
        let spared = all - whole.activated_bytes();
        let biases = if router == Router::Oracle { 0 } else { SIZE.layers * SIZE.ffn_width * 4 / 2 };
        assert_eq!(spared, dense - dense * halves / 4 + biases, "{router:?}");
    }
}

/// MoEfication's rule: the router's ranking of x / |x| by its distance to the centres.
#[test]
fn similarity_ranks_by_distance() {
    let (split, _) =
        convert(&model(&cpu()), Settings { router: Router::Similarity, ..settings() }, &batches(&cpu())).unwrap();
    let mut stream = Stream::new(2, 0);
    let x: Vec<f32> = (0..5 * 16).map(|_| stream.normal() as f32).collect();
    let rows = Var::constant(Tensor::from_slice(&cpu(), &[5, 16], &x).unwrap());
    let scores = Pass::inference(&split).router(0, &rows).unwrap().tensor.to_f64().unwrap();
    let centres = split.values("blocks.0.ffn.router.centre.weight").unwrap();
    for (x, scores) in x.chunks(16).zip(scores.chunks(4)) {
        let length = x.iter().map(|v| v * v).sum::<f32>().sqrt();
        let distance = |c: &[f32]| -> f32 { x.iter().zip(c).map(|(x, c)| (x / length - c).powi(2)).sum() };
        let distances: Vec<f32> = centres.chunks(16).map(distance).collect();
        for (a, b) in (0..4).flat_map(|a| (0..4).map(move |b| (a, b))) {
            let nearer = distances[a] < distances[b] - 1e-5;
            assert!(!nearer || scores[a] > scores[b], "{distances:?} {scores:?}");
        }
    }
}

#[test]
fn slopes_of_the_cross_entropy_are_those_of_differences() {
    let device = oracle();
    let mut stream = Stream::new(4, 0);
    let z: Vec<f64> = (0..12).map(|_| 2.0 * stream.normal()).collect();
    let s: Vec<f64> = (0..12).map(|_| stream.uniform()).collect();
    let loss = |z: &[f64]| -> f64 {
        let one = |(z, s): (&f64, &f64)| (1.0 + z.exp()).ln() - s * z;
        z.iter().zip(&s).map(one).sum::<f64>() / 12.0
    };
    let tensor = |v: &[f64]| Tensor::from_f64(&device, &[3, 4], espalier::dtype::DType::F32, v).unwrap();
    let slope = router::slope(&tensor(&z), &tensor(&s)).unwrap().to_f64().unwrap();
    for i in 0..12 {
        let step = 1e-5;
        let at =
            |by: f64| loss(&z.iter().enumerate().map(|(j, z)| if i == j { z + by } else { *z }).collect::<Vec<_>>());
        let difference = (at(step) - at(-step)) / (2.0 * step);
        assert!((difference - slope[i]).abs() < 1e-8, "{difference} {}", slope[i]);
    }
}

/// A router that learns captures at least nine tenths of what the oracle does, by either loss.
#[test]
fn learned_routers_come_near_the_oracle() {
    for loss in [Loss::Mse, Loss::Bce] {
        let own = Settings { loss, router_steps: 200, share: 0.25, ..settings() };
        let (_, reports) = convert(&model(&cpu()), own, &batches(&cpu())).unwrap();
        let mut shares: Vec<f64> = reports.iter().map(|r| r.captured / r.captured_by_oracle).collect();
        shares.sort_by(f64::total_cmp);
        assert!(quantile(&shares, 0.5).unwrap() > 0.85, "{loss:?} {reports:?}");
    }
}

#[test]
fn dropping_takes_the_least_salient() {
    for saliency in [Saliency::Reap, Saliency::Mass, Saliency::Usage] {
        let (mut split, _) = convert(&model(&cpu()), settings(), &batches(&cpu())).unwrap();
        let inputs = report::ffn_inputs(&split, &batches(&cpu())).unwrap();
        let before = drop::saliencies(&split, 0, &inputs[0], saliency).unwrap();
        let dropped = drop::drop_experts(&mut split, Drop { share: 0.5, saliency }, &batches(&cpu())).unwrap();
        let kept = &dropped[0].kept;
        let least = |stays: bool| (0..4).filter(move |e| kept.contains(e) == stays);
        let weakest = least(true).map(|e| before[e]).fold(f64::INFINITY, f64::min);
        assert!(least(false).all(|e| before[e] <= weakest), "{saliency:?} {before:?}");
        let share = Drop { share: 1.0, saliency };
        assert!(drop::drop_experts(&mut split, share, &batches(&cpu())).is_err());
    }
}

#[test]
fn a_tagger_with_gelu_is_converted_split_and_dropped_in_one_recipe() {
    let sets = [
        "model.family=tagger",
        "structure=false",
        "sparsify=false",
        "quantize=false",
        "hybrid=false",
        "experts.training={ steps = 4, batch = 8, learning_rate = 1e-3 }",
        "experts.split=co_activation",
        "experts.router_loss=bce",
        "experts.threshold=0.05",
        "experts.drop={ share = 0.25 }",
    ];
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let html = espalier::recipe::run(&tiny(&sets), &cpu(), &options(&out)).unwrap();
    let report = espalier::report::read(html.with_file_name("report.json")).unwrap();
    let stage = report.stages.last().unwrap();
    assert!(stage.name == "experts" && stage.invariants.iter().all(|i| i.ok), "{:?}", stage.invariants);
    let told = |part: &str| report.notes.iter().any(|note| note.contains(part));
    assert!(
        told("ReLU in place of GELU") && told("experts stay") && told("time of an FFN as experts"),
        "{:?}",
        report.notes
    );
    let model = store::load_model(&out.join("model"), &cpu()).unwrap();
    assert!(model.config.blocks.iter().all(|b| b.activation == Activation::Relu && b.ffn_width == 48));
}
