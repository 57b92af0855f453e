import errno
import json
import os
import random
import shutil
import threading
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import anew
from auxin.checkpoint import directory, manifest, tensors
from auxin.checkpoint.directory import read, write
from auxin.errors import GrowthError

FILES = {"journal.json": b'{"growths": []}\n', "model.safetensors": {"w": torch.arange(6.0).reshape(2, 3)}}


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def tree(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_round_trip_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "run" / "last"
    for number in range(1, 5):
        assert write(path, {**FILES, "number": b"%d" % number}) == path / f"checkpoint-{number:06d}"
    assert names(path) == ["checkpoint-000003", "checkpoint-000004"]
    found = read(path)
    assert found.path == path / "checkpoint-000004"
    assert found.bytes("number") == b"4"
    assert torch.equal(found.tensors("model.safetensors")["w"], FILES["model.safetensors"]["w"])
    assert read(path / "checkpoint-000003").bytes("number") == b"3"
    assert set(found.manifest) == {"journal.json", "model.safetensors", "number"}


def test_a_renamed_copy_is_read(tmp_path: Path) -> None:
    shutil.copytree(write(tmp_path / "a", FILES), tmp_path / "best")
    assert read(tmp_path / "best").bytes("journal.json") == FILES["journal.json"]


def test_a_path_through_a_link_is_the_users_own_business(tmp_path: Path) -> None:
    write(tmp_path / "scratch", FILES)
    (tmp_path / "last").symlink_to(tmp_path / "scratch")
    write(tmp_path / "last", FILES)
    assert read(tmp_path / "last").path.name == "checkpoint-000002"


def test_all_files_can_be_read_by_the_same_people(tmp_path: Path) -> None:
    complete = write(tmp_path, FILES)
    assert len({(complete / name).stat().st_mode for name in names(complete)}) == 1


# ---- tensors


EVERY_DTYPE = sorted({*tensors._NATIVE, *tensors._RAW.values()} - {torch.bool}, key=str)


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_every_dtype_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    raw = torch.arange(32, dtype=torch.uint8).view(dtype)
    kept = {"a": raw.reshape(-1, 2), "scalar": raw[0].clone(), "empty": raw[:0].clone().reshape(3, 0)}
    write(tmp_path, {"x.safetensors": kept})
    found = read(tmp_path).tensors("x.safetensors")
    for name, tensor in kept.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_tied_tensors_are_stored_once_and_come_back_as_one(tmp_path: Path) -> None:
    weight, other = torch.randn(100, 100), torch.randn(3, 4)
    kept = {
        "embedding": weight,
        "head": weight,
        "head detached": weight.detach(),
        "turned": weight.t(),
        "row": weight[3],
        "strided": other[:, ::2],
        "expanded": torch.ones(1).expand(4),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "empty": torch.empty(0),
        "empty too": torch.empty(0, 2),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    complete = write(tmp_path, {"x.safetensors": kept})
    assert (complete / "x.safetensors").stat().st_size < 2.2 * weight.numel() * 4
    found = read(tmp_path).tensors("x.safetensors")
    assert list(found) and set(found) == set(kept)
    assert all(torch.equal(found[name], kept[name]) for name in kept)
    assert found["embedding"] is found["head"] is found["head detached"]
    assert found["turned"] is not found["embedding"]
    assert found["empty"] is not found["empty too"]


def test_what_is_loaded_does_not_hang_on_the_file(tmp_path: Path) -> None:
    write(tmp_path, FILES)
    found = read(tmp_path).tensors("model.safetensors")
    with open(tmp_path / "checkpoint-000001" / "model.safetensors", "r+b") as file:
        file.truncate(0)
    assert found["w"].sum() == 15


def nested(layout: torch.layout) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (torch.ones(2, device="meta"), "'layer.w': it is on the meta device"),
        (torch.eye(2).to_sparse(), r"its layout is torch.sparse_coo, store it `.to_dense\(\)`"),
        (nested(torch.strided), r"it is a nested tensor, store `torch.nested.to_padded_tensor\(tensor, 0\)`"),
        (nested(torch.jagged), r"it is a nested tensor, store `torch.nested.to_padded_tensor\(tensor, 0\)`"),
        (torch.empty(2, dtype=torch.bits8), "its dtype torch.bits8"),
        (3, "'layer.w': a int"),
    ],
)
def test_tensors_without_plain_values(tmp_path: Path, tensor: Any, text: str) -> None:
    with pytest.raises(GrowthError, match=text):
        write(tmp_path / "run", {"x.safetensors": {"layer.w": tensor}})
    assert not (tmp_path / "run").exists()


