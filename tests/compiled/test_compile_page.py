"""The code of docs/compile.md runs, in its order, and prints what it says."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parent.parent.parent / "docs" / "compile.md"


def test_the_code_of_the_page(capsys, monkeypatch):
    """With another backend, since inductor takes minutes."""
    compiler, in_place = torch.compile, torch.nn.Module.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compiler(*a, **{"backend": "aot_eager", **k}))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: in_place(m, backend="aot_eager"))
    space = {"__name__": "__main__"}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), space)
    printed = capsys.readouterr().out.splitlines()
    assert "compile" not in printed[0]
    assert "compiles at its next call what is new to it" in printed[1] and re.search(
        r"compiled again in \d", printed[2]
    )
    assert float(printed[3]) > 0
    assert re.match(r"prepared Duplicate\('blocks', by=1\): 1 graph compiled, \d", printed[4])
    assert printed[5] == "0.0"
