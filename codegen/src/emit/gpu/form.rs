//! The ways in which a kernel can be made where there are several: which units multiply, how large a tile is, how many blocks share
//! a sum. Which one is fastest for a shape is measured, not known (`pleach tune`); without a wish the emitters take what
//! they think is best.

use std::fmt;
use std::str::FromStr;

/// Units that multiply.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Units {
    /// `wgmma`: warpgroups, tiles by tensor copies.
    Warpgroup,
    /// `mma.sync`: warps.
    Warp,
    /// Whatever a library of the machine takes; the kernel's usual form where there is none.
    Library,
}

/// One way to make a kernel, written as `wgmma-128x256`, `mma-128x128`, `mma-128x32-split4` or `cublaslt`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Form {
    /// Units that multiply.
    pub units: Units,
    /// Rows and columns of a tile; a library's are its own affair.
    pub tile: [u32; 2],
    /// Blocks that share a sum.
    pub parts: u32,
}

impl Form {
    /// Products by a library.
    pub const LIBRARY: Form = Form { units: Units::Library, tile: [0, 0], parts: 1 };
}

/// How the library is called.
const LIBRARY: &str = "cublaslt";

/// A text that is no form.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` is no form of a kernel; forms are written as wgmma-128x256, mma-128x128, mma-128x32-split4 or cublaslt")]
pub struct NoForm(String);

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = match self.units {
            Units::Warpgroup => "wgmma",
            Units::Warp => "mma",
            Units::Library => return f.write_str(LIBRARY),
        };
        write!(f, "{units}-{}x{}", self.tile[0], self.tile[1])?;
        if self.parts > 1 { write!(f, "-split{}", self.parts) } else { Ok(()) }
    }
}

impl FromStr for Form {
    type Err = NoForm;

    fn from_str(s: &str) -> Result<Form, NoForm> {
        if s == LIBRARY {
            return Ok(Form::LIBRARY);
        }
        let read = || -> Option<Form> {
            let mut words = s.split('-');
            let units = match words.next()? {
                "wgmma" => Units::Warpgroup,
                "mma" => Units::Warp,
                _ => return None,
            };
            let (rows, columns) = words.next()?.split_once('x')?;
            let tile = [rows.parse().ok()?, columns.parse().ok()?];
            let parts = match words.next() {
                None => 1,
                Some(w) => w.strip_prefix("split")?.parse().ok().filter(|n| *n > 1)?,
            };
            words.next().is_none().then_some(Form { units, tile, parts })
        };
        read().ok_or_else(|| NoForm(s.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_are_read_as_they_are_written() {
        for text in ["wgmma-128x256", "mma-32x128", "mma-128x32-split16", "cublaslt"] {
            assert_eq!(text.parse::<Form>().unwrap().to_string(), text);
        }
        for bad in [
            "",
            "mma",
            "mma-128",
            "wmma-1x2",
            "mma-128x32-split1",
            "mma-128x32-16",
            "mma-128x32-split4-x",
            "cublaslt-1x1",
        ] {
            assert!(bad.parse::<Form>().unwrap_err().to_string().contains("wgmma-128x256"), "{bad}");
        }
    }
}
