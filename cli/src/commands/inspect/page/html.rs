//! The file: style, script and data in one page that needs nothing else.

use crate::failure::{Failure, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::Value;
use std::io::Write;
use std::path::Path;

const PAGE: &str = include_str!("page.html");
const STYLE: &[&str] = &[include_str!("base.css"), include_str!("views.css")];
/// In an order where what a file uses at once comes before it.
const SCRIPT: &[&str] = &[
    include_str!("util.js"),
    include_str!("data.js"),
    include_str!("tree.js"),
    include_str!("layout.js"),
    include_str!("scene.js"),
    include_str!("draw.js"),
    include_str!("graph.js"),
    include_str!("details.js"),
    include_str!("diff.js"),
    include_str!("sketch.js"),
    include_str!("passes.js"),
    include_str!("arena.js"),
    include_str!("memory.js"),
    include_str!("kernels.js"),
    include_str!("profile.js"),
    include_str!("main.js"),
];

/// How a block of data begins in the page.
const OPEN: &str = "<script type=\"application/octet-stream\" class=\"payload\">";

/// Data as it stands in a page: JSON, gzipped, base64.
pub(super) fn packed(data: &Value) -> Result<String> {
    let mut z = GzEncoder::new(vec![], Compression::best());
    z.write_all(data.to_string().as_bytes())
        .and_then(|()| z.finish())
        .map(|b| base64(&b))
        .map_err(|e| Failure::new(format!("cannot compress the page's data: {e}")))
}

/// The data of a page that was written before, as it stands there.
///
/// # Errors
/// A file that is no such page.
pub(super) fn data_of(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path).map_err(Failure::io("read", path))?;
    let list: Vec<String> =
        text.split(OPEN).skip(1).filter_map(|p| Some(p.split_once("</script>")?.0.trim().to_string())).collect();
    if list.is_empty() {
        let why = "holds no data; --compare takes a page that `pleach inspect … --html` wrote";
        return Err(Failure::new(format!("{}: {why}", path.display())));
    }
    Ok(list)
}

/// The whole page.
pub(super) fn page(title: &str, data: &[String]) -> String {
    let escaped = title.replace('&', "&amp;").replace('<', "&lt;");
    let blocks: String = data.iter().map(|d| format!("{OPEN}{d}</script>\n")).collect();
    let script = format!("(function () {{\n'use strict';\n{}\n}})();", SCRIPT.join("\n"));
    PAGE.replace("{{title}}", &escaped)
        .replace("{{style}}", &STYLE.join("\n"))
        .replace("{{data}}", &blocks)
        .replace("{{script}}", &script)
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for c in bytes.chunks(3) {
        let n = c.iter().fold(0u32, |n, b| n << 8 | u32::from(*b)) << (8 * (3 - c.len()));
        for i in 0..4 {
            let digit = DIGITS[(n >> (18 - 6 * i)) as usize & 63];
            out.push(if i <= c.len() { char::from(digit) } else { '=' });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_the_standard() {
        let of = |s: &str| base64(s.as_bytes());
        assert_eq!([of(""), of("f"), of("fo"), of("foo"), of("foobar")], ["", "Zg==", "Zm8=", "Zm9v", "Zm9vYmFy"]);
        assert_eq!(base64(&[0xfb, 0xff]), "+/8=");
    }

    #[test]
    fn the_page_holds_every_part_and_asks_for_nothing() {
        let page = page("a < b", &["QUJD".into()]);
        assert!(page.contains("<title>a &lt; b") && page.contains(&format!("{OPEN}QUJD</script>")));
        assert!(!page.contains("{{"), "a part is missing");
        for word in ["http://", "https://", "@import", "<link", "src="] {
            assert!(!page.contains(word), "the page must not load anything: {word}");
        }
    }
}
