//! DAPPLE's time of one step (Fan et al., PPoPP 2021, section 4.1): warm-up, steady phase, ending. Links between stages are
//! stages of their own.

use serde::Serialize;

/// A stage or a link, for one micro-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct StageTime {
    /// Seconds; for a link those of the activations.
    pub forward: f64,
    /// Seconds of the whole backward; for a link those of the gradients.
    pub backward: f64,
    /// Seconds after its last backward: AllReduce over its replicas and update.
    pub update: f64,
}

impl StageTime {
    pub fn both(&self) -> f64 {
        self.forward + self.backward
    }
}

/// How the ending counts the pivot stage and those behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// As printed: + sum of B over s..=Q for s < Q, - sum of B over Q..=s for s >= Q. The pivot's own last backward, which
    /// comes after M - 1 steady rounds, is then taken off where it should be added: a single stage takes M (F + B) - 2 B.
    /// Equal to the derived form wherever a stage before the pivot ends last.
    Printed,
    /// Counted out: t = T_w + T_s is when the pivot's last backward begins. Stage s <= Q ends the sum of B over s..=Q after
    /// it; stage s > Q ended the sum of B over Q+1..s before it.
    Derived,
}

/// L = T_w + T_s + T_e.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Latency {
    /// T_w = sum of F_s over s <= Q.
    pub warm_up: f64,
    /// T_s = (M - 1) (F_Q + B_Q).
    pub steady: f64,
    /// T_e = the latest stage's remaining backward, AllReduce and update.
    pub ending: f64,
    /// Q, counted with the links: even numbers are stages, odd ones links.
    pub pivot: usize,
}

impl Latency {
    pub fn seconds(&self) -> f64 {
        self.warm_up + self.steady + self.ending
    }
}

/// The pivot stage: starting at the last stage, Q moves to s when (M-1)(F_s + B_s) is above (M-1)(F_Q + B_Q) plus the sum of
/// F + B over the stages between s and Q.
pub fn pivot(times: &[StageTime], micros: usize) -> usize {
    let rounds = micros.saturating_sub(1) as f64;
    let mut pivot = times.len().saturating_sub(1);
    let mut between = 0.0;
    for stage in (0..pivot).rev() {
        if rounds * times[stage].both() > rounds * times[pivot].both() + between {
            pivot = stage;
            between = 0.0;
        } else {
            between += times[stage].both();
        }
    }
    pivot
}

/// A step of `micros` micro-batches over stages and links, in order.
pub fn latency(times: &[StageTime], micros: usize, ending: Ending) -> Latency {
    let Some(last) = times.len().checked_sub(1) else { return Latency::default() };
    let pivot = pivot(times, micros).min(last);
    let backward = |stages: &[StageTime]| stages.iter().map(|t| t.backward).sum::<f64>();
    let left = |stage: usize| match ending {
        _ if stage < pivot => backward(&times[stage..=pivot]),
        Ending::Printed => -backward(&times[pivot..=stage]),
        Ending::Derived if stage == pivot => times[pivot].backward,
        Ending::Derived => -backward(&times[pivot + 1..stage]),
    };
    Latency {
        warm_up: times[..=pivot].iter().map(|t| t.forward).sum(),
        steady: micros.saturating_sub(1) as f64 * times[pivot].both(),
        ending: (0..=last).map(|s| times[s].update + left(s)).fold(f64::NEG_INFINITY, f64::max),
        pivot,
    }
}

/// A run of stages at the end of the pipeline, as the three numbers that the stages before it need to know. The pivot is
/// looked for from the last stage on, so the rule is followed to the letter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tail {
    /// What a stage's (M - 1) (F + B) must be above to become the pivot: the pivot's own, and F + B of all before it.
    threshold: f64,
    /// That and the pivot's F + B: T_w + T_s and all backwards down to the first stage.
    through: f64,
    /// How much later than the first stage's last backward the step ends.
    late: f64,
}

impl Tail {
    /// One stage; `rounds` is M - 1.
    pub fn new(time: StageTime, rounds: f64) -> Self {
        let steady = rounds * time.both();
        Self { threshold: steady, through: steady + time.both(), late: time.update }
    }

