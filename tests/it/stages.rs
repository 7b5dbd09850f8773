//! Models in stages: the same gradients as in one piece, a teacher beside the student, what is measured of them.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use espalier::DType;
use espalier::compress::distillation::predictions;
use espalier::compress::distillation::{Distillation, Projection, Weights};
use espalier::data::batch::IGNORE;
use espalier::device::{self, Device};
use espalier::dispatch;
use espalier::nn::config::Size;
use espalier::nn::pieces;
use espalier::nn::{Config, Model, Pass};
use espalier::ops::distill::Reduction;
use espalier::ops::unary::Cast;
use espalier::pipeline::executor::{Pipeline, Setup, StepReport, TeacherSetup};
use espalier::pipeline::route::Route;
use espalier::pipeline::simulate::Activity;
use espalier::pipeline::{Kind, Schedule, cut, measure, trace};
use espalier::report::gantt;
use espalier::tape::Var;
use espalier::tensor::Tensor;
use espalier::train::lifecycle::{Method, Micro, Teacher};
use espalier::train::optimizer::{Optimizer, Settings};
use espalier::train::precision::Precision;
use espalier::train::trainer::{step, sum};

use crate::model::{assemble, cpu, examples, micro, settings};

pub const SIZE: Size = Size { layers: 6, heads: 2, head_size: 8, ffn_width: 32, max_positions: 32 };
pub const VOCABULARY: usize = 37;
pub const STEPS: u64 = 3;

/// A micro-batch of each of these numbers of examples.
pub fn micros(device: &Arc<dyn Device>, rows: &[usize], labels: Option<u32>) -> Vec<Micro> {
    let make = |(i, &count): (usize, &usize)| {
        let mut micro = micro(device, &assemble(&examples(count, 20 + i as u64)));
        if let Some(labels) = labels {
            // A tagger's targets are labels of every token.
            let targets: Vec<u32> = micro.batch.tokens.to_vec::<u32>().unwrap().iter().map(|t| t % labels).collect();
            micro.targets = Tensor::from_slice(device, &[targets.len()], &targets).unwrap();
            micro.weights = Tensor::from_slice(device, &[targets.len()], &vec![1.0f32; targets.len()]).unwrap();
            (micro.weight, micro.tokens) = (targets.len() as f64, targets.len());
        }
        micro
    };
    rows.iter().enumerate().map(make).collect()
}

/// So small a norm is exceeded by every step: all updates depend on the norm of all stages.
fn clipping() -> Settings {
    Settings { clip: 0.05, ..settings(1e-2) }
}

pub fn setup(
    config: &Config,
    (kind, stages, micros): (Kind, usize, usize),
    replicas: Vec<usize>,
    folder: &Path,
) -> Setup {
    let schedule = Schedule::new(kind, stages, micros).unwrap();
    let cuts = cut::even(pieces::pieces(config), schedule.chunks());
    let route = Arc::new(Route::new(config, &schedule, cuts, replicas).unwrap());
    let devices = route.workers.iter().map(|_| device::open("cpu:1").unwrap()).collect();
    Setup {
        route,
        kind: None,
        devices,
        optimizer: clipping(),
        methods: Arc::new(|_: &Model| Ok(Vec::<Box<dyn Method>>::new())),
        teacher: None,
        direct: None,
        recompute: false,
        heartbeat: Duration::from_secs(5),
        deadline: Duration::from_secs(20),
        slow: Duration::from_secs(20),
        run: "test".into(),
        record: folder.join("flight-recorder.jsonl"),
        planted: Vec::new(),
        timed: None,
    }
}

/// Losses and norms of each step, and the model after the last.
pub type Trained = (Vec<(f64, f64)>, Model);

fn in_one_piece(config: &Config, rows: &[usize], labels: Option<u32>, dropout: f32) -> Trained {
    let device = cpu();
    let mut model = Model::init(config.clone(), &device, 3).unwrap();
    let mut optimizer = Optimizer::new(&mut model, clipping(), |_| true).unwrap();
    let micros = micros(&device, rows, labels);
    let run = |_| step(&model, &mut optimizer, &micros, &[], (dropout, 1, STEPS)).unwrap();
    let losses = (0..STEPS).map(run).collect();
    (losses, model)
}

