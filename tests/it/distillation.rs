//! Distillation layer by layer: every loss against its formula and its differences in f64, schedules, teachers, caches.

use std::collections::BTreeMap;
use std::sync::Arc;

use espalier::compress::distillation::*;
use espalier::device::{self, Device};
use espalier::nn::config::Size;
use espalier::nn::{Config, Model, Pass};
use espalier::ops::distill::{self, Kl};
use espalier::rng::Stream;
use espalier::tensor::Tensor;
use espalier::train::lifecycle::{Method, Micro, Teacher, Top};
use espalier::train::optimizer::Optimizer;
use espalier::train::trainer::step;
use espalier::{DType, Error, dispatch};

use crate::model::{SIZE, VOCABULARY, assemble, cpu, examples, micro, settings};

pub fn oracle() -> Arc<dyn Device> {
    device::open("reference").unwrap()
}

/// Weights larger than at initialisation, so that distributions differ.
pub fn enlivened(config: Config, device: &Arc<dyn Device>, seed: u64) -> Model {
    let mut model = Model::init(config, device, seed).unwrap();
    for (site, (_, tensor)) in model.tensors.iter_mut().enumerate() {
        let mut stream = Stream::new(seed, 1000 + site as u32);
        let values: Vec<f64> = tensor.to_f64().unwrap().iter().map(|x| x + 0.15 * stream.normal()).collect();
        *tensor = Tensor::from_f64(device, tensor.dims(), DType::F32, &values).unwrap();
    }
    model
}

pub fn pair(device: &Arc<dyn Device>) -> (Model, Arc<Model>) {
    let student = enlivened(Config::glm(SIZE, VOCABULARY), device, 3);
    let wider = Size { layers: 4, head_size: 12, ..SIZE };
    (student, Arc::new(enlivened(Config::glm(wider, VOCABULARY), device, 9)))
}

pub fn lessons<'a>(teacher: &Arc<Model>, matches: &'a [Match], logits: Option<Logits>) -> Lessons<'a> {
    let tutors = vec![Tutor { model: teacher.clone(), weight: 1.0 }];
    Lessons { tutors, matches, dynamic: None, logits, kept: None, steps: 10, seed: 1 }
}

/// The term and its gradients by parameter.
pub fn term(model: &Model, method: &dyn Method, micro: &Micro) -> (f64, BTreeMap<String, Vec<f64>>) {
    let mut pass = Pass::training(model).tapping(method.taps());
    let hidden = pass.hidden(&micro.batch).unwrap();
    let loss = method.on_loss(&mut pass, &hidden, micro).unwrap().unwrap();
    let seed = Tensor::from_f64(model.device(), loss.dims(), DType::F32, &[1.0]).unwrap();
    let (tape, leaves) = pass.into_leaves();
    let grads = tape.backward(&[(&loss, &seed)]).unwrap();
    let of = |(name, var): (&String, _)| Some((name.clone(), grads.of(var)?.unwrap().to_f64().unwrap()));
    (loss.tensor.to_f64().unwrap()[0], leaves.iter().filter_map(of).collect())
}

/// Slope along a random direction of all parameters against the difference, in f64.
pub fn check_slope(model: &Model, method: &dyn Method, micro: &Micro, case: &str) {
    let (loss, grads) = term(model, method, micro);
    assert!(loss.is_finite() && loss > 0.0, "{case}: {loss}");
    let mut stream = Stream::new(5, 5);
    let directions: BTreeMap<&String, Vec<f64>> =
        grads.iter().map(|(name, g)| (name, g.iter().map(|_| stream.normal()).collect())).collect();
    let slope: f64 = grads.iter().map(|(n, g)| g.iter().zip(&directions[n]).map(|(g, d)| g * d).sum::<f64>()).sum();
    let moved = |by: f64| {
        let mut other = model.clone();
        for (name, direction) in &directions {
            let tensor = model.get(name).unwrap();
            let values: Vec<f64> = tensor.to_f64().unwrap().iter().zip(direction).map(|(x, d)| x + by * d).collect();
            let changed = Tensor::from_f64(model.device(), tensor.dims(), DType::F32, &values).unwrap();
            other.tensors.insert((*name).clone(), changed);
        }
        term(&other, method, micro).0
    };
    let by = 1e-6;
    let difference = (moved(by) - moved(-by)) / (2.0 * by);
    assert!(slope != 0.0 && (slope - difference).abs() < 2e-6 * slope.abs().max(1e-3), "{case}: {slope} {difference}");
}

