//! Training in stages beside the same kernels on one core, interleaved in one run; predicted beside measured step times.
//! `cargo bench --bench pipeline [ROUNDS]`. The machine must have two quiet cores.

use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier::Result;
use espalier::compress::distillation::{Distillation, Projection, Weights};
use espalier::data::batch::{Batch, Example, GmaskPosition, IGNORE};
use espalier::data::tokenizer::SpecialIds;
use espalier::device::{self, Device};
use espalier::nn::config::Size;
use espalier::nn::{Config, Model};
use espalier::ops::distill::Reduction;
use espalier::pipeline::executor::{Pipeline, Setup, TeacherSetup};
use espalier::pipeline::profile::Profile;
use espalier::pipeline::route::Route;
use espalier::pipeline::{Kind, Schedule, cut, measure, simulate};
use espalier::recipe::corpus::upload;
use espalier::rng::Stream;
use espalier::tensor::Tensor;
use espalier::train::lifecycle::{Method, Micro, Teacher};
use espalier::train::optimizer::{Optimizer, Settings};
use espalier::train::precision::Precision;
use espalier::train::schedule;
use espalier::train::trainer::step;

const VOCABULARY: usize = 2048;
const SIZE: Size = Size { layers: 6, heads: 4, head_size: 64, ffn_width: 1024, max_positions: 128 };
const SPECIAL: SpecialIds = SpecialIds { pad: 0, unk: 1, bos: 2, eos: 3, gmask: 4 };

fn main() {
    let rounds = std::env::args().find_map(|a| a.parse().ok()).unwrap_or(7);
    if let Err(e) = compare(rounds) {
        eprintln!("error: {e}");
        std::process::exit(1);
    }
}

fn settings() -> Settings {
    let schedule = schedule::Schedule { peak: 1e-3, warmup: 1, shape: schedule::Shape::Constant };
    Settings { schedule, rule: Default::default(), weight_decay: 0.01, clip: 1.0, precision: Precision::F32 }
}

/// Micro-batches of 2 examples of 128 tokens.
fn micros(device: &Arc<dyn Device>, count: usize) -> Result<Vec<Micro>> {
    let mut stream = Stream::new(5, 0);
    let mut tokens = |n: usize| -> Vec<u32> { (0..n).map(|_| 5 + stream.below(VOCABULARY - 5) as u32).collect() };
    let mut make = || {
        let examples = [(); 2].map(|()| Example { context: tokens(64), labels: tokens(64) });
        let batch = Batch::assemble(&examples.iter().collect::<Vec<_>>(), SPECIAL, GmaskPosition::MaskIndex);
        let n = batch.targets.len();
        Ok(Micro {
            batch: upload(device, &batch)?,
            targets: Tensor::from_slice(device, &[n], &batch.targets)?,
            weights: Tensor::from_slice(device, &[n], &vec![1.0f32; n])?,
            weight: batch.token_count as f64,
            gold: true,
            tokens: batch.token_count,
            teacher: None,
        })
    };
    (0..count).map(|_| make()).collect()
}

fn staged(model: &Model, kind: Kind, count: usize, profile: &Profile, teacher: Option<&Model>) -> Result<Pipeline> {
    let schedule = Schedule::new(kind, 2, count)?;
    let cuts = profile.cuts(&schedule)?;
    let route = Arc::new(Route::new(&model.config, &schedule, cuts, vec![1; 2])?);
    let devices = [device::open("cpu:1")?, device::open("cpu:1")?].to_vec();
    let distillation = teacher.map(|t| t.get("head.weight").cloned()).transpose()?.map(|teacher_head| Distillation {
        weights: Weights { hidden: 1.0, soft: 0.0, hard: 0.0 },
        temperature: 1.0,
        squared: false,
        reduction: Reduction::Mean,
        normalised: false,
        projection: Projection::None,
        teacher_head,
    });
    let long = Duration::from_secs(60);
    Pipeline::start(
        model,
        Setup {
            route,
            kind: None,
            devices,
            optimizer: settings(),
            methods: Arc::new(move |part: &Model| {
                let head = part.tensors.contains_key("head.weight");
                let hidden = distillation.as_ref().filter(|_| head).map(|d| d.on(part.device())).transpose()?;
                Ok(hidden.into_iter().map(|d| Box::new(d) as Box<dyn Method>).collect())
            }),
            teacher: teacher.map(|t| TeacherSetup {
                model: Arc::new(t.clone()),
                cuts: cut::teacher(&t.config, 2),
                hard: false,
            }),
            direct: None,
            recompute: false,
            heartbeat: long,
            deadline: long,
            slow: long,
            run: "bench".into(),
            record: std::env::temp_dir().join("espalier-bench-flight-recorder.jsonl"),
            planted: Vec::new(),
            timed: None,
        },
    )
}

