//! What compression leaves: 2:4 weights, int8 and int4 weights, experts.

use super::{BF16, Cut, F32, Large, POSITIVE, Part, Pick, below};
use crate::dtype::DType;
use crate::op::{Case, Fill, Tolerance};
use crate::ops::moe::{
    GroupedBackwardInput, GroupedBackwardWeight, GroupedMatmul, MoeCombine, MoeDispatch, MoeGate, routing,
};
use crate::ops::quant::{FakeQuant, Granularity, GridFrom, MatmulInt4, MatmulInt8, Scheme};
use crate::ops::sparse24::{Compress24, Form24, Mask24, MatmulSparse24, MatmulSparse24Int8, random_mask};
use crate::ops::sparse24_pack::{meta_words, random_meta};

const ROWS: &[Cut] = &[(0, Pick::Spread(40))];
const PRODUCT: &[Cut] = &[(0, Pick::Spread(40)), (1, Pick::Spread(40))];
const NARROW: Fill = Fill::Integers { low: -127, high: 127 };
const SCALES: Fill = Fill::Uniform { low: 1e-3, high: 2e-2 };

/// One large layer's weight.
const LAYER: [usize; 2] = [14_336, 4096];

fn sparse_product([m, n, k]: [usize; 3]) -> Large {
    let case = Case::new(MatmulSparse24 { bias: false }, Tolerance::Contraction { k: k / 2 });
    let case = case.normal(&[m, k], BF16).normal(&[n, k / 2], BF16);
    let case = case.input(&[n, meta_words(k)], DType::U32, Fill::Custom(random_meta));
    let part = Part::new(&[ROWS; 3], &[Some(PRODUCT)]);
    Large::new("sparse24", format!("2:4 {m} x {n} x {k} bf16"), case, vec![part])
}

fn sparse_int8([m, n, k]: [usize; 3]) -> Large {
    let case = Case::new(MatmulSparse24Int8 { bias: false }, Tolerance::Contraction { k: 4 });
    let case = case.input(&[m, k], DType::I8, NARROW).input(&[m], F32, SCALES).input(&[n, k / 2], DType::I8, NARROW);
    let case = case.input(&[n, meta_words(k)], DType::U32, Fill::Custom(random_meta)).input(&[n], F32, SCALES);
    let part = Part::new(&[ROWS; 5], &[Some(PRODUCT)]);
    Large::new("sparse24", format!("2:4 {m} x {n} x {k} int8"), case, vec![part])
}

pub(super) fn sparse() -> Vec<Large> {
    let [n, k] = LAYER;
    let mut cases: Vec<Large> = [2048, 4096, 8192].map(|n| sparse_product([n; 3])).into();
    cases.extend([1, 16, 32, 512, 8192].map(|m| sparse_product([m, n, k])));
    cases.extend([16, 8192].map(|m| sparse_int8([m, n, k])));
    cases.push(sparse_int8([8192; 3]));
    // Groups of four, and blocks of four by four, stay whole.
    let edge: &[Cut] = &[(0, Pick::Middle(8))];
    let dims = [8192, 8192];
    for (form, name) in [(Form24::OneDimensional, "mask by rows"), (Form24::TwoDimensional, "mask by blocks")] {
        let case = Case::new(Mask24 { form }, Tolerance::Exact).normal(&dims, BF16);
        cases.push(Large::new(
            "sparse24",
            format!("{name} 8192 x 8192"),
            case,
            vec![Part::new(&[edge], &[Some(edge)])],
        ));
    }
    let case = Case::new(Compress24, Tolerance::Exact).normal(&dims, BF16);
    let case = case.input(&dims, BF16, Fill::Custom(random_mask));
    let part = Part::new(&[edge, edge], &[Some(edge), Some(edge)]);
    cases.push(Large::new("sparse24", "compress 8192 x 8192".into(), case, vec![part]));
    cases
}

fn int8([m, n, k]: [usize; 3]) -> Large {
    let case = Case::new(MatmulInt8 { bias: false }, Tolerance::Contraction { k: 4 });
    let case = case.input(&[m, k], DType::I8, NARROW).input(&[m], F32, SCALES);
    let case = case.input(&[n, k], DType::I8, NARROW).input(&[n], F32, SCALES);
    Large::new("int8", format!("int8 {m} x {n} x {k}"), case, vec![Part::new(&[ROWS; 4], &[Some(PRODUCT)])])
}

fn int4([m, n, k]: [usize; 3]) -> Large {
    const GROUP: usize = 128;
    let case = Case::new(MatmulInt4 { group: GROUP, bias: false }, Tolerance::Contraction { k });
    let words = Fill::Integers { low: 0, high: i64::from(u32::MAX) };
    let case = case.normal(&[m, k], BF16).input(&[n, k / 8], DType::U32, words);
    let case = case.input(&[n, k / GROUP], F32, SCALES);
    Large::new("int4", format!("int4 {m} x {n} x {k}"), case, vec![Part::new(&[ROWS; 3], &[Some(PRODUCT)])])
}

/// Ranges that leave some elements outside: -a, a, -b, b and so on.
fn ranges(seed: u64, shape: &crate::shape::Shape) -> Vec<f64> {
    let mut stream = crate::rng::Stream::new(seed, 0x9a9e);
    let bound = (0..shape.count() / 2).map(|_| 1.5 + stream.uniform());
    bound.flat_map(|a| [-a, a]).collect()
}

