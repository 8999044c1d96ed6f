//! Netlink messages to bytes and back: the family `nbd`, the controller that tells its number, and `SOCK_DESTROY`.
//!
//! The headers, attributes and error messages are those of the `netlink-packet` crates; what they mean for NBD is said
//! here, after `include/uapi/linux/nbd-netlink.h`. Requests:
//!
//! | command | attributes |
//! | --- | --- |
//! | CONNECT | INDEX, SIZE_BYTES, BLOCK_SIZE_BYTES, TIMEOUT, DEAD_CONN_TIMEOUT, SERVER_FLAGS, SOCKETS, BACKEND_IDENTIFIER |
//! | RECONFIGURE | INDEX, TIMEOUT, DEAD_CONN_TIMEOUT, SOCKETS, BACKEND_IDENTIFIER; never a size: it would be taken |
//! | DISCONNECT, STATUS | INDEX |
//!
//! Limits: a datagram is read up to [`MAX_DATAGRAM`] bytes, a list of devices up to [`MAX_DEVICES`], a text up to
//! [`MAX_TEXT`]. What is not understood is left out; what contradicts itself ends the datagram.

use std::net::SocketAddr;

use netlink_packet_core::{
    DefaultNla, Emitable, ErrorBuffer, NLA_F_NESTED, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_REQUEST, NLMSG_ERROR,
    NetlinkBuffer, NetlinkHeader, NlasIterator,
};
use netlink_packet_generic::GenlHeader;
use netlink_packet_generic::constants::{
    CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME, CTRL_ATTR_MCAST_GROUPS, CTRL_ATTR_MCAST_GRP_ID,
    CTRL_ATTR_MCAST_GRP_NAME, CTRL_CMD_GETFAMILY, GENL_HDRLEN, GENL_ID_CTRL,
};

/// Bytes of a datagram that are read. The longest is the list of all devices, 20 bytes for each.
pub const MAX_DATAGRAM: usize = 64 << 10;
/// Devices that are read from one list.
pub const MAX_DEVICES: usize = 4096;
/// Bytes of a text of the kernel that are kept.
pub const MAX_TEXT: usize = 512;

const FAMILY: &[u8] = b"nbd\0";
const GROUP: &[u8] = b"nbd_mc_group";

const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;
const RECONFIGURE: u8 = 3;
const LINK_DEAD: u8 = 4;
const STATUS: u8 = 5;

const ATTR_INDEX: u16 = 1;
const ATTR_SIZE_BYTES: u16 = 2;
const ATTR_BLOCK_SIZE_BYTES: u16 = 3;
const ATTR_TIMEOUT: u16 = 4;
const ATTR_SERVER_FLAGS: u16 = 5;
const ATTR_SOCKETS: u16 = 7;
const ATTR_DEAD_CONN_TIMEOUT: u16 = 8;
const ATTR_DEVICE_LIST: u16 = 9;
const ATTR_BACKEND_IDENTIFIER: u16 = 10;
/// One element of a list, and its only attribute or its first.
const ITEM: u16 = 1;
const DEVICE_CONNECTED: u16 = 2;
const EXTENDED_ACK_TEXT: u16 = 1;

/// `SOCK_DESTROY` (`include/uapi/linux/sock_diag.h`).
const SOCK_DESTROY: u16 = 21;
const IPPROTO_TCP: u8 = 6;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// What the kernel is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// The numbers of the family `nbd` and of its group of listeners.
    Family,
    /// Bind a device.
    Connect {
        /// Which device.
        index: u32,
        /// Bytes.
        size: u64,
        /// Bytes of a logical block.
        block_size: u64,
        /// What the server can do: NBD's transmission flags.
        flags: u64,
        /// What else is set.
        change: Change,
    },
    /// Change a device that is bound.
    Reconfigure {
        /// Which device.
        index: u32,
        /// What is set.
        change: Change,
    },
    /// Give a device back.
    Disconnect {
        /// Which device.
        index: u32,
    },
    /// Whether devices are bound.
    Status {
        /// Which device; all of them without.
        index: Option<u32>,
    },
}

/// What can be set at any time. What is `None` or empty stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Change {
    /// Seconds after which a request is sent again.
    pub timeout: Option<u64>,
    /// Seconds that requests wait while no connection is alive.
    pub dead_timeout: Option<u64>,
    /// Descriptors of sockets on which the negotiation is over.
    pub sockets: Vec<u32>,
    /// What the device holds. Once set, each change must name the same.
    pub backend: Option<String>,
}

