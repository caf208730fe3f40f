"""CT-like torsos drawn by formula: for the demo, for tests, and for anybody who has no scans at hand.

Every phantom is another patient: a lower chest and upper abdomen with its own build, organs, contrast phase and noise.
Heights are millimetres above the right dome of the diaphragm. The same seed is the same patient at every resolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ctvae.canvas import EVERYWHERE, Canvas, Field, Point, scanned, tree
from ctvae.volume import Volume

LABELS = {
    "lung": 1, "bone": 2, "heart": 3, "aorta": 4, "liver": 5, "spleen": 6, "kidney": 7, "stomach": 8, "bowel": 9,
    "pancreas": 10, "muscle": 11,
}  # fmt: skip
CHAMBERS = (  # of the heart: centre and radii in mm, turn in radians
    ((38, -8, 30), (26, 21, 30), 0.6),
    ((-2, -38, 30), (26, 20, 28), 0.4),
    ((2, 8, 46), (28, 15, 18), 0.1),
)
FIELD_OF_VIEW_MM = 400.0  # in-plane; a smaller field of view gets a smaller patient


def phantom(
    seed: int, shape: tuple[int, int, int] = (64, 128, 128), spacing_mm: tuple[float, float, float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One synthetic patient: HU, int16 [D H W], and its label map, uint8 [D H W] (numbers in `LABELS`).

    `spacing_mm` is x y z; by default 400 mm across the image and 3 mm slices. The arrays follow `ctvae.volume`:
    index 0 is the lowest slice, the most anterior row, the patient's rightmost column.
    """
    spacing_mm = spacing_mm or default_spacing_mm(shape)
    rng = np.random.default_rng([seed, 20])
    extent_mm = np.array([n * step for n, step in zip(shape, reversed(spacing_mm), strict=True)])  # D H W
    extent_mm = extent_mm / min(1.0, extent_mm[1:].min() / FIELD_OF_VIEW_MM)
    canvas = Canvas(rng, shape, extent_mm, bottom_mm=rng.uniform(-0.72, -0.5) * extent_mm[0], labels=LABELS)
    patient = Patient.draw(rng)
    depth = _body(canvas, patient)
    dome = _abdomen(canvas, patient, depth)
    lung = _chest(canvas, patient, depth, dome)
    _lung_vessels(canvas, lung)
    _spine(canvas, patient)
    _ribs(canvas, patient, depth)
    return scanned(canvas.hu, rng, noise_hu=rng.uniform(7, 18)), canvas.labels


def default_spacing_mm(shape: tuple[int, int, int]) -> tuple[float, float, float]:
    """x y z: 400 mm across the image, 3 mm slices."""
    return FIELD_OF_VIEW_MM / shape[2], FIELD_OF_VIEW_MM / shape[1], 3.0


def write_phantoms(
    folder: Path,
    count: int,
    seed: int = 0,
    shape: tuple[int, int, int] = (64, 128, 128),
    spacing_mm: tuple[float, float, float] | None = None,
) -> list[Path]:
    """Write `phantom_000.nii.gz` ... into `folder` and their label maps into `folder/labels`; returns the scans' paths.

    Files that are there already are kept, so an interrupted call goes on where it stopped. Raises InputError when the
    folder cannot be written.
    """
    from ctvae import nifti  # nibabel loads here: drawing needs numpy and scipy only

    spacing_mm = spacing_mm or default_spacing_mm(shape)
    affine = np.diag([*spacing_mm, 1.0]) @ np.diag([-1.0, -1.0, 1.0, 1.0])  # voxel axes L P S in RAS mm
    paths = [Path(folder) / f"phantom_{index:03d}.nii.gz" for index in range(count)]
    for index, path in enumerate(paths):
        labels_path = path.parent / "labels" / path.name
        if path.exists() and labels_path.exists():
            continue
        hu, labels = phantom(seed + index, shape, spacing_mm)
        nifti.write(labels_path, Volume(labels.astype(np.int16), affine), description="phantom labels, not a patient")
        nifti.write(path, Volume(hu, affine), description="phantom, not a patient")
    return paths


