//! Hostile names through every output of a report, and a report's way to the disk and back.

use espalier::report::bench::BenchRecord;
use espalier::report::model::{
    DirectionScores, Invariant, Latency, LossCurve, Machine, RunReport, Score, StageRow, VERSION,
};
use espalier::report::{self, compare};

const PAYLOADS: [&str; 9] = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)>",
    "</style></title><svg onload=alert(1)>",
    "\u{1b}[2J\u{1b}]0;owned\u{7}\u{9b}31m",
    "safe\u{202e}exe.gpj\u{2066}x",
    "=HYPERLINK(\"http://evil.example\")",
    "@SUM(1+1)|cmd",
    "[click](javascript:alert(1)) ``` | ![x](http://evil.example/x.png) {{ 7 * 7 }}",
    "line\r\nbreak\u{2028}and\u{0}nul https://evil.example www.evil.example",
];

/// A report with the same text in every place that takes text.
fn filled_with(text: &str) -> RunReport {
    let text = || text.to_string();
    let score = || Some(Score { value: 41.5, signature: text() });
    let stage = |baseline| StageRow {
        name: text(),
        baseline,
        parameters: 1000,
        activated_bytes: 2000,
        total_bytes: 4000,
        token_accuracy: Some(0.5),
        directions: vec![DirectionScores {
            direction: text(),
            sentences: 3,
            bleu: score(),
            chrf: score(),
            ..DirectionScores::default()
        }],
        latency: vec![Latency { batch: 1, length: 8, samples: 30, p5_ms: 1.0, p50_ms: 2.0, p95_ms: 3.0 }],
        sparsity: vec![(text(), 0.5), (format!("blocks.0.{}", text()), 0.9)],
        invariants: vec![Invariant { name: text(), measured: text(), ok: baseline }],
        ..StageRow::default()
    };
    let points = vec![(1, Some(2.0), Some(2.5)), (2, Some(1.0), None)];
    RunReport {
        version: VERSION,
        title: text(),
        summary: text(),
        finished: text(),
        seconds: 65.0,
        machine: Machine {
            device: text(),
            driver: text(),
            software: true,
            processor: text(),
            cores: 2,
            memory_bytes: 1 << 30,
            system: text(),
            versions: vec![(text(), text())],
            hashes: vec![(text(), text())],
        },
        recipe: text(),
        stages: vec![stage(false), stage(false), stage(true)],
        curves: vec![LossCurve { stage: text(), unit: text(), points }],
        notes: vec![text()],
        reproduce: text(),
    }
}

/// What no output for people may hold, whatever a name held.
fn assert_harmless(output: &str, payload: &str) {
    let bad = |c: char| {
        (c.is_control() && c != '\n') || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}')
    };
    assert_eq!(output.chars().find(|&c| bad(c)), None, "from {payload:?}");
}

/// Opening tags of a document: all of them must come from the template.
fn tags(html: &str) -> Vec<&str> {
    html.split('<').skip(1).map(|rest| rest.split([' ', '>', '/', '\n']).next().unwrap_or("")).collect()
}

#[test]
fn html_is_the_same_document_whatever_the_names_are() {
    let harmless = report::html::render(&filled_with("name")).unwrap();
    for payload in PAYLOADS {
        let html = report::html::render(&filled_with(payload)).unwrap();
        assert_harmless(&html, payload);
        assert_eq!(tags(&html), tags(&harmless), "a name became mark-up: {payload:?}");
        assert!(!html.to_lowercase().contains("<script"), "{payload:?}");
    }
}

#[test]
fn html_asks_for_nothing() {
    let html = report::html::render(&filled_with("name")).unwrap();
    assert!(html.contains("Content-Security-Policy\" content=\"default-src 'none'"));
    for outside in ["http:", "https:", "//", "src=", "href=", "@import", "<link", "<script", "<iframe", "javascript:"] {
        assert!(!html.contains(outside), "{outside} in the page");
    }
    // Every fragment that is pointed at exists.
    assert!(html.contains("url(#hatch)") && html.contains("id=\"hatch\""));
}

#[test]
fn html_elements_close() {
    let html = report::html::render(&filled_with("name")).unwrap();
    for tag in ["svg", "table", "tr", "td", "th", "section", "div", "text", "ul", "li", "dl", "details", "pre", "rect"]
    {
        let open = html.matches(&format!("<{tag}>")).count() + html.matches(&format!("<{tag} ")).count();
        let closed = html.matches(&format!("</{tag}>")).count();
        let empty = html.split('<').filter(|e| e.starts_with(&format!("{tag} ")) && e.contains("/>")).count();
        assert_eq!(open, closed + empty, "{tag}");
    }
}

