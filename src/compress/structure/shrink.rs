//! Whole heads and neurons go, in rounds: scored on what is left, chosen, removed, scored again.

use serde::{Deserialize, Serialize};

use super::gates::{self, Absolute};
use super::judge::{Judge, Objective};
use super::keep::Keep;
use super::prune::prune;
use super::select::{self, Count};
use super::sites::{Kind, Site};
use super::weights;
use crate::error::{Error, Result};
use crate::nn::Model;
use crate::rng::Stream;
use crate::train::lifecycle::Micro;

/// How units are ranked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Score {
    /// The gradient of a gate (Michel et al. 2019).
    Gate,
    /// Weights times their gradients (TextPruner).
    Weights,
    /// The baseline.
    Random,
}

/// Which heads stay. An encoder-decoder's attentions to the source count as others do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Heads {
    /// Heads that each attention keeps: on average, where they are uneven.
    pub keep: usize,
    #[serde(default = "gate")]
    pub score: Score,
    /// Of `gate`.
    #[serde(default)]
    pub absolute: Absolute,
    /// Divides the scores of each attention by their L2 norm, so that attentions compare.
    #[serde(default = "yes")]
    pub normalise: bool,
    /// As many of every attention.
    #[serde(default)]
    pub even: bool,
    /// Heads that every attention keeps.
    #[serde(default = "one")]
    pub floor: usize,
    /// At most so many go in a round, whose number this may raise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_round: Option<usize>,
}

/// Which neurons stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Neurons {
    /// Neurons that each FFN keeps: on average, where they are uneven.
    pub keep: usize,
    #[serde(default = "by_weights")]
    pub score: Score,
    /// Of `gate`.
    #[serde(default)]
    pub absolute: Absolute,
    /// Divides the scores of each FFN by their L2 norm.
    #[serde(default)]
    pub normalise: bool,
    /// As many of every FFN.
    #[serde(default)]
    pub even: bool,
    /// Neurons that every FFN keeps.
    #[serde(default = "tile")]
    pub floor: usize,
    /// Each FFN keeps a multiple of these: tiles of a kernel, experts, quantization groups. Neurons are taken in groups of so
    /// many, in the order of their scores.
    #[serde(default = "tile")]
    pub multiple_of: usize,
}

fn gate() -> Score {
    Score::Gate
}

fn by_weights() -> Score {
    Score::Weights
}

fn yes() -> bool {
    true
}

fn one() -> usize {
    1
}

fn tile() -> usize {
    super::FFN_MULTIPLE
}

/// What of the removal is done after a share of the rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Progress {
    /// As many in each round, the remainder in the first ones (TextPruner).
    #[default]
    Linear,
    /// Many first, few in the end: 1 - (1 - t)^3.
    Cubic,
}

/// What goes first in a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Heads and neurons by the same scoring.
    #[default]
    Together,
    HeadsFirst,
    FfnFirst,
}

/// How heads and neurons go.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    pub heads: Option<Heads>,
    pub ffn: Option<Neurons>,
    pub rounds: usize,
    pub progress: Progress,
    pub order: Order,
    pub objective: Objective,
    pub seed: u64,
}

/// What of one kind stays.
struct Aim {
    kind: Kind,
    score: Score,
    absolute: Absolute,
    normalise: bool,
    even: bool,
    /// Units that go together.
    group: usize,
    floor: usize,
    keep: usize,
}

impl Plan {
    /// Rounds that it takes to remove `units` heads.
    fn rounds(&self, removed: usize) -> usize {
        let heads = self.heads.and_then(|heads| heads.per_round).map_or(1, |n| removed.div_ceil(n.max(1)));
        self.rounds.max(heads).max(1)
    }

    fn aims(&self) -> Vec<Aim> {
        let heads = self.heads.map(|h| Aim {
            kind: Kind::Heads,
            score: h.score,
            absolute: h.absolute,
            normalise: h.normalise,
            even: h.even,
            group: 1,
            floor: h.floor,
            keep: h.keep,
        });
        let ffn = self.ffn.map(|n| Aim {
            kind: Kind::Neurons,
            score: n.score,
            absolute: n.absolute,
            normalise: n.normalise,
            even: n.even,
            group: n.multiple_of,
            floor: n.floor,
            keep: n.keep,
        });
        let mut aims: Vec<Aim> = heads.into_iter().chain(ffn).collect();
        if self.order == Order::FfnFirst {
            aims.reverse();
        }
        aims
    }
}

