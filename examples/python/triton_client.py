"""Use the server as if it were Triton: NVIDIA's client, nothing of ours.

pip install 'tritonclient[grpc]'
python triton_client.py 127.0.0.1:8470 out/
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException


def main(address: str, out: Path, model: str) -> None:
    """Write OUT/noise.npy with the pictures of it, OUT/by_noise.npy, and OUT/by_address.npy."""
    out.mkdir(parents=True, exist_ok=True)
    with triton.InferenceServerClient(address) as client:
        # The model says what it takes: `noise`, FP32 [-1, noise_size]; -1 is the batch.
        size = client.get_model_metadata(model).inputs[0].shape[1]

        # By noise: any normal numbers will do, and what lies between two noises are pictures too.
        first, last = np.random.default_rng(0).standard_normal((2, size))
        share = np.linspace(0, 1, 8)[:, None]
        noise = (np.sqrt(1 - share) * first + np.sqrt(share) * last).astype(np.float32)  # the variance stays 1
        tensor = triton.InferInput("noise", list(noise.shape), "FP32")
        tensor.set_data_from_numpy(noise)
        np.save(out / "noise.npy", noise)
        np.save(out / "by_noise.npy", client.infer(model, [tensor]).as_numpy("images"))

        # By address: no input, only which samples. Parameters are signed here, so what needs 64 bits goes as text.
        which = {"seed": str(2**64 - 1), "start": 100, "count": 5}
        reply = client.infer(model, [], parameters=which)
        np.save(out / "by_address.npy", reply.as_numpy("images"))

        print(f"{model} version {reply.get_response().model_version}: {reply.as_numpy('images').shape} in {out}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="faces")
    try:
        main(**vars(parser.parse_args()))
    except InferenceServerException as error:
        sys.exit(f"Error: {error.message()}")