/// What the kernel says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// An answer to the request with this number is complete.
    Done {
        /// The request.
        sequence: u32,
        /// The system's error number; 0 when all went well.
        errno: i32,
        /// The kernel's words for it; may be empty.
        text: String,
    },
    /// The numbers of the family.
    Family {
        /// Of the family.
        id: u16,
        /// Of the group that is told of dead connections.
        group: Option<u32>,
    },
    /// A device was bound.
    Connected {
        /// Which.
        index: u32,
    },
    /// A connection of a device died.
    LinkDead {
        /// Which device.
        index: u32,
    },
    /// Devices, and whether they are bound or open.
    Status(Vec<(u32, bool)>),
}

/// Why a datagram is not understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

impl Request {
    /// The datagram for it. `family` is the number of `nbd`, which [`Request::Family`] does without.
    pub fn encode(&self, family: u16, sequence: u32) -> Vec<u8> {
        let (command, attributes) = match self {
            Self::Family => {
                let name = DefaultNla::new(CTRL_ATTR_FAMILY_NAME, FAMILY.to_vec());
                return encode(GENL_ID_CTRL, sequence, GenlHeader { cmd: CTRL_CMD_GETFAMILY, version: 1 }, &[name]);
            }
            Self::Connect { index, size, block_size, flags, change } => {
                let mut attributes = vec![
                    u32_attribute(ATTR_INDEX, *index),
                    u64_attribute(ATTR_SIZE_BYTES, *size),
                    u64_attribute(ATTR_BLOCK_SIZE_BYTES, *block_size),
                    u64_attribute(ATTR_SERVER_FLAGS, *flags),
                ];
                attributes.extend(change.attributes());
                (CONNECT, attributes)
            }
            Self::Reconfigure { index, change } => {
                let mut attributes = vec![u32_attribute(ATTR_INDEX, *index)];
                attributes.extend(change.attributes());
                (RECONFIGURE, attributes)
            }
            Self::Disconnect { index } => (DISCONNECT, vec![u32_attribute(ATTR_INDEX, *index)]),
            Self::Status { index } => {
                (STATUS, index.map(|index| u32_attribute(ATTR_INDEX, index)).into_iter().collect())
            }
        };
        encode(family, sequence, GenlHeader { cmd: command, version: 1 }, &attributes)
    }

    /// What it is, in an error message.
    pub const fn what(&self) -> &'static str {
        match self {
            Self::Family => "tell of the family nbd",
            Self::Connect { .. } => "attach the device",
            Self::Reconfigure { .. } => "change the device",
            Self::Disconnect { .. } => "detach the device",
            Self::Status { .. } => "tell of the device",
        }
    }
}

impl Change {
    fn attributes(&self) -> Vec<DefaultNla> {
        let mut attributes = Vec::new();
        attributes.extend(self.timeout.map(|seconds| u64_attribute(ATTR_TIMEOUT, seconds)));
        attributes.extend(self.dead_timeout.map(|seconds| u64_attribute(ATTR_DEAD_CONN_TIMEOUT, seconds)));
        if !self.sockets.is_empty() {
            let items = self.sockets.iter().map(|socket| nested(ITEM, &[u32_attribute(ITEM, *socket)]));
            attributes.push(nested(ATTR_SOCKETS, &items.collect::<Vec<_>>()));
        }
        attributes.extend(self.backend.as_ref().map(|text| {
            let mut bytes = text.clone().into_bytes();
            bytes.push(0);
            DefaultNla::new(ATTR_BACKEND_IDENTIFIER, bytes)
        }));
        attributes
    }
}

