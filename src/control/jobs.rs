//! Orders that take long: their progress, and calling them off.
//!
//! A job is begun, given to whoever does the work, and ended by them. The table remembers the last ones that ended, so
//! that whoever ordered one can hear what came of it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::watch;

use super::operated::Refusal;
use super::status::{JobState, JobStatus};
use crate::clock;
use crate::mirror::Findings;

/// Jobs at work at the same time.
const RUNNING: usize = 8;
/// Ended jobs that are remembered.
const REMEMBERED: usize = 64;

/// All jobs of a server. Cheap to clone; all clones are one table.
#[derive(Debug, Clone, Default)]
pub struct Jobs(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    /// How many there were.
    count: u64,
    jobs: BTreeMap<u64, Arc<Job>>,
}

#[derive(Debug)]
struct Job {
    id: u64,
    image: String,
    total_bytes: u64,
    progress: Findings,
    began: Instant,
    cancelled: watch::Sender<bool>,
    /// When it ended, and how.
    end: Mutex<Option<(Instant, Outcome)>>,
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All was looked at.
    Done,
    /// It was called off before that.
    Cancelled,
    /// It could not go on, and why.
    Failed(String),
}

impl Jobs {
    /// Begins a job that has to look at `total_bytes` of `image`. Refused while another job works on that image, or
    /// too many work at all.
    pub fn begin(&self, image: &str, total_bytes: u64) -> Result<RunningJob, Refusal> {
        let mut table = self.lock();
        let running: Vec<_> = table.jobs.values().filter(|job| job.lock_end().is_none()).collect();
        if let Some(other) = running.iter().find(|job| job.image == image) {
            return Err(Refusal::Conflict(format!("job {} works on {image:?}: wait for it, or call it off", other.id)));
        }
        if running.len() >= RUNNING {
            return Err(Refusal::Conflict(format!("{RUNNING} jobs are at work: wait for one of them")));
        }
        table.forget();
        table.count += 1;
        let job = Arc::new(Job {
            id: table.count,
            image: image.to_owned(),
            total_bytes,
            progress: Findings::default(),
            began: clock::now(),
            cancelled: watch::Sender::new(false),
            end: Mutex::default(),
        });
        table.jobs.insert(job.id, Arc::clone(&job));
        Ok(RunningJob(job))
    }

    /// The jobs at work and the last that ended, oldest first.
    pub fn list(&self) -> Vec<JobStatus> {
        self.lock().jobs.values().map(|job| job.status()).collect()
    }

    /// How far a job has come; `None` if there is no such job, or it ended long ago.
    pub fn status(&self, id: u64) -> Option<JobStatus> {
        self.lock().jobs.get(&id).map(|job| job.status())
    }

    /// Calls a job off. It ends soon, if it has not ended already.
    pub fn cancel(&self, id: u64) -> Option<JobStatus> {
        let table = self.lock();
        let job = table.jobs.get(&id)?;
        job.cancelled.send_replace(true);
        Some(job.status())
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Makes room for one more ended job.
    fn forget(&mut self) {
        let ended: Vec<_> = self.jobs.values().filter(|job| job.lock_end().is_some()).map(|job| job.id).collect();
        for id in ended.iter().take((ended.len() + 1).saturating_sub(REMEMBERED)) {
            self.jobs.remove(id);
        }
    }
}

impl Job {
    fn lock_end(&self) -> MutexGuard<'_, Option<(Instant, Outcome)>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self) -> JobStatus {
        // First: numbers that are read after the end was seen are the last ones.
        let end = self.lock_end().clone();
        let (until, state, error) = match end {
            None => (clock::now(), JobState::Running, None),
            Some((at, Outcome::Done)) => (at, JobState::Done, None),
            Some((at, Outcome::Cancelled)) => (at, JobState::Cancelled, None),
            Some((at, Outcome::Failed(error))) => (at, JobState::Failed, Some(error)),
        };
        let Findings { done_bytes, checked_chunks, damaged_chunks, repaired_chunks, unrepaired_chunks } =
            &self.progress;
        JobStatus {
            job: self.id,
            image: self.image.clone(),
            state,
            error,
            seconds: until.saturating_duration_since(self.began).as_secs_f64(),
            total_bytes: self.total_bytes,
            done_bytes: done_bytes.value(),
            checked_chunks: checked_chunks.value(),
            damaged_chunks: damaged_chunks.value(),
            repaired_chunks: repaired_chunks.value(),
            unrepaired_chunks: unrepaired_chunks.value(),
        }
    }

