//! Training steps that are captured and replayed: the same bits as steps queued launch by launch, and no host work.

use std::path::Path;
use std::sync::{Arc, Mutex};

use espalier::compress::pruning::{Held, Pattern};
use espalier::compress::quantization::{
    Activations, BitSchedule, Format, INPUT_STEP, Phase, QuantizationAware, learned_step,
};
use espalier::data::batch::Example;
use espalier::device::{self, Class, Device, Kind, Limits, NullDevice, Stats};
use espalier::error::Uncapturable;
use espalier::nn::{Config, Model, Pass};
use espalier::ops::binary::ADD;
use espalier::rng::Stream;
use espalier::tape::Var;
use espalier::tensor::Tensor;
use espalier::train::lifecycle::{Method, Micro};
use espalier::train::optimizer::{Optimizer, Rule, Settings};
use espalier::train::precision::Precision;
use espalier::train::schedule::{Schedule, Shape};
use espalier::train::trainer::{Job, Source, Summary, train};
use espalier::{DType, Error, Result, dispatch, shape::Meta};

use crate::model::{SIZE, SPECIAL, assemble, cpu, micro};

const VOCABULARY: usize = 37;

/// Rows of one length (batches are padded to multiples of 8), so that a step's shape follows from it; other tokens at every
/// step.
fn rows(step: u64, length: usize) -> Vec<Example> {
    let mut stream = Stream::new(step, 7);
    let mut row = || {
        let tokens: Vec<u32> = (0..length).map(|_| 5 + stream.below(VOCABULARY - 5) as u32).collect();
        let context = tokens.iter().copied().chain([SPECIAL.gmask]).collect();
        Example { context, labels: tokens.into_iter().chain([SPECIAL.eos]).collect() }
    };
    (0..3).map(|_| row()).collect()
}

/// What a training is made of.
#[derive(Clone, Copy)]
struct Plan {
    steps: u64,
    rule: Rule,
    precision: Precision,
    /// Lengths of the rows, taken in turn; two micro-batches a step.
    lengths: &'static [usize],
    /// The step from 0 whose losses weigh this much.
    weight_at: Option<(u64, f32)>,
    saves_every: u64,
    fails_at: Option<u64>,
    pruned: bool,
    /// Learned steps under falling bits, and input steps that are tracked until the last quarter.
    quantized: bool,
}

const PLAN: Plan = Plan {
    steps: 20,
    rule: Rule::Adamw { beta1: 0.9, beta2: 0.999, epsilon: 1e-8 },
    precision: Precision::F32,
    lengths: &[3, 5],
    weight_at: None,
    saves_every: 19,
    fails_at: None,
    pruned: false,
    quantized: false,
};

struct Steps<'a> {
    device: &'a Arc<dyn Device>,
    plan: Plan,
    /// What the device had done before and after each call.
    seen: Mutex<Vec<[Stats; 2]>>,
}

impl Source for Steps<'_> {
    fn micro_batches(&self, step: u64) -> Result<Vec<Micro>> {
        let before = self.device.stats();
        if self.plan.fails_at == Some(step) {
            return Err(Error::file("source", step, "killed here"));
        }
        let length = self.plan.lengths[step as usize % self.plan.lengths.len()];
        let mut micros: Vec<Micro> =
            (0..2).map(|part| micro(self.device, &assemble(&rows(2 * step + part, length)))).collect();
        if let Some((at, weight)) = self.plan.weight_at
            && at == step
        {
            let count = micros[0].weights.count();
            micros[0].weights = Tensor::from_slice(self.device, &[count], &vec![weight; count])?;
        }
        self.seen.lock().unwrap().push([before, self.device.stats()]);
        Ok(micros)
    }
}

