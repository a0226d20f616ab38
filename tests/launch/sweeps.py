"""A fast replacement of `meshwright train` with a quadratic loss in the log learning rate, saved at every step.

    python sweeps.py train KEY=VALUE ...

The loss falls towards (log10(learning rate) + 2)^2. `model.num_layers` sets the outcome: 1 success, 3 exit code 1, 4 exit
code 2, 5 exit code 75 once, 6 non-finite metrics. It resumes from its last step, and exits with code 75 on SIGTERM.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

SECONDS = float(os.environ.get("SECONDS_OF_A_STEP", "0"))


def main() -> int:
    given = dict(word.partition("=")[::2] for word in sys.argv[2:])
    folder = Path(given["output_dir"]) / given["run"]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "starts", "a") as starts:
        starts.write("start\n")
    kind = int(given.get("model.num_layers", "1"))
    if kind in (3, 4):
        print(f"meshwright: model.num_layers={kind}: is not wanted here", file=sys.stderr)
        return {3: 1, 4: 2}[kind]
    signals = []
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    (folder / "config.yaml").write_text("{}")
    metrics = folder / "metrics.jsonl"
    step = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    bottom = (math.log10(float(given["optimizer.learning_rate"])) + 2) ** 2
    num_steps = int(given["task.num_steps"])
    while step < num_steps:
        step += 1
        loss = None if kind == 6 else bottom + 1 / step
        with metrics.open("a") as file:
            file.write(json.dumps({"step": step, "eval/loss": loss}) + "\n")
        time.sleep(SECONDS)
        if signals or (kind == 5 and step == 2):
            return 75
    (folder / "summary.json").write_text(json.dumps({"ended": "done", "step": step}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
