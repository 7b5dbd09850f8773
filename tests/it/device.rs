//! Devices: the traps of real drivers as tests with their known answers, limits, typed errors, ordering of queued work.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use espalier::device::{self, Binding, CpuDevice, Device, Kind, WgpuDevice};
use espalier::dispatch;
use espalier::kernel::{Code, Kernel, Launch, Params, Plan, Source, always};
use espalier::ops::unary::{Function, Unary};
use espalier::{DType, Error, Tensor};

/// The wgpu device all tests share, or `None` with a line that says what was skipped and why. Where
/// `ESPALIER_REQUIRE` names wgpu its absence is a failure.
pub fn wgpu(test: &str) -> Option<Arc<dyn Device>> {
    static DEVICE: OnceLock<Result<Arc<dyn Device>, String>> = OnceLock::new();
    let opened = DEVICE.get_or_init(|| device::open("wgpu").map_err(|e| e.to_string()));
    present(test, opened.clone())
}

/// A device of a test's own, for tests that end its life.
fn own_wgpu(test: &str) -> Option<WgpuDevice> {
    present(test, WgpuDevice::open(None).map_err(|e| e.to_string()))
}

pub fn present<T>(test: &str, opened: Result<T, String>) -> Option<T> {
    match opened {
        Ok(device) => Some(device),
        Err(reason) => {
            let required = std::env::var("ESPALIER_REQUIRE").unwrap_or_default();
            assert!(!required.split(',').any(|r| r == "wgpu"), "{test} needs wgpu: {reason}");
            eprintln!("skipped {test}: {reason}");
            None
        }
    }
}

const TEXT: &str = "
struct TestParams { count: u32, value: f32 }
var<immediate> test: TestParams;
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<storage, read_write> counts: array<u32>;

@compute @workgroup_size(64)
fn add(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x < test.count { x[id.x] = x[id.x] * 0.5 + test.value; }
}

@compute @workgroup_size(64)
fn count_loop(@builtin(global_invocation_id) id: vec3<u32>) {
    var state = u32(x[0]) + id.x;
    var n = 0u;
    for (var i = 0u; i < test.count; i++) { state = state * 1664525u + 1013904223u; n++; }
    counts[2u * id.x] = n;
    counts[2u * id.x + 1u] = state;
}

@compute @workgroup_size(64)
fn nan(@builtin(global_invocation_id) id: vec3<u32>) {
    let value = x[id.x];
    counts[2u * id.x] = select(0u, 1u, value != value);
    counts[2u * id.x + 1u] = select(0u, 1u, is_nan(value));
}
";

const fn kernel(entry: &'static str) -> Kernel {
    let code = Code::Wgsl { source: Source::wgsl("test.wgsl", TEXT), entry, constants: &[] };
    Kernel { name: entry, code, dtypes: &[DType::F32], fits: always, plan: Plan::once }
}

static ADD: Kernel = kernel("add");
static COUNT: Kernel = kernel("count_loop");
static NAN: Kernel = kernel("nan");

fn whole(buffer: &device::Buffer, bytes: usize) -> Binding<'_> {
    Binding { buffer, offset: 0, bytes, write: true }
}

fn floats(device: &dyn Device, buffer: &device::Buffer, n: usize) -> Vec<f32> {
    let mut values = vec![0f32; n];
    device.download(buffer, 0, bytemuck::cast_slice_mut(&mut values)).unwrap();
    values
}

/// Runs a two-words-per-invocation kernel of one group over `x`.
fn words(device: &dyn Device, kernel: &Kernel, x: &[f32], params: Params) -> Vec<u32> {
    let input = device.alloc(x.len() * 4).unwrap();
    let output = device.alloc(512).unwrap();
    device.upload(&input, 0, bytemuck::cast_slice(x)).unwrap();
    let launch = Launch::new([1, 1, 1], params);
    device.launch(kernel, DType::F32, &launch, &[whole(&input, x.len() * 4), whole(&output, 512)]).unwrap();
    let mut values = vec![0u32; 128];
    device.download(&output, 0, bytemuck::cast_slice_mut(&mut values)).unwrap();
    values
}