fn run(
    device: &Arc<dyn Device>,
    plan: Plan,
    graphs: usize,
    folder: &Path,
    method: Option<Box<dyn Method>>,
) -> (Result<Summary>, Vec<[Stats; 2]>) {
    let mut model = Model::init(Config::glm(SIZE, VOCABULARY), device, 1).unwrap();
    let mut methods: Vec<Box<dyn Method>> = method.into_iter().collect();
    if plan.pruned {
        let weights = ["blocks.0.ffn.in.weight", "blocks.1.attention.query.weight"].map(|name| (name.to_string(), 0));
        methods.push(Box::new(Held::new(&model, weights.into(), Pattern::TwoFour).unwrap()));
    }
    if plan.quantized {
        methods.extend(quantization(&mut model, plan.steps));
    }
    let source = Steps { device, plan, seen: Mutex::default() };
    let schedule = Schedule { peak: 1e-2, warmup: 4, shape: Shape::Cosine { floor: 0.1 } };
    let (rule, precision) = (plan.rule, plan.precision);
    let job = Job {
        stage: "test",
        steps: plan.steps,
        settings: Settings { schedule, rule, weight_decay: 0.05, clip: 0.5, precision },
        dropout: 0.1,
        seed: 1,
        source: &source,
        // Takes memory between replays and keeps some of it until the next validation.
        validate: &validation(device),
        validate_every: 6,
        checkpoint_every: plan.saves_every,
        graphs,
        keep_checkpoints: 1,
        folder,
        progress: false,
        stepper: None,
    };
    let done = train(&mut model, &job, &mut methods);
    (done, source.seen.into_inner().unwrap())
}

type Validate = Box<dyn Fn(&Model, &[Box<dyn Method>]) -> Result<f64>>;

/// Allocates as a validation does; what it has kept must still be what it was.
fn validation(device: &Arc<dyn Device>) -> Validate {
    let (device, kept) = (device.clone(), Mutex::new(Vec::<Tensor>::new()));
    Box::new(move |model, _| {
        let micro = micro(&device, &assemble(&rows(99, 4)));
        let hidden = Pass::inference(model).hidden(&micro.batch)?.tensor;
        let mut kept = kept.lock().unwrap();
        for tensor in kept.iter() {
            assert!(device.info().id == "null" || tensor.to_vec::<f32>()?.iter().all(|x| *x == 3.0));
        }
        for _ in 0..4 {
            kept.push(Tensor::from_slice(&device, &[hidden.count()], &vec![3.0f32; hidden.count()])?);
        }
        Ok(0.0)
    })
}

/// Everything the last checkpoint holds, and the loss curve.
fn result(device: &Arc<dyn Device>, plan: Plan, graphs: usize, folder: &Path) -> ([Vec<u8>; 2], Summary) {
    let summary = run(device, plan, graphs, folder, None).0.unwrap();
    (files(folder, plan), summary)
}

