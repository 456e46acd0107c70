"""Changed checkpoints, recipes and texts: every fixed case ends with an answer or one line of error, but for the known ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def test_fixed_cases_fail_as_listed_and_no_others() -> None:
    table = FOLDER / "fuzz_known.json"
    done = subprocess.run(
        [sys.executable, FOLDER / "fuzz.py", "--fixed", table], capture_output=True, text=True, check=False
    )
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found["cases"] >= 100
    assert found["differences"] == {}


@pytest.fixture
def samples(helper, tmp_path: Path) -> Path:
    """Files of every kind that has changes of its own."""
    folder, made = tmp_path / "samples", helper("samples")
    folder.mkdir()
    made.save_texts(folder)
    made.save_recipes(folder)
    made.save_model(folder / "dense")
    return folder


def test_the_same_seed_makes_the_same_change_and_another_one_others(helper, samples: Path) -> None:
    containers = helper("containers")
    files = [*samples.glob("*.*"), *samples.glob("dense/*.json"), *samples.glob("dense/*.safetensors")]
    assert {file.suffix for file in files} == {".txt", ".jsonl", ".parquet", ".yaml", ".json", ".safetensors"}
    for file in files:
        data = file.read_bytes()
        for name, mutate in containers.mutators(file.name).items():
            changed = [mutate(data, f"{file.name}/{name}/{seed}") for seed in range(8)]
            assert changed == [mutate(data, f"{file.name}/{name}/{seed}") for seed in range(8)]
            assert any(each != data for each in changed), (file.name, name)
            assert len(set(changed)) > 1 or name in ("explode", "end"), (file.name, name)


def test_a_key_that_is_added_leaves_most_other_changes_where_they_were(helper) -> None:
    mutations = helper("mutations")
    old = {f"key{n}": n for n in range(20)}
    same = 0
    for seed in range(50):
        first, second = (mutations.remove(dict(document), str(seed)) for document in (old, old | {"new": 1}))
        same += first == {name: value for name, value in second.items() if name != "new"}
    assert 40 <= same < 50


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # other tests' threads are of no concern to the child
@pytest.mark.parametrize(
    ("made", "code", "expected"),
    [
        ([], 0, ["damage accepted"]),
        (["out"], 1, ["a result in spite of the error"]),
        (["ran"], 1, ["code was run"]),
        ([], 1, []),
    ],
    ids=["accepted", "published", "code", "refused"],
)
def test_what_a_command_does_with_a_damaged_result_is_judged(
    helper,
    samples: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    made: list[str],
    code: int,
    expected: list[str],
) -> None:
    fuzz, folder = helper("fuzz"), tmp_path / "case"
    (samples / "dense").rename(samples / "packed")  # which has sums to check, as a result of ours

    def act(*_: object) -> int:
        for name in made:
            (folder / name).mkdir()
        print("error: x" if code else "", file=sys.stderr)
        return code

    monkeypatch.setattr(fuzz, "perform", act)
    folder.mkdir()
    finding = fuzz.attempt(fuzz.Case.parse("packed/model.safetensors/data/0/inspect"), samples, folder)
    assert (finding.faults, finding.accepted) == (expected, code == 0)


def test_a_name_gives_its_case_again(helper, tmp_path: Path) -> None:
    fuzz = helper("fuzz")
    names = fuzz.FOUND.read_text().split()
    assert names == sorted(set(names)) == [str(fuzz.Case.parse(name)) for name in names]
