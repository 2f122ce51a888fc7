//! LT-SFT: the cells of the weights that full fine-tuning moved most are trained again from the start, alone (Ansell et al. 2022,
//! "Composable Sparse Fine-Tuning for Cross-Lingual Transfer"), as the authors' code (composable-sft) does it.
//!
//! W' = W + D. For the first `full_ft_steps` of a run (half of it where none are given) every cell of D is trained. Then the
//! `ft_params_num` cells with the largest |D| of all sites (a part `ft_params_proportion` of them, 0.02, where no number is given) are
//! chosen, D and its moments go back to zero, and only those cells are trained to the end, with corrections that begin anew; the learning
//! rate keeps to the schedule of the run. Only chosen cells are saved: an adapter is their places and values, and such adapters add up.
//! Weight decay draws towards the base's weight. A saved adapter trains on at its own cells.

use std::sync::Arc;

use pleach_ir::{BinaryOp, DType, Op, Role, ScatterMode, ValueId};
use serde_json::{Value, json};

use super::method::{Buffer, Entry, Key, Method, Scope, linear_only};
use super::slots::{corrected_by_age, highest};
use super::{Event, Init, Moment, RankPattern, SavedRanks, Site, Update};
use crate::error::{Error, Result};
use crate::json::Fields;
use crate::peft::Target;

/// The part, and the name in files, of D: all of it while it is trained, chosen cells in files.
const VALUES: &str = "sft_values";
/// The part that is one for cells that are trained; in files the places of these.
const CELLS: &str = "sft_indices";
/// The part, common to all sites, that counts the steps since D was zero.
const AGE: &str = "sft_age";
/// Keys that only training knows.
const KEYS: [&str; 3] = ["full_ft_steps", "ft_params_num", "ft_params_proportion"];

/// How it is found.
pub(super) const ENTRY: Entry =
    Entry { name: "lt-sft", keys: &[("peft_type", Key::Text("LT_SFT"))], read: |f| Ok(Arc::new(LtSft::read(f)?)) };

/// LT-SFT.
#[derive(Debug, Clone, PartialEq)]
struct LtSft {
    /// Whether cells have been chosen: then D is a list of them.
    chosen: bool,
    full: Option<u64>,
    count: Option<u64>,
    part: f64,
}

impl LtSft {
    fn read(f: &mut Fields) -> Result<LtSft> {
        let part = f.number(KEYS[2])?.unwrap_or(0.02);
        if !(part > 0.0 && part <= 1.0) {
            return Err(f.fault(KEYS[2], format!("is {part}; expected a part of all cells, above 0 and at most 1")));
        }
        let chosen = f.raw("rank_pattern").and_then(Value::as_object).is_some_and(|m| !m.is_empty());
        Ok(LtSft { chosen, full: f.count(KEYS[0], 1 << 40)?, count: f.count(KEYS[1], 1 << 40)?, part })
    }
}

