"""Types that several packages share: arrays by their dtype, and records."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

BoolArray = npt.NDArray[np.bool_]
UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
IndexArray = npt.NDArray[np.intp]

Record = dict[str, Any]  # facts by name, as a JSON object holds them: an epoch's, or a measurement's
