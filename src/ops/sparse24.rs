//! 2:4 sparsity: masks with two kept weights in every four along the reduction axis.

use std::any::Any;

use crate::cpu::{self, PAIRS, PATTERNS};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch, Params, Plan, Problem, Source, always, source};
use crate::op::{Array, Case, Cost, Family, Fill, Op, Tolerance};
use crate::shape::{self, Meta, Shape};

pub use super::sparse24_matmul::{MatmulSparse24, MatmulSparse24Int8};
pub use super::sparse24_pack::{Compress24, Decompress24, Gather24};

pub static FAMILY: Family = Family { name: "sparse24", cases, source: Some(SOURCE) };

pub(super) const SOURCE: Source = source!("sparse24");
pub(super) const BLOCK: u32 = 64;

/// Which 2:4 masks are chosen among.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form24 {
    /// Every four neighbours of a row keep their two largest magnitudes; the lower index wins ties.
    OneDimensional,
    /// Every 4 x 4 block keeps two in each row and each column, so the transpose is 2:4 too: of the 90 such patterns the
    /// one with the largest sum of magnitudes, the lexicographically first (kept columns row by row) on ties. Sums are f32:
    /// pairs within rows, then rows 0 + 1 and 2 + 3.
    TwoDimensional,
}

/// w `[n, k]` to its 2:4 mask of zeros and ones, in w's type. k is a multiple of 4, and n too for the 2-D form. A mask is
/// a decision, not a function with a slope: it has no gradient.
#[derive(Clone, Copy, Debug)]
pub struct Mask24 {
    pub form: Form24,
}

/// Checks w `[n, k]` with k in groups of four; returns (n, k).
pub(super) fn matrix24(op: &'static str, w: &Meta, all: &[Meta]) -> Result<(usize, usize)> {
    match *w.dims() {
        [n, k] if k.is_multiple_of(4) => Ok((n, k)),
        _ => Err(Error::Shape { op, rule: "w [n, k] with k a multiple of 4", got: shape::list(all) }),
    }
}

impl Op for Mask24 {
    fn name(&self) -> &'static str {
        match self.form {
            Form24::OneDimensional => "mask24_1d",
            Form24::TwoDimensional => "mask24_2d",
        }
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let [w] = inputs else {
            return Err(Error::Shape { op: self.name(), rule: "one input", got: shape::list(inputs) });
        };
        super::quant::float_input(self.name(), w, inputs)?;
        let (n, _) = matrix24(self.name(), w, inputs)?;
        if self.form == Form24::TwoDimensional && !n.is_multiple_of(4) {
            let rule = "n and k multiples of 4 for the 2-D form";
            return Err(Error::Shape { op: self.name(), rule, got: shape::list(inputs) });
        }
        Ok(vec![*w])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        let (w, k) = (&inputs[0].data, inputs[0].dims()[1]);
        let mut mask = vec![0.0; w.len()];
        match self.form {
            Form24::OneDimensional => {
                for (w, mask) in w.chunks(4).zip(mask.chunks_mut(4)) {
                    let mut order = [0, 1, 2, 3];
                    order.sort_by(|&a, &b| w[b].abs().total_cmp(&w[a].abs()));
                    order[..2].iter().for_each(|&i| mask[i] = 1.0);
                }
            }
            Form24::TwoDimensional => {
                for (top, left) in blocks(w.len() / k.max(1), k) {
                    let at = |r: usize, c: usize| w[(top + r) * k + left + c].abs() as f32;
                    let row = |r: usize, pair: u8| {
                        let [a, b] = PAIRS[usize::from(pair)];
                        at(r, a) + at(r, b)
                    };
                    let sum = |p: &[u8; 4]| (row(0, p[0]) + row(1, p[1])) + (row(2, p[2]) + row(3, p[3]));
                    // The first of the largest: later ones must be strictly larger.
                    let best = PATTERNS.iter().reduce(|best, p| if sum(p) > sum(best) { p } else { best });
                    for (r, &pair) in best.unwrap_or(&PATTERNS[0]).iter().enumerate() {
                        PAIRS[usize::from(pair)].iter().for_each(|c| mask[(top + r) * k + left + c] = 1.0);
                    }
                }
            }
        }
        vec![mask]
    }

    fn kernels(&self) -> &'static [Kernel] {
        const ONE: &[Kernel] = &[
            Kernel::cpu("mask24_1d_fwd", DType::FLOATS, cpu::mask24_1d),
            wgsl("mask24_1d_fwd", "mask24_1d_fwd", DType::FLOATS, plan_1d),
        ];
        const TWO: &[Kernel] = &[
            Kernel::cpu("mask24_2d_fwd", DType::FLOATS, cpu::mask24_2d),
            wgsl("mask24_2d_fwd", "mask24_2d_fwd", DType::FLOATS, plan_2d),
        ];
        match self.form {
            Form24::OneDimensional => ONE,
            Form24::TwoDimensional => TWO,
        }
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        Params::new().u(inputs[0].dims()[0]).u(inputs[0].dims()[1])
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let per_element = if self.form == Form24::TwoDimensional { 90.0 * 3.0 / 16.0 } else { 3.0 };
        let bytes = (inputs[0].bytes() + outputs[0].bytes()) as f64;
        Cost { flops: per_element * inputs[0].count() as f64, bytes }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Top left corners of the 4 x 4 blocks of `[n, k]`.
