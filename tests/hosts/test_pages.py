"""The pages about hosts run, as they stand there: the two how-tos, and the page of what goes wrong, by section."""

import re
from pathlib import Path
from typing import Any

import accelerated
import pytest
import torch
import trainers
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import auxin as ax

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs" / "hosts"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def one_accelerator() -> None:
    AcceleratorState._reset_state(True)


def sections(name: str) -> dict[str, str]:
    """Title -> text of the sections of a page that have code."""
    parts = re.split(r"^## (.*)$", (DOCS / name).read_text(), flags=re.MULTILINE)
    return {title: text for title, text in zip(parts[1::2], parts[2::2], strict=True) if BLOCK.search(text)}


def run(text: str, name: str, **given: object) -> dict[str, Any]:
    """Carry out the code of a text; what it has defined."""
    namespace: dict[str, Any] = {"__name__": "__main__", **given}
    for found in BLOCK.finditer(text):
        line = text.count("\n", 0, found.start(1))
        exec(compile("\n" * line + found[1], name, "exec"), namespace)
    return namespace


def of_readme(host: str) -> str:
    """The block of the README that is about a host."""
    code = [
        found[0] for found in BLOCK.finditer((ROOT / "README.md").read_text()) if f"auxin.hosts.{host} " in found[1]
    ]
    assert len(code) == 1
    return code[0]


@pytest.mark.parametrize("page", ["transformers.md", "accelerate.md"])
def test_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run((DOCS / page).read_text(), page)


@pytest.mark.parametrize("title", ["In the Hugging Face Trainer", "Under Accelerate"])
def test_what_goes_wrong_without_it(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(sections("without.md")[title], f"without.md, {title}")


def test_the_readme_on_the_trainer(tmp_path: Path) -> None:
    model, batch = trainers.llama(), trainers.PROBE
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=24, eval_strategy="steps", eval_steps=3, report_to=[], disable_tqdm=True, use_cpu=True
    )
    given = {"transformers": transformers, "ax": ax, "data": trainers.TRAIN, "held_out": trainers.TEST}
    found = run(of_readme("transformers"), "README.md", model=model, batch=batch, args=args, **given)
    assert found["callback"].grower.calls == 8 and found["trainer"].model is model


def test_the_readme_on_accelerate() -> None:
    accelerator, model = Accelerator(cpu=True), accelerated.Net()
    opt = torch.optim.AdamW(model.parameters())
    sched = torch.optim.lr_scheduler.StepLR(opt, 3)
    parts = {"accelerator": accelerator, "model": model, "opt": opt, "sched": sched, "loader": [], "ax": ax}
    found = run(of_readme("accelerate"), "README.md", batch=accelerated.X, **parts)
    grown = [found["grower"].step(1.0) for _ in range(5)][-1]
    assert grown is not None and len(found["model"].blocks) == 2


def test_the_readme_on_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lightning = pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = accelerated.Net(depth=1).blocks

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

        def training_step(self, batch: Any) -> torch.Tensor:
            return self(batch).square().mean()

        def validation_step(self, batch: Any) -> None:
            self.log("val_loss", self(batch).square().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    loader = torch.utils.data.DataLoader(torch.randn(4, 16), batch_size=4)
    given = {"lightning": lightning, "ax": ax, "module": Module(), "train_loader": loader, "val_loader": loader}
    found = run(of_readme("lightning"), "README.md", **given)
    assert found["callback"].grower.calls >= 19 and len(found["module"].blocks) > 1
