"""`python -m advlab run [NOTEBOOKS] --profile P --dataset D -p name=value` runs the series, `audit package.module:builder` attacks a defence."""

import argparse
import ast
import json
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    arguments, further = arguments[:cut], arguments[cut + 1:]
    parser = argparse.ArgumentParser(prog="python -m advlab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run the notebooks that are stale, with Snakemake and papermill; options after -- go to Snakemake")
    run.add_argument("notebooks", nargs="*", help="numbers (01), names or files; all of them when none is named")
    run.add_argument("--profile", default="quick", help="smoke, quick (default), standard or paper")
    run.add_argument("--dataset", help="a data set instead of the profile's own")
    run.add_argument("-p", dest="given", metavar="NAME=VALUE", action="append", default=[], help="a parameter; VALUE is a literal or a string")
    run.add_argument("--refresh", action="store_true", help="put the outputs into the committed notebooks")
    run.add_argument("-j", "--jobs", type=int, default=0, help="notebooks at a time (default: as many as fit the cores)")
    run.add_argument("--threads", type=int, default=1, help="threads of each notebook (default 1); results depend on it in the last digits")
    run.add_argument("-n", "--dry-run", action="store_true", help="list what is stale, and why")
    run.add_argument("--force", action="store_true", help="run the notebooks even if they are up to date")
    run.add_argument("--resume", action="store_true", help="after a run was killed: take its lock away, then run what it left")
    run.add_argument("--on", default="local", metavar="WHERE", help="local (default), slurm, cloud, or a folder with Snakemake's options")
    one = commands.add_parser("step", help="execute one notebook (what a rule of the Snakefile calls)")
    one.add_argument("name")
    one.add_argument("--profile", required=True)
    one.add_argument("--values", type=json.loads, required=True, help="JSON")
    one.add_argument("--stamp", type=Path, help="where the stamp goes besides runs/")
    train = commands.add_parser("train", help="train classifiers of the series into the cache; under torchrun, on several GPUs at once")
    train.add_argument("roles", nargs="*", default=["target", "adversarial"], help="roles of advlab.zoo; target and adversarial by default")
    train.add_argument("--profile", default="quick")
    train.add_argument("--dataset", help="a data set instead of the profile's own")
    train.add_argument("-p", dest="given", metavar="NAME=VALUE", action="append", default=[], help="a parameter of notebook 00, such as seed=1")
    commands.add_parser("list", help="the notebooks and their parameters")
    commands.add_parser("readme", help="make the README's tables from the committed results files")
    audit = commands.add_parser("audit", help="climb the ladder against a defence of yours: report in runs/audit/NAME")
    audit.add_argument("defence", metavar="package.module:builder", help="a function that returns the network, or a network; see advlab.audit")
    audit.add_argument("--data", default="skimage10", help="data set whose test images are attacked (default skimage10)")
    audit.add_argument("--profile", default="quick", choices=("smoke", "quick", "standard", "paper"), help="whose budget is spent")
    audit.add_argument("--n", type=int, help="test images, by default the profile's")
    audit.add_argument("--eps", type=float, default=8.0, help="budget, of 255 (linf) or in pixels of [0, 1] (l2); default 8")
    audit.add_argument("--norm", default="linf", choices=("linf", "l2"))
    audit.add_argument("--surrogates", nargs="*", default=["target", "adversarial"], help="roles of advlab.zoo to transfer from, trained at need")
    audit.add_argument("--name", help="of the report's folder, by default the builder's")
    for part in ("steps", "restarts", "samples", "queries"):
        audit.add_argument(f"--{part}", type=int, help=f"instead of the profile's {part}")
    pages = commands.add_parser("report", help="HTML pages of the executed notebooks, readable offline: runs/PROFILE/report/index.html")
    pages.add_argument("--profile", default="quick")
    options = parser.parse_args(arguments)

    from advlab import paths, pipeline, series

    try:
        if options.command == "list":
            for name in series.names():
                print(name, *(f"  {key} = {value!r}" for key, value in series.parameters(name).items()), sep="\n")
            return 0
        if options.command == "report":
            from advlab import html

            print(html.export(options.profile))
            return 0
        if options.command == "audit":
            from advlab import audit

            given = vars(options)
            audit.run(given["defence"], dataset=given["data"], **{k: given[k] for k in ("profile", "n", "eps", "norm", "surrogates", "name")},
                      spend={part: given[part] for part in ("steps", "restarts", "samples", "queries")})
            return 0
        if options.command == "readme":
            from advlab import readme

            readme.refresh()
            return 0
        if options.command == "train":
            from advlab import zoo

            zoo.prepare(options.roles, options.profile, options.dataset, dict(map(assignment, options.given)))
            return 0
        if options.command == "step":
            pipeline.step(options.name, options.profile, options.values, options.stamp)
            return 0
        pipeline.run(options.notebooks, profile=options.profile, dataset=options.dataset, given=dict(map(assignment, options.given)),
                     jobs=options.jobs, threads=options.threads, on=options.on, force=options.force, resume=options.resume, dry=options.dry_run,
                     refresh=options.refresh, further=further)
    except (paths.UserError, FileNotFoundError) as error:
        print(f"advlab: {error}", file=sys.stderr)
        return 1
    return 0


def assignment(text: str) -> tuple[str, object]:
    """name=value; the value is a literal where it reads as one, else a string."""
    from advlab.series import SeriesError

    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        raise SeriesError(f"-p takes name=value, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


if __name__ == "__main__":
    sys.exit(main())