/// With the other core as busy as it will be.
fn measured(model: &Model, probe: &Micro) -> Result<Profile> {
    measure::profile(model, model.device(), probe, settings(), &|_| Ok(Vec::new()), &[device::open("cpu:1")?])
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn compare(rounds: usize) -> Result<()> {
    let home = device::open("cpu:1")?;
    let model = Model::init(Config::glm(SIZE, VOCABULARY), &home, 1)?;
    let probe = micros(&home, 1)?;
    let profile = measured(&model, &probe[0])?;
    println!("{}: {}, 2 x 128 tokens a micro-batch, 2 stages on one core each", home.info().name, profile.model);
    println!(
        "{:<24} {:>12} {:>12} {:>12} {:>10} {:>10}",
        "schedule, micro-batches", "one core ms", "staged ms", "predicted ms", "speed-up", "off by"
    );
    for count in [4, 8] {
        let batch = micros(&home, count)?;
        let mut alone = model.duplicate()?;
        let mut optimizer = Optimizer::new(&mut alone, settings(), |_| true)?;
        for kind in [
            Kind::GPipe,
            Kind::OneForwardOneBackward,
            Kind::Interleaved { chunks: 2 },
            Kind::ZeroBubbleH1,
            Kind::ZeroBubbleV,
        ] {
            // Predicted just before it is run, as a recipe does: the machine's clock drifts by some per cent in a minute.
            let profile = measured(&model, &probe[0])?;
            let mut pipeline = staged(&model, kind, count, &profile, None)?;
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            for round in 0..=rounds {
                let began = Instant::now();
                step(&alone, &mut optimizer, &batch, &[], (0.0, 1, 1000))?;
                let one = began.elapsed().as_secs_f64();
                let many = pipeline.step(&batch, &[], (0.0, 1, 1000))?.seconds;
                if round > 0 {
                    ours.push(many);
                    theirs.push(one);
                }
            }
            let route = &pipeline.setup().route;
            let costs = profile.costs(&route.cuts, &route.schedule);
            let predicted = simulate(&route.schedule, &costs)?.seconds;
            let (one, many) = (median(&theirs), median(&ours));
            println!(
                "{:<24} {:>12.1} {:>12.1} {:>12.1} {:>9.2}x {:>9.1}%",
                format!("{kind}, {count}"),
                1e3 * one,
                1e3 * many,
                1e3 * predicted,
                one / many,
                100.0 * (predicted / many - 1.0)
            );
        }
    }
    println!();
    println!("{:<24} {:>14} {:>12} {:>10}", "teacher beside student", "lock-step ms", "ahead ms", "speed-up");
    for count in [2, 4, 8] {
        let batch: Vec<Micro> = micros(&home, count)?.into_iter().map(|m| taught(&home, m)).collect::<Result<_>>()?;
        let (kind, settings) = (Kind::OneForwardOneBackward, (0.0, 1, 1000));
        let mut ahead = staged(&model, kind, count, &profile, Some(&model))?;
        let mut locked = staged(&model, kind, count, &profile, Some(&model))?;
        ahead.teach(&batch)?;
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 0..=rounds {
            let began = Instant::now();
            locked.teach(&batch)?;
            let one = locked.step(&batch, &[], settings)?.loss;
            let waited = began.elapsed().as_secs_f64();
            let report = ahead.step(&batch, &batch, settings)?;
            assert!(one == report.loss, "the losses differ: {one} and {}", report.loss);
            if round > 0 {
                ours.push(report.seconds);
                theirs.push(waited);
            }
        }
        let (one, many) = (median(&theirs), median(&ours));
        println!("{:<24} {:>14.1} {:>12.1} {:>9.2}x", format!("1f1b, {count}"), 1e3 * one, 1e3 * many, one / many);
    }
    Ok(())
}

/// A micro-batch that waits for a teacher's states.
fn taught(device: &Arc<dyn Device>, micro: Micro) -> Result<Micro> {
    let n = micro.targets.count();
    let teacher = Teacher {
        hidden: Tensor::from_slice(device, &[1], &[0.0f32])?,
        hidden_weights: micro.weights.clone(),
        soft_weights: micro.weights.clone(),
        hard_targets: Tensor::from_slice(device, &[n], &vec![IGNORE; n])?,
        hard_weights: micro.weights.clone(),
        top: None,
    };
    Ok(Micro { teacher: Some(teacher), ..micro })
}
