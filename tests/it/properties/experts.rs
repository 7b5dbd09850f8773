//! Routing and partitions of neurons.

use espalier::compress::experts::split::{balanced_partition, random_parts};
use espalier::compress::experts::{GROUP, balanced_clusters};
use espalier::ops::ffn::{Ffn, FfnActivation};
use espalier::ops::moe::{GroupedMatmul, MoeCombine, MoeDispatch, MoeGate};
use espalier::ops::moe_gather::{Gathered, GatheredMatmul};

use super::{Draw, holds};

#[test]
fn clusters_are_a_partition_into_equal_parts() {
    holds("balanced clusters", |draw| {
        let (clusters, size, width) = (draw.size(6), draw.size(6), draw.size(5));
        let rows: Vec<Vec<f64>> =
            (0..clusters * size).map(|_| draw.values(width).into_iter().map(f64::from).collect()).collect();
        let assigned = balanced_clusters(&rows, clusters);
        assert_eq!(assigned, balanced_clusters(&rows, clusters));
        for cluster in 0..clusters {
            assert_eq!(assigned.iter().filter(|a| **a == cluster).count(), size);
        }
    });
}

#[test]
fn partitions_are_balanced_repeatable_and_better_by_no_swap() {
    holds("balanced partition", |draw| {
        let (parts, size) = (draw.size(5), draw.size(5));
        let n = parts * size;
        let mut weights = vec![0.0; n * n];
        for a in 0..n {
            for b in a + 1..n {
                let weight = draw.below(4) as f64;
                (weights[a * n + b], weights[b * n + a]) = (weight, weight);
            }
        }
        let part = balanced_partition(&weights, n, parts);
        assert_eq!(part, balanced_partition(&weights, n, parts));
        assert!((0..parts).all(|p| part.iter().filter(|q| **q == p).count() == size));
        let within =
            |part: &[usize]| -> f64 { (0..n * n).filter(|i| part[i / n] == part[i % n]).map(|i| weights[i]).sum() };
        let best = within(&part);
        for (a, b) in (0..n).flat_map(|a| (a + 1..n).map(move |b| (a, b))) {
            let mut swapped = part.clone();
            swapped.swap(a, b);
            assert!(within(&swapped) <= best + 1e-9, "{a} and {b}");
        }
        let random = random_parts(n, parts, draw.below(9) as u64, 1);
        assert!((0..parts).all(|p| random.iter().filter(|q| **q == p).count() == size));
    });
}

#[test]
fn experts_where_they_lie_equal_sorted_ones() {
    holds("gathered and grouped", |draw| {
        let (tokens, experts, n, d) = (draw.size(80), draw.size(6), draw.size(20), draw.size(20));
        let k = draw.size(experts);
        let mut normal = |dims: &[usize]| {
            let values: Vec<f32> = (0..dims.iter().product()).map(|_| draw.stream.normal() as f32).collect();
            draw.tensor(dims, &values)
        };
        let (x, scores) = (normal(&[tokens, d]), normal(&[tokens, experts]));
        let (w_in, b_in, w_out, b_out) =
            (normal(&[experts, n, d]), normal(&[experts, n]), normal(&[experts, d, n]), normal(&[d]));
        let gate = draw.run(&MoeGate { k }, &[&scores]);
        let sorted = draw.run(&MoeDispatch { experts }, &[&gate[0]]);
        let up = GroupedMatmul { k, relu: true, bias: true, gather: true, experts };
        let h = draw.run(&up, &[&x, &w_in, &b_in, &sorted[0], &sorted[1]]).remove(0);
        let down = GroupedMatmul { k, relu: false, bias: false, gather: false, experts };
        let y = draw.run(&down, &[&h, &w_out, &sorted[0], &sorted[1]]).remove(0);
        let want = draw.run(&MoeCombine { k, weighted: false }, &[&y, &sorted[0]]).remove(0).to_f64().unwrap();
        let bias = b_out.to_f64().unwrap();
        let want: Vec<f64> = want.iter().enumerate().map(|(i, y)| y + bias[i % d]).collect();
        let up = GatheredMatmul(Gathered { sum: false, relu: true, threshold: None });
        let h = draw.run(&up, &[&x, &w_in, &b_in, &gate[0]]).remove(0);
        let down = GatheredMatmul(Gathered { sum: true, relu: false, threshold: None });
        close(&want, &draw.run(&down, &[&h, &w_out, &b_out, &gate[0]]).remove(0).to_f64().unwrap());
        // A threshold above all scores leaves the bias.
        let none = Gathered { threshold: Some(f32::MAX), sum: true, relu: false };
        let y = draw.run(&GatheredMatmul(none), &[&h, &w_out, &b_out, &gate[0], &gate[1]]).remove(0).to_f64().unwrap();
        assert!(y.chunks(d).all(|row| row == bias));
    });
}

