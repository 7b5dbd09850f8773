//! The command line: verbs first, one file per command. Exit codes: 0 done, 1 failure, 2 usage, 3 data or model
//! invalid, 4 device, 5 interrupted and resumable.

mod data;
mod doctor;
mod flow;
mod import;
mod kernels;
mod model;
mod pipeline;
mod ranks;
mod tagger;

use std::fmt::Display;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};

use crate::console;
use crate::device::{self, Device};
use crate::error::{Error, Result};
use crate::tuned;

#[derive(Parser)]
#[command(
    name = "espalier",
    version,
    about = "Prune, distil, quantize, route and fine-tune transformers on own GPU and CPU kernels"
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What every command takes.
#[derive(clap::Args)]
pub struct Global {
    #[arg(long, global = true, default_value = AUTO, value_name = "DEVICE", help = device::NAMES)]
    device: String,
    /// How results are printed; progress and warnings go to standard error either way
    #[arg(long, global = true, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// No progress bars
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
}

/// The device that is meant where none is named.
const AUTO: &str = "auto";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Text,
    Json,
    /// For `kernels list` and `kernels compare`, whose help names it.
    #[value(hide = true)]
    Markdown,
}

impl Global {
    /// The device, with what `kernels tune` found for it.
    fn open(&self) -> Result<Arc<dyn Device>> {
        let device = device::open(&self.device)?;
        tuned::load(device.info());
        Ok(device)
    }

    fn json(&self) -> bool {
        self.format == Format::Json
    }

    /// A bar with an estimate of the time left, on standard error; hidden where that is no terminal.
    fn progress(&self, length: usize) -> indicatif::ProgressBar {
        if self.quiet || !console::moves_cursor() {
            return indicatif::ProgressBar::hidden();
        }
        let style = indicatif::ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} ETA {eta} {wide_msg}");
        indicatif::ProgressBar::new(length as u64)
            .with_style(style.unwrap_or_else(|_| indicatif::ProgressStyle::default_bar()))
    }
}

#[derive(Subcommand)]
enum Command {
    /// Devices, drivers, limits, features and traps; what is missing and which package brings it
    Doctor,
    /// The kernel table: list, verify, bench, tune, compare
    #[command(subcommand)]
    Kernels(kernels::Kernels),
    /// Text that is already on this machine
    #[command(subcommand)]
    Data(data::Data),
    Run(flow::Run),
    Eval(model::Eval),
    Translate(model::Translate),
    Info(model::Info),
    /// Make a recipe of another system's config
    #[command(subcommand)]
    Import(import::Import),
    Report(flow::Report),
    TrainTagger(tagger::TrainTagger),
    /// Models in stages: plan a cut, simulate a schedule
    #[command(subcommand)]
    Pipeline(pipeline::Pipeline),
    /// Completion script for a shell, on standard output
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

impl Command {
    /// Whether `--device` has a meaning for it.
    fn runs_on_a_device(&self) -> bool {
        match self {
            Self::Run(_) | Self::Eval(_) | Self::Translate(_) | Self::TrainTagger(_) => true,
            Self::Kernels(command) => command.runs_on_a_device(),
            Self::Pipeline(command) => matches!(command, pipeline::Pipeline::Profile(_)),
            Self::Doctor
            | Self::Data(_)
            | Self::Info(_)
            | Self::Report(_)
            | Self::Import(_)
            | Self::Completions { .. } => false,
        }
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    device::quiet_loader();
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            console::tell(format_args!("error[{}]: {e}", e.code()));
            ExitCode::from(e.exit_code() as u8)
        }
    }
}

fn run(cli: Cli) -> Result<()> {
    let speaks_markdown = matches!(&cli.command, Command::Kernels(command) if command.speaks_markdown());
    if cli.global.format == Format::Markdown && !speaks_markdown {
        let rule = "text or json for this command".into();
        return Err(Error::Usage { argument: "--format", value: "markdown".into(), rule });
    }
    if cli.global.device != AUTO && !cli.command.runs_on_a_device() {
        let rule = "left out: this command runs on no device".into();
        return Err(Error::Usage { argument: "--device", value: cli.global.device, rule });
    }
    match cli.command {
        Command::Doctor => doctor::run(&cli.global),
        Command::Kernels(command) => kernels::run(&cli.global, command),
        Command::Data(command) => data::run(&cli.global, command),
        Command::Run(args) => flow::run(&cli.global, args),
        Command::Eval(args) => model::eval(&cli.global, args),
        Command::Translate(args) => model::translate(&cli.global, args),
        Command::Import(command) => import::run(&cli.global, command),
        Command::Info(args) => model::info(&cli.global, args),
        Command::Report(args) => flow::compare_runs(&cli.global, args),
        Command::TrainTagger(args) => tagger::train_tagger(&cli.global, args),
        Command::Pipeline(command) => pipeline::run(&cli.global, command),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "espalier", &mut script);
            say(String::from_utf8_lossy(&script).trim_end());
            Ok(())
        }
    }
}

/// A file that an argument names.
type Named<'a> = (&'static str, Option<&'a Path>);

/// Refuses outputs that would overwrite an input or each other. Devices and pipes may be named twice.
fn refuse_collisions(inputs: &[Named], outputs: &[Named]) -> Result<()> {
    let place = |path: &Path| match path.canonicalize() {
        Ok(found) => found.is_file().then_some(found),
        // To be made: known by its folder.
        Err(_) => {
            let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            Some(folder.canonicalize().ok()?.join(path.file_name()?))
        }
    };
    let given = |named: &[Named]| -> Vec<(&'static str, PathBuf)> {
        named.iter().filter_map(|(argument, path)| Some((*argument, place((*path)?)?))).collect()
    };
    let mut taken = given(inputs);
    for (argument, path) in given(outputs) {
        if let Some((other, _)) = taken.iter().find(|(_, place)| *place == path) {
            let rule = format!("another file than that of {other}");
            return Err(Error::Usage { argument, value: path.display().to_string(), rule });
        }
        taken.push((argument, path));
    }
    Ok(())
}

/// Prints one line or block. A reader that has gone away (`| head`) ends the program quietly, not with a panic; any other
/// failure, a full disk above all, ends it with an error: the caller must not take half a result for a whole one.
fn say(text: impl Display) {
    let mut stdout = std::io::stdout().lock();
    if let Err(e) = writeln!(stdout, "{text}").and_then(|()| stdout.flush()) {
        if e.kind() == std::io::ErrorKind::BrokenPipe {
            std::process::exit(0);
        }
        let e = Error::io("standard output", e);
        console::tell(format_args!("error[{}]: {e}", e.code()));
        std::process::exit(e.exit_code());
    }
}

/// One JSON object on one line.
fn say_json(value: &impl serde::Serialize) {
    match serde_json::to_string(value) {
        Ok(text) => say(text),
        // Only maps with keys that are no text can fail; none is printed.
        Err(e) => console::tell(format_args!("error: {e}")),
    }
}
