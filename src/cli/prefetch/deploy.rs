//! Bringing an image to several mirrors, each of which fetches from another one of them.

use anyhow::{Context, bail, ensure};

use super::args::{Shape, Target};
use crate::cli::args::TokenFile;
use crate::cli::running::clients;
use crate::control::Client;
use crate::control::status::{ImageStatus, Kind, Status};
use crate::nbd::Uri;

/// A mirror that was looked at, and can take part.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) client: Client,
    /// What the image is called there.
    pub(super) image: String,
    pub(super) size: u64,
    /// Servers that it is to ask first.
    pub(super) source: Vec<String>,
}

/// Looks at all mirrors, and says who asks whom. Nothing is ordered unless all can take part.
pub(super) async fn plan(
    image: &str,
    targets: &[Target],
    shape: Shape,
    token: &TokenFile,
) -> anyhow::Result<Vec<Member>> {
    let clients = clients(targets.iter().map(|target| target.address.clone()).collect(), token)?;
    let mut identity = None;
    let (mut members, mut uris): (Vec<Member>, Vec<Uri>) = (Vec::new(), Vec::new());
    for ((index, target), client) in targets.iter().enumerate().zip(clients) {
        let (_, status) = client.status().await?;
        let at = format!("the mirror at {}", target.address);
        ensure!(targets[..index].iter().all(|other| other.address != target.address), "{at} is named twice");
        let found = find(image, identity.as_deref(), &status).with_context(|| at.clone())?;
        identity = identity.or_else(|| found.identity.clone());
        let is_parent = (index + 1..targets.len()).any(|child| shape.parent(child) == Some(index));
        let uri = uri(target, &status, &found.name);
        if is_parent && uri.is_none() {
            bail!("{at} does not say where it listens: write {}=URI", target.address);
        }
        let source = shape.parent(index).and_then(|parent| uris.get(parent)).map(Uri::to_string);
        members.push(Member {
            client,
            image: found.name.clone(),
            size: found.size,
            source: source.into_iter().collect(),
        });
        // One that nobody asks keeps the place of its number.
        uris.push(uri.unwrap_or_else(|| Uri::plain(crate::nbd::uri::Address::Unix("/".into()), String::new())));
    }
    Ok(members)
}

/// The image of a mirror that can be deployed: the first mirror's by its name, the others' by what it holds.
fn find<'a>(name: &str, identity: Option<&str>, status: &'a Status) -> anyhow::Result<&'a ImageStatus> {
    let named = status.images.iter().find(|image| image.name == name);
    let holding = || status.images.iter().find(|image| identity.is_some() && image.identity.as_deref() == identity);
    let same = named.filter(|image| identity.is_none() || image.identity.as_deref() == identity);
    let Some(image) = same.or_else(holding) else {
        match (named.and_then(|image| image.identity.as_deref()), named.is_some(), identity) {
            (Some(theirs), _, Some(wanted)) => {
                bail!("its image {name:?} is {theirs}, and that of the first mirror {wanted}")
            }
            (None, true, Some(wanted)) => {
                bail!("it does not know what its image {name:?} holds; the first mirror's is {wanted}")
            }
            _ => bail!("it has no image {name:?}"),
        }
    };
    let Some(mirror) = image.mirror.as_ref().filter(|_| image.kind == Kind::Mirror) else {
        bail!("{name:?} is a real image there: all of it is here");
    };
    ensure!(
        image.identity.is_some() && mirror.verified,
        "its image {name:?} has no manifest: what a mirror gets from another one could not be verified (headwater index makes one)"
    );
    Ok(image)
}

/// How others reach the image.
fn uri(target: &Target, status: &Status, image: &str) -> Option<Uri> {
    let told = || status.listen.iter().find_map(|uri| uri.parse::<Uri>().ok());
    let mut uri = target.uri.clone().or_else(told)?;
    if uri.export.is_empty() {
        image.clone_into(&mut uri.export);
    }
    Some(uri)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::status::{MirrorStatus, Role};

    fn status(images: Vec<ImageStatus>) -> Status {
        let listen = vec!["nbd+unix:///?socket=/run/s".to_owned()];
        Status { role: Role::Mirror, images, listen, ..Status::default() }
    }

    fn image(name: &str, identity: Option<&str>) -> ImageStatus {
        ImageStatus {
            name: name.into(),
            kind: Kind::Mirror,
            size: 1,
            writable: false,
            chunk_size: None,
            identity: identity.map(str::to_owned),
            path: String::new(),
            clients: 0,
            mirror: Some(MirrorStatus { verified: identity.is_some(), ..MirrorStatus::default() }),
        }
    }

    #[test]
    fn the_image_is_found_by_its_name_and_then_by_what_it_holds() {
        let at = status(vec![image("a", Some("x")), image("b", Some("y")), image("c", None)]);
        let found = |name, identity| {
            find(name, identity, &at).map(|image| image.name.clone()).map_err(|error| error.to_string())
        };
        assert_eq!(found("a", None), Ok("a".into()));
        assert_eq!(found("a", Some("x")), Ok("a".into()));
        assert_eq!(found("z", Some("y")), Ok("b".into()), "under another name");
        assert!(found("a", Some("z")).unwrap_err().contains("is x, and that of the first mirror z"));
        assert!(found("c", Some("z")).unwrap_err().contains("does not know"));
        assert!(found("c", None).unwrap_err().contains("no manifest"));
        assert!(found("z", None).unwrap_err().contains("no image"));
        let real = status(vec![ImageStatus { kind: Kind::Real, mirror: None, ..image("a", Some("x")) }]);
        assert!(find("a", None, &real).unwrap_err().to_string().contains("real image"));
    }

    #[test]
    fn a_mirror_is_reached_where_it_listens_or_as_it_was_said() {
        let at = status(Vec::new());
        let of = |text: &str| uri(&text.parse().unwrap(), &at, "os/x").map(|uri| uri.to_string());
        assert_eq!(of("/run/a").unwrap(), "nbd+unix:///os/x?socket=/run/s");
        assert_eq!(of("/run/a=nbd://host").unwrap(), "nbd://host/os/x");
        assert_eq!(of("/run/a=nbd://host/y").unwrap(), "nbd://host/y");
        let nowhere = Status { listen: Vec::new(), ..status(Vec::new()) };
        assert_eq!(uri(&"/run/a".parse().unwrap(), &nowhere, "x"), None);
    }
}
