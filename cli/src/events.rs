//! What a method changes while a run goes on, between the runtime's loop and the frontend's methods.

use crate::failure::Result;
use pleach_frontend::adapter::{self, Buffers, EventsPlan};
use pleach_plan::DType;
use pleach_runtime::RuntimeError;
use pleach_runtime::train::{AdapterPlan, Events, Machine, Moment};

/// A method's events.
#[derive(Debug)]
pub(crate) struct MethodEvents(adapter::Events);

impl MethodEvents {
    /// Those of the adapter that a plan trains, if it has any.
    ///
    /// # Errors
    /// A plan of another version.
    pub(crate) fn of(plan: &AdapterPlan) -> Result<Option<MethodEvents>> {
        let Some(value) = &plan.events else { return Ok(None) };
        let plan: EventsPlan = serde_json::from_value(value.clone())?;
        Ok(Some(MethodEvents(adapter::Events::from_plan(&plan)?)))
    }
}

impl Events for MethodEvents {
    fn at(
        &self,
        moment: Moment,
        step: u64,
        steps: u64,
        seed: u64,
        machine: &mut dyn Machine,
    ) -> pleach_runtime::Result<()> {
        let moment = match moment {
            Moment::Before => adapter::Moment::Before,
            Moment::Gradients => adapter::Moment::Gradients,
            Moment::After => adapter::Moment::After,
        };
        self.0.at(moment, step, steps, seed, &mut OfMachine(machine)).map_err(RuntimeError::Values)
    }
}

struct OfMachine<'m>(&'m mut dyn Machine);

impl Buffers for OfMachine<'_> {
    fn read(&self, name: &str) -> std::result::Result<Vec<f32>, String> {
        let v = self.0.read(name).map_err(|e| e.to_string())?;
        if v.dtype != DType::F32 {
            return Err(format!("`{name}` is {}, expected f32", v.dtype.name()));
        }
        Ok(v.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    }

    fn write(&mut self, name: &str, values: &[f32]) -> std::result::Result<(), String> {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.0.write(name, DType::F32, &bytes).map_err(|e| e.to_string())
    }
}
