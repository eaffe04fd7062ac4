"""One torch thread a test process: `make test` runs one process a core, and two pools of threads on one core wait for each other.
Besides, the small network and its images on which the attacks' contract is tested."""

import pytest
import torch
from torch import nn

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 6)]
    return nn.Sequential(*body).eval()


@pytest.fixture(scope="module")
def batch(net):
    x = torch.rand(9, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    x[0] = (x[0] > 0.5).float()  # corners of the box
    return x, net(x).argmax(1)


def pytest_collection_modifyitems(items):
    """The longest test, which mostly waits, begins first: at the end one worker would run it alone."""
    items.sort(key=lambda item: item.path.name != "test_kill.py")


def pytest_terminal_summary(terminalreporter):
    """What tests have measured and not asserted, under xdist too."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            if name == "note" and report.when == "call":
                terminalreporter.write_line(f"{report.nodeid.split('::')[-1]}: {value}")
