//! Asking the servers of a tree what they are doing: all at once, one gathering at a time, and at most once a second
//! however many look. What a neighbour said last is remembered, so that one that does not answer any more keeps its
//! place in the tree.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::{join, join_all};
use tokio::sync::Mutex;

use super::Tree;
use super::join::{Said, Seen, join as join_servers};
use crate::clock;
use crate::control::api::{Api, Problem, gather};
use crate::control::client::{CallError, Client};

/// Neighbours of a server.
pub const MOST_NEIGHBOURS: usize = 64;
/// How long a neighbour may take to answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a tree is given to whoever asks for one.
const FRESH: Duration = Duration::from_secs(1);
/// The seconds that rates are about.
const SPAN: u32 = 5;

/// The other servers of a tree, and what they said last.
#[derive(Debug)]
pub struct Neighbours {
    clients: Vec<Client>,
    kept: Mutex<Kept>,
}

#[derive(Debug)]
struct Kept {
    tree: Option<(Instant, Arc<Tree>)>,
    /// Of each neighbour, when it answered last and what.
    last: Vec<Option<(Instant, Arc<Said>)>>,
}

impl Neighbours {
    /// These, of which nobody is asked yet; those beyond [`MOST_NEIGHBOURS`] are left out.
    pub fn new(mut clients: Vec<Client>) -> Self {
        clients.truncate(MOST_NEIGHBOURS);
        let last = clients.iter().map(|_| None).collect();
        Self { clients, kept: Mutex::new(Kept { tree: None, last }) }
    }

    async fn ask(&self) -> Vec<Result<Said, String>> {
        join_all(self.clients.iter().map(|client| async move {
            let answer = tokio::time::timeout(PATIENCE, ask(client)).await;
            let answer = answer.unwrap_or_else(|_| Err(CallError::TimedOut(client.address().clone())));
            answer.map_err(|error| error.chain())
        }))
        .await
    }
}

async fn ask(client: &Client) -> Result<Said, CallError> {
    let (status, load) = join(client.status(), client.load(SPAN)).await;
    Ok(Said { status: status?.1, load: load? })
}

/// The tree as of now, or of a moment ago.
///
/// Cancel safety: nothing is lost but the gathering.
pub(super) async fn tree(api: &Arc<Api>) -> Result<Arc<Tree>, Problem> {
    let neighbours = api.neighbours();
    let mut kept = neighbours.kept.lock().await;
    if let Some((at, tree)) = &kept.tree
        && at.elapsed() < FRESH
    {
        return Ok(Arc::clone(tree));
    }
    let own = async {
        let status = gather(Arc::clone(api), Api::status).await?;
        Ok::<_, Problem>(Said { status, load: api.loads().load(SPAN) })
    };
    let (own, answers) = join(own, neighbours.ask()).await;
    let now = clock::now();
    let mut seen = vec![Seen { is_this: true, said: Some(Arc::new(own?)), ..Seen::default() }];
    for ((client, last), answer) in neighbours.clients.iter().zip(&mut kept.last).zip(answers) {
        seen.push(see(client, last, answer, now));
    }
    let tree = Arc::new(join_servers(&seen));
    kept.tree = Some((now, Arc::clone(&tree)));
    Ok(tree)
}

/// What is to be thought of a neighbour after it has answered, or not.
fn see(client: &Client, last: &mut Option<(Instant, Arc<Said>)>, answer: Result<Said, String>, now: Instant) -> Seen {
    let admin = Some(client.address().to_string());
    match answer {
        Ok(said) => {
            let said = Arc::new(said);
            *last = Some((now, Arc::clone(&said)));
            Seen { admin, said: Some(said), ..Seen::default() }
        }
        Err(error) => {
            let ago = last.as_ref().map(|(at, _)| now.saturating_duration_since(*at).as_secs_f64());
            let said = last.as_ref().map(|(_, said)| Arc::clone(said));
            Seen { admin, said, error: Some(error), seconds_ago: ago, ..Seen::default() }
        }
    }
}