/// Chooses heads and neurons of `model`, a trained dense one, on calibration batches.
///
/// # Errors
/// `Error::Parameter` for numbers that the model does not have; those of the passes.
pub fn shrink(model: &Model, micros: &[Micro], plan: &Plan) -> Result<Keep> {
    let mut keep = Keep::all(&model.config);
    let aims = plan.aims();
    let counts: Vec<Count> = aims.iter().map(|aim| aim.count(model)).collect::<Result<_>>()?;
    let heads = aims.iter().zip(&counts).filter(|(aim, _)| aim.kind == Kind::Heads);
    let removed = heads.map(|(_, count)| count.total - count.target).sum();
    let rounds = plan.rounds(removed);
    let mut stream = Stream::new(plan.seed, 0x5eed);
    let mut left = model.clone();
    let mut stay: Vec<usize> = counts.iter().map(|count| count.total).collect();
    for round in 1..=rounds {
        let per_round = |aim: &Aim| plan.heads.and_then(|h| h.per_round).filter(|_| aim.kind == Kind::Heads);
        let next = |(aim, count): (&Aim, &Count)| count.after(round, rounds, plan.progress, per_round(aim));
        let after: Vec<usize> = aims.iter().zip(&counts).map(next).collect();
        // Scores of a round in which nothing goes decide nothing.
        if round > 1 && after == stay {
            continue;
        }
        // A model compares with itself as long as nothing has gone.
        let whole = left.config == model.config;
        stay = after;
        let objective = if whole && plan.objective.compares() { Objective::Entropy } else { plan.objective };
        let judge = Judge { objective, dense: Some(model) };
        let mut chosen = Vec::new();
        for (aim, &groups) in aims.iter().zip(&stay) {
            let sites = Site::of(&left.config, aim.kind);
            let scores = aim.scores(&left, micros, &sites, &judge, &mut stream)?;
            let stay = select::choose(&scores, groups, aim.even, aim.floor.div_ceil(aim.group), aim.group);
            chosen.extend(sites.into_iter().zip(stay));
            if plan.order != Order::Together {
                left = narrowed(model, &mut keep, &mut chosen)?;
            }
        }
        left = narrowed(model, &mut keep, &mut chosen)?;
    }
    Ok(keep)
}

/// What is left of `model` without what was not chosen.
fn narrowed(model: &Model, keep: &mut Keep, chosen: &mut Vec<(Site, Vec<usize>)>) -> Result<Model> {
    for (site, stay) in chosen.drain(..) {
        site.narrow(keep, &stay);
    }
    prune(model, keep)
}

impl Aim {
    /// Groups of units that there are, and that stay.
    fn count(&self, model: &Model) -> Result<Count> {
        let sites = Site::of(&model.config, self.kind);
        let refuse = |parameter, value: usize, allowed| {
            Err(Error::Parameter { op: "shrink", parameter, value: value.to_string(), allowed })
        };
        let smallest = sites.iter().map(|site| site.units).min().unwrap_or(0);
        if self.group == 0 || !self.keep.is_multiple_of(self.group) {
            return refuse("keep", self.keep, "a multiple of multiple_of");
        }
        if self.keep == 0 || self.keep > smallest {
            return refuse("keep", self.keep, "1 to what the smallest attention or FFN has");
        }
        if self.floor == 0 || self.floor > self.keep {
            return refuse("floor", self.floor, "1 to keep");
        }
        let total = sites.iter().map(|site| site.units / self.group).sum();
        Ok(Count { total, target: sites.len() * self.keep / self.group, sites: sites.len(), even: self.even })
    }

    fn scores(
        &self,
        model: &Model,
        micros: &[Micro],
        sites: &[Site],
        judge: &Judge,
        stream: &mut Stream,
    ) -> Result<Vec<Vec<f64>>> {
        let mut scores = match self.score {
            Score::Gate => gates::scores(model, micros, sites, (judge, self.absolute))?,
            Score::Weights => weights::scores(model, micros, sites, judge, self.even)?,
            Score::Random => sites.iter().map(|site| (0..site.units).map(|_| stream.uniform()).collect()).collect(),
        };
        if self.normalise {
            scores.iter_mut().for_each(|scores| normalise(scores));
        }
        Ok(scores)
    }
}

/// Divides by the L2 norm; zeros stay.
pub fn normalise(scores: &mut [f64]) {
    let norm = scores.iter().map(|s| s * s).sum::<f64>().sqrt();
    if norm > 0.0 {
        scores.iter_mut().for_each(|s| *s /= norm);
    }
}