/// The datagram that ends a TCP connection of this system, as `ss -K` does (`sock_diag(7)`, `inet_diag_req_v2`).
/// `None` if the two addresses are of different families.
pub fn encode_destroy(local: SocketAddr, remote: SocketAddr, sequence: u32) -> Option<Vec<u8>> {
    let (family, source, destination) = match (local, remote) {
        (SocketAddr::V4(local), SocketAddr::V4(remote)) => {
            let wide = |octets: [u8; 4]| {
                let mut bytes = [0; 16];
                bytes[..4].copy_from_slice(&octets);
                bytes
            };
            (AF_INET, wide(local.ip().octets()), wide(remote.ip().octets()))
        }
        (SocketAddr::V6(local), SocketAddr::V6(remote)) => (AF_INET6, local.ip().octets(), remote.ip().octets()),
        _ => return None,
    };
    let mut payload = vec![family, IPPROTO_TCP, 0, 0];
    // Whatever its state is.
    payload.extend(u32::MAX.to_ne_bytes());
    payload.extend(local.port().to_be_bytes());
    payload.extend(remote.port().to_be_bytes());
    payload.extend(source);
    payload.extend(destination);
    // On any interface, with any cookie (`INET_DIAG_NOCOOKIE`).
    payload.extend(0u32.to_ne_bytes());
    payload.extend([0xff; 8]);
    Some(with_header(SOCK_DESTROY, sequence, &payload))
}

fn encode(family: u16, sequence: u32, header: GenlHeader, attributes: &[DefaultNla]) -> Vec<u8> {
    let mut payload = vec![0; GENL_HDRLEN + attributes.buffer_len()];
    header.emit(&mut payload);
    attributes.emit(&mut payload[GENL_HDRLEN..]);
    with_header(family, sequence, &payload)
}

fn with_header(message_type: u16, sequence_number: u32, payload: &[u8]) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.message_type = message_type;
    header.flags = NLM_F_REQUEST | NLM_F_ACK;
    header.sequence_number = sequence_number;
    let start = header.buffer_len();
    header.length = u32::try_from(start + payload.len()).expect("requests have a few hundred bytes");
    let mut datagram = vec![0; start];
    header.emit(&mut datagram);
    datagram.extend(payload);
    datagram
}

fn u32_attribute(kind: u16, value: u32) -> DefaultNla {
    DefaultNla::new(kind, value.to_ne_bytes().to_vec())
}

fn u64_attribute(kind: u16, value: u64) -> DefaultNla {
    DefaultNla::new(kind, value.to_ne_bytes().to_vec())
}

fn nested(kind: u16, attributes: &[DefaultNla]) -> DefaultNla {
    let mut value = vec![0; attributes.buffer_len()];
    attributes.emit(&mut value);
    DefaultNla::new(kind | NLA_F_NESTED, value)
}

