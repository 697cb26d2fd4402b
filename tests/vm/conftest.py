"""Tests that run inside a stock Debian kernel with the real module.

On the host each stands once for each kernel and takes its result from a guest
(testbed.vm_host); inside the guest it simply runs.
"""

import pytest
from testbed import vm


def pytest_configure(config: pytest.Config) -> None:
    """Take the side we are on."""
    if vm.IN_GUEST:
        from testbed.vm_guest import Guest

        config.pluginmanager.register(Guest(config), "vm-guest")
    else:
        from testbed.vm_host import Host

        config.pluginmanager.register(Host())


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One item for each kernel; in a guest, for the kernel it runs.

    Before pytest's own hook: or else which of the two comes first, and with it
    the order of the parameters in a node id, depends on the arguments pytest
    was given, and the guest would not know the ids that the host asks for.
    """
    metafunc.fixturenames.append("kernel")
    only = metafunc.definition.get_closest_marker("kernels")
    series = [vm.running_series()] if vm.IN_GUEST else only.args if only else vm.SERIES
    metafunc.parametrize("kernel", [_param(s) for s in series], indirect=True, scope="session")


def _param(series: str):  # type: ignore[no-untyped-def]  # pytest's type of it is private
    why = "" if vm.IN_GUEST else vm.why_not(series)
    return pytest.param(series, marks=pytest.mark.skip(reason=why) if why else ())


@pytest.fixture(scope="session")
def kernel(request: pytest.FixtureRequest) -> str:
    """The series of the kernel, as in testbed.vm.SERIES."""
    return str(request.param)