pub fn weighed(mut micro: Micro) -> Micro {
    // Weights that differ by row, zeros among them.
    let weights: Vec<f32> = micro.weights.to_vec::<f32>().unwrap();
    let weights: Vec<f32> = weights.iter().enumerate().map(|(i, w)| w * (0.5 + (i % 3) as f32)).collect();
    micro.weights = Tensor::from_slice(micro.weights.device(), &[weights.len()], &weights).unwrap();
    micro
}

#[test]
fn every_match_has_the_slope_of_its_differences() {
    let device = oracle();
    let micro = weighed(micro(&device, &assemble(&examples(3, 1))));
    let relation = |feature, loss, heads| Match { feature, heads, ..Match::hidden(-1, 1, loss) };
    let hidden = [
        MatchLoss::Mse,
        MatchLoss::HalfSum,
        MatchLoss::NormalisedMse,
        MatchLoss::Cosine,
        MatchLoss::Pkd,
        MatchLoss::Gram,
        MatchLoss::Mmd,
    ];
    let mut cases: Vec<Match> = hidden.map(|loss| Match::hidden(3, -1, loss)).to_vec();
    cases.extend([
        Match { projection: MatchProjection::Tanh, ..Match::hidden(0, 0, MatchLoss::Mse) },
        Match { direction: Direction::TeacherToStudent, ..Match::hidden(2, 1, MatchLoss::NormalisedMse) },
        relation(Feature::Attention, MatchLoss::Mse, 0),
        relation(Feature::Attention, MatchLoss::Kl, 0),
        relation(Feature::Value, MatchLoss::Kl, 4),
        relation(Feature::Query, MatchLoss::Kl, 1),
        relation(Feature::Key, MatchLoss::Mse, 8),
    ]);
    for case in cases {
        let (mut student, teacher) = pair(&device);
        let method = LayerwiseDistillation::new(&mut student, lessons(&teacher, &[case], None)).unwrap();
        check_slope(&student, &method, &micro, &format!("{case:?}"));
    }
}

#[test]
fn every_loss_on_logits_has_the_slope_of_its_differences() {
    let device = oracle();
    let micro = weighed(micro(&device, &assemble(&examples(3, 1))));
    for loss in [LogitLoss::Forward, LogitLoss::Reverse, LogitLoss::Jsd, LogitLoss::Mse] {
        for probability_shift in [false, true] {
            let logits = Logits { loss, probability_shift, beta: 0.3, ..Logits::default() };
            let (mut student, teacher) = pair(&device);
            let method = LayerwiseDistillation::new(&mut student, lessons(&teacher, &[], Some(logits))).unwrap();
            check_slope(&student, &method, &micro, &format!("{logits:?}"));
        }
    }
}

fn logits_of(model: &Model, micro: &Micro) -> Vec<Vec<f64>> {
    let mut pass = Pass::inference(model);
    let hidden = pass.hidden(&micro.batch).unwrap();
    let logits = pass.logits(&hidden).unwrap().tensor.to_f64().unwrap();
    logits.chunks(VOCABULARY).map(<[f64]>::to_vec).collect()
}

fn log_softmax(z: &[f64], t: f64) -> Vec<f64> {
    let lse = z.iter().map(|z| (z / t).exp()).sum::<f64>().ln();
    z.iter().map(|z| z / t - lse).collect()
}

fn kl(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
}

/// sum over rows of w f(z_S, z_T, row) as written down.
fn by_hand(student: &Model, teacher: &[Vec<f64>], micro: &Micro, f: impl Fn(&[f64], &[f64], usize) -> f64) -> f64 {
    let weights = micro.weights.to_f64().unwrap();
    let rows = logits_of(student, micro);
    (0..weights.len()).filter(|&i| weights[i] > 0.0).map(|i| weights[i] * f(&rows[i], &teacher[i], i)).sum()
}

