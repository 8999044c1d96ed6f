//! `headwater pin` and `headwater unpin`.

use super::args::{Parts, Pin, Unpin};
use super::output;
use super::running::{block_on, find_image, ranges, reach};
use super::table::printable;
use crate::control::Client;
use crate::control::status::{PinOrder, PinReport};
use crate::units::ByteSize;

pub(super) fn pin(arguments: Pin) -> anyhow::Result<()> {
    let Pin { parts, json, server } = arguments;
    let report = block_on(async {
        let client = reach(server).await?;
        Ok(client.pin(&parts.image, &order(&client, &parts).await?).await?)
    })?;
    print(&parts.image, &report, json)
}

pub(super) fn unpin(arguments: Unpin) -> anyhow::Result<()> {
    let Unpin { parts, json, server } = arguments;
    let report = block_on(async {
        let client = reach(server).await?;
        Ok(client.unpin(&parts.image, &order(&client, &parts).await?).await?)
    })?;
    print(&parts.image, &report, json)
}

async fn order(client: &Client, parts: &Parts) -> anyhow::Result<PinOrder> {
    let image = find_image(client, &parts.image).await?;
    Ok(PinOrder { ranges: ranges(&parts.range, image.size)? })
}

fn print(image: &str, report: &PinReport, json: bool) -> anyhow::Result<()> {
    if json {
        return output::print(&format!("{}\n", serde_json::to_string_pretty(report)?));
    }
    output::print(&format!("{}: {}\n", printable(image), describe(report)))
}

fn describe(report: &PinReport) -> String {
    let PinReport { pinned_bytes, missing_bytes } = *report;
    let (pinned, here) = (ByteSize(pinned_bytes), ByteSize(pinned_bytes.saturating_sub(missing_bytes)));
    match (pinned_bytes, missing_bytes) {
        (0, _) => "nothing is pinned".to_owned(),
        (_, 0) => format!("{pinned} pinned, all of it here"),
        (_, missing) => {
            format!("{pinned} pinned, {here} of it here; the other {} stay once they are read", ByteSize(missing))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_say_how_much_of_them_is_here() {
        let of = |pinned_bytes, missing_bytes| describe(&PinReport { pinned_bytes, missing_bytes });
        assert_eq!(of(0, 0), "nothing is pinned");
        assert_eq!(of(1 << 20, 0), "1M pinned, all of it here");
        assert_eq!(of(1 << 20, 1 << 16), "1M pinned, 960K of it here; the other 64K stay once they are read");
        assert_eq!(of(1 << 20, 1 << 20), "1M pinned, 0 of it here; the other 1M stay once they are read");
    }
}
