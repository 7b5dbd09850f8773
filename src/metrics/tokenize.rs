//! The word splitters of sacreBLEU 2.6.0: a BLEU score means nothing without the name of the one it used.

use std::sync::LazyLock;

use regex::Regex;

use super::is_space;

/// Which splitter a BLEU score uses; its name is part of the score's signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BleuTokenizer {
    /// mteval-v13a: ASCII punctuation apart, numbers whole. The default for languages with spaces.
    Mteval13a,
    /// Every Chinese character alone, the rest as 13a.
    Zh,
    /// Every character that is not white space alone.
    Char,
    /// mteval-v14 international: Unicode punctuation and symbols apart.
    Intl,
}

impl BleuTokenizer {
    /// sacreBLEU's default for a target language code such as "en", "zh" or "zh_CN".
    pub fn for_language(code: &str) -> Self {
        if code == "zh" || code.starts_with("zh_") || code.starts_with("zh-") { Self::Zh } else { Self::Mteval13a }
    }

    /// The name in the signature.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mteval13a => "13a",
            Self::Zh => "zh",
            Self::Char => "char",
            Self::Intl => "intl",
        }
    }

    /// The words of one segment.
    pub fn words(self, segment: &str) -> Vec<String> {
        let segment = segment.trim_end_matches(is_space);
        match self {
            Self::Mteval13a => split(&ascii_punctuation(&format!(" {} ", unescape(segment)))),
            Self::Zh => split(&ascii_punctuation(&space_chinese(segment.trim_matches(is_space)))),
            Self::Char => segment.chars().filter(|&c| !is_space(c)).map(String::from).collect(),
            Self::Intl => split(&unicode_punctuation(segment)),
        }
    }
}

fn split(text: &str) -> Vec<String> {
    text.split(is_space).filter(|word| !word.is_empty()).map(String::from).collect()
}

/// What 13a undoes before it splits: SGML entities, skipped marks and line breaks.
fn unescape(segment: &str) -> String {
    let mut line = segment.replace("<skipped>", "").replace("-\n", "").replace('\n', " ");
    if line.contains('&') {
        // In this order, so that "&amp;lt;" becomes "<" as it does in the original.
        line = line.replace("&quot;", "\"").replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">");
    }
    line
}

type Rule = (Regex, &'static str);

fn rules(patterns: &[(&str, &'static str)]) -> Vec<Rule> {
    // The patterns are constants of this file, never input; every test that splits a word compiles them.
    patterns.iter().map(|&(pattern, with)| (Regex::new(pattern).expect("a constant pattern"), with)).collect()
}

fn substitute(rules: &[Rule], text: &str) -> String {
    rules.iter().fold(text.to_string(), |line, (pattern, with)| pattern.replace_all(&line, *with).into_owned())
}

/// mteval-v13a's four substitutions; 13a and zh share them.
fn ascii_punctuation(text: &str) -> String {
    static RULES: LazyLock<Vec<Rule>> = LazyLock::new(|| {
        rules(&[
            (r"([\{-\~\[-` -\&\(-\+:-@/])", " ${1} "),
            // A full stop or comma stays inside a number only.
            (r"([^0-9])([.,])", "${1} ${2} "),
            (r"([.,])([^0-9])", " ${1} ${2}"),
            (r"([0-9])(-)", "${1} ${2} "),
        ])
    });
    substitute(&RULES, text)
}

/// mteval-v14's international substitutions.
fn unicode_punctuation(text: &str) -> String {
    static RULES: LazyLock<Vec<Rule>> = LazyLock::new(|| {
        rules(&[(r"(\P{N})(\p{P})", "${1} ${2} "), (r"(\p{P})(\P{N})", " ${1} ${2}"), (r"(\p{S})", " ${1} ")])
    });
    substitute(&RULES, text)
}

fn space_chinese(text: &str) -> String {
    let mut spaced = String::with_capacity(text.len() * 2);
    for character in text.chars() {
        if is_chinese(character) {
            spaced.extend([' ', character, ' ']);
        } else {
            spaced.push(character);
        }
    }
    spaced
}

/// sacreBLEU's table, its accident included: its two ranges above U+FFFF are written with four hex digits and a
/// stray fifth character, so that by string comparison they mean U+2001..U+2A6D and U+2F81..U+2FA1. Scores must be
/// equal, so the accident is kept: general punctuation, arrows and box drawing count as Chinese, extension B does not.
fn is_chinese(character: char) -> bool {
    matches!(character,
        '\u{3400}'..='\u{4db5}' | '\u{4e00}'..='\u{9fbb}' | '\u{f900}'..='\u{fa2d}' | '\u{fa30}'..='\u{fa6a}'
        | '\u{fa70}'..='\u{fad9}' | '\u{2001}'..='\u{2a6d}' | '\u{2f81}'..='\u{2fa1}' | '\u{ff00}'..='\u{ffef}'
        | '\u{2e80}'..='\u{2eff}' | '\u{3000}'..='\u{303f}' | '\u{31c0}'..='\u{31ef}' | '\u{2f00}'..='\u{2fdf}'
        | '\u{2ff0}'..='\u{2fff}' | '\u{3100}'..='\u{312f}' | '\u{31a0}'..='\u{31bf}' | '\u{fe10}'..='\u{fe1f}'
        | '\u{fe30}'..='\u{fe4f}' | '\u{3200}'..='\u{33ff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_their_points_and_words_lose_their_punctuation() {
        let words = BleuTokenizer::Mteval13a.words("It's 3.14, not &quot;3,000&quot; (e.g. x-1).");
        assert_eq!(words, ["It's", "3.14", ",", "not", "\"", "3,000", "\"", "(", "e", ".", "g", ".", "x-1", ")", "."]);
    }

    #[test]
    fn chinese_characters_stand_alone_beside_whole_latin_words() {
        assert_eq!(
            BleuTokenizer::Zh.words("打开 UNIX 文件：a.txt"),
            ["打", "开", "UNIX", "文", "件", "：", "a", ".", "txt"]
        );
    }

    #[test]
    fn the_default_follows_the_target_language() {
        assert_eq!(BleuTokenizer::for_language("zh_CN"), BleuTokenizer::Zh);
        assert_eq!(BleuTokenizer::for_language("es"), BleuTokenizer::Mteval13a);
    }
}
