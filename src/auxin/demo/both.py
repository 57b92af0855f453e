"""The whole demo: more compute for a forecaster that is too small, then a network that grows by itself."""

from pathlib import Path

from auxin.demo.demand import load_demand
from auxin.demo.electricity import run_electricity
from auxin.demo.folder import prepare
from auxin.demo.main import run_demo
from auxin.demo.more_compute import Setting
from auxin.demo.recipe import Recipe
from auxin.demo.results import PUBLISHED
from auxin.demo.screen import Screen
from auxin.demo.series import load_m3


def run_both(setting: Setting, recipe: Recipe, seeds: int, out: Path, screen: Screen, full: bool = False) -> None:
    """Both parts, one after the other.

    Args:
        setting: of the first part.
        recipe: of the second one.
        seeds: runs of each kind.
        out: directory in which each part gets one of its own.
        screen: where to show it.
        full: run the first part with four times the additional compute too.

    Raises:
        DemoError: the directory cannot be written, or a package is missing; nothing has been trained then.
    """
    data, task = load_demand(), load_m3()
    prepare(out)
    run_electricity(data, setting, seeds, out / "electricity", screen)
    if full:
        run_electricity(data, setting.fuller(), seeds, out / "electricity-more", screen)
    run_demo(task, recipe, seeds, out / "m3", screen, PUBLISHED)