@dataclass(frozen=True)
class Patient:
    """What differs from one patient to the next; lengths in mm, attenuation in HU."""

    half_width: float
    half_depth: float
    fat: float
    breasts: float
    blood: float
    liver: float
    spleen: float
    cortex: float
    medulla: float
    marrow: float
    spine_y: float
    rib_phase: float
    heart: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Patient:
        half_width = rng.uniform(142, 176)
        half_depth = half_width * rng.uniform(0.62, 0.74)
        phase = rng.choice(["none", "arterial", "portal"], p=[0.35, 0.25, 0.4])
        blood, liver, spleen, cortex, medulla = {
            "none": (42, 56, 48, 34, 30), "arterial": (270, 74, 115, 185, 90), "portal": (155, 112, 122, 190, 165)
        }[str(phase)]  # fmt: skip
        vary = rng.uniform(0.9, 1.1, 4)
        return cls(
            half_width, half_depth, fat=rng.uniform(7, 26), breasts=rng.choice([0.0, 1.0]) * rng.uniform(10, 26),
            blood=blood * vary[0], liver=liver * vary[1] - rng.exponential(5), spleen=spleen * vary[2],
            cortex=cortex * vary[3], medulla=medulla * vary[3], marrow=rng.uniform(90, 190),
            spine_y=half_depth * rng.uniform(0.40, 0.46), rib_phase=rng.uniform(-12, 12), heart=rng.uniform(0.9, 1.12),
        )  # fmt: skip


def _body(canvas: Canvas, patient: Patient) -> Field:
    """Skin, fat and the muscular wall; returns the depth in mm below the fat, the wall being the first 15."""
    x, y, z = canvas.x, canvas.y, canvas.z
    width = patient.half_width * (1 + 0.05 * np.tanh((z + 20) / 60))
    back = np.where(y > 0, 0.97, 1.0) * patient.half_depth
    rho = ((np.abs(x) / width) ** 2.2 + (np.abs(y) / back) ** 2.2) ** np.float32(1 / 2.2)
    depth = (1 - rho) * np.sqrt(x * x + y * y) / np.maximum(rho, 0.05)
    breasts = patient.breasts * np.exp(-(((np.abs(x) - 72) / 38) ** 2) - ((z - 60) / 45) ** 2) * (y < 0)
    groove = 7 * np.exp(-((x / 22) ** 2)) * (y > 0)
    depth += breasts - groove
    flank = 0.65 + 0.5 * (x / width) ** 2 + 0.3 * np.exp(-(((z + 110) / 60) ** 2))
    fat = np.maximum(patient.fat * flank + breasts - 0.5 * groove + 1.2 * canvas.ripple, 2.5)
    canvas.paint(-depth, 5.0)
    canvas.paint(2.0 - depth, -104 + 6 * canvas.ripple)
    shoulder = 11 * np.exp(
        -(((np.abs(x) / width - 0.8) / 0.3) ** 2)
    )  # muscle outside the ribs, upwards and to the back
    shoulder *= np.clip((z + 60) / 80, 0, 1) * np.clip((y + 45) / 50, 0, 1)
    depth -= 2.0 + fat
    streaks = 52 - 90 * np.clip(canvas.ripple - 0.9, 0, 1)
    canvas.paint(-depth, streaks, "muscle")
    between = np.abs(depth - 6 - canvas.ripple) - np.maximum(0.8 * canvas.noise(45), -1)
    canvas.paint(between, -70.0)  # fat between the muscles
    depth -= shoulder
    canvas.paint(15 - depth, -105 + 8 * canvas.ripple)
    return depth


def _dome(canvas: Canvas) -> Field:
    """Height in mm above the diaphragm, [D H W]: two domes, falling to the wall and further at the back."""
    x, y = canvas.x, canvas.y
    right = -75 * (((x + 60) / 92) ** 2 + ((y + 4) / 88) ** 2) ** 2
    left = -15 - 75 * (((x - 66) / 84) ** 2 + ((y + 2) / 86) ** 2) ** 2
    middle = -26 - 60 * ((x / 60) ** 2 + ((y + 30) / 60) ** 2) ** 2
    height = np.maximum(np.maximum(right, left), middle) - 0.25 * np.maximum(y - 10, 0)
    height = np.maximum(height, -115 - 10 * canvas.ripple)
    return canvas.z - height + 1.5 * canvas.ripple


