//! `headwater pin` and `headwater unpin`.

use super::args::{Parts, Pin, Unpin};
use super::output;
use super::running::{block_on, find_image, ranges, reach};
use crate::control::Client;
use crate::control::status::{PinOrder, PinReport};
use crate::units::ByteSize;

pub(super) fn pin(arguments: Pin) -> anyhow::Result<()> {
    let Pin { parts, server } = arguments;
    let report = block_on(async {
        let client = reach(server).await?;
        Ok(client.pin(&parts.image, &order(&client, &parts).await?).await?)
    })?;
    print(&parts.image, &report)
}

pub(super) fn unpin(arguments: Unpin) -> anyhow::Result<()> {
    let Unpin { parts, server } = arguments;
    let report = block_on(async {
        let client = reach(server).await?;
        Ok(client.unpin(&parts.image, &order(&client, &parts).await?).await?)
    })?;
    print(&parts.image, &report)
}

async fn order(client: &Client, parts: &Parts) -> anyhow::Result<PinOrder> {
    let image = find_image(client, &parts.image).await?;
    Ok(PinOrder { ranges: ranges(&parts.range, image.size)? })
}

fn print(image: &str, report: &PinReport) -> anyhow::Result<()> {
    let PinReport { pinned_bytes, missing_bytes } = *report;
    let missing = match missing_bytes {
        0 => String::new(),
        bytes => format!(", {} of it not here yet", ByteSize(bytes)),
    };
    output::print(&format!("{image}: {} pinned{missing}\n", ByteSize(pinned_bytes)))
}