fn assert_near(want: f64, have: f64, case: &str) {
    assert!((want - have).abs() < 1e-6 * want.abs().max(1e-6), "{case}: {have} where {want} is right");
}

#[test]
fn losses_on_logits_are_what_their_formulas_say() {
    let device = oracle();
    let micro = weighed(micro(&device, &assemble(&examples(3, 1))));
    let gold = micro.targets.to_f64().unwrap();
    let value = |logits: Logits| {
        let (mut student, teacher) = pair(&device);
        let method = LayerwiseDistillation::new(&mut student, lessons(&teacher, &[], Some(logits))).unwrap();
        term(&student, &method, &micro).0
    };
    let (student, teacher) = pair(&device);
    let taught = logits_of(&teacher, &micro);
    let base = Logits::default();
    let t = f64::from(base.temperature);
    let forward = by_hand(&student, &taught, &micro, |s, z, _| kl(&log_softmax(z, t), &log_softmax(s, t)));
    assert_near(t * t * forward, value(base), "forward, T^2");
    assert_near(forward, value(Logits { squared: false, ..base }), "forward");
    assert_near(0.3 * t * t * forward, value(Logits { weight: 0.3, ..base }), "weight");
    let reverse = by_hand(&student, &taught, &micro, |s, z, _| kl(&log_softmax(s, t), &log_softmax(z, t)));
    assert_near(t * t * reverse, value(Logits { loss: LogitLoss::Reverse, ..base }), "reverse");
    let squares =
        |s: &[f64], z: &[f64]| s.iter().zip(z).map(|(s, z)| ((s - z) / t).powi(2)).sum::<f64>() / VOCABULARY as f64;
    let mse = by_hand(&student, &taught, &micro, |s, z, _| squares(s, z));
    assert_near(mse, value(Logits { loss: LogitLoss::Mse, squared: false, ..base }), "squared error");
    // The largest and the gold logit change places.
    let shifted = |z: &[f64], row: usize| {
        let largest = (0..z.len()).fold(0, |m, i| if z[i] > z[m] { i } else { m });
        let mut z = z.to_vec();
        z.swap(largest, gold[row] as usize);
        z
    };
    let shift = by_hand(&student, &taught, &micro, |s, z, i| kl(&log_softmax(&shifted(z, i), t), &log_softmax(s, t)));
    assert!((shift - forward).abs() > 0.01 * forward, "the teacher errs somewhere");
    assert_near(t * t * shift, value(Logits { probability_shift: true, ..base }), "probability shift");
    let swapped = by_hand(&student, &taught, &micro, |s, z, i| squares(s, &shifted(z, i)));
    let shifted = Logits { loss: LogitLoss::Mse, squared: false, probability_shift: true, ..base };
    assert_near(swapped, value(shifted), "shifted squared error");
    temperatures_of_rows(&student, &taught, &micro, &value);
}

fn temperatures_of_rows(student: &Model, taught: &[Vec<f64>], micro: &Micro, value: &dyn Fn(Logits) -> f64) {
    let cosine = |s: &[f64], z: &[f64]| {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        dot(s, z) / (dot(s, s) * dot(z, z)).sqrt()
    };
    let peak = |s: &[f64]| log_softmax(s, 1.0).iter().map(|p| p.exp()).fold(0.0, f64::max);
    let base = Logits { temperature: 6.0, ..Logits::default() };
    let weights = micro.weights.to_f64().unwrap();
    let rows = logits_of(student, micro);
    for (schedule, beta, w) in [
        (TemperatureSchedule::Flsw { beta: 1.2, gamma: 2 }, 1.2, 0),
        (TemperatureSchedule::Flsw { beta: -0.7, gamma: 1 }, -0.7, 1),
        (TemperatureSchedule::Cwsm { beta: 0.006 }, 0.006, 2),
    ] {
        let of = |i: usize| match w {
            0 => (1.0 - cosine(&rows[i], &taught[i])).powi(2),
            1 => 1.0 - cosine(&rows[i], &taught[i]),
            _ => 1.0 / (peak(&rows[i]) + 1e-3),
        };
        let labelled: Vec<usize> = (0..weights.len()).filter(|&i| weights[i] > 0.0).collect();
        // All labelled rows count alike in the mean, whatever they weigh.
        let mean = labelled.iter().map(|&i| of(i)).sum::<f64>() / labelled.len() as f64;
        let temperature = |i: usize| 6.0 + (mean - of(i)) * f64::from(beta as f32);
        let want = by_hand(student, taught, micro, |s, z, i| {
            let t = temperature(i);
            t * t * kl(&log_softmax(z, t), &log_softmax(s, t))
        });
        let have = value(Logits { temperature_schedule: schedule, ..base });
        assert!((want - have).abs() < 1e-5 * want, "{schedule:?}: {have} where {want} is right");
    }
}