#[test]
fn t1_loops_are_whole_or_refused() {
    let Some(device) = wgpu("t1") else { return };
    let run = |n: usize| words(device.as_ref(), &COUNT, &[1.0], Params::new().u(n).f(0.0));
    // What every plan may rely on.
    assert!(run(60_000).chunks(2).all(|c| c[0] == 60_000));
    let long = run(70_000);
    match device.info().limits.loop_budget {
        None => assert!(long.chunks(2).all(|c| c[0] == 70_000)),
        Some(budget) => {
            assert!((60_000..65_536).contains(&budget));
            assert!(long.chunks(2).all(|c| c[0] < 70_000), "a budget is set though nothing is cut");
            let launch = Launch::new([1, 1, 1], Params::new().u(70_000).f(0.0)).trips(70_000);
            let memory = device.alloc(512).unwrap();
            let refused = device.launch(&COUNT, DType::F32, &launch, &[whole(&memory, 512), whole(&memory, 512)]);
            assert!(matches!(refused, Err(Error::Launch { got: 70_000, .. })), "{refused:?}");
        }
    }
    if device.info().name.contains("llvmpipe") {
        assert_eq!(long[0], 65_535);
    }
}

#[test]
fn t2_nan_is_found_by_its_bits() {
    let Some(device) = wgpu("t2") else { return };
    let mut x = vec![1.0f32; 64];
    x[3] = f32::NAN;
    x[5] = f32::from_bits(0xffc0_1234);
    x[7] = f32::INFINITY;
    let found = words(device.as_ref(), &NAN, &x, Params::new().u(64).f(0.0));
    let by_bits: Vec<usize> = (0..64).filter(|i| found[2 * i + 1] == 1).collect();
    assert_eq!(by_bits, [3, 5]);
}

/// What `doctor` shows of software Vulkan; another adapter prints its table, and only what kernels rely on must hold.
#[test]
fn t3_to_t9_probes_have_their_known_answers() {
    let Some(device) = wgpu("probes") else { return };
    let info = device.info();
    let measured = |trap: &str| {
        let probe = info.probes.iter().find(|p| p.trap == trap);
        probe.unwrap_or_else(|| panic!("no probe {trap}")).measured.as_str()
    };
    for probe in &info.probes {
        println!("{}: {}: expected {}, measured {}", info.name, probe.trap, probe.expected, probe.measured);
    }
    assert_eq!(measured("T2 NaN by its bits"), "true");
    assert_eq!(measured("T4 memory behind the binding"), "unchanged");
    if info.name.contains("llvmpipe") {
        let known = [
            ("T1 loop of 70,000 iterations", "65535"),
            ("T2 NaN != NaN", "false"),
            ("T3 subnormal times one", "kept"),
            ("T4 load out of bounds", "0"),
            ("T7 storage binding", "128 MiB"),
            ("T9 0.0 / 0.0 is NaN", "true"),
            ("T9 1.0 / 0.0", "inf"),
            ("T9 1u / 0u", "1"),
            ("T9 u32(-3.0)", "0"),
        ];
        for (trap, answer) in known {
            assert_eq!(measured(trap), answer, "{trap}");
        }
        assert!(info.software && info.features.f16 && info.features.timestamps);
        assert_eq!(info.limits.workgroup_bytes, 32 << 10);
    }
}

