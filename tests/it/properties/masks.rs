//! Masks, selections and curves.

use espalier::compress::pruning::selection::{demote, pruned, select};
use espalier::compress::pruning::{Curve, Pattern, Scope};
use espalier::ops::matmul::Matmul;
use espalier::ops::sparse24::{Compress24, Decompress24, Form24, Mask24, MatmulSparse24};
use espalier::tensor::Tensor;

use super::{Draw, holds};

fn names(count: usize) -> Vec<String> {
    (0..count).map(|i| format!("weight {i}")).collect()
}

/// The mask of one grid of scores.
fn selected(scores: &Tensor, pattern: Pattern, scope: Scope, sparsity: f64) -> Vec<f32> {
    select(&names(1), std::slice::from_ref(scores), pattern, scope, sparsity).unwrap()[0].to_vec().unwrap()
}

fn zeros(mask: &[f32]) -> usize {
    mask.iter().filter(|&&kept| kept == 0.0).count()
}

/// Scores as criteria give them: not negative, with ties.
fn scores(draw: &mut Draw, dims: [usize; 2]) -> (Tensor, Vec<f32>) {
    let values: Vec<f32> = draw.values(dims[0] * dims[1]).iter().map(|x| x.abs()).collect();
    (draw.tensor(&dims, &values), values)
}

fn weight24(draw: &mut Draw) -> ([usize; 2], Tensor, Vec<f32>) {
    let dims = [4 * draw.size(4), 4 * draw.size(12)];
    let (tensor, values) = draw.matrix(dims);
    (dims, tensor, values)
}

fn mask24(draw: &Draw, weight: &Tensor, form: Form24) -> Vec<f32> {
    draw.run(&Mask24 { form }, &[weight])[0].to_vec().unwrap()
}

#[test]
fn two_of_four_keeps_the_two_largest_and_the_lower_index_of_equals() {
    holds("2:4 keeps the largest", |draw| {
        let (_, weight, values) = weight24(draw);
        for (mask, w) in mask24(draw, &weight, Form24::OneDimensional).chunks(4).zip(values.chunks(4)) {
            let mut order = [0, 1, 2, 3];
            order.sort_by(|&a, &b| w[b].abs().total_cmp(&w[a].abs()).then(a.cmp(&b)));
            let want: Vec<f32> = (0..4).map(|i| f32::from(u8::from(order[..2].contains(&i)))).collect();
            assert_eq!(mask, want, "{w:?}");
        }
    });
}

#[test]
fn two_dimensional_masks_keep_two_in_each_row_and_column() {
    holds("2-D 2:4 in both directions", |draw| {
        let ([n, k], weight, _) = weight24(draw);
        let mask = mask24(draw, &weight, Form24::TwoDimensional);
        for line in mask.chunks(4) {
            assert_eq!(line.iter().sum::<f32>(), 2.0);
        }
        for (column, top) in (0..k).flat_map(|c| (0..n).step_by(4).map(move |r| (c, r))) {
            assert_eq!((top..top + 4).map(|r| mask[r * k + column]).sum::<f32>(), 2.0);
        }
    });
}

#[test]
fn the_exhaustive_mask_is_the_best_of_all_ninety() {
    holds("best of 90", |draw| {
        let (weight, values) = draw.matrix([4, 4]);
        let kept = |mask: u32| (0..16).filter(|i| mask >> i & 1 == 1).map(|i| f64::from(values[i].abs())).sum::<f64>();
        let even = |mask: &u32| {
            let row = |r: u32| (mask >> (4 * r) & 15).count_ones() == 2;
            let column = |c: u32| (mask >> c & 0x1111).count_ones() == 2;
            (0..4).all(|i| row(i) && column(i))
        };
        let all: Vec<u32> = (0..1 << 16).filter(even).collect();
        assert_eq!(all.len(), 90);
        let best = all.iter().map(|m| kept(*m)).fold(0.0, f64::max);
        let mask = mask24(draw, &weight, Form24::TwoDimensional);
        let own: f64 = mask.iter().zip(&values).map(|(m, w)| f64::from(m * w.abs())).sum();
        assert!(own >= best * (1.0 - 1e-6), "{own} where {best} is possible");
    });
}

#[test]
fn greedy_masks_keep_at_most_two_and_filled_ones_exactly() {
    holds("greedy and filled 2-D", |draw| {
        let ([n, k], weight, _) = weight24(draw);
        let block = |mask: &[f32], r: usize, c: usize| -> f32 {
            (0..16).map(|i| mask[(4 * r + i / 4) * k + 4 * c + i % 4]).sum()
        };
        let scores = draw.tensor(&[n, k], &weight.to_vec::<f32>().unwrap().iter().map(|w| w.abs()).collect::<Vec<_>>());
        let greedy = selected(&scores, Pattern::TwoFour2dGreedy, Scope::Layer, 0.5);
        let filled = selected(&scores, Pattern::TwoFour2dFilled, Scope::Layer, 0.5);
        for (r, c) in (0..n / 4).flat_map(|r| (0..k / 4).map(move |c| (r, c))) {
            assert!([7.0, 8.0].contains(&block(&greedy, r, c)));
            assert_eq!(block(&filled, r, c), 8.0);
        }
        assert!(greedy.chunks(4).chain(filled.chunks(4)).all(|line| line.iter().sum::<f32>() <= 2.0));
    });
}