#[test]
fn a_gate_takes_the_k_best_and_each_once() {
    holds("gate", |draw| {
        let (tokens, experts) = (draw.size(6), draw.size(12));
        let k = draw.size(experts);
        let (scores, values) = draw.matrix([tokens, experts]);
        let gate = draw.run(&MoeGate { k }, &[&scores]);
        let (indices, taken) = (gate[0].to_vec::<u32>().unwrap(), gate[1].to_vec::<f32>().unwrap());
        for ((row, indices), taken) in values.chunks(experts).zip(indices.chunks(k)).zip(taken.chunks(k)) {
            let mut order: Vec<u32> = (0..experts as u32).collect();
            order.sort_by(|&a, &b| row[b as usize].partial_cmp(&row[a as usize]).unwrap().then(a.cmp(&b)));
            assert_eq!(indices, &order[..k]);
            assert!(indices.iter().zip(taken).all(|(&i, score)| row[i as usize] == *score));
        }
    });
}

#[test]
fn dispatch_is_a_stable_permutation_by_expert() {
    holds("dispatch", |draw| {
        let (tokens, experts) = (draw.size(12), draw.size(8));
        let k = draw.size(experts);
        let (scores, _) = draw.matrix([tokens, experts]);
        let gate = draw.run(&MoeGate { k }, &[&scores]);
        let parts = draw.run(&MoeDispatch { experts }, &[&gate[0]]);
        let (order, offsets) = (parts[0].to_vec::<u32>().unwrap(), parts[1].to_vec::<u32>().unwrap());
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert!(sorted.iter().enumerate().all(|(i, slot)| i as u32 == *slot));
        assert_eq!((offsets[0], offsets[experts] as usize), (0, tokens * k));
        let chosen = gate[0].to_vec::<u32>().unwrap();
        for (expert, ends) in offsets.windows(2).enumerate() {
            let own = &order[ends[0] as usize..ends[1] as usize];
            assert!(own.iter().all(|slot| chosen[*slot as usize] as usize == expert) && own.is_sorted());
        }
    });
}

#[test]
fn combining_gives_each_token_the_sum_of_its_rows() {
    holds("combine", |draw| {
        let (tokens, experts, width) = (draw.size(8), draw.size(6), draw.size(5));
        let k = draw.size(experts);
        let (scores, _) = draw.matrix([tokens, experts]);
        let gate = draw.run(&MoeGate { k }, &[&scores]);
        let parts = draw.run(&MoeDispatch { experts }, &[&gate[0]]);
        // Row i of sorted slots holds its slot's number in every column: sums are of whole numbers.
        let order = parts[0].to_vec::<u32>().unwrap();
        let rows: Vec<f32> = order.iter().flat_map(|slot| vec![*slot as f32; width]).collect();
        let rows = draw.tensor(&[tokens * k, width], &rows);
        let sums = draw.run(&MoeCombine { k, weighted: false }, &[&rows, &parts[0]]).remove(0).to_vec::<f32>().unwrap();
        for (token, row) in sums.chunks(width).enumerate() {
            let want: usize = (token * k..(token + 1) * k).sum();
            assert!(row.iter().all(|x| *x == want as f32));
        }
    });
}

