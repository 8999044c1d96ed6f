//! `headwater status`.

use std::fmt::Write;

use super::args;
use super::cast;
use super::output;
use super::prefetch;
use super::redirect;
use super::running::{block_on, reach};
use super::table::{Table, printable};
use crate::control::AdminAddress;
use crate::control::status::{CacheStatus, ImageStatus, Kind, LinkStatus, MirrorStatus, Status, UpstreamStatus};
use crate::manifest::ImageId;
use crate::units::ByteSize;

pub(super) fn run(arguments: args::Status) -> anyhow::Result<()> {
    let (address, (json, status)) = block_on(async {
        let client = reach(arguments.server).await?;
        let status = client.status().await?;
        Ok((client.address().clone(), status))
    })?;
    if arguments.json {
        return output::print(&format!("{json}\n"));
    }
    output::print(&describe(&address, &status)?)
}

fn describe(address: &AdminAddress, status: &Status) -> anyhow::Result<String> {
    let Status {
        version,
        pid,
        role,
        uptime_seconds,
        images,
        clients,
        cache,
        link,
        orders,
        redirects,
        casts,
        receptions,
        draining,
        ..
    } = status;
    let mut text = format!("headwater {version} {role}, process {pid}, up {}, at {address}\n", ago(*uptime_seconds));
    write!(text, "\nimages\n{}", of_images(images))?;
    let mirrors: Vec<_> = images.iter().filter_map(|image| Some((&*image.name, image.mirror.as_ref()?))).collect();
    if !mirrors.is_empty() {
        write!(text, "\nmirrors\n{}\nupstreams\n{}", of_mirrors(&mirrors), of_upstreams(&mirrors))?;
        write!(text, "\nbrought here, and why\n{}", of_fills(&mirrors))?;
    }
    if let Some(LinkStatus { window_bytes, in_flight_bytes, rate }) = link {
        let rate = rate.map_or_else(String::new, |rate| format!("; lately {} a second", size(rate)));
        let (in_flight, window) = (size(*in_flight_bytes), size(*window_bytes));
        writeln!(text, "  ahead of demand, {in_flight} are on their way, {window} may be{rate}")?;
    }
    if let Some(cache) = cache {
        write!(text, "\ncache {}\n{}", cache.path, of_cache(cache)?)?;
    }
    if !orders.is_empty() {
        write!(text, "\norders to prefetch\n{}", prefetch::table(orders))?;
    }
    if !redirects.is_empty() {
        write!(text, "\norders to move clients\n{}", redirect::table(redirects))?;
    }
    if !casts.is_empty() {
        write!(text, "\ncasts\n{}", cast::table(casts))?;
    }
    if !receptions.is_empty() {
        write!(text, "\ngroups that are heard\n{}", cast::of_receptions(receptions))?;
    }
    if draining.all {
        writeln!(text, "\nOUT OF SERVICE: newcomers are sent away; {} connections are left", draining.clients.len())?;
    } else if draining.is_draining() {
        let (names, left) = (draining.exports.join(", "), draining.clients.len());
        writeln!(text, "\nOUT OF SERVICE: {}; {left} connections are left", printable(&names))?;
    }
    if clients.is_empty() {
        return Ok(text + "\nno clients\n");
    }
    let headings = [
        "CLIENT",
        ">ID",
        "IMAGE",
        ">CONNECTED",
        ">REQUESTS",
        ">READ",
        ">WRITTEN",
        ">ERRORS",
        ">IN FLIGHT",
        ">BYTES",
        "SERVED FROM",
    ];
    let mut table = Table::new(&headings);
    for client in clients {
        table.row(vec![
            client.peer.clone(),
            client.id.to_string(),
            short_name(&client.export),
            ago(client.connected_seconds),
            client.requests.to_string(),
            size(client.read_bytes),
            size(client.written_bytes),
            client.errors.to_string(),
            client.requests_in_flight.to_string(),
            size(client.bytes_in_flight),
            client.relayed_to.clone().unwrap_or_else(|| "here".to_owned()),
        ]);
    }
    write!(text, "\nclients\n{table}")?;
    Ok(text)
}

