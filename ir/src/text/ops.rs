//! From mnemonic, attributes and written type to an operator.

use super::lex::Token;
use super::parse::Parser;
use super::print::decimal;
use crate::error::IrError;
use crate::graph::ParamId;
use crate::infer::MAX_CONST;
use crate::op::{AttentionAttrs, AttentionWrt, BinaryOp, Op, ReduceOp, ScatterMode, UnaryOp};
use crate::types::{DType, TensorType};

/// What a node's line holds between its operands and its type.
pub(super) struct Attrs<'a> {
    /// `{key = value, flag}`, values as number texts; a flag has none.
    named: Vec<(&'a str, Vec<&'a str>)>,
    /// What stands before the type without braces: an input's name, a parameter, a constant's elements.
    head: Head<'a>,
}

enum Head<'a> {
    None,
    Name(String),
    Param(ParamId),
    Numbers { scalar: bool, all: Vec<&'a str> },
}

impl<'a> Attrs<'a> {
    pub(super) fn read(p: &mut Parser<'a>, mnemonic: &str) -> Result<Attrs<'a>, IrError> {
        let head = match mnemonic {
            "input" => Head::Name(p.text("the input's name in quotes")?),
            "param" => Head::Param(p.param_id()?),
            "const" => {
                let mut all = vec![];
                let scalar = !p.maybe(&Token::Punct('['))?;
                if scalar {
                    all.push(p.number("a number or '['")?);
                } else {
                    p.list(']', |p| {
                        all.push(p.number("a number")?);
                        if all.len() as u64 > MAX_CONST {
                            return Err(p.fault(format!("a constant has at most {MAX_CONST} elements")));
                        }
                        Ok(())
                    })?;
                }
                Head::Numbers { scalar, all }
            }
            _ => Head::None,
        };
        let mut named: Vec<(&str, Vec<&str>)> = vec![];
        if p.maybe(&Token::Punct('{'))? {
            p.list('}', |p| {
                let key = p.word("an attribute")?;
                if named.iter().any(|(k, _)| *k == key) || named.len() > 16 {
                    return Err(p.fault(format!("attribute {key} once too often")));
                }
                let mut values = vec![];
                if p.maybe(&Token::Punct('='))? {
                    if p.maybe(&Token::Punct('['))? {
                        p.list(']', |p| {
                            values.push(p.number("a number")?);
                            Ok(())
                        })?;
                    } else {
                        values.push(p.number("a number or '['")?);
                    }
                }
                named.push((key, values));
                Ok(())
            })?;
        }
        Ok(Attrs { named, head })
    }

    fn take(&mut self, key: &str) -> Option<Vec<&'a str>> {
        let i = self.named.iter().position(|(k, _)| *k == key)?;
        Some(self.named.swap_remove(i).1)
    }

    fn flag(&mut self, key: &str) -> Result<bool, String> {
        match self.take(key) {
            None => Ok(false),
            Some(v) if v.is_empty() => Ok(true),
            Some(_) => Err(format!("{key} takes no value")),
        }
    }

    fn maybe_one(&mut self, key: &str) -> Result<Option<&'a str>, String> {
        match self.take(key).as_deref() {
            None => Ok(None),
            Some([v]) => Ok(Some(v)),
            Some(_) => Err(format!("{key} takes one number")),
        }
    }

    fn one<T: std::str::FromStr>(&mut self, key: &str) -> Result<T, String> {
        let v = self.maybe_one(key)?.ok_or_else(|| format!("expected the attribute {key}"))?;
        v.parse().map_err(|_| format!("{key} cannot be {}", v.get(..40).unwrap_or(v)))
    }

    fn many(&mut self, key: &str) -> Result<Vec<u8>, String> {
        let v = self.take(key).ok_or_else(|| format!("expected the attribute {key}"))?;
        v.iter().map(|x| x.parse().map_err(|_| format!("{key} lists axes"))).collect()
    }
}

