//! The interpreter in the place of a session: entries of a schedule, whose assignments are kept.

use super::session::Tensors;
use pleach_ir::interp::{Symbols, Tensor, run_schedule_with};
use pleach_ir::{Param, ParamId, Schedule, Source};

/// A schedule with the values of its parameters.
#[derive(Debug)]
pub struct Reference<'s> {
    schedule: &'s Schedule,
    params: Vec<Param>,
    values: Tensors,
    symbols: Symbols,
}

/// Values for the parameters of a schedule from those of the graph it stems from: the same numbers in the types that passes
/// gave them; zeros where nothing is given and zeros are meant.
pub fn values(schedule: &Schedule, given: &Tensors, symbols: &Symbols) -> Tensors {
    let mut out = Tensors::new();
    for (p, _) in &schedule.params {
        let value = match (&p.source, given.get(&p.name)) {
            (Source::Derived, _) => continue,
            (Source::Zeros, None) => Tensor::zeros(p.ty.dtype, crate::values::shape(&p.ty, symbols)),
            (_, None) => continue,
            (_, Some(t)) if t.dtype() == p.ty.dtype => t.clone(),
            (_, Some(t)) => Tensor::from_floats(p.ty.dtype, t.shape.clone(), t.floats().into_owned()),
        };
        out.insert(p.name.clone(), value);
    }
    out
}

impl<'s> Reference<'s> {
    /// Puts values into the parameters and runs the preparations.
    ///
    /// # Errors
    /// What the interpreter refuses.
    pub fn open(schedule: &'s Schedule, values: &Tensors, symbols: &Symbols) -> Result<Reference<'s>, String> {
        let params: Vec<Param> = schedule.params.iter().map(|(p, _)| p.clone()).collect();
        let mut r = Reference { schedule, params, values: values.clone(), symbols: symbols.clone() };
        for e in schedule.entries.iter().filter(|e| e.name.starts_with("prepare")) {
            r.run(&e.name, &Tensors::new())?;
        }
        Ok(r)
    }

    /// Runs an entry; what it assigns is kept.
    ///
    /// # Errors
    /// What the interpreter refuses.
    pub fn run(&mut self, entry: &str, inputs: &Tensors) -> Result<Tensors, String> {
        let value = |p: ParamId| self.values.get(&self.params[p.index()].name);
        let result = run_schedule_with(self.schedule, entry, &value, inputs, &self.symbols);
        let result = result.map_err(|e| format!("{entry}: {e}"))?;
        for (id, t) in result.assigns {
            self.values.insert(self.params[id.index()].name.clone(), t);
        }
        Ok(result.outputs)
    }

    /// The value of a parameter now.
    pub fn value(&self, name: &str) -> Option<&Tensor> {
        self.values.get(name)
    }
}
