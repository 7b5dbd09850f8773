//! Warp groups of compute capability 9.0 without a GPU: the host harness runs them, and what it must catch.

use std::path::Path;
use std::process::Output;

use assert_cmd::Command;
use espalier::ops::attention::{Attention, AttentionBackward, Mask};
use espalier::rng::Stream;
use espalier::{DType, Error, Tensor, device, dispatch};

use crate::cuda::{harness, mutated, root};

/// Verifies an op as on 9.0, with the kernel files of `folder`: one case, or all.
fn verify(folder: &Path, op: &str, case: Option<&str>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_espalier"));
    command.env("ESPALIER_CUDA", folder).args(["kernels", "verify", "--device", "cuda-host:90", "--op", op]);
    command.args(case.iter().flat_map(|label| ["--case", label]));
    command.output().unwrap()
}

/// Whether this machine can run the harness.
fn host() -> bool {
    harness("cuda-host:90").is_some()
}

#[test]
fn only_emulated_architectures_are_opened() {
    let error = device::open("cuda-host:100").err().unwrap();
    assert!(matches!(error, Error::Usage { .. }), "{error}");
}

#[test]
fn warp_groups_multiply_as_the_reference_does() {
    if !host() {
        return;
    }
    let output = verify(&root().join("cuda"), "matmul", None);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// Products weigh hidden rows with 0, and 0 times NaN is NaN.
#[test]
fn what_attention_hides_may_be_nan() {
    const ROWS: usize = 200;
    const DIM: usize = 64;
    let Some(device) = harness("cuda-host:90") else { return };
    let op = Attention { mask: Mask::Causal, lengths: false, bias: false, scale: 0.125, query_offset: 0 };
    // y, dq, dk and dv in rows, where one of q, k, v and dy has a NaN in some row.
    let run = |which: usize, row: usize| {
        let tensors = [0, 1, 2, 3].map(|i| {
            let mut stream = Stream::new(i as u64 + 1, 0);
            let mut values: Vec<f64> = (0..ROWS * DIM).map(|_| stream.normal()).collect();
            if i == which {
                values[row * DIM + 3] = f64::NAN;
            }
            Tensor::from_f64(&device, &[1, ROWS, 1, DIM], DType::Bf16, &values).unwrap()
        });
        let [q, k, v, dy] = &tensors;
        let outputs = dispatch::run(&op, &[q, k, v]).unwrap();
        let grads = dispatch::run(&AttentionBackward(op), &[q, k, v, &outputs[0], &outputs[1], dy]).unwrap();
        let rows = |t: &Tensor| t.to_f64().unwrap().chunks(DIM).map(<[f64]>::to_vec).collect::<Vec<_>>();
        [rows(&outputs[0]), rows(&grads[0]), rows(&grads[1]), rows(&grads[2])]
    };
    let clean = run(4, 0);
    let check = |which: usize, row: usize, output: usize, sees: &dyn Fn(usize) -> bool| {
        let got = &run(which, row)[output];
        for (i, (got, clean)) in got.iter().zip(&clean[output]).enumerate() {
            let right = if sees(i) { got.iter().any(|x| x.is_nan()) } else { got == clean };
            assert!(right, "NaN in row {row} of input {which}, output {output}: row {i}");
        }
    };
    for row in [3, 70, 150, 199] {
        for input in [1, 2] {
            check(input, row, 0, &|t| t >= row);
            check(input, row, 1, &|t| t >= row);
        }
        for input in [0, 3] {
            check(input, row, 2, &|s| s <= row);
            check(input, row, 3, &|s| s <= row);
        }
    }
}

#[test]
fn planted_bugs_in_warp_groups_are_caught() {
    if !host() {
        return;
    }
    for Planted { what, case, file, from, to } in PLANTED {
        let folder = mutated(file, from, to);
        let (op, case) = case;
        let output = verify(folder.path(), op, Some(case));
        let lines = String::from_utf8_lossy(&output.stdout);
        let named = lines.lines().any(|l| l.contains("FAILED") && l.contains("wgmma"));
        assert!(!output.status.success() && named, "{what} in cuda/{file} was not caught:\n{lines}");
    }
}

/// The values that attention cleans are written by threads and read by products. The test above runs again, on kernels without the
/// fence between.
#[test]
fn an_operand_written_without_its_fence_is_caught() {
    if !host() {
        return;
    }
    let fence = "    proxy_fence();\n    named_barrier(COPIERS, WARP_GROUP);\n}";
    let folder = mutated("attention_wgmma.cuh", fence, "    named_barrier(COPIERS, WARP_GROUP);\n}");
    let mut test = Command::new(std::env::current_exe().unwrap());
    test.env("ESPALIER_CUDA", folder.path()).args(["--exact", "cuda_groups::what_attention_hides_may_be_nan"]);
    let output = test.output().unwrap();
    let lines = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success() && lines.contains("without a proxy fence"), "not caught:\n{lines}");
}

