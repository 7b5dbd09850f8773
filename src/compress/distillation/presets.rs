//! The published ways of distilling, as lists of matches.

use serde::{Deserialize, Serialize};

use super::dynamic::{Dynamic, Order};
use super::logits::Logits;
use super::matches::{Direction, Feature, Layer, Match, MatchLoss, MatchProjection};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Preset {
    /// Jiao et al. 2020, both stages at once: embedding, hidden states and attention scores of layers g(m) = m L_T / L_S,
    /// soft labels with T = 1.
    TinyBert,
    /// Its first stage: without soft labels.
    TinyBertGeneral,
    /// Sanh et al. 2019: soft labels with T = 2 (weight 5), gold labels (2), cosine of the last hidden states (1).
    DistilBert,
    /// Wang et al. 2020: attention and value relations of the last layer, by KL.
    MiniLm,
    /// Wang et al. 2021: query, key and value relations of the last layer.
    MiniLmV2,
    /// LightChatGLM Eq 10 alone: half the sum of squares of the last hidden states, on the channels that were kept.
    LightChatglm,
    /// BMCook: hidden states of every layer, each side divided by its mean length, projected from the teacher's width.
    Bmcook,
    /// Xia et al. 2022: four of the teacher's layers, each with the student's nearest (0.9 together), soft labels with T = 2
    /// (0.1).
    Cofi,
}

/// What a preset stands for.
#[derive(Clone, Debug, PartialEq)]
pub struct Lesson {
    pub matches: Vec<Match>,
    pub dynamic: Option<Dynamic>,
    pub logits: Option<Logits>,
    /// Factor of the gold labels' cross-entropy.
    pub gold: f32,
}

/// The teacher's layer that student layer `m` of `student` learns from: evenly spread, the last from the last.
pub fn uniform(m: usize, student: usize, teacher: usize) -> i32 {
    (m * teacher / student.max(1)) as i32
}

/// Four layers at the ends of the quarters: 3, 6, 9, 12 of 12.
fn quarters(teacher: usize) -> Vec<i32> {
    let mut layers: Vec<i32> = (1..=4).map(|i| (i * teacher).div_ceil(4).max(1) as i32).collect();
    layers.dedup();
    layers
}

impl Preset {
    /// For a student and a teacher of so many blocks.
    pub fn lesson(self, student: usize, teacher: usize) -> Lesson {
        let pairs = |first: usize| (first..=student).map(move |m| (uniform(m, student, teacher), m as i32));
        let last = |feature, loss| Match { feature, ..Match::hidden(-1, -1, loss) };
        let (matches, logits, gold) = match self {
            Preset::TinyBert | Preset::TinyBertGeneral => {
                let learned =
                    |(t, s)| Match { projection: MatchProjection::Linear, ..Match::hidden(t, s, MatchLoss::Mse) };
                let attention = |(t, s)| Match { feature: Feature::Attention, ..Match::hidden(t, s, MatchLoss::Mse) };
                let soft = Logits { temperature: 1.0, ..Logits::default() };
                // Student layers below the teacher's first block have no block to learn attention from.
                let blocks = pairs(1).filter(|(t, _)| *t > 0);
                let matches = pairs(0).map(learned).chain(blocks.map(attention)).collect();
                (matches, (self == Preset::TinyBert).then_some(soft), 0.0)
            }
            Preset::DistilBert => {
                let soft = Logits { weight: 5.0, ..Logits::default() };
                (vec![last(Feature::Hidden, MatchLoss::Cosine)], Some(soft), 2.0)
            }
            Preset::MiniLm => {
                let features = [Feature::Attention, Feature::Value];
                (features.map(|f| last(f, MatchLoss::Kl)).to_vec(), None, 0.0)
            }
            Preset::MiniLmV2 => {
                let features = [Feature::Query, Feature::Key, Feature::Value];
                (features.map(|f| last(f, MatchLoss::Kl)).to_vec(), None, 0.0)
            }
            Preset::LightChatglm => (vec![last(Feature::Hidden, MatchLoss::HalfSum)], None, 0.0),
            Preset::Bmcook => {
                let direction = Direction::TeacherToStudent;
                let learned = |(t, s)| Match { direction, ..Match::hidden(t, s, MatchLoss::NormalisedMse) };
                (pairs(1).map(learned).collect(), None, 1.0)
            }
            Preset::Cofi => (Vec::new(), Some(Logits { weight: 0.1, ..Logits::default() }), 1.0),
        };
        let dynamic = (self == Preset::Cofi).then(|| Dynamic {
            layers: quarters(teacher).into_iter().map(Layer).collect(),
            order: Order::Free,
            weight: 0.9,
        });
        Lesson { matches, dynamic, logits, gold }
    }
}

#[cfg(test)]
mod tests {
    use super::super::logits::LogitLoss;
    use super::*;

    #[test]
    fn tinybert_maps_four_layers_on_twelve_by_threes() {
        let lesson = Preset::TinyBert.lesson(4, 12);
        let of = |feature| -> Vec<(i32, i32)> {
            let same = lesson.matches.iter().filter(|m| m.feature == feature);
            same.map(|m| (m.teacher.0, m.student.0)).collect()
        };
        assert_eq!(of(Feature::Hidden), [(0, 0), (3, 1), (6, 2), (9, 3), (12, 4)]);
        assert_eq!(of(Feature::Attention), [(3, 1), (6, 2), (9, 3), (12, 4)]);
        assert_eq!(lesson.logits.unwrap().temperature, 1.0);
        assert_eq!(Preset::TinyBertGeneral.lesson(4, 12).logits, None);
    }

    #[test]
    fn weights_are_the_published_ones() {
        let distilbert = Preset::DistilBert.lesson(6, 12);
        assert_eq!((distilbert.logits.unwrap().weight, distilbert.gold, distilbert.matches[0].weight), (5.0, 2.0, 1.0));
        let cofi = Preset::Cofi.lesson(6, 12).dynamic.unwrap();
        assert_eq!(cofi.layers, [3, 6, 9, 12].map(Layer));
        assert_eq!((cofi.order, cofi.weight), (Order::Free, 0.9));
        // Fewer blocks than matches.
        assert_eq!(Preset::Cofi.lesson(2, 2).dynamic.unwrap().layers, [1, 2].map(Layer));
        let soft = Preset::LightChatglm.lesson(2, 4);
        assert_eq!((soft.logits, soft.gold, soft.matches.len()), (None, 0.0, 1));
        assert_eq!(Preset::TinyBert.lesson(4, 12).logits.map(|l| l.loss), Some(LogitLoss::Forward));
    }
}
