//! CUDA sources: what is joined in front of a family's file, and what can be read off it without compiling.

use std::fmt::Write;

use super::{Constants, File, read_override};
use crate::dtype::DType;
use crate::error::Result;

/// Compute capability (times 10) that kernels without a tensor instruction ask for: Turing.
pub const LOWEST_ARCH: u32 = 75;
/// The capabilities that every kernel is compiled for without a GPU: Turing, Ampere, Hopper, Blackwell.
pub const ARCHS: [u32; 4] = [75, 80, 90, 100];

const PRELUDE: [File; 12] = [
    File::own("elem.cuh", include_str!("../../cuda/elem.cuh")),
    File::own("lib.cuh", include_str!("../../cuda/lib.cuh")),
    File::own("mma.cuh", include_str!("../../cuda/mma.cuh")),
    File::own("gemm.cuh", include_str!("../../cuda/gemm.cuh")),
    File::own("wgmma.cuh", include_str!("../../cuda/wgmma.cuh")),
    File::own("gemm_wgmma.cuh", include_str!("../../cuda/gemm_wgmma.cuh")),
    File::own("linear_loss.cuh", include_str!("../../cuda/linear_loss.cuh")),
    File::own("weights.cuh", include_str!("../../cuda/weights.cuh")),
    File::own("requantize.cuh", include_str!("../../cuda/requantize.cuh")),
    File::own("attention.cuh", include_str!("../../cuda/attention.cuh")),
    File::own("attention_bwd.cuh", include_str!("../../cuda/attention_bwd.cuh")),
    File::own("attention_wgmma.cuh", include_str!("../../cuda/attention_wgmma.cuh")),
];

/// Full CUDA source of a kernel file for one element type and compute capability. `#line` keeps messages pointing at the
/// files. With `ESPALIER_CUDA` set to a folder the files are read from there, so that a kernel can be tuned without a rebuild.
pub fn assemble(file: File, element: DType, constants: Constants, arch: u32) -> Result<String> {
    let mut text = format!("#define ARCH {arch}\n#define ELEMENT_{} 1\n", element.name().to_uppercase());
    for (name, value) in constants {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "#define {name} {value}");
    }
    for part in PRELUDE.iter().chain([&file]) {
        let body = read_override("ESPALIER_CUDA", part)?;
        let _ = writeln!(text, "#line 1 \"cuda/{}\"\n{body}", part.name);
    }
    Ok(text)
}

/// An entry of a CUDA file as its text declares it: `extern "C" __global__ void __launch_bounds__(THREADS) NAME(`, with
/// `__cluster_dims__(BLOCKS, 1, 1)` before the name where blocks run in clusters.
#[derive(Clone, Debug, PartialEq)]
pub struct Declared {
    pub name: String,
    /// Threads of a block; blocks have one dimension.
    pub threads: u32,
    /// Blocks of a cluster, neighbours along x.
    pub cluster: u32,
}

/// The entries of an assembled source, in order. Threads that are not a plain number count as 0, which no launch allows.
pub fn declared(text: &str) -> Vec<Declared> {
    let first = |list: &str| list.split(',').next().unwrap_or("").trim().parse().unwrap_or(0);
    let entry = |part: &str| {
        let (bounds, rest) = part.split_once(')')?;
        let clusters = rest.trim_start().strip_prefix("__cluster_dims__(").and_then(|rest| rest.split_once(')'));
        let (cluster, rest) = clusters.map_or((1, rest), |(blocks, rest)| (first(blocks), rest));
        let (name, _) = rest.split_once('(')?;
        Some(Declared { name: name.trim().to_string(), threads: first(bounds), cluster })
    };
    text.split("__global__ void __launch_bounds__(").skip(1).filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_off_the_text() {
        let text = "extern \"C\" __global__ void __launch_bounds__(64) one(const E* x) {}\n\
                    extern \"C\" __global__ void __launch_bounds__(256, 2) two(\n    E* y) {}\n\
                    extern \"C\" __global__ void __launch_bounds__(384, 1) __cluster_dims__(2, 1, 1)\nthree(E* y) {}\n";
        let entry = |name: &str, threads, cluster| Declared { name: name.into(), threads, cluster };
        assert_eq!(declared(text), [entry("one", 64, 1), entry("two", 256, 1), entry("three", 384, 2)]);
    }
}