fn of_images(images: &[ImageStatus]) -> Table {
    let mut table = Table::new(&["NAME", "KIND", ">SIZE", ">HERE", ">CLIENTS", "ACCESS", "IDENTITY", "PATH"]);
    for image in images {
        let kind = match image.kind {
            Kind::Real => "real",
            Kind::Mirror => "mirror",
        };
        let here = image.mirror.as_ref().map(|mirror| mirror.resident_bytes.saturating_add(mirror.zero_bytes));
        table.row(vec![
            image.name.clone(),
            kind.to_owned(),
            size(image.size),
            percent(here.unwrap_or(image.size), image.size),
            image.clients.to_string(),
            if image.writable { "read-write" } else { "read-only" }.to_owned(),
            image.identity.as_ref().map_or_else(|| "-".to_owned(), |identity| short(identity)),
            image.path.clone(),
        ]);
    }
    table
}

fn of_mirrors(mirrors: &[(&str, &MirrorStatus)]) -> Table {
    let headings = [
        "NAME",
        "VERIFIED",
        ">RESIDENT",
        ">ZERO",
        ">PINNED",
        ">SHARED",
        ">HITS",
        ">MISSES",
        ">HIT RATE",
        ">EVICTED",
        ">DAMAGED",
        ">FETCHED",
    ];
    let mut table = Table::new(&headings);
    for (name, mirror) in mirrors {
        table.row(vec![
            short_name(name),
            if mirror.verified { "yes" } else { "no" }.to_owned(),
            size(mirror.resident_bytes),
            size(mirror.zero_bytes),
            size(mirror.pinned_bytes),
            size(mirror.deduplicated_bytes),
            mirror.hits.to_string(),
            mirror.misses.to_string(),
            percent(mirror.hits, mirror.hits.saturating_add(mirror.misses)),
            size(mirror.evicted_bytes),
            mirror.verify_failures.to_string(),
            size(mirror.upstream_bytes),
        ]);
    }
    table
}

fn of_fills(mirrors: &[(&str, &MirrorStatus)]) -> Table {
    let mut table = Table::new(&["IMAGE", "CAUSE", ">BROUGHT", ">USED", ">LATE", ">UNREAD", ">UNUSED"]);
    for (name, mirror) in mirrors {
        for (cause, status) in mirror.fill.iter().filter(|(_, status)| status.brought_bytes > 0) {
            table.row(vec![
                short_name(name),
                cause.clone(),
                size(status.brought_bytes),
                size(status.used_bytes),
                size(status.late_bytes),
                size(status.unread_bytes),
                size(status.unused_bytes),
            ]);
        }
    }
    table
}

fn of_upstreams(mirrors: &[(&str, &MirrorStatus)]) -> Table {
    let mut table = Table::new(&["IMAGE", "URI", "STATE", ">REQUESTS", ">RECEIVED", ">WRONG", "LAST ERROR"]);
    for (name, mirror) in mirrors {
        for upstream in &mirror.upstreams {
            table.row(vec![
                short_name(name),
                upstream.uri.clone(),
                state(upstream),
                upstream.requests.to_string(),
                size(upstream.received_bytes),
                upstream.wrong_replies.to_string(),
                upstream.last_error.clone().unwrap_or_else(|| "-".to_owned()),
            ]);
        }
    }
    table
}

/// An identity, enough of it to tell versions apart; --json has all of it.
fn short(identity: &str) -> String {
    identity.chars().take(15).collect()
}

/// The name of an image, which for an older generation has its identity in it. The table of images has all of it.
pub(super) fn short_name(name: &str) -> String {
    match name.rsplit_once('@') {
        Some((name, identity)) if identity.parse::<ImageId>().is_ok() => format!("{name}@{}", short(identity)),
        _ => name.to_owned(),
    }
}

fn state(upstream: &UpstreamStatus) -> String {
    match (upstream.set_aside_seconds, upstream.current, upstream.reachable) {
        (Some(seconds), _, _) => format!("set aside for {}", ago(seconds)),
        (None, true, Some(false)) => "in use, unreachable".to_owned(),
        (None, true, _) => "in use".to_owned(),
        (None, false, Some(false)) => "unreachable".to_owned(),
        (None, false, _) => "spare".to_owned(),
    }
}

