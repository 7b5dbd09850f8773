//! The house rules, read from the source: sizes, who may import whom, where `unsafe` and features may stand.

use std::path::{Path, PathBuf};

/// Longest Rust file and longest kernel file, in lines.
const RUST_LINES: usize = 600;
const KERNEL_LINES: usize = 500;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Files below `folder` with one of the extensions, as (path relative to the root, text).
fn sources(folder: &str, extensions: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for path in entries.map(|e| e.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().and_then(|e| e.to_str()).is_some_and(|e| extensions.contains(&e)) {
                let name = path.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/");
                found.push((name, std::fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

/// Lines of code with their numbers: no comments, nothing behind the first test module.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    // A whole file of tests says `#![cfg(test)]`.
    let end = text.find("[cfg(test)]").unwrap_or(text.len());
    text[..end]
        .lines()
        .enumerate()
        .map(|(i, l)| (i + 1, l.split("//").next().unwrap_or(l)))
        .filter(|(_, l)| !l.trim().is_empty())
}

fn assert_none(what: &str, wrong: &[String]) {
    assert!(wrong.is_empty(), "{what}:\n{}", wrong.join("\n"));
}

#[test]
fn files_are_short() {
    let mut wrong = Vec::new();
    let mut rust = Vec::new();
    for folder in ["src", "tests", "benches"] {
        for (name, text) in sources(folder, &["rs"]) {
            let lines = text.lines().count();
            rust.push(lines);
            if lines > RUST_LINES {
                wrong.push(format!("{name}: {lines} lines, at most {RUST_LINES}"));
            }
        }
    }
    for folder in ["shaders", "cuda", "src"] {
        for (name, text) in sources(folder, &["wgsl", "cu", "cuh"]) {
            let lines = text.lines().count();
            if lines > KERNEL_LINES {
                wrong.push(format!("{name}: {lines} lines, at most {KERNEL_LINES}"));
            }
        }
    }
    rust.sort_unstable();
    let median = rust[rust.len() / 2];
    if median >= 250 {
        wrong.push(format!("median of {} Rust files is {median} lines, below 250 wanted", rust.len()));
    }
    assert_none("too long", &wrong);
}

#[test]
fn no_module_is_a_drawer() {
    let drawer = |name: &str| {
        let stem = Path::new(name).file_stem().and_then(|s| s.to_str()).unwrap_or("");
        ["util", "utils", "common", "helper", "helpers", "misc"].contains(&stem)
            || ["/utils/", "/common/", "/helpers/"].iter().any(|d| name.contains(d))
    };
    let wrong: Vec<String> = sources("src", &["rs"]).into_iter().map(|(name, _)| name).filter(|n| drawer(n)).collect();
    assert_none("modules are named by what they hold", &wrong);
}

/// Height in the house, by top-level module. Arrows point down only; equals may know each other.
fn height(module: &str) -> Option<u32> {
    Some(match module {
        "error" | "json" | "dtype" | "shape" | "rng" | "tensor" | "kernel" | "op" | "atomic" | "console" | "cpu"
        | "device" | "dispatch" | "tuned" => 0,
        "ops" => 1,
        "tape" | "verify" => 2,
        "nn" => 3,
        // A pipeline takes a training's steps, with the optimizer and the hooks of `train`.
        "train" | "pipeline" | "compress" | "metrics" | "data" => 4,
        "recipe" | "report" | "flow" => 5,
        "cli" => 6,
        "lib" | "main" => 7,
        _ => return None,
    })
}

/// Top-level module of a source file: `src/ops/unary.rs` is `ops`.
fn module(name: &str) -> &str {
    let path = name.trim_start_matches("src/");
    path.split('/').next().unwrap_or(path).trim_end_matches(".rs")
}

/// Names that follow `crate::` in a line, with those of a brace list.
fn imports(line: &str) -> Vec<&str> {
    let first = |s: &'_ str| s.len() - s.trim_start_matches(|c: char| c.is_alphanumeric() || c == '_').len();
    let mut names = Vec::new();
    for (at, _) in line.match_indices("crate::") {
        let rest = &line[at + 7..];
        match rest.strip_prefix('{') {
            None => names.push(&rest[..first(rest)]),
            Some(list) => names.extend(list.split([',', '}']).map(str::trim).map(|n| &n[..first(n)])),
        }
    }
    names.into_iter().filter(|n| n.starts_with(|c: char| c.is_lowercase())).collect()
}

#[test]
fn imports_point_down() {
    let mut wrong = Vec::new();
    for (name, text) in sources("src", &["rs"]) {
        let own = module(&name);
        let Some(own_height) = height(own) else {
            wrong.push(format!("{name}: the module {own} has no place in the house (see `height`)"));
            continue;
        };
        for (number, line) in code(&text) {
            for import in imports(line) {
                // A CPU kernel may share a constant with its own family.
                let stem = name.split('/').nth(2).unwrap_or("").trim_end_matches(".rs");
                let twin = own == "cpu" && import == "ops" && line.contains(&format!("crate::ops::{stem}::"));
                if !twin && height(import).is_some_and(|h| h > own_height) {
                    wrong.push(format!("{name}:{number}: {own} is below {import}"));
                }
            }
        }
    }
    assert_none("imports that point up", &wrong);
}

#[test]
fn the_rooms_keep_their_secrets() {
    // (where, what may not be named there)
    let absences: &[(&str, &[&str])] = &[
        ("src/device/", &["crate::ops", "crate::op::", "crate::dispatch", "crate::tensor"]),
        ("src/ops/", &["wgpu::", "cudarc", "crate::tape"]),
        ("src/kernel.rs", &["std::thread", "rayon"]),
        ("src/pipeline/schedule.rs", &["std::fs", "std::thread", "std::io", "rayon", "crate::device"]),
        ("src/tape.rs", &["wgpu", "cudarc", "CpuDevice", "crate::ops::{"]),
        ("src/data/", &["crate::device", "crate::tensor", "crate::dispatch", "crate::ops", "crate::nn"]),
        ("src/metrics/", &["crate::device", "crate::tensor", "crate::dispatch", "crate::ops", "crate::nn"]),
        ("src/nn/", &["device::Buffer", ".buffer()", "crate::kernel"]),
        ("src/compress/", &["device::Buffer", ".buffer()", "crate::kernel"]),
    ];
    let mut wrong = Vec::new();
    for (name, text) in sources("src", &["rs"]) {
        for (_, names) in absences.iter().filter(|(place, _)| name.starts_with(place)) {
            for (number, line) in code(&text) {
                wrong.extend(names.iter().filter(|n| line.contains(*n)).map(|n| format!("{name}:{number}: names {n}")));
            }
        }
    }
    assert_none("things that must not be known there", &wrong);
}

#[test]
fn only_dispatch_launches() {
    let mut wrong = Vec::new();
    for (name, text) in sources("src", &["rs"]) {
        if name == "src/dispatch.rs" || name.starts_with("src/device/") {
            continue;
        }
        for (number, line) in code(&text) {
            if ["device.launch(", "device().launch("].iter().any(|call| line.contains(call)) {
                wrong.push(format!("{name}:{number}: {}", line.trim()));
            }
        }
    }
    assert_none("launches outside of dispatch", &wrong);
}

#[test]
fn features_stay_in_their_rooms() {
    let mut wrong = Vec::new();
    for (name, text) in sources("src", &["rs"]) {
        for (number, line) in code(&text) {
            let room = name.starts_with("src/device/") || name == "src/pipeline/mpi.rs";
            if !room && line.contains("cfg(feature") {
                wrong.push(format!("{name}:{number}"));
            }
        }
    }
    assert_none("cfg(feature) outside of src/device and the one file that knows MPI", &wrong);
}

#[test]
fn unsafe_stands_in_its_rooms_with_its_reason() {
    let mut wrong = Vec::new();
    for (name, text) in sources("src", &["rs"]) {
        let lines: Vec<&str> = text.lines().collect();
        for (number, line) in code(&text) {
            let opens = ["unsafe {", "unsafe impl", "unsafe fn", "unsafe extern"].iter().any(|u| line.contains(u));
            if !opens || line.contains("deny(unsafe") {
                continue;
            }
            if !["src/device/", "src/cpu/"].iter().any(|room| name.starts_with(room)) {
                wrong.push(format!("{name}:{number}: unsafe outside of device/ and cpu/"));
            }
            // The note may stand above the statement that the block is part of; a private function's at its blocks.
            let below = if line.contains("unsafe fn") { 14 } else { 0 };
            let near = &lines[number.saturating_sub(10)..(number + below).min(lines.len())];
            if !near.iter().any(|l| l.contains("SAFETY") || l.contains("# Safety")) {
                wrong.push(format!("{name}:{number}: no safety note: {}", line.trim()));
            }
        }
    }
    assert_none("unsafe", &wrong);
}

#[test]
fn library_code_does_not_give_up() {
    let mut wrong = Vec::new();
    // Test modules in files of their own are no library code.
    for (name, text) in sources("src", &["rs"]).into_iter().filter(|(name, _)| !name.ends_with("/tests.rs")) {
        for (number, line) in code(&text) {
            for word in [".unwrap()", ".expect(", "todo!(", "unimplemented!(", "dbg!("] {
                // What a constant of the file cannot fail at may be expected, in those words.
                if line.contains(word) && !line.contains(".expect(\"a constant") {
                    wrong.push(format!("{name}:{number}: {word}"));
                }
            }
        }
    }
    assert_none("ways to end the process from a library", &wrong);
}

#[test]
fn twins_share_their_stem() {
    for family in espalier::ops::FAMILIES {
        for (folder, extension) in [("src/ops", "rs"), ("src/cpu", "rs")] {
            let file = root().join(folder).join(format!("{}.{extension}", family.name));
            let module = root().join(folder).join(family.name).join("mod.rs");
            assert!(file.exists() || module.exists(), "{} has no {}", family.name, file.display());
        }
        if family.source.is_some() {
            let file = root().join("shaders").join(format!("{}.wgsl", family.name));
            let split =
                sources("shaders", &["wgsl"]).iter().any(|(n, _)| n.starts_with(&format!("shaders/{}_", family.name)));
            assert!(file.exists() || split, "{} has no {}", family.name, file.display());
        }
    }
}
