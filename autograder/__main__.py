"""The commands of the autograder: `python -m autograder grade SUBMITTED --out DIR` and `python -m autograder audit`."""
import argparse
import os
import signal
import sys
from collections import Counter


def main(args=None):
    parser = argparse.ArgumentParser(prog="python -m autograder", description="Grade a class, and audit the checks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    g = commands.add_parser("grade", help="grade a folder of submissions",
                            description="Grade SUBMITTED/<student>/<assignment>/<assignment>.ipynb. Leaves in DIR: gradebook.db and the rest of an nbgrader "
                                        "course, grades.csv, feedback/ and report.html. The same command goes on where an earlier one was cut off.")
    g.add_argument("submitted", metavar="SUBMITTED", help="the folder with one folder for each student")
    g.add_argument("--out", metavar="DIR", required=True, help="where the results go")
    g.add_argument("--release", metavar="DIR", default="lessons", help="the released notebooks, NN_topic.ipynb (default: lessons)")
    g.add_argument("--timeout", metavar="SECONDS", type=seconds, default=60, help="time limit of one cell (default: 60)")
    g.add_argument("--seed", metavar="N", type=natural, help="seed of the inputs (default: a fresh one for each DIR)")
    g.add_argument("--workers", metavar="N", type=seconds, help="processes that share the work (default: one a core)")
    g.add_argument("--cluster", metavar="ADDRESS", help="let the workers of this Dask scheduler do it")
    g.add_argument("--allow-unconfined", action="store_true", help="grade trusted submissions where code cannot be confined (not Linux)")
    g.add_argument("--only", metavar="STUDENT", help="grade this student alone")
    a = commands.add_parser("audit", help="measure how good the checks are",
                            description="Four figures for each exercise: wrong programs that lose points, those of them that are told what is wrong, "
                                        "right programs that lose points, and crashes under random answers. autograder/README.md says how to read them.")
    a.add_argument("exercises", metavar="EXERCISE", nargs="*", help="their ids (default: all)")
    a.add_argument("--out", metavar="DIR", help="leave audit.csv and audit.html there")
    a.add_argument("--fast", action="store_true", help="fewer pairs, seeds and random answers")
    options = parser.parse_args(args)

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: small nets are fastest on one thread
    if options.command == "audit":
        from autograder import audit

        try:
            return audit.main(options.exercises, options.out, options.fast)
        except ValueError as e:
            print(f"error: {e}", file=sys.stderr)
            return 1
    from autograder import grade

    for name in (signal.SIGTERM, signal.SIGHUP):    # a batch system's time limit, a closed terminal: an interrupt like any other
        signal.signal(name, signal.default_int_handler)
    try:
        rows = grade.grade(options.submitted, options.out, options.release, options.timeout, options.seed, options.only,
                           options.workers, options.cluster, options.allow_unconfined)
    except KeyboardInterrupt:
        print("\nInterrupted. What was graded is kept; the same command goes on from here.", file=sys.stderr)
        return 130
    except OSError as e:
        print(f"error: {e.filename or options.out}: {e.strerror or e}. What was graded is kept; the same command goes on from here.", file=sys.stderr)
        return 1
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    counts = Counter(row["status"] for row in rows)
    print(f"{len({r['student'] for r in rows})} students: " + ", ".join(f"{n} {status}" for status, n in counts.most_common()))
    print(f"{options.out}/report.html; the table is in grades.csv, a page for each student in feedback/, and gradebook.db is for formgrader")
    return 0


def seconds(text):
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"a whole number from 1 is expected, not {text}")
    return value


def natural(text):
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"a whole number from 0 is expected, not {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
