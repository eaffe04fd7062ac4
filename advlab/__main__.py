"""`python -m advlab run [NOTEBOOKS] --profile P --dataset D -p name=value` runs the series, `audit package.module:builder` attacks a defence."""

import argparse
import ast
import sys


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m advlab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute notebooks with papermill")
    run.add_argument("notebooks", nargs="*", help="numbers (01), names or files; all of them when none is named")
    run.add_argument("--profile", default="quick", help="smoke, quick (default), standard or paper")
    run.add_argument("--dataset", help="a data set instead of the profile's own")
    run.add_argument("-p", dest="given", metavar="NAME=VALUE", action="append", default=[], help="a parameter; VALUE is a literal or a string")
    run.add_argument("--refresh", action="store_true", help="put the outputs into the committed notebooks")
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

    from advlab import series
    from advlab.audit import AuditError
    from advlab.data import DataError

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
        series.run(options.notebooks, profile=options.profile, dataset=options.dataset, given=dict(map(assignment, options.given)),
                   refresh=options.refresh)
    except (series.SeriesError, DataError, AuditError, FileNotFoundError) as error:
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
