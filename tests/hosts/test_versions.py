"""Which versions of a host bring the warning that they were not tested."""

import importlib
import sys
import warnings

import pytest

from auxin.hosts.common import warn_untested


@pytest.mark.parametrize("version", ["4.56.3", "5.25.0.dev0", "6.0", "5.100.1"])
def test_outside_of_what_was_tested(version: str) -> None:
    with pytest.warns(UserWarning, match=f"tested with transformers 4.57 to 5.24, and {version} is installed: check"):
        warn_untested("transformers", version, "4.57", "5.24")


@pytest.mark.parametrize("version", ["4.57.0", "4.60", "5.0.0rc1", "5.24.9"])
def test_inside(version: str, recwarn: pytest.WarningsRecorder) -> None:
    warn_untested("transformers", version, "4.57", "5.24")
    assert not recwarn.list


@pytest.mark.parametrize("host", ["accelerate", "transformers"])
def test_the_tests_themselves_are_run_on_tested_versions(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(host)
    monkeypatch.delitem(sys.modules, f"auxin.hosts.{host}", raising=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="auxin.hosts was tested with")
        importlib.import_module(f"auxin.hosts.{host}")