fn files(folder: &Path, plan: Plan) -> [Vec<u8>; 2] {
    let checkpoint =
        folder.join("checkpoints").join(format!("step-{}", (plan.steps - 1) / plan.saves_every * plan.saves_every));
    ["model.safetensors", "optimizer.safetensors"].map(|name| std::fs::read(checkpoint.join(name)).unwrap())
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// Asserts that replayed steps give the bits of queued ones; gives how many were replayed.
fn check(device: &Arc<dyn Device>, plan: Plan, graphs: usize) -> u64 {
    let (queued, captured) = (folder(), folder());
    let want = result(device, plan, 0, queued.path());
    let have = result(device, plan, graphs, captured.path());
    assert_eq!(want.1.curve, have.1.curve);
    assert!(want.0 == have.0, "parameters or the optimizer's state differ");
    assert_eq!(want.1.replayed, 0);
    have.1.replayed
}

fn quantization(model: &mut Model, steps: u64) -> [Box<dyn Method>; 2] {
    let (learning, tracking) = (vec!["blocks.0.attention.query".to_string()], vec!["blocks.1.ffn.in".to_string()]);
    let format = Format { bits: 6, ..Format::default() };
    learned_step::begin(model, &learning, &Format { bits: 8, ..format }, &[]).unwrap();
    let unseen = Tensor::from_slice(model.device(), &[1], &[0.0f32]).unwrap();
    model.tensors.insert(format!("{}.{INPUT_STEP}", tracking[0]), unseen);
    let bits = Some(BitSchedule { start: 8, period: 5, doubling: false });
    let learned = Phase { steps, learned: true, tracking: 0.0, bits };
    let tracked = Phase { learned: false, tracking: 0.1, bits: None, ..learned };
    let inputs = Format { activations: Activations::Static, ..format };
    [
        Box::new(QuantizationAware::new(learning, format, Some(learned))),
        Box::new(QuantizationAware::new(tracking, inputs, Some(tracked))),
    ]
}

/// Steps are captured anew where the bits fall and where observers come to rest.
#[test]
fn learned_and_tracked_steps_are_replayed_to_the_bit() {
    for precision in [Precision::F32, Precision::Bf16] {
        let plan = Plan { quantized: true, lengths: &[3], precision, ..PLAN };
        let replayed = check(&cpu(), plan, 4);
        assert!(replayed >= 16, "{replayed}");
        let (whole, parted) = (folder(), folder());
        let plan = Plan { saves_every: 9, ..plan };
        let want = result(&cpu(), plan, 0, whole.path()).0;
        run(&cpu(), Plan { fails_at: Some(12), ..plan }, 4, parted.path(), None).0.unwrap_err();
        run(&cpu(), plan, 4, parted.path(), None).0.unwrap();
        assert!(want == files(parted.path(), plan), "a resumed training differs");
    }
}

#[test]
fn replayed_steps_give_the_bits_of_queued_ones() {
    let device = cpu();
    // Of each length the first step is queued; from the second on the step is captured and replayed.
    assert_eq!(check(&device, PLAN, 4), 18);
    assert_eq!(check(&device, Plan { rule: Rule::Sgd { momentum: 0.9 }, pruned: true, ..PLAN }, 4), 18);
    assert_eq!(check(&device, Plan { precision: Precision::Bf16, pruned: true, ..PLAN }, 4), 18);
}

/// The scale is halved where the gradients overflow: that step changes nothing, and the replayed ones after it know.
#[test]
fn a_replayed_step_that_overflows_is_void() {
    let plan = Plan { precision: Precision::F16, weight_at: Some((18, 1e6)), ..PLAN };
    let (with, without) = (folder(), folder());
    // A capture that finds too little memory in the pool is tried again at the next step.
    assert!(check(&cpu(), plan, 4) >= 16);
    let scale = |plan: Plan, folder: &Path| {
        result(&cpu(), plan, 4, folder);
        let state = espalier::train::store::decode(Path::new("o"), &files(folder, plan)[1], &cpu()).unwrap();
        state["loss_scale"].to_vec::<f32>().unwrap()
    };
    let [with, without] =
        [scale(plan, with.path()), scale(Plan { weight_at: None, ..plan }, without.path())].map(|words| words[0]);
    assert_eq!(with, without / 2.0);
}

#[test]
fn shapes_beyond_the_limit_are_queued() {
    let plan = Plan { lengths: &[3, 5, 9, 13], ..PLAN };
    assert_eq!(check(&cpu(), plan, 2), 8);
    assert_eq!(check(&cpu(), plan, 0), 0);
}

#[test]
fn a_resumed_training_is_captured_anew_and_gives_the_same_bits() {
    let device = cpu();
    let plan = Plan { precision: Precision::F16, pruned: true, saves_every: 9, ..PLAN };
    let (whole, parted) = (folder(), folder());
    let want = result(&device, plan, 0, whole.path()).0;
    run(&device, Plan { fails_at: Some(12), ..plan }, 4, parted.path(), None).0.unwrap_err();
    let resumed = run(&device, plan, 4, parted.path(), None).0.unwrap();
    assert!(resumed.replayed > 0);
    assert!(want == files(parted.path(), plan));
}

/// The same kernels that a GPU runs, on memory whose ends fault; and by a graph of the driver, where there is a GPU.
#[test]
fn cuda_kernels_are_replayed_to_the_bit() {
    let plan = Plan { steps: 5, saves_every: 4, lengths: &[3], precision: Precision::F16, pruned: true, ..PLAN };
    if let Some(device) = crate::cuda::harness("cuda-host") {
        assert_eq!(check(&device, plan, 1), 4);
    }
    match device::open("cuda") {
        Ok(device) => assert!(check(&device, Plan { pruned: true, precision: Precision::F16, ..PLAN }, 4) >= 16),
        Err(e) => eprintln!("skipped: {e}"),
    }
}

/// Launches and allocations of the host between the micro-batches of one step and those of the next.
#[test]
fn a_replayed_step_costs_no_launch_and_no_allocation() {
    let null = NullDevice::new(Kind::Cuda, Class::Simt, Limits::unbounded());
    let device: Arc<dyn Device> = Arc::new(null);
    let plan = Plan { steps: 12, lengths: &[3], ..PLAN };
    let (done, seen) = run(&device, plan, 1, folder().path(), None);
    assert_eq!(done.unwrap().replayed, 11);
    let cost = |pair: &[[Stats; 2]]| {
        let ([_, before], [after, _]) = (pair[0], pair[1]);
        (after.launches - before.launches, after.allocations - before.allocations)
    };
    let costs: Vec<(u64, u64)> = seen.windows(2).map(cost).collect();
    let (queued, captured) = (costs[0], costs[1]);
    assert!(queued.0 > 50 && captured.0 == queued.0, "{costs:?}");
    // Step 6 validates.
    assert!(costs[2..5].iter().chain(&costs[6..]).all(|cost| *cost == (0, 0)), "{costs:?}");
}

/// Reads values on the host while the loss is queued.
struct Peeks;

impl Method for Peeks {
    fn name(&self) -> &'static str {
        "peeks"
    }

    fn on_loss(&self, _: &mut Pass, hidden: &Var, _: &Micro) -> Result<Option<Var>> {
        hidden.tensor.to_f64().map(|_| None)
    }
}