#[test]
fn the_divergence_of_two_coins_is_the_oracles() {
    let device = oracle();
    let tensor = |dims: &[usize], values: &[f64]| Tensor::from_f64(&device, dims, DType::F32, values).unwrap();
    let (student, teacher, one) =
        (tensor(&[1, 2], &[0.0; 2]), tensor(&[1, 2], &[3f64.ln(), 0.0]), tensor(&[1], &[1.0]));
    let op = Kl { direction: distill::Direction::Forward, temperature: 1.0, squared: true };
    let outputs = dispatch::run(&op, &[&student, &teacher, &one]).unwrap();
    let value = outputs[0].to_f64().unwrap()[0];
    assert!((value - 0.130_812).abs() < 1e-6, "{value}");
    let inputs = [&student, &teacher, &one, &outputs[1], &outputs[2], &outputs[3], &one];
    let backward = distill::KlBackward { direction: op.direction, temperature: 1.0, squared: true };
    let slope = dispatch::run_one(&backward, &inputs).unwrap().to_f64().unwrap();
    assert!((slope[0] + 0.25).abs() < 1e-12 && (slope[1] - 0.25).abs() < 1e-12, "{slope:?}");
}

/// Attention of both models as whole maps, by hand.
#[test]
fn relations_are_what_their_maps_say() {
    let device = oracle();
    let micro = weighed(micro(&device, &assemble(&examples(3, 1))));
    let (mut student, teacher) = pair(&device);
    let matches = [
        Match { feature: Feature::Attention, ..Match::hidden(-1, -1, MatchLoss::Kl) },
        Match { feature: Feature::Value, ..Match::hidden(-1, -1, MatchLoss::Kl) },
    ];
    let method = LayerwiseDistillation::new(&mut student, lessons(&teacher, &matches, None)).unwrap();
    let have = term(&student, &method, &micro).0;
    let [b, t] = micro.batch.tokens.dims()[..] else { panic!() };
    let lengths = micro.batch.lengths.as_ref().unwrap().to_vec::<u32>().unwrap();
    let contexts = micro.batch.context.as_ref().unwrap().to_vec::<u32>().unwrap();
    let weights = micro.weights.to_f64().unwrap();
    let heads = |model: &Model| {
        let last = model.config.blocks.len() - 1;
        let mut pass = Pass::inference(model).tapping([espalier::nn::Tap::Attention(last)]);
        pass.hidden(&micro.batch).unwrap();
        let kept = pass.heads_at(last).unwrap();
        let dim = kept.query.dims()[3];
        let values = [kept.query, kept.key, kept.value].map(|v| v.tensor.to_f64().unwrap());
        (values, dim, f64::from(kept.scale))
    };
    let models = [heads(&student), heads(&teacher)];
    let mut want = 0.0;
    for relation in [[0, 1], [2, 2]] {
        for row in 0..b {
            for query in 0..t {
                for head in 0..SIZE.heads {
                    let seen =
                        (0..t).filter(|&s| (s <= query || s < contexts[row] as usize) && s < lengths[row] as usize);
                    let keys: Vec<usize> = seen.collect();
                    if keys.is_empty() {
                        continue;
                    }
                    let [q, p] = [0, 1].map(|m| {
                        let (values, dim, scale) = &models[m];
                        let scale = if relation == [2, 2] { 1.0 / (*dim as f64).sqrt() } else { *scale };
                        let at = |which: usize, n: usize| {
                            &values[relation[which]][((row * t + n) * SIZE.heads + head) * dim..][..*dim]
                        };
                        let score =
                            |s: &usize| scale * at(0, query).iter().zip(at(1, *s)).map(|(x, y)| x * y).sum::<f64>();
                        log_softmax(&keys.iter().map(score).collect::<Vec<_>>(), 1.0)
                    });
                    want += weights[row * t + query] * kl(&p, &q) / SIZE.heads as f64;
                }
            }
        }
    }
    assert_near(want, have, "attention and value relations");
}