/// The operator of a line. Attributes that it does not have are an error.
pub(super) fn read_op(mnemonic: &str, a: &mut Attrs, ty: &TensorType) -> Result<Op, String> {
    let head = std::mem::replace(&mut a.head, Head::None);
    let op = match (mnemonic, head) {
        ("input", Head::Name(name)) => Op::Input { name, dtype: ty.dtype, shape: ty.shape.clone() },
        ("param", Head::Param(p)) => Op::Param(p),
        ("const", Head::Numbers { scalar, all }) => constant(scalar, &all, ty)?,
        ("iota", _) => Op::Iota { shape: ty.shape.clone(), axis: a.one("axis")? },
        ("add", _) => Op::Add,
        ("select", _) => Op::Select,
        ("cast", _) => Op::Cast(ty.dtype),
        ("matmul", _) => Op::MatMul { ta: a.flag("ta")?, tb: a.flag("tb")? },
        ("reshape", _) => Op::Reshape(ty.shape.clone()),
        ("transpose", _) => Op::Transpose(a.many("perm")?),
        ("broadcast", _) => Op::Broadcast { shape: ty.shape.clone(), axes: a.many("axes")? },
        ("slice", _) => Op::Slice { axis: a.one("axis")?, start: a.one("start")?, end: a.one("end")? },
        ("pad", _) => Op::Pad { axis: a.one("axis")?, lo: a.one("lo")?, hi: a.one("hi")? },
        ("concat", _) => Op::Concat { axis: a.one("axis")? },
        ("top_k_values", _) => Op::TopK { k: a.one("k")?, indices: false },
        ("top_k_indices", _) => Op::TopK { k: a.one("k")?, indices: true },
        ("gather", _) => Op::Gather { axis: a.one("axis")? },
        ("scatter_set", _) => Op::Scatter { axis: a.one("axis")?, mode: ScatterMode::Set },
        ("scatter_add", _) => Op::Scatter { axis: a.one("axis")?, mode: ScatterMode::Add },
        ("attention", _) => Op::Attention(heads(a)?),
        ("attention_lse", _) => Op::AttentionLse(heads(a)?),
        ("after", _) => Op::After,
        ("stop_gradient", _) => Op::StopGradient,
        (name, _) => by_table(name, a)?,
    };
    match a.named.first() {
        Some((key, _)) => Err(format!("{mnemonic} has no attribute {key}")),
        None => Ok(op),
    }
}

fn heads(a: &mut Attrs) -> Result<AttentionAttrs, String> {
    Ok(AttentionAttrs {
        heads: a.one("heads")?,
        kv_heads: a.one("kv_heads")?,
        head_dim: a.one("head_dim")?,
        scale: element(DType::F32, a.maybe_one("scale")?.ok_or("expected the attribute scale")?)?,
        causal: a.flag("causal")?,
        window: match a.maybe_one("window")? {
            Some(w) => Some(w.parse().map_err(|_| "window is a number of keys".to_string())?),
            None => None,
        },
    })
}

fn by_table(name: &str, a: &mut Attrs) -> Result<Op, String> {
    if let Some((u, _)) = UnaryOp::ALL.iter().find(|(_, n)| *n == name) {
        return Ok(Op::Unary(*u));
    }
    if let Some((b, _)) = BinaryOp::ALL.iter().find(|(_, n)| *n == name) {
        return Ok(Op::Binary(*b));
    }
    if let Some((r, _)) = ReduceOp::ALL.iter().find(|(_, n)| *n == name) {
        return Ok(Op::Reduce { op: *r, axis: a.one("axis")? });
    }
    if let Some((w, _)) = AttentionWrt::ALL.iter().find(|(_, n)| *n == name) {
        return Ok(Op::AttentionGrad { attrs: heads(a)?, wrt: *w });
    }
    Err(format!("there is no operator '{}'", name.get(..40).unwrap_or(name)))
}

fn constant(scalar: bool, all: &[&str], ty: &TensorType) -> Result<Op, String> {
    let shape: Option<Vec<u64>> = ty.shape.iter().map(|d| d.known()).collect();
    let shape = shape.ok_or("a constant has a static shape")?;
    if scalar != shape.is_empty() {
        return Err("a constant of rank 0 is one number, any other a list in brackets".into());
    }
    let bits = all.iter().map(|x| element(ty.dtype, x)).collect::<Result<_, _>>()?;
    Ok(Op::Const { dtype: ty.dtype, shape, bits })
}

/// A number as the bits of an element: `0x…` are the bits themselves.
fn element(dtype: DType, text: &str) -> Result<u32, String> {
    let bits = match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).ok(),
        None => decimal(dtype, text),
    };
    bits.ok_or_else(|| format!("{} is no {dtype}", text.get(..40).unwrap_or(text)))
}
