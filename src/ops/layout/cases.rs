//! The layout family's rows of the table.

use super::{Concat, Fill, GatherRows, Pad, Permute, ScatterAddRows, Slice};
use crate::dtype::DType;
use crate::op::{Case, Fill as Draw, Tolerance};
use crate::shape::Shape;

/// Whole numbers over the whole range of words: bit patterns that are NaN or subnormal as f32.
const ANY_WORD: Draw = Draw::Integers { low: 0, high: u32::MAX as i64 };

fn exact(op: impl crate::op::Op) -> Case {
    Case::new(op, Tolerance::Exact)
}

/// f32 cases are differenced while they are small; all types are verified, u32 as plain words.
fn push_moves(cases: &mut Vec<Case>, make: impl Fn() -> Case, inputs: &[&[usize]]) {
    for dtype in [DType::F32, DType::F16, DType::Bf16, DType::U32] {
        let draw = if dtype == DType::U32 { ANY_WORD } else { Draw::NORMAL };
        let case = inputs.iter().fold(make(), |case, dims| case.input(dims, dtype, draw.clone()));
        let small = case.inputs.iter().map(|i| i.meta.count()).sum::<usize>() < 600;
        cases.push(if small && dtype == DType::F32 { case.grad() } else { case });
    }
}

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let orders: [(&[usize], &[usize]); 11] = [
        (&[1], &[0]),
        (&[7, 5], &[1, 0]),
        (&[17, 64], &[1, 0]),
        (&[2, 3, 5], &[0, 1, 2]),
        (&[3, 4, 5], &[2, 0, 1]),
        (&[2, 65, 33], &[0, 2, 1]),
        (&[2, 5, 3, 8], &[0, 2, 1, 3]),
        (&[2, 5, 3, 7], &[0, 2, 3, 1]),
        (&[2, 1, 3, 1, 4], &[4, 1, 2, 3, 0]),
        (&[2, 3, 2, 3, 2, 3], &[5, 3, 1, 4, 2, 0]),
        (&[127, 129], &[1, 0]),
    ];
    for (dims, order) in orders {
        push_moves(&mut cases, || exact(Permute { order: order.to_vec() }), &[dims]);
    }
    for (dims, axis, start, length) in [
        (&[1][..], 0, 0, 1),
        (&[9], 0, 3, 5),
        (&[4, 7], 1, 6, 1),
        (&[4, 7], 0, 1, 2),
        (&[3, 5, 17], 1, 2, 3),
        (&[65, 130], 1, 65, 65),
    ] {
        push_moves(&mut cases, || exact(Slice { axis, start, length }), &[dims]);
    }
    for (dims, axis, before, after) in
        [(&[1][..], 0, 0, 0), (&[5], 0, 1, 2), (&[3, 5, 17], 1, 2, 1), (&[3, 5, 7], 2, 0, 4), (&[64, 63], 0, 1, 0)]
    {
        push_moves(&mut cases, || exact(Pad { axis, before, after }), &[dims]);
    }
    push_moves(&mut cases, || exact(Concat { axis: 0 }), &[&[1], &[1]]);
    push_moves(&mut cases, || exact(Concat { axis: 1 }), &[&[3, 5], &[3, 1], &[3, 8]]);
    push_moves(&mut cases, || exact(Concat { axis: 1 }), &[&[2, 3, 4], &[2, 2, 4]]);
    push_moves(&mut cases, || exact(Concat { axis: 0 }), &[&[2], &[3], &[1], &[4], &[5], &[1], &[7]]);
    push_moves(&mut cases, || exact(Concat { axis: 0 }), &[&[64, 65], &[3, 65]]);
    push_rows(&mut cases);
    for dtype in [DType::F32, DType::F16, DType::Bf16, DType::U32] {
        for (value, dims) in [(0.0, &[1][..]), (1.5, &[]), (3.0, &[65, 7]), (40_000.3, &[1_025])] {
            let Ok(dims) = Shape::new(dims) else { continue };
            cases.push(exact(Fill { value, dims, dtype }));
        }
    }
    // Heads of GPT-2 small brought to the front, a transposed weight of it.
    cases.push(exact(Permute { order: vec![0, 2, 1, 3] }).normal(&[4, 256, 12, 64], DType::F32).bench());
    cases.push(exact(Permute { order: vec![1, 0] }).normal(&[768, 3072], DType::F32).bench());
    cases
}

/// Ids run a little past the end, to rows that do not exist.
fn push_rows(cases: &mut Vec<Case>) {
    let ids = |rows: usize| Draw::Integers { low: 0, high: rows as i64 + rows as i64 / 8 };
    for (rows, width, count) in
        [(1, 1, &[1][..]), (5, 3, &[7]), (17, 64, &[3, 5]), (64, 65, &[63]), (100, 5, &[257]), (3, 33, &[500])]
    {
        for dtype in [DType::F32, DType::F16, DType::Bf16, DType::U32] {
            let draw = if dtype == DType::U32 { ANY_WORD } else { Draw::NORMAL };
            let case = exact(GatherRows).input(&[rows, width], dtype, draw);
            let case = case.input(count, DType::U32, ids(rows));
            let small = rows * width < 2000 && dtype == DType::F32;
            cases.push(if small { case.grad() } else { case });
        }
        for &dtype in DType::FLOATS {
            let sources: usize = count.iter().product();
            let terms = Tolerance::Contraction { k: sources.div_ceil(rows) * 3 };
            let dims: Vec<usize> = count.iter().copied().chain([width]).collect();
            let case = Case::new(ScatterAddRows { rows }, terms).normal(&dims, dtype);
            let case = case.input(count, DType::U32, ids(rows));
            cases.push(if dtype == DType::F32 && sources * width < 2000 { case.grad() } else { case });
        }
    }
    // More sources than one list may hold, most of them of one row; more rows than sources.
    let many =
        Case::new(ScatterAddRows { rows: 3 }, Tolerance::Contraction { k: 33_000 }).normal(&[33_000, 2], DType::F32);
    cases.push(many.input(&[33_000], DType::U32, Draw::Integers { low: 0, high: 2 }));
    let sparse =
        Case::new(ScatterAddRows { rows: 5_000 }, Tolerance::Contraction { k: 4 }).normal(&[40, 9], DType::F32);
    cases.push(sparse.input(&[40], DType::U32, ids(5_000)));
    // Token embeddings of BERT tiny over 2,048 tokens.
    let tokens = Draw::Integers { low: 0, high: 30_521 };
    let gather = exact(GatherRows).input(&[30_522, 128], DType::F32, Draw::Integers { low: -9, high: 9 });
    cases.push(gather.input(&[2048], DType::U32, tokens.clone()).bench());
    let scatter = Case::new(ScatterAddRows { rows: 30_522 }, Tolerance::Contraction { k: 16 });
    cases.push(scatter.normal(&[2048, 128], DType::F32).input(&[2048], DType::U32, tokens).bench());
}
