"""How fast the computed balance has to follow the error in a run of few steps: each momentum, on several seeds.

"mse" and "diversity" are over the pictures' variance about the average picture: diversity is the variance of samples
about their mean. Rows are means over seeds, with the largest distance from them.

python benchmarks/balance.py --data photos/ --steps 400 --base-dim 6 --seeds 3
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np

from training import Recipe, Run, load_data, train

COLUMNS = ("mse", "diversity", "KL", "gamma / root of mse", "active", "gamma / root of mse, stage 2")


@click.command()
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--steps", "lengths", multiple=True, default=(500, 1500), show_default=True, help="Of stage 1.")
@click.option("--momentum", "momenta", multiple=True, default=(0.99, 0.95, 0.9), show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--side", default=32, show_default=True)
@click.option("--base-dim", default=8, show_default=True)
def main(
    data: Path,
    lengths: tuple[int, ...],
    momenta: tuple[float, ...],
    seeds: int,
    side: int,
    base_dim: int,
) -> None:
    """Train, measure and print a table."""
    print(f"| steps | momentum | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}")
    for steps in lengths:
        wanted = few_steps(steps, side, base_dim)
        pictures = load_data(data, wanted)
        for momentum in momenta:
            rows = []
            for seed in range(seeds):
                recipe = replace(wanted, balance_momentum=momentum, seed=seed)
                with TemporaryDirectory() as folder:
                    rows.append(measures(train(recipe, pictures, Path(folder, "run"))))
            mean = np.mean(rows, axis=0)
            off = np.max(np.abs(rows - mean), axis=0)
            cells = " | ".join(f"{value:.3g} ± {most:.2g}" for value, most in zip(mean, off, strict=True))
            print(f"| {steps} | {momentum:g} | {cells} |", flush=True)


def few_steps(steps: int, side: int, base_dim: int) -> Recipe:
    """Return a small recipe of so many steps: the rate is halved once, in both stages."""
    return Recipe(
        side=side,
        flip=True,
        num_scale=4 if side > 32 else 3,
        base_dim=base_dim,
        batch_norm_momentum=0.99,
        second_dim=512,
        batch=32,
        epochs=2,
        epoch_steps=steps // 2,
        lr=1e-3,
        halve_every=1,
        batch2=128,
        epochs2=2,
        epoch_steps2=steps,
        lr2=1e-3,
        halve_every2=1,
    )


def measures(run: Run) -> list[float]:
    """Return a run's COLUMNS."""
    last = {record["stage"]: record for record in run.history()}
    off = [last[stage]["gamma"] / last[stage]["mse"] ** 0.5 for stage in (1, 2)]
    seen = run.diagnostics
    return [seen["error"], seen["diversity"]["second-stage"], last[1]["kl"], off[0], last[1]["active"], off[1]]


if __name__ == "__main__":
    main()
