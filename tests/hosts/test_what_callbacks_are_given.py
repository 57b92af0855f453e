"""What does not fit is told when a callback, or the Trainer that takes it, is built; a trigger serves run after run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lit import built, fit
from torch import nn
from trainers import growth, llama, trainer_of

import auxin as ax
from auxin.hosts.lightning import GrowthCallback as InLightning
from auxin.hosts.transformers import GrowthCallback as InTrainer

EDIT = ax.Duplicate("blocks", by=1)


@pytest.mark.parametrize("kind", [InLightning, InTrainer])
@pytest.mark.parametrize("edits", ["blocks", [3], ax.Duplicate])
def test_edits_that_are_none(kind: Any, edits: Any) -> None:
    with pytest.raises(
        ax.GrowthError, match=r"is a text, not an edit; write edits=auxin\.Dup|pass edits such as auxin"
    ):
        kind(edits, when=ax.when.every(1))


@pytest.mark.parametrize("kind", [InLightning, InTrainer])
def test_a_chooser_that_is_none(kind: Any) -> None:
    with pytest.raises(ax.GrowthError, match="choose=cycle is not a chooser yet"):
        kind(EDIT, when=ax.when.every(1), choose=ax.choose.cycle)


def test_companions_that_are_no_list() -> None:
    average = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))
    for one in (average, nn.Sequential(nn.Linear(2, 2)), torch.optim.SGD(average.module.parameters(), 0.1)):
        with pytest.raises(ax.GrowthError, match=r"pass a list, companions=\[average\]"):
            InTrainer(EDIT, ax.when.every(1), companions=one)
    with pytest.raises(
        ax.GrowthError, match=r"GrowthCallback\(companions=\.\.\.\): .* averages are found in the Trainer"
    ):
        InLightning(EDIT, ax.when.every(1), companions=[average])


def test_places_are_checked_where_the_trainer_is_built(tmp_path: Path) -> None:
    with pytest.raises(ax.GrowthError, match="has no child 'layers'"):
        trainer_of(llama(), growth(edits=ax.Duplicate("layers", by=1)))
    with pytest.raises(ax.GrowthError, match="has no child 'layers'"):
        fit(built(), tmp_path, InLightning(ax.Duplicate("layers"), ax.when.every(1)), epochs=1)


@pytest.mark.parametrize(
    "words",
    [
        {"when": ax.when.plateau(mode="max")},
        {"when": ax.when.any_of(ax.when.at([2]), ax.when.plateau(mode="max"))},
        {"when": ax.when.at([2]), "probation": ax.Probation(mode="max")},
    ],
    ids=["trigger", "inside", "probation"],
)
def test_directions_are_checked_where_the_trainer_is_built(words: dict[str, Any]) -> None:
    with pytest.raises(ax.GrowthError, match=r"eval_loss is better when it is smaller.*Pass mode='min' to "):
        trainer_of(llama(), growth(**words), load_best_model_at_end=True, metric_for_best_model="loss")


def test_a_refused_growth_does_not_end_a_training(tmp_path: Path) -> None:
    refused = ax.Insert("blocks", nn.Identity, index=9)
    callback = InLightning([refused, EDIT], ax.when.every(1), monitor="val_loss", on_refused="warn")
    module = built()
    with pytest.warns(UserWarning, match="was refused, and is not chosen any more"):
        fit(module, tmp_path, callback, epochs=4)
    assert callback.grower is not None and [edit for edit, _ in callback.grower.refused] == [refused]
    assert len(module.blocks) == 4


def test_a_trigger_that_is_built_once_serves_one_fit_after_the_other(tmp_path: Path) -> None:
    shared, depths = ax.when.every(2), []
    for seed in range(3):
        module = built()
        fit(module, tmp_path / str(seed), InLightning(EDIT, shared, monitor="val_loss"), epochs=4)
        depths.append(len(module.blocks))
    assert depths == [3, 3, 3]


def test_one_callback_in_one_trainer_after_the_other_begins_anew(tmp_path: Path) -> None:
    callback, depths = InLightning(EDIT, ax.when.plateau(patience=1, min_delta=9.0), monitor="val_loss"), []
    for seed in range(2):
        module = built()
        fit(module, tmp_path / str(seed), callback, epochs=4)
        depths.append(len(module.blocks))
    assert depths[0] == depths[1] > 2


def test_one_trigger_in_two_trainers(tmp_path: Path) -> None:
    shared, depths = ax.when.at([1, 3]), []
    for _ in range(2):
        trainer = trainer_of(llama(), growth(when=shared))
        trainer.train()
        depths.append(len(trainer.model.model.layers))
    assert depths == [4, 4]
