//! Warp groups of compute capability 9.0 without a GPU: the host harness runs them, and what it must catch.

use std::path::Path;
use std::process::Output;

use assert_cmd::Command;
use espalier::{Error, device};

use crate::cuda::{harness, mutated, root};

/// Verifies matrix products as on 9.0, with the kernel files of `folder`: one case, or all.
fn verify(folder: &Path, case: Option<&str>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_espalier"));
    command.env("ESPALIER_CUDA", folder).args(["kernels", "verify", "--device", "cuda-host:90", "--op", "matmul"]);
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
    let output = verify(&root().join("cuda"), None);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn planted_bugs_in_warp_groups_are_caught() {
    if !host() {
        return;
    }
    const KERNEL: &str = "matmul_wgmma.cu";
    for (what, file, from, to) in PLANTED {
        let file = if file.is_empty() { KERNEL } else { file };
        let folder = mutated(file, from, to);
        let output = verify(folder.path(), Some(CASE));
        let lines = String::from_utf8_lossy(&output.stdout);
        let named = lines.lines().any(|l| l.contains("FAILED") && l.contains("wgmma"));
        assert!(!output.status.success() && named, "{what} in cuda/{file} was not caught:\n{lines}");
    }
}

/// Several tiles to a block, more steps of k than stages, ragged edges; one operand along its rows, one across.
const CASE: &str =
    "Matmul{transpose_a:true,transpose_b:false,epilogue:None,accumulate:false} bf16[264,264] bf16[264,520]";

/// What is wrong, the file (else the kernel's), and the change.
const PLANTED: [(&str, &str, &str, &str); 10] = [
    ("blocks of m and n a step of k apart", "wgmma.cuh", "BLOCKS ? WGMMA_BLOCK >> 4", "BLOCKS ? 1024u >> 4"),
    ("a stage that is read before it is full", "", "mbarrier_wait(s.full + at.stage, at.parity);", ""),
    ("a stage that is filled before it is empty", "", "mbarrier_wait(s.empty + at.stage, at.parity ^ 1u);", ""),
    ("a stage that is given back while products read it", "", "wgmma_wait<1>();", ""),
    (
        "a stage of which a part is waited for",
        "",
        "mbarrier_arrive_expect(full, Shared::STAGE)",
        "mbarrier_arrive_expect(full, Shared::A)",
    ),
    ("barriers used before they are made", "", "    __syncthreads();\n", ""),
    ("products without their fence", "", "        wgmma_fence();\n", ""),
    ("a turn by 64 bytes", "wgmma.cuh", "(u64)1u << 62", "(u64)2u << 62"),
    ("steps of k of the wrong length", "wgmma.cuh", "BLOCKS ? 2048u : 32u", "BLOCKS ? 1024u : 32u"),
    ("fragments' rows exchanged", "", "sums[(j0 + j) * 4u + half * 2u]", "sums[(j0 + j) * 4u + (1u - half) * 2u]"),
];
