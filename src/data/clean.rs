//! Rules that turn a raw (English, translation) pair into training text, each under a fixed name so that the data card can
//! count it.

/// Longest kept side, in characters.
const MAX_CHARACTERS: usize = 600;
/// More line breaks than this is a page of help, not a sentence.
const MAX_LINE_BREAKS: usize = 3;

/// Applies every rule in order; the first one that breaks names the reason.
///
/// Kept text is folded to one line: line breaks and tabs with the blanks around them become one space, or nothing between
/// two ideographs; runs of spaces become one. The source must hold at least two Latin letters, the target must differ from
/// it and be written in the script of `language` where that is not Latin.
pub fn clean(language: &str, source: &str, target: &str) -> Result<(String, String), &'static str> {
    if target.trim().is_empty() {
        return Err("untranslated");
    }
    if source.chars().filter(char::is_ascii_alphabetic).count() < 2 {
        return Err("fewer than two Latin letters");
    }
    if source == target {
        return Err("target equals source");
    }
    if !has_script(language, target) {
        return Err("target not in its script");
    }
    for side in [source, target] {
        if side.matches('\n').count() > MAX_LINE_BREAKS {
            return Err("more than 3 line breaks");
        }
        if side.chars().count() > MAX_CHARACTERS {
            return Err("more than 600 characters");
        }
        // Line breaks and tabs are folded below; anything else would print as nothing or as a terminal command.
        if side.chars().any(|c| (c.is_control() && !matches!(c, '\n' | '\r' | '\t')) || is_direction_override(c)) {
            return Err("control character");
        }
    }
    if placeholders(source) != placeholders(target) {
        return Err("placeholders differ");
    }
    let (source, target) = (fold(source), fold(target));
    if source == target { Err("target equals source") } else { Ok((source, target)) }
}

/// Whether a character belongs to the Han script's common blocks.
pub fn is_han(c: char) -> bool {
    matches!(c, '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3134f}')
}

/// Whether text holds at least one character of the script that `language` is written in; true for Latin scripts.
pub fn has_script(language: &str, text: &str) -> bool {
    let inside: fn(char) -> bool = match language.split(['_', '@', '.']).next().unwrap_or_default() {
        "zh" => is_han,
        "ja" => |c| is_han(c) || matches!(c, '\u{3040}'..='\u{30ff}'),
        "ko" => |c| matches!(c, '\u{ac00}'..='\u{d7a3}' | '\u{1100}'..='\u{11ff}'),
        "ru" | "uk" | "be" | "bg" | "mk" => |c| matches!(c, '\u{400}'..='\u{4ff}'),
        "el" => |c| matches!(c, '\u{370}'..='\u{3ff}'),
        _ => return true,
    };
    text.chars().any(inside)
}

/// The printf conversions, `%(name)s` and `{name}` fields of a message, sorted. Order, position (`%2$s`), flags and widths
/// may differ between languages; which values are printed, and as what, may not.
fn placeholders(text: &str) -> Vec<String> {
    let chars: Vec<char> = text.chars().collect();
    let mut found = Vec::new();
    let mut i = 0;
    while i < chars.len() {
        let end = match chars[i] {
            '%' => printf(&chars, i, &mut found),
            '{' => field(&chars, i, &mut found),
            _ => None,
        };
        i = end.unwrap_or(i + 1);
    }
    found.sort_unstable();
    found
}

/// Reads a conversion that starts at `chars[start] == '%'`; gives the index after it.
fn printf(chars: &[char], start: usize, found: &mut Vec<String>) -> Option<usize> {
    let mut i = start + 1;
    if chars.get(i) == Some(&'%') {
        return Some(i + 1);
    }
    let mut name = String::from("%");
    if chars.get(i) == Some(&'(') {
        let close = i + chars[i..].iter().take(64).position(|&c| c == ')')?;
        name.extend(&chars[i..=close]);
        i = close + 1;
    }
    // The blank flag is left out: "100% of" is prose.
    while matches!(chars.get(i), Some('0'..='9' | '$' | '-' | '+' | '#' | '\'' | '.' | '*')) {
        i += 1;
    }
    while let Some(&length @ ('h' | 'l' | 'L' | 'q' | 'j' | 'z' | 't')) = chars.get(i) {
        name.push(length);
        i += 1;
    }
    match chars.get(i) {
        Some(&c) if "diouxXeEfFgGaAcsCSpnm".contains(c) => {
            name.push(c);
            found.push(name);
            Some(i + 1)
        }
        _ => None,
    }
}

