"""What a benchmark is asked to do, and the sets it trains on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]

#: Both tools in the order of the first of two paired measurements.
OURS, THEIRS = "pet-finetune", "metatrain"

#: Epochs at the start of a run that are not timed: the first ones build what later ones reuse, and
#: metatrain writes a checkpoint after its first.
UNTIMED_EPOCHS = 2


@dataclass(frozen=True)
class Settings:
    """The command line.

    Attributes:
        data: folder of the structure files.
        work: folder of everything that the benchmark writes.
        device: ``cpu`` or ``cuda``.
        pairs: paired measurements of a row.
        threads: of either tool.
        max_memory: GB that a worker of the size row may be expected to need.
        quick: tiny sizes, which show that every row runs and nothing else.
    """

    data: Path
    work: Path
    device: str
    pairs: int
    threads: int
    max_memory: float
    quick: bool


@dataclass(frozen=True)
class TrainingSet:
    """Structures to train on.

    Attributes:
        name, title: for the command line and for the table.
        file: in the data folder, or a path.
        train, validation: structures of each; the first is a multiple of ``batch``, because
            metatrain leaves an incomplete batch out.
        batch: structures.
        epochs: timed ones.
        stress: whether the labels have it.
    """

    name: str
    title: str
    file: str
    train: int
    validation: int
    batch: int
    epochs: int
    stress: bool = False

    def tiny(self) -> TrainingSet:
        """The same with two batches and one timed epoch."""
        values = {**vars(self), "train": 2 * self.batch, "validation": 2, "epochs": 1}
        return TrainingSet(**values)


SETS = (
    TrainingSet(
        "molecules",
        "mixed molecules",
        str(REPOSITORY / "datasets" / "molecules_pbe0_train.xyz"),
        train=144,
        validation=4,
        batch=8,
        epochs=5,
    ),
    TrainingSet(
        "ethanol", "ethanol", "ethanol_reduced_100.xyz", train=96, validation=4, batch=8, epochs=5
    ),
    TrainingSet(
        "carbon",
        "carbon cells",
        "carbon_reduced_100.xyz",
        train=96,
        validation=4,
        batch=8,
        epochs=2,
        stress=True,
    ),
    TrainingSet(
        "water", "bulk water", "water_revPBE0D3_train30.xyz", train=8, validation=2, batch=2,
        epochs=1,
    ),
)  # fmt: skip

#: Structures for the evaluation row.
EVALUATION_FILE = "ethanol_pbe_train1000.xyz"
EVALUATION_STRUCTURES = 1000
#: The size of batch that ``pet-finetune eval`` has.
EVALUATION_BATCH = 32
