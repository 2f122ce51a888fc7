#!/usr/bin/env python3
"""Builds the demo's training data: pairs of a word and its definition from WordNet 3.0 (Debian's package wordnet-base).

Writes `models/definitions/train.jsonl` (2,000 pairs) and `models/definitions/heldout.jsonl` (200 words that the former has not, with
definitions that it has not either). The same bytes on every machine: words are the 2,200 that texts tagged with senses use most, in
an order that a hash of the word gives. A second run does nothing.

Reads /usr/share/wordnet, or another folder with --wordnet; where there is none, fetches the package with apt-get and unpacks it without
installing (Debian, no root needed).

    python scripts/make_definitions.py [--out models/definitions] [--wordnet DIR]
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INSTALLED = Path("/usr/share/wordnet")
PAIRS, HELD_OUT = 2000, 200
KINDS = {"1": ("noun", "noun"), "2": ("verb", "verb"), "3": ("adj", "adjective"), "4": ("adv", "adverb")}


def unpacked(into):
    """The package's data, fetched into a folder that is thrown away."""
    try:
        subprocess.run(["apt-get", "download", "-qq", "wordnet-base"], cwd=into, check=True)
        package = next(Path(into).glob("wordnet-base_*.deb"))
        subprocess.run(["dpkg-deb", "-x", package, into], check=True)
    except (OSError, subprocess.CalledProcessError, StopIteration):
        sys.exit("WordNet was not found and could not be fetched; on Debian: apt install wordnet-base, or name its folder with --wordnet")
    return Path(into) / "usr/share/wordnet"


def glosses(folder, kind):
    """Byte offset of every synset's line and its definition, without the examples."""
    found = {}
    for line in (folder / f"data.{kind}").read_text(encoding="latin-1").splitlines():
        if line.startswith(" ") or " | " not in line:
            continue
        definition = line.split(" | ", 1)[1].split('; "')[0].split("; ")[0].strip()
        found[line[:8]] = re.sub(r"\s+", " ", definition)
    return found


def first_senses(folder, kind):
    """Word and offset of its commonest sense: the index lists offsets in that order."""
    for line in (folder / f"index.{kind}").read_text(encoding="latin-1").splitlines():
        fields = line.split()
        if line.startswith(" ") or not re.fullmatch(r"[a-z]{3,14}", fields[0]):
            continue
        yield fields[0], fields[-int(fields[2])]


def counts(folder):
    """How often a word was used in a part of speech, over all its senses."""
    total = {}
    for line in (folder / "cntlist.rev").read_text(encoding="latin-1").splitlines():
        key, _, count = line.split()
        word, sense = key.split("%")
        total[word, sense[0]] = total.get((word, sense[0]), 0) + int(count)
    return total


def pairs(folder):
    """(word, part of speech, definition) of the commonest words, each word and each definition once."""
    used = counts(folder)
    candidates = []
    for digit, (kind, name) in KINDS.items():
        definitions = glosses(folder, kind)
        for word, offset in first_senses(folder, kind):
            definition = definitions.get(offset, "")
            plain = re.fullmatch(r"[a-z][a-z ,'\-]{14,110}", definition) and word not in definition
            if plain and 3 <= len(definition.split()) <= 18:
                candidates.append((-used.get((word, digit), 0), word, name, definition))
    chosen, words, seen = [], set(), set()
    for _, word, name, definition in sorted(candidates):
        if word not in words and definition not in seen and len(chosen) < PAIRS + HELD_OUT:
            words.add(word)
            seen.add(definition)
            chosen.append((word, name, definition))
    if len(chosen) < PAIRS + HELD_OUT:
        sys.exit(f"{folder} has only {len(chosen)} fitting words; is it WordNet 3.0?")
    return sorted(chosen, key=lambda p: hashlib.sha256(p[0].encode()).digest())


def row(word, name, definition):
    return json.dumps({"prompt": f"Definition of the {name} “{word}”:", "completion": f" {definition}."}, ensure_ascii=False) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "models" / "definitions")
    parser.add_argument("--wordnet", type=Path)
    args = parser.parse_args()
    files = [args.out / "train.jsonl", args.out / "heldout.jsonl"]
    if all(f.exists() for f in files):
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.wordnet or (INSTALLED if (INSTALLED / "data.noun").exists() else unpacked(scratch))
        rows = [row(*p) for p in pairs(folder)]
    args.out.mkdir(parents=True, exist_ok=True)
    for file, part in zip(files, (rows[:PAIRS], rows[PAIRS:])):
        partial = file.with_suffix(".partial")
        partial.write_text("".join(part), encoding="utf-8")
        partial.replace(file)
    print(f"{files[0]}: {PAIRS} pairs, {files[1]}: {HELD_OUT} held out")


if __name__ == "__main__":
    main()