#[test]
fn compressed_weights_are_the_masked_ones() {
    holds("compress and decompress", |draw| {
        let ([n, k], weight, values) = weight24(draw);
        let mask = draw.run(&Mask24 { form: Form24::OneDimensional }, &[&weight]).remove(0);
        let packed = draw.run(&Compress24, &[&weight, &mask]);
        assert_eq!((packed[0].dims(), packed[1].dims()), (&[n, k / 2][..], &[n, (k / 2).div_ceil(16)][..]));
        let back = draw.run(&Decompress24 { k }, &[&packed[0], &packed[1]]).remove(0).to_vec::<f32>().unwrap();
        let want: Vec<f32> = mask.to_vec::<f32>().unwrap().iter().zip(&values).map(|(m, w)| m * w).collect();
        assert_eq!(back, want);
    });
}

#[test]
fn sparse_products_are_dense_ones_of_the_masked_weight() {
    holds("sparse product", |draw| {
        let ([n, k], weight, _) = weight24(draw);
        let rows = draw.size(5);
        let x: Vec<f32> = (0..rows * k).map(|_| draw.stream.normal() as f32).collect();
        let x = draw.tensor(&[rows, k], &x);
        let mask = draw.run(&Mask24 { form: Form24::OneDimensional }, &[&weight]).remove(0);
        let packed = draw.run(&Compress24, &[&weight, &mask]);
        let dense = draw.run(&Decompress24 { k }, &[&packed[0], &packed[1]]).remove(0);
        let want = draw.run(&Matmul::linear(), &[&x, &dense]).remove(0).to_f64().unwrap();
        let sparse = draw.run(&MatmulSparse24 { bias: false }, &[&x, &packed[0], &packed[1]]).remove(0);
        let scale = want.iter().fold(1e-30f64, |most, y| most.max(y.abs()));
        for (a, b) in want.iter().zip(sparse.to_f64().unwrap()) {
            assert!((a - b).abs() <= 1e-5 * scale, "{a} {b} [{n}, {k}]");
        }
    });
}

#[test]
fn exactly_the_declared_count_is_pruned_of_a_layer() {
    holds("count per layer", |draw| {
        let dims = [draw.size(9), draw.size(30)];
        let (scores, _) = scores(draw, dims);
        let sparsity = draw.stream.uniform();
        let mask = selected(&scores, Pattern::Unstructured, Scope::Layer, sparsity);
        assert_eq!(zeros(&mask), pruned(dims[0] * dims[1], sparsity));
    });
}

#[test]
fn exactly_the_declared_count_is_pruned_of_each_row() {
    holds("count per row", |draw| {
        let dims = [draw.size(9), draw.size(30)];
        let (scores, _) = scores(draw, dims);
        let sparsity = draw.stream.uniform();
        let mask = selected(&scores, Pattern::Unstructured, Scope::Row, sparsity);
        assert!(mask.chunks(dims[1]).all(|row| zeros(row) == pruned(dims[1], sparsity)));
    });
}

#[test]
fn exactly_the_declared_count_is_pruned_of_everything() {
    holds("count of all", |draw| {
        let count = draw.size(10);
        let grids: Vec<Tensor> = (0..count)
            .map(|_| {
                let dims = [draw.size(5), draw.size(20)];
                scores(draw, dims).0
            })
            .collect();
        let sparsity = draw.stream.uniform();
        let masks = select(&names(count), &grids, Pattern::Unstructured, Scope::Global, sparsity).unwrap();
        let all: usize = grids.iter().map(Tensor::count).sum();
        let gone: usize = masks.iter().map(|m| zeros(&m.to_vec::<f32>().unwrap())).sum();
        assert_eq!(gone, pruned(all, sparsity));
    });
}

#[test]
fn what_is_kept_is_no_smaller_than_what_goes_and_first_among_equals() {
    holds("order of scores", |draw| {
        let dims = [1, draw.size(200)];
        let (tensor, values) = scores(draw, dims);
        let sparsity = draw.stream.uniform();
        let mask = selected(&tensor, Pattern::Unstructured, Scope::Layer, sparsity);
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
        let kept = values.len() - pruned(values.len(), sparsity);
        assert!(order[..kept].iter().all(|&i| mask[i] == 1.0) && order[kept..].iter().all(|&i| mask[i] == 0.0));
    });
}

