"""Write the README's results from what `ctvae compare` and `ctvae evaluate` measured.

    python benchmarks/readme_results.py COMPARISON [REPORT]

COMPARISON is the folder of `ctvae compare`; REPORT, a folder of `ctvae evaluate`, adds the measures of one longer run.
Replaces what stands between the results markers of README.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ctvae.compare import markdown
from ctvae.config import load_config

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
SHOWN = ("hu_histogram", "slice_continuity", "frechet_layout", "coverage_layout", "classifier_layout", "classifier_texture")


def comparison_section(folder: Path) -> str:
    content = json.loads((folder / "compare.json").read_text())
    first = folder / "runs" / content["methods"][0]["method"]
    shape = "x".join(map(str, load_config(first / "config.yaml").data.shape or ()))
    return (
        f"Each method had {content['minutes']:g} minutes of training on two CPU cores, autoencoder and priors together, on "
        f"the same patients of `headneck` (OpenKBP) at {shape}. The first columns are about reconstructing held-out scans, "
        "the last four about generated ones: latents drawn from N(0, I) / from the flow.\n\n"
        f"{markdown(content['methods'])}\n![The methods compared](docs/images/compare.png)\n"
    )


def report_section(folder: Path) -> str:
    report = json.loads((folder / "report.json").read_text())
    lines = ["| Measure of generated scans | value | real against real |", "|---|---|---|"]
    for measure in report["sets"][0]["measures"]:
        if measure["id"] in SHOWN and measure["status"] == "ok":
            floor = measure["floor"]
            value = f"{measure['value']:.2f} {measure['unit']}".strip()
            lines.append(f"| {measure['title']} | {value} | {floor['low']:.2f} to {floor['high']:.2f} |")
    verdict = report["verdict"]
    told = " ".join([verdict["headline"], *verdict["sentences"]])
    return f"\nThe packaged model, in the words of its own report: {told}\n\n" + "\n".join(lines) + "\n"


def main(comparison: Path, report: Path | None) -> None:
    text = README.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    results = comparison_section(comparison) + (report_section(report) if report else "")
    README.write_text(f"{head}{BEGIN}\n\n{results}\n{END}{tail}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
