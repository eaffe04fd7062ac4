"""The pipeline killed at random moments (tests/kill.py, by hand with more kills and notebooks)."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_ends_like_one_that_is_not():
    script = Path(__file__).with_name("kill.py")
    done = subprocess.run([sys.executable, script, "--kills", "3", "--notebooks", "00", "40"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 kills in" in done.stdout