pub fn in_stages(config: &Config, setup: Setup, rows: &[usize], labels: Option<u32>, dropout: f32) -> Trained {
    let device = cpu();
    let mut model = Model::init(config.clone(), &device, 3).unwrap();
    let micros = micros(&device, rows, labels);
    let mut pipeline = Pipeline::start(&model, setup).unwrap();
    let run = |_| {
        let report = pipeline.step(&micros, &[], (dropout, 1, STEPS)).unwrap();
        (report.loss, report.norm)
    };
    let losses = (0..STEPS).map(run).collect();
    pipeline.collect(&mut model).unwrap();
    (losses, model)
}

pub fn assert_equal_bits((losses, want): &Trained, (others, have): &Trained, case: &str) {
    for (want, have) in losses.iter().zip(others) {
        assert!(want == have, "{case}: loss and norm {have:?} where {want:?} are right");
    }
    for (name, tensor) in &want.tensors {
        assert!(tensor.to_bytes().unwrap() == have.get(name).unwrap().to_bytes().unwrap(), "{case}: {name} differs");
    }
}

/// After a few steps of Adam a rounding may have become a share of a step: the losses, which see all weights, must agree.
fn assert_close((want, _): &Trained, (have, _): &Trained, case: &str) {
    for ((want, want_norm), (have, norm)) in want.iter().zip(have) {
        assert!((want - have).abs() <= 2e-5 * want.abs(), "{case}: loss {have} where {want} is right");
        assert!((want_norm - norm).abs() <= 1e-4 * want_norm.abs(), "{case}: norm {norm} where {want_norm} is right");
    }
}

fn tagger() -> (Config, Option<u32>) {
    let labels = ["O", "B", "I"].map(String::from).to_vec();
    (Config::bert_tagger(SIZE, VOCABULARY, labels), Some(3))
}

#[test]
fn every_schedule_trains_as_one_piece_does() {
    let folder = tempfile::tempdir().unwrap();
    for (config, labels) in [(Config::glm(SIZE, VOCABULARY), None), tagger()] {
        for (rows, dropout) in [(&[3usize][..], 0.1), (&[3, 1, 2], 0.0), (&[2, 3, 1, 4, 1], 0.1)] {
            let want = in_one_piece(&config, rows, labels, dropout);
            for kind in Kind::ALL {
                for stages in 1..=4 {
                    let case = format!("{kind}, {stages} stages, {} micro-batches", rows.len());
                    let setup = setup(&config, (kind, stages, rows.len()), vec![1; stages], folder.path());
                    let split = setup.route.schedule.splits_backward();
                    let have = in_stages(&config, setup, rows, labels, dropout);
                    // The order of sums is that of one piece, but for FFNs whose backward is taken apart.
                    if !split {
                        assert_equal_bits(&want, &have, &case);
                    }
                    assert_close(&want, &have, &case);
                }
            }
        }
    }
}

/// Two queues of one adapter beside a CPU: the losses of one device, to the tolerance of their kernels.
#[test]
fn devices_of_different_kinds_work_together() {
    let folder = tempfile::tempdir().unwrap();
    let (config, rows) = (Config::glm(SIZE, VOCABULARY), [2, 1, 2, 1]);
    let want = in_one_piece(&config, &rows, None, 0.1);
    let made = setup(&config, (Kind::OneForwardOneBackward, 3, rows.len()), vec![1; 3], folder.path());
    let devices = ["wgpu:0", "cpu:1", "wgpu:0"].map(|name| device::open(name).unwrap()).to_vec();
    let long = Duration::from_secs(60);
    let times = Setup { heartbeat: long, deadline: long, slow: long, ..made };
    let have = in_stages(&config, Setup { devices, timed: Some(2), ..times }, &rows, None, 0.1);
    for ((want, _), (have, _)) in want.0.iter().zip(&have.0) {
        assert!((want - have).abs() <= 1e-3 * want.abs(), "loss {have} where {want} is right");
    }
}

