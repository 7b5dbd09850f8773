//! Orders of a V: stage i owns chunk i on the way down and chunk 2 S - 1 - i on the way up, so that the first stage also has
//! the loss. Sources: Qi et al. 2023 (zero bubble) and 2024 (pipeline parallelism with controllable memory).

use super::schedule::{Item, Work};

/// Without bubbles in the memory of 1F1B. Written for at least 2 S - 1 micro-batches; those that do
/// not exist are left out.
pub fn zero_bubble(i: usize, stages: usize, micros: usize) -> Vec<Item> {
    let (down, up) = (i, 2 * stages - 1 - i);
    let padded = micros.max(2 * stages - 1);
    let mut items = Vec::with_capacity(padded * 6);
    // Micro-batches that have had each work, for the chunk on the way down and the one on the way up.
    let mut done = [[0usize; 3]; 2];
    let mut add = |side: usize, work: Work| {
        let slot = match work {
            Work::Forward => 0,
            Work::BackwardInput => 1,
            _ => 2,
        };
        items.push((work, [down, up][side], done[side][slot]));
        done[side][slot] += 1;
        done
    };
    const DOWN: usize = 0;
    const UP: usize = 1;
    for _ in 0..2 * (stages - i) - 1 {
        add(DOWN, Work::Forward);
    }
    for _ in 0..i {
        add(UP, Work::Forward);
        add(DOWN, Work::Forward);
    }
    let mut state = [[0; 3]; 2];
    for _ in 0..stages - i {
        add(UP, Work::Forward);
        add(UP, Work::BackwardInput);
        state = add(UP, Work::BackwardWeight);
    }
    while state[UP][0] < state[DOWN][0] || state[DOWN][0] < padded {
        if state[DOWN][0] < padded {
            add(DOWN, Work::Forward);
        }
        for side in [DOWN, UP] {
            if side == UP {
                add(UP, Work::Forward);
            }
            add(side, Work::BackwardInput);
            state = add(side, Work::BackwardWeight);
        }
    }
    for _ in 0..i {
        add(DOWN, Work::BackwardInput);
        state = add(UP, Work::BackwardInput);
    }
    for _ in 0..stages - i {
        add(DOWN, Work::BackwardInput);
        state = add(DOWN, Work::BackwardWeight);
    }
    for side in [UP, DOWN] {
        for _ in state[side][2]..padded {
            add(side, Work::BackwardWeight);
        }
    }
    items.retain(|&(_, _, micro)| micro < micros);
    items
}

/// Passes of one micro-batch on a stage, in the order in which it meets them. Weight gradients fill what is left.
const PASSES: usize = 4;
/// Units of work of one micro-batch on a stage, where each of them takes as long as the others: both chunks forward, backward
/// to the input and to the weights. A stage takes in a micro-batch every so many units.
const PERIOD: usize = 6;

/// When the passes of one micro-batch begin: how long it stays decides what a stage has to hold (the 2024 paper's building
/// block). Passes of different micro-batches never meet, because they begin at different times modulo [`PERIOD`].
pub struct Pace {
    /// Units from stage to stage: forward down, forward up, backward of the chunk on the way up, of the one on the way down.
    strides: [usize; PASSES],
    /// Units from the last pass of one of these to the first of the next.
    turns: [usize; PASSES - 1],
    /// Chunks of micro-batches that a stage may hold: twice its micro-batches.
    most: usize,
}

impl Pace {
    /// Holds (S + 2) / 2 micro-batches a stage, half of what 1F1B does.
    pub fn half(stages: usize) -> Self {
        let turns = if stages.is_multiple_of(2) { [4, 1, 5] } else { [2, 1, 1] };
        Self { strides: [1, 2, 1, 2], turns, most: (stages + 2) / 2 * 2 }
    }

    /// Holds (S + 4) / 3 micro-batches a stage, a third of what 1F1B does.
    pub fn least(stages: usize) -> Self {
        let turns = if stages.is_multiple_of(3) { [1, 3, 1] } else { [1, 1, 1] };
        Self { strides: [1; PASSES], turns, most: (stages + 4) / 3 * 2 }
    }

