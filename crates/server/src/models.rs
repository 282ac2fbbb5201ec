//! The models that the server knows: opened checkpoints by name.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sllm_core::Checkpoint;
use tonic::{Code, Status};

use crate::fault::{self, invalid, refused};
use crate::pool::Pool;
use crate::preload::Preloads;

/// How long files of a model stay open that nobody uses and of which nothing is resident.
const KEPT_OPEN: Duration = Duration::from_secs(600);
/// Models that stay open at most, where they are unused: each keeps its files open.
const MAX_OPEN: usize = 256;
/// Bytes of a name at most, as of a path.
const MAX_NAME: usize = 4096;

/// A model that was opened.
#[derive(Debug)]
pub(crate) struct Model {
    /// Its path below the storage path.
    pub(crate) name: String,
    pub(crate) checkpoint: Checkpoint,
    /// Bytes of its files.
    pub(crate) len: u64,
    /// Shared with what comes in its place.
    registered: Arc<AtomicBool>,
    users: AtomicU32,
    used: Mutex<Instant>,
    pub(crate) preloads: Preloads,
}

impl Model {
    /// One that was opened in the place of another one of its name, if there was one.
    fn new(name: String, checkpoint: Checkpoint, before: Option<&Model>) -> Model {
        Model {
            name,
            len: checkpoint.files().iter().map(|file| file.len()).sum(),
            registered: before.map_or_else(Arc::default, |before| Arc::clone(&before.registered)),
            users: AtomicU32::new(0),
            used: Mutex::new(Instant::now()),
            preloads: before
                .filter(|before| before.checkpoint.has_files_of(&checkpoint))
                .map_or_else(Preloads::default, |before| before.preloads.clone()),
            checkpoint,
        }
    }

    pub(crate) fn is_registered(&self) -> bool {
        self.registered.load(Ordering::Relaxed)
    }

    pub(crate) fn register(&self) {
        self.registered.store(true, Ordering::Relaxed);
    }

    /// Whether a stream of a client or a load has it.
    fn is_used(&self) -> bool {
        self.users.load(Ordering::Relaxed) > 0
    }

