//! Taking a server, or one of its exports, out of service: newcomers are sent away, and whoever can be moved is.
//!
//! It is not written down: a server that is started again takes clients again.

use std::collections::BTreeSet;
use std::sync::{MutexGuard, PoisonError};

use super::compare::Wanted;
use super::order::{DrainOrder, DrainStatus, Way};
use super::select::Choice;
use super::targets::{Targets, parse};
use super::{Plan, Redirects};
use crate::control::operated::Refusal;
use crate::export::split_content_name;

/// What is out of service.
#[derive(Debug, Default)]
pub(super) struct Drained {
    all: bool,
    exports: BTreeSet<String>,
    /// The orders that move clients away. As many as there are exports, and a few: ended ones are forgotten.
    orders: Vec<u64>,
}

impl Redirects {
    /// Sends newcomers to an export, or to all, away, and moves clients. Nobody is sent away if the servers that they are
    /// to go to do not fit.
    ///
    /// Cancel safety: it is done whole or not at all.
    pub async fn drain(&self, export: Option<String>, order: DrainOrder) -> Result<DrainStatus, Refusal> {
        let this = self.clone();
        self.on_worker(move || async move { this.drain_here(export, order).await }).await
    }

    async fn drain_here(&self, export: Option<String>, order: DrainOrder) -> Result<DrainStatus, Refusal> {
        let names = match &export {
            Some(name) => self.find(name).map(|_| vec![name.clone()])?,
            None => self.own_names(),
        };
        let mut plans = Vec::new();
        if !order.to.is_empty() || order.close {
            for name in &names {
                plans.push(self.plan_drain(name, names.len(), &order).await?);
            }
        }
        self.0.steering.gate.shut(export.as_deref());
        {
            let mut drained = self.drained();
            match export {
                Some(name) => drop(drained.exports.insert(name)),
                None => drained.all = true,
            }
        }
        tracing::info!(exports = ?names, to = ?order.to, "out of service: newcomers are sent away");
        for plan in plans {
            let taken = self.begin(plan).await?;
            let mut drained = self.drained();
            drained.orders.retain(|id| self.0.table.get(*id).is_some());
            drained.orders.push(taken.order);
        }
        Ok(self.drain_status())
    }

    /// The names that clients know: without those of older contents.
    fn own_names(&self) -> Vec<String> {
        let names = self.0.registry.all().into_iter().map(|(name, _)| name);
        names.filter(|name| split_content_name(name).1.is_none()).collect()
    }

    async fn plan_drain(&self, name: &str, exports: usize, order: &DrainOrder) -> Result<Plan, Refusal> {
        let old = self.find(name)?;
        let mut uris = parse(&order.to)?;
        for uri in &mut uris {
            if uri.export.is_empty() {
                name.clone_into(&mut uri.export);
            } else if exports > 1 {
                let why =
                    format!("{uri} names one export, and {exports} are drained: leave the name out, or drain one");
                return Err(Refusal::Invalid(why));
            }
        }
        self.refuse_downgrade(name, &uris, &self.0.steering.clients.of_export(name))?;
        // Who is closed here goes where its own address leads: that is not this server's to know.
        let wanted = Wanted { directly: false, force: order.force };
        let targets = match uris.as_slice() {
            [] => Targets { uris, is_here: false, warnings: Vec::new(), path: Vec::new(), takes_hints: false },
            _ => self.survey(name, &old, uris, wanted).await?,
        };
        if targets.is_here {
            return Err(Refusal::Conflict("that is this very server: a drain leads elsewhere".to_owned()));
        }
        let way = if order.close { Way::Close } else { Way::Auto };
        Ok(Plan { export: name.to_owned(), old, targets, choice: Choice::All, way, force: order.force, is_drain: true })
    }

    /// Lets newcomers in again, and calls off what still moves clients away. Those that were moved stay where they are.
    pub async fn undrain(&self, export: Option<&str>) -> Result<DrainStatus, Refusal> {
        let orders = {
            let mut drained = self.drained();
            match export {
                Some(_) if drained.all => {
                    return Err(Refusal::Conflict(
                        "the whole server is out of service: headwater drain --cancel".into(),
                    ));
                }
                Some(name) if !drained.exports.remove(name) => {
                    return Err(Refusal::Conflict(format!("{name:?} is not out of service")));
                }
                Some(_) => {}
                None => *drained = Drained { orders: std::mem::take(&mut drained.orders), ..Drained::default() },
            }
            drained.orders.clone()
        };
        let opened: Vec<_> = match export {
            Some(name) => vec![name.to_owned()],
            None => self.own_names(),
        };
        if export.is_none() {
            self.0.steering.gate.open(None);
        }
        opened.iter().for_each(|name| self.0.steering.gate.open(Some(name)));
        for id in orders {
            let status = self.get(id).filter(|status| opened.contains(&status.export));
            if status.is_some_and(|status| status.state == super::order::RedirectState::Active) {
                self.cancel(id).await;
            }
        }
        tracing::info!(exports = ?opened, "in service again");
        Ok(self.drain_status())
    }

    /// What is out of service, and who is still there.
    pub fn drain_status(&self) -> DrainStatus {
        let (all, exports, orders) = {
            let drained = self.drained();
            (drained.all, drained.exports.clone(), drained.orders.clone())
        };
        let mut status = DrainStatus { all, exports: exports.into_iter().collect(), ..DrainStatus::default() };
        let clients = self.clients().list().into_iter().filter(|client| status.covers(&client.export));
        status.clients = clients.map(|client| client.id).collect();
        if status.is_draining() {
            status.orders = orders;
        }
        status
    }

    fn drained(&self) -> MutexGuard<'_, Drained> {
        self.0.drained.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
