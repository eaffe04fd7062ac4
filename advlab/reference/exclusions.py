"""What a profile may lack, as data: `exclusions.csv`, a row an exhibit. A module of its own, so that an edit of that list makes the ledger stale and
not the measurements (advlab.pipeline.sources)."""

from advlab import reference


def listed() -> list[dict]:
    """Every entry: exhibit, profile and the reason. A test wants every gap here, and nothing else."""
    return reference.read("exclusions.csv")
