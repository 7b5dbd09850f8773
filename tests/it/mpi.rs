//! One process per rank over MPI: the losses of threads, an end in good order when a rank is lost, and every fault named.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier::Error;
use espalier::device;
use espalier::nn::{Config, Model};
use espalier::pipeline::executor::{Pipeline, Setup};
use espalier::pipeline::fault::{Injection, Planted};
use espalier::pipeline::remote::{self, Across};
use espalier::pipeline::words::Described;
use espalier::pipeline::{Kind, Work, mpi, rank};
use espalier::recipe::Recipe;

use crate::faults::{places, word};
use crate::model::cpu;
use crate::run_folder::teacher;
use crate::stages::{SIZE, STEPS, VOCABULARY, micros, setup};
use crate::training::tiny;

const RANKS: usize = 4;

/// Whether there is a launcher; where `ESPALIER_REQUIRE` names mpi its absence is a failure.
fn launcher() -> bool {
    let found = Command::new("mpirun").arg("--version").output().is_ok_and(|output| output.status.success());
    let required = std::env::var("ESPALIER_REQUIRE").unwrap_or_default();
    assert!(found || !required.split(',').any(|r| r == "mpi"), "no mpirun");
    found
}

/// `program` on all ranks; more than this machine has cores, and as any user.
fn mpirun(program: &Path) -> Command {
    let mut command = Command::new("mpirun");
    command
        .args(["-n", &RANKS.to_string()])
        .arg(program)
        .envs(["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"].map(|name| (name, "1")))
        .envs(["OMPI_MCA_rmaps_base_oversubscribe", "OMPI_MCA_mpi_yield_when_idle"].map(|name| (name, "1")))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Ends a run that hangs, so that the test fails instead of waiting.
fn finish(mut child: Child, limit: Duration) -> Output {
    let began = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if began.elapsed() > limit {
            child.kill().unwrap();
            panic!("it hangs: {}", said(&child.wait_with_output().unwrap()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.wait_with_output().unwrap()
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn arguments(recipe: &Path, out: &Path) -> [std::ffi::OsString; 6] {
    ["run".into(), recipe.into(), "--device".into(), "cpu".into(), "--out".into(), out.into()]
}

/// A folder with a recipe and what threads made of it.
struct Threads {
    folder: tempfile::TempDir,
    recipe: PathBuf,
}

impl Threads {
    fn run(recipe: &Recipe) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("recipe.toml");
        fs::write(&path, recipe.to_toml().unwrap()).unwrap();
        let made = Self { folder, recipe: path };
        let output = Command::new(env!("CARGO_BIN_EXE_espalier"))
            .args(arguments(&made.recipe, &made.out()))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", said(&output));
        made
    }

    fn out(&self) -> PathBuf {
        self.folder.path().join("threads")
    }

    fn stages(&self) -> Vec<String> {
        let names = fs::read_dir(self.out().join("stages")).unwrap();
        names.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// The same command under `mpirun`, cut into the same stages: those follow from a measurement.
    fn ranks(&self, name: &str) -> (Command, PathBuf) {
        let out = self.folder.path().join(name);
        for stage in self.stages() {
            let profile = format!("stages/{stage}/pipeline-profile-4.json");
            fs::create_dir_all(out.join("stages").join(&stage)).unwrap();
            if self.out().join(&profile).exists() && !out.join(&profile).exists() {
                fs::copy(self.out().join(&profile), out.join(&profile)).unwrap();
            }
        }
        fs::copy(self.out().join("recipe.resolved.toml"), out.join("recipe.resolved.toml")).unwrap();
        let mut command = mpirun(Path::new(env!("CARGO_BIN_EXE_espalier")));
        command.args(arguments(&self.recipe, &out));
        (command, out)
    }
}

/// Losses by step, split and name, to the bit; nothing that is measured in time.
fn losses(out: &Path, stage: &str) -> BTreeMap<String, u64> {
    let Ok(text) = fs::read_to_string(out.join("stages").join(stage).join("metrics.jsonl")) else {
        return BTreeMap::new();
    };
    let events = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let named = events.filter(|e| !e["unit"].as_str().unwrap().ends_with("/s"));
    named
        .map(|e| (format!("{} {} {}", e["split"], e["name"], e["step"]), e["value"].as_f64().unwrap().to_bits()))
        .collect()
}

const PIPELINE: &str = "pipeline={ stages = 4, micro_batches = 4, heartbeat = 5.0 }";

#[test]
fn processes_train_as_threads_do() {
    if !launcher() {
        return;
    }
    let threads = Threads::run(&tiny(&[PIPELINE]));
    let (mut command, out) = threads.ranks("processes");
    let output = finish(command.spawn().unwrap(), Duration::from_secs(240));
    assert!(output.status.success(), "{}", said(&output));
    let mut compared = 0;
    for stage in threads.stages() {
        let want = losses(&threads.out(), &stage);
        assert_eq!(want, losses(&out, &stage), "{stage}");
        compared += usize::from(want.len() > 4);
    }
    assert!(compared >= 5, "{compared} stages were trained");
    assert_eq!(weights(&threads.out()), weights(&out));
}

fn weights(out: &Path) -> Vec<u8> {
    fs::read(out.join("model/model.safetensors")).unwrap()
}

/// The process of a rank that a launcher has started.
fn process_of(launcher: u32, rank: usize) -> Option<nix::unistd::Pid> {
    let variable = format!("OMPI_COMM_WORLD_RANK={rank}");
    fs::read_dir("/proc").unwrap().find_map(|entry| {
        let path = entry.ok()?.path();
        let pid = path.file_name()?.to_str()?.parse().ok()?;
        let status = fs::read_to_string(path.join("status")).ok()?;
        let parent = status.lines().find_map(|l| l.strip_prefix("PPid:"))?.trim().parse::<u32>().ok()?;
        let environment = fs::read(path.join("environ")).ok()?;
        let own = environment.split(|b| *b == 0).any(|v| v == variable.as_bytes());
        (parent == launcher && own).then(|| nix::unistd::Pid::from_raw(pid))
    })
}

#[test]
fn a_lost_rank_ends_the_run_which_then_goes_on() {
    use nix::sys::signal::{Signal, kill};
    if !launcher() {
        return;
    }
    let pipeline = PIPELINE.replace("5.0", "2.0");
    let long = ["teacher.steps=160", "teacher.checkpoint_every=10", "teacher.validate_every=0", &pipeline];
    let threads = Threads::run(&teacher(&long));
    let killed = (0..RANKS).map(|rank| (rank, Signal::SIGKILL));
    for (rank, signal) in killed.chain([(3, Signal::SIGSTOP), (0, Signal::SIGSTOP)]) {
        let name = format!("rank {rank} {signal}");
        let (mut command, out) = threads.ranks(&name);
        let child = command.spawn().unwrap();
        let checkpoints = out.join("stages/teacher/checkpoints");
        let began = Instant::now();
        while !fs::read_dir(&checkpoints).is_ok_and(|mut found| found.next().is_some()) {
            assert!(began.elapsed() < Duration::from_secs(60), "no checkpoint");
            std::thread::sleep(Duration::from_millis(5));
        }
        // Somewhere in the steps after it.
        std::thread::sleep(Duration::from_millis(7 * rank as u64));
        kill(process_of(child.id(), rank).expect("a process of that rank"), signal).unwrap();
        let began = Instant::now();
        let output = finish(child, Duration::from_secs(40));
        let (took, message) = (began.elapsed(), said(&output));
        println!("{name}: {:.1} s, {:?}\n{message}", took.as_secs_f64(), output.status);
        assert!(!output.status.success() && !out.join("model").exists(), "{message}");
        if rank > 0 {
            assert!(message.contains(&format!("rank {rank}: its process is gone or silent")), "{message}");
        }
        // A launcher that has lost a process gives the others a second, which a busy disk may need for the record.
        if signal == Signal::SIGSTOP {
            assert!(message.contains(&format!("pipeline stage {rank} failed")), "{message}");
            assert!(message.contains("goes on from the last checkpoint"), "{message}");
            assert!(out.join("stages/teacher/flight-recorder.jsonl").exists(), "{message}");
            assert_eq!(output.status.code(), Some(5), "{message}");
            // Two heartbeats, and what a launcher takes to end the rest.
            assert!(took < Duration::from_secs(14), "{message}");
        }
        let output = finish(threads.ranks(&name).0.spawn().unwrap(), Duration::from_secs(120));
        assert!(output.status.success(), "{}", said(&output));
        assert!(weights(&threads.out()) == weights(&out), "{name}: other weights after resuming");
    }
}

const HEARTBEAT: Duration = Duration::from_millis(600);

/// Runs this very test again on all ranks, and there plants the faults.
#[test]
fn every_fault_in_a_process_is_named_and_none_hangs() {
    let Some(joined) = mpi::join().unwrap() else {
        if !launcher() {
            return;
        }
        let mut command = mpirun(&std::env::current_exe().unwrap());
        command.args(["mpi::every_fault_in_a_process_is_named_and_none_hangs", "--exact", "--nocapture"]);
        let output = finish(command.spawn().unwrap(), Duration::from_secs(400));
        assert!(output.status.success(), "{}", said(&output));
        println!("{}", said(&output));
        return;
    };
    let post = joined.post.clone();
    if post.rank() > 0 {
        let make: Arc<rank::Make> = Arc::new(|_, _| Ok(Vec::new()));
        assert_eq!(rank::serve(&post, &make, HEARTBEAT).unwrap(), 0);
        return joined.leave();
    }
    let folder = tempfile::tempdir().unwrap();
    let config = Config::glm(SIZE, VOCABULARY);
    let device = cpu();
    let model = Model::init(config.clone(), &device, 3).unwrap();
    let micros = micros(&device, &[1, 2, 1, 1], None);
    let across =
        Across { post: post.clone(), devices: vec!["cpu:1".into(); RANKS], named: true, methods: Described::default() };
    let record = folder.path().join("flight-recorder.jsonl");
    let made = || Setup {
        heartbeat: HEARTBEAT,
        slow: HEARTBEAT * 3 / 2,
        devices: vec![device::open("cpu:1").unwrap()],
        ..setup(&config, (Kind::OneForwardOneBackward, RANKS, 4), vec![1; RANKS], folder.path())
    };
    let (mut injected, mut late) = (0, 0);
    for worker in 0..RANKS {
        for what in Planted::ALL {
            let message = matches!(what, Planted::Drop | Planted::Duplicate | Planted::Corrupt);
            let work = if message { [Work::SendForward, Work::SendBackward] } else { [Work::Forward, Work::Backward] };
            let mut positions = places(&made(), worker, &work);
            positions.push(made().route.events[worker].len());
            for position in positions {
                let step = (injected % 2) as u64;
                let case = format!("{what:?} on rank {worker} at {position} of step {step}");
                let planted = vec![Injection { worker, step, position, what }];
                let mut pipeline =
                    Pipeline::start_across(&model, Setup { planted, ..made() }, Some(&across)).expect(&case);
                let began = Instant::now();
                let mut outcome = Ok(());
                for _ in 0..=step {
                    outcome = pipeline.step(&micros, &[], (0.0, 1, STEPS)).map(drop);
                }
                let took = began.elapsed();
                let Err(Error::Fault { stage, step: at, position: place, what: said, event, .. }) = outcome else {
                    panic!("{case}: {outcome:?}");
                };
                println!("{case}: stage {stage} at {place} ({event}) in {:.1} s: {said}", took.as_secs_f64());
                assert_eq!(at, step, "{case}: {said}");
                // Four processes on two cores beside other tests' threads: now and then one of them waits seconds to end.
                late += usize::from(took >= 4 * HEARTBEAT);
                assert!(took < 20 * HEARTBEAT, "{case}: {took:?}, {said}");
                // What is wrong with a message is seen by its receiver, who names the sender.
                let named = if message { said.contains(&format!("worker {worker}")) } else { stage == worker };
                assert!(named && (message || place == position), "{case}: stage {stage} at {event}: {said}");
                assert!(said.contains(word(what)), "{case}: {said}");
                let events = fs::read_to_string(&record).unwrap();
                for stage in 0..RANKS {
                    assert!(events.contains(&format!("\"stage\":{stage},")), "{case}: stage {stage} left no record");
                }
                fs::remove_file(&record).unwrap();
                injected += 1;
            }
        }
    }
    println!("{injected} faults, {late} later than four heartbeats");
    assert!(20 * late <= injected, "{late} of {injected} took longer than four heartbeats");
    assert!(injected >= 64, "{injected}");
    assert!(remote::end(&post, 0, Duration::from_secs(5)), "a rank is left behind");
    joined.leave();
}
