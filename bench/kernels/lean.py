"""What float16 coefficients and logits add to a subspace code's KL, by the kernel itself.

Without a GPU the kernel runs in Triton's interpreter, which is chosen when it is decorated: in a process of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from cache import codec as codecs
from cache.codec import DEFAULT_BUDGET
from cache.codec.fidelity import divergence
from kernels.loss.unpack import subspace_logits
from pipeline.labels.epochs import decoder_of

_TEMPERATURE = 4.0


def rows(paths: tuple[Path, ...]) -> list[dict]:
    """A row for each file of teacher logits, arrays as `bench.labels.store` takes them."""
    found = []
    for path in paths:
        child = subprocess.run(
            [sys.executable, "-m", "bench.kernels.lean", path],
            env=os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}),
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        found.append(json.loads(child.stdout))
    return found


def measured(path: Path) -> dict:
    """Of a code fitted at the default budget: KL(T = 4) in nats of the teacher's distributions from decoded ones, of
    the specification's from the kernels', and what the latter add to the former."""
    with np.load(path) as arrays:
        fitted, held = (
            np.stack([arrays[f"{part}original"], arrays[f"{part}augmented"]], axis=1).astype(np.float32)
            for part in ("fit_", "")
        )
    codec = codecs.fit("subspace", fitted, kl=DEFAULT_BUDGET)
    dither_keys = np.arange(len(held), dtype=np.uint64)
    encoded = codec.encode(held, dither_keys)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoder = decoder_of(codec, device)
    codes, keys = (torch.from_numpy(values).to(device) for values in (encoded, dither_keys.view(np.int64)))
    kernels = subspace_logits(codes, None, keys, decoder.lean, decoder.wide).double().cpu().numpy()
    kernels = kernels[..., : held.shape[2]] * decoder.lean.unit
    exact = codec.decode(encoded, dither_keys).astype(np.float64)
    true = held.astype(np.float64)
    code, lean = divergence(true, exact, _TEMPERATURE), divergence(true, kernels, _TEMPERATURE)
    return {
        "logits": path.stem,
        "pairs": len(held),
        "directions": decoder.lean.table.shape[-1],
        "budget": DEFAULT_BUDGET,
        "KL of the code": code,
        "KL between": divergence(exact, kernels, _TEMPERATURE),
        "KL added": lean - code,
        "added / budget": abs(lean - code) / DEFAULT_BUDGET,
        "largest error of a logit": float(np.abs(kernels - exact).max()),
    }


if __name__ == "__main__":
    print(json.dumps(measured(Path(sys.argv[1]))))
