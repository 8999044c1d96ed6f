//! What servers say of themselves, each in its time.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::timeout;

use super::Balance;
use crate::cli::args::Servers;
use crate::cli::running::reach_all;
use crate::control::balance::fleet::{Fleet, Seen};
use crate::control::load::Load;
use crate::control::status::Status;
use crate::control::{AdminAddress, Client};
use crate::nbd::Uri;

/// How long a server may take to say how it is.
const LIMIT: Duration = Duration::from_secs(5);

/// The servers, and how each is reached.
pub(super) struct Crew {
    members: Vec<Member>,
}

struct Member {
    client: Client,
    uri: Option<Uri>,
    is_standby: bool,
    is_in: bool,
}

/// What they said.
pub(super) struct Asked {
    pub(super) fleet: Fleet,
    /// Why a server did not answer.
    pub(super) errors: Vec<Option<String>>,
    /// How long the time is that the rates of each are about, in seconds.
    seconds: Vec<f64>,
}

impl Crew {
    /// All who take part, and all who may.
    pub(super) async fn gather(arguments: &Balance) -> anyhow::Result<Self> {
        let mut servers = reach_all(arguments.servers.clone()).await?;
        // Among all that run here the standbys are, too.
        servers.retain(|client| !arguments.standby.contains(client.address()));
        let standbys = match &arguments.standby[..] {
            [] => Vec::new(),
            some => reach_all(Servers { servers: some.to_vec(), ..arguments.servers.clone() }).await?,
        };
        let uri = |address: &AdminAddress| {
            let told = arguments.uri.iter().find(|target| target.address == *address);
            told.and_then(|target| target.uri.clone())
        };
        let member = |client: Client, is_standby| {
            let uri = uri(client.address());
            Member { client, uri, is_standby, is_in: false }
        };
        let servers = servers.into_iter().map(|client| member(client, false));
        let members: Vec<_> = servers.collect();
        let standbys = standbys.into_iter().map(|client| member(client, true));
        Ok(Self { members: members.into_iter().chain(standbys).collect() })
    }

    /// How many standbys there are.
    pub(super) fn standbys(&self) -> usize {
        self.members.iter().filter(|member| member.is_standby).count()
    }

    /// Has so many standbys take part, the first ones.
    pub(super) fn activate(&mut self, count: usize) {
        for (index, member) in self.members.iter_mut().filter(|member| member.is_standby).enumerate() {
            member.is_in = index < count;
        }
    }

    /// The client that speaks to a server.
    pub(super) fn client(&self, server: usize) -> &Client {
        &self.members[server].client
    }

    /// Asks all at the same time.
    pub(super) async fn ask(&self, arguments: &Balance) -> Asked {
        let window = arguments.window();
        let answers = join_all(self.members.iter().map(|member| ask(&member.client, window))).await;
        let seen = |(member, answer): (&Member, &Result<(Status, Load), String>)| Seen {
            name: member.client.address().to_string(),
            said: answer.as_ref().ok().cloned(),
            uri: member.uri.clone(),
            is_standby: member.is_standby,
            is_in: member.is_in,
        };
        let seen: Vec<Seen> = self.members.iter().zip(&answers).map(seen).collect();
        Asked {
            fleet: Fleet::of(&seen, arguments.export.as_deref()),
            seconds: answers.iter().flatten().map(|(_, load)| load.seconds).collect(),
            errors: answers.into_iter().map(Result::err).collect(),
        }
    }
}

impl Asked {
    /// Whether all that answered know their rates: not before their second sample.
    pub(super) fn has_rates(&self) -> bool {
        !self.seconds.is_empty() && self.seconds.iter().all(|seconds| *seconds > 0.0)
    }

    /// Why nobody answered.
    pub(super) fn all_errors(&self) -> String {
        self.errors.iter().flatten().cloned().collect::<Vec<_>>().join("; ")
    }
}

async fn ask(client: &Client, window: u32) -> Result<(Status, Load), String> {
    let both = async {
        let (_, status) = client.status().await?;
        Ok::<_, crate::control::CallError>((status, client.load(window).await?))
    };
    match timeout(LIMIT, both).await {
        Ok(answer) => answer.map_err(|error| error.to_string()),
        Err(_) => Err(format!("{} does not answer", client.address())),
    }
}
