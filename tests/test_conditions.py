"""What the prior may be told: a user's table as numbers, what can be asked for, and what is drawn where nothing is asked."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ctvae import __main__, checkpoint
from ctvae.conditions import AUGMENTED, BUILT_IN, OF_GROUP, Change, Columns, Known, of_group, read_columns, rounded, scan_mm
from ctvae.dataset import Dataset, Group
from ctvae.errors import ConfigError, InputError, ModelError
from ctvae.export import export
from ctvae.generate import load
from ctvae.training.prior import Conditioning
from ctvae.training.train import train

TABLE = """patient,age,sex,contrast,mrn
p0,63.27,F,portal,
p1,41,M,Portal,
p2,,F,portal,
p3,55,M,,
p4,70,F,late,
"""


def group(number: int, first_slice: int = 0, split: str = "train") -> Group:
    return Group(
        id=f"p{number}_{first_slice:04d}", patient=f"p{number}", split=split, path="groups/x.nii", label_path=None,
        shape=(64, 70, 100), spacing_mm=(2.0, 2.0, 3.0), affine=np.eye(4), position=(first_slice + 32) / 120,
        first_slice=first_slice, source=f"folder/p{number}.nii.gz", sha256="",
    )  # fmt: skip


GROUPS = [group(number) for number in range(5)]


def table(folder: Path, text: str = TABLE) -> Path:
    (folder / "table.csv").write_text(text, encoding="utf-8")
    return folder / "table.csv"


def refused(error: type[Exception], call, *arguments) -> str:
    with pytest.raises(error) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- of a group and of a table ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_slice", [0, 16, 56])
def test_a_groups_own_conditions(first_slice):
    """Of a scan of 120 slices of 3 mm, 100 columns of 2 mm wide."""
    one = group(0, first_slice)
    expected = {"position": (first_slice + 32) / 120, "pixel_mm": 2.0, "slice_mm": 3.0, "width_mm": 200.0}
    nothing = dict.fromkeys(AUGMENTED, 0.0) | {"zoom": 1.0}
    assert dict(zip(OF_GROUP, of_group(one), strict=True)) == expected | nothing
    assert scan_mm(one) == 360.0


def test_an_augmented_groups_conditions_say_what_was_done():
    """Twice as large pixels are half as wide; the patient stays as wide."""
    told = dict(zip(OF_GROUP, of_group(group(0, 0), Change(degrees=5.0, zoom=2.0, rows=-3)), strict=True))
    assert {name: told[name] for name in ("pixel_mm", "width_mm", "slice_mm")} == {"pixel_mm": 1, "width_mm": 200, "slice_mm": 3}
    assert [told[name] for name in AUGMENTED] == [5.0, 2.0, 0, -3, 0, 0]


def test_nobody_asks_for_augmentation_and_nobody_is_told_of_it():
    rows = torch.tensor([of_group(group(0, 0)), of_group(group(0, 16))])
    one = Known(OF_GROUP, rows, torch.full((2,), 360.0))
    assert "the model knows no such" in refused(InputError, one.given, {"turned_degrees": 0.0})
    told = one.pick(torch.Generator().manual_seed(0), {})
    assert [told[name] for name in AUGMENTED] == [0, 1, 0, 0, 0, 0]
    assert not set(AUGMENTED) & set(told.described())


def test_columns_become_numbers(tmp_path):
    columns, notes = read_columns(table(tmp_path), GROUPS, ("age", "sex", "contrast"))
    assert columns.names == ("age", "sex=F", "sex=M", "contrast=portal")
    nan = math.nan
    expected = [[63.3, 1, 0, 1], [41, 0, 1, nan], [nan, 1, 0, 1], [55, 0, 1, nan], [70, 1, 0, nan]]
    np.testing.assert_array_equal(columns.of([one.id for one in GROUPS]).numpy(), np.array(expected, np.float32))
    assert len(notes) == 1
    assert "2 values of 'contrast' count as missing" in notes[0]
    assert columns.of(["somebody else"]).isnan().all()


def test_a_table_by_scan_says_the_same(tmp_path):
    by_scan = TABLE.replace("patient,", "scan,").replace("p1,", "p1.nii.gz,").replace("p2,", "folder/p2,")
    columns, _ = read_columns(table(tmp_path, by_scan), GROUPS, ("age", "sex"))
    expected, _ = read_columns(table(tmp_path), GROUPS, ("age", "sex"))
    assert columns.same_as(expected)
    assert not columns.same_as(read_columns(table(tmp_path, by_scan.replace("41", "42")), GROUPS, ("age", "sex"))[0])


def test_columns_come_back_from_their_file(tmp_path):
    columns, _ = read_columns(table(tmp_path), GROUPS, ("age", "sex"))
    columns.save(tmp_path / "conditions.json")
    assert Columns.load(tmp_path / "conditions.json").same_as(columns)
    (tmp_path / "conditions.json").write_text("{}")
    assert "train again" in refused(ModelError, Columns.load, tmp_path / "conditions.json")


def test_scans_without_a_row_are_told_of(tmp_path):
    columns, notes = read_columns(table(tmp_path), [*GROUPS, group(9)], ("age",))
    assert "no row for 1 scans" in notes[0]
    assert columns.of(["p9_0000"]).isnan().all()


def test_tables_that_cannot_be_used_are_one_line(tmp_path):
    path = table(tmp_path)
    line = refused(ConfigError, read_columns, path, GROUPS, ("agee",))
    assert "has no column 'agee', did you mean 'age'? (it has: age, sex, contrast, mrn)" in line
    names = table(tmp_path, "patient,name\n" + "".join(f"p{i},Quorra {i}\n" for i in range(5)))
    line = refused(InputError, read_columns, names, GROUPS, None)
    assert "column 'name' has 5 texts" in line
    assert "--set prior.columns" in line
    assert "Quorra" not in line
    for text, said in {
        "sex,age\nF,3\n": "column scan or patient",
        "patient,age\n": "a row for each",
        "patient,age\nother,3\n": "none of its rows",
        "patient,position\np0,3\n": "cannot be called 'position'",
        "patient\np0\n": "has no column beside",
    }.items():
        assert said in refused(InputError, read_columns, table(tmp_path, text), GROUPS, None)
    assert "cannot be read" in refused(InputError, read_columns, tmp_path / "none.csv", GROUPS, None)


def test_numbers_keep_three_digits():
    """An age or a weight is told; a record number is not."""
    assert [rounded(x) for x in (63.27, 0.012345, 19470203.0, 0.0, -1.0)] == [63.3, 0.0123, 19500000.0, 0.0, -1.0]


def test_conditions_are_standardised_over_what_is_known():
    values = torch.tensor([[1.0, math.nan, math.nan], [3.0, 5.0, math.nan], [math.nan, 5.0, math.nan]])
    conditioning = Conditioning.fit(values)
    standard = conditioning.standard(values)
    assert standard[:2, 0].tolist() == [-1.0, 1.0]
    assert standard[1:, 1].tolist() == [0.0, 0.0]
    assert torch.equal(standard.isnan(), values.isnan())
    assert conditioning.mean.isfinite().all()
    assert conditioning.std.isfinite().all()


# --- asked for ------------------------------------------------------------------------------------------------------------


def known() -> Known:
    """200 groups: women's pixels are 0.7 mm wide and men's 0.9; positions 0.25 to 0.75; every fifth age is not known."""
    rows = []
    for i in range(200):
        age = math.nan if i % 5 == 0 else 40.0 + i % 40
        rows.append([0.25 + 0.5 * i / 199, 0.7 if i % 2 else 0.9, 3.0, age, float(i % 2), float(1 - i % 2)])
    names = ("position", "pixel_mm", "slice_mm", "age", "sex=F", "sex=M")
    return Known(names, torch.tensor(rows), torch.full((200,), 360.0))


def drawn(asked: dict[str, float | str], count: int = 60) -> list:
    one = known()
    return [one.pick(torch.Generator().manual_seed(seed), one.given(asked)) for seed in range(count)]


def test_what_goes_together_stays_together():
    assert {round(told["pixel_mm"], 3) for told in drawn({})} == {0.7, 0.9}
    women = drawn({"sex": "F"})
    assert {(round(told["pixel_mm"], 3), told.described()["sex"]) for told in women} == {(0.7, "F")}
    places = [told["position"] for told in women]
    assert min(places) < 0.35, "all women are as near, not the first tenth of them"
    assert max(places) > 0.65


def test_what_is_asked_is_told_and_comes_from_near_it():
    one = known()
    near = one.rows[(one.rows[:, 0] - 0.4).abs() < 0.03]
    ages = {age for age in near[:, 3].tolist() if not math.isnan(age)}
    for told in drawn({"position": 0.4}):
        assert told["position"] == 0.4
        assert "age" not in told.described() or told["age"] in ages
    assert {told["age"] for told in drawn({"age": 41.5})} == {41.5}


def test_withheld_values_are_not_described():
    descriptions = [told.described() for told in drawn({})]
    assert {"age" in described for described in descriptions} == {True, False}
    assert all(described["sex"] in ("F", "M") and "sex=F" not in described for described in descriptions)


def test_a_draw_without_conditions_is_the_one_it_always_was():
    one = known()
    for seed in range(5):
        row = int(torch.randint(200, (), generator=torch.Generator().manual_seed(seed)))
        told = one.pick(torch.Generator().manual_seed(seed), {})
        np.testing.assert_array_equal(told.values, one.rows[row].tolist())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"positoin": 0.4}, "condition 'positoin': the model knows no such, did you mean 'position'?"),
        ({"sex": "f"}, "condition sex=f: the model knows no such, did you mean 'F'? (it knows: F, M)"),
        ({"sex": 1.0}, "condition sex=1: the model knows no such (it knows: F, M)"),
        ({"sex=F": 1.0}, "condition 'sex=F': the model knows no such, did you mean 'sex'?"),
        ({"position": 0.9}, "the model knows 0.25 to 0.75; the nearest is 0.75"),
        ({"age": "old"}, "condition age=old: is not a number"),
        ({"age": math.nan}, "condition age=nan"),
    ],
)
def test_what_the_model_does_not_know_is_answered_with_the_nearest(asked, said):
    assert said in refused(InputError, known().given, asked)


def test_a_file_without_lengths_knows_the_longest_scan():
    """Groups of 64 slices of 3 mm; the lowest position of a scan of n slices is 32 / n."""
    rows = torch.tensor([[32 / 128, 1.0, 3.0], [0.5, 1.0, 3.0], [1 - 32 / 100, 1.0, 3.0]])
    one = Known.from_file({"conditions.known": rows}, {}, 64, Path("prior"))
    assert one.names == BUILT_IN[:3]
    assert one.scan_mm.tolist() == pytest.approx([384.0] * 3)
    for names in (["position"], "xyz", ["a", "b", "c"], [1, 2, 3]):
        line = refused(ModelError, Known.from_file, {"conditions.known": rows}, {"conditions": names}, 64, Path("prior"))
        assert line.startswith("prior: its conditions and their names do not match")


# --- from a table to a volume -------------------------------------------------------------------------------------------


def test_a_run_learns_a_table_and_names_nobody(tiny_dataset, tiny_settings, tmp_path, capsys):
    data = Dataset.open(tiny_dataset)
    patients = sorted({one.patient for one in data.groups()})
    training = sorted({one.patient for one in data.groups("train")})
    sexes = {who: "FM"[training.index(who) % 2] if who in training else "F" for who in patients}
    rows = [f"{who},{30 + i},{sexes[who]},Quorra{i}" for i, who in enumerate(patients)]
    path = table(tmp_path, "patient,age,sex,name\n" + "\n".join(rows) + "\n")
    few = ("autoencoder.steps=2", "polish.steps=2", "prior.steps=2", "prior.columns=[age,sex]")
    asked = {"overrides": [*tiny_settings, *few], "conditions": path}
    run = train(tiny_dataset, tmp_path / "run", **asked)
    meta = checkpoint.load(run / "prior-flow.safetensors")[1]
    assert meta["conditions"] == [*OF_GROUP, "age", "sex=F", "sex=M"]

    exported = export(run, tmp_path / "model")
    bytes_of_it = b"".join(file.read_bytes() for file in exported.iterdir())
    assert not [who for who in (*patients, "Quorra") if who.encode() in bytes_of_it]
    rows_kept = checkpoint.load(exported / "prior-flow.safetensors")[0]["conditions.known"].flatten().tolist()
    assert all(math.isnan(x) or x == pytest.approx(rounded(x), rel=1e-6) for x in rows_kept)

    age = 30 + patients.index(training[0])
    told = load(exported).generate(seed=1, conditions={"sex": "F", "age": age}).provenance
    assert (told["conditions"]["sex"], told["conditions"]["age"]) == ("F", age)
    assert told["asked"] == {"sex": "F", "age": age}
    women = export(run, tmp_path / "women", overrides=["prior.told={sex: F}"])
    for seed in range(4):
        told = load(women).generate(seed=seed).provenance
        assert (told["conditions"]["sex"], told["asked"]) == ("F", {"sex": "F"})
        assert load(women).generate(seed=seed, prior="normal").provenance["conditions"]["sex"] == "F"
    assert load(women).generate(seed=1, conditions={"sex": "M"}).provenance["conditions"]["sex"] == "M"
    for number, wrong in enumerate(("{sex: X}", "{sx: F}", "{mirrored: 1}", "{age: 300}")):
        settings = [*asked["overrides"], f"prior.told={wrong}"]
        with pytest.raises(ConfigError, match=r"^prior\.told: condition .*the model knows "):
            train(tiny_dataset, tmp_path / f"wrong{number}", overrides=settings, conditions=path)
        assert not list((tmp_path / f"wrong{number}").glob("latents*")), "refused before anything was encoded"
        with pytest.raises(InputError, match="the model knows "):
            export(run, tmp_path / "none", overrides=[f"prior.told={wrong}"])
    arguments = ["generate", str(exported), "--out", str(tmp_path / "out"), "-n", "1"]
    assert __main__.run([*arguments, "--condition", "sex=F", "--condition", f"age={age}"]) == 0
    capsys.readouterr()
    for wrong in ("sex=female", "sx=F", "age=300", "position", "age=x"):
        assert __main__.run([*arguments, "--condition", wrong]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert __main__.run([*arguments, "--condition", "sex=M"]) == 2
    assert "--condition" in capsys.readouterr().err, "a scan of other conditions is in the way"

    assert train(tiny_dataset, run, overrides=asked["overrides"]) == run, "the run folder keeps what it was told"
    table(tmp_path, path.read_text().replace(",3", ",4"))
    assert "was begun with other conditions" in refused(ConfigError, lambda: train(tiny_dataset, run, **asked))