#[test]
fn replicas_and_recomputation_change_nothing_but_the_order_of_sums() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::glm(SIZE, VOCABULARY);
    let rows = [2, 3, 1, 4, 1];
    let want = in_one_piece(&config, &rows, None, 0.1);
    let made = |replicas: Vec<usize>| {
        setup(&config, (Kind::OneForwardOneBackward, replicas.len(), rows.len()), replicas, folder.path())
    };
    let recomputed = Setup { recompute: true, ..made(vec![1, 1]) };
    assert_equal_bits(&want, &in_stages(&config, recomputed, &rows, None, 0.1), "recomputed");
    for replicas in [vec![2], vec![1, 2], vec![2, 1, 3]] {
        let case = format!("replicas {replicas:?}");
        assert_close(&want, &in_stages(&config, made(replicas), &rows, None, 0.1), &case);
    }
}

/// A step with fewer micro-batches than a stage has replicas leaves some of them without gradients of their own.
#[test]
fn replicas_without_work_stay_equal_to_the_others() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::glm(SIZE, VOCABULARY);
    let device = cpu();
    let steps: Vec<Vec<Micro>> =
        [&[2usize, 3, 1, 4, 1][..], &[2], &[1, 2, 3, 1, 2]].map(|r| micros(&device, r, None)).into();
    let mut model = Model::init(config.clone(), &device, 3).unwrap();
    let mut optimizer = Optimizer::new(&mut model, clipping(), |_| true).unwrap();
    let whole = |m: &Vec<Micro>| step(&model, &mut optimizer, m, &[], (0.0, 1, STEPS)).unwrap();
    let want = (steps.iter().map(whole).collect(), model);
    let mut setup = setup(&config, (Kind::OneForwardOneBackward, 2, 5), vec![1, 3], folder.path());
    setup.kind = Some(Kind::OneForwardOneBackward);
    let mut model = Model::init(config.clone(), &device, 3).unwrap();
    let mut pipeline = Pipeline::start(&model, setup).unwrap();
    let run = |m: &Vec<Micro>| {
        let report = pipeline.step(m, &[], (0.0, 1, STEPS)).unwrap();
        (report.loss, report.norm)
    };
    let losses = steps.iter().map(run).collect();
    pipeline.collect(&mut model).unwrap();
    assert_close(&want, &(losses, model), "5, 1 and 5 micro-batches on 1 and 3 workers");
}

/// The norm of all stages clips, and they share one loss scale.
#[test]
fn clipping_and_16_bits_go_over_all_stages() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::glm(SIZE, VOCABULARY);
    let device = cpu();
    let rows = [2, 3, 1];
    for precision in [Precision::F32, Precision::Bf16, Precision::F16] {
        let settings = Settings { precision, ..clipping() };
        let mut model = Model::init(config.clone(), &device, 3).unwrap();
        let mut optimizer = Optimizer::new(&mut model, settings, |_| true).unwrap();
        let micros = micros(&device, &rows, None);
        let run = |_| step(&model, &mut optimizer, &micros, &[], (0.1, 1, STEPS)).unwrap();
        let want = ((0..STEPS).map(run).collect(), model);
        let mut setup = setup(&config, (Kind::OneForwardOneBackward, 3, 3), vec![1; 3], folder.path());
        setup.optimizer = settings;
        assert_close(&want, &in_stages(&config, setup, &rows, None, 0.1), precision_name(precision));
    }
}

fn precision_name(precision: Precision) -> &'static str {
    precision.compute().map_or("f32", |t| t.name())
}