/// A batch whose teacher says what `top` keeps of `logits`.
fn with_top(micro: &Micro, logits: &[Vec<f64>], k: usize, t: f64) -> Micro {
    let n = micro.targets.count();
    let (mut slots, mut values) = (Vec::new(), Vec::new());
    for (row, z) in logits.iter().enumerate() {
        let p = log_softmax(z, t);
        let mut order: Vec<usize> = (0..z.len()).collect();
        order.sort_by(|a, b| p[*b].total_cmp(&p[*a]));
        let rest: f64 = order[k..].iter().map(|&i| p[i].exp()).sum();
        let fill = if k == z.len() { -40.0 } else { (rest / (z.len() - k) as f64).ln() };
        slots.extend(order[..k].iter().map(|&i| (row * VOCABULARY + i) as u32));
        values.extend(order[..k].iter().map(|&i| p[i] - fill));
    }
    let device = micro.targets.device();
    let top = Top {
        slots: Tensor::from_slice(device, &[n, k], &slots).unwrap(),
        values: Tensor::from_f64(device, &[n, k], DType::F32, &values).unwrap(),
    };
    let teacher = Teacher {
        hidden: Tensor::from_slice(device, &[1], &[0.0f32]).unwrap(),
        hidden_weights: micro.weights.clone(),
        soft_weights: micro.weights.clone(),
        hard_targets: micro.targets.clone(),
        hard_weights: micro.weights.clone(),
        top: Some(top),
    };
    Micro { teacher: Some(teacher), ..micro.clone() }
}

#[test]
fn the_largest_logits_alone_teach_too() {
    let device = oracle();
    let micro = weighed(micro(&device, &assemble(&examples(3, 1))));
    let (mut student, teacher) = pair(&device);
    let taught = logits_of(&teacher, &micro);
    let logits = Logits::default();
    let live = LayerwiseDistillation::new(&mut student, lessons(&teacher, &[], Some(logits))).unwrap();
    let whole = term(&student, &live, &micro).0;
    let none = Lessons { tutors: Vec::new(), ..lessons(&teacher, &[], Some(logits)) };
    let cached = LayerwiseDistillation::new(&mut student, none).unwrap();
    let all = with_top(&micro, &taught, VOCABULARY, 2.0);
    assert_near(whole, term(&student, &cached, &all).0, "all of them");
    let few = with_top(&micro, &taught, 5, 2.0);
    let want = by_hand(&student, &taught, &micro, |s, z, _| {
        let (mut p, q) = (log_softmax(z, 2.0), log_softmax(s, 2.0));
        let mut order: Vec<usize> = (0..z.len()).collect();
        order.sort_by(|a, b| p[*b].total_cmp(&p[*a]));
        let rest: f64 = order[5..].iter().map(|&i| p[i].exp()).sum();
        order[5..].iter().for_each(|&i| p[i] = (rest / (z.len() - 5) as f64).ln());
        4.0 * kl(&p, &q)
    });
    assert_near(want, term(&student, &cached, &few).0, "five of them");
    check_slope(&student, &cached, &few, "five of them");
    // A temperature that moves has no cached log-sum-exp; without the cache's tensors nothing can be said.
    let moving = Logits { temperature_schedule: TemperatureSchedule::Linear { to: 1.0 }, ..logits };
    let none = Lessons { tutors: Vec::new(), ..lessons(&teacher, &[], Some(moving)) };
    assert!(matches!(LayerwiseDistillation::new(&mut student, none), Err(Error::Parameter { .. })));
    let mut pass = Pass::training(&student);
    let hidden = pass.hidden(&micro.batch).unwrap();
    assert!(matches!(cached.on_loss(&mut pass, &hidden, &micro), Err(Error::Shape { .. })));
}