# ---- what cannot be written


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../a", "manifest.json", "x" * 200, "a b"])
def test_names_of_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(GrowthError, match="is no name for a file"):
        write(tmp_path, {name: b""})


@pytest.mark.parametrize("keep_last", [0, -1, True, 1.5, None])
def test_keep_last(tmp_path: Path, keep_last: Any) -> None:
    with pytest.raises(GrowthError, match="keep_last="):
        write(tmp_path, FILES, keep_last=keep_last)


@pytest.mark.parametrize("nth", range(8))
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_at_any_point(tmp_path: Path, monkeypatch: Any, nth: int, code: int) -> None:
    run = tmp_path / "run"
    write(run, FILES)
    before, calls, fsync = tree(tmp_path), [], os.fsync

    def failing(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == nth + 1:
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    if nth < 4:  # two files, the manifest, the directory
        with pytest.raises(GrowthError) as info:
            write(run, FILES)
        assert f"Cannot save to '{run}': {os.strerror(code)}" in str(info.value)
        assert "MB to write" in str(info.value) and "ax.save(grower," in str(info.value)
        assert tree(tmp_path) == before
    else:
        write(run, FILES)
        assert names(run) == ["checkpoint-000001", "checkpoint-000002"]


def test_a_file_system_without_room(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run, FILES)
    before = tree(tmp_path)
    for large in (b"x" * 500_000, {"x": torch.zeros(500_000)}):
        code = (
            "import resource, signal, sys, torch\n"
            "from auxin.checkpoint.directory import write\n"
            "from auxin.errors import GrowthError\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
            f"large = {'torch.zeros(500_000)' if isinstance(large, dict) else 'None'}\n"
            "content = b'x' * 500_000 if large is None else {'x': large}\n"
            "try:\n"
            f"    write({str(run)!r}, {{'small': b'x', 'large': content}})\n"
            "except GrowthError as error:\n"
            "    print(error)\n"
        )
        done = anew.run("-c", code)
        assert "Cannot save to" in done.stdout and "File too large" in done.stdout, done.stdout + done.stderr
        assert tree(tmp_path) == before


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_directory_that_may_not_be_written(tmp_path: Path, monkeypatch: Any, code: int) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(GrowthError, match=f"Cannot save to .*new/run': {os.strerror(code)}"):
        write(tmp_path / "new" / "run", FILES)
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(GrowthError, match="Permission denied"):
        write(tmp_path / "run", FILES)
    tmp_path.chmod(0o700)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(GrowthError, match="Cannot save to"):
            write(path, FILES)
        with pytest.raises(GrowthError, match="Cannot read|There is nothing"):
            read(path)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(GrowthError, match="Cannot save to .*File name too long"):
        write(tmp_path / ("x" * 300), FILES)
    with pytest.raises(GrowthError, match="Cannot read .*File name too long"):
        read(tmp_path / ("x" * 300))
    assert names(tmp_path) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, FILES)
    assert names(tmp_path) == []


CRASH = """
import os, sys, torch
from auxin.checkpoint.directory import read, write
run, calls, fsync = sys.argv[1], [], os.fsync
for nth in range(7):
    child = os.fork()
    if child == 0:
        def dying(descriptor):
            calls.append(descriptor)
            if len(calls) == nth + 1:
                os._exit(7)
            fsync(descriptor)
        os.fsync = dying
        write(run, {"n": b"%d" % nth, "x": {"w": torch.full((1000,), float(nth))}})
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = read(run)
    print(nth, code, found.bytes("n").decode(), float(found.tensors("x")["w"].mean()), flush=True)
"""


