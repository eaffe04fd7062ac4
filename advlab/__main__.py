"""`python -m advlab run [NOTEBOOKS] --profile P --dataset D -p name=value`: run the series."""

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
    train = commands.add_parser("train", help="train classifiers of the series into the cache; under torchrun, on several GPUs at once")
    train.add_argument("roles", nargs="*", default=["target", "adversarial"], help="roles of advlab.zoo; target and adversarial by default")
    train.add_argument("--profile", default="quick")
    train.add_argument("--dataset", help="a data set instead of the profile's own")
    train.add_argument("-p", dest="given", metavar="NAME=VALUE", action="append", default=[], help="a parameter of notebook 00, such as seed=1")
    commands.add_parser("list", help="the notebooks and their parameters")
    commands.add_parser("readme", help="make the README's tables from the committed results files")
    options = parser.parse_args(arguments)

    from advlab import series
    from advlab.data import DataError

    try:
        if options.command == "list":
            for name in series.names():
                print(name, *(f"  {key} = {value!r}" for key, value in series.parameters(name).items()), sep="\n")
            return 0
        if options.command == "readme":
            from advlab import readme

            readme.refresh()
            return 0
        if options.command == "train":
            from advlab import zoo

            zoo.prepare(options.roles, options.profile, options.dataset, dict(map(assignment, options.given)))
            return 0
        series.run(options.notebooks, profile=options.profile, dataset=options.dataset, given=dict(map(assignment, options.given)),
                   refresh=options.refresh)
    except (series.SeriesError, DataError) as error:
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
