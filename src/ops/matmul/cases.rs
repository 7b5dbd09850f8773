//! Rows of the table for the matrix product.

use super::{Epilogue, Matmul};
use crate::dtype::DType;
use crate::op::{Case, Fill, Tolerance};

/// A case of `op` on a batch of m x k times k x n; `lead_a`, `lead_b` are the leading axes.
fn product(op: Matmul, lead_a: &[usize], lead_b: &[usize], [m, n, k]: [usize; 3], dtype: DType) -> Case {
    let pair = |lead: &[usize], r, c, transposed| [lead, &if transposed { [c, r] } else { [r, c] }].concat();
    let case = Case::new(op, Tolerance::Contraction { k })
        .normal(&pair(lead_a, m, k, op.transpose_a), dtype)
        .normal(&pair(lead_b, k, n, op.transpose_b), dtype);
    let case = if op.epilogue.has_bias() { case.normal(&[n], dtype) } else { case };
    let lead = if lead_a.is_empty() { lead_b } else { lead_a };
    if op.accumulate { case.normal(&pair(lead, m, n, false), dtype) } else { case }
}

/// Sizes around every tile edge: registers (8, 14, 16, 32), workgroup tiles (64), blocks of k (256, 512).
const EDGES: [[usize; 3]; 14] = [
    [1, 1, 1],
    [2, 3, 5],
    [7, 13, 11],
    [8, 8, 8],
    [9, 17, 4],
    [13, 31, 33],
    [15, 33, 65],
    [29, 63, 64],
    [63, 65, 63],
    [64, 64, 128],
    [65, 63, 66],
    [16, 48, 255],
    [17, 40, 257],
    [3, 130, 515],
];

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let layouts = [(false, false), (false, true), (true, false), (true, true)];
    for (ta, tb) in layouts {
        let plain = Matmul::plain(ta, tb);
        for (index, size) in EDGES.into_iter().enumerate() {
            let case = product(plain, &[], &[], size, DType::F32);
            cases.push(if index < 5 { case.grad() } else { case });
        }
        for dtype in [DType::F16, DType::Bf16] {
            // The last has rows that 16-byte copies can read in every layout, and a few tiles of 128 with ragged edges.
            for size in [[1, 1, 1], [7, 13, 11], [17, 33, 40], [65, 63, 66], [136, 152, 232]] {
                cases.push(product(plain, &[], &[], size, dtype));
            }
        }
        // Tiles of many shapes, several of each down and across.
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            for size in [[9, 580, 31], [150, 150, 31]] {
                cases.push(product(plain, &[], &[], size, dtype));
            }
        }
        // Several tiles of 128x256 to a block of threads that walks over them, and batches with shared or own matrices.
        cases.push(product(plain, &[], &[], [264, 520, 264], DType::Bf16));
        cases.push(product(plain, &[3], &[3], [136, 72, 200], DType::F16));
        cases.push(product(plain, &[], &[2], [40, 264, 136], DType::Bf16));
        cases.push(product(plain, &[2], &[], [72, 136, 72], DType::Bf16));
        let add_rows = Matmul { accumulate: true, ..plain };
        cases.push(product(add_rows, &[2], &[2], [200, 88, 72], DType::Bf16));
        // A sum over nothing is zero, not what was there; a result of no elements is no launch.
        cases.push(product(plain, &[], &[], [3, 5, 0], DType::F32));
        cases.push(product(plain, &[], &[], [0, 5, 3], DType::F32));
        // Batches: equal leading axes, b shared, a shared.
        cases.push(product(plain, &[3], &[3], [5, 7, 4], DType::F32).grad());
        cases.push(product(plain, &[2, 3], &[2, 3], [9, 16, 11], DType::F32));
        cases.push(product(plain, &[2, 3], &[], [5, 7, 4], DType::F32).grad());
        cases.push(product(plain, &[], &[3], [5, 7, 4], DType::F32).grad());
        cases.push(product(plain, &[4], &[4], [16, 33, 64], DType::Bf16));
        let add = Matmul { accumulate: true, ..plain };
        cases.push(product(add, &[], &[], [7, 13, 11], DType::F32));
        cases.push(product(add, &[3], &[3], [65, 64, 5], DType::F32));
        cases.push(product(add, &[], &[], [17, 33, 40], DType::F16));
    }
    for epilogue in [Epilogue::Bias, Epilogue::BiasRelu, Epilogue::BiasGelu] {
        let op = Matmul { epilogue, ..Matmul::linear() };
        for (index, size) in [[1, 1, 1], [2, 3, 5], [7, 13, 11], [33, 65, 63], [64, 64, 300]].into_iter().enumerate() {
            let case = product(op, &[], &[], size, DType::F32);
            // One ReLU input in a thousand lies within the step of a difference: small cases only, seeds are fixed.
            cases.push(if index < 3 { case.grad() } else { case });
        }
        for dtype in [DType::F16, DType::Bf16] {
            cases.push(product(op, &[2, 5], &[], [7, 13, 11], dtype));
            cases.push(product(op, &[], &[], [65, 63, 66], dtype));
            cases.push(product(op, &[], &[], [200, 333, 72], dtype));
        }
        cases.push(product(Matmul { transpose_b: false, ..op }, &[3], &[], [4, 9, 6], DType::F32).grad());
        cases.push(product(Matmul { transpose_a: true, ..op }, &[3], &[], [4, 9, 6], DType::F32).grad());
        cases.push(product(op, &[], &[], [3, 5, 0], DType::F32));
    }
    cases.push(product(
        Matmul { epilogue: Epilogue::Bias, accumulate: true, ..Matmul::default() },
        &[],
        &[],
        [5, 33, 12],
        DType::F32,
    ));
    // A vector times a matrix.
    cases.push(
        Case::new(Matmul::linear(), Tolerance::Contraction { k: 40 })
            .normal(&[40], DType::F32)
            .normal(&[9, 40], DType::F32)
            .grad(),
    );
    // k above what software drivers let one invocation count; unit inputs, so that the sum shows every dropped term.
    let ones = Fill::Values(vec![1.0; 70_001]);
    let long = Case::new(Matmul::linear(), Tolerance::Contraction { k: 70_001 });
    cases.push(long.input(&[1, 70_001], DType::F32, ones.clone()).input(&[1, 70_001], DType::F32, ones));
    // More batches than one launch has groups in z.
    cases.push(product(Matmul::default(), &[65_537], &[65_537], [1, 2, 3], DType::F32));
    models(&mut cases);
    cases
}

/// Sizes of real models.
fn models(cases: &mut Vec<Case>) {
    let (nn, nt, tn) = (Matmul::default(), Matmul::linear(), Matmul::plain(true, false));
    for size in [64, 128, 256, 512, 1024] {
        cases.push(product(nn, &[], &[], [size; 3], DType::F32).bench());
    }
    // GPT-2 small over 128 tokens: attention projection, its input gradient and its weight gradient.
    cases.push(product(nt, &[], &[], [128, 768, 768], DType::F32).bench());
    cases.push(product(nn, &[], &[], [128, 768, 768], DType::F32).bench());
    cases.push(product(tn, &[], &[], [768, 768, 128], DType::F32).bench());
    // Its up-projection with the activation, in every storage type.
    for &dtype in DType::FLOATS {
        let op = Matmul { epilogue: Epilogue::BiasGelu, ..nt };
        cases.push(product(op, &[], &[], [64, 3072, 768], dtype).bench());
    }
    // One token of a decoder: a product with a vector.
    cases.push(product(nt, &[], &[], [1, 3072, 768], DType::F32).bench());
    // Attention scores of 12 heads of 64 over 128 tokens.
    cases.push(product(nt, &[12], &[12], [128, 128, 64], DType::F32).bench());
}