/// Prunes a weight late.
struct PrunesLate;

impl Method for PrunesLate {
    fn name(&self) -> &'static str {
        "prunes late"
    }

    fn on_update(&mut self, step: u64, model: &Model, optimizer: &mut Optimizer) -> Result<()> {
        let name = "blocks.0.ffn.out.weight";
        let weight = model.get(name)?;
        let mask: Vec<f32> = (0..weight.count()).map(|i| f32::from(u8::from(i as u64 % 7 > step % 5))).collect();
        // First a mask where there was none, then other values in the same memory.
        if step == 10 || step == 15 {
            optimizer.set_mask(name, &Tensor::from_slice(model.device(), weight.dims(), &mask)?)?;
        }
        Ok(())
    }
}

#[test]
fn hooks_that_read_values_or_replace_memory_keep_their_bits() {
    let device = cpu();
    let bits = |graphs: usize, method: fn() -> Box<dyn Method>| {
        let folder = folder();
        let summary = run(&device, PLAN, graphs, folder.path(), Some(method())).0.unwrap();
        (files(folder.path(), PLAN), summary.replayed)
    };
    let (want, have) = (bits(0, || Box::new(Peeks)), bits(4, || Box::new(Peeks)));
    assert!(want.0 == have.0 && have.1 == 0, "a download cannot be replayed");
    let (want, have) = (bits(0, || Box::new(PrunesLate)), bits(4, || Box::new(PrunesLate)));
    assert!(want.0 == have.0);
    assert_eq!(have.1, 18);
}

/// The failure comes to light at the next step that is logged, and names its own.
#[test]
fn a_failure_between_logged_steps_names_its_step() {
    let plan = Plan { steps: 400, weight_at: Some((49, f32::INFINITY)), ..PLAN };
    for graphs in [0, 4] {
        let error = run(&cpu(), plan, graphs, folder().path(), None).0.unwrap_err();
        assert!(
            matches!(&error, Error::NonFinite { step: 50, tensor, .. } if tensor.starts_with("gradient")),
            "{error}"
        );
    }
}