def _abdomen(canvas: Canvas, patient: Patient, depth: Field) -> Field:
    """Organs below the diaphragm; returns the height above it in mm."""
    rng, x, y = canvas.rng, canvas.x, canvas.y
    dome = _dome(canvas)
    below = np.maximum(16 - depth, dome + 2)  # the peritoneal space
    _vessels_of_the_belly(canvas, patient, below)
    _bowel(canvas, patient, below)

    centre = (96 + rng.uniform(-6, 6), 40 + rng.uniform(-8, 8), -48 + rng.uniform(-12, 12))
    spleen = canvas.ellipsoid(centre, (30, rng.uniform(38, 52), rng.uniform(38, 54)), EVERYWHERE, turn=-0.35)
    canvas.paint(np.maximum(spleen, below), patient.spleen, "spleen")
    _stomach(canvas, below)
    lowest = rng.uniform(-135, -105)
    low = 0.8 * (lowest + rng.uniform(0.42, 0.6) * (x + 110) - canvas.z + 5 * canvas.ripple)
    behind = 0.9 * (y - 96 + 0.58 * (x + 110) + 4 * canvas.ripple)
    liver = np.maximum(np.maximum(low, behind), np.maximum(below, x - rng.uniform(40, 80)))
    share = canvas.paint(liver, patient.liver, "liver")
    vein = 20 + 0.3 * (patient.blood - patient.liver) if patient.blood > 100 else -12.0
    veins = tree(
        rng, [(-20, 12, -62), (-22, 12, -25)], [(-1, -0.5, 0.1), (-1, -0.4, -0.5)], length_mm=52, radius_mm=5.5
    )
    canvas.hu += vein * share * canvas.vessels(veins)
    canvas.organ((-48, -22, lowest + 42), (14, 22, 20), rng.uniform(5, 18), ripple_mm=1)  # gallbladder
    _kidneys(canvas, patient)
    _pancreas(canvas, patient)
    return dome


def _stomach(canvas: Canvas, below: Field) -> None:
    rng = canvas.rng
    centre = (52 + rng.uniform(-8, 8), -12 + rng.uniform(-10, 10), -50 + rng.uniform(-10, 10))
    radii = (rng.uniform(30, 44), rng.uniform(28, 44), rng.uniform(36, 52))
    wall = np.maximum(canvas.ellipsoid(centre, radii, EVERYWHERE, turn=0.5, ripple_mm=3), below)
    canvas.paint(wall - 2, -100.0)
    canvas.paint(wall, rng.uniform(45, 80), "stomach")
    level = centre[1] + rng.uniform(-0.9, 0.3) * radii[1]  # gas collects in front of the fluid
    canvas.paint(wall + 5, rng.uniform(8, 45), "stomach")
    canvas.paint(np.maximum(wall + 5, canvas.axes[1][None, :, None] - level), -950.0, "stomach")


def _kidneys(canvas: Canvas, patient: Patient) -> None:
    rng = canvas.rng
    for side, height in ((-1, -100), (1, -84)):
        x = side * rng.uniform(56, 66)
        centre = (x, patient.spine_y + rng.uniform(-8, 2), height + rng.uniform(-10, 10))
        length = rng.uniform(46, 58)
        turn = side * rng.uniform(-0.9, -0.5)
        canvas.organ(centre, (36, 34, length + 10), -103.0, turn=turn)
        canvas.organ(centre, (29, 25, length), patient.cortex, "kidney", turn, ripple_mm=1.2)
        canvas.organ(centre, (21, 17, length - 10), patient.medulla, "kidney", turn, ripple_mm=3)
        hilum = (x - side * 14, centre[1] - 9, centre[2])
        canvas.organ(hilum, (17, 10, length * 0.5), -85.0, turn=turn, ripple_mm=3)
        canvas.organ(hilum, (8, 5, length * 0.28), rng.uniform(8, 20), "kidney", turn)
        vessel = np.linspace(hilum, (side * 12, patient.spine_y - 34, centre[2] + 6), 9)
        for point in vessel:
            canvas.organ(tuple(point), (5.5, 5, 5), patient.blood * 0.9)