#[test]
fn state_goes_over_to_another_number_of_stages() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::glm(SIZE, VOCABULARY);
    let rows = [2, 3, 1];
    let want = in_one_piece(&config, &rows, None, 0.0);
    let device = cpu();
    let mut model = Model::init(config.clone(), &device, 3).unwrap();
    let micros = micros(&device, &rows, None);
    let mut state = None;
    for (done, stages) in [3, 1, 4].into_iter().enumerate() {
        let setup = setup(&config, (Kind::OneForwardOneBackward, stages, rows.len()), vec![1; stages], folder.path());
        let mut pipeline = Pipeline::start(&model, setup).unwrap();
        if let Some(state) = &state {
            pipeline.restore(state, done as u64).unwrap();
        }
        pipeline.step(&micros, &[], (0.0, 1, STEPS)).unwrap();
        pipeline.collect(&mut model).unwrap();
        state = Some(pipeline.state(&device).unwrap());
    }
    assert_equal_bits(&want, &(Vec::new(), model), "3, 1 and 4 stages");
}

/// A teacher, the steps that its student takes, and how the student learns from it.
pub struct Lesson {
    teacher: Model,
    pub steps: Vec<Vec<Micro>>,
    distillation: Distillation,
}

/// Micro-batches of each of these numbers of examples in every step.
pub fn lesson(device: &Arc<dyn Device>, rows: &[usize]) -> Lesson {
    let teacher = Model::init(Config::glm(Size { layers: 4, ..SIZE }, VOCABULARY), device, 9).unwrap();
    let steps = (0..STEPS)
        .map(|step| {
            let mut all = micros(device, rows, None);
            for (i, micro) in all.iter_mut().enumerate() {
                let n = micro.targets.count();
                // Another step has other tokens.
                let tokens: Vec<u32> = micro.batch.tokens.to_vec::<u32>().unwrap();
                let tokens: Vec<u32> = tokens.iter().map(|t| (t * 7 + step as u32 + i as u32) % 37).collect();
                micro.batch.tokens.upload(&tokens).unwrap();
                micro.teacher = Some(Teacher {
                    hidden: Tensor::from_slice(device, &[1], &[f32::NAN]).unwrap(),
                    hidden_weights: micro.weights.clone(),
                    soft_weights: micro.weights.clone(),
                    hard_targets: Tensor::from_slice(device, &[n], &vec![IGNORE; n]).unwrap(),
                    hard_weights: micro.weights.clone(),
                    top: None,
                });
            }
            all
        })
        .collect();
    let distillation = Distillation {
        weights: Weights { hidden: 0.5, soft: 0.5, hard: 0.5 },
        temperature: 2.0,
        squared: true,
        reduction: Reduction::Mean,
        normalised: false,
        projection: Projection::None,
        teacher_head: teacher.get("head.weight").unwrap().clone(),
    };
    Lesson { teacher, steps, distillation }
}

impl Lesson {
    /// A micro-batch with what the teacher has to say of it.
    fn taught(&self, micro: &Micro) -> Micro {
        let device = micro.targets.device();
        let mut pass = Pass::inference(&self.teacher);
        let hidden = pass.hidden(&micro.batch).unwrap();
        let predicted = predictions(&mut pass, &hidden).unwrap();
        let n = predicted.len();
        // As the cache keeps them.
        let hidden = hidden.tensor.reshape(&[n, self.teacher.config.width]).unwrap();
        let hidden = dispatch::run_one(&Cast { to: DType::F16 }, &[&hidden]).unwrap();
        let hidden = dispatch::run_one(&Cast { to: DType::F32 }, &[&hidden]).unwrap();
        let hard_targets = Tensor::from_slice(device, &[n], &predicted).unwrap();
        Micro { teacher: Some(Teacher { hidden, hard_targets, ..micro.teacher.clone().unwrap() }), ..micro.clone() }
    }

    fn in_one_piece(&self, config: &Config) -> Trained {
        let mut model = Model::init(config.clone(), self.teacher.device(), 3).unwrap();
        let mut optimizer = Optimizer::new(&mut model, clipping(), |_| true).unwrap();
        let methods: Vec<Box<dyn Method>> = vec![Box::new(self.distillation.clone())];
        let run = |micros: &Vec<Micro>| {
            let micros: Vec<Micro> = micros.iter().map(|m| self.taught(m)).collect();
            step(&model, &mut optimizer, &micros, &methods, (0.0, 1, STEPS)).unwrap()
        };
        (self.steps.iter().map(run).collect(), model)
    }

