//! Matching of layers anew in each step.

use std::sync::Arc;

use espalier::compress::distillation::*;
use espalier::nn::config::Size;
use espalier::nn::{Config, Model, Pass, Tap};
use espalier::train::lifecycle::Micro;

use crate::distillation::{check_slope, enlivened, lessons, oracle, pair, term, weighed};
use crate::model::{SIZE, VOCABULARY, assemble, cpu, examples, micro};

fn dynamic(layers: &[i32], order: Order) -> Dynamic {
    Dynamic { layers: layers.iter().map(|&l| Layer(l)).collect(), order, weight: 0.9 }
}

fn matched(student: &mut Model, teacher: &Arc<Model>, dynamic: &Dynamic) -> LayerwiseDistillation {
    LayerwiseDistillation::new(student, Lessons { dynamic: Some(dynamic), ..lessons(teacher, &[], None) }).unwrap()
}

const MATCHING: &str = "distil.dynamic.projection.weight";

#[test]
fn dynamic_matching_has_the_slope_of_its_differences() {
    let device = oracle();
    let micro = weighed(micro(&device, &assemble(&examples(3, 1))));
    for (layers, order) in [(&[1, 2, 3, 4][..], Order::Free), (&[2, -1], Order::Ascending)] {
        let (mut student, teacher) = pair(&device);
        let method = matched(&mut student, &teacher, &dynamic(layers, order));
        check_slope(&student, &method, &micro, &format!("{order:?}"));
    }
}

/// The mean squared difference of every pair of layers, and by hand which student's layer each of the teacher's takes.
#[test]
fn every_layer_of_the_teacher_takes_the_nearest_of_the_student() {
    let device = oracle();
    let micro = weighed(micro(&device, &assemble(&examples(3, 1))));
    let weights = micro.weights.to_f64().unwrap();
    let larger = Size { layers: 5, ..SIZE };
    let teacher = Arc::new(enlivened(Config::glm(larger, VOCABULARY), &device, 9));
    let mut student = enlivened(Config::glm(Size { layers: 3, ..SIZE }, VOCABULARY), &device, 3);
    let layers = [1, 3, 5];
    let free = matched(&mut student, &teacher, &dynamic(&layers, Order::Free));
    let states = |model: &Model, layers: &[usize]| -> Vec<Vec<f64>> {
        let taps = layers.iter().map(|&l| Tap::Hidden(l));
        let mut pass = Pass::inference(model).tapping(taps);
        pass.hidden(&micro.batch).unwrap();
        layers.iter().map(|&l| pass.hidden_at(l).unwrap().tensor.to_f64().unwrap()).collect()
    };
    let d = 16;
    let projection = student.get(MATCHING).unwrap().to_f64().unwrap();
    let project = |row: &[f64]| -> Vec<f64> {
        projection.chunks(d).map(|w| w.iter().zip(row).map(|(w, x)| w * x).sum()).collect()
    };
    let own: Vec<Vec<f64>> =
        states(&student, &[1, 2, 3]).iter().map(|all| all.chunks(d).flat_map(project).collect()).collect();
    let others = states(&teacher, &[1, 3, 5]);
    let distance = |t: usize, s: usize| -> f64 {
        let rows = others[t].chunks(d).zip(own[s].chunks(d)).zip(&weights);
        rows.map(|((a, b), w)| w * a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / d as f64).sum()
    };
    let nearest = |t: usize, among: &[usize]| -> usize {
        *among.iter().min_by(|a, b| distance(t, **a).total_cmp(&distance(t, **b))).unwrap()
    };
    let want: f64 = (0..3).map(|t| distance(t, nearest(t, &[0, 1, 2]))).sum::<f64>() * 0.9 / 3.0;
    let (have, _) = term(&student, &free, &micro);
    // The weight is an f32.
    assert!((have - want).abs() < 1e-6 * want, "{have} {want}");
    // From the last down, below the choice before it; that choice again where there is none below.
    let ordered = matched(&mut student, &teacher, &dynamic(&layers, Order::Ascending));
    let (mut want, mut above) = (0.0, 3);
    for t in [2, 1, 0] {
        let among: Vec<usize> = if above > 0 { (0..above).collect() } else { vec![0] };
        above = nearest(t, &among);
        want += distance(t, above) * 0.9 / 3.0;
    }
    let (have, _) = term(&student, &ordered, &micro);
    assert!((have - want).abs() < 1e-6 * want, "{have} {want}");
    // A block without an FFN is not there to be chosen.
    let best = nearest(0, &[0, 1, 2]);
    let mut lame = student.duplicate().unwrap();
    lame.config.blocks[best].ffn_width = 0;
    lame.tensors.retain(|name, _| !name.starts_with(&format!("blocks.{best}.ffn.")));
    let first = matched(&mut lame, &teacher, &dynamic(&[1], Order::Free));
    let others: Vec<usize> = (1..=3).filter(|l| *l != best + 1).collect();
    let states = states(&lame, &others);
    let teacher_states = &hidden(&teacher, &micro, 1);
    let least = states
        .iter()
        .map(|all| {
            let own: Vec<f64> = all.chunks(d).flat_map(project).collect();
            let rows = teacher_states.chunks(d).zip(own.chunks(d)).zip(&weights);
            rows.map(|((a, b), w)| w * a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / d as f64).sum()
        })
        .fold(f64::INFINITY, f64::min);
    let (have, _) = term(&lame, &first, &micro);
    assert!((have - 0.9 * least).abs() < 1e-6 * have, "{have} {least}");
}

fn hidden(model: &Model, micro: &Micro, layer: usize) -> Vec<f64> {
    let mut pass = Pass::inference(model).tapping([Tap::Hidden(layer)]);
    pass.hidden(&micro.batch).unwrap();
    pass.hidden_at(layer).unwrap().tensor.to_f64().unwrap()
}

#[test]
fn dynamic_matchings_that_cannot_be_are_refused() {
    let device = cpu();
    let (mut student, teacher) = pair(&device);
    let mut refused = |dynamic: Dynamic| {
        let lessons = Lessons { dynamic: Some(&dynamic), ..lessons(&teacher, &[], None) };
        LayerwiseDistillation::new(&mut student, lessons).err().unwrap().to_string()
    };
    for layers in [&[][..], &[0, 1], &[2, 1], &[1, 1], &[1, 9]] {
        assert!(refused(dynamic(layers, Order::Free)).contains("layer"), "{layers:?}");
    }
    assert!(refused(Dynamic { weight: f32::NAN, ..dynamic(&[1], Order::Free) }).contains("weight"));
    let alone =
        Lessons { tutors: Vec::new(), dynamic: Some(&dynamic(&[1], Order::Free)), ..lessons(&teacher, &[], None) };
    assert!(LayerwiseDistillation::new(&mut student, alone).err().unwrap().to_string().contains("teacher"));
}
