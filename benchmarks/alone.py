"""Measurements that need a process of their own: memory, and the time to compile.

    python benchmarks/alone.py memory sdesens PATHS STEPS...    bytes at the peak of one gradient, for each number of steps
    python benchmarks/alone.py memory loop PATHS STEPS...       the same by autograd through a plain torch loop
    python benchmarks/alone.py compile PATHS STEPS              seconds of the imports, of a first gradient, of a second
    python benchmarks/alone.py auto PATHS STEPS                 of a first gradient with compile="auto"; kernels compiled

It prints JSON. Memory is the rise of the resident set over that of the process after a run of 16 steps, so that
neither libraries nor the compiler count; a peak does not remember what went before.
"""

import json
import subprocess
import sys
import time

began = time.perf_counter()


def measure(*arguments, **environment):
    """What this file prints for these arguments, from a new process."""
    import os

    command = [sys.executable, __file__, *map(str, arguments)]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])


def gradient(who, paths, steps, compile=True):
    """Seconds and peak bytes of the gradient of geometric Brownian motion in both parameters, float64."""
    import peers
    import torch
    from cases import gbm_problem

    import sdesens as ss
    from sdesens.memory import PeakMemory

    problem = gbm_problem(torch.float64, steps)
    work = (
        peers.loop(problem, paths)["gradient", "torch loop"]
        if who == "loop"
        else lambda: ss.sensitivity(problem, n_paths=paths, seed=1, compile=compile, progress=False, **peers.UNCHECKED)
    )
    memory = PeakMemory()
    start = time.perf_counter()
    work()
    return {"steps": steps, "seconds": time.perf_counter() - start, "bytes": memory.bytes()}


def main(what, *arguments):
    if what == "memory":
        who, paths, *steps = arguments
        gradient(who, int(paths), 16)
        return [gradient(who, int(paths), int(n)) for n in steps]
    paths, steps = map(int, arguments)
    import torch  # noqa: F401

    import sdesens.integrate.kernel

    imports = time.perf_counter() - began
    first, second = (gradient("sdesens", paths, steps, "auto" if what == "auto" else True)["seconds"] for _ in range(2))
    kernels = len(sdesens.integrate.kernel._KERNELS)
    return {"imports": imports, "first": first, "second": second, "kernels": kernels}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