    fn end(&self, outcome: Outcome) {
        self.lock_end().get_or_insert_with(|| (clock::now(), outcome));
    }
}

/// A job at work, for whoever does it. Dropped without [`Self::end`], the job has failed.
#[derive(Debug)]
pub struct RunningJob(Arc<Job>);

impl RunningJob {
    /// Its number.
    pub fn id(&self) -> u64 {
        self.0.id
    }

    /// The image that it works on.
    pub fn image(&self) -> &str {
        &self.0.image
    }

    /// Where progress is noted.
    pub fn progress(&self) -> &Findings {
        &self.0.progress
    }

    /// Whether it was called off.
    pub fn is_cancelled(&self) -> bool {
        *self.0.cancelled.borrow()
    }

    /// Waits until it is called off.
    ///
    /// Cancel safety: nothing is lost.
    pub async fn cancelled(&self) {
        let mut cancelled = self.0.cancelled.subscribe();
        // It cannot fail: the sender lives as long as this job.
        let _ = cancelled.wait_for(|cancelled| *cancelled).await;
    }

    /// Ends it.
    pub fn end(self, outcome: Outcome) {
        self.0.end(outcome);
    }
}

impl Drop for RunningJob {
    fn drop(&mut self) {
        // Without effect if it has ended.
        self.0.end(Outcome::Failed("whoever did it is gone".into()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_tells_its_progress_and_its_end() {
        let jobs = Jobs::default();
        let job = jobs.begin("a", 100).unwrap();
        job.progress().done_bytes.add(40);
        job.progress().damaged_chunks.add(1);
        let status = jobs.status(job.id()).unwrap();
        assert_eq!((status.state, status.total_bytes, status.done_bytes), (JobState::Running, 100, 40));
        assert_eq!(status.damaged_chunks, 1);
        let id = job.id();
        job.end(Outcome::Done);
        assert_eq!(jobs.status(id).unwrap().state, JobState::Done);
        assert_eq!(jobs.status(id + 1), None);
    }

    #[test]
    fn a_job_that_is_dropped_has_failed() {
        let jobs = Jobs::default();
        let id = jobs.begin("a", 1).unwrap().id();
        let status = jobs.status(id).unwrap();
        assert_eq!(status.state, JobState::Failed);
        assert!(status.error.is_some());
    }

    #[tokio::test]
    async fn a_job_hears_that_it_was_called_off() {
        let jobs = Jobs::default();
        let job = jobs.begin("a", 1).unwrap();
        assert!(!job.is_cancelled());
        assert_eq!(jobs.cancel(job.id()).unwrap().state, JobState::Running);
        assert!(job.is_cancelled());
        job.cancelled().await;
        let id = job.id();
        job.end(Outcome::Cancelled);
        assert_eq!(jobs.cancel(id).unwrap().state, JobState::Cancelled);
        assert!(jobs.cancel(99).is_none());
    }

    #[test]
    fn one_job_for_an_image_and_a_few_in_all() {
        let jobs = Jobs::default();
        let first = jobs.begin("0", 1).unwrap();
        assert!(jobs.begin("0", 1).unwrap_err().to_string().contains("job 1 works on \"0\""));
        let _others: Vec<_> = (1..RUNNING).map(|image| jobs.begin(&image.to_string(), 1).unwrap()).collect();
        assert!(matches!(jobs.begin("more", 1), Err(Refusal::Conflict(_))));
        first.end(Outcome::Done);
        assert!(jobs.begin("0", 1).is_ok());
    }

    #[test]
    fn ended_jobs_are_forgotten_and_running_ones_are_not() {
        let jobs = Jobs::default();
        let running = jobs.begin("long", 1).unwrap();
        for _ in 0..REMEMBERED + 10 {
            jobs.begin("short", 1).unwrap().end(Outcome::Done);
        }
        assert_eq!(jobs.lock().jobs.len(), REMEMBERED + 1);
        assert_eq!(jobs.status(running.id()).unwrap().state, JobState::Running);
        assert_eq!(jobs.status(running.id() + 1), None);
    }
}
