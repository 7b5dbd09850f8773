//! Whether a schedule can run: every work once, in an order that no stage waits for in vain.

use super::schedule::{Event, Schedule, Work};
use crate::error::{Error, Result};

fn refuse<T>(schedule: &Schedule, stage: usize, position: usize, rule: String) -> Result<T> {
    let event = schedule.stages.get(stage).and_then(|s| s.get(position));
    let event = event.map_or("end".into(), ToString::to_string);
    Err(Error::Schedule { schedule: schedule.name.clone(), stage, position, event, rule })
}

/// What a chunk's micro-batch has had.
const FORWARD: u8 = 1;
const INPUT: u8 = 2;
const WEIGHT: u8 = 4;

/// Micro-batches of chunks whose activations a stage holds at most, per stage.
///
/// # Errors
/// `Schedule` with the first event that breaks a rule: a chunk on another stage than its own, work twice or missing, backward
/// before forward, weight gradients before input gradients, a message that nobody sends or takes, or events that wait for
/// each other.
pub fn validate(schedule: &Schedule) -> Result<Vec<usize>> {
    if schedule.stages.is_empty() || schedule.homes.is_empty() {
        return refuse(schedule, 0, 0, "a schedule has at least one stage and one chunk".into());
    }
    let (micros, chunks) = (schedule.micros, schedule.chunks());
    let mut had = vec![0u8; micros * chunks];
    let mut peaks = vec![0; schedule.stages.len()];
    for (stage, events) in schedule.stages.iter().enumerate() {
        let mut held = 0;
        for (position, event) in events.iter().enumerate() {
            let (chunk, micro) = (event.chunk as usize, event.micro as usize);
            if micro >= micros || schedule.homes.get(chunk) != Some(&stage) {
                let rule =
                    format!("{chunks} chunks, {micros} micro-batches, and a chunk's work stands on its own stage");
                return refuse(schedule, stage, position, rule);
            }
            let bits = &mut had[chunk * micros + micro];
            let (sets, needs) = match event.work {
                Work::Forward => (FORWARD, 0),
                Work::Backward => (INPUT | WEIGHT, FORWARD),
                Work::BackwardInput => (INPUT, FORWARD),
                Work::BackwardWeight => (WEIGHT, FORWARD | INPUT),
                _ => continue,
            };
            if *bits & sets != 0 {
                return refuse(schedule, stage, position, "the work stands in the schedule twice".into());
            }
            if *bits & needs != needs {
                return refuse(
                    schedule,
                    stage,
                    position,
                    "it comes after forward, weight gradients after input gradients".into(),
                );
            }
            *bits |= sets;
            if sets & FORWARD != 0 {
                held += 1;
                peaks[stage] = peaks[stage].max(held);
            }
            if sets & WEIGHT != 0 {
                held -= 1;
            }
        }
    }
    for chunk in 0..chunks {
        for micro in 0..micros {
            if had[chunk * micros + micro] != FORWARD | INPUT | WEIGHT {
                let stage = schedule.homes[chunk];
                let rule =
                    format!("micro-batch {micro} of chunk {chunk} has forward and backward, whole or in both parts");
                return refuse(schedule, stage, schedule.stages.get(stage).map_or(0, Vec::len), rule);
            }
        }
    }
    if schedule.has_messages() {
        walk(schedule, |_, _| ())?;
    } else {
        walk(&schedule.with_messages(), |_, _| ())?;
    }
    Ok(peaks)
}

