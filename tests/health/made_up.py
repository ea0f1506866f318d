"""Made-up records of a healthy run, for tests to change."""

import numpy as np

from unbraid.health.series import series_from_rows

RECIPE = {
    "loss": {"name": "neg_si_sdr", "assign": "permutation"},
    "optim": {"name": "adam", "lr": 1e-3},
    "schedule": {"name": "plateau"},
    "clip": {"name": "fixed", "max_norm": 5.0},
    "train": {"precision": "fp32"},
}
BLOCKS = ("encoder", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "decoder")


class Run:
    """A run of a loss that falls as a power of the step, with the noise of small batches."""

    def __init__(self, n_steps=2000, *, seed=0, every=200):
        rng = np.random.default_rng(seed)
        self.recipe = {table: dict(keys) for table, keys in RECIPE.items()}
        self.environment = {"loss_in_db": True}
        self.data = {
            "splits": {"train": {"files": 300, "speakers": 30}, "valid": {"files": 40, "speakers": 4}},
            "shared": dict.fromkeys(("n_files", "n_speakers", "n_copies"), 0) | {"files": [], "copies": []},
        }
        self.events = []
        step = np.arange(1, n_steps + 1)
        loss = 1 - 4 * np.log10(1 + step / 100) + rng.normal(0, 1.5, n_steps)
        norm = 6 * np.exp(rng.normal(0, 0.4, n_steps))
        self.steps = [
            {
                "step": int(k),
                "epoch": 0,
                "outcome": "trained",
                "loss": float(loss[k - 1]),
                "grad_norm": float(norm[k - 1]),
                "max_norm": 5.0,
                "clipped_grad_norm": float(min(5.0, norm[k - 1])),
                "clipped": bool(norm[k - 1] > 5),
                "si_sdr": [float(-loss[k - 1] + rng.normal()), float(-loss[k - 1] + rng.normal())],
                "lr": 1e-3 * 0.5 ** (k > 0.7 * n_steps),
                "loss_scale": 1.0,
                "n_trained": 4,
                "n_filtered": 0,
                "n_bad": 0,
                "seconds": float(0.1 + 0.01 * rng.random()),
                "data_seconds": float(0.002 * rng.random()),
                "elapsed_seconds": 0.11 * k,
                "peak_memory_bytes": 2**30 + 2**20 * int(min(k, 200)),
                **({"blocks": self._blocks(rng), "items": self._items(rng, int(k))} if k % 50 == 0 else {}),
            }
            for k in step
        ]
        self.validations = [
            {"step": k, "loss": -gain, "si_sdr": gain, "si_sdri": gain, "lr": 1e-3}
            for k in range(every, n_steps + 1, every)
            for gain in [float(4 * np.log10(1 + k / 100) - 1 + rng.normal(0, 0.05))]
        ]
        self.add_items(np.random.default_rng([seed, 1]), lambda k: 0.5 / (1 + k / 200))

    def add_items(self, rng, share_changed, n_items=30):
        """Validated items, of which a share changes order from validation to validation."""
        orders = rng.random(n_items) < 0.5
        for row in self.validations:
            orders ^= rng.random(n_items) < share_changed(row["step"])
            row["orders"] = [[int(swapped), int(not swapped)] for swapped in orders]
            row["item_si_sdri"] = [round(row["si_sdri"] + float(rng.normal(0, 1.5)), 3) for _ in orders]

    def _blocks(self, rng):
        return {
            name: {
                "grad_norm": float(np.exp(rng.normal(0, 0.5))),
                "update_ratio": float(1.5e-3 * np.exp(rng.normal(0, 0.3))),
            }
            for name in BLOCKS
        }

    def _items(self, rng, k):
        return [
            {
                "item": {"purpose": "train", "epoch": 0, "index": 4 * k + i, "files": [f"a{i}.wav", f"b{i}.wav"]},
                "loss": -1.0,
                "weight": 1.0,
                "order": [0, 1],
                "estimate_levels_db": [float(rng.normal(-25, 3)), float(rng.normal(-25, 3))],
                "similarity": float(rng.uniform(0.1, 0.6)),
                "residual_db": float(rng.normal(-15, 2)),
                "source_levels_db": [float(rng.normal(-25, 3)), float(rng.normal(-27, 3))],
                "source_residual_db": float(rng.normal(-140, 5)),
            }
            for i in range(4)
        ]

    def change(self, first=1, last=None, **values):
        """Other values in some steps: a value, or a function of the row."""
        for row in self.steps[first - 1 : last]:
            for name, value in values.items():
                row[name] = value(row) if callable(value) else value
        return self

    def change_items(self, **values):
        for row in self.steps:
            for item in row.get("items", ()):
                item.update(values)
        return self

    def change_blocks(self, **factors):
        for row in self.steps:
            for block in row.get("blocks", {}).values():
                for name, factor in factors.items():
                    block[name] *= factor
        return self

    def series(self):
        return series_from_rows(self.steps, self.validations, self.events, self.recipe, self.environment, self.data)
