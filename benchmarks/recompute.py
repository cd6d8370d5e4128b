"""What computing the network again saves and costs: ``python -m benchmarks.recompute``.

One training step (energies, forces, stress; gradient of all weights or of an adapter) on a box of
64 water molecules with metatrain's default network. Each way runs in a process of its own and
prints the growth of its peak memory and its processor time; the table gives them and their ratios.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import torch
from benchmarks.speed.inputs import water_box
from benchmarks.speed.memory import MemoryMeter

from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.inject import inject
from pet_finetune.backends.choice import choose_backend, use_backend
from pet_finetune.config.run_options import ModelOptions
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.keys import TargetSpec
from pet_finetune.model.potential import Potential

WAYS = ("plain", "torch.utils.checkpoint", "gradient_checkpointing")
REPEATS = 2


def use_torch_checkpoint(model: Potential) -> None:
    """What torch offers, around the same parts, for comparison."""
    from torch.utils.checkpoint import checkpoint

    from pet_finetune.model import pet
    from pet_finetune.nn import gnn_layer

    def recomputed(again: bool, run: Any, inputs: Any, modules: Any) -> Any:
        return checkpoint(run, *inputs, use_reentrant=False)

    pet.recomputed = gnn_layer.recomputed = recomputed
    model.network.recompute = True


def measure(way: str, method: str, fused: bool, num_layers: int) -> dict[str, float]:
    """Peak memory and time of a step, in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    options = ModelOptions(num_gnn_layers=num_layers)
    model = Potential(options, (1, 8), [TargetSpec("energy")]).train()
    if method == "lora":
        inject(model, AdapterConfig(rank=8))
    if way == "torch.utils.checkpoint":
        use_torch_checkpoint(model)
    model.network.recompute |= way == "gradient_checkpointing"
    if fused:
        use_backend(model, choose_backend())
    parameters = [p for p in model.network.parameters() if p.requires_grad]
    batch = batch_from_atoms([water_box((4, 4, 4))], model.cutoff, dtype=torch.float32)

    def step() -> None:
        found = model.predict(batch, stress=True, create_graph=True)
        assert found.forces is not None
        loss = found.energy.square().sum() + found.forces.square().sum()
        loss.backward(inputs=parameters)
        model.zero_grad(set_to_none=True)

    meter = MemoryMeter("cpu")
    step()
    peak, started = meter.peak(), time.process_time()
    for _ in range(REPEATS):
        step()
    return {"peak": peak, "seconds": (time.process_time() - started) / REPEATS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=4, help="way, method, fused or plain, number of layers")
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.one:
        way, method, fused, layers = arguments.one
        print(json.dumps(measure(way, method, fused == "fused", int(layers))))
        return
    print("| method | kernels | way | peak memory, MB | ratio | time of a step, s | ratio |")
    print("|---|---|---|---|---|---|---|")
    for method in ("full", "lora"):
        for fused in ("fused", "torch"):
            first: dict[str, float] = {}
            for way in WAYS:
                words = [way, method, fused, str(arguments.layers)]
                command = [sys.executable, "-m", "benchmarks.recompute", "--one", *words]
                found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
                first = first or found
                ratios = {key: found[key] / first[key] for key in found}
                print(
                    f"| {method} | {fused} | {way} | {found['peak']:.0f} | {ratios['peak']:.2f} "
                    f"| {found['seconds']:.2f} | {ratios['seconds']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