/// Memory exhaustion cannot be provoked on software Vulkan: the cap stands in for it, on every device.
#[test]
fn t5_memory_cap_is_a_typed_error() {
    let cpu: Arc<dyn Device> = Arc::new(CpuDevice::new(Some(1)).unwrap());
    // Other tests share the wgpu device: this one has its own.
    let wgpu = own_wgpu("t5").map(|d| Arc::new(d) as Arc<dyn Device>);
    for device in [Some(cpu), wgpu].into_iter().flatten() {
        device.set_memory_cap(Some(1 << 20));
        let held = device.alloc(600 << 10).unwrap();
        match device.alloc(600 << 10).err() {
            Some(Error::OutOfMemory { requested, live, cap, .. }) => {
                assert_eq!((requested, cap), (600 << 10, 1 << 20));
                assert!(live >= 600 << 10);
            }
            other => panic!("{other:?}"),
        }
        drop(held);
        device.alloc(600 << 10).unwrap();
        device.set_memory_cap(None);
        assert_eq!(device.stats().bytes_live, 0);
    }
}

#[test]
fn t6_a_hang_is_a_lost_device_with_the_kernel_named() {
    let Some(device) = own_wgpu("t6") else { return };
    let output = device.alloc(64 * 2_000 * 8).unwrap();
    let input = device.alloc(256).unwrap();
    device.upload(&input, 0, &[0; 256]).unwrap();
    device.sync().unwrap();
    device.set_deadline(Duration::from_millis(20));
    let launch = Launch::new([2_000, 1, 1], Params::new().u(20_000).f(0.0));
    device.launch(&COUNT, DType::F32, &launch, &[whole(&input, 256), whole(&output, 64 * 2_000 * 8)]).unwrap();
    let error = device.sync().unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::DeviceLost { .. }) && text.contains("count_loop"), "{text}");
    assert!(matches!(device.alloc(4), Err(Error::DeviceLost { .. })), "a hung device takes no more work");
}

#[test]
fn t8_a_destroyed_device_answers_lost() {
    let Some(device) = own_wgpu("t8") else { return };
    let buffer = device.alloc(256).unwrap();
    device
        .launch(&ADD, DType::F32, &Launch::new([1, 1, 1], Params::new().u(4).f(1.0)), &[whole(&buffer, 256)])
        .unwrap();
    device.destroy();
    let mut data = [0u8; 4];
    let lost = |result: espalier::Result<()>| assert!(matches!(result, Err(Error::DeviceLost { .. })), "{result:?}");
    lost(device.download(&buffer, 0, &mut data));
    lost(device.upload(&buffer, 0, &data));
    lost(device.sync());
    lost(device.alloc(4).map(drop));
    lost(device.launch(&ADD, DType::F32, &Launch::new([1, 1, 1], Params::new().u(4).f(1.0)), &[whole(&buffer, 256)]));
}

#[test]
fn queued_work_keeps_its_order_with_uploads_copies_and_recycled_memory() {
    let Some(device) = wgpu("order") else { return };
    let n = 1000;
    let launch = |value: f32| Launch::linear(n, 64, Params::new().u(n).f(value));
    let bytes = n * 4;
    let x = device.alloc(bytes).unwrap();
    let saved = device.alloc(bytes).unwrap();
    device.upload(&x, 0, bytemuck::cast_slice(&vec![8f32; n])).unwrap();
    device.launch(&ADD, DType::F32, &launch(1.0), &[whole(&x, bytes)]).unwrap();
    device.copy(&x, 0, &saved, 0, bytes).unwrap();
    // Overwrites memory that a queued launch reads.
    device.upload(&x, 0, bytemuck::cast_slice(&vec![2f32; n])).unwrap();
    device.launch(&ADD, DType::F32, &launch(1.0), &[whole(&x, bytes)]).unwrap();
    // Given back while queued work still uses it, and taken again at once.
    let recycled = device.alloc(bytes).unwrap();
    device.launch(&ADD, DType::F32, &launch(0.0), &[whole(&recycled, bytes)]).unwrap();
    drop(recycled);
    let again = device.alloc(bytes).unwrap();
    device.upload(&again, 0, bytemuck::cast_slice(&vec![4f32; n])).unwrap();
    assert_eq!(floats(device.as_ref(), &saved, n), vec![5f32; n]);
    assert_eq!(floats(device.as_ref(), &x, n), vec![2f32; n]);
    assert_eq!(floats(device.as_ref(), &again, n), vec![4f32; n]);
}