fn fake_quant(granularity: Granularity, dims: [usize; 2], name: &str) -> Large {
    let op = FakeQuant { bits: 8, scheme: Scheme::SymmetricFull, granularity, from: GridFrom::Range };
    let groups = if granularity == Granularity::Tensor { 1 } else { dims[0] };
    let case = Case::new(op, Tolerance::Exact).normal(&dims, F32);
    let case = case.input(&[groups, 2], F32, Fill::Custom(ranges));
    let range: &[Cut] = if groups == 1 { &[] } else { ROWS };
    let name = format!("fake-quant {name} {} x {}", dims[0], dims[1]);
    Large::new("fake_quant", name, case, vec![Part::new(&[ROWS, range], &[Some(ROWS)])])
}

pub(super) fn narrow() -> Vec<Large> {
    let [n, k] = LAYER;
    let mut cases = vec![
        fake_quant(Granularity::Tensor, [8192, 8192], "per tensor"),
        fake_quant(Granularity::Channel, [8192, 8192], "per channel"),
        // A group that is a whole row: the same memory as 64 groups in each row of 8,192.
        fake_quant(Granularity::Group(128), [524_288, 128], "per group"),
        int8([4096; 3]),
        int8([8192; 3]),
        int8([32, n, k]),
        int8([8192, n, k]),
    ];
    cases.extend([1, 16, 64, 256, 512].map(|m| int4([m, n, k])));
    cases
}

/// Tokens, experts, experts per token, width, width of an expert.
type Size = [usize; 5];
/// Columns of the experts' weights that are computed again, for all rows.
const ACROSS: &[Cut] = &[(1, Pick::Spread(2))];
const LAST: &[Cut] = &[(2, Pick::Spread(2))];

fn expert_name([m, experts, k, d, n]: Size) -> String {
    format!("experts {m} x {d} x {n}, {k} of {experts}")
}

fn order_of([m, experts, k, ..]: Size) -> [Fill; 2] {
    let route = routing(m, k, experts);
    [Fill::Values(route.order), Fill::Values(route.offsets)]
}

fn grouped(size: Size) -> Large {
    let [m, experts, k, d, n] = size;
    let [order, offsets] = order_of(size);
    let op = GroupedMatmul { k, relu: false, bias: false, gather: true, experts };
    let case = Case::new(op, Tolerance::Contraction { k: d }).normal(&[m, d], BF16).normal(&[experts, n, d], BF16);
    let case = case.input(&[m * k], DType::U32, order).input(&[experts + 1], DType::U32, offsets);
    let part = Part::new(&[&[], ACROSS, &[], &[]], &[Some(ACROSS)]);
    Large::new("experts", expert_name(size), case, vec![part])
}

fn grouped_backward(size: Size) -> [Large; 2] {
    let [m, experts, k, d, n] = size;
    let [order, offsets] = order_of(size);
    let rows = m * k;
    let case = Case::new(GroupedBackwardInput { experts }, Tolerance::Contraction { k: n }).normal(&[rows, n], BF16);
    let case = case.normal(&[experts, n, d], BF16).input(&[experts + 1], DType::U32, offsets.clone());
    let part = Part::new(&[&[], LAST, &[]], &[Some(ACROSS)]);
    let input = Large::new("experts", expert_name(size), case, vec![part]);
    let op = GroupedBackwardWeight { k, gather: true, experts };
    let case = Case::new(op, Tolerance::Contraction { k: rows }).normal(&[rows, n], BF16).normal(&[m, d], BF16);
    let case = case.input(&[rows], DType::U32, order).input(&[experts + 1], DType::U32, offsets);
    let part = Part::new(&[ACROSS, &[], &[], &[]], &[Some(ACROSS), Some(ACROSS)]);
    [input, Large::new("experts", expert_name(size), case, vec![part])]
}

pub(super) fn experts() -> Vec<Large> {
    let (d, n, k) = (2048, 768, 8);
    let mut cases: Vec<Large> = [1024, 8192, 32_768].map(|m| grouped([m, 128, k, d, n])).into();
    cases.extend([8, 32].map(|experts| grouped([8192, experts, k, d, n])));
    cases.extend(grouped_backward([8192, 128, k, d, n]));
    let (m, experts) = (32_768, 128);
    let case = Case::new(MoeGate { k }, Tolerance::Exact).normal(&[m, experts], BF16);
    let part = Part::new(&[ROWS], &[Some(ROWS), Some(ROWS)]);
    cases.push(Large::new("experts", format!("gate {m} of {experts}"), case, vec![part]));
    let case = Case::new(MoeDispatch { experts }, Tolerance::Exact).input(&[m, k], DType::U32, below(experts));
    let part = Part::new(&[&[]], &[Some(&[]), Some(&[])]);
    cases.push(Large::new("experts", format!("dispatch {m} x {k} of {experts}"), case, vec![part]));
    let [order, _] = order_of([m, experts, k, d, n]);
    let case = Case::new(MoeCombine { k, weighted: true }, Tolerance::Contraction { k }).normal(&[m * k, d], BF16);
    let case = case.input(&[m * k], DType::U32, order).input(&[m, k], F32, POSITIVE);
    let part = Part::new(&[ACROSS, &[], &[]], &[Some(ACROSS)]);
    cases.push(Large::new("experts", format!("combine {m} x {d}, {k} each"), case, vec![part]));
    cases
}
