"""What a PET of XL's size weighs with its frozen weights in 32, 8 and 4 bits.

    python -m benchmarks.qlora_memory                   # the XL size, random weights
    python -m benchmarks.qlora_memory --scale 0.25      # a quarter of every width

Each row is a process of its own: it makes the model on the CPU, puts a LoRA adapter of rank 8 into
it, measures, and computes energies and forces of one small structure and the gradient of a loss on
them. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from ase.build import bulk

from pet_finetune.adapters.adapter_config import AdapterConfig
from pet_finetune.adapters.inject import inject
from pet_finetune.config.run_options import ModelOptions
from pet_finetune.data.labelled_batch import batch_from_atoms
from pet_finetune.keys import TargetSpec
from pet_finetune.model.potential import Potential
from pet_finetune.nn.quantized import held_bytes, quantize

MIB = 1024**2


def xl_model(scale: float) -> Potential:
    """XL's widths and layers (d_pet 640, 5 x 3) times a scale, for 102 elements."""
    width = 64 * max(1, round(10 * scale))
    options = ModelOptions(
        cutoff=10.0,
        num_neighbors_adaptive=40.0,
        d_pet=width,
        d_node=4 * width,
        d_feedforward=2 * width,
        d_head=width,
        num_gnn_layers=5,
        num_attention_layers=3,
    )
    return Potential(options, range(1, 103), [TargetSpec("energy")]).eval()


def resident() -> float:
    """What is resident now, MiB, when all that is free has been given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss / MIB


def peak() -> float:
    """The most that was resident so far, MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("This benchmark reads /proc, which Linux has.")


def forget_peak() -> None:
    """Start the peak again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(bits: int, scale: float) -> dict[str, float]:
    torch.manual_seed(0)
    quantize(torch.ones(64, 64), 4).dense(torch.float32)  # its library is loaded now, in every row
    before = resident()
    model = xl_model(scale)
    parameters = model.num_parameters()
    start = time.perf_counter()
    quant_bits = None if bits == 32 else bits
    inject(model, AdapterConfig(rank=8, quant_bits=quant_bits), fingerprint="random weights")
    seconds = time.perf_counter() - start
    after, loading = resident(), peak()
    forget_peak()
    batch = batch_from_atoms([bulk("Si", cubic=True)], model.cutoff, model.dtype)
    found = model.train().predict(batch, create_graph=True)
    (found.energy.sum() + found.forces.square().sum()).backward()
    return {
        "parameters": parameters / 1e6,
        "held": held_bytes(model) / MIB,
        "resident": after - before,
        "loading": loading - before,
        "step": peak() - before,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of all widths; 1 is XL")
    parser.add_argument("--bits", type=int, choices=(32, 8, 4), help="measure one, as JSON")
    arguments = parser.parse_args()
    if arguments.bits is not None:
        print(json.dumps(measure(arguments.bits, arguments.scale)))
        return
    print(
        "| frozen weights | bytes held | of float32 | resident | peak while made | peak of a step |"
    )
    print("|---|---|---|---|---|---|")
    whole = None
    for bits in (32, 8, 4):
        command = [sys.executable, "-m", "benchmarks.qlora_memory", "--bits", str(bits)]
        command += ["--scale", str(arguments.scale)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        whole = whole or row["held"]
        cells = [f"{row[key]:,.0f} MiB" for key in ("resident", "loading", "step")]
        print(
            f"| {bits} bits | {row['held']:,.0f} MiB | {row['held'] / whole:.3f} | "
            f"{' | '.join(cells)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