/// All messages of a datagram. Those of other families than `family` and the controller are left out.
pub fn decode(mut datagram: &[u8], family: u16) -> Result<Vec<Message>, Malformed> {
    let mut messages = Vec::new();
    while !datagram.is_empty() {
        let message = NetlinkBuffer::new_checked(datagram).map_err(|_| Malformed("a message without its header"))?;
        messages.extend(decode_one(&message, family)?);
        let length = crate::units::to_usize(u64::from(message.length()));
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(messages)
}

fn decode_one(message: &NetlinkBuffer<&[u8]>, family: u16) -> Result<Option<Message>, Malformed> {
    let payload = message.payload();
    if message.message_type() == NLMSG_ERROR {
        return decode_error(message, payload).map(Some);
    }
    let is_controller = message.message_type() == GENL_ID_CTRL;
    if !is_controller && message.message_type() != family {
        return Ok(None);
    }
    let header = GenlHeader::parse(payload).map_err(|_| Malformed("a generic message without its header"))?;
    let attributes = payload.get(GENL_HDRLEN..).unwrap_or_default();
    if is_controller {
        return decode_family(attributes);
    }
    let index = || -> Result<u32, Malformed> {
        let found = find(attributes, ATTR_INDEX)?.and_then(|value| value.try_into().ok());
        found.map(u32::from_ne_bytes).ok_or(Malformed("a message without the device's number"))
    };
    Ok(match header.cmd {
        CONNECT => Some(Message::Connected { index: index()? }),
        LINK_DEAD => Some(Message::LinkDead { index: index()? }),
        STATUS => Some(Message::Status(decode_devices(attributes)?)),
        _ => None,
    })
}

fn decode_error(message: &NetlinkBuffer<&[u8]>, payload: &[u8]) -> Result<Message, Malformed> {
    let error = ErrorBuffer::new_checked(payload).map_err(|_| Malformed("an error without its number"))?;
    let mut text = String::new();
    // The header of the request comes first, and nothing else of it: NETLINK_CAP_ACK is set.
    if message.flags() & NLM_F_ACK_TLVS != 0
        && let Some(attributes) = error.payload().get(NetlinkHeader::default().buffer_len()..)
        && let Some(value) = find(attributes, EXTENDED_ACK_TEXT)?
    {
        let value = value.strip_suffix(b"\0").unwrap_or(value);
        text = String::from_utf8_lossy(&value[..value.len().min(MAX_TEXT)]).into_owned();
    }
    let errno = error.code().map_or(0, |code| code.get().saturating_neg());
    Ok(Message::Done { sequence: message.sequence_number(), errno, text })
}

fn decode_family(attributes: &[u8]) -> Result<Option<Message>, Malformed> {
    let Some(id) = find(attributes, CTRL_ATTR_FAMILY_ID)?.and_then(|value| value.try_into().ok()) else {
        return Ok(None);
    };
    let mut group = None;
    for element in each(find(attributes, CTRL_ATTR_MCAST_GROUPS)?.unwrap_or_default()) {
        let (_, element) = element?;
        let name = find(element, CTRL_ATTR_MCAST_GRP_NAME)?.unwrap_or_default();
        if name.strip_suffix(b"\0").unwrap_or(name) == GROUP {
            let number = find(element, CTRL_ATTR_MCAST_GRP_ID)?.and_then(|value| value.try_into().ok());
            group = number.map(u32::from_ne_bytes);
        }
    }
    Ok(Some(Message::Family { id: u16::from_ne_bytes(id), group }))
}

fn decode_devices(attributes: &[u8]) -> Result<Vec<(u32, bool)>, Malformed> {
    let mut devices = Vec::new();
    for element in each(find(attributes, ATTR_DEVICE_LIST)?.unwrap_or_default()).take(MAX_DEVICES) {
        let (_, element) = element?;
        let index = find(element, ITEM)?.and_then(|value| value.try_into().ok()).map(u32::from_ne_bytes);
        let connected =
            find(element, DEVICE_CONNECTED)?.is_some_and(|value| value.first().is_some_and(|byte| *byte != 0));
        devices.extend(index.map(|index| (index, connected)));
    }
    Ok(devices)
}

fn each(attributes: &[u8]) -> impl Iterator<Item = Result<(u16, &[u8]), Malformed>> {
    NlasIterator::new(attributes).map(|attribute| {
        let attribute = attribute.map_err(|_| Malformed("an attribute that is cut off"))?;
        let (kind, length) = (attribute.kind(), attribute.value_length());
        let whole = attribute.into_inner();
        Ok((kind, &whole[netlink_packet_core::NLA_HEADER_SIZE..][..length]))
    })
}

/// The value of the first attribute of a kind.
fn find(attributes: &[u8], kind: u16) -> Result<Option<&[u8]>, Malformed> {
    for attribute in each(attributes) {
        let (found, value) = attribute?;
        if found == kind {
            return Ok(Some(value));
        }
    }
    Ok(None)
}

/// Decodes anything: two bytes that say the family, then a datagram. Lists and texts must keep to their bounds.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let Some((family, datagram)) = data.split_first_chunk() else { return };
    for message in decode(datagram, u16::from_le_bytes(*family)).unwrap_or_default() {
        match message {
            Message::Done { text, .. } => assert!(text.chars().count() <= MAX_TEXT),
            Message::Status(devices) => assert!(devices.len() <= MAX_DEVICES),
            Message::Family { .. } | Message::Connected { .. } | Message::LinkDead { .. } => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NUMBER: u16 = 0x1d;

    /// A message of the kernel's: as a request, but for its flags.
    fn told(command: u8, attributes: &[DefaultNla]) -> Vec<u8> {
        encode(NUMBER, 7, GenlHeader { cmd: command, version: 1 }, attributes)
    }

    #[test]
    fn a_change_is_encoded_as_the_header_file_says() {
        let change = Change { timeout: Some(2), sockets: vec![5, 6], backend: Some("ab".into()), ..Change::default() };
        let bytes = Request::Reconfigure { index: 3, change }.encode(NUMBER, 9);
        let words: Vec<_> = bytes.chunks(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap())).collect();
        let attribute = |length: u32, kind: u32| length | kind << 16;
        assert_eq!(words[..4], [u32::try_from(bytes.len()).unwrap(), 0x1d | 5 << 16, 9, 0]);
        assert_eq!(words[4], 3 | 1 << 8);
        assert_eq!(words[5..7], [attribute(8, 1), 3]);
        assert_eq!(words[7..10], [attribute(12, 4), 2, 0]);
        assert_eq!(words[10], attribute(28, 0x8007));
        assert_eq!(
            words[11..17],
            [attribute(12, 0x8001), attribute(8, 1), 5, attribute(12, 0x8001), attribute(8, 1), 6]
        );
        assert_eq!(words[17], attribute(7, 10));
        assert_eq!(&bytes[72..], b"ab\0\0");
    }

    #[test]
    fn what_the_kernel_says_is_understood() {
        let dead = told(LINK_DEAD, &[u32_attribute(ATTR_INDEX, 4)]);
        let item = |index, connected| nested(ITEM, &[u32_attribute(1, index), DefaultNla::new(2, vec![connected])]);
        let list = told(STATUS, &[nested(ATTR_DEVICE_LIST, &[item(0, 1), item(1, 0)])]);
        let both = [dead.clone(), list].concat();
        let expected = [Message::LinkDead { index: 4 }, Message::Status(vec![(0, true), (1, false)])];
        assert_eq!(decode(&both, NUMBER).unwrap(), expected);
        assert_eq!(decode(&dead, NUMBER + 1).unwrap(), [], "another family");
        assert_eq!(decode(&dead[..20], NUMBER), Err(Malformed("a message without its header")));
    }

    #[test]
    fn a_refusal_has_its_number_and_its_words() {
        let mut text = b"not so".to_vec();
        text.push(0);
        let text = DefaultNla::new(EXTENDED_ACK_TEXT, text);
        let mut payload = (-22i32).to_ne_bytes().to_vec();
        payload.extend(with_header(NUMBER, 7, &[]));
        let start = payload.len();
        payload.resize(start + text.buffer_len(), 0);
        text.emit(&mut payload[start..]);
        let mut datagram = with_header(NLMSG_ERROR, 7, &payload);
        let flags = NLM_F_ACK_TLVS.to_ne_bytes();
        datagram[6..8].copy_from_slice(&flags);
        let expected = Message::Done { sequence: 7, errno: 22, text: "not so".into() };
        assert_eq!(decode(&datagram, NUMBER).unwrap(), [expected]);
    }

    #[test]
    fn the_numbers_of_the_family_are_found() {
        let group = |name: &[u8], id| nested(1, &[DefaultNla::new(1, name.to_vec()), u32_attribute(2, id)]);
        let attributes = [
            DefaultNla::new(CTRL_ATTR_FAMILY_ID, NUMBER.to_ne_bytes().to_vec()),
            nested(CTRL_ATTR_MCAST_GROUPS, &[group(b"other\0", 3), group(b"nbd_mc_group\0", 9)]),
        ];
        let datagram = encode(GENL_ID_CTRL, 1, GenlHeader { cmd: 1, version: 2 }, &attributes);
        assert_eq!(decode(&datagram, 0).unwrap(), [Message::Family { id: NUMBER, group: Some(9) }]);
    }

    #[test]
    fn ending_a_connection_names_both_its_ends() {
        let (local, remote) = ("127.0.0.1:4000".parse().unwrap(), "127.0.0.1:10809".parse().unwrap());
        let bytes = encode_destroy(local, remote, 1).unwrap();
        assert_eq!(bytes.len(), 16 + 56);
        assert_eq!(bytes[4..6], 21u16.to_ne_bytes());
        assert_eq!(bytes[16..20], [2, 6, 0, 0]);
        assert_eq!(bytes[24..32], [0x0f, 0xa0, 0x2a, 0x39, 127, 0, 0, 1]);
        assert_eq!(encode_destroy(local, "[::1]:1".parse().unwrap(), 1), None);
    }

    proptest! {
        #[test]
        fn any_datagram_is_decoded_or_refused(data in proptest::collection::vec(any::<u8>(), 0..300)) {
            fuzz(&data);
        }

        #[test]
        fn a_datagram_with_one_byte_changed_is_decoded_or_refused(at in 0usize..200, byte: u8) {
            let item = |index| nested(ITEM, &[u32_attribute(1, index), DefaultNla::new(2, vec![1])]);
            let mut datagram = told(STATUS, &[nested(ATTR_DEVICE_LIST, &[item(0), item(1), item(2)])]);
            let at = at % datagram.len();
            datagram[at] = byte;
            fuzz(&[&NUMBER.to_le_bytes()[..], &datagram].concat());
        }
    }
}
