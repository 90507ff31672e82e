"""NVIDIA FLARE's own homomorphic aggregation, with its own classes: the reference of `splitfl bench aggregation`.

What its simulator does between a party and the server, without the network: encrypt, serialise, read, add, serialise.
The CKKS parameters are those of its own example of provisioning (8192; 60, 40, 40; 2^40; symmetric).
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from splitfl.bench.aggregation_sums import TENSORS, Clock, Ground

_ENCRYPTED = 2  # parties that encrypt in one turn; the server adds these updates as often as there are parties


class NVFlare:
    """A party's and the server's part.

    Args:
        ground: its updates are encrypted.
    """

    def __init__(self, ground: Ground) -> None:
        import tenseal
        from nvflare.apis.fl_context import FLContext
        from nvflare.app_opt.he import decomposers
        from nvflare.app_opt.he.model_encryptor import HEModelEncryptor

        logging.disable(logging.CRITICAL)  # it logs every tensor; this process says nothing else
        decomposers.register()
        context = tenseal.context(
            tenseal.SCHEME_TYPE.CKKS, poly_modulus_degree=8192, coeff_mod_bit_sizes=[60, 40, 40],
            encryption_type=tenseal.ENCRYPTION_TYPE.SYMMETRIC,
        )  # fmt: skip
        context.global_scale = 2**40
        self._encryptor = HEModelEncryptor()
        self._encryptor.tenseal_context = context
        self._encryptor.weigh_by_local_iter, self._encryptor.n_iter = True, 1
        self._context, self._ground, self._clock = FLContext(), ground, Clock()

    def measure(self) -> dict[str, float]:
        """One round: some parties encrypt, the server adds as many updates as there are parties."""
        times, blobs = [], []
        for vector in self._ground.vectors[:_ENCRYPTED]:
            spent, blob = self._clock.time(lambda: self._encrypt([vector]))  # noqa: B023  called at once
            times.append(spent)
            blobs.append(blob)
        count = len(self._ground.vectors)
        adding, result = self._clock.time(lambda: self._add([blobs[n % len(blobs)] for n in range(count)]))
        many, tensors = self._clock.time(lambda: self._encrypt(np.array_split(self._ground.vectors[0], TENSORS)))
        return {
            "nvflare.up": len(blobs[0]),
            "nvflare.down": len(result),
            "nvflare.party": statistics.median(times),
            "nvflare.coordinator": adding,
            "nvflare.many tensors": many,
            "nvflare.many tensors up": len(tensors),
        }

    def _encrypt(self, parts: Sequence[npt.NDArray[np.float32]]) -> bytes:
        from nvflare.fuel.utils import fobs

        weights: dict[str, Any] = {f"tensor {number}": part.copy() for number, part in enumerate(parts)}
        self._encryptor.encrypt_layers = [True] * len(weights)
        return bytes(fobs.dumps(self._encryptor.encryption(weights, self._context)[0]))

    def _add(self, blobs: Sequence[bytes]) -> bytes:
        from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper
        from nvflare.fuel.utils import fobs

        helper = WeightedAggregationHelper(weigh_by_local_iter=False)
        for number, blob in enumerate(blobs):
            helper.add(fobs.loads(blob), 1.0, f"party {number}", 0)
        return bytes(fobs.dumps(helper.get_result()))
