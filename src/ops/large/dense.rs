//! Matrix products, feed-forward blocks, attention.

use super::{BF16, Cut, F32, Large, Part, Pick};
use crate::dtype::DType;
use crate::op::{Case, Fill, Tolerance};
use crate::ops::attention::{Attention, AttentionBackward, Mask};
use crate::ops::ffn::{Ffn, FfnActivation, FfnBackward};
use crate::ops::matmul::Matmul;

/// Rows and columns of a product that are computed again.
const ROWS: Pick = Pick::Spread(48);
const COLUMNS: Pick = Pick::Spread(48);

pub(super) fn product(transpose_a: bool, transpose_b: bool, [m, n, k]: [usize; 3], dtype: DType) -> Large {
    let pair = |r: usize, c: usize, transposed: bool| if transposed { [c, r] } else { [r, c] };
    let case = Case::new(Matmul::plain(transpose_a, transpose_b), Tolerance::Contraction { k })
        .normal(&pair(m, k, transpose_a), dtype)
        .normal(&pair(k, n, transpose_b), dtype);
    let letter = |transposed| if transposed { 'T' } else { 'N' };
    let name = format!("{}{} {m} x {n} x {k} {dtype}", letter(transpose_a), letter(transpose_b));
    let a = [(usize::from(transpose_a), ROWS)];
    let b = [(1 - usize::from(transpose_b), COLUMNS)];
    let part = Part::new(&[&a, &b], &[Some(&[(0, ROWS), (1, COLUMNS)])]);
    Large::new("matmul", name, case, vec![part])
}

pub(super) fn products() -> Vec<Large> {
    let mut cases: Vec<Large> = [1024, 2048, 4096, 8192].map(|n| product(false, false, [n; 3], BF16)).into();
    // GPT-2 small's feed-forward block over 64 sequences of 1,024.
    cases.push(product(false, true, [65_536, 3072, 768], BF16));
    cases.push(product(false, true, [65_536, 768, 3072], BF16));
    // Forward, input gradient and weight gradient of a large layer.
    cases.push(product(false, true, [8192, 14_336, 4096], BF16));
    cases.push(product(false, false, [8192, 4096, 14_336], BF16));
    cases.push(product(true, false, [14_336, 4096, 8192], BF16));
    for m in [1, 16, 64, 256] {
        cases.push(product(false, true, [m, 14_336, 4096], BF16));
    }
    cases.push(product(false, false, [2048; 3], F32));
    cases.push(product(false, false, [4096; 3], F32));
    cases
}

/// Weights scaled so that z and y are of order one.
fn weight(columns: usize) -> Fill {
    Fill::Normal { mean: 0.0, deviation: 1.0 / (columns as f64).sqrt() }
}

fn block_name(activation: FfnActivation, [rows, d, f]: [usize; 3]) -> String {
    format!("{} {rows} x {d} x {f}", format!("{activation:?}").to_lowercase())
}

fn block(activation: FfnActivation, [rows, d, f]: [usize; 3]) -> Large {
    let hidden = f * activation.halves();
    let case = Case::new(Ffn { activation }, Tolerance::Contraction { k: d + f })
        .normal(&[rows, d], BF16)
        .input(&[hidden, d], BF16, weight(d))
        .normal(&[hidden], BF16)
        .input(&[d, f], BF16, weight(f))
        .normal(&[d], BF16)
        .rounded_between(&[0]);
    let some: &[Cut] = &[(0, Pick::Spread(4))];
    let part = Part::new(&[some, &[], &[], &[], &[]], &[Some(some), Some(some)]);
    Large::new("ffn", block_name(activation, [rows, d, f]), case, vec![part])
}

