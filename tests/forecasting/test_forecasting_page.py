"""The code of docs/forecasting.md runs, in its order; that of a library only where the library is."""

import re
import sys
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "forecasting.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["torch", "neuralforecast", "darts"])
def test_the_code_runs(library, tmp_path, monkeypatch):
    pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    torch.manual_seed(0)
    namespace = {"__name__": "__main__"}
    monkeypatch.setitem(sys.modules, "__main__", type(sys)("__main__"))
    for code in (BLOCKS[0], *(block for block in BLOCKS[1:] if f"from {library} import" in block)):
        exec(compile(code, str(PAGE), "exec"), namespace)


def test_every_block_has_its_library():
    assert [sum(f"from {name} import" in block for block in BLOCKS) for name in ("neuralforecast", "darts")] == [1, 1]
    assert len(BLOCKS) == 3