#[test]
fn more_launches_than_one_batch_run_in_order() {
    let Some(device) = wgpu("batches") else { return };
    let x = device.alloc(256).unwrap();
    device.upload(&x, 0, bytemuck::cast_slice(&[0f32; 64])).unwrap();
    let before = device.stats().launches;
    let mut expected = 0f32;
    for i in 0..1000 {
        expected = expected * 0.5 + i as f32;
        device
            .launch(&ADD, DType::F32, &Launch::new([1, 1, 1], Params::new().u(64).f(i as f32)), &[whole(&x, 256)])
            .unwrap();
    }
    assert_eq!(floats(device.as_ref(), &x, 64), vec![expected; 64]);
    assert!(device.stats().launches >= before + 1000);
}

#[test]
fn bytes_of_any_length_and_offset_round_trip() {
    let Some(device) = wgpu("round trip") else { return };
    let buffer = device.alloc(1003).unwrap();
    let mut expected: Vec<u8> = (0..1003).map(|i| (i * 7 % 251) as u8).collect();
    device.upload(&buffer, 0, &expected).unwrap();
    // A piece that ends inside a word must leave the rest of that word alone.
    device.upload(&buffer, 100, &[1, 2, 3, 4, 5]).unwrap();
    expected[100..105].copy_from_slice(&[1, 2, 3, 4, 5]);
    for (offset, length) in [(0, 1003), (1, 1), (3, 998), (101, 5), (1002, 1)] {
        let mut got = vec![0; length];
        device.download(&buffer, offset, &mut got).unwrap();
        assert_eq!(got, expected[offset..offset + length], "{offset}+{length}");
    }
    assert!(matches!(device.upload(&buffer, 2, &[0; 4]), Err(Error::Launch { .. })), "half words are refused");
    assert!(matches!(device.upload(&buffer, 4096, &[0; 4]), Err(Error::Launch { .. })), "past the end is refused");
    assert!(matches!(device.download(&buffer, usize::MAX, &mut [0; 4]), Err(Error::Launch { .. })));
}

#[test]
fn threads_share_one_device() {
    let Some(device) = wgpu("threads") else { return };
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let device = &device;
            scope.spawn(move || {
                for i in 0..50 {
                    let value = (thread * 100 + i) as f64;
                    let x = Tensor::from_f64(device, &[33], DType::F32, &vec![value; 33]).unwrap();
                    let y = dispatch::run_one(&Unary(Function::Scale(2.0)), &[&x]).unwrap();
                    assert_eq!(y.to_f64().unwrap(), vec![2.0 * value; 33]);
                }
            });
        }
    });
}