#[test]
fn several_teachers_are_averaged() {
    let device = oracle();
    let micro = weighed(micro(&device, &assemble(&examples(3, 1))));
    let (mut student, first) = pair(&device);
    let second = Arc::new(enlivened(Config::glm(Size { layers: 1, ..SIZE }, VOCABULARY), &device, 21));
    let tutors = vec![Tutor { model: first.clone(), weight: 3.0 }, Tutor { model: second.clone(), weight: 1.0 }];
    // The second one also teaches a layer.
    let matches = [Match { tutor: 1, weight: 0.0, ..Match::hidden(-1, -1, MatchLoss::Mse) }];
    let all = Lessons { tutors, ..lessons(&first, &matches, Some(Logits::default())) };
    let method = LayerwiseDistillation::new(&mut student, all).unwrap();
    let (one, two) = (logits_of(&first, &micro), logits_of(&second, &micro));
    let average = |(a, b): (&Vec<f64>, &Vec<f64>)| a.iter().zip(b).map(|(a, b)| 0.75 * a + 0.25 * b).collect();
    let taught: Vec<Vec<f64>> = one.iter().zip(&two).map(average).collect();
    let want = by_hand(&student, &taught, &micro, |s, z, _| 4.0 * kl(&log_softmax(z, 2.0), &log_softmax(s, 2.0)));
    assert_near(want, term(&student, &method, &micro).0, "two teachers");
    check_slope(&student, &method, &micro, "two teachers");
    let other = Arc::new(enlivened(Config::glm(SIZE, VOCABULARY + 1), &device, 2));
    let error = LayerwiseDistillation::new(&mut student, lessons(&other, &[], Some(Logits::default()))).err().unwrap();
    assert!(error.to_string().contains("vocabulary"), "{error}");
}

#[test]
fn kept_channels_are_compared_where_they_are_known() {
    let device = oracle();
    let micro = micro(&device, &assemble(&examples(2, 1)));
    let (mut student, teacher) = pair(&device);
    let kept: Vec<usize> = (0..student.config.width).map(|i| i + 3).collect();
    let matches = [Match::hidden(-1, -1, MatchLoss::HalfSum)];
    let known = Lessons { kept: Some(&kept), ..lessons(&teacher, &matches, None) };
    let method = LayerwiseDistillation::new(&mut student, known).unwrap();
    assert!(!student.tensors.keys().any(|name| name.starts_with("distil.")));
    let states = |model: &Model| {
        let hidden = Pass::inference(model).hidden(&micro.batch).unwrap().tensor;
        (hidden.to_f64().unwrap(), model.config.width)
    };
    let ((own, d), (other, e)) = (states(&student), states(&teacher));
    let weights = micro.weights.to_f64().unwrap();
    let row = |i: usize| (0..d).map(|c| (own[i * d + c] - other[i * e + kept[c]]).powi(2)).sum::<f64>();
    let want: f64 = (0..weights.len()).map(|i| 0.5 * weights[i] * row(i)).sum();
    assert_near(want, term(&student, &method, &micro).0, "Eq 10 on kept channels");
}

#[test]
fn presets_teach_and_leave_nothing_behind() {
    let device = cpu();
    let micro = micro(&device, &assemble(&examples(8, 1)));
    for preset in [
        Preset::TinyBert,
        Preset::TinyBertGeneral,
        Preset::DistilBert,
        Preset::MiniLm,
        Preset::MiniLmV2,
        Preset::LightChatglm,
        Preset::Bmcook,
        Preset::Cofi,
    ] {
        let (mut student, teacher) = pair(&device);
        let lesson = preset.lesson(student.config.blocks.len(), teacher.config.blocks.len());
        let all = lessons(&teacher, &lesson.matches, lesson.logits);
        let method = LayerwiseDistillation::new(&mut student, all).unwrap();
        let mut optimizer = Optimizer::new(&mut student, settings(2e-3), |_| true).unwrap();
        let mut methods: Vec<Box<dyn Method>> = vec![Box::new(method)];
        let micro = Micro { gold: lesson.gold > 0.0, ..micro.clone() };
        let mut losses = Vec::new();
        for done in 0..25 {
            methods[0].on_update(done, &student, &mut optimizer).unwrap();
            losses
                .push(step(&student, &mut optimizer, std::slice::from_ref(&micro), &methods, (0.0, 1, 25)).unwrap().0);
        }
        assert!(losses[24] < 0.9 * losses[0], "{preset:?}: {} to {}", losses[0], losses[24]);
        methods[0].on_finish(&mut student).unwrap();
        assert!(!student.tensors.keys().any(|name| name.starts_with("distil.")), "{preset:?}");
    }
}

