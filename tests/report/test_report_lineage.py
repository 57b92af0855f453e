"""A layer keeps its identity while its name moves."""

import random

from auxin.report.lineage import read_layers
from auxin.report.run import Moment, Run, read_growth
from auxin.report.source import add_entries


def entry(step: int, added: dict, renamed: dict | None = None, **changes) -> dict:
    return {
        "edit": {"type": "auxin:Duplicate", "at": "blocks"},
        "at": {"optimizer_steps": step},
        "added": [{"path": path, "from": source} for path, source in added.items()],
        "renamed": renamed or {},
        **changes,
    }


def read_growths(journal: list[dict]) -> list:
    run = Run()
    add_entries(run, journal)
    return run.growths


def rows(journal: list[dict]) -> list[tuple]:
    """(path, source, growth number or 0) of each layer."""
    layers = read_layers(read_growths(journal))
    return [(layer.path, layer.source, layer.birth.number if layer.birth else 0) for layer in layers]


def test_appended_blocks() -> None:
    journal = [entry(10, {"blocks.2": "blocks.1"}), entry(20, {"blocks.3": "blocks.2"})]
    assert rows(journal) == [
        ("blocks.0", None, 0),
        ("blocks.1", None, 0),
        ("blocks.2", "blocks.1", 1),
        ("blocks.3", "blocks.2", 2),
    ]


def test_interleaved_copies_are_named_by_sources_before_the_growth() -> None:
    journal = [
        entry(
            10,
            {"blocks.1": "blocks.0", "blocks.3": "blocks.1", "blocks.5": "blocks.2"},
            {"blocks.1": "blocks.2", "blocks.2": "blocks.4"},
        )
    ]
    assert rows(journal) == [
        ("blocks.0", None, 0),
        ("blocks.1", "blocks.0", 1),
        ("blocks.2", None, 0),
        ("blocks.3", "blocks.2", 1),
        ("blocks.4", None, 0),
        ("blocks.5", "blocks.4", 1),
    ]


def test_a_name_that_is_used_again_is_another_layer() -> None:
    journal = [
        entry(10, {"blocks.1": "blocks.0"}),
        entry(20, {"blocks.1": "blocks.0"}, {"blocks.1": "blocks.2"}),
        entry(30, {"blocks.2": "blocks.1"}, {"blocks.2": "blocks.3"}),
    ]
    assert rows(journal) == [
        ("blocks.0", None, 0),
        ("blocks.1", "blocks.0", 2),
        ("blocks.2", "blocks.1", 3),
        ("blocks.3", "blocks.0", 1),
    ]
    assert [layer.born_as for layer in read_layers(read_growths(journal))] == [
        "",
        "blocks.1",
        "blocks.2",
        "blocks.1",
    ]


def test_renames_by_tensor_and_by_parent() -> None:
    by_tensor = [
        entry(10, {"blocks.1": "blocks.0"}),
        entry(20, {"blocks.1": "blocks.0"}, {"blocks.1.fc.weight": "blocks.2.fc.weight"}),
    ]
    assert rows(by_tensor)[2] == ("blocks.2", "blocks.0", 1)
    by_parent = [entry(10, {"net.blocks.1": None}), entry(20, {}, {"net": "inner.net"})]
    assert rows(by_parent) == [("inner.net.blocks.0", None, 0), ("inner.net.blocks.1", None, 1)]


def test_a_container_at_the_top_and_names_without_index() -> None:
    assert rows([entry(1, {"2": "1"}, {"2": "3"})]) == [
        ("0", None, 0),
        ("1", None, 0),
        ("2", "1", 1),
        ("3", None, 0),
    ]
    assert rows([entry(1, {"head._grown": None})]) == [("head._grown", None, 1)]


def test_a_chain_of_copies_within_one_growth() -> None:
    assert rows([entry(1, {"blocks.1": "blocks.0", "blocks.2": "blocks.1"})]) == [
        ("blocks.0", None, 0),
        ("blocks.1", "blocks.0", 1),
        ("blocks.2", "blocks.1", 1),
    ]


def test_a_removed_layer_ends() -> None:
    journal = [
        entry(1, {"blocks.2": "blocks.1"}),
        entry(2, {}, {"blocks.2": "blocks.1"}, edit={"type": "auxin.edits:Remove", "at": "blocks.1"}),
    ]
    layers = read_layers(read_growths(journal))
    assert [(layer.path, layer.death.number if layer.death else 0) for layer in layers] == [
        ("blocks.0", 0),
        ("blocks.1", 0),
        ("blocks.1", 2),
    ]
    assert layers[1].birth is not None and layers[2].birth is None


def test_any_order_of_insertions_agrees_with_a_plain_list() -> None:
    """The slow twin: real objects in a list, renamed by where they stand."""
    for seed in range(50):
        random_ = random.Random(seed)
        blocks: list[dict] = [{"birth": 0, "source": None} for _ in range(random_.randint(1, 4))]
        journal = []
        for number in range(1, random_.randint(2, 7)):
            old = {id(block): f"blocks.{place}" for place, block in enumerate(blocks)}
            added = []
            for source in random_.sample(blocks, random_.randint(1, len(blocks))):
                block = {"birth": number, "source": source}
                blocks.insert(random_.randint(0, len(blocks)), block)
                added.append(block)
            new = {id(block): f"blocks.{place}" for place, block in enumerate(blocks)}
            renamed = {path: new[key] for key, path in old.items() if new[key] != path}
            journal.append(entry(10 * number, {new[id(b)]: old[id(b["source"])] for b in added}, renamed))
        names = {id(block): f"blocks.{place}" for place, block in enumerate(blocks)}
        known = {row[0]: row for row in rows(journal)}
        for block in blocks:
            path = names[id(block)]
            source = names[id(block["source"])] if block["source"] else None
            assert known[path] == (path, source, block["birth"])
        assert len(known) == len(blocks)