#[test]
fn compile_errors_name_the_kernels_own_line() {
    let Some(device) = wgpu("compile") else { return };
    static BROKEN: Kernel = Kernel {
        code: Code::Wgsl {
            source: Source::wgsl(
                "broken.wgsl",
                "@group(0) @binding(0) var<storage, read_write> x: array<f32>;\n\n@compute @workgroup_size(1)\nfn f() {\n    x[0] = nosuch;\n}\n",
            ),
            entry: "f",
            constants: &[],
        },
        ..kernel("f")
    };
    let x = device.alloc(256).unwrap();
    let error =
        device.launch(&BROKEN, DType::F32, &Launch::new([1, 1, 1], Params::new()), &[whole(&x, 256)]).unwrap_err();
    match &error {
        Error::Compile { file, line, log, .. } => {
            assert_eq!((file.as_str(), *line), ("broken.wgsl", 5));
            assert!(log.contains("nosuch"));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(error.exit_code(), 4);
}

#[test]
fn launches_that_break_a_limit_are_refused_before_they_run() {
    let Some(device) = wgpu("limits") else { return };
    let x = device.alloc(256).unwrap();
    let refused = |launch: &Launch, arguments: &[Binding]| {
        let result = device.launch(&ADD, DType::F32, launch, arguments);
        assert!(matches!(result, Err(Error::Launch { .. })), "{result:?}");
    };
    let params = Params::new().u(64).f(1.0);
    refused(&Launch::new([65_536, 1, 1], params), &[whole(&x, 256)]);
    refused(&Launch::new([1, 0, 1], params), &[whole(&x, 256)]);
    // The shader reads two words of parameters, and binds an argument.
    refused(&Launch::new([1, 1, 1], Params::new().u(64)), &[whole(&x, 256)]);
    refused(&Launch::new([1, 1, 1], params), &[]);
    let large = device.info().limits.binding_bytes as usize + 4;
    refused(&Launch::new([1, 1, 1], params), &[Binding { buffer: &x, offset: 0, bytes: large, write: true }]);
    refused(&Launch::new([1, 1, 1], params), &[Binding { buffer: &x, offset: 2, bytes: 4, write: true }]);
    assert!(matches!(device.alloc(3 << 30), Err(Error::Launch { .. })), "a buffer above the device's limit");
}

#[test]
fn timers_count_device_time() {
    let Some(device) = wgpu("timers") else { return };
    let x = Tensor::from_f64(&device, &[1 << 20], DType::F32, &vec![0.5; 1 << 20]).unwrap();
    let run = |n: usize| {
        let mut work = || (0..n).try_for_each(|_| dispatch::run_one(&Unary(Function::Exp), &[&x]).map(drop));
        device.elapsed(&mut work).unwrap()
    };
    run(1);
    let (one, sixteen) = (run(1), run(16));
    // Loose, for a machine that does other work: sixteen runs take longer than two.
    assert!(one > 0.0 && sixteen > 2.0 * one, "{one} {sixteen}");
}

#[test]
fn tensors_of_another_device_are_a_typed_error() {
    let cpu = device::open("cpu:1").unwrap();
    let other = device::open("reference").unwrap();
    let (a, b) = (
        Tensor::from_f64(&cpu, &[2], DType::F32, &[1.0, 2.0]).unwrap(),
        Tensor::from_f64(&other, &[2], DType::F32, &[1.0, 2.0]).unwrap(),
    );
    let op = espalier::ops::unary::UnaryBackward(Function::Relu);
    let error = dispatch::run(&op, &[&a, &b]).unwrap_err();
    assert!(
        matches!(&error, Error::WrongDevice { input: 1, expected, got, .. } if expected == "cpu" && got == "reference")
    );
    if let Some(gpu) = wgpu("wrong device") {
        let c = Tensor::from_f64(&gpu, &[2], DType::F32, &[1.0, 2.0]).unwrap();
        assert!(matches!(dispatch::run(&op, &[&c, &a]), Err(Error::WrongDevice { input: 1, .. })));
    }
}

#[test]
fn names_of_devices_are_checked() {
    for name in ["gpu", "cpu:0", "cpu:x", "", "wgpux"] {
        let error = device::open(name).err().unwrap_or_else(|| panic!("{name} opened"));
        assert!(matches!(error, Error::Usage { .. }) && error.exit_code() == 2, "{name}: {error}");
    }
    for name in ["wgpu:99", "wgpu:no such adapter", "cuda"] {
        let error = device::open(name).err().unwrap_or_else(|| panic!("{name} opened"));
        assert!(matches!(error, Error::NotAvailable { .. }) && error.exit_code() == 4, "{name}: {error}");
    }
    // A software adapter is never picked unnamed.
    let auto = device::open("auto").unwrap();
    assert!(auto.info().kind == Kind::Cpu || !auto.info().software);
}
