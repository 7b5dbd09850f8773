//! Gates and what they decide.

use std::collections::BTreeMap;

use espalier::compress::gates::{Costs, Layout, Level, decide, soft};
use espalier::nn::Config;
use espalier::nn::config::Size;
use espalier::ops::gates::{GroupDots, ScaleGroups};
use espalier::ops::hard_concrete::{GateValue, HardConcrete, open};

use super::{Draw, holds};

/// A model of random sizes and log alphas, undecided, decided or equal.
fn gated(draw: &mut Draw) -> (Config, Layout, BTreeMap<Level, Vec<f64>>) {
    let heads = draw.size(4);
    let size = Size { layers: draw.size(4), heads, head_size: 4, ffn_width: 4 * draw.size(8), max_positions: 8 };
    let config = if draw.below(2) == 0 { Config::glm(size, 9) } else { Config::t5(Size { layers: 2, ..size }, 9) };
    let layout = Layout::of(&config).unwrap();
    let mut all = BTreeMap::new();
    for level in Level::ALL {
        if draw.below(4) == 0 {
            continue;
        }
        let kind = draw.below(3);
        let value = |draw: &mut Draw| match kind {
            0 => 3.0 * draw.stream.normal(),
            1 => [-4.6, 0.0, 4.6][draw.below(3)],
            _ => 1.0,
        };
        all.insert(level, (0..layout.count(level)).map(|_| value(draw)).collect());
    }
    (config, layout, all)
}

#[test]
fn decisions_meet_their_target_and_leave_a_model() {
    holds("gate decisions", |draw| {
        let (config, layout, all) = gated(draw);
        let costs = Costs::parameters(&layout);
        let (target, multiple) = (0.05 + 0.9 * draw.stream.uniform(), [1, 2, 4][draw.below(3)]);
        let decision = decide(&layout, &all, &costs, target, multiple);
        // Units without gates cannot go one by one, channels not at all here.
        let closable = all.contains_key(&Level::Attention) || all.contains_key(&Level::Heads);
        let closable = closable && (all.contains_key(&Level::Ffn) || all.contains_key(&Level::Neurons));
        let share = decision.share(&layout, &costs);
        assert!(share <= 1.0 - target + 1e-9 || !closable, "{share} left of {target}");
        assert!((0.0..=1.0 + 1e-12).contains(&share));
        let small = decision.keep(&config, &layout).config(&config).unwrap();
        assert!(small.width.is_multiple_of(multiple) && small.width > 0);
        for block in &small.blocks {
            assert!(!all.contains_key(&Level::Neurons) || block.ffn_width.is_multiple_of(multiple));
        }
        // The declared cost is that of the config's shapes.
        let weights = |config: &Config| -> usize {
            let matrix = |(name, dims): (String, Vec<usize>)| {
                let linear = config.all_linears().iter().any(|l| name == format!("{l}.weight"));
                if linear { dims.iter().product() } else { 0 }
            };
            config.parameters().into_iter().map(matrix).sum()
        };
        assert!((share - weights(&small) as f64 / weights(&config) as f64).abs() < 1e-12);
        // The same gates give the same decision, and values of those that stay are soft.
        assert_eq!(decision, decide(&layout, &all, &costs, target, multiple));
        if let Some(log_alphas) = all.get(&Level::Heads) {
            let sound = |(z, x): (&f64, &f64)| *z == 0.0 || *z == soft(*x);
            assert!(decision.heads.iter().zip(log_alphas).all(sound));
        }
    });
}

#[test]
fn a_higher_target_leaves_no_more() {
    holds("targets are nested", |draw| {
        let (_, layout, all) = gated(draw);
        let costs = Costs::parameters(&layout);
        let shares: Vec<f64> =
            [0.2, 0.4, 0.6, 0.8].iter().map(|t| decide(&layout, &all, &costs, *t, 1).share(&layout, &costs)).collect();
        assert!(shares.windows(2).all(|pair| pair[1] <= pair[0] + 1e-12), "{shares:?}");
    });
}

#[test]
fn samples_are_in_the_unit_interval_and_follow_log_alpha() {
    holds("hard concrete", |draw| {
        let n = draw.size(40);
        let low: Vec<f32> = (0..n).map(|_| 3.0 * draw.stream.normal() as f32).collect();
        let high: Vec<f32> = low.iter().map(|x| x + draw.stream.uniform() as f32).collect();
        let value = GateValue::Sample { seed: u64::from(draw.stream.word()), site: draw.below(9) as u32 };
        let number = draw.below(1000) as u32;
        let step = espalier::tensor::Tensor::from_slice(&draw.device, &[1], &[number]).unwrap();
        let sample = |x: &[f32]| -> Vec<f32> {
            draw.run(&HardConcrete(value), &[&draw.tensor(&[n], x), &step])[0].to_vec().unwrap()
        };
        let (below, above) = (sample(&low), sample(&high));
        assert_eq!(below, sample(&low));
        for (a, b) in below.iter().zip(&above) {
            assert!((0.0..=1.0).contains(a) && *b >= a - 1e-6, "{a} {b}");
        }
        let chances = draw.run(&HardConcrete(GateValue::Open), &[&draw.tensor(&[n], &low)])[0].to_f64().unwrap();
        for (chance, x) in chances.iter().zip(&low) {
            assert!((chance - open(f64::from(*x))).abs() < 1e-6);
        }
    });
}

/// scale_groups and group_dots are each other's adjoints: <scale(x, g), y> = <g, dots(x, y)>.
#[test]
fn gates_and_dots_are_adjoint() {
    holds("adjoint", |draw| {
        let (rows, groups, group) = (draw.size(5), draw.size(6), draw.size(9));
        let mut normal = |n: usize| -> Vec<f32> { (0..n).map(|_| draw.stream.normal() as f32).collect() };
        let count = rows * groups * group;
        let (x, y, g) = (normal(count), normal(count), normal(rows * groups));
        let dims = [rows, groups * group];
        let (x, y, g) = (draw.tensor(&dims, &x), draw.tensor(&dims, &y), draw.tensor(&[rows, groups], &g));
        let scaled = draw.run(&ScaleGroups, &[&x, &g])[0].to_f64().unwrap();
        let dots = draw.run(&GroupDots { groups }, &[&x, &y])[0].to_f64().unwrap();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let (left, right) = (dot(&scaled, &y.to_f64().unwrap()), dot(&g.to_f64().unwrap(), &dots));
        assert!((left - right).abs() < 1e-5 * count as f64, "{left} {right}");
    });
}
