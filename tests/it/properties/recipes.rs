//! Orders, promises and fingerprints; distances in buckets.

use espalier::ops::relative::{RelativeBias, RelativeBiasBackward, Span, buckets};
use espalier::recipe::order::Step;
use espalier::recipe::run_folder::{State, fingerprint};

use super::holds;
use crate::training::tiny;

#[test]
fn an_order_is_kept_or_refused_by_its_pairs() {
    let base = tiny(&[]).to_toml().unwrap();
    holds("orders", |draw| {
        let mut order = [Step::Structure, Step::Sparsify, Step::Quantize, Step::Experts, Step::Hybrid];
        draw.stream.shuffle(&mut order);
        let place = |step: Step| order.iter().position(|s| *s == step).unwrap();
        let possible = place(Step::Structure) < place(Step::Sparsify)
            && [Step::Structure, Step::Sparsify, Step::Quantize].iter().all(|s| place(*s) < place(Step::Experts));
        let names = order.map(Step::name);
        let set = format!("order={names:?}");
        match espalier::recipe::Recipe::parse(std::path::Path::new("r.toml"), &base, &[set]) {
            Ok(recipe) => assert!(possible && recipe.steps() == order, "{names:?}"),
            Err(error) => assert!(!possible && error.to_string().contains("order"), "{names:?}: {error}"),
        }
    });
}

#[test]
fn promises_go_with_names_and_end_with_them() {
    holds("renamed promises", |draw| {
        let blocks = draw.size(8);
        let weight = |i: usize| format!("blocks.{i}.ffn.in.weight");
        let state = State {
            sparse: (0..blocks).map(|i| (weight(i), i)).collect(),
            quantized: (0..blocks).map(|i| format!("blocks.{i}.ffn.in")).collect(),
            ..State::default()
        };
        let kept: Vec<usize> = (0..blocks).filter(|_| draw.below(2) == 1).collect();
        let renamed = state.renamed(|name| {
            let (block, part) = name.strip_prefix("blocks.")?.split_once('.')?;
            let place = kept.iter().position(|k| k.to_string() == block)?;
            Some(format!("blocks.{place}.{part}"))
        });
        assert_eq!((renamed.sparse.len(), renamed.quantized.len()), (kept.len(), kept.len()));
        assert!(kept.iter().enumerate().all(|(place, old)| renamed.sparse[&weight(place)] == *old));
        assert_eq!(state.renamed(|name| Some(name.to_string())), state);
    });
}

#[test]
fn other_parts_have_other_fingerprints() {
    holds("fingerprints", |draw| {
        let text: String = (0..draw.size(12)).map(|_| char::from(b'a' + draw.below(3) as u8)).collect();
        let (i, j) = (draw.below(text.len() + 1), draw.below(text.len() + 1));
        let cut = |at: usize| fingerprint(&[&text[..at], &text[at..]]);
        assert_eq!(cut(i) == cut(j), i == j);
        assert_ne!(cut(i), fingerprint(&[&text]));
    });
}

#[test]
fn buckets_grow_with_the_distance_and_are_all_there_is() {
    holds("buckets", |draw| {
        let (count, farthest) = (draw.size(40), draw.size(200));
        let ids = buckets(count, farthest);
        assert_eq!(ids.len(), farthest + 1);
        assert!(ids.is_sorted() && ids[0] == 0 && ids.iter().all(|id| (*id as usize) < count));
        assert!(ids[..(count / 2).min(ids.len())].iter().enumerate().all(|(r, id)| r as u32 == *id));
        if farthest > count {
            assert_eq!(ids[farthest] as usize, count - 1);
        }
    });
}

/// <bias(table), d> = <table, bias_bwd(d)>: lookup and gradient are each other's transposes.
#[test]
fn bias_by_distance_and_its_gradient_are_transposes() {
    holds("relative bias", |draw| {
        let (heads, count) = (draw.size(3), 2 * draw.size(5));
        let both_sides = draw.below(2) == 1;
        let span = Span { queries: draw.size(7), keys: draw.size(7), query_offset: draw.below(6), both_sides };
        let farthest = draw.size(9);
        let ids = buckets(if both_sides { count / 2 } else { count }, farthest);
        let ids = espalier::tensor::Tensor::from_slice(&draw.device, &[ids.len()], &ids).unwrap();
        let whole =
            |draw: &mut super::Draw, n: usize| -> Vec<f32> { (0..n).map(|_| draw.below(9) as f32 - 4.0).collect() };
        let (table, d) = (whole(draw, heads * count), whole(draw, heads * span.queries * span.keys));
        let dims = [heads, span.queries, span.keys];
        let bias = draw.run(&RelativeBias(span), &[&draw.tensor(&[heads, count], &table), &ids]).remove(0);
        let back = RelativeBiasBackward { span, buckets: count };
        let back = draw.run(&back, &[&draw.tensor(&dims, &d), &ids]).remove(0);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(x * y)).sum::<f64>();
        assert_eq!(dot(&bias.to_vec::<f32>().unwrap(), &d), dot(&table, &back.to_vec::<f32>().unwrap()));
    });
}