#[test]
fn more_sparsity_prunes_all_that_less_does() {
    holds("nested", |draw| {
        let dims = [draw.size(9), draw.size(30)];
        let (scores, _) = scores(draw, dims);
        let (a, b) = (draw.stream.uniform(), draw.stream.uniform());
        for scope in [Scope::Row, Scope::Layer, Scope::Global] {
            let less = selected(&scores, Pattern::Unstructured, scope, a.min(b));
            let more = selected(&scores, Pattern::Unstructured, scope, a.max(b));
            assert!(less.iter().zip(&more).all(|(less, more)| more <= less));
        }
    });
}

#[test]
fn what_was_pruned_stays_so_under_new_scores() {
    holds("demoted", |draw| {
        let dims = [draw.size(9), draw.size(30)];
        let ((old, _), (new, _)) = (scores(draw, dims), scores(draw, dims));
        let (a, b) = (draw.stream.uniform(), draw.stream.uniform());
        let before = select(&names(1), &[old], Pattern::Unstructured, Scope::Layer, a.min(b)).unwrap().remove(0);
        let after = selected(&demote(&new, &before).unwrap(), Pattern::Unstructured, Scope::Layer, a.max(b));
        assert!(before.to_vec::<f32>().unwrap().iter().zip(&after).all(|(before, after)| after <= before));
    });
}

#[test]
fn units_live_and_die_together() {
    holds("whole units", |draw| {
        let block = [draw.size(3), draw.size(3)];
        let dims = [block[0] * draw.size(5), block[1] * draw.size(5)];
        let kinds = [Pattern::Block { rows: block[0], columns: block[1] }, Pattern::Row, Pattern::Column];
        let pattern = kinds[draw.below(3)];
        let (tensor, _) = scores(draw, dims);
        let grid = pattern.grid(dims).unwrap();
        let pooled = pattern.pool(&tensor).unwrap();
        let sparsity = draw.stream.uniform();
        let units = select(&names(1), &[pooled], pattern, Scope::Layer, sparsity).unwrap().remove(0);
        let mask = pattern.expand(&units, dims).unwrap().to_vec::<f32>().unwrap();
        let [rows, columns] = pattern.unit(dims);
        let units = units.to_vec::<f32>().unwrap();
        for (i, kept) in mask.iter().enumerate() {
            let (r, c) = (i / dims[1] / rows, i % dims[1] / columns);
            assert_eq!(*kept, units[r * grid[1] + c]);
        }
        assert_eq!(zeros(&mask), pruned(grid[0] * grid[1], sparsity) * rows * columns);
    });
}

#[test]
fn the_unit_of_scores_does_not_matter() {
    holds("scaled scores", |draw| {
        let dims = [draw.size(9), 4 * draw.size(8)];
        let (tensor, values) = scores(draw, dims);
        let factor = 2.0f32.powi(draw.below(20) as i32 - 10);
        let other = draw.tensor(&dims, &values.iter().map(|s| s * factor).collect::<Vec<_>>());
        let sparsity = draw.stream.uniform();
        for pattern in [Pattern::Unstructured, Pattern::TwoFour] {
            let masks = [&tensor, &other].map(|scores| selected(scores, pattern, Scope::Row, sparsity));
            assert_eq!(masks[0], masks[1]);
        }
    });
}

#[test]
fn curves_start_and_end_where_they_say_and_never_turn() {
    holds("curves", |draw| {
        let (a, b) = (draw.stream.uniform(), draw.stream.uniform());
        let (first, last) = (a.min(b), a.max(b));
        let power = 0.25 + 4.0 * draw.stream.uniform();
        for curve in [Curve::Linear, Curve::Cubic, Curve::Polynomial(power)] {
            assert_eq!((curve.at(first, last, 0.0), curve.at(first, last, 1.0)), (first, last));
            let points: Vec<f64> = (0..=50).map(|i| curve.at(first, last, f64::from(i) / 50.0)).collect();
            assert!(points.windows(2).all(|p| p[0] <= p[1] + 1e-15), "{curve:?} {points:?}");
        }
        assert_eq!(Curve::Constant.at(first, last, a), last);
    });
}

#[test]
fn the_cubic_curve_is_its_formula() {
    holds("cubic", |draw| {
        let [first, last, p] = [(); 3].map(|()| draw.stream.uniform());
        let want = last + (first - last) * (1.0 - p) * (1.0 - p) * (1.0 - p);
        assert!((Curve::Cubic.at(first, last, p) - want).abs() < 1e-14);
        assert!((Curve::Cubic.at(first, last, p) - Curve::Polynomial(3.0).at(first, last, p)).abs() < 1e-14);
        let line = first + (last - first) * p;
        assert!((Curve::Linear.at(first, last, p) - line).abs() < 1e-14);
    });
}