    /// Time since a stream of a client or a load had it.
    pub(crate) fn idle(&self) -> Duration {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).elapsed()
    }

    fn touch(&self) {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

/// A model while a client's stream or a load has it, which keeps it open.
#[derive(Debug)]
pub(crate) struct InUse(Arc<Model>);

impl InUse {
    pub(crate) fn new(model: &Arc<Model>) -> InUse {
        model.users.fetch_add(1, Ordering::Relaxed);
        model.touch();
        InUse(Arc::clone(model))
    }
}

impl std::ops::Deref for InUse {
    type Target = Model;

    fn deref(&self) -> &Model {
        &self.0
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.touch();
        self.users.fetch_sub(1, Ordering::Relaxed);
    }
}

/// All models by name. Everything here may block, on file systems.
#[derive(Debug)]
pub(crate) struct Models {
    /// The storage path, without links.
    root: PathBuf,
    pool: Arc<Pool>,
    open: Mutex<BTreeMap<String, Arc<Model>>>,
}

impl Models {
    pub(crate) fn new(root: PathBuf, pool: Arc<Pool>) -> Models {
        Models { root, pool, open: Mutex::default() }
    }

    /// The model of this name, opened if it was not, and anew if its files have changed.
    pub(crate) fn open(&self, name: &str) -> Result<Arc<Model>, Status> {
        let (name, path) = self.find(name)?;
        let known = self.known(&name);
        if let Some(known) = known.as_ref().filter(|known| known.checkpoint.is_current()) {
            return Ok(Arc::clone(known));
        }
        // What is known stays until its files can be opened: they may just be being replaced. The bytes of the old ones are
        // of no use.
        let checkpoint = self.open_inside(&path).inspect_err(|_| {
            if let (Some(known), Some(cache)) = (&known, self.pool.made()) {
                cache.evict_changed(&known.checkpoint);
            }
        })?;
        let mut open = self.lock();
        let before = open.get(&name).cloned();
        // Of several that open it at once the first one's stays.
        let is_new = |before: &&Arc<Model>| known.as_ref().is_none_or(|known| !Arc::ptr_eq(known, before));
        let same = |before: &&Arc<Model>| before.checkpoint.has_files_of(&checkpoint);
        if let Some(first) = before.as_ref().filter(is_new).filter(same) {
            return Ok(Arc::clone(first));
        }
        let model = Arc::new(Model::new(name, checkpoint, before.as_deref()));
        let cache = before.as_ref().zip(self.pool.made());
        let replaced = cache.map_or(Ok(()), |(before, cache)| cache.replace(&before.checkpoint, &model.checkpoint));
        open.insert(model.name.clone(), Arc::clone(&model));
        drop(open);
        if before.is_some_and(|before| !before.checkpoint.has_files_of(&model.checkpoint)) {
            tracing::warn!(model = %model.name, "files have changed: what was resident of them is dropped");
        }
        if let Err(error) = replaced {
            tracing::warn!(model = %model.name, error = %error.chain(), "the changed model is not pinned any more");
        }
        Ok(model)
    }

    /// The model of this name, if it is open.
    pub(crate) fn get(&self, name: &str) -> Result<Option<Arc<Model>>, Status> {
        self.name(name).map(|name| self.known(&name))
    }

    /// What a model is called that is asked for so. One that is gone from the disk may be resident: what was typed is
    /// its name then.
    pub(crate) fn name(&self, asked: &str) -> Result<String, Status> {
        match self.find(asked) {
            Ok((name, _)) => Ok(name),
            Err(status) if status.code() == Code::NotFound => {
                let below = Path::new(asked).strip_prefix(&self.root).ok().and_then(Path::to_str);
                Ok(below.unwrap_or(asked).trim_matches('/').to_owned())
            }
            Err(status) => Err(status),
        }
    }

    /// Sees to it that a model is known of which something was just asked for that outlives the request: it may have been
    /// forgotten since it was opened. Gives what is known by its name now.
    pub(crate) fn keep(&self, model: &Arc<Model>) -> Arc<Model> {
        Arc::clone(self.lock().entry(model.name.clone()).or_insert_with(|| Arc::clone(model)))
    }

    /// All that are open, by name.
    pub(crate) fn all(&self) -> Vec<Arc<Model>> {
        self.lock().values().cloned().collect()
    }

    /// Forgets those of which nothing runs and that are not pinned, and that any of them was registered.
    pub(crate) fn forget(&self) {
        self.forget_if(|model| !self.pool.is_pinned(&model.checkpoint));
        self.lock().values().for_each(|model| model.registered.store(false, Ordering::Relaxed));
    }

    /// Closes what lies idle.
    pub(crate) fn sweep(&self) {
        let crowded = self.lock().len() > MAX_OPEN;
        self.forget_if(|model| {
            let idle = crowded || model.idle() > KEPT_OPEN;
            let kept = model.is_registered() || self.pool.is_pinned(&model.checkpoint);
            idle && !kept && self.pool.resident_len(&model.checkpoint) == 0
        });
    }

    fn forget_if(&self, goes: impl Fn(&Model) -> bool) {
        let mut gone = Vec::new();
        // Who pins one meanwhile looks afterwards whether it is here.
        self.lock().retain(|_, model| {
            let stays = model.is_used() || model.preloads.is_running() || !goes(model);
            if !stays {
                gone.push(Arc::clone(model));
            }
            stays
        });
        // Files are closed without the lock.
        drop(gone);
    }

    /// Name and path of what is asked for: inside the storage path, whatever links lead to it.
    fn find(&self, asked: &str) -> Result<(String, PathBuf), Status> {
        if asked.is_empty() {
            return Err(invalid("the model's name is empty: give its path below the storage path"));
        }
        if asked.len() > MAX_NAME || asked.contains('\0') {
            return Err(invalid("the model's name is no path"));
        }
        let typed = Path::new(asked);
        let outside = || invalid(format!("{asked:?} is not inside the storage path, {}", self.root.display()));
        if typed.components().any(|part| part == Component::ParentDir) {
            return Err(outside());
        }
        // An absolute path goes in the place of the root here.
        let path = self.root.join(typed).canonicalize().map_err(|e| match (typed.is_absolute(), e.kind()) {
            // Whether something is there outside is nobody's to know.
            (true, _) if !typed.starts_with(&self.root) => outside(),
            (_, std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
                refused(Code::NotFound, format!("there is no model {asked:?} in {}", self.root.display()))
            }
            _ => refused(Code::PermissionDenied, format!("the model {asked:?} cannot be reached: {e}")),
        })?;
        let name = path.strip_prefix(&self.root).map_err(|_| outside())?;
        let name = name.to_str().ok_or_else(|| invalid(format!("{}: the path is not UTF-8", name.display())))?;
        Ok((if name.is_empty() { ".".to_owned() } else { name.to_owned() }, path.clone()))
    }

    /// Opens a checkpoint whose files lie inside the storage path, whatever their names were when they were opened.
    fn open_inside(&self, path: &Path) -> Result<Checkpoint, Status> {
        let checkpoint = Checkpoint::open(path).map_err(|e| fault::status(&e))?;
        for file in checkpoint.files() {
            let link = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
            let real = std::fs::read_link(&link);
            let real = real.map_err(|e| refused(Code::Internal, format!("{link} cannot be read: {e}")))?;
            if !real.starts_with(&self.root) {
                return Err(invalid(format!("{} leads out of the storage path", file.path().display())));
            }
        }
        Ok(checkpoint)
    }

    fn known(&self, name: &str) -> Option<Arc<Model>> {
        self.lock().get(name).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Model>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_who_open_a_model_at_once_get_the_same_one() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = test_support::safetensors(test_support::header(2), &[1, 2]);
        std::fs::create_dir(dir.path().join("m")).unwrap();
        std::fs::write(dir.path().join("m/model.safetensors"), bytes).unwrap();
        let root = dir.path().canonicalize().unwrap();
        for _ in 0..50 {
            let models = Models::new(root.clone(), Arc::new(Pool::new(4 << 20, 8 << 20, Vec::new())));
            let opened: Vec<_> = std::thread::scope(|scope| {
                let open = || {
                    let model = models.open("m").unwrap();
                    model.register();
                    model
                };
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(open)).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            assert!(opened.iter().all(|model| Arc::ptr_eq(model, &opened[0])));
        }
    }

    #[test]
    fn a_model_that_is_gone_has_the_name_that_it_had() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let models = Models::new(root.clone(), Arc::new(Pool::new(4 << 20, 8 << 20, Vec::new())));
        for asked in ["a/b".to_owned(), "a/b/".to_owned(), format!("{}/a/b", root.display())] {
            assert_eq!(models.name(&asked).unwrap(), "a/b");
        }
    }
}
