"""Pictures show the patient as a radiologist expects: which side is where, and in true proportions."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from matplotlib.image import imread

from ctvae import pictures
from ctvae.errors import InputError
from ctvae.volume import Volume, plain_affine

WINDOW = (-1000.0, 1000.0)


def body(shape=(40, 60, 80), spacing_mm=(2.0, 2.0, 4.0), radius_mm=50.0) -> Volume:
    """A ball of water in air; with unequal spacing its voxels form an ellipsoid."""
    z, y, x = np.meshgrid(
        *((np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing_mm[::-1], strict=True)), indexing="ij"
    )
    hu = np.where(x**2 + y**2 + z**2 < radius_mm**2, 0, -1000).astype(np.int16)
    return Volume(hu, plain_affine(spacing_mm, shape))


def panels(volume: Volume, box_mm=(120.0, 120.0, 160.0)) -> list[np.ndarray]:
    """Axial, coronal and sagittal picture, grey 0..1 [rows columns]."""
    image = imread(io.BytesIO(pictures.strip_png(volume, WINDOW, box_mm, height_px=160)))[..., 0]
    return np.array_split(image, 3, axis=1)


def centre(image: np.ndarray, above: float) -> tuple[float, float]:
    rows, columns = np.nonzero(image > above)
    return rows.mean() / image.shape[0], columns.mean() / image.shape[1]


def test_a_ball_is_round_in_every_plane():
    for image in panels(body()):
        rows, columns = np.nonzero(image > 0.25)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert width / height == pytest.approx(1.0, abs=0.06)
        assert height == pytest.approx(100, abs=5)  # 100 mm at one pixel per mm


@pytest.mark.parametrize(
    ("part", "plane", "expected"),
    [
        (np.s_[:, :, 46:52], "axial", (0.5, 0.62)),  # the patient's left is on the right
        (np.s_[:, 36:42, :], "axial", (0.62, 0.5)),  # posterior is below
        (np.s_[24:27, :, :], "coronal", (0.38, 0.5)),  # the head is up
        (np.s_[:, 36:42, :], "sagittal", (0.5, 0.62)),  # posterior is on the right
    ],
)
def test_sides_are_where_a_radiologist_expects_them(part, plane, expected):
    volume = body()
    volume.hu[part] = np.where(volume.hu[part] > -500, 1000, -1000)
    row, column = centre(panels(volume)[pictures.PLANES.index(plane)], above=0.8)
    assert (row, column) == pytest.approx(expected, abs=0.06)


def test_a_window_maps_its_ends_to_black_and_white():
    volume = body()
    middle = panels(volume)[0][75:85, 58:62]
    assert middle.mean() == pytest.approx(0.5, abs=0.01)  # 0 HU in -1000..1000
    image = imread(io.BytesIO(pictures.strip_png(volume, (-200.0, 0.0), (120.0, 120.0, 160.0))))
    assert image[..., 0].max() == 1.0


def test_sheets_are_written_whole(tmp_path):
    scans = [(f"scan {i}", body(shape=(20 + i, 40, 48))) for i in range(7)]
    pictures.contact_sheet(scans, tmp_path / "sheet.png", "soft")
    pictures.real_beside_synthetic(scans[:2], scans[2:4], tmp_path / "beside.png")
    pictures.reconstructions([("one", scans[0][1], scans[0][1])], tmp_path / "again.png")
    pictures.preview(scans[:3], tmp_path / "preview.png", WINDOW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.png", "beside.png", "preview.png", "sheet.png"]
    for path in tmp_path.iterdir():
        image = imread(path)
        assert 300 <= image.shape[1] <= 1400
        assert image[..., :3].max() > 0.5


def test_an_empty_volume_can_be_drawn(tmp_path):
    air = Volume(np.full((12, 16, 16), -1000, dtype=np.int16), plain_affine((1.0, 1.0, 1.0), (12, 16, 16)))
    pictures.contact_sheet([("air", air)], tmp_path / "air.png")
    assert imread(tmp_path / "air.png")[80:, 60:, :3].max() == 0.0


def test_a_data_uri_holds_the_file(tmp_path):
    pictures.preview([("one", body())], tmp_path / "p.png", WINDOW)
    uri = pictures.data_uri(tmp_path / "p.png")
    assert base64.b64decode(uri.removeprefix("data:image/png;base64,")) == (tmp_path / "p.png").read_bytes()


def test_mistakes_are_named(tmp_path):
    with pytest.raises(InputError, match="window 'bones' is not one of full, abdomen, soft"):
        pictures.contact_sheet([("one", body())], tmp_path / "x.png", "bones")
    for draw in (pictures.contact_sheet, lambda scans, path: pictures.preview(scans, path, WINDOW)):
        with pytest.raises(InputError, match="no volumes to draw"):
            draw([], tmp_path / "x.png")
