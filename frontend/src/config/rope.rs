//! Rotary position embedding parameters in both forms: `rope_theta` + `rope_scaling` (transformers 4) and
//! `rope_parameters` (transformers 5).
//!
//! Where both forms are present they must agree. A configuration that gives no theta is refused, although
//! transformers would fall back to 10 000: a lost key would change every result silently.

use serde_json::{Map, Value};

use crate::error::Result;
use crate::json::{Fields, brief, is_off};

/// Rotary embedding of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the geometric sequence of wavelengths.
    pub theta: f64,
    /// Llama 3's frequency-dependent scaling; `None` for the plain form.
    pub scaling: Option<Llama3Scaling>,
}

/// `rope_type` "llama3": wavelengths above `original / low` are stretched by `factor`, those below `original / high`
/// are kept, those between are blended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Llama3Scaling {
    /// Stretch of the longest wavelengths.
    pub factor: f64,
    /// `low_freq_factor`.
    pub low: f64,
    /// `high_freq_factor`.
    pub high: f64,
    /// `original_max_position_embeddings`.
    pub original: f64,
}

impl Rope {
    /// Inverse frequencies, f32 [head_dim / 2], as transformers computes them.
    ///
    /// Powers are taken in f64 and rounded once. Source: `modeling_rope_utils.py` of transformers.
    pub fn inverse_frequencies(&self, head_dim: u64) -> Vec<f32> {
        let base = self.theta as f32 as f64;
        (0..head_dim / 2)
            .map(|i| {
                let exponent = (2 * i) as f32 / head_dim as f32;
                let frequency = 1.0f32 / base.powf(f64::from(exponent)) as f32;
                self.scaling.map_or(frequency, |s| s.apply(frequency))
            })
            .collect()
    }
}

impl Llama3Scaling {
    /// Scales one inverse frequency; f32 arithmetic in the order of the reference.
    fn apply(&self, frequency: f32) -> f32 {
        let wavelength = std::f32::consts::TAU / frequency;
        let (low_wavelength, high_wavelength) = (self.original / self.low, self.original / self.high);
        if f64::from(wavelength) > low_wavelength {
            frequency / self.factor as f32
        } else if f64::from(wavelength) < high_wavelength {
            frequency
        } else {
            let smooth = (self.original as f32 / wavelength - self.low as f32) / (self.high - self.low) as f32;
            (1.0 - smooth) * frequency / self.factor as f32 + smooth * frequency
        }
    }
}

/// Reads the keys about RoPE of a whole configuration.
pub(super) fn read(fields: &mut Fields, max_positions: u64) -> Result<Rope> {
    if let Some(factor) = fields.number("partial_rotary_factor")?
        && factor != 1.0
    {
        return Err(fields.fault("partial_rotary_factor", format!("is {factor}; only 1 is supported")));
    }
    if fields.flag("rope_interleaved")? == Some(true) {
        return Err(fields.fault("rope_interleaved", "is true; only the half-split form of RoPE is supported"));
    }
    let top = fields.positive("rope_theta")?;
    let mut found: Option<(&str, Rope)> = None;
    for form in ["rope_parameters", "rope_scaling"] {
        let Some(object) = fields.object(form)?.filter(|o| !o.is_empty()) else { continue };
        let rope = read_form(fields, form, object, top, max_positions)?;
        match &found {
            Some((other, known)) if *known != rope => {
                return Err(fields.fault(form, format!("contradicts `{other}`; keep one of them")));
            }
            _ => found = Some((form, rope)),
        }
    }
    match (found, top) {
        (Some((form, rope)), Some(theta)) if rope.theta != theta => {
            Err(fields.fault("rope_theta", format!("is {theta} but `{form}` says {}; keep one of them", rope.theta)))
        }
        (Some((_, rope)), _) => Ok(rope),
        (None, Some(theta)) => Ok(Rope { theta, scaling: None }),
        (None, None) => {
            Err(fields
                .fault("rope_theta", "is missing, and so is `rope_parameters.rope_theta`; add the base of the model"))
        }
    }
}