def test_a_process_killed_at_any_point_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, {"n": b"-1", "x": {"w": torch.full((1000,), -1.0)}})
    done = anew.run("-c", CRASH, tmp_path)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 7, done.stderr
    assert all(float(number) == float(mean) for _, _, number, mean in lines)
    assert [(code, number) for _, code, number, _ in lines[:4]] == [("7", "-1")] * 4
    assert [(code, number) for _, code, number, _ in lines[4:]] == [("7", "4"), ("0", "5"), ("0", "6")]
    # What the dead left was swept up by the next one that lived.
    assert names(tmp_path) == ["checkpoint-000003", "checkpoint-000004"]


def test_temporaries_of_the_living_and_of_other_machines_stay(tmp_path: Path, monkeypatch: Any) -> None:
    living = f".tmp-{os.getppid()}-{directory._host()}-00000000"
    elsewhere = ".tmp-1-00000000-00000000"
    for name in (living, elsewhere, ".tmp-mine"):
        (tmp_path / name).mkdir()
    write(tmp_path, FILES)
    assert names(tmp_path) == [elsewhere, living, ".tmp-mine", "checkpoint-000001"]
    os.utime(tmp_path / elsewhere, (0, 0))
    write(tmp_path, FILES)
    assert elsewhere not in names(tmp_path)


def test_writers_at_the_same_time(tmp_path: Path) -> None:
    def work(who: int) -> None:
        for _ in range(5):
            write(tmp_path, {"who": b"%d" % who}, keep_last=100)

    threads = [threading.Thread(target=work, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == [f"checkpoint-{number:06d}" for number in range(1, 21)]
    found = [read(tmp_path / name).bytes("who") for name in names(tmp_path)]
    assert sorted(found) == sorted([b"0", b"1", b"2", b"3"] * 5)


# ---- what cannot be read


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(GrowthError, match=r"There is nothing at .*missing'.*ax.load\('run/last', grower\)"):
        read(tmp_path / "missing")
    with pytest.raises(GrowthError, match="There is no checkpoint at"):
        read(tmp_path)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(GrowthError, match="There is no checkpoint at"):
        read(tmp_path)


def test_wrong_names_in_a_whole_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, FILES)
    with pytest.raises(GrowthError, match=r"has no file x, only \['journal.json'"):
        read(tmp_path).bytes("x")
    for name in ("x", "journal.json"):
        with pytest.raises(GrowthError, match=f"has no tensors {name}"):
            read(tmp_path).tensors(name)


def test_damage_names_the_file_and_the_older_checkpoint(tmp_path: Path) -> None:
    for _ in range(3):
        write(tmp_path, FILES, keep_last=3)
    newest = tmp_path / "checkpoint-000003"
    (newest / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(GrowthError) as info:
        read(tmp_path)
    assert f"'{newest}' is damaged or was cut off: model.safetensors has 3 bytes" in str(info.value)
    assert f'ax.load("{tmp_path}/checkpoint-000002", grower)' in str(info.value)
    (tmp_path / "checkpoint-000002" / "manifest.json").unlink()
    with pytest.raises(GrowthError, match="checkpoint-000001"):
        read(newest)
    shutil.rmtree(tmp_path / "checkpoint-000001")
    with pytest.raises(GrowthError, match="There is no older one that is whole"):
        read(tmp_path)
    with pytest.raises(GrowthError, match="manifest.json is missing.*no older one"):
        read(tmp_path / "checkpoint-000002")


@pytest.mark.parametrize("name", ["manifest.json", "journal.json", "model.safetensors"])
def test_links_and_pipes_are_refused(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / "run", FILES) / name
    file.rename(tmp_path / "moved")
    file.symlink_to(tmp_path / "moved")
    with pytest.raises(GrowthError, match=f"{name} is a link, and links are not followed"):
        read(tmp_path / "run")
    for make in (os.mkfifo, os.mkdir):
        file.unlink()
        make(file)
        with pytest.raises(GrowthError, match=f"{name} is not an ordinary file"):
            read(tmp_path / "run")


def test_a_checkpoint_that_is_a_link_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "other", FILES)
    write(tmp_path / "run", FILES)
    (tmp_path / "run" / "checkpoint-000009").symlink_to(tmp_path / "other" / "checkpoint-000001")
    with pytest.raises(GrowthError, match="checkpoint-000009' is a link"):
        read(tmp_path / "run")
    for _ in range(3):
        write(tmp_path / "run", FILES, keep_last=1)
    assert (tmp_path / "other" / "checkpoint-000001" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (b"auxin checkpoint", b"other checkpoint", "not a manifest of auxin"),
        (b'"version": 3', b'"version": 4', "a newer auxin wrote it"),
        (b'"size": ', b'"size":  ', "is not what was written"),
        (b"}\n", b"}\n\n", "is not what was written"),
    ],
)
def test_manifests_that_are_not_ours(tmp_path: Path, old: bytes, new: bytes, text: str) -> None:
    file = write(tmp_path, FILES) / "manifest.json"
    raw = file.read_bytes()
    assert old in raw
    file.write_bytes(new.join(raw.rsplit(old, 1)))
    with pytest.raises(GrowthError, match=text):
        read(tmp_path)