fn block_backward(activation: FfnActivation, [rows, d, f]: [usize; 3]) -> Large {
    let hidden = f * activation.halves();
    let case = Case::new(FfnBackward { activation }, Tolerance::Contraction { k: d + f + rows })
        .normal(&[rows, d], BF16)
        .input(&[hidden, d], BF16, weight(d))
        .input(&[d, f], BF16, weight(f))
        .normal(&[rows, hidden], BF16)
        .normal(&[rows, d], BF16)
        .rounded_between(&[0, 1, 3]);
    let some: &[Cut] = &[(0, Pick::Spread(2))];
    // The gradients of some hidden columns' weights are sums over all rows.
    let pick = if activation.halves() == 1 { Pick::Spread(3) } else { Pick::Halves(3) };
    let (down, across): ([Cut; 1], [Cut; 1]) = ([(0, pick)], [(1, pick)]);
    let hidden: &[Cut] = &[(1, Pick::Spread(3))];
    let parts = vec![
        Part::new(&[some, &[], &[], some, some], &[Some(some), None, None, None, None]),
        Part::new(&[&[], &down, hidden, &across, &[]], &[None, Some(&down), Some(&down), Some(hidden), Some(&[])]),
    ];
    Large::new("ffn", block_name(activation, [rows, d, f]), case, parts)
}

pub(super) fn blocks() -> Vec<Large> {
    let mut cases = Vec::new();
    for (activation, sizes) in [
        (FfnActivation::Relu, [[65_536, 768, 3072], [16_384, 1024, 4096], [8192, 4096, 16_384]]),
        (FfnActivation::Gelu, [[65_536, 768, 3072], [16_384, 1024, 4096], [8192, 4096, 16_384]]),
        (FfnActivation::Geglu, [[65_536, 768, 2048], [16_384, 1024, 2816], [8192, 4096, 11_008]]),
    ] {
        for size in sizes {
            cases.push(block(activation, size));
            cases.push(block_backward(activation, size));
        }
    }
    cases
}

/// B, T, S, H, D.
type Size = [usize; 5];

pub(super) fn scaled_dot(mask: Mask, lengths: bool, dim: usize, query_offset: usize) -> Attention {
    Attention { mask, lengths, bias: false, scale: 1.0 / (dim as f32).sqrt(), query_offset }
}

fn attention_name(op: &Attention, [b, t, s, h, d]: Size) -> String {
    let mask = match (op.mask, op.lengths) {
        (Mask::None, false) => "full",
        (Mask::None, true) => "padded",
        _ => "causal",
    };
    let queries = if t == s { String::new() } else { format!(" queries {t}") };
    format!("{mask} d{d} S={s}{queries} B={b} H={h}")
}

fn inputs(case: Case, op: &Attention, [b, t, s, h, d]: Size, dtype: DType) -> Case {
    let case = case.normal(&[b, t, h, d], dtype).normal(&[b, s, h, d], dtype).normal(&[b, s, h, d], dtype);
    // Between half of the keys and all of them.
    let lengths = Fill::Integers { low: s as i64 / 2, high: s as i64 };
    if op.lengths { case.input(&[b], DType::U32, lengths) } else { case }
}

/// Where queries are taken from: contiguous under a causal mask, whose op must know their first position.
fn query_picks(op: &Attention, t: usize) -> Vec<(Pick, Option<usize>)> {
    if op.mask == Mask::None {
        return vec![(Pick::Spread(4), None)];
    }
    let last = t.saturating_sub(2);
    vec![(Pick::First(2), None), (Pick::Middle(2), Some(t / 2)), (Pick::Last(2), Some(last))]
}

const BATCH: Cut = (0, Pick::Spread(2));
const HEADS: Cut = (2, Pick::Spread(2));

pub(super) fn attention_forward(op: Attention, size: Size, dtype: DType) -> Large {
    let [_, t, s, _, d] = size;
    let case = inputs(Case::new(op, Tolerance::Contraction { k: s + d }), &op, size, dtype).rounded_between(&[0]);
    let part = |(pick, offset): (Pick, Option<usize>)| {
        let (queries, keys): ([Cut; 3], [Cut; 2]) = ([BATCH, (1, pick), HEADS], [BATCH, HEADS]);
        let mut cuts: Vec<&[Cut]> = vec![&queries, &keys, &keys];
        if op.lengths {
            cuts.push(&[BATCH]);
        }
        let lse: &[Cut] = &[BATCH, (1, HEADS.1), (2, pick)];
        let part = Part::new(&cuts, &[Some(&queries), Some(lse)]);
        match offset {
            Some(first) => part.of(Attention { query_offset: op.query_offset + first, ..op }),
            None => part,
        }
    };
    let parts = query_picks(&op, t).into_iter().map(part).collect();
    Large::new("attention", attention_name(&op, size), case, parts)
}