fn blocks(n: usize, k: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..n / 4).flat_map(move |r| (0..k / 4).map(move |c| (4 * r, 4 * c)))
}

/// The greedy 2-D mask of earlier systems, for comparison with the exhaustive one: entries of each 4 x 4 block in falling
/// magnitude (lower index first on ties) are kept while their row and column hold fewer than two. May keep 7 of 8.
pub fn mask24_greedy(w: &[f32], n: usize, k: usize) -> Result<Vec<bool>> {
    if n.checked_mul(k) != Some(w.len()) || !n.is_multiple_of(4) || !k.is_multiple_of(4) {
        let got = format!("{} values for [{n}, {k}]", w.len());
        return Err(Error::Shape { op: "mask24_greedy", rule: "w [n, k] with n and k multiples of 4", got });
    }
    let mut mask = vec![false; w.len()];
    for (top, left) in blocks(n, k) {
        let at = |i: usize| (top + i / 4) * k + left + i % 4;
        let mut order: [usize; 16] = std::array::from_fn(|i| i);
        order.sort_by(|&a, &b| w[at(b)].abs().total_cmp(&w[at(a)].abs()));
        let (mut rows, mut columns) = ([0; 4], [0; 4]);
        for i in order {
            if rows[i / 4] < 2 && columns[i % 4] < 2 {
                rows[i / 4] += 1;
                columns[i % 4] += 1;
                mask[at(i)] = true;
            }
        }
    }
    Ok(mask)
}

pub(super) const fn wgsl(
    name: &'static str,
    entry: &'static str,
    dtypes: &'static [DType],
    plan: fn(&Problem) -> Plan,
) -> Kernel {
    let code = Code::Gpu { source: SOURCE, entry, constants: &[] };
    Kernel { name, code, dtypes, fits: always, plan }
}

fn plan_1d(p: &Problem) -> Plan {
    Plan::of(Launch::linear(p.inputs[0].count() / 4, BLOCK, p.params()))
}

fn plan_2d(p: &Problem) -> Plan {
    Plan::of(Launch::linear(p.inputs[0].count() / 16, BLOCK, p.params()).trips(300))
}

/// Small whole numbers: many ties.
pub(super) fn ties() -> Fill {
    Fill::Integers { low: -2, high: 2 }
}

