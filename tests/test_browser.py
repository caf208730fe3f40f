"""The report's page in a real browser, offline: it loads clean, the viewer draws, the quiz counts.

Headless Chromium is driven by a script put into a copy of the page, which leaves what it saw in the page's text. Skips where no
Chromium is installed (`apt-get install chromium`). The picture that it takes is kept with `--basetemp`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from scipy.ndimage import gaussian_filter

from ctvae import nifti
from ctvae.evaluation.evaluate import evaluate
from ctvae.evaluation.memorization import wilson
from ctvae.volume import Volume, plain_affine

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH"),
]
FLAGS = (
    "--headless", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist",
    "--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr", "--hide-scrollbars",
)  # fmt: skip
WATCH = """<script>
window.seen = [];
window.addEventListener("error", e => seen.push("error: " + e.message));
window.addEventListener("unhandledrejection", e => seen.push("rejection: " + e.reason));
document.addEventListener("securitypolicyviolation", e => seen.push("blocked: " + e.violatedDirective + " " + e.blockedURI));
for (const k of ["error", "warn"]) {
  const said = console[k];
  console[k] = (...a) => { seen.push(k + ": " + a.join(" ")); said(...a); };
}
</script>"""
DRIVE = """<script>
(async () => {
  const wait = ms => new Promise(done => setTimeout(done, ms));
  const viewer = document.getElementById("viewer"), body = document.getElementById("quiz-body");
  for (let i = 0; i < 600 && !viewer.dataset.shown; i++) await wait(100);
  const press = word => [...body.querySelectorAll("button")].find(b => b.textContent.startsWith(word)).click();
  const play = answer => {
    let asked = 0;
    while (body.querySelector("img")) { press(answer(body.querySelector("img").src) ? "Synthetic" : "Real"); asked++; }
    return { asked, said: document.getElementById("quiz-text").textContent };
  };
  const truth = new Map(TRUTH);
  press("Start"); const perfect = play(src => truth.get(src));
  press("Again"); const blind = play(() => true);
  const shown = [viewer.dataset.shown];
  viewer.querySelectorAll("button")[0].click();
  for (let i = 0; i < 600 && viewer.dataset.shown === shown[0]; i++) await wait(100);
  shown.push(viewer.dataset.shown);
  const box = document.getElementById("viewer-canvas").getBoundingClientRect();
  await wait(500);
  const result = document.createElement("script"); result.type = "application/json"; result.id = "result";
  result.textContent = JSON.stringify({ seen, perfect, blind, shown, text: document.getElementById("viewer-text").textContent,
    box: [box.left, box.top + scrollY, box.width, box.height],
    requests: performance.getEntriesByType("resource").map(r => r.name.slice(0, 40)) });
  document.body.appendChild(result);
})();
</script>"""


def scan(seed: int) -> Volume:
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in (24, 40, 40)), indexing="ij")
    hu = np.where((x / rng.uniform(0.6, 0.8)) ** 2 + (y / rng.uniform(0.5, 0.6)) ** 2 < 1, 40.0, -1000.0)
    hu[(x - 0.3) ** 2 + y**2 + (z - 0.2) ** 2 < 0.04] = rng.uniform(200, 600)
    noisy = np.rint(gaussian_filter(hu, 0.6) + rng.normal(0, 12, hu.shape)).astype(np.int16)
    return Volume(noisy, plain_affine((6.0, 6.0, 5.0), noisy.shape))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("browser")
    for i in range(10):
        nifti.write(root / "real" / f"r{i}.nii.gz", scan(i))
    for i in range(5):
        nifti.write(root / "made" / f"m{i}.nii.gz", scan(100 + i))
    evaluate(root / "real", root / "made", root / "report")
    return root / "report" / "index.html"


@pytest.fixture(scope="module")
def visit(page) -> tuple[dict, str, np.ndarray]:
    """What the page did, what the browser logged, and a picture of it [rows columns 4]."""
    text = page.read_text(encoding="utf-8")
    cases = json.loads(re.search(r"var cases = (\[.*?\]);", text)[1])
    truth = json.dumps([[case["i"], case["k"] % 7 == 3] for case in cases])
    driven, picture = page.with_name("driven.html"), page.with_name("page.png")
    driven.write_text(text.replace("<head>", f"<head>{WATCH}", 1) + DRIVE.replace("TRUTH", truth), encoding="utf-8")
    profile = f"--user-data-dir={page.parent / 'profile'}"
    call = [CHROMIUM, *FLAGS, profile, "--virtual-time-budget=60000", "--window-size=1200,2600", "--dump-dom", driven.as_uri()]
    done = subprocess.run(call, capture_output=True, text=True, check=True, timeout=280)
    result = re.search(r'id="result">(.*?)</script>', done.stdout, re.DOTALL)
    assert result, f"the driver did not finish: {done.stderr[-2000:]}"
    call[-2] = f"--screenshot={picture}"
    subprocess.run(call, capture_output=True, check=True, timeout=280)
    return json.loads(result[1]), done.stderr, imread(picture)


def test_it_loads_offline_without_a_complaint(visit):
    result, log, _ = visit
    assert result["seen"] == []
    assert [line for line in log.splitlines() if "CONSOLE" in line and ("rror" in line or "efused" in line)] == []
    assert [name for name in result["requests"] if not name.startswith(("data:", "blob:", "file:"))] == []


def test_the_viewer_draws_what_is_chosen(visit):
    result, _, picture = visit
    made, real = result["shown"]
    assert (made, real[0]) == ("m0", "r")
    assert "WebGL" not in result["text"]
    left, top, width, height = (round(value) for value in result["box"])
    canvas = picture[top : top + height, left : left + width, :3].mean(axis=2)
    assert canvas.shape[0] > 300, "the picture is too short to hold the viewer"
    for half in (canvas[:, : width // 2], canvas[:, width // 2 :]):
        assert 0.02 < np.mean(half > 0.25) < 0.9  # a body on black, in planes on both sides
        assert len(np.unique(half.round(2))) > 20  # with its greys


def test_the_quiz_counts(visit):
    result, _, _ = visit
    assert result["perfect"]["asked"] == result["blind"]["asked"] == 10
    low, high = (round(100 * bound) for bound in wilson(10, 10))
    assert f"10 of 10 (100 %; 95 % interval {low} % to {high} %)" in result["perfect"]["said"]
    assert "You can tell them apart." in result["perfect"]["said"]
    low, high = (round(100 * bound) for bound in wilson(5, 10))
    assert f"5 of 10 (50 %; 95 % interval {low} % to {high} %). You called 10 of them synthetic." in result["blind"]["said"]
