//! The form of the file of orders: a line of JSON, and one with its CRC-32C as 8 hexadecimal digits.
//!
//! Times are milliseconds since 1970. A file with another version, more than it may hold, or a wrong checksum counts as
//! damaged.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::{Deadline, MOST_ACTIVE, MOST_BYTES, MOST_ENDED, MOST_RANGES, Order, State, Table, What, merged};
use crate::ranges::ByteRange;
use crate::sealed::{seal, unseal};

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Form {
    version: u32,
    last: u64,
    orders: Vec<OrderForm>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OrderForm {
    id: u64,
    image: String,
    identity: Option<String>,
    /// Starts and ends.
    ranges: Vec<(u64, u64)>,
    what: WhatForm,
    rate: Option<u64>,
    deadline: Option<u64>,
    strategy: String,
    source: Vec<String>,
    ordered: u64,
    state: StateForm,
    ended: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum WhatForm {
    All,
    Profile(String),
    Ranges,
    /// The session.
    Cast(String),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum StateForm {
    Active,
    Done,
    Cancelled,
    Failed(String),
}

pub(super) fn encode(table: &Table) -> Vec<u8> {
    let orders = table.orders.values().map(|order| write(order)).collect();
    let form = Form { version: 1, last: table.last, orders };
    seal(serde_json::to_string(&form).expect("texts and numbers can be written"))
}

pub(super) fn decode(bytes: &[u8]) -> Option<Table> {
    if bytes.len() > MOST_BYTES {
        return None;
    }
    let json = unseal(bytes)?;
    let form: Form = serde_json::from_str(json).ok().filter(|form: &Form| form.version == 1)?;
    let mut orders = BTreeMap::new();
    for order in form.orders {
        let order = read(order).filter(|order| order.id <= form.last)?;
        orders.insert(order.id, Arc::new(order)).is_none().then_some(())?;
    }
    let table = Table { last: form.last, orders };
    (table.active().count() <= MOST_ACTIVE && table.ended() <= MOST_ENDED).then_some(table)
}

fn write(order: &Order) -> OrderForm {
    OrderForm {
        id: order.id,
        image: order.image.clone(),
        identity: order.identity.map(|identity| identity.to_string()),
        ranges: order.ranges.iter().map(|range| (range.start(), range.end())).collect(),
        what: match &order.what {
            What::All => WhatForm::All,
            What::Profile(tag) => WhatForm::Profile(tag.clone()),
            What::Ranges => WhatForm::Ranges,
            What::Cast(session) => WhatForm::Cast(session.to_string()),
        },
        rate: order.rate,
        deadline: order.deadline.map(|deadline| milliseconds(deadline.wall())),
        strategy: order.strategy.to_string(),
        source: order.source.clone(),
        ordered: milliseconds(order.ordered_at),
        state: match &order.state {
            State::Active => StateForm::Active,
            State::Done => StateForm::Done,
            State::Cancelled => StateForm::Cancelled,
            State::Failed(why) => StateForm::Failed(why.clone()),
        },
        ended: order.ended_at.map(milliseconds),
    }
}

fn read(form: OrderForm) -> Option<Order> {
    let is_range = |(start, end): &(u64, u64)| start < end;
    if form.ranges.len() > MOST_RANGES || !form.ranges.iter().all(is_range) {
        return None;
    }
    let ranges: Vec<_> = form.ranges.into_iter().map(|(start, end)| ByteRange::between(start, end)).collect();
    if merged(&ranges) != ranges {
        return None;
    }
    let identity = match form.identity {
        Some(text) => Some(text.parse().ok()?),
        None => None,
    };
    let deadline = match form.deadline {
        Some(at) => Some(Deadline::at(time(at)?)),
        None => None,
    };
    let ended_at = match form.ended {
        Some(at) => Some(time(at)?),
        None => None,
    };
    Some(Order {
        id: form.id,
        image: form.image,
        identity,
        ranges,
        what: match form.what {
            WhatForm::All => What::All,
            WhatForm::Profile(tag) => What::Profile(tag),
            WhatForm::Ranges => What::Ranges,
            WhatForm::Cast(session) => What::Cast(session.parse().ok()?),
        },
        rate: form.rate.filter(|rate| *rate > 0),
        deadline,
        strategy: form.strategy.parse().ok()?,
        source: form.source,
        ordered_at: time(form.ordered)?,
        state: match form.state {
            StateForm::Active => State::Active,
            StateForm::Done => State::Done,
            StateForm::Cancelled => State::Cancelled,
            StateForm::Failed(why) => State::Failed(why),
        },
        ended_at,
    })
}

/// Since 1970. A clock before that is taken for one at that.
pub(super) fn milliseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn time(milliseconds: u64) -> Option<SystemTime> {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(milliseconds))
}

/// Takes arbitrary bytes as a file of orders: as they are, and as the JSON of one whose checksum is right.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let sealed = seal(data);
    for bytes in [data, &sealed] {
        if let Some(table) = decode(bytes) {
            let again = encode(&table);
            // Escapes may be longer than what they stand for.
            assert!(again.len() > MOST_BYTES || decode(&again) == Some(table));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cast::SessionId;
    use crate::export::ImageId;
    use crate::fill::deadline::Strategy;
    use proptest::prelude::*;

    fn order(id: u64, state: State) -> Order {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        Order {
            id,
            image: "debian \"12\"\n\u{e9}".into(),
            identity: Some(ImageId([7; 32])),
            ranges: vec![ByteRange::between(0, 1), ByteRange::between(2, u64::MAX)],
            what: What::Profile("boot".into()),
            rate: Some(1),
            deadline: Some(Deadline::at(at(1_795_000_000))),
            strategy: Strategy::Jit,
            source: vec!["nbd://a/b".into()],
            ordered_at: at(5),
            ended_at: (state != State::Active).then(|| at(6)),
            state,
        }
    }

    fn table() -> Table {
        let mut all = Order::new(2, super::super::Spec::all("", 0), SystemTime::UNIX_EPOCH);
        all.what = What::Ranges;
        let cast = Order { what: What::Cast(SessionId(0xfeed)), ..order(4, State::Active) };
        let failed = order(3, State::Failed("no\tmore".into()));
        let orders = [order(1, State::Active), all, failed, cast, order(9, State::Done)];
        Table { last: 12, orders: orders.into_iter().map(|order| (order.id, Arc::new(order))).collect() }
    }

    #[test]
    fn a_table_survives_its_form() {
        assert_eq!(decode(&encode(&table())), Some(table()));
        assert_eq!(decode(&encode(&Table::default())), Some(Table::default()));
        fuzz(&encode(&table()));
    }

    #[test]
    fn what_cannot_be_is_damage() {
        let sealed = |json: &str| seal(json);
        let text = String::from_utf8(encode(&table())).unwrap();
        let json = text.lines().next().unwrap();
        assert!(decode(&sealed(json)).is_some());
        for (from, to) in [
            ("\"version\":1", "\"version\":2"),
            ("\"last\":12", "\"last\":8"),
            ("\"id\":2", "\"id\":1"),
            ("[0,1]", "[1,1]"),
            ("[0,1]", "[0,2]"),
            ("\"jit\"", "\"never\""),
            ("\"rate\"", "\"ratio\""),
            ("blake3-07", "blake3-x7"),
            ("000000000000feed", "00000000000feed"),
        ] {
            let changed = json.replacen(from, to, 1);
            assert_ne!(changed, json, "{from}");
            assert!(decode(&sealed(&changed)).is_none(), "{to}");
        }
    }

    proptest! {
        #[test]
        fn no_flipped_bit_is_believed(bit in 0usize..10_000) {
            let mut file = encode(&table());
            let bit = bit % (8 * file.len());
            file[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(decode(&file), None);
        }
    }
}
