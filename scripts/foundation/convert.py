"""Convert a metatrain checkpoint into ours, with a note of where it comes from.

    python scripts/foundation/convert.py pet-xtb-v0.ckpt checkpoints/pet-xtb-v0.ckpt

The weights are copied bit for bit; optimiser states and the second copy of the model that
metatrain keeps are left behind.
"""

from __future__ import annotations

import argparse

import torch

from pet_finetune.adapters.base_weights import weights_fingerprint
from pet_finetune.checkpoint.native import save_checkpoint
from pet_finetune.checkpoint.opening import load_checkpoint


def main() -> None:
    """Read, write, read again, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("source", help="written by metatrain")
    parser.add_argument("destination")
    parser.add_argument("--note", default="", help="goes into the provenance")
    arguments = parser.parse_args()
    checkpoint = load_checkpoint(arguments.source)
    provenance = {**checkpoint.provenance, "note": arguments.note}
    save_checkpoint(arguments.destination, checkpoint.model, provenance=provenance)
    again = load_checkpoint(arguments.destination).model
    before, after = checkpoint.model.network.state_dict(), again.network.state_dict()
    same = all(torch.equal(before[name], after[name]) for name in before)
    if not same or before.keys() != after.keys():
        raise SystemExit("the converted weights differ from the original ones")
    print(f"{arguments.destination}: fingerprint {weights_fingerprint(again)}")


if __name__ == "__main__":
    main()
