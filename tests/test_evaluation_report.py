"""The whole judge on small drawn patients: planted faults move the right measures, the page stands alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from ctvae import nifti
from ctvae.errors import InputError
from ctvae.evaluation import realism
from ctvae.evaluation.evaluate import evaluate
from ctvae.evaluation.grid import Grid
from ctvae.evaluation.memorization import judge_scans
from ctvae.evaluation.summary import summarise
from ctvae.volume import Volume, plain_affine

SHAPE, SPACING = (20, 40, 40), (6.0, 6.0, 5.0)
REAL, MADE = range(40), range(100, 112)
GRID = Grid(SPACING, (240.0, 240.0, 100.0), False)
Array = np.ndarray


def patient(seed: int) -> Array:
    """A trunk with two lungs, a spine and organs in its fat, all of random size and place. int16 [D H W]"""
    rng = np.random.default_rng([seed, 41])
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")
    grain = gaussian_filter(rng.normal(size=SHAPE), 0.7) * rng.uniform(25, 40)
    taper = 1 + rng.uniform(-0.15, 0.15) * z
    body = (x / (rng.uniform(0.7, 0.85) * taper)) ** 2 + (y / (rng.uniform(0.5, 0.6) * taper)) ** 2
    hu = np.where(body < 1, -100.0, -1000.0)
    hu[body < rng.uniform(0.75, 0.88)] = 50
    for side in (-1, 1):
        lung = ((x - side * 0.35) / rng.uniform(0.15, 0.25)) ** 2 + (y / 0.3) ** 2 + ((z - rng.uniform(0.6, 1.1)) / 0.9) ** 2
        hu[lung < 1] = rng.uniform(-870, -780)
    for _ in range(8):
        at, radius = rng.uniform(-0.4, 0.4, 3), rng.uniform(0.08, 0.25, 3)
        organ = sum(((axis - a) / r) ** 2 for axis, a, r in zip((z * 0.5, y, x), at, radius, strict=True))
        hu[(organ < 1) & (hu > 0)] = rng.uniform(0, 150)
    hu[x**2 + (y - 0.35) ** 2 < 0.09**2] = rng.uniform(350, 600)
    return np.rint(gaussian_filter(hu, 0.5) + grain).clip(-1000, 2000).astype(np.int16)


def volume(hu: Array) -> Volume:
    return Volume(np.rint(hu).clip(-1024, 3071).astype(np.int16), plain_affine(SPACING, hu.shape))


def judged(fault: Callable[[Array, int], Array], only: tuple[str, ...] = ()) -> dict[str, dict]:
    """The measures, or `only` some, of a synthetic side of other patients with `fault`, by id."""
    made = [summarise(volume(fault(patient(seed).astype(np.float32), i)), GRID) for i, seed in enumerate(MADE)]
    scans = [*REAL_SUMMARIES, *made]
    sides = realism.Sides(np.arange(40, 52), np.arange(16), np.arange(40))
    names = [f"p{i}" for i in REAL] + [f"s{i}" for i in range(12)]
    todo = [m for m in realism.measures(scans, sides.real, [sides.synthetic], names, seed=0) if not only or m.id in only]
    return {measure.id: realism.judge(measure, sides, seed=0).entry for measure in todo}


REAL_SUMMARIES = [summarise(volume(patient(seed)), GRID) for seed in REAL]


@pytest.fixture(scope="module")
def control() -> dict[str, dict]:
    return judged(lambda hu, i: hu)


def test_other_patients_of_the_same_source_pass(control):
    entries = list(control.values())
    assert all(entry["status"] == "ok" for entry in entries)
    assert all(np.isfinite([entry["value"], *entry["interval"]]).all() for entry in entries)
    # The measures move together: twelve patients who are a little leaner are so in several of them.
    assert sum(entry["within_floor"] for entry in entries) >= 0.75 * len(entries)
    assert max(entry["floor_widths"] for entry in entries) < 3
    assert control["slice_continuity"]["value"] == pytest.approx(1.0, abs=0.1)


def shuffled(hu: Array, i: int) -> Array:
    return hu[np.random.default_rng(i).permutation(len(hu))]


def collapsed(hu: Array, i: int) -> Array:
    return patient(100 + i % 3) + np.random.default_rng(i).normal(0, 3, hu.shape)


@pytest.mark.parametrize(
    ("fault", "caught_by"),
    [
        (lambda hu, i: gaussian_filter(hu, 1), ("power_spectrum", "classifier_texture", "frechet_texture")),
        (lambda hu, i: hu + 30, ("hu_histogram", "classifier_texture")),
        (shuffled, ("slice_continuity", "frechet_texture", "classifier_texture")),
        (
            lambda hu, i: hu + np.random.default_rng(i).normal(0, 40, hu.shape),
            ("noise", "noise_spectrum", "noise_spectrum_worst", "power_spectrum"),
        ),
        (lambda hu, i: np.where(np.arange(hu.shape[2]) < 14, -1000, hu), ("frechet_layout", "classifier_layout")),
        (collapsed, ("diversity_nearest", "coverage_texture")),
    ],
    ids=["blur of 1 voxel", "+30 HU", "shuffled slices", "noise", "truncated field of view", "collapse to 3"],
)
def test_each_planted_fault_is_caught_by_the_measure_that_should(fault, caught_by, control):
    found = judged(fault, caught_by)
    for name in caught_by:
        assert not found[name]["within_floor"], (name, found[name])
        assert found[name]["floor_widths"] > control[name]["floor_widths"]


@pytest.mark.parametrize("factor", [1.5, 1 / 1.5])
def test_the_worst_frequency_is_that_of_the_largest_ratio_of_means(factor):
    real = np.random.default_rng(0).uniform(10, 20, (9, 4))
    spectra = real * (1.0, 1.1, factor, 0.9)
    assert realism.percent_at_worst(spectra, real) == pytest.approx(50)
    assert realism.percent_at_worst(real, real) == 0
    assert realism.decibels_apart(spectra, real) == pytest.approx(10 * np.sqrt(np.mean(np.log10((1, 1.1, 1.5, 0.9)) ** 2)))


def test_an_offset_moves_the_histogram_by_itself(control):
    moved = judged(lambda hu, i: hu + 30, ("hu_histogram",))["hu_histogram"]["value"]
    assert 20 < moved < 30 + control["hu_histogram"]["value"]


def test_a_mirrored_copy_of_a_training_scan_is_found():
    made = [patient(seed) for seed in MADE]
    made[4] = patient(7)[:, :, ::-1] + np.random.default_rng(0).normal(0, 10, SHAPE)
    summaries = [summarise(volume(hu), GRID) for hu in made]
    found = judge_scans(summaries, REAL_SUMMARIES[24:], REAL_SUMMARIES[:24], [f"p{i}" for i in range(24)])
    assert found["verdict"] == "copies"
    assert found["copies"] == [4]
    assert (found["pairs"][0]["synthetic"], found["pairs"][0]["training"]) == (4, 7)


def write_side(folder: Path, hu_by_name: dict[str, Array]) -> Path:
    for name, hu in hu_by_name.items():
        nifti.write(folder / f"{name}.nii.gz", volume(hu))
    return folder


@pytest.fixture(scope="module")
def sides(tmp_path_factory) -> tuple[Path, Path]:
    """A prepared dataset of 26 patients and a folder of 9 synthetic scans."""
    root = tmp_path_factory.mktemp("sides")
    groups = []
    for i in range(26):
        split = "train" if i < 14 else "validation" if i < 18 else "test"
        nifti.write(root / "dataset" / "groups" / f"g{i}.nii", volume(patient(i)))
        groups.append(
            {
                "id": f"g{i}", "patient": f"patient{i}", "split": split, "path": f"groups/g{i}.nii", "label_path": None,
                "shape": SHAPE, "spacing_mm": SPACING, "affine": plain_affine(SPACING, SHAPE).tolist(), "position": 0.5,
                "first_slice": 0, "source": f"{i}.nii.gz", "sha256": "",
            }
        )  # fmt: skip
    content = {"format": 1, "groups": groups, "settings": {}, "measured": {}, "rejected": [], "scans": [], "notes": []}
    (root / "dataset" / "dataset.json").write_text(json.dumps(content))
    made = {f"sample_{i}": patient(300 + i) for i in range(8)} | {"sample_8": patient(2) + 3}
    return root / "dataset", write_side(root / "synthetic", made)


@pytest.fixture(scope="module")
def report(sides, tmp_path_factory) -> tuple[dict, Path]:
    out = tmp_path_factory.mktemp("report")
    calls: list[tuple[int, int, str]] = []
    again = evaluate(*sides, out, reconstruct=lambda v: Volume(v.hu + 5, v.affine), progress=lambda *told: calls.append(told))
    assert calls[-1] == (1, 1, "drawing")
    assert all(done <= total for done, total, _ in calls)
    return again, out


def test_the_report_is_what_was_written(report):
    returned, out = report
    written = json.loads((out / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert written == json.loads(json.dumps(returned))
    assert (written["schema"], written["schema_version"]) == ("ctvae.report", 2)
    assert not (out / ".partial").exists()
    assert written["real"]["split"] == "test"
    assert written["real"]["patients"] == 26
    assert set(written["pictures"]) == {path.name for path in out.glob("*.png")}


def test_every_measure_has_a_floor_or_says_what_it_needs(report):
    statuses = {}
    for entry in report[0]["sets"][0]["measures"]:
        statuses[entry["id"]] = entry["status"]
        if entry["status"] == "ok":
            assert entry["floor"]["low"] <= entry["floor"]["median"] <= entry["floor"]["high"]
            assert entry["interval"][0] <= entry["interval"][1]
        else:
            assert min(entry["have"].values()) < entry["need"]
        assert entry["meaning"].endswith(".")
    assert statuses["frechet_texture"] == "ok"
    assert statuses["coverage_texture"] == "not enough"  # nine scans, twelve needed


def test_the_verdict_names_the_copy(report):
    found = report[0]["sets"][0]
    assert report[0]["verdict"] == found["verdict"]
    assert found["memorization"]["copies"] == ["sample_8"]
    assert found["memorization"]["pairs"][0]["training"] == "g2"
    assert "copies of training scans" in found["verdict"]["headline"]
    assert any("1 of 9 synthetic scans is a copy" in sentence for sentence in found["verdict"]["sentences"])


def test_reconstructions_are_of_held_out_scans(report):
    section = report[0]["reconstructions"]["the model"]
    assert set(section["by_scan"]) <= {f"g{i}" for i in range(18, 26)}
    assert section["windows"]["full"]["mae_hu"]["mean"] == pytest.approx(5, abs=0.1)


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "poster")]
        assert tag not in ("link", "iframe", "object", "embed")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_holds_everything_itself(report):
    page = (report[1] / "index.html").read_text(encoding="utf-8")
    viewer = resources.files("ctvae.evaluation").joinpath("niivue.umd.js").read_text(encoding="utf-8")
    assert viewer in page
    page = page.replace(viewer, "")  # tests/test_browser.py sees that it asks for nothing
    links = Links()
    links.feed(page)
    assert len(links.targets) >= 3
    assert all(target.startswith("data:image/png;base64,") for target in links.targets)
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest", page)
    text = " ".join(links.text)
    assert report[0]["verdict"]["headline"] in text
    for entry in report[0]["sets"][0]["measures"]:
        assert entry["title"] in text
        assert entry["meaning"] in text
    cases = json.loads(re.search(r"var cases = (\[.*?\]);", page)[1])
    assert len(cases) == 18
    assert sum(case["k"] % 7 == 3 for case in cases) == 9


def test_the_same_seed_gives_the_same_report(sides, report, tmp_path):
    again = evaluate(*sides, tmp_path / "out")
    assert again["sets"][0]["measures"] == report[0]["sets"][0]["measures"]
    assert again["sets"][0]["memorization"] == report[0]["sets"][0]["memorization"]


def test_a_stopped_evaluation_goes_on_where_it_was(sides, report, tmp_path):
    def stop(done: int, total: int, what: str) -> None:
        if done == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(*sides, tmp_path, progress=stop)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / ".partial").iterdir()}
    assert len(kept) == 30

    def check(done: int, total: int, what: str) -> None:
        if (done, what) == (total, "measuring scans"):
            assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(*sides, tmp_path, progress=check)


def test_anchors_say_whether_the_measures_can_be_believed(report):
    anchors = {anchor["name"]: anchor for anchor in report[0]["anchors"]}
    assert list(anchors) == ["other real", "blurred", "noisy", "mirrored", "reconstructed"]
    assert anchors["blurred"]["must_move"] == {"power_spectrum": True}
    assert anchors["noisy"]["must_move"] == {"noise": True, "power_spectrum": True}
    untouched = anchors["other real"]["measures"].values()
    assert sum(measure["within_floor"] for measure in untouched) >= 0.75 * len(untouched)
    assert anchors["mirrored"]["must_move"] == {"handedness": False}  # these patients have no left and right


@pytest.mark.slow
def test_several_folders_are_ranked_in_one_report(sides, tmp_path):
    dataset, synthetic = sides
    worse = {f"w{i}": gaussian_filter(patient(300 + i).astype(float), 1) for i in range(8)}
    also = write_side(tmp_path / "also", {f"a{i}": patient(320 + i) for i in range(8)})
    folders = [write_side(tmp_path / "blurred", worse), synthetic, also]
    found = evaluate(dataset, folders, tmp_path / "out", format="md")
    ranked = {row["name"]: row for row in found["ranking"]}
    assert [row["rank"] for row in found["ranking"]] == [1, 2, 3]
    assert found["ranking"][0]["name"] == "also"
    assert ranked["also"]["score"] < ranked["blurred"]["score"]
    assert ranked["also"]["interval"][1] < ranked["blurred"]["interval"][0]
    assert found["ranking"][2]["name"] == "synthetic"  # as good as the first, but it holds a copy
    assert ranked["synthetic"]["copies"] == 1
    assert "blurred" not in ranked["also"]["not_told_from"]
    assert "synthetic" in ranked["also"]["not_told_from"]
    page, text = (out.read_text(encoding="utf-8") for out in (tmp_path / "out" / "index.html", tmp_path / "out" / "report.md"))
    for name in ranked:
        assert f"<summary>{name}: " in page
        assert f"## Measures: {name}" in text
    for entry in found["sets"][0]["measures"]:
        assert f"| {entry['title']} |" in text


def test_a_folder_named_twice_is_refused(sides, tmp_path):
    dataset, synthetic = sides
    with pytest.raises(InputError, match="named twice"):
        evaluate(dataset, [synthetic, synthetic / ".." / synthetic.name], tmp_path)


def test_a_plain_folder_of_real_scans_will_do_and_few_scans_are_said_so(tmp_path):
    real = write_side(tmp_path / "real", {f"r{i}": patient(i) for i in range(4)})
    made = write_side(tmp_path / "made", {"r0": patient(50)})  # called like a real scan: a coincidence
    found = evaluate(real, made, tmp_path / "out")
    assert {entry["status"] for entry in found["sets"][0]["measures"]} == {"not enough"}
    assert found["verdict"]["headline"] == "Too few scans to say anything."
    assert found["sets"][0]["memorization"]["status"] == "not enough"


def test_a_patient_on_both_sides_is_refused(sides, tmp_path):
    dataset, _ = sides
    named = write_side(tmp_path / "named", {"a": patient(500)})
    (named / "a.json").write_text(json.dumps({"source": {"patient": "patient3"}}))
    with pytest.raises(InputError, match=r"a\.json: made from real patient patient3"):
        evaluate(dataset, named, tmp_path / "out")
    source = hashlib.sha256((dataset / "groups" / "g5.nii").read_bytes()).hexdigest()[:16]
    (named / "a.json").write_text(json.dumps({"made_by": "vary", "source_sha256": source}))
    with pytest.raises(InputError, match=r"a\.json: made from real scan g5"):
        evaluate(dataset, named, tmp_path / "out")
    for seed in (20, 15):  # of the reference, and of the validation patients among the others
        same = write_side(tmp_path / f"same{seed}", {"b": patient(seed)})
        with pytest.raises(InputError, match=f"b: voxel for voxel the real scan g{seed}"):
            evaluate(dataset, same, tmp_path / "out")


def test_mistakes_are_one_line(sides, tmp_path):
    dataset, synthetic = sides
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.nii.gz").write_bytes(b"no scan")
    write_side(tmp_path / "thin", {"thin": patient(0)[:5]})
    for real, made, message in (
        (tmp_path / "missing", synthetic, "missing: no such folder"),
        (dataset, tmp_path / "missing", "missing: no such folder"),
        (dataset, tmp_path / "empty", "holds no .nii"),
        (dataset, tmp_path / "bad", r"x\.nii\.gz: damaged"),
        (dataset, tmp_path / "thin", "only 5 x 40 x 40 voxels"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            evaluate(real, made, tmp_path / "out")
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="split 'all' is not one of"):
        evaluate(dataset, synthetic, tmp_path / "out", split="all")