/// A valid 1-D mask that keeps random pairs.
pub(super) fn random_mask(seed: u64, shape: &Shape) -> Vec<f64> {
    let mut stream = crate::rng::Stream::new(seed, 0x24);
    (0..shape.count() / 4)
        .flat_map(|_| {
            let [a, b] = PAIRS[stream.below(6)];
            (0..4).map(move |i| f64::from(i == a || i == b))
        })
        .collect()
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for &dtype in DType::FLOATS {
        for dims in [[1, 4], [3, 8], [5, 12], [7, 64], [64, 68], [65, 252]] {
            let op = Mask24 { form: Form24::OneDimensional };
            cases.push(Case::new(op, Tolerance::Exact).normal(&dims, dtype));
            cases.push(Case::new(op, Tolerance::Exact).input(&dims, dtype, ties()).variant("ties"));
        }
        for dims in [[4, 4], [4, 8], [12, 20], [64, 64], [68, 132]] {
            let op = Mask24 { form: Form24::TwoDimensional };
            cases.push(Case::new(op, Tolerance::Exact).normal(&dims, dtype));
            cases.push(Case::new(op, Tolerance::Exact).input(&dims, dtype, ties()).variant("ties"));
        }
    }
    // GPT-2 small's second FFN matrix.
    cases.push(
        Case::new(Mask24 { form: Form24::OneDimensional }, Tolerance::Exact).normal(&[768, 3072], DType::F32).bench(),
    );
    cases.push(
        Case::new(Mask24 { form: Form24::TwoDimensional }, Tolerance::Exact).normal(&[768, 768], DType::F32).bench(),
    );
    cases.extend(super::sparse24_pack::cases());
    cases
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mask(form: Form24, dims: &[usize], w: &[f64]) -> Vec<f64> {
        let shape = Shape::new(dims).unwrap();
        Mask24 { form }.reference(&[Array { shape, data: w.to_vec() }]).remove(0)
    }

    fn kept(w: &[f64], mask: &[f64]) -> f64 {
        w.iter().zip(mask).map(|(w, m)| w.abs() * m).sum()
    }

    #[test]
    fn one_dimensional_oracle() {
        let w = [4.0, 1.0, 3.0, 2.0, -5.0, 0.0, 5.0, 1.0];
        assert_eq!(mask(Form24::OneDimensional, &[1, 8], &w), [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0]);
        assert_eq!(mask(Form24::OneDimensional, &[1, 4], &[1.0; 4]), [1.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn greedy_and_exhaustive_oracle() {
        let w = [13.0, 5.0, 4.0, 11.0, 10.0, 7.0, 14.0, 6.0, 2.0, 9.0, 1.0, 8.0, 16.0, 15.0, 3.0, 12.0];
        let exhaustive = mask(Form24::TwoDimensional, &[4, 4], &w);
        assert_eq!((kept(&w, &exhaustive), exhaustive.iter().sum::<f64>()), (87.0, 8.0));
        let w32: Vec<f32> = w.iter().map(|&x| x as f32).collect();
        let greedy: Vec<f64> = mask24_greedy(&w32, 4, 4).unwrap().into_iter().map(f64::from).collect();
        assert_eq!((kept(&w, &greedy), greedy.iter().sum::<f64>()), (86.0, 7.0));
        assert_eq!(mask24_greedy(&w32, 8, 2).unwrap_err().code(), "E-SHAPE");
    }

    #[test]
    fn there_are_ninety_patterns_in_order() {
        assert!(PATTERNS.windows(2).all(|p| p[0] < p[1]), "strictly rising, so distinct and lexicographic");
        // Counted independently: 4 x 4 zero-one matrices with all row and column sums 2.
        let sums_two = |bits: &u32| {
            let row = |r: u32| (bits >> (4 * r)) & 15;
            let columns = (0..4).all(|c| (0..4).map(|r| (row(r) >> c) & 1).sum::<u32>() == 2);
            columns && (0..4).all(|r| row(r).count_ones() == 2)
        };
        assert_eq!((0..1u32 << 16).filter(sums_two).count(), PATTERNS.len());
    }

    /// Share of the magnitude that each rule keeps of independent normal weights; 20,000 blocks.
    #[test]
    fn retained_magnitude_of_gaussian_weights() {
        // Four times the 20,000 blocks of the oracle: a frequency of 15.8 % scatters by 0.26 points over those.
        let (n, k) = (4 * 400, 4 * 200);
        let mut stream = crate::rng::Stream::new(1, 0x90);
        let w: Vec<f64> = (0..n * k).map(|_| f64::from(stream.normal() as f32)).collect();
        let total: f64 = w.iter().map(|x| x.abs()).sum();
        let mut sorted: Vec<f64> = w.iter().map(|x| x.abs()).collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let free = sorted[..n * k / 2].iter().sum::<f64>() / total;
        let one = kept(&w, &mask(Form24::OneDimensional, &[n, k], &w)) / total;
        let two = kept(&w, &mask(Form24::TwoDimensional, &[n, k], &w)) / total;
        let w32: Vec<f32> = w.iter().map(|&x| x as f32).collect();
        let greedy = mask24_greedy(&w32, n, k).unwrap();
        let share = w.iter().zip(&greedy).map(|(w, &m)| w.abs() * f64::from(m)).sum::<f64>() / total;
        for (got, expected) in [(free, 0.796), (one, 0.744), (two, 0.702), (share, 0.692)] {
            approx::assert_abs_diff_eq!(got, expected, epsilon = 0.002);
        }
        let full = |(top, left): (usize, usize)| (0..16).filter(|i| greedy[(top + i / 4) * k + left + i % 4]).count();
        let seven = blocks(n, k).filter(|&b| full(b) == 7).count() as f64 / (n * k / 16) as f64;
        approx::assert_abs_diff_eq!(seven, 0.155, epsilon = 0.005);
    }

    #[test]
    fn rows_that_are_not_groups_of_four_are_refused() {
        let meta = |dims: &[usize]| Meta::new(dims, DType::F32).unwrap();
        assert_eq!(Mask24 { form: Form24::OneDimensional }.infer(&[meta(&[4, 6])]).unwrap_err().code(), "E-SHAPE");
        assert_eq!(Mask24 { form: Form24::TwoDimensional }.infer(&[meta(&[6, 4])]).unwrap_err().code(), "E-SHAPE");
        assert!(Mask24 { form: Form24::OneDimensional }.infer(&[meta(&[3, 4])]).is_ok());
    }
}