/// An op and the label of one of its cases.
type OneCase = (&'static str, &'static str);
/// Several tiles to a block, more steps of k than stages, ragged edges; one operand along its rows, one across.
const FLOATS: OneCase =
    ("matmul", "Matmul{transpose_a:true,transpose_b:false,epilogue:None,accumulate:false} bf16[264,264] bf16[264,520]");
const BYTES: OneCase = ("matmul_int8", "MatmulInt8{bias:true} i8[135,656] f32[135] i8[131,656] f32[131] f32[131]");
const SPARSE: OneCase =
    ("matmul_sparse24", "MatmulSparse24{bias:true} bf16[135,352] bf16[131,176] u32[131,11] bf16[131]");
const SPARSE_BYTES: OneCase = (
    "matmul_sparse24_int8",
    "MatmulSparse24Int8{bias:true} i8[135,352] f32[135] i8[131,176] u32[131,11] f32[131] f32[131]",
);
/// Groups take tiles in turns, with more steps of k than stages.
const TURNS: OneCase =
    ("ffn_relu", "Ffn{activation:Relu} bf16[270,328] bf16[280,328] bf16[280] bf16[328,280] bf16[328]");
/// Rows that threads copy.
const GATHERED: OneCase = (
    "grouped_matmul",
    "GroupedMatmul{k:2,relu:true,bias:true,gather:true,experts:2} f16[140,168] f16[2,136,168] f16[2,136] u32[280] u32[3]",
);
/// Groups that end within a stage.
const FOUR_BITS: OneCase = ("matmul_int4", "MatmulInt4{group:96,bias:false} bf16[5,2112] u32[70,264] f32[70,22]");
/// Tiles of queries that blocks walk over, more steps of keys than the ring has room for, keys that some rows do not see.
const ATTENTION: OneCase = (
    "attention",
    "Attention{mask:Causal,lengths:true,bias:false,scale:0.125,query_offset:50} \
     bf16[1,600,1,64] bf16[1,650,1,64] bf16[1,650,1,64] u32[1]",
);
const ATTENTION_BACKWARD: OneCase = (
    "attention_bwd",
    "AttentionBackward(Attention{mask:Causal,lengths:true,bias:false,scale:0.125,query_offset:50}) \
     bf16[1,600,1,64] bf16[1,650,1,64] bf16[1,650,1,64] u32[1] bf16[1,600,1,64] f32[1,1,600] bf16[1,600,1,64]",
);

/// A change of a file under `cuda/`, which `case` must notice.
struct Planted {
    what: &'static str,
    case: OneCase,
    file: &'static str,
    from: &'static str,
    to: &'static str,
}

const fn planted(
    what: &'static str,
    case: OneCase,
    file: &'static str,
    from: &'static str,
    to: &'static str,
) -> Planted {
    Planted { what, case, file, from, to }
}

