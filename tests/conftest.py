"""The stages are scripts at the top of the project: let tests import them, and run them as a user does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"  # `make test` sets it up
sys.path.insert(0, str(ROOT))


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="leave out the tests that load a model")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: loads a model or runs the Makefile; `make test PYTEST=--quick` leaves it out")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="--quick"))


@pytest.fixture
def script(tmp_path):
    """script("stage1_sample.py", "--help") runs a stage in an empty folder; environment variables by keyword."""
    def run(name, *arguments, **environment):
        return subprocess.run([sys.executable, ROOT / name, *map(str, arguments)], cwd=tmp_path, text=True,
                              capture_output=True, env=os.environ | environment, timeout=600)
    return run


@pytest.fixture(scope="session")
def engine():
    """The packaged model in a real vLLM in this process."""
    from common import LocalEngine
    return LocalEngine(str(MODEL), 2048, 0)
