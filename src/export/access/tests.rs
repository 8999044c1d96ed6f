use super::*;
use proptest::prelude::*;

fn visitor(address: &str, names: Option<&[&str]>) -> Visitor {
    let address = match address {
        "unix" => Origin::Unix,
        "unknown" => Origin::Unknown,
        address => Origin::Ip(address.parse().unwrap()),
    };
    let tls = names.map(|names| TlsPeer { names: names.iter().map(|name| (*name).to_owned()).collect() });
    Visitor { address, tls }
}

fn networks(texts: &[&str]) -> Vec<Network> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

fn names(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

#[test]
fn without_rules_everybody_may_have_everything() {
    let access = Access::default();
    for address in ["unix", "unknown", "192.0.2.1"] {
        assert_eq!(access.verdict("a", &visitor(address, None)), Verdict::Admitted);
    }
    assert!(!access.is_restricted("a") && !access.needs_tls("a") && access.rules().is_empty());
}

#[test]
fn a_list_of_an_export_takes_the_place_of_the_one_for_all() {
    let mut rules = Rules::default();
    rules.addresses.add(None, networks(&["10.0.0.0/8"]));
    rules.addresses.add(Some("b"), networks(&["192.0.2.0/24"]));
    rules.addresses.add(Some("b"), networks(&["2001:db8::/32"]));
    rules.addresses.add(Some("nobody"), Vec::new());
    let admits = |export: &str, address: &str| rules.judge(export, &visitor(address, None)).is_ok();
    assert!(admits("a", "10.1.1.1") && admits("a", "::ffff:10.1.1.1") && !admits("a", "192.0.2.1"));
    assert!(admits("b", "192.0.2.1") && admits("b", "2001:db8::5") && !admits("b", "10.1.1.1"));
    assert!(!admits("nobody", "10.1.1.1"));
    assert!(admits("b", "unix") && !admits("b", "unknown") && !admits("a", "unknown"));
    assert_eq!(rules.exports().into_iter().collect::<Vec<_>>(), ["b", "nobody"]);
}

#[test]
fn what_is_beside_an_image_has_its_rules() {
    let content = format!("@blake3-{}", "ab".repeat(32));
    let mut rules = Rules::default();
    rules.addresses.add(Some("a"), networks(&["10.0.0.0/8"]));
    rules.addresses.add(Some("a@profile"), networks(&["192.0.2.0/24", "10.0.0.1"]));
    for name in ["a", &format!("a{content}"), "a@manifest", &format!("a{content}@profile-inbox"), "a@manifest@profile"]
    {
        assert!(rules.judge(name, &visitor("10.1.1.1", None)).is_ok(), "{name}");
        assert_eq!(rules.judge(name, &visitor("192.0.2.1", None)), Err(Refused::Address), "{name}");
    }
    // With rules of its own, both hold.
    assert_eq!(rules.judge("a@profile", &visitor("10.1.1.1", None)), Err(Refused::Address));
    assert_eq!(rules.judge("a@profile", &visitor("192.0.2.1", None)), Err(Refused::Address));
    assert!(rules.judge("a@profile", &visitor("10.0.0.1", None)).is_ok());
    assert!(
        rules.judge("ab", &visitor("192.0.2.1", None)).is_ok() && rules.judge("a@b", &visitor("::1", None)).is_ok()
    );
}

#[test]
fn names_are_shown_through_tls() {
    let mut rules = Rules { tls: ["t".to_owned()].into(), ..Rules::default() };
    rules.names.add(Some("n"), names(&["host1.example", "spiffe://x/Y"]));
    let judge = |export: &str, names: Option<&[&str]>| rules.judge(export, &visitor("192.0.2.1", names));
    assert_eq!(judge("t", None), Err(Refused::Tls));
    assert_eq!(judge("t", Some(&[])), Ok(()));
    assert_eq!(judge("n", None), Err(Refused::Tls));
    assert_eq!(judge("n", Some(&[])), Err(Refused::Name));
    assert_eq!(judge("n", Some(&["other", "HOST1.example"])), Ok(()));
    assert_eq!(judge("n", Some(&["xhost1.example"])), Err(Refused::Name));
    assert_eq!(judge("n", Some(&["spiffe://x/Y"])), Ok(()));
    assert_eq!(judge("n", Some(&["spiffe://x/y"])), Err(Refused::Name), "only host names have no case");
    assert!(rules.needs_tls("t@manifest") && rules.needs_tls("n") && !rules.needs_tls("x"));
    assert_eq!(rules.judge("t", &visitor("unix", None)), Err(Refused::Tls), "a rule that says TLS means it");
}

#[test]
fn whose_address_is_wrong_is_not_told_of_tls() {
    let mut rules = Rules { tls: ["t".to_owned()].into(), ..Rules::default() };
    rules.addresses.add(None, networks(&["10.0.0.0/8"]));
    let access = Access::new(rules);
    assert_eq!(access.verdict("t", &visitor("192.0.2.1", None)), Verdict::Denied);
    assert_eq!(access.verdict("t", &visitor("10.0.0.1", None)), Verdict::NeedsTls);
    access.set(Rules::default());
    assert_eq!(access.verdict("t", &visitor("192.0.2.1", None)), Verdict::Admitted);
}

proptest! {
    /// Another rule never lets anybody in whom the others keep out, but for a list that takes the place of that for all.
    #[test]
    fn rules_add_up(
        first: [u8; 4], bits in 0_u8..=32, tls: bool, wanted in "[a-c]", shown in proptest::option::of("[a-c]"), who: [u8; 4],
    ) {
        let who = Visitor {
            address: Origin::Ip(who.into()),
            tls: shown.map(|name| TlsPeer { names: vec![name] }),
        };
        let mask = u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
        let network = std::net::Ipv4Addr::from_bits(std::net::Ipv4Addr::from(first).to_bits() & mask);
        let network: Network = format!("{network}/{bits}").parse().unwrap();
        let mut alone = [Rules::default(), Rules::default(), Rules::default()];
        alone[0].addresses.add(Some("x"), vec![network]);
        alone[1].names.add(Some("x"), vec![wanted]);
        alone[2].tls.extend(tls.then(|| "x".to_owned()));
        let mut all = alone[0].clone();
        all.names = alone[1].names.clone();
        all.tls = alone[2].tls.clone();
        let each = alone.iter().all(|rules| rules.judge("x", &who).is_ok());
        prop_assert_eq!(all.judge("x", &who).is_ok(), each);
    }
}
