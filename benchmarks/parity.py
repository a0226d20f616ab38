"""Generates docs/parity.md: differences from reference implementations, measured by the tests of the `parity` group.

python benchmarks/parity.py
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "tests/models/test_families.py", "tests/models/test_peft.py", "tests/trainer/test_preference_trl.py",
<<<<<<< HEAD
    "tests/trainer/test_distillation.py", "tests/trainer/test_feature_distillation.py", "tests/trainer/test_kto_trl.py",
    "tests/trainer/test_judging_parity.py", "tests/models/test_lora.py",
)  # fmt: skip
NOTES = {
    "Families vs. transformers": "Largest difference of logits of a tiny random checkpoint in float32, relative to "
    "the largest logit (tolerance 1e-4).",
    "Adapters vs. PEFT": "Largest difference of logits of a tiny Llama with random adapters, applied next to the base"
    " and merged into it (tolerance 1e-5).",
    "Preference losses vs. TRL": "Loss relative to that of TRL's trainer, and the largest difference of a gradient "
    "relative to its largest entry, on the same four pairs (tolerances 1e-5 and 1e-4). `simpo`, `cpo` and `orpo` are "
    "compared from log-probabilities on. TRL leaves `label_smoothing` out of its `sigmoid`; here it makes DPO "
    "conservative, and is compared with its closed form.",
    "KTO vs. TRL": "On four answers, two of them desirable, with TRL's mismatched answers for z0; measured as above.",
    "Rewards vs. TRL": "Loss and gradient of its RewardTrainer on four pairs; measured as above.",
    "Classes vs. transformers": "Largest difference of the probability of a class, of tiny random checkpoints of "
    "its sequence classification models (tolerance 1e-5).",
    "Weights of 4 bits vs. bitsandbytes": "Largest difference of a weight, relative to the largest weight. Codes "
    "are the same; of scales in 8 bits bitsandbytes sometimes rounds to a neighbor of the nearest level.",
    "Divergences of distillation vs. TRL": "Of logits at temperature 1.5, without its square; measured as above.",
    "Hidden states and attention vs. torch": "Distances of layers, in float64 in torch, with a projection of hidden "
=======
    "tests/trainer/test_distillation.py", "tests/trainer/test_matching.py", "tests/trainer/test_kto_trl.py",
    "tests/trainer/test_judging_parity.py", "tests/models/test_lora.py",
)  # fmt: skip
NOTES = {
    "Families compared with transformers": "Largest difference of logits of a tiny random checkpoint in float32, "
    "relative to the largest logit (tolerance 1e-4).",
    "Adapters compared with PEFT": "Largest difference of logits of a tiny Llama with random adapters, "
    "bound to the base and merged into it (tolerance 1e-5).",
    "Preference losses beside TRL": "Loss relative to that of TRL's trainer, and the largest difference of a gradient "
    "relative to its largest entry, on the same four pairs (tolerances 1e-5 and 1e-4). `simpo`, `cpo` and `orpo` are "
    "compared from log-probabilities on. TRL leaves `label_smoothing` out of its `sigmoid`; here it makes DPO "
    "conservative, and is held to its closed form.",
    "KTO beside TRL": "On four answers, two of them good, with TRL's own choice of answers for z0; measured as above.",
    "Rewards beside TRL": "Loss and gradient of its RewardTrainer on four pairs; measured as above.",
    "Classes beside transformers": "Largest difference of the probability of a class, of tiny random checkpoints of "
    "its classes with a head of scores (tolerance 1e-5).",
    "4-bit weights compared with bitsandbytes": "Largest difference of a weight, relative to the largest weight. Codes "
    "are the same; of scales in 8 bits bitsandbytes takes a neighbour of the nearest level now and then.",
    "Divergences of distillation beside TRL": "Of logits at temperature 1.5, without its square; measured as above.",
    "Hidden states and attention beside torch": "Distances of layers in float64 there, through a projection for hidden "
>>>>>>> p-models
    "states; measured as above.",
}


def measure() -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "figures.jsonl")
        command = [sys.executable, "-m", "pytest", "-m", "parity", *TESTS]
        subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"MESHWRIGHT_PARITY": str(path)})
        return [json.loads(line) for line in path.read_text().splitlines()]


def table(rows: list[dict]) -> str:
    figures = [key for key in rows[0] if key not in ("group", "name")]
    lines = [f"| | {' | '.join(key.replace('_', ' ') for key in figures)} |", "|---" * (len(figures) + 1) + "|"]
    for row in sorted(rows, key=lambda row: row["name"]):
        lines.append(f"| {row['name']} | {' | '.join(f'{row[key]:.1e}' for key in figures)} |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = measure()
    used = ", ".join(
        f"{name} {version(name)}" for name in ("jax", "torch", "transformers", "peft", "trl", "bitsandbytes")
    )
    made = f"Generated by `python benchmarks/parity.py` with {used}, in float32 on a CPU."
    parts = [f"# Comparison with reference implementations\n\n{made}"]
    for group, note in NOTES.items():
        parts.append(f"## {group}\n\n{note}\n\n{table([row for row in rows if row['group'] == group])}")
    (ROOT / "docs" / "parity.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