impl Method for LtSft {
    fn name(&self) -> &'static str {
        "lt-sft"
    }

    fn formula(&self) -> &'static str {
        "W' = W with values added at the cells that full fine-tuning moved most"
    }

    fn peft_type(&self) -> &'static str {
        "LT_SFT"
    }

    fn alpha_key(&self) -> Option<&'static str> {
        None
    }

    fn rank_key(&self) -> Option<&'static str> {
        None
    }

    fn has_patterns(&self) -> bool {
        true
    }

    fn own_keys(&self) -> &'static [&'static str] {
        &KEYS
    }

    fn attach(&self, target: &Target) -> std::result::Result<(), String> {
        linear_only(target)?;
        // Places are counted in i32.
        match target.input.saturating_mul(target.output) < 1 << 31 {
            true => Ok(()),
            false => Err("has more cells than can be counted in 31 bits".into()),
        }
    }

    fn shared(&self, _site: &Site) -> Vec<Buffer> {
        if self.chosen { vec![] } else { vec![Buffer::changing(AGE, &[], 1.0)] }
    }

    fn buffers(&self, site: &Site) -> Vec<Buffer> {
        let (rows, columns) = (site.output, site.input);
        if self.chosen {
            let places = Init::RandomCells { rows, columns };
            return vec![
                Buffer::indices(CELLS, CELLS, &[2, site.rank], places),
                Buffer::trained(VALUES, VALUES, &[site.rank], Init::Zeros {}),
            ];
        }
        let (shape, init) = (vec![rows, columns], Init::Constant { value: 1.0 });
        vec![
            Buffer::trained(VALUES, VALUES, &shape, Init::Zeros {}),
            Buffer { part: CELLS, dtype: DType::F32, shape, role: Role::Stat, file: Some(CELLS), init },
        ]
    }

    fn weight(&self, s: &mut Scope, weight: ValueId) -> Result<ValueId> {
        let (rows, columns, n) = (s.site().output, s.site().input, s.site().rank);
        if self.chosen && n == 0 {
            return Ok(weight);
        }
        let (cells, values) = (s.buffer(CELLS)?, s.buffer(VALUES)?);
        if !self.chosen {
            let change = s.mul(values, cells)?;
            return s.sum(&[weight, change]);
        }
        let row = s.head(cells, 0, 1)?;
        let row = s.reshape(row, &[n])?;
        let column = s.push(Op::Slice { axis: 0, start: 1, end: 2 }, &[cells])?;
        let column = s.reshape(column, &[n])?;
        let width = s.push(Op::i32(columns as i32), &[])?;
        let row = s.push(Op::Binary(BinaryOp::Mul), &[row, width])?;
        let place = s.sum(&[row, column])?;
        let flat = s.reshape(weight, &[rows * columns])?;
        let flat = s.push(Op::Scatter { axis: 0, mode: ScatterMode::Add }, &[flat, place, values])?;
        s.reshape(flat, &[rows, columns])
    }

    fn saved_ranks(&self) -> Option<SavedRanks> {
        const ALL: &[(&str, &[u8])] = &[(VALUES, &[]), (CELLS, &[])];
        (!self.chosen).then_some(SavedRanks { by: CELLS, along: ALL, pattern: RankPattern::Cells })
    }

    fn update(&self, u: &mut Update) -> Result<()> {
        if self.chosen || u.part() != VALUES {
            return Ok(());
        }
        let age = u.buffer(AGE)?;
        corrected_by_age(u, age)
    }

    fn has_events(&self) -> bool {
        !self.chosen
    }

    fn on_step(&self, e: &mut Event) -> Result<()> {
        if e.moment != Moment::Before {
            return Ok(());
        }
        let full = self.full.unwrap_or((e.steps / 2).max(1));
        if e.step == full {
            self.choose(e)?;
        }
        let age = if e.step < full { e.step } else { e.step - full } + 1;
        e.write_param(&e.shared_name(AGE), &[age as f32])
    }

    fn config(&self) -> Vec<(&'static str, Value)> {
        vec![("bias", json!("none"))]
    }
}

impl LtSft {
    /// Chooses cells and goes back.
    fn choose(&self, e: &mut Event) -> Result<()> {
        let sites = e.sites_with(VALUES);
        let mut sizes: Vec<f64> = vec![];
        for s in &sites {
            sizes.extend(e.read(s, VALUES)?.iter().map(|x| f64::from(x.abs())));
        }
        let count = self.count.unwrap_or((sizes.len() as f64 * self.part) as u64);
        if count == 0 || count > sizes.len() as u64 {
            let what =
                format!("{count} cells are to be trained of {}; give another {} or {}", sizes.len(), KEYS[1], KEYS[2]);
            return Err(Error::Graph(what));
        }
        let mut chosen = highest(&sizes, count as usize).into_iter().map(|yes| f32::from(u8::from(yes)));
        for s in &sites {
            let n = (s.input * s.output) as usize;
            let cells: Vec<f32> = chosen.by_ref().take(n).collect();
            e.write(s, CELLS, &cells)?;
            let (zeros, name) = (vec![0.0; n], e.name(s, VALUES));
            for name in [name.clone(), format!("adam.m.{name}"), format!("adam.v.{name}")] {
                e.write_param(&name, &zeros)?;
            }
        }
        Ok(())
    }
}