def _pancreas(canvas: Canvas, patient: Patient) -> None:
    rng = canvas.rng
    front = patient.spine_y - 58
    nodes = np.array(
        [(-38, front + 12, -98), (-22, front, -84), (5, front - 8, -72), (38, front + 8, -62), (72, 28, -52)]
    )
    nodes = nodes + rng.uniform(-5, 5, nodes.shape)
    for at in np.linspace(0, len(nodes) - 1, 17):
        centre = tuple(float(np.interp(at, range(len(nodes)), nodes[:, axis])) for axis in range(3))
        canvas.organ(
            centre, (9, rng.uniform(7, 11), rng.uniform(8, 12)), 38 + 0.3 * patient.blood, "pancreas", ripple_mm=3
        )


def _vessels_of_the_belly(canvas: Canvas, patient: Patient, below: Field) -> None:
    """Mesenteric branches in the fat, drawn before the bowel that hides most of them."""
    root = (0, patient.spine_y - 55, -85)
    mesentery = tree(canvas.rng, [root] * 3, [(0, -0.7, -0.7), (0.7, -0.5, -0.4), (-0.7, -0.5, -0.6)], 40, 3.8)
    canvas.hu += canvas.cover(below) * canvas.vessels(mesentery) * (patient.blood + 105)


def _bowel(canvas: Canvas, patient: Patient, below: Field) -> None:
    """Small-bowel loops packed in fat, then the colon as chains of haustra; gas in front, fluid or stool behind."""
    rng = canvas.rng
    inner = patient.half_width - patient.fat - 40
    for _ in range(70):
        angle, reach = rng.uniform(0, 2 * np.pi), np.sqrt(rng.uniform(0, 1))
        centre = (reach * np.cos(angle) * inner, -30 + reach * np.sin(angle) * 45, rng.uniform(-190, -72))
        radii = (rng.uniform(9, 17), rng.uniform(8, 14), rng.uniform(8, 16))
        _loop(canvas, below, centre, radii, wall_hu=45 + 0.25 * patient.blood, gas=0.12, stool=0.0)
    side, front = patient.half_width - patient.fat - 38, -patient.half_depth + patient.fat + 42
    chains = (
        np.linspace((-side, 15, -200), (-side + 8, 0, -95), 8),
        np.linspace((side, 35, -200), (side, 30, -45), 11),
        np.stack(
            [np.linspace(-side, side, 13), front + 10 * np.linspace(-1, 1, 13) ** 2, np.linspace(-105, -62, 13)], 1
        ),
    )
    stool = rng.uniform(0, 0.8)
    for chain in chains:
        for centre in chain + rng.normal(0, 3, chain.shape):
            radii = (rng.uniform(15, 23), rng.uniform(14, 21), rng.uniform(11, 15))
            _loop(canvas, below, tuple(centre), radii, wall_hu=40.0, gas=0.75, stool=stool)


def _loop(canvas: Canvas, below: Field, centre: Point, radii: Point, wall_hu: float, gas: float, stool: float) -> None:
    """One loop of bowel: a sleeve of fat, the wall, and what it holds. `gas` and `stool` are probabilities."""
    rng = canvas.rng
    box = canvas.box(centre, max(radii))
    wall = np.maximum(canvas.ellipsoid(centre, radii, box, rng.uniform(-1, 1), ripple_mm=2.5), below[box])
    canvas.paint(wall - 3, -105.0, box=box)
    canvas.paint(wall, wall_hu, "bowel", box)
    if rng.random() < stool:
        canvas.paint(wall + 3, -60 + 130 * canvas.ripple[box], "bowel", box)
    else:
        canvas.paint(wall + 2.5, rng.uniform(15, 45), "bowel", box)
    if rng.random() < gas:
        level = centre[1] + rng.uniform(-0.4, 0.7) * radii[1]
        canvas.paint(np.maximum(wall + 3, canvas.axes[1][None, box[1], None] - level), -920.0, "bowel", box)


