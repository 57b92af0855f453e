"""The command ``auxin``."""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from auxin.demo.both import run_both
from auxin.demo.csv_file import read_csv
from auxin.demo.main import run_demo
from auxin.demo.more_compute import Setting
from auxin.demo.recipe import Recipe
from auxin.demo.screen import open_screen
from auxin.demo.series import DemoError
from auxin.errors import GrowthError
from auxin.report import Report
from auxin.version import __version__

_STATUS = "Exit status: 0 where all went well, 2 for a wrong argument, 130 where it was stopped,"
_EXAMPLES = """examples:
  auxin demo                          compare what grows with what does not
  auxin report run                    write run/report.html about Grower(log="run")
  auxin grow IN OUT --model train:build --edits edits.json
                                      grow the checkpoint of a run between two jobs
  auxin upscale IN OUT --blocks 4     write a deeper copy of a checkpoint
  auxin doctor train:build            try what can grow in a network of your own

exit status: 0 where all went well; 1 where the command was refused, and says why on one line; 2 for a wrong
argument; 130 where it was stopped. auxin COMMAND --help has the rest."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, by default that of the process; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 2
    if options.command == "upscale":
        return _upscale(options)
    if options.command == "grow":
        return _grow(options)
    if options.command == "doctor":
        return _doctor(options)
    if options.command == "verdict":
        return _verdict(options)
    return _report(options) if options.command == "report" else _demo(options, parser)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="auxin",
        description="Grow PyTorch networks while they train.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"auxin {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="demo | report | grow | upscale | doctor | verdict")
    demo = commands.add_parser(
        "demo",
        help="grow networks on real series and compare them with what does not grow",
        description="First a forecaster that is too small for the demand for electricity gets more compute: auxin "
        "judges whether to go on, to grow, or to start anew, and all three are run. Second a network starts at "
        "one block and grows by itself on the monthly series of the M3 competition, or on your own, beside fixed "
        "depths at equal training FLOPs.",
        epilog="examples: auxin demo; auxin demo --csv sales.csv --target sales --horizon 12 --season 12. "
        f"{_STATUS} 1 where data or directory do not fit.",
    )
    demo.add_argument("--out", type=Path, help="empty directory for the results; default runs/NAME-DATE-TIME")
    demo.add_argument("--seeds", type=_positive, default=3, help="runs of each kind (default 3)")
    demo.add_argument("--full", action="store_true", help="with four times the additional compute too, for electricity")
    demo.add_argument("--quick", action="store_true", help="a smoke test: a fiftieth of the budget, one seed")
    own = demo.add_argument_group("your own series")
    own.add_argument("--csv", type=Path, metavar="FILE", help="a CSV file with a header, rows in the order of time")
    own.add_argument("--target", metavar="COLUMN", help="the column to forecast")
    own.add_argument("--horizon", type=_positive, metavar="N", help="how many values ahead")
    own.add_argument("--season", type=_positive, default=1, metavar="N", help="values per season, 12 for months")
    own.add_argument("--id", metavar="COLUMN", help="the column that tells several series apart")
    report = commands.add_parser(
        "report",
        help="write a page about a run",
        description="One HTML page about a run that kept a log or a checkpoint: loss, layers, parameters, decisions. "
        "It needs no network and no other file.",
        epilog=f"example: auxin report run --out page.html. {_STATUS} 1 where nothing can be read or written.",
    )
    report.add_argument("run", type=Path, metavar="RUN", help="directory of the log, or of checkpoints")
    report.add_argument("--json", action="store_true", help="print the growths and the verdict as plain data; no page")
    report.add_argument("--out", type=Path, metavar="FILE", help="where to write it; default RUN/report.html")
    _add_grow(commands)
    _add_upscale(commands)
    doctor = commands.add_parser(
        "doctor",
        help="try what can grow in a network of your own",
        description="Builds your network, tries each kind of growth on it, takes all of it back, and says what works "
        "and what to write.",
        epilog="example: auxin doctor train:build, where build() returns (model, optimizer, x). Exit status: 0 where "
        "something grows and all beside the network follows, 1 where not, 2 where there is nothing to try.",
    )
    doctor.add_argument("place", metavar="MODULE:FACTORY", help="returns the model, what hangs on it, and a batch")
    doctor.add_argument("--json", action="store_true", help="print plain data")
    _add_verdict(commands)
    return parser


def _add_verdict(commands: Any) -> None:
    verdict = commands.add_parser(
        "verdict",
        help="judge what to do with more compute: go on, grow, or start anew",
        description="Builds your trained network, tries each way in short pilots that cost a tenth of the budget at "
        "most, takes all of it back, and says which way ends lowest, by how much, and how sure. The exit status "
        "is 0 where one way is named, 1 where no difference is sure, 2 where there is nothing to judge.",
        epilog="example: auxin verdict train:judge, where judge() returns (model, optimizer, {'edits': ..., 'anew': "
        "..., 'evidence': ..., 'budget': ...}), the arguments of auxin.verdict",
    )
    verdict.add_argument("place", metavar="MODULE:FACTORY", help="returns the arguments of auxin.verdict")
    verdict.add_argument("--budget", type=float, metavar="FLOPS", help="in place of that which the factory returns")
    verdict.add_argument("--json", action="store_true", help="print plain data")


def _add_grow(commands: Any) -> None:
    grow = commands.add_parser(
        "grow",
        help="write the checkpoint of a run as it would be had the run grown",
        description="Growth between two jobs: network, optimizers, schedules, averages and journal of a checkpoint of "
        "auxin.save grow as in a run that goes on, one tensor in memory at a time, on the CPU. The exit status is 0 "
        "where OUT is written, 1 where something is refused, and then there is no OUT.",
        epilog="example: auxin grow run/last run/deeper --model train:build --edits edits.json, where build() returns "
        'the Grower and edits.json holds [{"type": "Duplicate", "at": "blocks", "by": 1}]',
    )
    grow.add_argument("source", type=Path, metavar="IN", help="directory of auxin.save, or one checkpoint in it")
    grow.add_argument("target", type=Path, metavar="OUT", help="directory that does not exist yet, or is empty")
    grow.add_argument("--model", required=True, metavar="MODULE:FACTORY", help="returns the Grower that loads IN")
    grow.add_argument("--edits", required=True, type=Path, metavar="FILE", help="JSON: a list of edits")
    grow.add_argument("--dry-run", action="store_true", help="grow, print what changes, write nothing")


def _add_upscale(commands: Any) -> None:
    upscale = commands.add_parser(
        "upscale",
        help="write a deeper or wider copy of a Hugging Face checkpoint",
        description="Depth up-scaling of a saved Hugging Face checkpoint: blocks are copied on disk, the configuration "
        "follows, and plain transformers opens the result. By default the copies start as the identity, so that the "
        "deeper model computes the same as IN. With --ffn or --heads every block gets wider instead, and the model "
        "computes the same too.",
        epilog=f"example: auxin upscale llama llama-deeper --blocks 4. {_STATUS} 1 where it is refused; nothing is "
        "written then.",
    )
    upscale.add_argument("source", type=Path, metavar="IN", help="directory with config.json and safetensors")
    upscale.add_argument("target", type=Path, metavar="OUT", help="directory that does not exist yet, or is empty")
    upscale.add_argument(
        "--blocks",
        type=_positive,
        metavar="N",
        help="how many blocks more (default: as many again; solar: half as many)",
    )
    upscale.add_argument(
        "--order",
        type=_order,
        default="interleave",
        metavar="ORDER",
        help="interleave (AABB), stack (ABAB), middle, solar, or the old block of every position: 0,0,1,1",
    )
    upscale.add_argument(
        "--output",
        choices=("zero", "keep"),
        default="zero",
        help="zero: the copies' last writers are zeroed (default); keep: copies as they are",
    )
    upscale.add_argument(
        "--at", metavar="NAME", help="the list, as the files name it: model.layers; where it is not clear"
    )
    upscale.add_argument("--ffn", type=_more, metavar="+N", help="how many units more in every feed-forward layer")
    upscale.add_argument("--heads", type=_more, metavar="+N", help="how many heads of attention more in every block")
    upscale.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")


def _report(options: argparse.Namespace) -> int:
    try:
        report = Report.read(options.run)
        if options.json:
            print(json.dumps(report.to_json(), indent=1))
        else:
            print(report.write(options.out or options.run / "report.html"))
    except GrowthError as error:
        print(f"auxin report: {error}", file=sys.stderr)
        return 1
    return 0


def _trying(edit: str) -> None:
    """Beside what is piped."""
    print(f"trying {edit}", file=sys.stderr, flush=True)


def _doctor(options: argparse.Namespace) -> int:
    from auxin.doctor import examine, summoned  # on demand: the other commands do without
    from auxin.factory import from_here

    try:
        model, companions, batch = summoned(options.place)
        with from_here():  # a forward may import too
            found = examine(model, *companions, probe=batch, show=_trying)
    except GrowthError as error:
        print(f"auxin doctor: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found.to_json(), indent=1) if options.json else found)
    return 0 if found.works else 1


def _verdict(options: argparse.Namespace) -> int:
    from auxin.factory import from_here, made_by  # on demand: the other commands do without
    from auxin.verdict import SAME, verdict

    try:
        made = made_by(options.place, "verdict")
        if len(made) < 2 or not isinstance(made[-1], dict):
            raise GrowthError(
                f"verdict {options.place}: it returns ({', '.join(type(part).__name__ for part in made)}). Return the "
                "model, what hangs on it, and the further arguments of auxin.verdict as a dict at the end: (model, "
                "optimizer, {'edits': ..., 'anew': ..., 'evidence': ..., 'budget': ...})."
            )
        words = made[-1] if options.budget is None else {**made[-1], "budget": options.budget}
        if "budget" not in words:
            raise GrowthError(f"verdict {options.place}: how much compute is there? Return 'budget', or pass --budget.")
        with from_here():  # a forward may import too
            found = verdict(*made[:-1], **words)
    except GrowthError as error:
        print(f"auxin verdict: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found.to_json(), indent=1) if options.json else found)
    return 1 if found.winner == SAME else 0


def _grow(options: argparse.Namespace) -> int:
    from auxin.between_jobs import grow_checkpoint  # on demand: the other commands do without
    from auxin.factory import from_here, made_by

    screen = open_screen()
    try:
        with from_here():
            build, words = (lambda: made_by(options.model, "grow")), {"dry_run": options.dry_run, "show": screen.bar}
            print(grow_checkpoint(options.source, options.target, build, options.edits, **words))
        if not options.dry_run:
            print(f"{options.target} is written.")
    except GrowthError as error:
        screen.close()
        print(f"auxin grow: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        screen.close()
        print("auxin grow: stopped, nothing was left behind", file=sys.stderr)
        return 130
    finally:
        screen.close()
    return 0


def _upscale(options: argparse.Namespace) -> int:
    from auxin.upscale import plan_upscale, plan_wider, write_upscale  # on demand: the other commands do without

    screen = open_screen()
    try:
        source, target = options.source, options.target
        if options.ffn is None and options.heads is None:
            plan = plan_upscale(source, target, options.blocks, options.order, options.output, options.at)
        elif (options.blocks, options.order, options.output) != (None, "interleave", "zero"):
            raise GrowthError(
                "--ffn and --heads make blocks wider, --blocks, --order and --output the model deeper: do one, and "
                "then the other with its OUT as IN."
            )
        else:
            plan = plan_wider(source, target, options.ffn, options.heads, options.at)
        print(plan, flush=True)
        if not options.dry_run:
            write_upscale(plan, target, screen.bar)
            new = f"its new blocks are {', '.join(map(str, plan.new))}" if plan.new else "its blocks are wider"
            print(f"{target} is written; {new}.")
    except GrowthError as error:
        print(f"auxin upscale: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("auxin upscale: stopped, nothing was left behind", file=sys.stderr)
        return 130
    finally:
        screen.close()
    return 0


def _more(text: str) -> int:
    return _positive(text.removeprefix("+"))


def _order(text: str) -> str | tuple[int, ...]:
    parts = text.split(",")
    return tuple(map(int, parts)) if all(part.strip().isdecimal() for part in parts) else text


def _demo(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    given = [name for name in ("target", "horizon", "id") if getattr(options, name) is not None]
    if options.csv is None and given:
        parser.error(f"--{given[0]} belongs to --csv FILE")
    if options.csv is not None and options.full:
        parser.error("--full belongs to the demo without --csv")
    if options.csv is not None and (options.target is None or options.horizon is None):
        parser.error("--csv FILE needs --target COLUMN and --horizon N")
    screen = open_screen()
    try:
        name = "demo" if options.csv is None else options.csv.stem
        out = options.out or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
        seeds = 1 if options.quick else options.seeds
        recipe = Recipe().quick() if options.quick else Recipe()
        if options.csv is not None:
            own = read_csv(options.csv, options.target, options.horizon, options.season, options.id)
            run_demo(own, recipe, seeds, out, screen, {})
        else:
            setting = Setting().quick() if options.quick else Setting()
            run_both(setting, recipe, seeds, out, screen, options.full)
    except (DemoError, GrowthError) as error:
        screen.close()
        print(f"auxin demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        screen.close()
        print("auxin demo: stopped", file=sys.stderr)
        return 130
    return 0


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