#[test]
fn what_cannot_be_taught_is_refused_with_its_reason() {
    let device = cpu();
    let (student, teacher) = pair(&device);
    let of = |m: Match| LayerwiseDistillation::new(&mut student.clone(), lessons(&teacher, &[m], None)).err();
    let hidden = Match::hidden(-1, -1, MatchLoss::Mse);
    for (case, word) in [
        (Match { teacher: Layer(5), ..hidden }, "layer"),
        (Match { student: Layer(-4), ..hidden }, "layer"),
        (Match { feature: Feature::Attention, student: Layer(0), ..hidden }, "layer"),
        (Match { feature: Feature::Attention, loss: MatchLoss::Cosine, ..hidden }, "loss"),
        (Match { loss: MatchLoss::Kl, ..hidden }, "loss"),
        (Match { weight: f32::NAN, ..hidden }, "weight"),
        (Match { tutor: 1, ..hidden }, "tutor"),
        (Match { projection: MatchProjection::None, ..hidden }, "projection"),
        (Match { projection: MatchProjection::Kept, ..hidden }, "projection"),
    ] {
        let error = of(case).unwrap_or_else(|| panic!("{case:?} was taken"));
        assert!(matches!(&error, Error::Parameter { .. }) && error.to_string().contains(word), "{case:?}: {error}");
    }
}

/// Nothing labelled: nothing lost, nothing learned; not 0 / 0. A teacher of NaN gives NaN and no panic.
#[test]
fn degenerate_batches_have_a_defined_loss() {
    let device = oracle();
    let mut empty = micro(&device, &assemble(&examples(2, 1)));
    let n = empty.weights.count();
    empty.weights = Tensor::from_slice(&device, &[n], &vec![0.0f32; n]).unwrap();
    let losses = [MatchLoss::Cosine, MatchLoss::Pkd, MatchLoss::Gram, MatchLoss::NormalisedMse, MatchLoss::Mmd];
    let mut matches: Vec<Match> = losses.map(|loss| Match::hidden(-1, -1, loss)).to_vec();
    matches.push(Match { feature: Feature::Value, ..Match::hidden(-1, -1, MatchLoss::Kl) });
    for schedule in [TemperatureSchedule::Constant, TemperatureSchedule::Flsw { beta: 0.5, gamma: 1 }] {
        let logits = Logits { temperature_schedule: schedule, ..Logits::default() };
        let (mut student, teacher) = pair(&device);
        let all = lessons(&teacher, &matches, Some(logits));
        let method = LayerwiseDistillation::new(&mut student, all).unwrap();
        let (loss, grads) = term(&student, &method, &empty);
        assert!(loss == 0.0 && grads.values().flatten().all(|g| *g == 0.0), "{schedule:?}: {loss}");
    }
    let (mut student, teacher) = pair(&device);
    let mut broken = (*teacher).clone();
    let head = broken.get("head.weight").unwrap().dims().to_vec();
    let nan = Tensor::from_f64(&device, &head, DType::F32, &vec![f64::NAN; head.iter().product()]).unwrap();
    broken.tensors.insert("head.weight".into(), nan);
    let broken = Arc::new(broken);
    let method = LayerwiseDistillation::new(&mut student, lessons(&broken, &[], Some(Logits::default()))).unwrap();
    assert!(term(&student, &method, &micro(&device, &assemble(&examples(2, 1)))).0.is_nan());
}
