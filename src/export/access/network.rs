//! A network as an address and the number of its leading bits that count (RFC 4632, RFC 4291).

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use thiserror::Error;

/// Addresses that have their first bits in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    /// Without any bit behind the first `bits`, and not of IPv4 in the form of IPv6.
    address: IpAddr,
    bits: u8,
}

/// Why a text is no network.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ParseNetworkError {
    /// There is no address in it.
    #[error("{0:?} is no address or network: write 192.0.2.7, 10.0.0.0/8 or 2001:db8::/32")]
    Address(String),
    /// Too many bits, or no number.
    #[error("{0:?}: behind the / comes a number of bits, at most {1}")]
    Bits(String, u8),
    /// The address does not end where the bits do; one of the two is a mistake.
    #[error("{0:?} is an address within {1}: write that, or leave the / away")]
    Within(String, Network),
}

impl Network {
    /// Whether an address belongs to it. One of IPv4 in the form of IPv6 is one of IPv4.
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_ipv4() == self.address.is_ipv4() && cut(address, self.bits) == self.address
    }
}

/// How many bits an address has.
const fn length(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// An address without the bits behind its first `bits`.
fn cut(address: IpAddr, bits: u8) -> IpAddr {
    let away = u32::from(length(address).saturating_sub(bits));
    match address {
        IpAddr::V4(address) => IpAddr::V4((address.to_bits() & u32::MAX.checked_shl(away).unwrap_or(0)).into()),
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() & u128::MAX.checked_shl(away).unwrap_or(0)).into()),
    }
}

impl FromStr for Network {
    type Err = ParseNetworkError;

    fn from_str(text: &str) -> Result<Self, ParseNetworkError> {
        let (address, bits) = text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
        let address: IpAddr = address.parse().map_err(|_| ParseNetworkError::Address(text.to_owned()))?;
        let most = length(address);
        let wrong = || ParseNetworkError::Bits(text.to_owned(), most);
        let is_number = |bits: &&str| !bits.is_empty() && bits.bytes().all(|byte| byte.is_ascii_digit());
        let mut bits: u8 = match bits {
            None => most,
            Some(bits) => Some(bits).filter(is_number).and_then(|bits| bits.parse().ok()).ok_or_else(wrong)?,
        };
        if bits > most {
            return Err(wrong());
        }
        // ::ffff:10.0.0.0/104 is 10.0.0.0/8. What is wider is of IPv6 and has no IPv4 in it.
        let mapped = address.to_canonical();
        let address = if mapped != address && bits >= 96 {
            bits -= 96;
            mapped
        } else {
            address
        };
        let network = Self { address: cut(address, bits), bits };
        if network.address == address { Ok(network) } else { Err(ParseNetworkError::Within(text.to_owned(), network)) }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.bits == length(self.address) {
            return self.address.fmt(f);
        }
        write!(f, "{}/{}", self.address, self.bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn network(text: &str) -> Network {
        text.parse().unwrap()
    }

    fn has(text: &str, address: &str) -> bool {
        network(text).contains(address.parse().unwrap())
    }

    #[test]
    fn networks_have_what_their_first_bits_say() {
        assert!(has("10.0.0.0/8", "10.255.1.2") && !has("10.0.0.0/8", "11.0.0.0"));
        assert!(has("0.0.0.0/0", "192.0.2.1") && !has("0.0.0.0/0", "2001:db8::1"));
        assert!(has("::/0", "2001:db8::1") && !has("::/0", "192.0.2.1"));
        assert!(has("192.0.2.7", "192.0.2.7") && !has("192.0.2.7", "192.0.2.6"));
        assert!(has("2001:db8::/32", "2001:db8:ffff::1") && !has("2001:db8::/32", "2001:db9::"));
        assert!(has("192.0.2.0/25", "192.0.2.127") && !has("192.0.2.0/25", "192.0.2.128"));
    }

    #[test]
    fn ipv4_in_the_form_of_ipv6_is_ipv4() {
        assert!(has("10.0.0.0/8", "::ffff:10.1.2.3") && !has("::/0", "::ffff:10.1.2.3"));
        assert_eq!(network("::ffff:10.0.0.0/104"), network("10.0.0.0/8"));
        assert_eq!(network("::ffff:10.1.2.3").to_string(), "10.1.2.3");
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for text in ["", "10.0.0.0/33", "10.0.0.0/", "10.0.0.0/+8", "10.0.0/8", "::/129", "host", "10.0.0.0/8/8"] {
            assert!(text.parse::<Network>().is_err(), "{text}");
        }
        let within = "10.1.2.3/8".parse::<Network>().unwrap_err();
        assert!(within.to_string().contains("within 10.0.0.0/8"), "{within}");
    }

    proptest! {
        /// Held against the bits written out.
        #[test]
        fn bits_are_compared_one_by_one(one: u128, other: u128, bits in 0_u8..=128, common in 0_u32..=128) {
            let other = one ^ other.checked_shr(common).unwrap_or(0);
            let network = Network { address: cut(IpAddr::V6(one.into()), bits), bits };
            let text = |number: u128| format!("{number:0128b}")[..usize::from(bits)].to_owned();
            let address = std::net::Ipv6Addr::from_bits(other);
            prop_assume!(address.to_ipv4_mapped().is_none());
            prop_assert_eq!(network.contains(IpAddr::V6(address)), text(one) == text(other));
        }

        #[test]
        fn networks_read_back(number: u32, bits in 0_u8..=32) {
            let network = Network { address: cut(IpAddr::V4(number.into()), bits), bits };
            prop_assert_eq!(network.to_string().parse(), Ok(network));
        }
    }
}