/// An FFN: x, W_in, b_in, W_out, b_out, with the neurons in this order.
fn ffn(draw: &Draw, sizes: [usize; 3], parts: &[Vec<f32>; 5], order: &[usize]) -> Vec<f64> {
    let [rows, d, n] = sizes;
    let [x, w_in, b_in, w_out, b_out] = parts;
    let w_in: Vec<f32> = order.iter().flat_map(|&j| w_in[j * d..(j + 1) * d].to_vec()).collect();
    let b_in: Vec<f32> = order.iter().map(|&j| b_in[j]).collect();
    let w_out: Vec<f32> = w_out.chunks(n).flat_map(|row| order.iter().map(|&j| row[j]).collect::<Vec<_>>()).collect();
    let m = order.len();
    let op = Ffn { activation: FfnActivation::Relu };
    let inputs = [
        draw.tensor(&[rows, d], x),
        draw.tensor(&[m, d], &w_in),
        draw.tensor(&[m], &b_in),
        draw.tensor(&[d, m], &w_out),
        draw.tensor(&[d], b_out),
    ];
    draw.run(&op, &inputs.iter().collect::<Vec<_>>()).remove(0).to_f64().unwrap()
}

fn parts(draw: &mut Draw, [rows, d, n]: [usize; 3]) -> [Vec<f32>; 5] {
    [rows * d, n * d, n, d * n, d].map(|count| (0..count).map(|_| draw.stream.normal() as f32).collect())
}

fn close(want: &[f64], have: &[f64]) {
    let scale = want.iter().fold(1e-30f64, |most, y| most.max(y.abs()));
    assert!(want.iter().zip(have).all(|(a, b)| (a - b).abs() <= 1e-5 * scale), "{want:?} {have:?}");
}

#[test]
fn the_order_of_neurons_does_not_matter() {
    holds("permuted neurons", |draw| {
        let sizes = [draw.size(4), draw.size(8), draw.size(24)];
        let parts = parts(draw, sizes);
        let mut order: Vec<usize> = (0..sizes[2]).collect();
        let want = ffn(draw, sizes, &parts, &order);
        draw.stream.shuffle(&mut order);
        close(&want, &ffn(draw, sizes, &parts, &order));
    });
}

#[test]
fn neurons_that_are_not_active_can_be_left_out() {
    holds("dead neurons", |draw| {
        let sizes = [draw.size(4), draw.size(8), draw.size(24)];
        let parts = parts(draw, sizes);
        let [rows, d, n] = sizes;
        let [x, w_in, b_in, ..] = &parts;
        let active = |&j: &usize| {
            (0..rows).any(|r| (0..d).map(|c| x[r * d + c] * w_in[j * d + c]).sum::<f32>() + b_in[j] > -1e-4)
        };
        let kept: Vec<usize> = (0..n).filter(active).collect();
        if !kept.is_empty() {
            let want = ffn(draw, sizes, &parts, &(0..n).collect::<Vec<_>>());
            close(&want, &ffn(draw, sizes, &parts, &kept));
        }
    });
}

#[test]
fn neurons_that_move_by_fours_leave_2_of_4_alone() {
    holds("groups of four", |draw| {
        let (rows, groups) = (draw.size(6), draw.size(8));
        let n = GROUP * groups;
        let (w, _) = draw.matrix([rows, n]);
        let op = espalier::ops::sparse24::Mask24 { form: espalier::ops::sparse24::Form24::OneDimensional };
        let mask = draw.run(&op, &[&w]).remove(0).to_vec::<f32>().unwrap();
        let mut order: Vec<usize> = (0..groups).collect();
        draw.stream.shuffle(&mut order);
        for row in mask.chunks(n) {
            let moved: Vec<f32> = order.iter().flat_map(|g| row[GROUP * g..GROUP * (g + 1)].to_vec()).collect();
            assert!(moved.chunks(4).all(|group| group.iter().sum::<f32>() == 2.0));
        }
    });
}
