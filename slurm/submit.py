"""Queue a run: python slurm/submit.py PRESET --nodes N [job flags] run_dir=DIR data.corpus=DIR [key=value ...]

Checks the config, the layout, the corpus, the run folder and Slurm's limits first; then freezes config, code and
environment into the run folder and submits RUN_DIR/job/NNN/submit.sbatch. docs/slurm.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from engram_data.errors import CorpusError
from engram_megatron.errors import UsageError
from engram_megatron.jobs.batch_script import batch_script
from engram_megatron.jobs.options import add_options, job_options
from engram_megatron.jobs.submission import prepare
from engram_megatron.presets import preset_names
from engram_megatron.training.plan import describe

SITE = Path(__file__).with_name("site.toml")


def start() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("preset", metavar="PRESET", help=", ".join(preset_names()))
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="strict overrides of the preset")
    parser.add_argument("--resume", action="store_true", help="go on with the run in run_dir")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and the script, queue nothing")
    parser.add_argument("--site", type=Path, metavar="FILE", help="defaults of job flags, TOML (slurm/site.toml)")
    add_options(parser)
    arguments = parser.parse_intermixed_args()
    site = arguments.site or (SITE if SITE.exists() else None)
    options = job_options(arguments, site)
    submission = prepare(arguments.preset, arguments.overrides, options, resume=arguments.resume)
    if arguments.dry_run:
        print(describe(submission.config, options.world_size))
        print(*submission.counts.lines(), sep="\n")
        print(f"{submission.frozen.script}\n\n{batch_script(submission.job)}", end="")
        return
    job_ids = submission.submit()
    run_dir = submission.frozen.run_dir
    for line in submission.counts.lines():
        print(f"nodes        {line}")
    print(f"queued       {' '.join(job_ids)} ({submission.job.name})\nscript       {submission.frozen.script}")
    print(f"log          {run_dir}/logs/{job_ids[0]}.log\nlook at it   python slurm/status.py {run_dir}")


def main() -> int:
    try:
        start()
    except (UsageError, CorpusError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