fn of_cache(cache: &CacheStatus) -> anyhow::Result<String> {
    let mut text = String::new();
    let mut line = |label: &str, value: String| writeln!(text, "  {label:<10} {}", printable(&value));
    let bound = cache.limit_bytes.map_or_else(|| "no bound".to_owned(), |limit| format!("of {}", size(limit)));
    let (allocated, in_flight, pinned) = (cache.allocated_bytes, cache.in_flight_bytes, cache.pinned_bytes);
    line("allocated", format!("{}, {bound}; {} in flight, {} pinned", size(allocated), size(in_flight), size(pinned)))?;
    let free = cache.free_bytes.map_or_else(|| "unknown".to_owned(), size);
    line("free", format!("{free}, of which {} is left free", size(cache.reserve_bytes)))?;
    let policy = cache.policy.as_deref().unwrap_or("nothing is evicted");
    let thrashing = if cache.thrashing { ", too small for its load" } else { "" };
    line("eviction", format!("{policy}; {} evicted, {} bypassed{thrashing}", cache.evictions, cache.bypassed))?;
    line("shared", format!("{} not fetched, because another image had them", size(cache.deduplicated_bytes)))?;
    if cache.failed {
        line("DISK", "it failed too often and is not used any more: everything comes from the upstreams".to_owned())?;
    }
    Ok(text)
}

pub(super) fn size(bytes: u64) -> String {
    ByteSize(bytes).to_string()
}

pub(super) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".to_owned();
    }
    let tenths = u128::from(part) * 1000 / u128::from(whole);
    format!("{}.{} %", tenths / 10, tenths % 10)
}

/// A length of time, to two units.
pub(super) fn ago(seconds: f64) -> String {
    let seconds = std::time::Duration::try_from_secs_f64(seconds).unwrap_or_default().as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min {} s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{} h {} min", seconds / 3_600, seconds / 60 % 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds / 3_600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_and_times_are_short() {
        assert_eq!(percent(0, 0), "-");
        assert_eq!(percent(1, 3), "33.3 %");
        assert_eq!(percent(u64::MAX, u64::MAX), "100.0 %");
        for (seconds, text) in
            [(0.9, "0 s"), (61.0, "1 min 1 s"), (7_260.0, "2 h 1 min"), (90_000.0, "1 d 1 h"), (-1.0, "0 s")]
        {
            assert_eq!(ago(seconds), text);
        }
    }

    #[test]
    fn older_generations_have_short_names() {
        let identity = ImageId([0xab; 32]);
        assert_eq!(short_name(&format!("a@b@{identity}")), "a@b@blake3-abababab");
        assert_eq!(short_name("a@b"), "a@b");
        assert_eq!(short_name("blake3-ab"), "blake3-ab");
    }

    #[test]
    fn a_cache_says_what_is_wrong_with_it() {
        let cache = CacheStatus { limit_bytes: Some(1 << 30), free_bytes: Some(1 << 20), ..CacheStatus::default() };
        let sound = of_cache(&cache).unwrap();
        assert!(sound.contains("of 1G") && !sound.contains("DISK") && !sound.contains("too small"), "{sound}");
        let broken = of_cache(&CacheStatus { failed: true, thrashing: true, ..cache }).unwrap();
        assert!(broken.contains("not used any more") && broken.contains("too small for its load"), "{broken}");
    }

    #[test]
    fn upstreams_say_whether_they_are_used() {
        let upstream = UpstreamStatus { current: true, reachable: Some(true), ..UpstreamStatus::default() };
        assert_eq!(state(&upstream), "in use");
        assert_eq!(state(&UpstreamStatus { reachable: Some(false), ..upstream.clone() }), "in use, unreachable");
        assert_eq!(state(&UpstreamStatus { set_aside_seconds: Some(60.0), ..upstream }), "set aside for 1 min 0 s");
        assert_eq!(state(&UpstreamStatus::default()), "spare");
    }
}