def _chest(canvas: Canvas, patient: Patient, depth: Field, dome: Field) -> Field:
    """Lungs, mediastinum, heart and great vessels; returns the lungs' share of each voxel."""
    rng, x, y = canvas.rng, canvas.x, canvas.y
    canvas.paint(np.maximum(np.abs(dome) - 2, 15 - depth), 48.0, "muscle")
    spine_y = patient.spine_y
    front = np.clip((spine_y - 20 - y) / 60, 0, 1)
    half = 24 - 9 * front + 8 * np.exp(-(((y + 5) / 22) ** 2)) + 3 * canvas.ripple
    heart_at = (20.0, -patient.half_depth * 0.22, 34.0)
    size = patient.heart
    heart = canvas.ellipsoid(heart_at, (62 * size, 47 * size, 52 * size), EVERYWHERE, turn=0.55, ripple_mm=2)
    lung = np.maximum(np.maximum(16 - depth, 2 - dome), np.maximum(half - np.abs(x - 3), 3 - heart))
    hu = -860 + 70 * np.clip(y / 90, -1, 1) + 14 * canvas.ripple
    share = canvas.paint(lung, hu, "lung")
    canvas.paint(np.maximum(heart, 2 - dome), 0.35 * patient.blood + 35, "heart")
    for centre, radii, turn in CHAMBERS:
        canvas.organ(centre, tuple(size * r for r in radii), patient.blood * rng.uniform(0.85, 1.1), "heart", turn, 2)
    blood = patient.blood
    high = float(canvas.axes[0][-1]) + 40
    canvas.tube([(-8, -28, 72), (-14, -34, high)], 15, blood, "heart")
    canvas.tube([(-30, -16, 70), (-32, -22, high)], 9, blood * 1.1)
    canvas.tube([(8, -22, 76), (4, -10, 104)], 14, blood)
    for side in (-1, 1):
        canvas.organ((side * 32, 4, 62), (15, 11, 20), 0.8 * blood, turn=side * 0.3, ripple_mm=3)  # hila
        canvas.tube([(side * 28, 2, 58), (0, 6, 98)], 5.5, -960.0)
    canvas.tube([(0, 6, 96), (0, 4, high)], 8.5, -985.0)
    low = float(canvas.axes[0][0]) - 40
    aorta = [(2, spine_y - 33, low), (10, spine_y - 33, -60), (22, spine_y - 25, 40), (25, spine_y - 22, high)]
    canvas.tube(aorta, rng.uniform(9.5, 13), blood, "aorta")
    canvas.tube([(-24, spine_y - 30, low), (-26, spine_y - 38, -20), (-28, 0, 14)], 10, 0.85 * blood, flat=1.25)
    canvas.tube([(16, spine_y - 46, -25), (6, spine_y - 36, 20), (2, spine_y - 30, high)], 7.5, 40.0, flat=1.3)
    return share


