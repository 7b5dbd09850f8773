//! CUDA without a GPU: headers and twins, the host harness and what it must catch, NVRTC over every kernel.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use assert_cmd::Command;
use espalier::device::{self, Binding, Device};
use espalier::kernel::{Code, Kernel, Launch, Params, Plan, Source, always};
use espalier::ops::FAMILIES;
use espalier::{DType, Error};

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Whether a missing tool is a failure: `ESPALIER_REQUIRE` names it.
fn required(name: &str) -> bool {
    std::env::var("ESPALIER_REQUIRE").is_ok_and(|list| list.split(',').any(|r| r == name))
}

fn host() -> Option<Arc<dyn Device>> {
    harness("cuda-host")
}

/// The host harness under one of its names, where a C++ compiler is.
pub fn harness(name: &str) -> Option<Arc<dyn Device>> {
    match device::open(name) {
        Ok(device) => Some(device),
        Err(e) if required("cuda-host") => panic!("{e}"),
        Err(e) => {
            eprintln!("skipped: {e}");
            None
        }
    }
}

#[test]
fn every_file_is_a_twin_with_its_header() {
    const FIELDS: [&str; 10] =
        ["op", "math", "grad", "shapes", "layout", "launch", "cost", "numerics", "source", "rungs"];
    let files: BTreeSet<&str> = FAMILIES
        .iter()
        .flat_map(|f| (f.cases)())
        .flat_map(|case| case.op.kernels().iter().filter_map(|k| Some(k.cuda()?.file.name)).collect::<Vec<_>>())
        .collect();
    let mut wrong = Vec::new();
    for entry in std::fs::read_dir(root().join("cuda")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        if path.extension().is_some_and(|e| e == "cuh") {
            continue;
        }
        if !files.contains(name.as_str()) {
            wrong.push(format!("no record runs cuda/{name}"));
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let header = text.lines().map_while(|l| l.strip_prefix("// "));
        let found: Vec<&str> =
            header.filter_map(|l| Some(l.split_once(':')?.0).filter(|n| FIELDS.contains(n))).collect();
        if found != FIELDS {
            wrong.push(format!("cuda/{name}: header fields {found:?}"));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

const BROKEN: &str = r#"
struct Params { u32 count; };

extern "C" __global__ void __launch_bounds__(64) past_the_end(float* y, Params p) {
    if (threadIdx.x <= p.count) y[threadIdx.x] = 1.0f;
}

extern "C" __global__ void __launch_bounds__(64) barrier_alone(float* y, Params p) {
    if (threadIdx.x < p.count) __syncthreads();
    y[threadIdx.x % p.count] = 1.0f;
}

extern "C" __global__ void __launch_bounds__(64) warp_parts(float* y, Params p) {
    float x = 1.0f;
    if (threadIdx.x < p.count) x = __shfl_xor_sync(0xffffffffu, x, 1);
    y[0] = x;
}

// Every thread reads what another one writes, without a barrier between.
extern "C" __global__ void __launch_bounds__(64) no_barrier(float* y, Params p) {
    __shared__ float tile[64];
    tile[threadIdx.x] = (float)threadIdx.x;
    if (threadIdx.x < p.count) y[threadIdx.x] = tile[63u - threadIdx.x] + tile[threadIdx.x / 2u];
}

extern "C" __global__ void __launch_bounds__(32) copy_not_waited_for(float* y, Params p) {
    __shared__ __align__(16) float tile[4];
    if (threadIdx.x == 0) cp_async_16(tile, y, 16);
    cp_async_commit();
    __syncthreads();
    if (threadIdx.x < p.count) y[threadIdx.x] = tile[threadIdx.x];
}

extern "C" __global__ void __launch_bounds__(32) misaligned(float* y, Params p) {
    __shared__ __align__(16) float tile[8];
    if (threadIdx.x == 0) cp_async_16(tile + 1, y, 16);
    y[threadIdx.x % p.count] = 0.0f;
}

extern "C" __global__ void __launch_bounds__(32) takes_more(float* y, float* z, Params p) { y[0] = z[0]; }
"#;

const fn broken(entry: &'static str) -> Kernel {
    let source = Source::cuda("broken.cu", BROKEN);
    let code = Code::Cuda { source, entry, constants: &[], arch: 75, tensor: &[] };
    Kernel { name: entry, code, dtypes: &[DType::F32], fits: always, plan: Plan::once }
}

/// Launches one of the kernels above on 16 floats of zeros; what came of it.
fn launch(device: &Arc<dyn Device>, entry: &'static str) -> Result<Vec<f32>, Error> {
    let buffer = device.alloc(64)?;
    device.upload(&buffer, 0, &[0; 64])?;
    let arguments = [Binding { buffer: &buffer, offset: 0, bytes: 64, write: true }];
    device.launch(&broken(entry), DType::F32, &Launch::new([1, 1, 1], Params::new().u(16)), &arguments)?;
    let mut bytes = [0; 64];
    device.download(&buffer, 0, &mut bytes)?;
    Ok(bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect())
}

#[test]
fn the_harness_reports_what_a_gpu_would_not() {
    let Some(device) = host() else { return };
    for (entry, words) in [
        ("past_the_end", "accessed argument 0 of 64 bytes at byte 64"),
        ("barrier_alone", "threads part"),
        ("warp_parts", "threads part"),
        ("misaligned", "no multiple of it"),
        ("takes_more", "takes 3 arguments, the launch gives 2"),
    ] {
        let error = launch(&device, entry).unwrap_err().to_string();
        assert!(error.contains(words) && error.contains(entry), "{entry}: {error}");
    }
    // Whatever the order of threads, some of them read what was not there yet.
    for _ in 0..3 {
        assert!(launch(&device, "no_barrier").unwrap().iter().any(|x| x.is_nan()));
    }
    assert!(launch(&device, "copy_not_waited_for").unwrap()[..4].iter().all(|x| x.is_nan()));
    // A fault leaves the process and the device as they were.
    assert!(launch(&device, "past_the_end").is_err());
    assert!(launch(&device, "no_barrier").is_ok());
}

/// A copy of `cuda/` with one file changed.
pub fn mutated(file: &str, from: &str, to: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(root().join("cuda")).unwrap() {
        let path: PathBuf = entry.unwrap().path();
        std::fs::copy(&path, folder.path().join(path.file_name().unwrap())).unwrap();
    }
    let target = folder.path().join(file);
    let text = std::fs::read_to_string(&target).unwrap();
    assert!(text.contains(from), "cuda/{file} holds no {from}");
    std::fs::write(&target, text.replacen(from, to, 1)).unwrap();
    folder
}

/// Verifies one case of an op on the host harness with the kernels of `folder`; the lines that it prints.
fn verify(folder: &Path, op: &str, case: &str) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_espalier"));
    command.env("ESPALIER_CUDA", folder);
    command.args(["kernels", "verify", "--device", "cuda-host", "--op", op, "--case", case]);
    let output = command.output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The first case of an op over 16-bit matrices that span several tiles.
fn wide_case(op: &str) -> String {
    let wide = |case: &espalier::op::Case| {
        // Some ops draw numbers and have no input.
        let Some(first) = case.inputs.first().map(|i| i.meta) else { return false };
        case.op.name() == op
            && !case.bench
            && first.dtype == DType::Bf16
            && first.shape.last() > 64
            && first.count() > 5000
    };
    FAMILIES.iter().flat_map(|f| (f.cases)()).find(wide).unwrap_or_else(|| panic!("{op} has no such case")).label()
}

#[test]
fn planted_bugs_are_caught() {
    if host().is_none() {
        return;
    }
    let fragment = "tile + place(row + lane % 16u, half * 2u + lane / 16u)";
    let swapped = "tile + place(row + lane % 16u, half * 2u + 1u - lane / 16u)";
    for (what, file, from, to, op) in [
        (
            "a missing barrier",
            "lib.cuh",
            "if (lane == 0) tile[threadIdx.x / WARP] = x;\n    __syncthreads();",
            "if (lane == 0) tile[threadIdx.x / WARP] = x;",
            "softmax",
        ),
        ("an off-by-one in a tile", "matmul.cu", "k0 + ka < p.k1 &&", "k0 + ka + 1u < p.k1 &&", "matmul"),
        ("a swapped fragment index", "gemm.cuh", fragment, swapped, "matmul"),
    ] {
        let case = wide_case(op);
        let folder = mutated(file, from, to);
        let (passed, lines) = verify(folder.path(), op, &case);
        assert!(!passed && lines.contains("FAILED"), "{what} in cuda/{file} was not caught:\n{lines}");
        // The case is one that passes with the kernels as they are.
        let (passed, lines) = verify(&root().join("cuda"), op, &case);
        assert!(passed, "{lines}");
    }
}

#[test]
fn every_kernel_compiles_for_every_architecture() {
    if let Err(e) = device::cuda::compile::nvrtc() {
        assert!(!required("nvrtc"), "{e}");
        eprintln!("skipped: {e}");
        return;
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_espalier"));
    let output = command.args(["kernels", "cuda-check", "--format", "json"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let summary: serde_json::Value = serde_json::from_str(text.trim()).unwrap_or_else(|e| panic!("{e}: {text}"));
    let failures: Vec<String> = summary["entries"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|e| !e["failures"].as_array().unwrap().is_empty())
        .map(|e| format!("{} {} {} {}: {}", e["file"], e["entry"], e["element"], e["arch"], e["failures"]))
        .collect();
    assert!(output.status.success(), "{}\n{}", summary["errors"], failures.join("\n"));
    assert!(summary["kernels"].as_u64().unwrap() > 1000, "{} kernels", summary["kernels"]);
}

#[test]
fn a_damaged_source_is_reported_with_its_place() {
    let Ok(_) = device::cuda::compile::nvrtc() else { return };
    let error = device::cuda::compile::compile("x.cu", "#line 1 \"cuda/x.cu\"\n\nint y = nosuch;\n", 80).err().unwrap();
    assert!(matches!(&error, Error::Compile { file, line: 2, .. } if file == "cuda/x.cu"), "{error}");
}

#[test]
fn cuda_without_a_driver_says_so() {
    if device::cuda_driver().is_some() {
        return;
    }
    let error = device::open("cuda").err().unwrap();
    assert!(matches!(&error, Error::NotAvailable { reason, .. } if reason.contains("libcuda")), "{error}");
    assert_eq!(error.exit_code(), 4);
}
