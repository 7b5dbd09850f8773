//! Integer grids: fake and real quantization, in f32 and in integers.

use espalier::ops::matmul::Matmul;
use espalier::ops::quant::{Dequantize, FakeQuant, Granularity, GridFrom, MatmulInt8, Quantize, Scheme};
use espalier::ops::quant_int4::{MatmulInt4, PackInt4, UnpackInt4};
use espalier::ops::sparse24::{Compress24, Form24, Mask24};
use espalier::tensor::Tensor;

use super::{Draw, holds};

const SYMMETRIC: Scheme = Scheme::SymmetricNarrow;

struct Grid {
    dims: [usize; 2],
    x: Tensor,
    values: Vec<f32>,
    bits: u32,
    granularity: Granularity,
}

impl Grid {
    fn draw(draw: &mut Draw) -> Self {
        let dims = [draw.size(6), draw.size(40)];
        let (x, values) = draw.matrix(dims);
        let granularity = [Granularity::Tensor, Granularity::Channel, Granularity::Token][draw.below(3)];
        Self { dims, x, values, bits: 2 + draw.below(7) as u32, granularity }
    }

    /// Levels and the scale of each group.
    fn quantized(&self, draw: &Draw, scheme: Scheme) -> Vec<Tensor> {
        draw.run(&Quantize { bits: self.bits, scheme, granularity: self.granularity, from: GridFrom::Own }, &[&self.x])
    }

    fn fake(&self, draw: &Draw, scheme: Scheme, x: &Tensor) -> Vec<f32> {
        let op = FakeQuant { bits: self.bits, scheme, granularity: self.granularity, from: GridFrom::Own };
        draw.run(&op, &[x]).remove(0).to_vec().unwrap()
    }

    /// Scale of element `i`'s group.
    fn scale(&self, scales: &[f32], i: usize) -> f32 {
        if self.granularity == Granularity::Tensor { scales[0] } else { scales[i / self.dims[1]] }
    }
}

#[test]
fn levels_stay_on_their_grid_and_zero_is_zero() {
    holds("levels", |draw| {
        let grid = Grid::draw(draw);
        let most = (1 << (grid.bits - 1)) - 1;
        let q = grid.quantized(draw, SYMMETRIC)[0].to_vec::<i8>().unwrap();
        for (w, q) in grid.values.iter().zip(q) {
            assert!(i32::from(q).abs() <= most && (*w != 0.0 || q == 0), "{w} is {q}");
        }
    });
}

#[test]
fn fake_quantization_is_the_real_one_and_back() {
    holds("fake is real", |draw| {
        let grid = Grid::draw(draw);
        for scheme in [SYMMETRIC, Scheme::SymmetricFull, Scheme::Asymmetric] {
            let q = grid.quantized(draw, scheme);
            let op = Dequantize { scheme, granularity: grid.granularity, bits: grid.bits };
            let back = draw.run(&op, &q.iter().collect::<Vec<_>>()).remove(0).to_vec::<f32>().unwrap();
            assert_eq!(grid.fake(draw, scheme, &grid.x), back, "{scheme:?}");
        }
    });
}

#[test]
fn no_value_moves_by_more_than_half_a_step() {
    holds("half a step", |draw| {
        let grid = Grid::draw(draw);
        let scales = grid.quantized(draw, SYMMETRIC)[1].to_vec::<f32>().unwrap();
        for (i, (x, y)) in grid.values.iter().zip(grid.fake(draw, SYMMETRIC, &grid.x)).enumerate() {
            assert!((x - y).abs() <= 0.5001 * grid.scale(&scales, i), "{x} to {y}");
        }
    });
}

#[test]
fn signs_and_units_do_not_matter() {
    holds("odd and homogeneous", |draw| {
        let grid = Grid::draw(draw);
        let y = grid.fake(draw, SYMMETRIC, &grid.x);
        let factor = -(2.0f32.powi(draw.below(8) as i32));
        let other = draw.tensor(&grid.dims, &grid.values.iter().map(|x| x * factor).collect::<Vec<_>>());
        let want: Vec<f32> = y.iter().map(|y| y * factor).collect();
        assert_eq!(grid.fake(draw, SYMMETRIC, &other), want);
    });
}

#[test]
fn the_order_of_values_is_kept() {
    holds("monotone", |draw| {
        let grid = Grid::draw(draw);
        let y = grid.fake(draw, SYMMETRIC, &grid.x);
        let rows = grid.values.chunks(grid.dims[1]).zip(y.chunks(grid.dims[1]));
        for (x, y) in rows {
            let mut order: Vec<usize> = (0..x.len()).collect();
            order.sort_by(|&a, &b| x[a].total_cmp(&x[b]));
            assert!(order.windows(2).all(|pair| y[pair[0]] <= y[pair[1]]));
        }
    });
}

fn int8(draw: &Draw, x: &Tensor, granularity: Granularity) -> Vec<Tensor> {
    draw.run(&Quantize { bits: 8, scheme: SYMMETRIC, granularity, from: GridFrom::Own }, &[x])
}

