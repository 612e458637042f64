"""How long does a student wait for a check? Seconds for each exercise, on one thread, beside the answer's own share.

    python benchmarks/checks.py [--quick] [--check]

"right" is the whole check of the reference (probe, judge, picture), "answer" the probe alone, run again: what the
student's own code costs. "first wrong" is the first wrong check of a session, which runs every misconception once;
"wrong" the ones after it. "first unnamed" is the first that no misconception fits, for which slips are run as well; "unnamed" the
ones after it. `--check` exits 1 if a right check that trains nothing takes over a second.
"""
import argparse
import statistics
import sys
import time

import torch

from autograder import exercise, judge, render

TRAINS = {"train_flow", "bonus_study"}


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repetition instead of five")
    parser.add_argument("--check", action="store_true", help="exit 1 if a right check that trains nothing takes over a second")
    options = parser.parse_args()
    torch.set_num_threads(1)
    repetitions, slow = 1 if options.quick else 5, []
    print(f"{'exercise':20s} {'right':>8s} {'answer':>8s} {'first wrong':>12s} {'wrong':>8s} {'first unnamed':>14s} {'unnamed':>8s}   seconds, median of {repetitions}")
    for name, e in exercise.registry().items():
        answers = judge.bank(e, 0)
        mistake = e.misconceptions[-1]

        def check(objects):
            arrays = e.probe(objects, answers.inputs)
            judge.judge(e, 0, arrays)
            render.picture(e, answers, arrays)

        check(e.reference())
        right = statistics.median(seconds(lambda: check(e.reference())) for _ in range(repetitions))
        answer = statistics.median(seconds(lambda: e.probe(e.reference(), answers.inputs)) for _ in range(repetitions))
        first = seconds(lambda: check(mistake.make()))
        wrong = statistics.median(seconds(lambda: check(mistake.make())) for _ in range(repetitions))
        strange = {k: 1.01 * v if v.dtype.kind == "f" else v for k, v in e.probe(mistake.make(), answers.inputs).items()}
        unnamed = [seconds(lambda: judge.judge(e, 0, strange)) for _ in range(1 + repetitions)]
        print(f"{name:20s} {right:8.2f} {answer:8.2f} {first:12.2f} {wrong:8.2f} {unnamed[0]:14.2f} {statistics.median(unnamed[1:]):8.2f}", flush=True)
        if right > 1 and name not in TRAINS:
            slow.append(f"{name}: a right check takes {right:.2f} s, over 1 s")
    if options.check and slow:
        print("\n".join(slow))
        sys.exit(1)


if __name__ == "__main__":
    main()