pub(super) fn attention_backward(op: Attention, size: Size, dtype: DType) -> Large {
    let [b, t, s, h, d] = size;
    let case = Case::new(AttentionBackward(op), Tolerance::Contraction { k: s.max(t) + 4 * d });
    // Rows of P sum to about 1.
    let seen = if op.mask == Mask::None { s } else { s / 2 };
    let lse = Fill::Normal { mean: (seen as f64).ln() + 0.5, deviation: 0.3 };
    let case = inputs(case, &op, size, dtype).normal(&[b, t, h, d], dtype).input(&[b, h, t], F32, lse);
    let case = case.normal(&[b, t, h, d], dtype).rounded_between(&[0, 1, 2]);
    let (one, head): (Cut, Cut) = ((0, Pick::Last(1)), (2, Pick::Last(1)));
    let of_queries = |(pick, offset): (Pick, Option<usize>)| {
        let (queries, keys): ([Cut; 3], [Cut; 2]) = ([one, (1, pick), head], [one, head]);
        let lse: [Cut; 3] = [one, (1, head.1), (2, pick)];
        let mut cuts: Vec<&[Cut]> = vec![&queries, &keys, &keys];
        if op.lengths {
            cuts.push(&[(0, Pick::Last(1))]);
        }
        cuts.extend([&queries[..], &lse, &queries]);
        let part = Part::new(&cuts, &[Some(&queries), None, None]);
        match offset {
            Some(first) => part.of(AttentionBackward(Attention { query_offset: op.query_offset + first, ..op })),
            None => part,
        }
    };
    let mut parts: Vec<Part> = query_picks(&op, t).into_iter().map(of_queries).collect();
    // Keys whose positions do not move when the others are left out.
    let pick = if op.mask == Mask::None && !op.lengths { Pick::Spread(4) } else { Pick::First(4) };
    let (queries, keys): ([Cut; 2], [Cut; 3]) = ([one, head], [one, (1, pick), head]);
    let lse: [Cut; 2] = [one, (1, head.1)];
    let mut cuts: Vec<&[Cut]> = vec![&queries, &keys, &keys];
    if op.lengths {
        cuts.push(&[(0, Pick::Last(1))]);
    }
    cuts.extend([&queries[..], &lse, &queries]);
    parts.push(Part::new(&cuts, &[None, Some(&keys), Some(&keys)]));
    Large::new("attention", attention_name(&op, size), case, parts)
}

/// 16,384 tokens of width 2,048, as published comparisons have it.
const TOKENS: usize = 16_384;
const WIDTH: usize = 2048;

pub(super) fn attention() -> Vec<Large> {
    let mut cases = Vec::new();
    let size = |s: usize, d: usize| [TOKENS / s, s, s, WIDTH / d, d];
    for s in [512, 1024, 2048, 4096, 8192, 16_384] {
        cases.push(attention_forward(scaled_dot(Mask::None, false, 128, 0), size(s, 128), BF16));
        cases.push(attention_forward(scaled_dot(Mask::Causal, false, 128, 0), size(s, 128), BF16));
        cases.push(attention_forward(scaled_dot(Mask::Causal, false, 64, 0), size(s, 64), BF16));
    }
    for s in [1024, 2048, 4096, 16_384] {
        cases.push(attention_backward(scaled_dot(Mask::None, false, 128, 0), size(s, 128), BF16));
        cases.push(attention_backward(scaled_dot(Mask::Causal, false, 128, 0), size(s, 128), BF16));
        cases.push(attention_backward(scaled_dot(Mask::Causal, false, 64, 0), size(s, 64), BF16));
    }
    // BERT-base over short padded sentences.
    for size in [[256, 128, 128, 12, 64], [64, 512, 512, 12, 64]] {
        cases.push(attention_forward(scaled_dot(Mask::None, true, 64, 0), size, BF16));
        cases.push(attention_backward(scaled_dot(Mask::None, true, 64, 0), size, BF16));
    }
    // One query of each of 64 sequences behind 4,096 cached keys.
    cases.push(attention_forward(scaled_dot(Mask::None, false, 128, 4095), [64, 1, 4096, 16, 128], BF16));
    cases
}
