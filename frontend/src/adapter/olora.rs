//! OLoRA: LoRA that starts as the first part of W = Q · R, which the base loses (Büyükakyüz 2024, "OLoRA: Orthonormal Low-Rank
//! Adaptation of Large Language Models"), as PEFT has it: B = Q[:, :r], A = R[:r], and the base is W − s · B · A.

use std::sync::Arc;

use faer::Mat;
use serde_json::{Value, json};

use super::decompose::first_of_qr;
use super::lora;
use super::method::{Entry, Key};
use super::prepare::Given;
use super::start::Preparation;
use crate::error::Result;
use crate::json::Fields;

/// How it is found.
pub(super) const ENTRY: Entry = Entry {
    name: "olora",
    keys: &[("peft_type", Key::Text("LORA")), ("init_lora_weights", Key::Text("olora"))],
    read: lora::read,
};

/// The start of this name.
pub(super) fn read(name: &str, _: &mut Fields) -> Result<Option<Arc<dyn Preparation>>> {
    Ok(name.eq_ignore_ascii_case("olora").then(|| Arc::new(Olora) as Arc<dyn Preparation>))
}

/// OLoRA.
#[derive(Debug)]
struct Olora;

impl Preparation for Olora {
    fn name(&self) -> &'static str {
        "olora"
    }

    fn formula(&self) -> &'static str {
        "LoRA; B·A starts as the first r columns of Q times rows of R of W = Q·R; the base loses s·B·A"
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![("init_lora_weights", json!("olora"))]
    }

    fn factors(&self, given: &Given) -> Result<(Mat<f64>, Mat<f64>)> {
        let (q, r) = first_of_qr(given.matrix().as_ref(), given.site.rank as usize)?;
        Ok((r, q))
    }
}
