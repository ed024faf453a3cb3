"""One contender as a process.

python -m experiments.benchmarks.contenders NAME DTYPE BATCH_SIZE EXAMPLES.npz [BATCH_NORM]

It says in JSON what it is, then answers every line of standard input, a number of steps to train or `peak`, with one.
In between it only waits, as `idle_cpu_seconds` shows.
"""

import importlib
import json
import os
import sys
import time

import numpy as np

from mnist_flax.experiments.benchmarks.contenders import MODULES, Task, peak_flops


def main(name: str, dtype: str, batch_size: str, examples: str, batch_norm: str = "") -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    module = importlib.import_module(f"mnist_flax.experiments.benchmarks.contenders.{MODULES[name]}")
    with np.load(examples) as arrays:
        task = Task(dtype, int(batch_size), arrays["images"], arrays["labels"], bool(batch_norm))
    train = module.make(task)
    answers.write(json.dumps({"description": module.describe()}) + "\n")
    resting = time.process_time()
    for line in sys.stdin:
        idle_cpu_seconds = time.process_time() - resting
        if line.strip() == "peak":
            answer = {"flops": peak_flops(module.multiply, dtype)}
        else:
            started = time.perf_counter()
            loss = train(int(line))
            answer = {"loss": loss, "seconds": time.perf_counter() - started}
        answers.write(json.dumps(answer | {"idle_cpu_seconds": idle_cpu_seconds}) + "\n")
        resting = time.process_time()


if __name__ == "__main__":
    main(*sys.argv[1:])
