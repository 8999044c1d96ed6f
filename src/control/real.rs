//! Real images as operators see them: all of each is here, so there is nothing to keep and nothing to repair, but
//! those with a manifest can be held against it.
//!
//! Owns: what is said of real images, and checks of them. Does not own: the images.

use std::sync::Arc;

use super::prefetch::{PrefetchOrder, PrefetchReport};
use super::settings::Settings;
use super::status::{CacheStatus, ImageStatus, Kind, LinkStatus, PinReport, Role, VerifyOrder};
use super::{Answer, Jobs, Operated, Outcome, Refusal, RunningJob};
use crate::export::SharedExport;
use crate::fill::profile::Store;
use crate::image::index::{Check, CheckError, Checked, Damaged, Rate, run_aside};
use crate::image::{CannotSeal, Format, Seal};
use crate::ranges::ByteRange;
use crate::units::{to_u64, to_usize};

/// A real image that is served.
#[derive(Debug, Clone)]
pub struct RealImage {
    /// Its name.
    pub name: String,
    /// The path of its file.
    pub path: String,
    /// What is served.
    pub export: SharedExport,
    /// What gives it its identity; or why it can have none.
    pub seal: Result<Arc<Seal>, CannotSeal>,
    /// What clients of mirrors read of it.
    pub profiles: Arc<Store>,
}

/// The real images of a server.
#[derive(Debug, Clone)]
pub struct RealImages {
    images: Vec<RealImage>,
    format: Format,
    index_rate: Option<Rate>,
    jobs: Jobs,
}

/// Damaged chunks that one check tells the log of; there may be many on a disk that dies.
const LOGGED: u64 = 100;

const NOTHING_TO_FETCH: &str = "this is a real image: all of it is here";
const NOTHING_TO_PIN: &str = "this is a real image: all of it is here, and stays";

impl RealImages {
    /// All were opened with this format. `index_rate`: how fast missing manifests are made, if they are.
    pub fn new(mut images: Vec<RealImage>, format: Format, index_rate: Option<Rate>) -> Self {
        images.sort_by(|one, other| one.name.cmp(&other.name));
        Self { images, format, index_rate, jobs: Jobs::default() }
    }

    fn find(&self, name: &str) -> Result<&RealImage, Refusal> {
        let image = self.images.iter().find(|image| image.name == name);
        image.ok_or_else(|| Refusal::UnknownImage(name.to_owned()))
    }

    fn refuse_pins(&self, name: &str) -> Answer<'_, PinReport> {
        let refusal = self.find(name).err().unwrap_or_else(|| Refusal::Invalid(NOTHING_TO_PIN.to_owned()));
        Box::pin(async move { Err(refusal) })
    }

    async fn begin_check(&self, name: String, order: VerifyOrder) -> Result<u64, Refusal> {
        let cannot = |reason| Refusal::Invalid(format!("{name:?} cannot be checked: {reason}"));
        let seal = Arc::clone(self.find(&name)?.seal.as_ref().map_err(cannot)?);
        let format = self.format;
        let check = tokio::task::spawn_blocking(move || Check::of_served(&seal, format)).await;
        let check =
            check.map_err(|_| Refusal::Failed("the thread died".to_owned()))?.map_err(|error| refusal(&error))?;
        let job = self.jobs.begin(&name, check.header().shape.image_size)?;
        let id = job.id();
        run_aside("verify", move || run(&check, job, order.rate))
            .map_err(|error| Refusal::Failed(format!("cannot start a thread: {error}")))?;
        Ok(id)
    }
}

fn refusal(error: &CheckError) -> Refusal {
    let text = chain(error);
    match error {
        CheckError::Unfit { .. } => Refusal::Conflict(format!(
            "{text}: headwater index makes it anew, and headwater verify with the path of the image uses it all the same"
        )),
        CheckError::NoManifest(_) | CheckError::Replaced { .. } => Refusal::Conflict(text),
        _ => Refusal::Failed(text),
    }
}

fn chain(error: &CheckError) -> String {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}"));
    format!("{error}{}", cause.unwrap_or_default())
}

/// Does the job. Blocks until it is done or called off.
fn run(check: &Check, job: RunningJob, rate: Option<u64>) {
    let progress = job.progress();
    let found = |Checked { range, chunks, damaged }: Checked| {
        let before = progress.damaged_chunks.value();
        progress.done_bytes.add(range.length());
        progress.checked_chunks.add(chunks);
        progress.damaged_chunks.add(to_u64(damaged.len()));
        progress.unrepaired_chunks.add(to_u64(damaged.len()));
        for Damaged { range, damage } in damaged.into_iter().take(to_usize(LOGGED.saturating_sub(before))) {
            let (start, length) = (range.start(), range.length());
            tracing::error!(image = job.image(), start, length, ?damage, "a chunk of a real image is damaged");
        }
    };
    let outcome = match check.run(1, rate, &|| job.is_cancelled(), &found) {
        Ok(()) => Outcome::Done,
        Err(CheckError::Cancelled) => Outcome::Cancelled,
        Err(error) => Outcome::Failed(chain(&error)),
    };
    job.end(outcome);
}

impl RealImage {
    fn status(&self) -> ImageStatus {
        let facts = self.export.facts();
        let header = self.seal.as_ref().ok().and_then(|seal| seal.header());
        ImageStatus {
            name: self.name.clone(),
            kind: Kind::Real,
            size: facts.size,
            writable: facts.writable,
            chunk_size: header.map(|header| header.shape.chunk_size),
            identity: header.map(|header| header.id.to_string()),
            path: self.path.clone(),
            clients: 0,
            mirror: None,
        }
    }
}

impl Operated for RealImages {
    fn role(&self) -> Role {
        Role::Serve
    }

    fn images(&self) -> Vec<ImageStatus> {
        self.images.iter().map(RealImage::status).collect()
    }

    fn cache(&self) -> Option<CacheStatus> {
        None
    }

    fn link(&self) -> Option<LinkStatus> {
        None
    }

    fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    fn pin(&self, image: String, _: Option<Vec<ByteRange>>) -> Answer<'_, PinReport> {
        self.refuse_pins(&image)
    }

    fn unpin(&self, image: String, _: Option<Vec<ByteRange>>) -> Answer<'_, PinReport> {
        self.refuse_pins(&image)
    }

    fn profiles(&self, image: &str) -> Result<Arc<Store>, Refusal> {
        let image = self.find(image)?;
        image.profiles.identify(image.export.facts().identity);
        Ok(Arc::clone(&image.profiles))
    }

    fn verify(&self, image: String, order: VerifyOrder) -> Answer<'_, u64> {
        Box::pin(self.begin_check(image, order))
    }

    fn settings(&self) -> Settings {
        Settings { index_rate: self.index_rate.as_ref().map(Rate::get), ..Settings::default() }
    }

    fn change_settings(&self, order: &Settings) -> Result<(), Refusal> {
        if let Some((rate, wanted)) = self.index_rate.as_ref().zip(order.index_rate) {
            rate.set(wanted);
        }
        Ok(())
    }

    fn prefetch(&self, image: String, _: PrefetchOrder) -> Answer<'_, PrefetchReport> {
        let refusal = self.find(&image).err().unwrap_or_else(|| Refusal::Invalid(NOTHING_TO_FETCH.to_owned()));
        Box::pin(async move { Err(refusal) })
    }
}
