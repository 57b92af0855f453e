"""The conformance table: edits x families x companions, each cell through ``auxin.testing.check``."""

from itertools import combinations

import families
import pytest
from cells import FAMILIES, LEVELS, PAIRED, SEVERAL, Cell, all_edits, daily, paired, pairs_of, product
from companions import OWN, make_companions, make_optimizers
from rows import REFUSED, rows

from auxin import GrowthError, Repeat, grow
from auxin.testing import Report, check


def run(cell: Cell, steps: int) -> Report:
    model = families.build(cell.family, **({"sparse": True} if cell.optimizer.startswith("SparseAdam") else {}))
    if cell.edit.startswith("untie"):
        grow(model, Repeat("blocks"))
    return check(
        model,
        rows(cell.family)[cell.edit],
        lambda model: make_optimizers(model, cell.optimizer, cell.groups),
        families.batch(cell.family),
        companions=lambda model, *opts: make_companions(model, list(opts), cell.schedule, cell.average, cell.scaler),
        group=OWN if cell.groups == "own" else None,
        steps=steps,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is test_cell:
        metafunc.parametrize("cell", daily(), ids=str)
    if metafunc.function is test_full_product:
        asked = metafunc.config.getoption("markexpr") == "conformance"
        cells = sorted({*product(), *daily()}) if asked else [Cell("mlp", "interleave")]
        metafunc.parametrize("cell", cells, ids=str)


def test_cell(cell: Cell) -> None:
    verify_report(cell, run(cell, steps=6))  # the last event of a schedule is in its seventh step


@pytest.mark.conformance
def test_full_product(cell: Cell) -> None:
    verify_report(cell, run(cell, steps=10))


def verify_report(cell: Cell, report: Report) -> None:
    """No check may have been left out without a reason that we know."""
    promised = not cell.edit.startswith(("keep", "by-hand", "re", "wake")) and not cell.edit.endswith(
        ("default", "kaiming", "xavier")
    )
    if cell.edit == "widen":  # sums over more entries round otherwise
        assert report.preserves and max(report.difference, report.train_difference) < 1e-6
    elif promised and cell.edit != "identity":
        assert report.preserves and report.difference == 0.0 and report.train_difference == 0.0
    assert not report.notes, report.notes


@pytest.mark.parametrize("name", REFUSED)
def test_post_norm_is_refused(name: str) -> None:
    model = families.build("encoder")
    opts = make_optimizers(model, "AdamW-foreach", "one")
    before = {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()}
    with pytest.raises(GrowthError, match="would run and change the function"):
        grow(model, REFUSED[name], *opts, probe=families.batch("encoder"))
    assert {n: id(p) for n, p in model.named_parameters()} == {n: i for n, (i, _) in before.items()}
    assert all((p == before[n][1]).all() for n, p in model.named_parameters())


@pytest.mark.parametrize("groups", SEVERAL)
def test_a_layer_of_a_kind_that_is_new_asks_for_its_group(groups: str) -> None:
    model, batch = families.build("tcn"), families.batch("tcn")
    opts, edit = make_optimizers(model, "AdamW-foreach", groups), rows("tcn")["after"]
    before = model.state_dict()
    asked = OWN if groups == "own" else None
    with pytest.raises(GrowthError, match="no trained parameter of the same role shows which of .* groups it belongs"):
        grow(model, edit, *opts, probe=batch, group=asked)
    assert model.state_dict().keys() == before.keys()
    grow(model, edit, *opts, probe=batch, group=1)
    new = {id(p) for n, p in model.named_parameters() if n not in before}
    assert new and new <= {id(p) for p in opts[0].param_groups[1]["params"]}


def test_the_table_is_whole() -> None:
    cells = daily()
    assert len(cells) <= 275
    assert {(c.family, c.edit) for c in all_edits()} <= {(c.family, c.edit) for c in cells}
    assert {c.family for c in cells} == set(FAMILIES)
    for field, levels in LEVELS.items():
        assert set(levels) <= {getattr(c, field) for c in cells}
    shown = set().union(*(pairs_of(c) for c in cells))
    wanted = {((a, x), (b, y)) for a, b in combinations(PAIRED, 2) for x in PAIRED[a] for y in PAIRED[b]}
    assert wanted - shown == {(("family", "gpt"), ("edit", "identity"))}  # an embedding in front: there is no such edit
    assert all(c.fits for c in paired(()))
