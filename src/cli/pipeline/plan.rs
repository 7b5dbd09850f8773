//! `pipeline plan`: `determine_parallelism` with its numbers.

use std::path::PathBuf;

use crate::cli::{Global, say, say_json};
use crate::error::{Error, Result};
use crate::pipeline::Link;
use crate::pipeline::plan::{Cluster, Parallelism, StagePlan, determine_parallelism};
use crate::pipeline::profile::{MAX_SECONDS, Profile};
use crate::report::{self, Alignment, Table, milliseconds};

#[derive(clap::Args)]
pub struct Args {
    /// What the model's pieces cost: a file of `pipeline profile`
    #[arg(long, value_name = "FILE")]
    profile: PathBuf,
    /// Devices of one machine
    #[arg(long, default_value_t = 4, conflicts_with = "machines", value_name = "N")]
    devices: usize,
    /// Several machines: 2x4 are two with four devices each, 4,2 is one with four and one with two
    #[arg(long, value_name = "MACHINES")]
    machines: Option<String>,
    /// Memory of each device
    #[arg(long, value_name = "GIB")]
    memory: Option<f64>,
    /// Micro-batches of a step; by default four for each device
    #[arg(long, value_name = "N")]
    micro_batches: Option<usize>,
    /// Between devices of a machine; by default the profile's
    #[arg(long, value_name = "GB/S")]
    bandwidth: Option<f64>,
    /// Between devices of a machine, until the first byte arrives; by default the profile's
    #[arg(long, value_name = "MICROSECONDS")]
    latency: Option<f64>,
    /// Between machines
    #[arg(long, default_value_t = 1.25, value_name = "GB/S")]
    between_bandwidth: f64,
    /// Between machines, until the first byte arrives
    #[arg(long, default_value_t = 50.0, value_name = "MICROSECONDS")]
    between_latency: f64,
}

/// "2x4" or "4,2".
fn machines(text: &str) -> Result<Vec<usize>> {
    let wrong = || {
        let rule =
            "COUNTxDEVICES such as 2x4, or the devices of each with commas, such as 4,2; 64 devices in all".into();
        Error::Usage { argument: "--machines", value: text.into(), rule }
    };
    let number = |part: &str| part.trim().parse().ok().filter(|n| (1..=64).contains(n)).ok_or_else(wrong);
    match text.split_once('x') {
        Some((count, devices)) => Ok(vec![number(devices)?; number(count)?]),
        None => text.split(',').map(number).collect(),
    }
}

fn cluster(args: &Args, profile: &Profile) -> Result<Cluster> {
    let machines = args.machines.as_deref().map_or_else(|| Ok(vec![args.devices]), machines)?;
    let within = |argument, value: f64, low: f64, high: f64| {
        if (low..=high).contains(&value) {
            return Ok(value);
        }
        // Debug: a large number in few digits.
        let rule = format!("a number from {low:?} to {high:?}");
        Err(Error::Usage { argument, value: format!("{value:?}"), rule })
    };
    let bandwidth = |argument, value| Ok(within(argument, value, 1e-6, 1e9)? * 1e9);
    let latency = |argument, value| Ok(within(argument, value, 0.0, 1e6 * MAX_SECONDS)? * 1e-6);
    let own = profile.link;
    let inside = Link {
        bytes_per_second: args.bandwidth.map_or(Ok(own.bytes_per_second), |v| bandwidth("--bandwidth", v))?,
        latency: args.latency.map_or(Ok(own.latency), |v| latency("--latency", v))?,
        ..own
    };
    let between = Link {
        bytes_per_second: bandwidth("--between-bandwidth", args.between_bandwidth)?,
        latency: latency("--between-latency", args.between_latency)?,
        ..own
    };
    let memory =
        args.memory.map(|gib| Ok::<_, Error>(within("--memory", gib, 1e-6, 1e9)? * (1u64 << 30) as f64)).transpose()?;
    Ok(Cluster { machines, inside, between, memory })
}

pub fn run(global: &Global, args: &Args) -> Result<()> {
    let profile = Profile::read(&args.profile)?;
    let cluster = cluster(args, &profile)?;
    let micros = args.micro_batches.unwrap_or_else(|| cluster.devices().saturating_mul(4));
    let found = determine_parallelism(&profile, &cluster, micros)?;
    if global.json() {
        say_json(&serde_json::json!({ "cluster": cluster, "parallelism": found }));
    } else {
        print(&profile, &cluster, &found);
    }
    Ok(())
}

pub(super) fn time(seconds: f64) -> String {
    milliseconds(seconds * 1e3)
}

/// A time that most stages do not have.
fn some(seconds: f64) -> String {
    if seconds > 0.0 { time(seconds) } else { "-".into() }
}

