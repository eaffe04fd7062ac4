# One rule a notebook: papermill executes it (python -m advlab step), and a stamp in runs/ says that its results are in place. `python -m advlab run`
# calls this with its options in `request`; run alone (snakemake -n), it stands for the whole quick series. Options of Snakemake: profiles/.
import json
import sys
from urllib.parse import unquote

from advlab import paths, pipeline, series

asked = {"wanted": [], "profile": "quick", "dataset": None, "given": {}, "threads": 1} | json.loads(unquote(config.get("request", "{}")))
profile = asked["profile"]
values_of = dict(series.plan(asked["wanted"], profile, asked["dataset"], asked["given"]))
root = paths.home() / "runs" / profile


workdir: root


def place(name, suffix):  # below the working directory, so that runs/ can be moved
    return str(pipeline.copy_of(name, profile, values_of[name]).with_suffix(suffix).relative_to(root))


# megabytes and minutes for the largest notebook of a profile; set-resources in a profile or on the command line changes them for one
MEMORY = {"smoke": 2000, "quick": 3000, "standard": 6000, "paper": 24000}
MINUTES = {"smoke": 30, "quick": 60, "standard": 360, "paper": 1440}


rule all:
    input: [place(name, ".done") for name in values_of]
    localrule: True


for name, values in values_of.items():

    rule:
        name: name
        input:
            notebook=ancient(local(str(paths.notebooks() / f"{name}.ipynb"))),
            earlier=[place(n, ".done") for n in pipeline.before(name, values_of)],
        output: place(name, ".done")
        log: place(name, ".ipynb")
        params:
            *pipeline.sources(name, profile),
            values=json.dumps(values),
        priority: pipeline.behind(name, values_of)
        threads: asked["threads"]
        resources:
            mem_mb=MEMORY.get(profile, 6000),
            runtime=MINUTES.get(profile, 360),
            gpu=int(profile == "paper"),  # the other profiles are made for processors
        shell: "{sys.executable:q} -m advlab step {rule} --profile {profile} --values {params.values:q} --stamp {output:q}"