def test_steps_are_calls_where_no_optimizer_stepped() -> None:
    journal = [{"at": {"calls": 3, "optimizer_steps": 0}}, {"at": {"calls": 8, "optimizer_steps": 0}}]
    assert [growth.at.step for growth in read_growths(journal)] == [3.0, 8.0]
    journal[1]["at"]["optimizer_steps"] = 80
    assert [growth.at.step for growth in read_growths(journal)] == [0.0, 80.0]


def undone(number: int) -> dict:
    return {"undone": number}


def log_of(*events: dict) -> list[tuple]:
    """(path, source, growth, alive) of each layer, after entries and {"undone": number}."""
    run = Run()
    for event in events:
        if "undone" in event:
            growth = run.growths[event["undone"] - 1]
            growth.undone = Moment(99.0)
            continue
        run.growths.append(read_growth(event, len(run.growths) + 1, Moment(10.0 * len(run.growths))))
    layers = read_layers(run.growths)
    return [(layer.path, layer.source, layer.birth.number if layer.birth else 0, layer.living) for layer in layers]


def test_an_undone_growth_leaves_names_as_before_it() -> None:
    first = entry(10, {"blocks.1": "blocks.0"})
    middle = entry(20, {"blocks.1": "blocks.0"}, {"blocks.1": "blocks.2"})
    assert log_of(first, middle, undone(2)) == [
        ("blocks.0", None, 0, True),
        ("blocks.1", "blocks.0", 1, True),
        ("blocks.1", "blocks.0", 2, False),
    ]
    last = entry(30, {"blocks.2": "blocks.1"})
    assert log_of(first, middle, undone(2), last) == [
        ("blocks.0", None, 0, True),
        ("blocks.1", "blocks.0", 1, True),
        ("blocks.1", "blocks.0", 2, False),
        ("blocks.2", "blocks.1", 3, True),
    ]


def test_an_undone_removal_brings_the_layer_back() -> None:
    first = entry(10, {"blocks.2": "blocks.1"})
    removal = entry(20, {}, {"blocks.2": "blocks.1"}, edit={"type": "auxin.edits:Remove", "at": "blocks.1"})
    assert log_of(first, removal, undone(2)) == [
        ("blocks.0", None, 0, True),
        ("blocks.1", None, 0, True),
        ("blocks.2", "blocks.1", 1, True),
    ]


def test_random_growths_and_ways_back_agree_with_a_plain_list() -> None:
    """The slow twin again, with undone growths among the others."""
    for seed in range(60):
        random_ = random.Random(seed)
        blocks: list[dict] = [{"birth": 0, "source": None} for _ in range(random_.randint(1, 3))]
        events, everyone = [], list(blocks)
        for number in range(1, random_.randint(3, 8)):
            before = list(blocks)
            old = {id(block): f"blocks.{place}" for place, block in enumerate(blocks)}
            block = {"birth": number, "source": random_.choice(blocks)}
            blocks.insert(random_.randint(0, len(blocks)), block)
            everyone.append(block)
            new = {id(block): f"blocks.{place}" for place, block in enumerate(blocks)}
            renamed = {path: new[key] for key, path in old.items() if new[key] != path}
            events.append(entry(10 * number, {new[id(block)]: old[id(block["source"])]}, renamed))
            if random_.random() < 0.4:
                events.append(undone(number))
                blocks = before
        alive = {f"blocks.{place}": block["birth"] for place, block in enumerate(blocks)}
        rows = log_of(*events)
        known = {path: birth for path, _, birth, living in rows if living}
        assert {path: known.get(path, 0) for path in alive} == alive
        grown = sorted(block["birth"] for block in everyone if block["birth"])
        assert sorted(birth for *_, birth, _ in rows if birth) == grown


def test_widths_and_the_layers_that_did_not_grow() -> None:
    shapes = {
        "model.embed.weight": (1000, 16),
        "model.layers.0.norm.weight": (16,),
        "model.layers.0.up.weight": (64, 16),
        "model.layers.0.down.weight": (16, 64),
        "model.layers.1.up.weight": (32, 16),
        "model.norm.weight": (16,),
        "lm_head.proj.weight": (1000, 16),
        "scale": (),
    }
    growths = read_growths([entry(1, {"model.layers.1": "model.layers.0"})])
    assert [(layer.path, layer.units) for layer in read_layers(growths, shapes)] == [
        ("model.embed", 1000),
        ("model.layers.0", 64),
        ("model.layers.1", 32),
        ("model.norm", 16),
        ("lm_head", 1000),
    ]
    assert [layer.path for layer in read_layers([], shapes)] == ["model", "lm_head"]