#[test]
fn integer_products_are_exact_sums_times_scales() {
    holds("int8 product", |draw| {
        let [m, n, k] = [draw.size(5), draw.size(7), draw.size(60)];
        let ((x, _), (w, _)) = (draw.matrix([m, k]), draw.matrix([n, k]));
        let (x, w) = (int8(draw, &x, Granularity::Token), int8(draw, &w, Granularity::Channel));
        let y = draw.run(&MatmulInt8 { bias: false }, &[&x[0], &x[1], &w[0], &w[1]]).remove(0).to_vec::<f32>().unwrap();
        let [xq, wq] = [&x[0], &w[0]].map(|t| t.to_vec::<i8>().unwrap());
        let [xs, ws] = [&x[1], &w[1]].map(|t| t.to_vec::<f32>().unwrap());
        for (i, y) in y.iter().enumerate() {
            let (row, column) = (i / n, i % n);
            let sum: i32 = (0..k).map(|j| i32::from(xq[row * k + j]) * i32::from(wq[column * k + j])).sum();
            let want = f64::from(sum) * f64::from(xs[row]) * f64::from(ws[column]);
            assert!((f64::from(*y) - want).abs() <= 3e-7 * want.abs(), "{y} {want}");
        }
    });
}

#[test]
fn training_on_the_grid_is_what_is_deployed() {
    holds("fake product is the integer one", |draw| {
        let [m, n, k] = [draw.size(5), draw.size(7), draw.size(60)];
        let ((x, _), (w, _)) = (draw.matrix([m, k]), draw.matrix([n, k]));
        let fake = |granularity| FakeQuant { bits: 8, scheme: SYMMETRIC, granularity, from: GridFrom::Own };
        let (fx, fw) = (
            draw.run(&fake(Granularity::Token), &[&x]).remove(0),
            draw.run(&fake(Granularity::Channel), &[&w]).remove(0),
        );
        let trained = draw.run(&Matmul::linear(), &[&fx, &fw]).remove(0).to_f64().unwrap();
        let (x, w) = (int8(draw, &x, Granularity::Token), int8(draw, &w, Granularity::Channel));
        let real = draw.run(&MatmulInt8 { bias: false }, &[&x[0], &x[1], &w[0], &w[1]]).remove(0).to_f64().unwrap();
        let [fx, fw] = [&fx, &fw].map(|t| t.to_f64().unwrap());
        for (i, (a, b)) in trained.iter().zip(&real).enumerate() {
            let terms: f64 = (0..k).map(|j| (fx[i / n * k + j] * fw[i % n * k + j]).abs()).sum();
            assert!((a - b).abs() <= 1e-6 * terms, "{a} {b}");
        }
    });
}

#[test]
fn pruning_and_the_grid_change_places() {
    holds("grid of compressed is compressed grid", |draw| {
        let dims = [draw.size(6), 4 * draw.size(10)];
        let (w, _) = draw.matrix(dims);
        let mask = draw.run(&Mask24 { form: Form24::OneDimensional }, &[&w]).remove(0);
        let packed = draw.run(&Compress24, &[&w, &mask]);
        let masked = espalier::ops::binary::Binary(espalier::ops::binary::BinaryFunction::Mul);
        let masked = draw.run(&masked, &[&w, &mask]).remove(0);
        let (small, whole) = (int8(draw, &packed[0], Granularity::Channel), int8(draw, &masked, Granularity::Channel));
        // The largest magnitude of a row survives, so the scales are the same.
        assert_eq!(small[1].to_vec::<f32>().unwrap(), whole[1].to_vec::<f32>().unwrap());
        let kept: Vec<f32> = mask.to_vec().unwrap();
        let values = whole[0].to_vec::<i8>().unwrap();
        assert!(values.iter().zip(&kept).all(|(q, kept)| *kept == 1.0 || *q == 0));
        let values: Vec<i8> = values.iter().zip(&kept).filter(|(_, kept)| **kept == 1.0).map(|(q, _)| *q).collect();
        assert_eq!(small[0].to_vec::<i8>().unwrap(), values);
    });
}

#[test]
fn four_bits_are_unpacked_as_they_were_packed() {
    holds("int4", |draw| {
        let group = 8 * draw.size(3);
        let [m, n, k] = [draw.size(4), draw.size(6), group * draw.size(3)];
        let (w, values) = draw.matrix([n, k]);
        let packed = draw.run(&PackInt4 { group }, &[&w]);
        let back = draw.run(&UnpackInt4 { group }, &[&packed[0], &packed[1]]).remove(0);
        let scales = packed[1].to_vec::<f32>().unwrap();
        for (i, (w, y)) in values.iter().zip(back.to_vec::<f32>().unwrap()).enumerate() {
            let scale = scales[i / group];
            assert!((w - y).abs() <= 0.5001 * scale && (y / scale).round().abs() <= 7.0, "{w} {y}");
        }
        let (x, _) = draw.matrix([m, k]);
        let want = draw.run(&Matmul::linear(), &[&x, &back]).remove(0).to_f64().unwrap();
        let have =
            draw.run(&MatmulInt4 { group, bias: false }, &[&x, &packed[0], &packed[1]]).remove(0).to_f64().unwrap();
        let scale = want.iter().fold(1e-30f64, |most, y| most.max(y.abs()));
        assert!(want.iter().zip(&have).all(|(a, b)| (a - b).abs() <= 1e-4 * scale));
    });
}