    /// `setup` with the teacher in its stages.
    pub fn beside(&self, setup: Setup) -> Setup {
        let distillation = self.distillation.clone();
        let methods = move |part: &Model| {
            let mut methods = Vec::<Box<dyn Method>>::new();
            if part.tensors.contains_key("head.weight") {
                methods.push(Box::new(distillation.on(part.device())?));
            }
            Ok(methods)
        };
        let cuts = cut::teacher(&self.teacher.config, setup.route.replicas.len());
        let teacher = Some(TeacherSetup { model: Arc::new(self.teacher.clone()), cuts, hard: true });
        Setup { methods: Arc::new(methods), teacher, ..setup }
    }

    fn in_stages(&self, config: &Config, setup: Setup) -> (Trained, Vec<StepReport>) {
        let mut student = Model::init(config.clone(), self.teacher.device(), 3).unwrap();
        let mut pipeline = Pipeline::start(&student, self.beside(setup)).unwrap();
        pipeline.teach(&self.steps[0]).unwrap();
        let next = |i: usize| self.steps.get(i + 1).map_or(&[][..], |m| m.as_slice());
        let run = |(i, micros): (usize, &Vec<Micro>)| pipeline.step(micros, next(i), (0.0, 1, STEPS)).unwrap();
        let reports: Vec<StepReport> = self.steps.iter().enumerate().map(run).collect();
        pipeline.collect(&mut student).unwrap();
        ((reports.iter().map(|r| (r.loss, r.norm)).collect(), student), reports)
    }
}

/// The student learns from a teacher's hidden states and most probable tokens: computed beforehand on one device, or in the
/// student's own stages a step ahead.
#[test]
fn a_teacher_in_the_same_stages_teaches_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::glm(SIZE, VOCABULARY);
    let rows = [2usize, 3, 1];
    let lesson = lesson(&cpu(), &rows);
    let want = lesson.in_one_piece(&config);
    let early = Kind::OneForwardOneBackward;
    for (kind, replicas, recompute) in [
        (early, vec![1], false),
        (early, vec![1; 3], false),
        (early, vec![1; 2], true),
        (Kind::ZeroBubbleV, vec![1; 2], false),
        (early, vec![2, 1], false),
        (early, vec![1, 3, 2], false),
        (Kind::ZeroBubbleV, vec![2, 2], true),
    ] {
        let case = format!("{kind}, replicas {replicas:?}, recompute {recompute}");
        let setup = setup(&config, (kind, replicas.len(), rows.len()), replicas.clone(), folder.path());
        let (have, reports) = lesson.in_stages(&config, Setup { recompute, ..setup });
        if kind == early && replicas.iter().all(|n| *n == 1) {
            assert_equal_bits(&want, &have, &case);
        }
        assert_close(&want, &have, &case);
        // A step ahead: in every step but the last each of the teacher's chunks is seen once for every micro-batch.
        for (i, report) in reports.iter().enumerate() {
            let timeline = report.timeline("step", &replicas);
            assert_eq!(timeline.spans.len(), replicas.iter().sum::<usize>());
            let mut seen: Vec<(u32, u32)> = Vec::new();
            for spans in &timeline.spans {
                assert!(spans.windows(2).all(|w| w[0].end <= w[1].start), "{case}: work overlaps: {spans:?}");
                seen.extend(spans.iter().filter_map(|s| match s.activity {
                    Activity::Teacher { chunk, micro } => Some((chunk, micro)),
                    _ => None,
                }));
            }
            seen.sort_unstable();
            let all = (0..replicas.len() as u32).flat_map(|c| (0..rows.len() as u32).map(move |m| (c, m)));
            let all: Vec<_> = if i + 1 < reports.len() { all.collect() } else { Vec::new() };
            assert_eq!(seen, all, "{case}, step {i}");
        }
    }
}

