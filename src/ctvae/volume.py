"""A CT volume: HU values with the geometry that says where they are in the patient.

The only place where axis order is converted. Arrays are D H W (z y x): `hu[0]` is the lowest axial slice. Affines are
NIfTI's: they take voxel indices (i j k) = (x y z) to RAS millimetres, so array index [d, h, w] is voxel (w, h, d).
"""
