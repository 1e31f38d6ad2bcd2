"""`pytest benchmarks/`: options, the cases as tests, and what is said at the end.

    pytest benchmarks/ --quick --suites ops,block --benchmark-json bench.json

pytest-benchmark's own options work: a case is a group, its implementations are held against each other there.
"""

import os
import sys
from pathlib import Path

import pytest

import stdit_fast  # noqa: F401 (loaded from the path that is left below)

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def leave_path() -> None:
    """Takes the checkout off the path, onto which pytest puts it anew for each file.

    There `kernels` would stand for a package of that name, which transformers looks for. Ours is stdit_fast.kernels,
    found through stdit_fast, which is loaded.
    """
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


leave_path()

import torch  # noqa: E402

from stdit_fast.benchmarks import registry, session  # noqa: E402
from stdit_fast.errors import ConfigError  # noqa: E402


def pytest_addoption(parser):
    group = parser.getgroup("stdit_fast")
    group.addoption("--quick", action="store_true", help="one size of each, fewer repeats")
    group.addoption("--suites", help=f"some of {','.join(registry.SUITES)}, with commas between")
    group.addoption("--records", help="append our own records to this .jsonl file, too")


def pytest_configure(config):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # small cases, whose threads would wait for each other wherever else something runs
    config._stdit_fast = session.Session(device, config.option.records)


def pytest_generate_tests(metafunc):
    if "implementation" not in metafunc.fixturenames:
        return
    leave_path()
    bench, quick = metafunc.config._stdit_fast, metafunc.config.option.quick
    try:
        suites = registry.select(metafunc.config.option.suites)
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from None
    params = []
    for suite in suites:
        cases = list(registry.cases_of(suite, bench.device, quick))
        bench.left_out(suite, cases, quick)
        for case in cases:
            clock = bench.clock(case)
            mark = pytest.mark.benchmark(group=f"{suite}: {case.name}", timer=clock, disable_gc=True)
            params += [
                pytest.param(case, name, id=f"{suite}-{case.name}-{name}", marks=mark) for name in case.implementations
            ]
    metafunc.parametrize("case, implementation", params)


@pytest.fixture
def bench(request) -> session.Session:
    found = request.config._stdit_fast
    found.begin()
    return found


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(config._stdit_fast.machine())


def pytest_terminal_summary(terminalreporter, config):
    for line in config._stdit_fast.lines():
        terminalreporter.write_line(line)
