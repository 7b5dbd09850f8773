//! Training in stages beside the same kernels on one core, interleaved in one run; predicted beside measured step times.
//! `cargo bench --bench pipeline [ROUNDS]`. The machine must have two quiet cores.

use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier::Result;
use espalier::data::batch::{Batch, Example, GmaskPosition};
use espalier::data::tokenizer::SpecialIds;
use espalier::device::{self, Device};
use espalier::nn::config::Size;
use espalier::nn::{Config, Model};
use espalier::pipeline::executor::{Pipeline, Setup};
use espalier::pipeline::profile::Profile;
use espalier::pipeline::route::Route;
use espalier::pipeline::{Kind, Schedule, measure, simulate};
use espalier::recipe::corpus::upload;
use espalier::rng::Stream;
use espalier::tensor::Tensor;
use espalier::train::lifecycle::{Method, Micro};
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

fn staged(model: &Model, kind: Kind, count: usize, profile: &Profile) -> Result<Pipeline> {
    let schedule = Schedule::new(kind, 2, count)?;
    let cuts = profile.cuts(&schedule)?;
    let route = Arc::new(Route::new(&model.config, &schedule, cuts, vec![1; 2])?);
    let devices = [device::open("cpu:1")?, device::open("cpu:1")?].to_vec();
    let long = Duration::from_secs(60);
    Pipeline::start(
        model,
        Setup {
            route,
            kind: None,
            devices,
            optimizer: settings(),
            methods: Arc::new(|_: &Model| Ok(Vec::<Box<dyn Method>>::new())),
            recompute: false,
            heartbeat: long,
            deadline: long,
            slow: long,
            run: "bench".into(),
            record: std::env::temp_dir().join("espalier-bench-flight-recorder.jsonl"),
            planted: Vec::new(),
        },
    )
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
    let profile = measure::profile(&model, &probe[0], settings())?;
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
            let mut pipeline = staged(&model, kind, count, &profile)?;
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
    Ok(())
}