fn read_form(
    fields: &Fields,
    form: &'static str,
    object: &Map<String, Value>,
    top: Option<f64>,
    max_positions: u64,
) -> Result<Rope> {
    let path = fields.path().to_owned();
    let mut inner = Fields::new(&path, &format!("{form}."), object);
    if let Some((key, _)) = object.iter().find(|(_, v)| v.is_object()) {
        return Err(inner.fault(key, "is an object: different RoPE for different layers is not supported"));
    }
    let kind = match (inner.text("rope_type")?, inner.text("type")?) {
        (Some(a), Some(b)) if a != b => {
            return Err(inner.fault("type", format!("is `{b}` but `rope_type` is `{a}`; keep one of them")));
        }
        (Some(kind), _) | (None, Some(kind)) => kind,
        (None, None) if form == "rope_parameters" => "default",
        (None, None) => return Err(inner.fault("rope_type", "is missing")),
    };
    if inner.number("partial_rotary_factor")?.is_some_and(|f| f != 1.0) {
        return Err(inner.fault("partial_rotary_factor", "is not 1, which is not supported"));
    }
    let Some(theta) = inner.positive("rope_theta")?.or(top) else {
        return Err(inner.fault("rope_theta", "is missing, and so is `rope_theta`; add the base of the model"));
    };
    let scaling = match kind {
        "default" => None,
        "llama3" => {
            let mut need = |key: &str| inner.positive(key)?.ok_or_else(|| inner_missing(&path, form, key));
            let (factor, low, high) = (need("factor")?, need("low_freq_factor")?, need("high_freq_factor")?);
            if low >= high {
                return Err(inner.fault("low_freq_factor", format!("is {low}, not below high_freq_factor {high}")));
            }
            let original = inner.positive("original_max_position_embeddings")?.unwrap_or(max_positions as f64);
            Some(Llama3Scaling { factor, low, high, original })
        }
        other => {
            let what = format!("is `{other}`; supported rope types are default and llama3");
            return Err(inner.fault(if object.contains_key("rope_type") { "rope_type" } else { "type" }, what));
        }
    };
    if let Some((key, value)) = inner.unread().find(|(_, v)| !is_off(v)) {
        return Err(inner.fault(key, format!("is {}: not known for rope type `{kind}`", brief(value))));
    }
    Ok(Rope { theta, scaling })
}

fn inner_missing(path: &std::path::Path, form: &str, key: &str) -> crate::error::Error {
    crate::error::Error::key(path, format!("{form}.{key}"), "is missing or null; rope type llama3 needs it")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn rope(value: Value) -> std::result::Result<Rope, String> {
        let mut fields = Fields::new(std::path::Path::new("config.json"), "", value.as_object().unwrap());
        read(&mut fields, 2048).map_err(|e| e.to_string())
    }

    #[test]
    fn both_forms_agree() {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
        let old = rope(json!({"rope_theta": 500000.0, "rope_scaling": scaling})).unwrap();
        let mut parameters = scaling.clone();
        parameters["rope_theta"] = json!(500000.0);
        let new = rope(json!({"rope_parameters": parameters})).unwrap();
        assert_eq!(old, new);
        assert_eq!(old.scaling.unwrap().original, 8192.0);
        let plain = rope(json!({"rope_theta": 100000, "rope_scaling": null})).unwrap();
        assert_eq!(plain, Rope { theta: 100000.0, scaling: None });
    }

    #[test]
    fn what_is_not_understood_is_named() {
        let cases = [
            (json!({}), "rope_theta` is missing"),
            (json!({"rope_parameters": {"rope_type": "default"}}), "rope_theta` is missing"),
            (json!({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}), "is `linear`"),
            (json!({"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}), "is `yarn`"),
            (json!({"rope_theta": 1e4, "partial_rotary_factor": 0.5}), "partial_rotary_factor"),
            (json!({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}), "partial_rotary_factor"),
            (json!({"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 2e4}), "keep one"),
            (json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}), "different layers"),
            (json!({"rope_parameters": {"rope_theta": 1e4, "mscale": 0.7}}), "mscale"),
            (json!({"rope_theta": 1e4, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}), "low_freq_factor"),
            (json!({"rope_theta": -1}), "above 0"),
            (json!({"rope_theta": 1e4, "rope_interleaved": true}), "rope_interleaved"),
        ];
        for (value, expected) in cases {
            let message = rope(value.clone()).unwrap_err();
            assert!(message.contains(expected), "{value}: {message}");
        }
    }

    #[test]
    fn frequencies_fall_geometrically_and_llama3_stretches_the_long_ones() {
        let plain = Rope { theta: 10000.0, scaling: None };
        let scaled =
            Rope { scaling: Some(Llama3Scaling { factor: 8.0, low: 1.0, high: 4.0, original: 8192.0 }), ..plain };
        let (a, b) = (plain.inverse_frequencies(64), scaled.inverse_frequencies(64));
        assert_eq!((a.len(), a[0]), (32, 1.0));
        assert!((a[16] - 0.01).abs() < 1e-8);
        assert_eq!(a[0], b[0]);
        assert_eq!(b[31], a[31] / 8.0);
    }
}
