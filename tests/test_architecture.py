"""Rules of the house, kept as tests: sizes, who may write, what is imported, and the public names."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import auxin
from auxin import fsdp2

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "auxin"

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 80
MAX_PARAMETERS = 8
# The public doors may have more parameters than that, but only keyword-only ones.
DOORS = {("engine.py", "grow"), ("grower.py", "Grower.__init__")}

# The few hands that write to what the user owns.
WRITERS = (
    "engine.py",
    "surgery.py",
    "structure.py",
    "record.py",
    "fsdp2.py",
    "sharded.py",
    "follow/",
    "ramp.py",
    "trial.py",
    "checkpoint/",
)
OWNED = {"param_groups", "data"}
LIST_WRITES = {"append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort", "update"}

DEPENDENCIES = {"auxin", "torch", "safetensors"}
SHOWCASE = ("cli.py", "demo.py", "demo/", "report.py", "report/", "hosts/", "upscale/")

PUBLIC = """
After Change Dormant Duplicate Edit Evidence Grower GrowthError Insert Journal Limit Probation Remove Repeat Replace
Site Untie Wake Widen async_save auto candidates choose follow grow init load replay save schedule score sites surgery
testing verdict verify when
""".split()


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function below `tree` with its dotted name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
            yield from functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{prefix}{node.name}.")
        else:
            yield from functions(node, prefix)


def called(node: ast.AST) -> str:
    """The last part of the name that a call calls, or an empty string."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "id", "") or getattr(node.func, "attr", "")


def touches_owned(target: ast.AST) -> bool:
    """Whether `a.param_groups`, `a.data`, or anything reached through the first, stands on the left."""
    if isinstance(target, ast.Attribute) and ast.unparse(target) == "self.data":
        return False  # an attribute of our own
    if isinstance(target, ast.Attribute) and target.attr in OWNED:
        return True
    through = [n for n in ast.walk(target) if isinstance(n, ast.Attribute) and n.attr == "param_groups"]
    return bool(through) and isinstance(target, ast.Subscript | ast.Attribute)


def writes(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of everything that writes to `param_groups`, `.data` or by `setattr`."""
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign | ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        flat = [t for target in targets for t in getattr(target, "elts", [target])]
        if any(touches_owned(target) for target in flat):
            yield node.lineno, ast.unparse(node)
        if not isinstance(node, ast.Call):
            continue
        name = called(node)
        by_name = isinstance(node.func, ast.Name) and name in {"setattr", "delattr"}
        on_groups = isinstance(node.func, ast.Attribute) and (
            name == "add_param_group" or (name in LIST_WRITES and "param_groups" in ast.unparse(node.func.value))
        )
        if by_name or on_groups:
            yield node.lineno, ast.unparse(node)


def imported(tree: ast.AST) -> Iterator[str]:
    """Top-level names of what a file imports, at any depth of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_sizes(path: Path) -> None:
    text = path.read_text()
    problems = []
    if (lines := len(text.splitlines())) > MAX_FILE_LINES:
        problems.append(f"{lines} lines, at most {MAX_FILE_LINES}")
    for name, function in functions(ast.parse(text)):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > MAX_FUNCTION_LINES:
            problems.append(f"{name}: {length} lines, at most {MAX_FUNCTION_LINES}")
        arguments = function.args
        positional = [a.arg for a in arguments.posonlyargs + arguments.args if a.arg not in {"self", "cls"}]
        keyword_only = 0 if (name_of(path), name) in DOORS else len(arguments.kwonlyargs)
        if (count := len(positional) + keyword_only) > MAX_PARAMETERS:
            problems.append(f"{name}: {count} parameters, at most {MAX_PARAMETERS}")
    assert not problems, "\n".join([name_of(path), *problems])


def test_doors_take_their_many_options_by_keyword_only() -> None:
    for file, door in DOORS:
        path = SOURCE / file
        if not path.exists():
            continue
        found = dict(functions(ast.parse(path.read_text())))
        if door in found:
            positional = [a.arg for a in found[door].args.args if a.arg != "self"]
            assert len(positional) <= 3, f"{file}: {door} takes {positional} by position"


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_zip_is_always_strict(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip":
            strict = [k.value for k in node.keywords if k.arg == "strict"]
            fine = bool(strict) and isinstance(strict[0], ast.Constant) and strict[0].value is True
            assert fine, f"{name_of(path)}:{node.lineno}: zip(...) needs strict=True"


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_only_a_few_files_write_to_what_the_user_owns(path: Path) -> None:
    if name_of(path).startswith(WRITERS):
        return
    found = [f"{name_of(path)}:{line}: {text}" for line, text in writes(ast.parse(path.read_text()))]
    assert not found, "\n".join(["writes outside " + ", ".join(WRITERS), *found])


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_the_core_needs_torch_and_the_standard_library(path: Path) -> None:
    if name_of(path).startswith(SHOWCASE):
        return
    foreign = set(imported(ast.parse(path.read_text()))) - DEPENDENCIES - set(sys.stdlib_module_names)
    assert not foreign, f"{name_of(path)} imports {sorted(foreign)}"


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_private_parts_of_fsdp2_are_asked_for_in_one_file(path: Path) -> None:
    of_state, of_group = (*fsdp2.OF_ROOT, *fsdp2.OF_STATE), (*fsdp2.SAVING, *fsdp2.SENDING, *fsdp2.MARKS, "fsdp_params")
    private = {"_get_fsdp_state", "_comm_ctx", *of_state, *of_group, *fsdp2.OF_PARAMETER, *fsdp2.STAYING} - {"device"}
    found = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)} & private
    assert name_of(path) == "fsdp2.py" or not found


def test_examples_are_short() -> None:
    for path in sorted((ROOT / "examples").glob("*.py")):
        assert len(path.read_text().splitlines()) <= 100, path.name


def test_public_names() -> None:
    assert sorted(auxin.__all__) == sorted(PUBLIC)
    assert set(dir(auxin)) == {*PUBLIC, "__version__"}
    missing = [name for name in PUBLIC if not hasattr(auxin, name)]
    assert not missing


@pytest.mark.parametrize(
    "line",
    [
        "opt.param_groups = []",
        "opt.param_groups[0]['lr'] = 1",
        "opt.param_groups[0]['params'].append(p)",
        "opt.param_groups.append({})",
        "del opt.param_groups[1]",
        "opt.param_groups[0]['lr'] *= 2",
        "opt.add_param_group({})",
        "p.data = q",
        "a, p.data = q, r",
        "setattr(module, 'x', 1)",
        "delattr(module, 'x')",
    ],
)
def test_the_rule_about_writes_sees(line: str) -> None:
    assert list(writes(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    [
        "groups = opt.param_groups",
        "x = p.data",
        "lr = opt.param_groups[0]['lr']",
        "object.__setattr__(self, 'x', 1)",
        "found.append(opt.param_groups[0])",
        "self.data = series",
    ],
)
def test_the_rule_about_writes_leaves_reading_alone(line: str) -> None:
    assert not list(writes(ast.parse(line)))