#[test]
fn what_cannot_be_captured_says_why_and_has_not_run() {
    let reason = |device: &Arc<dyn Device>, work: &mut dyn FnMut() -> Result<()>| match device.capture(work) {
        Err(Error::Capture { reason, .. }) => Some(reason),
        other => panic!("{:?}", other.map(|_| ())),
    };
    for name in ["cpu", "cuda-host"] {
        let Some(device) = crate::cuda::harness(name) else { continue };
        let ones = || Tensor::from_slice(&device, &[4], &[1.0f32; 4]).unwrap();
        let (x, y) = (ones(), ones());
        assert_eq!(reason(&device, &mut || x.to_f64().map(|_| ())), Some(Uncapturable::Download));
        assert_eq!(reason(&device, &mut || x.upload(&[2.0f32; 4])), Some(Uncapturable::Upload));
        assert_eq!(reason(&device, &mut || device.sync()), Some(Uncapturable::Wait));
        // A refusal holds even where the code goes on.
        assert_eq!(reason(&device, &mut || x.to_f64().map(|_| ()).or(Ok(()))), Some(Uncapturable::Download));
        let nested = &mut || device.capture(&mut || Ok(())).map(|_| ());
        assert_eq!(reason(&device, nested), Some(Uncapturable::Nested));
        // An error of the work itself stays what it is, and nothing is left of the capture.
        let failed = device.capture(&mut || Err(Error::NoGradient { op: "test" }));
        assert!(matches!(failed, Err(Error::NoGradient { .. })));
        let graph = device.capture(&mut || y.assign(&x)).unwrap();
        x.upload(&[5.0f32; 4]).unwrap();
        assert_eq!(y.to_vec::<f32>().unwrap(), [1.0; 4]);
        device.replay(&graph).unwrap();
        assert_eq!(y.to_vec::<f32>().unwrap(), [5.0; 4]);
    }
    let device = cpu();
    let meta = Meta::new(&[1000], DType::F32).unwrap();
    let mut kept = None;
    assert_eq!(
        reason(&device, &mut || Tensor::empty(&device, meta).map(|_| ())),
        Some(Uncapturable::Memory(4096)),
        "new memory"
    );
    drop(Tensor::empty(&device, meta).unwrap());
    let outlives = &mut || Tensor::empty(&device, meta).map(|tensor| kept = Some(tensor));
    assert_eq!(reason(&device, outlives), Some(Uncapturable::Outlives(1)));
    let reference = device::open("reference").unwrap();
    assert_eq!(reason(&reference, &mut || Ok(())), Some(Uncapturable::Device));
}

/// What another thread does meanwhile waits, and is no part of the graph.
#[test]
fn a_capture_takes_the_work_of_its_own_thread_alone() {
    for name in ["cpu", "cuda-host"] {
        let Some(device) = crate::cuda::harness(name) else { continue };
        let values = |value: f32| Tensor::from_slice(&device, &[64], &[value; 64]).unwrap();
        let (x, y, others, theirs) = (values(2.0), values(0.0), values(3.0), values(0.0));
        let (ask, asked) = std::sync::mpsc::channel();
        let graph = std::thread::scope(|scope| {
            let (device, others, theirs) = (&device, &others, &theirs);
            let other = scope.spawn(move || {
                asked.recv().unwrap();
                theirs.assign(others).unwrap();
                let seen = theirs.to_vec::<f32>().unwrap();
                device.sync().unwrap();
                seen
            });
            let graph = device.capture(&mut || {
                ask.send(()).unwrap();
                // Time for the other thread to come up against the capture.
                std::thread::sleep(std::time::Duration::from_millis(50));
                y.assign(&x)
            });
            assert_eq!(other.join().unwrap(), [3.0; 64], "{name}");
            graph.unwrap()
        });
        theirs.upload(&[0.0f32; 64]).unwrap();
        device.replay(&graph).unwrap();
        assert_eq!(y.to_vec::<f32>().unwrap(), [2.0; 64], "{name}");
        assert_eq!(theirs.to_vec::<f32>().unwrap(), [0.0; 64], "{name}");
    }
}

/// A device goes on after work that panicked while it was captured, on the same thread and on others.
#[test]
fn a_capture_ends_where_its_work_panics() {
    for name in ["cpu", "cuda-host"] {
        let Some(device) = crate::cuda::harness(name) else { continue };
        let values = |value: f32| Tensor::from_slice(&device, &[64], &[value; 64]).unwrap();
        let (x, y) = (values(2.0), values(0.0));
        let work = || device.capture(&mut || y.assign(&x).map(|()| panic!("of the test")));
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        assert!(panicked.is_err(), "{name}");
        assert_eq!(y.to_vec::<f32>().unwrap(), [0.0; 64], "{name}");
        std::thread::scope(|scope| scope.spawn(|| y.assign(&x).unwrap()).join().unwrap());
        assert_eq!(y.to_vec::<f32>().unwrap(), [2.0; 64], "{name}");
        device.replay(&device.capture(&mut || x.assign(&y)).unwrap()).unwrap();
    }
}