#[test]
fn a_teachers_work_is_drawn_beside_the_students() {
    let folder = tempfile::tempdir().unwrap();
    let config = Config::glm(SIZE, VOCABULARY);
    let lesson = lesson(&cpu(), &[2, 3, 1, 2]);
    let setup = setup(&config, (Kind::OneForwardOneBackward, 2, 4), vec![1, 2], folder.path());
    let timeline = lesson.in_stages(&config, setup).1[0].timeline("step", &[1, 2]);
    let chart = gantt(&timeline);
    for part in ["stage 0", "stage 1 replica 1: 1T3 the teacher", "class=\"teacher\""] {
        assert!(chart.contains(part), "{part}: {chart}");
    }
    let text = trace::render(&timeline).unwrap();
    let events: serde_json::Value = serde_json::from_str(&text).unwrap();
    let events = events["traceEvents"].as_array().unwrap();
    assert_eq!(events.iter().filter(|e| e["cat"] == "teacher").count(), 2 * 4);
    let rows: Vec<&str> =
        events.iter().filter(|e| e["name"] == "thread_name").map(|e| e["args"]["name"].as_str().unwrap()).collect();
    assert_eq!(rows, ["stage 0", "stage 1 replica 0", "stage 1 replica 1"]);
}

/// A hook whose loss takes a while, as a teacher's does.
struct Costly(Duration);

impl Method for Costly {
    fn name(&self) -> &'static str {
        "costly"
    }

    fn on_loss(&self, pass: &mut Pass, hidden: &Var, _: &Micro) -> espalier::Result<Option<Var>> {
        std::thread::sleep(self.0);
        sum(pass, &hidden.reshape(&[hidden.tensor.count()])?).map(Some)
    }
}

#[test]
fn a_profile_sees_what_hooks_cost_at_the_head() {
    let device = cpu();
    let model = Model::init(Config::glm(SIZE, VOCABULARY), &device, 3).unwrap();
    // Where hooks alone make the loss there are no gold labels.
    let micro = Micro { gold: false, ..micros(&device, &[2], None).remove(0) };
    let pause = Duration::from_millis(20);
    let costly = |_: &Model| Ok(vec![Box::new(Costly(pause)) as Box<dyn Method>]);
    let profile = measure::profile(&model, model.device(), &micro, clipping(), &costly, &[]).unwrap();
    let (head, others) = profile.pieces.split_last().unwrap();
    assert!(head.cost.forward >= pause.as_secs_f64(), "{head:?}");
    assert!(others.iter().all(|piece| piece.cost.forward < head.cost.forward), "{profile:?}");
}

#[test]
fn peak_activations_fall_with_early_backward() {
    let folder = tempfile::tempdir().unwrap();
    let config =
        Config::glm(Size { layers: 6, heads: 4, head_size: 16, ffn_width: 256, max_positions: 32 }, VOCABULARY);
    let rows = [16usize; 8];
    let model = Model::init(config.clone(), &cpu(), 3).unwrap();
    let micros = micros(&cpu(), &rows, None);
    let held = |kind: Kind| {
        let setup = setup(&config, (kind, 2, rows.len()), vec![1; 2], folder.path());
        let mut pipeline = Pipeline::start(&model, setup).unwrap();
        pipeline.step(&micros, &[], (0.0, 1, STEPS)).unwrap();
        let report = pipeline.step(&micros, &[], (0.0, 1, STEPS)).unwrap();
        report.workers.iter().map(|w| w.held_bytes).collect::<Vec<u64>>()
    };
    let (all, early) = (held(Kind::GPipe), held(Kind::OneForwardOneBackward));
    println!("activation bytes held per stage: GPipe {all:?}, 1F1B {early:?}");
    // 2 of the 8 micro-batches at most.
    for (stage, (all, early)) in all.iter().zip(&early).enumerate() {
        assert!(early * 8 <= all * 2, "stage {stage}: {early} of {all} bytes");
    }
}
