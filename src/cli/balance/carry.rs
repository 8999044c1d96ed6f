//! Orders to move clients, and what came of them.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;

use super::ask::Crew;
use crate::clock;
use crate::control::balance::fleet::Move;
use crate::control::status::{ClientState, RedirectOrder, RedirectState, RedirectStatus, Way};
use crate::control::{CallError, Client};

/// How often an order is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How long an order is waited for: longer than a client may take to leave.
const LIMIT: Duration = Duration::from_secs(60);

/// What came of one move.
pub(super) struct Outcome {
    pub(super) of: Move,
    pub(super) is_moved: bool,
    /// What there is to say.
    pub(super) why: Option<String>,
}

/// Has all of it done, and waits until it is. A move that fails is not tried again here.
pub(super) async fn out(crew: &Crew, moves: &[Move]) -> Vec<Outcome> {
    let mut groups: BTreeMap<(usize, &str, &str, bool), Vec<&Move>> = BTreeMap::new();
    for each in moves {
        groups.entry((each.at, &each.export, &each.uri, each.force)).or_default().push(each);
    }
    let orders = groups.into_values().map(|group| together(crew, group));
    join_all(orders).await.into_iter().flatten().collect()
}

/// Moves that are one order: with the same server to ask, export, destination and force.
async fn together(crew: &Crew, group: Vec<&Move>) -> Vec<Outcome> {
    let Some(first) = group.first() else { return Vec::new() };
    let client = crew.client(first.at);
    match order(client, &group).await {
        Ok(status) => group.iter().map(|each| outcome(each, &status)).collect(),
        // It may be refused because of one client, which has left.
        Err(CallError::Refused { .. }) if group.len() > 1 => {
            let mut outcomes = Vec::new();
            for each in group {
                outcomes.push(match order(client, &[each]).await {
                    Ok(status) => outcome(each, &status),
                    Err(error) => failed(each, &error),
                });
            }
            outcomes
        }
        Err(error) => group.iter().map(|each| failed(each, &error)).collect(),
    }
}

fn failed(each: &Move, error: &CallError) -> Outcome {
    Outcome { of: each.clone(), is_moved: false, why: Some(error.to_string()) }
}

async fn order(client: &Client, group: &[&Move]) -> Result<RedirectStatus, CallError> {
    let Some(first) = group.first() else { return Ok(RedirectStatus::default()) };
    let order = RedirectOrder {
        to: vec![first.uri.clone()],
        clients: Some(group.iter().map(|each| each.id).collect()),
        way: Way::Auto,
        force: first.force,
        ..RedirectOrder::default()
    };
    let taken = client.redirect(&first.export, &order).await?;
    let deadline = clock::now() + LIMIT;
    loop {
        match client.redirected(taken.order).await {
            Ok(status) if status.state != RedirectState::Active || clock::now() >= deadline => return Ok(status),
            Ok(_) => {}
            Err(error) if clock::now() >= deadline || !error.may_pass() => return Err(error),
            Err(_) => {}
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn outcome(each: &Move, status: &RedirectStatus) -> Outcome {
    let report = status.clients.iter().find(|client| client.id == each.id);
    let (is_moved, why) = match report {
        Some(report) => (matches!(report.state, ClientState::Moved | ClientState::Left), report.why.clone()),
        None => (false, status.error.clone().or_else(|| Some("its report does not have it".to_owned()))),
    };
    let unfinished = || Some("it is not done yet: it goes on without us".to_owned());
    let why = if status.state == RedirectState::Active { why.or_else(unfinished) } else { why };
    Outcome { of: each.clone(), is_moved, why }
}