/// Graphs of one device share the memory of their temporaries; threads that replay them take turns.
#[test]
fn graphs_are_replayed_one_at_a_time() {
    for name in ["cpu", "cuda-host"] {
        let Some(device) = crate::cuda::harness(name) else { continue };
        let values = |value: f32| Tensor::from_slice(&device, &[1000], &vec![value; 1000]).unwrap();
        let graph = |x: &Tensor, sum: &Tensor| {
            let work = || -> Result<()> {
                let twice = dispatch::run_one(&ADD, &[x, x])?;
                let four = dispatch::run_one(&ADD, &[&twice, &twice])?;
                sum.assign(&dispatch::run_one(&ADD, &[&four, &four])?)
            };
            work().unwrap();
            device.capture(&mut || work()).unwrap()
        };
        let ends: Vec<_> = [1.0f32, 3.0].map(|value| (value, values(value), values(0.0))).into_iter().collect();
        let graphs: Vec<_> = ends.iter().map(|(_, x, sum)| graph(x, sum)).collect();
        std::thread::scope(|scope| {
            for ((value, _, sum), graph) in ends.iter().zip(&graphs) {
                let device = &device;
                scope.spawn(move || {
                    for _ in 0..200 {
                        device.replay(graph).unwrap();
                        assert_eq!(sum.to_vec::<f32>().unwrap(), [8.0 * value; 1000], "{name}");
                    }
                });
            }
        });
    }
}

/// A graph keeps what it uses: its temporaries from everyone, its arguments from being freed.
#[test]
fn a_graph_outlives_the_handles_of_its_memory() {
    for name in ["cpu", "cuda-host"] {
        let Some(device) = crate::cuda::harness(name) else { continue };
        let values = |value: f32| Tensor::from_slice(&device, &[1000], &vec![value; 1000]).unwrap();
        let (x, sum) = (values(2.0), values(0.0));
        let twice_twice = |x: &Tensor| -> Result<()> {
            let twice = dispatch::run_one(&ADD, &[x, x])?;
            sum.assign(&dispatch::run_one(&ADD, &[&twice, &twice])?)
        };
        twice_twice(&x).unwrap();
        let graph = device.capture(&mut || twice_twice(&x)).unwrap();
        drop(x);
        for _ in 0..3 {
            let others: Vec<Tensor> = (0..5).map(|_| values(7.0)).collect();
            sum.upload(&vec![0.0f32; 1000]).unwrap();
            device.replay(&graph).unwrap();
            assert_eq!(sum.to_vec::<f32>().unwrap(), [8.0; 1000]);
            assert!(others.iter().all(|t| t.to_vec::<f32>().unwrap() == [7.0; 1000]));
        }
    }
}

/// Weights and temperatures that follow the steps reach a replayed step through device memory.
#[test]
fn scheduled_distillation_replays_to_the_bit() {
    use espalier::compress::distillation::{
        Feature, LayerwiseDistillation, Lessons, Logits, Match, MatchLoss, TemperatureSchedule, Tutor, WeightSchedule,
    };

    let device = cpu();
    let teacher = Arc::new(Model::init(Config::glm(SIZE, VOCABULARY), &device, 5).unwrap());
    let plan = Plan { steps: 8, saves_every: 0, ..PLAN };
    let method = || -> Box<dyn Method> {
        let hidden = Match { schedule: WeightSchedule::LinearDecay, ..Match::hidden(-1, -1, MatchLoss::Mse) };
        let relation = Match { feature: Feature::Attention, ..Match::hidden(-1, -1, MatchLoss::Kl) };
        let temperature_schedule = TemperatureSchedule::Linear { to: 1.0 };
        let logits = Logits { temperature_schedule, schedule: WeightSchedule::LinearGrowth, ..Logits::default() };
        let lessons = Lessons {
            tutors: vec![Tutor { model: teacher.clone(), weight: 1.0 }],
            matches: &[hidden, relation],
            dynamic: None,
            logits: Some(logits),
            kept: None,
            steps: plan.steps,
            seed: 1,
        };
        // Equal widths: nothing is added to the student.
        let mut student = Model::init(Config::glm(SIZE, VOCABULARY), &device, 1).unwrap();
        Box::new(LayerwiseDistillation::new(&mut student, lessons).unwrap())
    };
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [queued, replayed] = [0, 8].map(|graphs| {
        let (summary, _) = run(&device, plan, graphs, folders[usize::from(graphs > 0)].path(), Some(method()));
        summary.unwrap()
    });
    assert!(queued.replayed == 0 && replayed.replayed >= 4, "{}", replayed.replayed);
    assert_eq!(queued.curve, replayed.curve);
}