/// Visits (stage, event) of a schedule with messages in an order in which everything that an event needs comes before it.
///
/// # Errors
/// `Schedule` when the remaining events wait for each other, or a message is never sent, sent twice or never taken.
pub fn walk(schedule: &Schedule, mut visit: impl FnMut(usize, Event)) -> Result<()> {
    const DOWN: usize = 0;
    const UP: usize = 1;
    let micros = schedule.micros;
    let index = |e: Event| e.chunk as usize * micros + e.micro as usize;
    // Results that are at hand: sent to the stage that asks, or computed on it.
    let mut sent = [vec![false; schedule.chunks() * micros], vec![false; schedule.chunks() * micros]];
    let mut taken = [vec![false; schedule.chunks() * micros], vec![false; schedule.chunks() * micros]];
    // What a chunk has computed itself: its output, the gradient of its input.
    let mut made = [vec![false; schedule.chunks() * micros], vec![false; schedule.chunks() * micros]];
    let mut next = vec![0; schedule.stages.len()];
    let mut queue: Vec<usize> = (0..schedule.stages.len()).rev().collect();
    let last = schedule.chunks() as u32 - 1;
    while let Some(stage) = queue.pop() {
        while let Some(&event) = schedule.stages[stage].get(next[stage]) {
            let at = index(event);
            match event.work {
                Work::ReceiveForward | Work::ReceiveBackward => {
                    let way = if event.work == Work::ReceiveForward { DOWN } else { UP };
                    if !sent[way][at] {
                        break;
                    }
                    if std::mem::replace(&mut taken[way][at], true) {
                        return refuse(schedule, stage, next[stage], "the message is received twice".into());
                    }
                }
                Work::SendForward | Work::SendBackward => {
                    let (way, chunk) = if event.work == Work::SendForward {
                        (DOWN, event.chunk + 1)
                    } else {
                        (UP, event.chunk.wrapping_sub(1))
                    };
                    if chunk > last {
                        return refuse(schedule, stage, next[stage], "no chunk takes this message".into());
                    }
                    if !made[way][at] {
                        return refuse(schedule, stage, next[stage], "what it sends is computed before".into());
                    }
                    let target = index(Event { chunk, ..event });
                    if std::mem::replace(&mut sent[way][target], true) {
                        return refuse(schedule, stage, next[stage], "the message is sent twice".into());
                    }
                    queue.push(schedule.homes[chunk as usize]);
                }
                work => {
                    // A neighbour on the same stage hands its result over without a message.
                    let (way, neighbour, exists) = match work {
                        Work::Forward => (DOWN, event.chunk.wrapping_sub(1), event.chunk > 0),
                        _ => (UP, event.chunk + 1, event.chunk < last),
                    };
                    let needs = exists && work != Work::BackwardWeight;
                    let local = needs && schedule.homes[neighbour as usize] == stage;
                    if needs && !(if local { sent[way][at] } else { taken[way][at] }) {
                        if local {
                            break;
                        }
                        return refuse(
                            schedule,
                            stage,
                            next[stage],
                            "what it needs from another stage is received before".into(),
                        );
                    }
                    let (way, neighbour, exists) = match work {
                        Work::Forward => (DOWN, event.chunk + 1, event.chunk < last),
                        _ => (UP, event.chunk.wrapping_sub(1), event.chunk > 0),
                    };
                    if work != Work::BackwardWeight {
                        made[way][at] = true;
                    }
                    if exists && work != Work::BackwardWeight && schedule.homes[neighbour as usize] == stage {
                        sent[way][index(Event { chunk: neighbour, ..event })] = true;
                    }
                }
            }
            visit(stage, event);
            next[stage] += 1;
        }
    }
    for (stage, events) in schedule.stages.iter().enumerate() {
        if next[stage] < events.len() {
            let waits: Vec<String> = (0..schedule.stages.len())
                .filter_map(|s| schedule.stages[s].get(next[s]).map(|e| format!("stage {s} at {e}")))
                .take(8)
                .collect();
            return refuse(schedule, stage, next[stage], format!("deadlock: {} wait for each other", waits.join(", ")));
        }
    }
    for way in [DOWN, UP] {
        for (at, _) in sent[way].iter().zip(&taken[way]).enumerate().filter(|(_, (sent, taken))| **sent && !**taken) {
            let (chunk, micro) = (at / micros, at % micros);
            let neighbour = if way == DOWN { chunk.wrapping_sub(1) } else { chunk + 1 };
            if schedule.homes.get(neighbour).is_some_and(|s| *s != schedule.homes[chunk]) {
                let stage = schedule.homes[chunk];
                let rule = format!("the message to chunk {chunk} for micro-batch {micro} is received");
                return refuse(schedule, stage, schedule.stages[stage].len(), rule);
            }
        }
    }
    Ok(())
}
