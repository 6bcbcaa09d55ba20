//! Small text: time as people read it, labels, names that were almost right, and nothing that drives a terminal.

use std::collections::BTreeMap;

use model::UnixMillis;

/// The time now.
pub(super) fn now() -> UnixMillis {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    since.as_millis() as UnixMillis
}

/// How long ago, in one unit, rounded down: `12s`, `5m`, `3h`, `9d`.
pub(super) fn age(then: UnixMillis, now: UnixMillis) -> String {
    span(now.saturating_sub(then) / 1000)
}

/// How long until, or `over`.
pub(super) fn until(then: UnixMillis, now: UnixMillis) -> String {
    if then <= now { "over".to_owned() } else { span((then - now) / 1000) }
}

fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7_200 => format!("{}m", seconds / 60),
        7_200..172_800 => format!("{}h", seconds / 3_600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// Date and time in UTC: `2025-11-21 05:30:00 UTC`.
pub(super) fn utc(then: UnixMillis) -> String {
    let seconds = then / 1000;
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", rest / 3_600, rest / 60 % 60, rest % 60)
}

/// Days since 1970-01-01 as a date of the Gregorian calendar, counted in eras of 400 years that begin on 1 March.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

/// `k=v` pairs, with commas between.
pub(super) fn labels(labels: &BTreeMap<String, String>) -> String {
    let pairs: Vec<String> = labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    pairs.join(",")
}

/// Items with commas between.
pub(super) fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(",")
}

/// `1 host`, `2 hosts`.
pub(super) fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// Text that others wrote (labels, messages), with what could drive a terminal made visible.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

/// The one of `known` that `wanted` was probably meant to be.
pub(super) fn closest<'a>(wanted: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let limit = (wanted.chars().count() / 3).clamp(1, 3);
    known
        .into_iter()
        .map(|name| (distance(&wanted.to_lowercase(), &name.to_lowercase()), name))
        .filter(|(distance, _)| *distance <= limit)
        .min()
        .map(|(_, name)| name)
}

/// Edits from `a` to `b`: insert, delete, replace, swap neighbours (optimal string alignment).
fn distance(a: &str, b: &str) -> usize {
    let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
    let mut before: Vec<usize> = Vec::new();
    let mut above: Vec<usize> = (0..=b.len()).collect();
    for i in 1..=a.len() {
        let mut row = vec![i];
        for j in 1..=b.len() {
            let replace = above[j - 1] + usize::from(a[i - 1] != b[j - 1]);
            let mut least = replace.min(above[j] + 1).min(row[j - 1] + 1);
            if i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1] {
                least = least.min(before[j - 2] + 1);
            }
            row.push(least);
        }
        before = std::mem::replace(&mut above, row);
    }
    above.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_age_has_one_unit() {
        let texts = [0, 119, 120, 7_199, 7_200, 172_799, 172_800].map(|s| age(0, s * 1000));
        assert_eq!(texts, ["0s", "119s", "2m", "119m", "2h", "47h", "2d"]);
        assert_eq!(age(5000, 1000), "0s", "a clock that is behind is no panic");
        assert_eq!((until(90_000, 0), until(1, 1)), ("90s".to_owned(), "over".to_owned()));
    }

    #[test]
    fn dates_are_right_at_the_edges_of_years() {
        let dates = [
            (0, "1970-01-01"),
            (951_782_400, "2000-02-29"),
            (1_735_689_599, "2024-12-31"),
            (4_107_542_400, "2100-03-01"),
        ];
        for (seconds, date) in dates {
            assert!(utc(seconds * 1000).starts_with(date), "{seconds}: {}", utc(seconds * 1000));
        }
        assert_eq!(utc(1_735_689_599_999), "2024-12-31 23:59:59 UTC");
    }

    #[test]
    fn a_name_that_was_almost_right_is_found_and_a_wild_one_is_not() {
        let known = ["managed", "red", "backend"];
        for (wanted, meant) in [
            ("mangaed", Some("managed")),
            ("Managed", Some("managed")),
            ("rde", Some("red")),
            ("bakend", Some("backend")),
        ] {
            assert_eq!(closest(wanted, known), meant, "{wanted}");
        }
        for wild in ["blue", "x", "", "frontend-of-all"] {
            assert_eq!(closest(wild, known), None, "{wild}");
        }
    }

    #[test]
    fn control_characters_are_made_visible() {
        assert_eq!(printable("a\x1b[2Jb\u{9b}c\rd"), "a\u{fffd}[2Jb\u{fffd}c\u{fffd}d");
    }
}
