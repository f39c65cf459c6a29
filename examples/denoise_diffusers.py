"""A denoiser of diffusers: the loop stays as it is, the U-Net within it is compiled.

    python examples/denoise_diffusers.py      run it twice: the second run starts warm

The U-Net is small and has random weights, so that nothing is downloaded: what it paints is noise,
and the same noise as eager.
"""

from __future__ import annotations

import time

import diffusers
import torch

import precast

NUM_STEPS = 8


def make_model() -> tuple[diffusers.UNet2DModel, dict[str, torch.Tensor]]:
    """Return a small U-Net, and a call as the loop below makes it."""
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    return model.eval(), {"sample": torch.randn(1, 3, 32, 32), "timestep": torch.tensor(10)}


def denoise(model: diffusers.UNet2DModel) -> torch.Tensor:
    """Return an image: noise from which the model takes away what it takes for noise, in steps."""
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(NUM_STEPS)
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for timestep in scheduler.timesteps:
            noise = model(sample=image, timestep=timestep).sample
            image = scheduler.step(noise, timestep, image).prev_sample
    return image


def seconds(model: diffusers.UNet2DModel) -> float:
    started = time.perf_counter()
    denoise(model)
    return time.perf_counter() - started


def main() -> None:
    model, _ = make_model()
    expected = denoise(model)
    eager_s = min(seconds(model) for _ in range(3))

    precast.compile(model)
    started = time.perf_counter()
    image = denoise(model)
    first_s = time.perf_counter() - started
    compiled_s = min(seconds(model) for _ in range(3))

    print(f"largest difference from eager: {(image - expected).abs().max():.1e}")
    print(f"{NUM_STEPS} steps: eager {eager_s:.2f} s, compiled {compiled_s:.2f} s")
    status = precast.status(model)
    compile_s = sum(assembly["compile_seconds"] for assembly in status["assemblies"])
    if status["is_warm"]:
        print(f"warm: the first image took {first_s:.2f} s, "
              f"since an earlier run spent {compile_s:.0f} s compiling")  # fmt: skip
    else:
        print(f"cold: the first image took {first_s:.2f} s with compiling. "
              "Run it again: it is then warm.")  # fmt: skip
    for reason in status["reasons"]:
        print(f"{reason['code']}: {reason['message']}")


if __name__ == "__main__":
    main()