def test_other_files_beside_ours_do_no_harm(tmp_path: Path) -> None:
    complete = write(tmp_path, FILES)
    (complete / ".DS_Store").touch()
    assert read(tmp_path).bytes("journal.json") == FILES["journal.json"]


def test_every_truncation_and_flipped_bit_is_found(tmp_path: Path) -> None:
    complete = write(tmp_path, FILES)
    rng = random.Random(0)
    for file in sorted(complete.iterdir()):
        raw = file.read_bytes()
        for trial in range(300):
            damaged = bytearray(raw)
            if trial % 3 == 0:
                del damaged[rng.randrange(len(raw)) :]
            else:
                damaged[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            with pytest.raises(GrowthError, match=f"damaged or was cut off: {file.name}|a file|has no"):
                read(tmp_path)
        file.write_bytes(raw)
    read(tmp_path)


def of_version_one(complete: Path) -> None:
    """Rewrite a manifest as the first versions of auxin did: the SHA-256 of every file, no memory order of tensors."""
    files = {name: asdict(entry) for name, entry in manifest.parse((complete / manifest.NAME).read_bytes()).items()}
    for name, entry in files.items():
        if entry["layout"] is not None:
            del entry["layout"]["strides"]
        entry["digest"] = sha256((complete / name).read_bytes()).hexdigest()
    plain = {"format": manifest.FORMAT, "version": 1, "files": files}
    total = sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    (complete / manifest.NAME).write_bytes(json.dumps({**plain, "sha256": total}, indent=1).encode() + b"\n")


def test_checkpoints_with_the_old_checksum_are_read_and_their_damage_is_found(tmp_path: Path) -> None:
    complete = write(tmp_path, FILES)
    of_version_one(complete)
    found = read(tmp_path)
    assert found.bytes("journal.json") == FILES["journal.json"]
    assert found.tensors("model.safetensors").keys() == FILES["model.safetensors"].keys()
    for file in (complete / "journal.json", complete / "model.safetensors"):
        raw = file.read_bytes()
        file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        with pytest.raises(GrowthError, match=f"{file.name} is not what was written .its checksum differs"):
            read(tmp_path)
        file.write_bytes(raw)


def test_no_file_is_read_again_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reading(*_: object) -> bytes:
        raise AssertionError("a file was read")

    monkeypatch.setattr(os, "read", reading)
    write(tmp_path, FILES)
    monkeypatch.undo()
    read(tmp_path)


def test_every_dtype_and_layout_is_written_as_safetensors_reads_it(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    kinds = (torch.bool, torch.int8, torch.bfloat16, torch.float64, torch.complex64, torch.uint16)
    named = {"view": base[1:3, ::2], "whole": base, "transposed": base.t(), "one": base[0, 0], "none": base[:0]}
    named |= {str(kind): base.to(kind) for kind in kinds}
    write(tmp_path, {"model.safetensors": named})
    found = load_file(tmp_path / "checkpoint-000001" / "model.safetensors")
    assert found.keys() == named.keys()
    for name, tensor in named.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
