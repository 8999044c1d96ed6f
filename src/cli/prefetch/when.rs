//! Times of day and lengths of time, as people write them.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, ensure};
use jiff::civil::{DateTime, Time};
use jiff::{Timestamp, ToSpan, Zoned};

/// A moment that a person has named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cli) enum When {
    /// The next time that it is so late here.
    Time(Time),
    /// A day and a time here.
    Here(DateTime),
    /// A moment anywhere.
    Anywhere(Timestamp),
}

impl FromStr for When {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // Nobody who writes 09:00-01:00 would be sure what it means.
        let is_time = text.chars().all(|c| c.is_ascii_digit() || c == ':') && text.contains(':');
        if is_time && let Ok(time) = text.parse() {
            return Ok(Self::Time(time));
        }
        let has_day = text.get(..10).is_some_and(|day| day.parse::<jiff::civil::Date>().is_ok()) && text.len() > 10;
        if has_day {
            if let Ok(zoned) = text.parse::<Zoned>() {
                return Ok(Self::Anywhere(zoned.timestamp()));
            }
            if let Ok(timestamp) = text.parse() {
                return Ok(Self::Anywhere(timestamp));
            }
            if let Ok(here) = text.parse() {
                return Ok(Self::Here(here));
            }
        }
        Err("write a time such as 09:00, 09:00:30, 2026-11-22T09:00 or 2026-11-22T09:00Z".to_owned())
    }
}

impl When {
    /// The moment itself, for somebody for whom it is `now`.
    pub(in crate::cli) fn after(self, now: &Zoned) -> anyhow::Result<Timestamp> {
        let moment = match self {
            Self::Time(time) => {
                // A time that does not exist on a day, because clocks are set forward, is as much later.
                let today = now.date().to_datetime(time).to_zoned(now.time_zone().clone())?;
                let today = today.timestamp();
                if today > now.timestamp() {
                    return Ok(today);
                }
                let tomorrow = now.date().checked_add(1.day())?.to_datetime(time);
                tomorrow.to_zoned(now.time_zone().clone())?.timestamp()
            }
            Self::Here(time) => time.to_zoned(now.time_zone().clone())?.timestamp(),
            Self::Anywhere(timestamp) => timestamp,
        };
        ensure!(moment > now.timestamp(), "--by: {} has passed", moment.to_zoned(now.time_zone().clone()));
        Ok(moment)
    }
}

/// Seconds since 1970, as a day and a time here.
pub(in crate::cli) fn shown(seconds: f64) -> String {
    let time = Duration::try_from_secs_f64(seconds).ok().and_then(|time| jiff::SignedDuration::try_from(time).ok());
    let timestamp = time.and_then(|time| Timestamp::from_duration(time).ok());
    timestamp.map_or_else(
        || "-".to_owned(),
        |timestamp| timestamp.to_zoned(jiff::tz::TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string(),
    )
}

/// `20s`, `10m`, `1h30m`, `2d`.
pub(in crate::cli) fn length_of_time(text: &str) -> Result<Duration, String> {
    parse_length(text).map_err(|error| error.to_string())
}

fn parse_length(text: &str) -> anyhow::Result<Duration> {
    const NONSENSE: &str = "write a length of time such as 20s, 10m, 1h30m or 2d";
    let (mut rest, mut total, mut last) = (text, Duration::ZERO, u64::MAX);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).context(NONSENSE)?;
        let number: u64 = rest[..digits].parse().context(NONSENSE)?;
        let mut unit = rest[digits..].chars();
        let seconds = match unit.next() {
            Some('d') => 86_400,
            Some('h') => 3_600,
            Some('m') => 60,
            Some('s') => 1,
            _ => anyhow::bail!(NONSENSE),
        };
        ensure!(seconds < last, NONSENSE);
        last = seconds;
        total = number
            .checked_mul(seconds)
            .and_then(|seconds| total.checked_add(Duration::from_secs(seconds)))
            .context(NONSENSE)?;
        rest = unit.as_str();
    }
    ensure!(!total.is_zero(), NONSENSE);
    ensure!(total.as_secs() <= 366 * 86_400, "a year at most");
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(text: &str, now: &str) -> String {
        let now: Zoned = now.parse().unwrap();
        match text.parse::<When>().unwrap().after(&now) {
            Ok(moment) => moment.to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_time_is_the_next_one() {
        let now = "2026-11-21T18:00:00+01:00[Europe/Berlin]";
        assert_eq!(after("09:00", now), "2026-11-22T08:00:00Z");
        assert_eq!(after("18:00:01", now), "2026-11-21T17:00:01Z");
        assert_eq!(after("18:00", now), "2026-11-22T17:00:00Z", "now is not ahead");
        assert_eq!(after("2026-11-22T09:00", now), "2026-11-22T08:00:00Z");
        assert_eq!(after("2026-11-22 09:00:30", now), "2026-11-22T08:00:30Z");
        assert_eq!(after("2026-11-22T09:00Z", now), "2026-11-22T09:00:00Z");
        assert_eq!(after("2026-11-22T09:00-05:00", now), "2026-11-22T14:00:00Z");
        assert_eq!(after("2026-11-22T09:00[America/New_York]", now), "2026-11-22T14:00:00Z");
        assert!(after("2026-11-21T17:59", now).contains("has passed"));
        assert!(after("2026-11-21T17:00Z", now).contains("has passed"));
    }

    #[test]
    fn clocks_that_are_set_forward_and_back_are_followed() {
        // In the night to 29 March 2026, 02:00 became 03:00 in Berlin; in that to 25 October, 03:00 became 02:00.
        assert_eq!(after("02:30", "2026-03-28T23:00:00+01:00[Europe/Berlin]"), "2026-03-29T01:30:00Z");
        assert_eq!(after("09:00", "2026-03-28T23:00:00+01:00[Europe/Berlin]"), "2026-03-29T07:00:00Z");
        assert_eq!(after("09:00", "2026-10-24T23:00:00+02:00[Europe/Berlin]"), "2026-10-25T08:00:00Z");
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in
            ["", "9", "9am", "25:00", "09:60", "tomorrow", "2026-11-22", "2026-13-01T00:00", "09:00Z", "09:00+01:00"]
        {
            assert!(text.parse::<When>().is_err(), "{text}");
        }
    }

    #[test]
    fn lengths_of_time_have_units_in_order() {
        for (text, seconds) in
            [("20s", 20), ("10m", 600), ("1h30m", 5400), ("2d1h", 176_400), ("90m", 5400), ("0h5s", 5)]
        {
            assert_eq!(length_of_time(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        for text in
            ["", "10", "s", "1m1h", "1s1s", "1.5h", "-1s", "0s", "400d", "99999999999999999999s", "1h 30m", "1x"]
        {
            assert!(length_of_time(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_are_shown_or_not_at_all() {
        assert!(shown(1_795_000_000.0).starts_with("2026-11-1"));
        assert_eq!(shown(-1.0), "-");
        assert_eq!(shown(f64::NAN), "-");
        assert_eq!(shown(1e18), "-");
    }
}
