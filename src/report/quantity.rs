//! Numbers for people: three or four significant digits and an honest unit.

/// Bytes in binary units: "512 B", "1.50 KiB", "23.4 MiB".
pub fn bytes(value: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if value < 1024 {
        return format!("{value} B");
    }
    let mut scaled = value as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would print as "1024.0 KiB".
    while scaled >= 1023.95 && unit + 1 < UNITS.len() {
        scaled /= 1024.0;
        unit += 1;
    }
    format!("{} {}", significant(scaled), UNITS[unit])
}

/// A count with thousands separators up to six digits, then "1.23 M", "4.56 G".
pub fn count(value: u64) -> String {
    match value {
        0..1_000_000 => grouped(value),
        1_000_000..999_950_000 => format!("{} M", significant(value as f64 / 1e6)),
        _ => format!("{} G", significant(value as f64 / 1e9)),
    }
}

/// Milliseconds as "850 µs", "3.42 ms" or "1.20 s".
pub fn milliseconds(value: f64) -> String {
    match value {
        value if !value.is_finite() => "not finite".into(),
        value if value >= 1e9 => format!("{:.2e} s", value / 1e3),
        value if value >= 999.95 => format!("{} s", significant(value / 1e3)),
        value if value >= 0.99995 || value == 0.0 => format!("{} ms", significant(value)),
        value => format!("{} µs", significant(value * 1e3)),
    }
}

/// Seconds as "12.3 s", "4 min 05 s" or "1 h 02 min".
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "unknown".into();
    }
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole / 60 % 60),
    }
}

/// A share of one as "97.4 %".
pub fn percent(share: f64) -> String {
    if share.is_finite() { format!("{:.1} %", share * 100.0) } else { "not finite".into() }
}

/// Any number in four significant digits; very small ones keep their magnitude ("3.1e-9").
pub fn number(value: f64) -> String {
    match value.abs() {
        size if !size.is_finite() => "not finite".into(),
        0.0 => "0".into(),
        size if !(1e-3..1e6).contains(&size) => format!("{value:.2e}"),
        size if size < 1.0 => format!("{value:.4}"),
        size if size < 10.0 => format!("{value:.3}"),
        size if size < 1000.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

fn significant(value: f64) -> String {
    match value {
        value if value < 9.995 => format!("{value:.2}"),
        value if value < 99.95 => format!("{value:.1}"),
        value => format!("{value:.0}"),
    }
}

fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::with_capacity(digits.len() + 2);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_change_before_the_digits_run_out() {
        let sizes = [0, 1023, 1024, 1536, 1 << 20, (1 << 20) - 1, 24_536_678, u64::MAX].map(bytes);
        assert_eq!(sizes, ["0 B", "1023 B", "1.00 KiB", "1.50 KiB", "1.00 MiB", "1.00 MiB", "23.4 MiB", "16384 PiB"]);
        assert_eq!(
            [0, 999, 12_345, 999_999, 1_234_567, 2_500_000_000].map(count),
            ["0", "999", "12,345", "999,999", "1.23 M", "2.50 G"]
        );
        assert_eq!(
            [0.0, 0.0005, 0.85, 3.4159, 99.96, 1200.0, 3.3e14].map(milliseconds),
            ["0.00 ms", "0.50 µs", "850 µs", "3.42 ms", "100 ms", "1.20 s", "3.30e11 s"]
        );
        assert_eq!([0.04, 59.4, 245.0, 3725.0].map(duration), ["0.0 s", "59.4 s", "4 min 05 s", "1 h 02 min"]);
    }

    #[test]
    fn small_values_keep_their_magnitude() {
        assert_eq!(
            [0.0, 3.1e-9, 0.25, 2.0, -51.25, 4096.0, f64::NAN].map(number),
            ["0", "3.10e-9", "0.2500", "2.000", "-51.2", "4096", "not finite"]
        );
        assert_eq!(percent(0.89449), "89.4 %");
    }
}