    /// When the passes of the first micro-batch begin on stage i.
    fn starts(&self, i: usize, stages: usize) -> [usize; PASSES] {
        let mut starts = [0; PASSES];
        let mut turn = 0;
        for (pass, start) in starts.iter_mut().enumerate() {
            let along = if pass % 2 == 0 { i } else { stages - 1 - i };
            *start = turn + self.strides[pass] * along;
            turn += self.strides[pass] * (stages - 1) + self.turns.get(pass).copied().unwrap_or(0);
        }
        starts
    }
}

/// One stage while an order is made.
struct Progress {
    starts: [usize; PASSES],
    /// Micro-batches that have had each pass.
    done: [usize; PASSES],
    /// Chunks that still lack their weight gradients, first come first served.
    owed: std::collections::VecDeque<(usize, usize)>,
    held: usize,
    items: Vec<Item>,
}

/// All stages' orders at a pace: each stage does its next pass as soon as it can, a weight gradient where it cannot. That
/// keeps the pace's memory and squeezes out what bubbles the beginning and the end would have.
pub fn paced(pace: Pace, stages: usize, micros: usize) -> Vec<Vec<Item>> {
    let start = |i| Progress {
        starts: pace.starts(i, stages),
        done: [0; PASSES],
        owed: Default::default(),
        held: 0,
        items: Vec::with_capacity(PERIOD * micros),
    };
    let mut all: Vec<Progress> = (0..stages).map(start).collect();
    // One round is one unit of time. Only a stage that worked, or whose neighbour did, can have something new to do.
    let mut awake: Vec<usize> = (0..stages).collect();
    while !awake.is_empty() {
        let chosen: Vec<(usize, Option<usize>)> =
            awake.iter().filter_map(|&i| Some((i, choose(&all, i, micros, pace.most)?))).collect();
        awake.clear();
        for (i, pass) in chosen {
            all[i].perform(pass, [i, 2 * stages - 1 - i]);
            awake.extend(i.saturating_sub(1)..(i + 2).min(stages));
        }
        awake.sort_unstable();
        awake.dedup();
    }
    all.into_iter().map(|stage| stage.items).collect()
}

/// What stage i does next: a pass, a weight gradient (`Some(None)`), or nothing yet.
fn choose(all: &[Progress], i: usize, micros: usize, most: usize) -> Option<Option<usize>> {
    let stage = &all[i];
    let left = (0..PASSES).filter(|&pass| stage.done[pass] < micros);
    let next = left.min_by_key(|&pass| stage.starts[pass] + PERIOD * stage.done[pass]);
    let ready = |pass: usize| {
        let last = all.len() - 1;
        // Where a way begins, it turns on the same stage.
        let before = match pass % 2 {
            0 if i > 0 => Some((i - 1, pass)),
            1 if i < last => Some((i + 1, pass)),
            _ => pass.checked_sub(1).map(|pass| (i, pass)),
        };
        let there = before.is_none_or(|(stage, pass_before)| all[stage].done[pass_before] > all[i].done[pass]);
        there && (pass > 1 || stage.held < most)
    };
    match next.filter(|&pass| ready(pass)) {
        Some(pass) => Some(Some(pass)),
        None => (!stage.owed.is_empty()).then_some(None),
    }
}

impl Progress {
    fn perform(&mut self, pass: Option<usize>, chunks: [usize; 2]) {
        match pass {
            Some(pass) => {
                let micro = self.done[pass];
                self.done[pass] += 1;
                if pass < 2 {
                    self.held += 1;
                    self.items.push((Work::Forward, chunks[pass], micro));
                } else {
                    let chunk = chunks[3 - pass];
                    self.items.push((Work::BackwardInput, chunk, micro));
                    self.owed.push_back((chunk, micro));
                }
            }
            None => {
                if let Some((chunk, micro)) = self.owed.pop_front() {
                    self.held -= 1;
                    self.items.push((Work::BackwardWeight, chunk, micro));
                }
            }
        }
    }
}
