//! A model folder with adapters: what is compiled, what is loaded, which facts go into the plan.
//!
//! Opening reads headers and configurations only. Adapter values are read when they are put into a slot.

use crate::args::AdapterPath;
use crate::failure::{Failure, Result};
use pleach_frontend::adapter::{SlotData, slot_values};
use pleach_frontend::{Adapter, Checkpoint};
use pleach_plan::Source;
use pleach_runtime::{InMemory, Session, Weights, open_weights};
use std::path::{Path, PathBuf};

/// A model and the adapters that are active together, in slot order.
#[derive(Debug)]
pub(crate) struct Model {
    /// The folder, bound.
    pub checkpoint: Checkpoint,
    /// Slot 0, slot 1, …
    pub adapters: Vec<Adapter>,
}

impl Model {
    /// Opens a folder and its adapters.
    ///
    /// # Errors
    /// What the readers refuse, by name; the same adapter name twice.
    pub(crate) fn open(dir: &Path, adapters: &[AdapterPath]) -> Result<Model> {
        if !dir.is_dir() {
            let what =
                if dir.exists() { "is a file; give a model folder or a plan (F.pleach)" } else { "does not exist" };
            return Err(Failure::new(format!("{}: {what}", dir.display())));
        }
        let checkpoint = Checkpoint::open(dir)?;
        let mut list: Vec<Adapter> = vec![];
        for a in adapters {
            let adapter = Adapter::open(&a.path, a.name.as_deref(), &checkpoint.modules)?;
            if let (Some(name), Some(other)) = (&a.name, list.iter().find(|b| Some(&b.name) == a.name.as_ref())) {
                let (one, two) = (other.dir.display(), a.path.display());
                return Err(Failure::usage(format!("two adapters are called `{name}`: {one} and {two}")));
            }
            list.push(adapter);
        }
        Ok(Model { checkpoint, adapters: list })
    }

    /// The folder.
    pub(crate) fn dir(&self) -> &Path {
        &self.checkpoint.dir
    }

    /// The files that the weights are in.
    pub(crate) fn files(&self) -> Vec<&Path> {
        let mut files: Vec<&Path> = self.checkpoint.params().map(|(_, t)| &*t.file).collect();
        files.sort_unstable();
        files.dedup();
        files
    }

    /// The weights, mapped.
    ///
    /// # Errors
    /// Files that can no longer be opened.
    pub(crate) fn weights(&self) -> Result<Weights> {
        let files = self.files();
        // One file may have any name; shards are found by their index.
        let single =
            files.first().filter(|_| files.len() == 1 && !self.dir().join("model.safetensors.index.json").is_file());
        Ok(open_weights(single.copied().unwrap_or(self.dir()))?)
    }
}

/// The tensors of an adapter under the keys of a slot. What only training needs, and sites without a rank, may have no place there.
fn slot_tensors(adapter: &Adapter, base: &Checkpoint, has: impl Fn(&str) -> bool) -> Result<InMemory> {
    let mut out = InMemory::new();
    for (key, value) in slot_values(adapter) {
        if value.tensor().is_none_or(|t| t.shape.contains(&0)) && !has(&key) {
            continue;
        }
        let t = value.read(base)?;
        match t.data {
            SlotData::F32(values) => out = out.f32(key, &t.shape, &values),
            SlotData::I32(values) => {
                let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                out.insert(key, pleach_plan::DType::I32, &t.shape, bytes);
            }
        }
    }
    Ok(out)
}

/// Puts the adapters of a model into the slots of a session, in order.
///
/// # Errors
/// More adapters than slots, or an adapter that does not fit its slot, by name.
pub(crate) fn fill_slots(session: &mut Session, model: &Model) -> Result<()> {
    let adapters = &model.adapters;
    let slots = session.plan().slots();
    if adapters.len() > slots.len() {
        return Err(Failure::new(format!(
            "the plan has {} adapter slots, {} adapters were given; compile it with as many --adapter",
            slots.len(),
            adapters.len()
        )));
    }
    for (slot, adapter) in slots.into_iter().zip(adapters) {
        adapter.check_copies(&model.checkpoint)?;
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        adapter.recompute(&model.checkpoint, threads);
        let plan = session.plan().clone();
        let has = |key: &str| {
            let here = |p: &pleach_plan::Param| matches!(&p.source, Source::Adapter { slot: s, key: k } if *s == slot && k == key);
            plan.params.iter().any(here)
        };
        let tensors = slot_tensors(adapter, &model.checkpoint, has)?;
        session
            .load_slot(slot, &tensors)
            .map_err(|e| Failure::from(e).within(&format!("adapter `{}` ({})", adapter.name, adapter.dir.display())))?;
    }
    Ok(())
}

/// A folder beside `path` that is written first and renamed to it last.
pub(crate) fn temporary_beside(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| Failure::usage(format!("{}: is no file name", path.display())))?;
    let parent = crate::files::above(path);
    std::fs::create_dir_all(parent).map_err(Failure::io("create", parent))?;
    Ok(parent.join(format!(".{}.partial-{}", name.to_string_lossy(), std::process::id())))
}