/// Reads `{name}` or `{0}`; gives the index after it.
fn field(chars: &[char], start: usize, found: &mut Vec<String>) -> Option<usize> {
    let close = start + chars[start..].iter().take(64).position(|&c| c == '}')?;
    let name = &chars[start + 1..close];
    if !name.iter().all(|&c| c.is_ascii_alphanumeric() || c == '_') {
        return None;
    }
    found.push(chars[start..=close].iter().collect());
    Some(close + 1)
}

/// One line without blanks at the ends; see [`clean`].
fn fold(text: &str) -> String {
    let mut lines = text.split(['\n', '\r', '\t']).map(str::trim).filter(|line| !line.is_empty());
    let mut folded = lines.next().unwrap_or_default().to_string();
    for line in lines {
        let glue = folded.chars().next_back().is_some_and(is_wide) && line.chars().next().is_some_and(is_wide);
        if !glue {
            folded.push(' ');
        }
        folded.push_str(line);
    }
    // Columns of option help are laid out with runs of spaces.
    folded.split(' ').filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Ideographs, kana and full-width punctuation: no space belongs between two of them.
fn is_wide(c: char) -> bool {
    is_han(c) || matches!(c, '\u{3000}'..='\u{30ff}' | '\u{ff00}'..='\u{ffef}')
}

fn is_direction_override(c: char) -> bool {
    matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rule_has_an_example() {
        let long = "ab ".repeat(201);
        for (source, target, expected) in [
            ("Open file", "", "untranslated"),
            ("%s: 1", "%s：一", "fewer than two Latin letters"),
            ("KiB", "KiB", "target equals source"),
            ("Open file", "Ouvrir", "target not in its script"),
            ("ab\n\n\n\ncd", "中文", "more than 3 line breaks"),
            (long.as_str(), "中文", "more than 600 characters"),
            ("bell \u{7}", "铃", "control character"),
            ("a name", "名\u{202e}", "control character"),
            ("cannot open %s", "无法打开", "placeholders differ"),
            ("took %d s", "用了 %s 秒", "placeholders differ"),
            ("hello {name}", "你好 {user}", "placeholders differ"),
        ] {
            assert_eq!(clean("zh_CN", source, target), Err(expected), "{source:?}");
        }
    }

    #[test]
    fn kept_text_is_one_line() {
        let kept = |source, target| clean("zh_CN", source, target).unwrap();
        assert_eq!(kept("no such\n\tfile\n", "没有\n文件\n"), ("no such file".into(), "没有文件".into()));
        assert_eq!(kept("-a FILE    read", "-a 文件    读"), ("-a FILE read".into(), "-a 文件 读".into()));
        assert_eq!(kept("  a b\r\nc", "甲\nb"), ("a b c".into(), "甲 b".into()));
    }

    #[test]
    fn placeholders_may_move_but_not_change() {
        let same = |a, b| placeholders(a) == placeholders(b);
        assert!(same("%s of %-5d", "%2$d 之 %1$s"));
        assert!(same("100% of %lu%%", "%lu 的 100%"));
        assert!(same("%(n)d by {who}", "{who} %(n)d"));
        assert!(!same("%lu", "%u"));
        assert!(!same("%s %s", "%s"));
        assert!(same("a { b } c", "甲"), "braces of code are no fields");
        assert_eq!(placeholders("%"), Vec::<String>::new());
    }

    #[test]
    fn scripts() {
        assert!(has_script("nl", "bestand") && has_script("zh_TW", "檔") && !has_script("zh", "file"));
        assert!(has_script("ja", "ファイル") && has_script("ru", "файл") && !has_script("ko", "file"));
    }
}