const LOOP: &str = "gemm_wgmma.cuh";
const WEIGHTS: &str = "weights.cuh";
const FORWARD: &str = "attention_wgmma.cu";
const BACKWARD: &str = "attention_bwd_wgmma.cu";
const PLANTED: [Planted; 37] = [
    planted(
        "blocks of m and n a step of k apart",
        FLOATS,
        "wgmma.cuh",
        "BLOCKS ? WGMMA_BLOCK >> 4",
        "BLOCKS ? 1024u >> 4",
    ),
    planted("a stage read before it is full", FLOATS, LOOP, "mbarrier_wait(place.full(), place.parity);", ""),
    planted("a stage filled before it is empty", FLOATS, LOOP, "mbarrier_wait(place.empty(), place.parity ^ 1u);", ""),
    planted("a stage given back while products read it", FLOATS, LOOP, "wgmma_wait<1>();", ""),
    planted(
        "a stage of which a part is waited for",
        FLOATS,
        LOOP,
        "mbarrier_arrive_expect(place.full(), (ROWS + COLUMNS) * 128u)",
        "mbarrier_arrive_expect(place.full(), ROWS * 128u)",
    ),
    planted("barriers used before they are made", FLOATS, LOOP, "    else __syncthreads();\n", ""),
    planted(
        "barriers used before other blocks have made them",
        FLOATS,
        LOOP,
        "if (Stages::CLUSTER > 1u) cluster_barrier();\n    else __syncthreads();",
        "__syncthreads();",
    ),
    planted(
        "a stage given back to one's own block alone",
        FLOATS,
        LOOP,
        "mbarrier_arrive_at(empty, lane)",
        "mbarrier_arrive_at(empty, cluster_rank())",
    ),
    planted("a half that the other block never gets", FLOATS, LOOP, "k0, batch, 3u)", "k0, batch, 1u)"),
    planted(
        "a block that ends before its neighbour",
        FLOATS,
        LOOP,
        "    if (Stages::CLUSTER > 1u) cluster_barrier();\n}",
        "}",
    ),
    planted(
        "rows copied by threads without a fence",
        GATHERED,
        LOOP,
        "        proxy_fence();\n        __syncwarp();",
        "        __syncwarp();",
    ),
    planted("a turn not waited for", TURNS, LOOP, "if (Stages::TURNS && turn > 1u)", "if (false)"),
    planted("products without their fence", FLOATS, LOOP, "        wgmma_fence();\n", ""),
    planted("a turn by 64 bytes", FLOATS, "wgmma.cuh", "(u64)1u << 62", "(u64)2u << 62"),
    planted("steps of k of the wrong length", FLOATS, "wgmma.cuh", "BLOCKS ? 2048u : 32u", "BLOCKS ? 1024u : 32u"),
    planted(
        "fragments' rows exchanged",
        FLOATS,
        LOOP,
        "sums[(first + j) * 4u + half * 2u]",
        "sums[(first + j) * 4u + (1u - half) * 2u]",
    ),
    planted(
        "another step of w",
        BYTES,
        "quant_matmul_wgmma.cu",
        "(stage + B, part * 32u)",
        "(stage + B, (part ^ 1u) * 32u)",
    ),
    planted("another row's scale", BYTES, "quant_matmul_wgmma.cu", "half * 2u], x[half]", "half * 2u], x[0]"),
    planted("operands written while products read them", SPARSE, WEIGHTS, "wgmma_wait<0>();", "wgmma_wait<1>();"),
    planted("outputs not turned", SPARSE, WEIGHTS, "movmatrix(", "("),
    planted(
        "places of the other half",
        SPARSE,
        "sparse24_matmul_wgmma.cu",
        "threadIdx.x & 1u ? first",
        "threadIdx.x & 2u ? first",
    ),
    planted(
        "places of other rows",
        SPARSE_BYTES,
        "sparse24_matmul_wgmma.cu",
        "row + threadIdx.x % 2u * 8u",
        "row + threadIdx.x / 2u % 2u * 8u",
    ),
    planted("a stage never given back", FOUR_BITS, WEIGHTS, "if (signals) mbarrier_arrive(place.empty());", ""),
    planted(
        "rows and halves of k exchanged",
        FOUR_BITS,
        "quant_int4_wgmma.cu",
        "[lane % 2u + word % 2u * 2u]",
        "[lane % 2u * 2u + word % 2u]",
    ),
    planted(
        "a part's scale for the next one",
        FOUR_BITS,
        "quant_int4_wgmma.cu",
        "group += ends ? 1u : 0u",
        "group += 1u",
    ),
    planted("a part without its fence", FOUR_BITS, "quant_int4_wgmma.cu", "                wgmma_fence();\n", ""),
    planted(
        "values read before they have come",
        ATTENTION,
        FORWARD,
        "mbarrier_wait(values.full(), values.parity);",
        "",
    ),
    planted("queries replaced while they are read", ATTENTION, FORWARD, "mbarrier_wait(s.free, before % 2u ^ 1u);", ""),
    planted(
        "sums scaled before their product is done",
        ATTENTION,
        FORWARD,
        "            wgmma_wait<0>();\n            hold(sum);\n            restores",
        "            restores",
    ),
    planted("a turn that nobody takes", ATTENTION, FORWARD, "if (--left > 0u || group == 0u)", "if (--left < 99u)"),
    planted(
        "weights of other rows",
        ATTENTION,
        "attention_wgmma.cuh",
        "weights[i / 4u][i % 4u] =",
        "weights[i / 4u][(i ^ 1u) % 4u] =",
    ),
    planted(
        "slopes weigh another step's keys",
        ATTENTION_BACKWARD,
        BACKWARD,
        "(sum, slopes, last.tile(), 1u);",
        "(sum, slopes, place.tile(), 1u);",
    ),
    planted("another row's statistics", ATTENTION_BACKWARD, BACKWARD, "weight, stats + STEP_ROWS", "weight, stats"),
    planted(
        "a stage given back too early",
        ATTENTION_BACKWARD,
        BACKWARD,
        "release(last.empty());",
        "release(place.empty());",
    ),
    planted("statistics that are not waited for", ATTENTION_BACKWARD, BACKWARD, "2u * TILE + BYTES", "2u * TILE"),
    planted(
        "a product read before it is done",
        ATTENTION_BACKWARD,
        BACKWARD,
        "        wgmma_wait<1>();\n        hold(product);",
        "        hold(product);",
    ),
    planted(
        "rows replaced while they are read",
        ATTENTION_BACKWARD,
        BACKWARD,
        "mbarrier_wait(s.free, before % 2u ^ 1u);",
        "",
    ),
];