def _spine(canvas: Canvas, patient: Patient) -> None:
    """Vertebrae with cortical shell and marrow, discs, canal, arches and processes, and the muscles beside them."""
    x, y, z = canvas.x, canvas.y, canvas.z
    canal = patient.spine_y + 27
    box = canvas.box((0, canal, 0), 75)
    box = (slice(None), box[1], box[2])
    x, y, z = x[box], y[box], z[box]
    wide = np.clip((-20 - z) / 60, 0, 1)  # the back muscles and psoas grow towards the loins
    muscle = 52 - 110 * np.clip(canvas.ripple[box] - 0.8, 0, 1)
    for side in (-1, 1):
        back = np.sqrt(((x - side * 31) / 27) ** 2 + ((y - canal - 15) / (15 + 6 * wide)) ** 2)
        canvas.paint((back - 1) * 17 + 1.5 * canvas.ripple[box], muscle, "muscle", box)
        psoas = np.sqrt(((x - side * 36) / 15) ** 2 + ((y - patient.spine_y - 5) / 17) ** 2)
        canvas.paint(np.maximum((psoas - wide) * 15, -70 - z), 54.0, "muscle", box)
    period = 27.0
    turn = (z + patient.rib_phase) / period
    offset = (turn - np.round(turn)) * period  # mm above the middle of the nearest vertebra
    waist = 1.5 * (1 - (offset / 12) ** 2)
    body = np.sqrt((x / 22) ** 2 + ((y - patient.spine_y) / 16.5) ** 2)
    body = np.maximum((body - 1) * 19 + waist, y - canal + 10)
    canvas.paint(body - 0.5, 85.0, box=box)
    bone = np.maximum(body, np.abs(offset) - 10.5)
    canvas.paint(bone, 480.0, "bone", box)
    canvas.paint(bone + 1.7, patient.marrow + 35 * canvas.ripple[box], "bone", box)
    ring = np.sqrt((x / 1.15) ** 2 + (y - canal) ** 2)
    lower = offset + 7 + 0.35 * (y - canal)  # processes slope down to the back
    spinous = _all(np.abs(x) - 4 - 0.6 * canvas.ripple[box], np.abs(lower) - 10, np.abs(y - canal - 24) - 15)
    transverse = _all(np.abs(offset - 2) - 6, np.abs(y - canal + 0.12 * np.abs(x)) - 5, np.abs(np.abs(x) - 24) - 12)
    arch = _all(np.abs(ring - 12.5) - 3.5, np.abs(offset + 2) - 11)
    pedicle = _all(np.abs(np.abs(x) - 12) - 4.5, np.abs(y - canal + 12) - 9, np.abs(offset - 4) - 6)
    posterior = np.minimum(np.minimum(spinous, transverse), np.minimum(arch, pedicle))
    canvas.paint(posterior, 480.0, "bone", box)
    canvas.paint(posterior + 3.2, patient.marrow + 60, "bone", box)
    canvas.paint(ring - 9.5, 12.0, box=box)
    canvas.paint(ring - 5.5, 38.0, box=box)


def _all(*distances: Field) -> Field:
    """Distance to what lies inside all of them."""
    return np.maximum.reduce(distances)


def _ribs(canvas: Canvas, patient: Patient, depth: Field) -> None:
    """Twelve oblique pairs in the wall, cartilage towards the front, and the sternum."""
    x, y, z = canvas.x, canvas.y, canvas.z
    angle = np.arctan2(np.abs(x), y + 12)  # from the midline of the back
    drop = 62 * (1 - np.cos(np.minimum(angle, 2.15))) - 42 * np.maximum(angle - 2.15, 0)
    turn = (z + patient.rib_phase + 72 + drop) / 26
    number = np.round(turn)  # 0 is the twelfth rib
    offset = (turn - number) * 26
    longest = np.clip(1.15 + 0.42 * number, 0, 2.2)
    rib = np.sqrt((1.25 * (depth - 10.5)) ** 2 + (0.8 * offset) ** 2) - 5.2 + 0.5 * canvas.ripple
    rib = np.where((number >= 0) & (angle > 0.3), rib, 99.0)
    bone = np.maximum(rib, (angle - longest) * 60)
    canvas.paint(np.where(number > 2, np.maximum(rib, (longest - angle) * 60), 99.0), 95.0)
    canvas.paint(bone, 620.0, "bone")
    canvas.paint(bone + 2.4, patient.marrow + 40, "bone")
    sternum = np.maximum(np.maximum(np.abs(x) - 17 - canvas.ripple, np.abs(depth - 10) - 5), np.maximum(18 - z, y))
    canvas.paint(sternum, 420.0, "bone")
    canvas.paint(sternum + 2.2, patient.marrow * 0.7, "bone")


def _lung_vessels(canvas: Canvas, lung: Field) -> None:
    """Arteries and veins from each hilum into `lung`, its share of each voxel."""
    upper = [(0.3, 0.1, 1), (0.6, 0.1, 0.7), (0.7, 0.5, 0.1), (0.5, -0.7, 0.2)]
    lower = [(0.3, 0.6, -0.8), (0.5, -0.4, -0.9), (0.8, 0.2, -0.6), (0.3, 0.9, -0.2)]
    aims = np.array(upper + lower)
    headings = np.concatenate([aims, aims * (-1, 1, 1)])  # to the left, then to the right
    roots = [(34 if heading[0] > 0 else -30, 4, 60) for heading in headings]
    points = tree(canvas.rng, roots, headings, length_mm=36, radius_mm=5.0, generations=7)
    share = lung * canvas.vessels(points)
    canvas.hu += share * (30 - canvas.hu)