fn link(link: &Link) -> String {
    let speed = if link.bytes_per_second > 0.0 {
        format!("{} GB/s", report::number(link.bytes_per_second / 1e9))
    } else {
        "free".into()
    };
    format!("{speed}, {} latency", time(link.latency))
}

fn print(profile: &Profile, cluster: &Cluster, found: &Parallelism) {
    let plan = &found.plan;
    let name = |piece: usize| profile.pieces.get(piece).map_or(String::new(), |p| report::plain_text(&p.name));
    let model = (report::plain_text(&profile.model), report::plain_text(&profile.device));
    say(format!(
        "{} on {}, {} micro-batches of {} x {} tokens",
        model.0, model.1, plan.micro_batches, profile.rows, profile.columns
    ));
    let machines = if cluster.machines.len() == 1 { "machine" } else { "machines" };
    let (devices, count) = (cluster.devices(), cluster.machines.len());
    say(format!("{devices} devices on {count} {machines}, {} within", link(&cluster.inside)));
    if cluster.machines.len() > 1 {
        say(format!("{} between machines", link(&cluster.between)));
    }
    use Alignment::{Left, Right};
    let mut table = Table::new(&[
        ("stage", Right),
        ("pieces", Left),
        ("devices", Left),
        ("forward", Right),
        ("backward", Right),
        ("transfer", Right),
        ("AllReduce", Right),
        ("update", Right),
        ("in flight", Right),
        ("memory", Right),
    ]);
    for (index, stage) in plan.stages.iter().enumerate() {
        let StagePlan { pieces, price, .. } = stage;
        let (first, last) = (name(pieces.start), name(pieces.end - 1));
        let names = if pieces.len() == 1 { first } else { format!("{first} to {last}") };
        let machines = stage.devices.iter().enumerate().filter(|(_, n)| **n > 0);
        let machines: Vec<String> = machines.map(|(m, n)| format!("{n} on machine {m}")).collect();
        table.row(vec![
            index.to_string(),
            names,
            if cluster.machines.len() > 1 { machines.join(", ") } else { stage.replicas().to_string() },
            time(price.forward),
            time(price.backward_input + price.backward_weight),
            some(stage.transfer),
            some(price.all_reduce),
            some(price.optimizer),
            stage.in_flight.to_string(),
            report::bytes(stage.memory as u64),
        ]);
    }
    say(table.terminal());
    let l = &plan.latency;
    let place = if l.pivot.is_multiple_of(2) {
        format!("stage {}", l.pivot / 2)
    } else {
        format!("the link after stage {}", l.pivot / 2)
    };
    let phases = [("T_w", l.warm_up), ("T_s", l.steady), ("T_e", l.ending)].map(|(n, t)| format!("{n} {}", time(t)));
    say(format!("DAPPLE: L = {} = {}, pivot {place}", time(plan.seconds), phases.join(" + ")));
    say(format!(
        "T_comm {}, T_update {}, {} devices used",
        time(plan.communication),
        time(plan.update),
        plan.devices()
    ));
    if let Some(limit) = plan.limit {
        say(format!("memory holds {limit} micro-batches in flight, fewer than L assumes: see the simulated times"));
    }
    let mut table =
        Table::new(&[("schedule", Left), ("step", Right), ("idle", Right), ("most memory", Right), ("", Left)]);
    for (index, kind) in found.kinds.iter().enumerate() {
        let most = kind.memory.iter().copied().fold(0.0, f64::max);
        let note = match (index == found.best, kind.fits) {
            (true, _) => "best",
            (false, true) => "",
            (false, false) => "does not fit",
        };
        let cells = [time(kind.seconds), report::percent(kind.idle_share), report::bytes(most as u64), note.into()];
        table.row([kind.kind.to_string()].into_iter().chain(cells).collect());
    }
    say(table.terminal());
    let (own, best) = (time(found.seconds), found.kinds.get(found.best).map_or(String::new(), |k| k.kind.to_string()));
    match found.one_device {
        None => {
            let bytes = report::bytes(found.one_device_memory as u64);
            say(format!("one device does not hold it ({bytes}); the plan with {best} takes {own}"));
        }
        Some(one) if plan.devices() == 1 => say(format!("one device is better than any cut: {}", time(one))),
        Some(one) if found.one_is_better => {
            say(format!("one device is better: {} against {own} for the plan with {best}", time(one)));
        }
        Some(one) => {
            let gain = one / found.seconds;
            say(format!("the plan with {best} is better: {own} against {} on one device, {gain:.2} x", time(one)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_are_counted_or_listed() {
        assert_eq!(machines("2x4").ok(), Some(vec![4, 4]));
        assert_eq!(machines("4, 2").ok(), Some(vec![4, 2]));
        for wrong in ["", "x", "2x", "0x4", "2x4x2", "4,", "99999999999", "65"] {
            assert!(machines(wrong).is_err(), "{wrong}");
        }
    }
}
