//! Losses of distillation and weights of mixtures.

use espalier::compress::hybrid::{StudentLoss, stream_weights, student_factors};
use espalier::data::mixture;
use espalier::ops::distill::{Direction, HiddenMse, Kl, Reduction};
use espalier::tape::Tape;
use espalier::tensor::Tensor;

use super::{Draw, holds};

struct Logits {
    rows: usize,
    classes: usize,
    student: Vec<f32>,
    teacher: Vec<f32>,
    temperature: f32,
}

impl Logits {
    fn draw(draw: &mut Draw) -> Self {
        let (rows, classes) = (draw.size(4), 1 + draw.size(9));
        let mut normal = |n: usize| (0..n).map(|_| 2.0 * draw.stream.normal() as f32).collect();
        let (student, teacher) = (normal(rows * classes), normal(rows * classes));
        Self { rows, classes, student, teacher, temperature: 0.5 + 3.0 * draw.stream.uniform() as f32 }
    }

    fn tensors(&self, draw: &Draw) -> [Tensor; 3] {
        let dims = [self.rows, self.classes];
        [
            draw.tensor(&dims, &self.student),
            draw.tensor(&dims, &self.teacher),
            draw.tensor(&[self.rows], &vec![1.0; self.rows]),
        ]
    }
}

fn softmax(row: &[f32], temperature: f32) -> Vec<f64> {
    let powers: Vec<f64> = row.iter().map(|x| f64::from(x / temperature).exp()).collect();
    let total: f64 = powers.iter().sum();
    powers.iter().map(|p| p / total).collect()
}

#[test]
fn divergence_is_not_negative_and_nothing_between_equals() {
    holds("KL", |draw| {
        let logits = Logits::draw(draw);
        let [student, teacher, weights] = logits.tensors(draw);
        for direction in [Direction::Forward, Direction::Reverse, Direction::Jsd { beta: 0.3 }] {
            let op = Kl { direction, temperature: logits.temperature, squared: true };
            let loss = draw.run(&op, &[&student, &teacher, &weights]).remove(0).to_f64().unwrap();
            assert!(loss.iter().all(|x| *x >= -1e-5), "{direction:?} {loss:?}");
            let same = draw.run(&op, &[&teacher, &teacher, &weights]).remove(0).to_f64().unwrap();
            assert!(same.iter().all(|x| x.abs() < 1e-5), "{direction:?} {same:?}");
        }
    });
}

#[test]
fn the_gradient_of_the_divergence_is_its_closed_form() {
    holds("KD gradient", |draw| {
        let logits = Logits::draw(draw);
        let [student, teacher, weights] = logits.tensors(draw);
        let mut tape = Tape::new();
        let leaf = tape.leaf(&student);
        let constants = [&teacher, &weights].map(|t| espalier::tape::Var::constant(t.clone()));
        let op = Kl { direction: Direction::Forward, temperature: logits.temperature, squared: true };
        let loss = tape.first(op, &[&leaf, &constants[0], &constants[1]]).unwrap();
        let seed = draw.tensor(loss.dims(), &vec![1.0; loss.tensor.count()]);
        let grads = tape.backward(&[(&loss, &seed)]).unwrap();
        let have = grads.of(&leaf).unwrap().unwrap().to_f64().unwrap();
        let (n, t) = (logits.classes, logits.temperature);
        for (row, have) in have.chunks(n).enumerate() {
            let [p, q] = [&logits.teacher, &logits.student].map(|all| softmax(&all[row * n..(row + 1) * n], t));
            for ((p, q), have) in p.iter().zip(&q).zip(have) {
                assert!((f64::from(t) * (q - p) - have).abs() < 1e-5, "{p} {q} {have}");
            }
        }
    });
}

#[test]
fn hidden_states_are_compared_by_their_squares() {
    holds("hidden MSE", |draw| {
        let dims = [draw.size(5), draw.size(12)];
        let ((a, left), (b, right)) = (draw.matrix(dims), draw.matrix(dims));
        let weights: Vec<f32> = (0..dims[0]).map(|_| draw.below(2) as f32).collect();
        let rows = draw.tensor(&[dims[0]], &weights);
        let op = HiddenMse { reduction: Reduction::HalfSum, normalised: false };
        let loss = |x: &Tensor, y: &Tensor| draw.run(&op, &[x, y, &rows]).remove(0).to_f64().unwrap()[0];
        let want: f64 = (0..left.len())
            .map(|i| f64::from(weights[i / dims[1]]) * 0.5 * (f64::from(left[i]) - f64::from(right[i])).powi(2))
            .sum();
        assert!((loss(&a, &b) - want).abs() <= 1e-5 * want.max(1e-6), "{} {want}", loss(&a, &b));
        assert_eq!((loss(&a, &a), loss(&a, &b)), (0.0, loss(&b, &a)));
    });
}

#[test]
fn streams_share_what_there_is() {
    holds("mixture", |draw| {
        let (n_s, n_d) = (draw.size(1000), draw.size(1000));
        let alpha = draw.stream.uniform();
        let (s, d) = stream_weights(alpha, (n_s, n_d));
        assert!((s * n_s as f64 + d * n_d as f64 - 1.0).abs() < 1e-12 && s >= 0.0 && d >= 0.0);
        let (w_s, w_d) = (0.1 + draw.stream.uniform(), 0.1 + draw.stream.uniform());
        let share = mixture::alpha(n_s, n_d, w_s, w_d).unwrap();
        let want = w_s * n_s as f64 / (w_s * n_s as f64 + w_d * n_d as f64);
        assert!((share - want).abs() < 1e-12);
        let (soft, gold) = student_factors(StudentLoss::Corrected, alpha);
        assert!((soft + gold - 1.0).abs() < 1e-12);
    });
}
