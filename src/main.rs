//! Parse, call, print.

fn main() -> std::process::ExitCode {
    espalier::cli::main()
}