#[test]
fn markdown_shows_names_as_text() {
    let shape = |text: &str| -> Vec<usize> {
        // Headings, table rows and their columns; a name can add none.
        text.lines().map(|line| line.replace("\\|", "").matches('|').count()).collect()
    };
    let harmless = report::markdown::render(&filled_with("name"));
    for payload in PAYLOADS {
        let text = report::markdown::render(&filled_with(payload));
        assert_harmless(&text, payload);
        // The two code blocks show text as it is; their fences are tested beside them.
        let prose = |text: &str| text.split("## Reproduce").next().unwrap_or("").to_string();
        let prose_of = prose(&text);
        assert_eq!(shape(&prose_of), shape(&prose(&harmless)), "{payload:?}");
        for mark_up in ["<script", "<img", "<svg", "](javascript", "](http", " https://", " www."] {
            let live = prose_of.match_indices(mark_up).any(|(at, _)| !prose_of[..at].ends_with('\\'));
            assert!(!live, "{mark_up} from {payload:?}");
        }
    }
}

#[test]
fn csv_cells_are_no_formulas() {
    for payload in PAYLOADS {
        let text = report::csv::render(&filled_with(payload)).unwrap();
        let mut reader = csv::Reader::from_reader(text.as_slice());
        let mut rows = 0;
        for record in reader.records() {
            rows += 1;
            let record = record.unwrap();
            assert_eq!(record.len(), 11);
            for cell in &record {
                assert!(!cell.trim_start().starts_with(['=', '+', '-', '@']), "{cell}");
                assert_harmless(cell, payload);
            }
        }
        assert_eq!(rows, 3);
    }
}

/// Without the bold header that an interactive terminal gets.
fn unstyled(text: &str) -> String {
    text.replace("\u{1b}[1m", "").replace("\u{1b}[0m", "")
}

#[test]
fn terminals_and_comparisons_get_clean_names() {
    for payload in PAYLOADS {
        let record = BenchRecord { op: payload.into(), params: payload.into(), ..BenchRecord::default() };
        let rows = compare::compare(std::slice::from_ref(&record), std::slice::from_ref(&record));
        assert_harmless(&unstyled(&compare::to_terminal(&rows)), payload);
        let stages = unstyled(&report::table::stages(&filled_with(payload)));
        assert_harmless(&stages, payload);
        assert_eq!(stages.lines().count(), 4, "a name broke a line");
        let markdown = compare::to_markdown(&rows);
        assert_harmless(&markdown, payload);
        assert!(!markdown.contains("<script") && !markdown.contains("<img"), "{markdown}");
    }
}

#[test]
fn a_report_on_disk_is_whole_and_reads_back() {
    let directory = tempfile::tempdir().unwrap();
    let before = filled_with(PAYLOADS[4]);
    let paths = report::write(directory.path(), &before).unwrap();
    assert_eq!(report::read(&paths[0]).unwrap(), before);
    for path in &paths {
        assert!(std::fs::metadata(path).unwrap().len() > 100, "{}", path.display());
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 4);
}

#[test]
fn an_empty_report_still_renders() {
    let empty = RunReport { version: VERSION, ..RunReport::default() };
    assert!(report::html::render(&empty).unwrap().contains("<h1>Run report</h1>"));
    assert!(report::markdown::render(&empty).starts_with("# Run report\n"));
    assert_eq!(report::csv::render(&empty).unwrap().iter().filter(|&&byte| byte == b'\n').count(), 1);
}

#[test]
fn benchmark_files_read_back_and_name_a_bad_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("bench.jsonl");
    let mut record = BenchRecord {
        op: "matmul".into(),
        flops: 2_000_000,
        bytes: 4_000,
        ceiling: Some(40.0),
        ceiling_unit: "GFLOP/s".into(),
        samples_us: vec![100.0, 120.0, 80.0, 110.0, 90.0],
        ..BenchRecord::default()
    };
    record.summarize();
    assert_eq!((record.min_us, record.median_us), (80.0, 100.0));
    assert!((record.gflops - 20.0).abs() < 1e-9 && (record.ceiling_share.unwrap() - 0.5).abs() < 1e-9);
    let line = serde_json::to_string(&record).unwrap();
    std::fs::write(&path, format!("{line}\n\n{line}\n")).unwrap();
    assert_eq!(report::bench::read(&path).unwrap(), [record.clone(), record]);
    std::fs::write(&path, format!("{line}\n{}\n", line.replace("\"flops\":2000000", "\"flops\":-1"))).unwrap();
    let error = report::bench::read(&path).unwrap_err().to_string();
    assert!(error.contains("line 2: flops"), "{error}");
}
