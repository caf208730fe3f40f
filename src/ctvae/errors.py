"""What can go wrong on the user's side. The command line prints the message as one line and exits with 2.

CtvaeError
├── InputError           a path, file or argument is not what it has to be
│   └── ScanRejected     one scan cannot be used; `prepare` lists it and goes on
│       └── ScanTooLarge for the memory that is free now; `prepare` tries it again next time
├── ConfigError          an unknown method or key, or a value out of range
├── ModelError           a run folder or packaged model is missing, unfinished or damaged
├── DoesNotFit           the work needs more memory than there is
└── TrainingDiverged     the loss is no longer finite
"""


class CtvaeError(Exception):
    """Base of everything that is the user's to mend. The message says what, where and what to do."""


class InputError(CtvaeError):
    """A path, file or argument is not what it has to be."""


class ScanRejected(InputError):
    """One scan cannot be used. `prepare` writes the reason down and goes on."""


class ScanTooLarge(ScanRejected):
    """One scan needs more memory than is free now. The next run of `prepare` tries it again."""


class ConfigError(CtvaeError):
    """An unknown method or key, or a value out of range."""


class ModelError(CtvaeError):
    """A run folder or packaged model is missing, unfinished or damaged."""


class DoesNotFit(CtvaeError):
    """The work needs more memory than there is."""


class TrainingDiverged(CtvaeError):
    """The loss is no longer finite."""