    /// With a stage before all others.
    #[must_use]
    pub fn after(&self, time: StageTime, rounds: f64) -> Self {
        let late = time.update.max(self.late - time.backward);
        let alone = Self::new(time, rounds);
        if alone.threshold > self.threshold {
            return Self { late, ..alone };
        }
        Self { threshold: self.threshold + time.both(), through: self.through + time.both(), late }
    }

    pub fn seconds(&self) -> f64 {
        self.through + self.late
    }

    /// No stages before it make it faster than this: the threshold never falls, and the latency is never below it.
    pub fn at_least(&self) -> f64 {
        self.threshold
    }

    /// Whether no stages that are put before both make `other` the faster one: all three numbers after a stage rise with
    /// all three before it, also where only one of the two moves its pivot.
    pub fn dominates(&self, other: &Self) -> bool {
        self.threshold <= other.threshold && self.through <= other.through && self.late <= other.late
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Stream;

    fn equal(stages: usize, forward: f64, backward: f64) -> Vec<StageTime> {
        vec![StageTime { forward, backward, update: 0.0 }; stages]
    }

    #[test]
    fn four_equal_stages_and_eight_micro_batches_take_33() {
        for ending in [Ending::Printed, Ending::Derived] {
            let l = latency(&equal(4, 1.0, 2.0), 8, ending);
            assert_eq!((l.pivot, l.warm_up, l.steady, l.ending, l.seconds()), (3, 4.0, 21.0, 8.0, 33.0));
        }
    }

    #[test]
    fn one_stage_takes_all_its_work_where_the_printed_ending_loses_two_backwards() {
        let one = [StageTime { forward: 1.0, backward: 2.0, update: 0.5 }];
        assert_eq!(latency(&one, 8, Ending::Derived).seconds(), 24.5);
        assert_eq!(latency(&one, 8, Ending::Printed).seconds(), 20.5);
    }

    #[test]
    fn the_pivot_is_the_stage_that_stands_still_least() {
        // The heavy first stage outweighs those between it and the last.
        let mut times = equal(4, 1.0, 2.0);
        times[0] = StageTime { forward: 3.0, backward: 6.0, update: 0.0 };
        assert_eq!((pivot(&times, 8), pivot(&times, 2)), (0, 3));
        // One round more than the last stage's, six seconds of stages between: from four micro-batches on it is ahead.
        times[0] = StageTime { forward: 2.0, backward: 3.0, update: 0.0 };
        assert_eq!((pivot(&times, 4), pivot(&times, 5)), (3, 0));
        assert_eq!(pivot(&[], 3), 0);
    }

    #[test]
    fn a_late_update_behind_the_pivot_is_seen() {
        let mut times = equal(2, 1.0, 1.0);
        times[0] = StageTime { forward: 4.0, backward: 4.0, update: 0.0 };
        times[1].update = 100.0;
        // Stage 1 ends its last backward when stage 0 begins its own: at 4 + 3 x 8.
        assert_eq!(latency(&times, 4, Ending::Derived).seconds(), 128.0);
    }

    #[test]
    fn stages_put_in_front_one_by_one_give_the_formula() {
        let mut stream = Stream::new(11, 0);
        for _ in 0..2000 {
            let mut draw = || stream.uniform() * 4.0;
            let time = |f: &mut dyn FnMut() -> f64| StageTime { forward: f(), backward: f(), update: f() * 2.0 };
            let times: Vec<StageTime> = (0..7).map(|_| time(&mut draw)).collect();
            for micros in [1, 2, 5, 40] {
                for count in 1..=times.len() {
                    let rounds = micros as f64 - 1.0;
                    let [front @ .., last] = &times[..count] else { unreachable!() };
                    let tail = front.iter().rev().fold(Tail::new(*last, rounds), |tail, t| tail.after(*t, rounds));
                    let expected = latency(&times[..count], micros, Ending::Derived).seconds();
                    assert!((tail.seconds() - expected).abs() < 1e-9 * expected, "{} {expected}", tail.seconds());
                }
            }
        }
    }
}
