"""Facts of the report: what was trained, what it took, and how to use it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ase.data import atomic_numbers

from pet_finetune.files import size_text
from pet_finetune.units import duration

from .run_record import RunRecord, best_row

_STRUCTURE = "structure.xyz"
_DYNAMICS = f"{_STRUCTURE} --ensemble nvt --temperature 300 --steps 10000 --timestep 0.5"


@dataclass(frozen=True)
class Recipe:
    """Lines to copy: what they are for, in which language, and a note below."""

    title: str
    language: str
    code: str
    note: str = ""


def recipes(run: RunRecord) -> list[Recipe]:
    """Commands for the files of the run, the usual first."""
    names = set(run.files)
    made = []
    if run.committee is not None:
        made += _committee(run)
    elif "best_model.ckpt" in names:
        made += _single(run)
    if "adapter" in names:
        settings = f"{_foundation(run)!r}, adapter={_path(run, 'adapter')!r}"
        code = _python(f"atoms.calc = PETCalculator({settings})")
        note = "Small to store and to send; predicts the same as best_model.ckpt."
        made.append(Recipe("The adapter on its foundation", "python", code, note))
    made.append(_again(run))
    return made


def _path(run: RunRecord, name: str) -> str:
    return f"{run.folder.rstrip('/')}/{name}"


def _foundation(run: RunRecord) -> str:
    return str(run.finetune.get("read_from") or "foundation.ckpt")


def _python(*calculator: str) -> str:
    lines = [
        "from ase.io import read",
        "from pet_finetune import PETCalculator",
        "",
        f'atoms = read("{_STRUCTURE}")',
        *calculator,
        "print(atoms.get_potential_energy())  # eV",
        "print(atoms.get_forces())  # eV/Å",
    ]
    return "\n".join(lines)


def _single(run: RunRecord) -> list[Recipe]:
    best = _path(run, "best_model.ckpt")
    shell = shlex.quote(best)
    species = run.start.get("data_species") or ["H", "C", "O"]
    numbers = " ".join(str(atomic_numbers[symbol]) for symbol in species)
    return [
        Recipe("In ASE", "python", _python(f"atoms.calc = PETCalculator({best!r})")),
        Recipe(
            "Errors on other structures", "shell", f"pet-finetune eval {shell} other_structures.xyz"
        ),
        Recipe("A first look at dynamics", "shell", f"pet-finetune md {shell} {_DYNAMICS}"),
        Recipe(
            "In LAMMPS, i-PI and other engines",
            "shell",
            f"pet-finetune export {shell} -o model.pt\n"
            "\n"
            "# in the input of LAMMPS; the atomic numbers are those of its types, in order:\n"
            "#   pair_style metatomic model.pt\n"
            f"#   pair_coeff * * {numbers}",
            "The file runs wherever metatomic does.",
        ),
    ]


def _committee(run: RunRecord) -> list[Recipe]:
    base, folder = _foundation(run), run.folder
    return [
        Recipe(
            "In ASE, with uncertainties",
            "python",
            _python(f"atoms.calc = PETCalculator({base!r}, adapters={folder!r})")
            + '\nprint(atoms.calc.results["forces_uncertainty"])  # eV/Å, one an atom',
        ),
        Recipe(
            "Dynamics, with an uncertainty at every step",
            "shell",
            f"pet-finetune md {shlex.quote(base)} {_DYNAMICS} --adapter {shlex.quote(folder)}",
        ),
        Recipe(
            "One member alone",
            "shell",
            f"pet-finetune eval {shlex.quote(_path(run, 'member_0/best_model.ckpt'))} "
            "other_structures.xyz",
        ),
    ]


def _again(run: RunRecord) -> Recipe:
    options = shlex.quote(_path(run, "options.yaml"))
    if run.status == "finished":
        return Recipe(
            "The same run again",
            "shell",
            f"pet-finetune train {options} -o another_folder",
            "The file names every option and the seed.",
        )
    folder = shlex.quote(run.folder)
    return Recipe(
        "Go on with this run", "shell", f"pet-finetune train {options} --restart {folder}"
    )


#: Name, value, and what is printed small below it.
Facts = Iterator[tuple[str, str, str]]


def _counted(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def headline(run: RunRecord) -> list[str]:
    """The line below the title: method, parent, data, length."""
    method = str(run.finetune.get("method", "lora"))
    names = {"lora": "LoRA", "full": "full fine-tuning", "heads": "heads only", "prompt": "prompts"}
    parent = run.start.get("parent")
    parts = []
    if run.is_finetuning:
        size = len(run.epochs) if run.committee or len(run.epochs) > 1 else 0
        many = f"committee of {size}, " if size else ""
        parts.append(f"{many}{names.get(method, method)}" + (f" from {parent}" if parent else ""))
    else:
        parts.append("trained from scratch")
    data = run.start.get("data", {}).get("train", {}).get("structures")
    if data:
        parts.append(f"{data:,} training structures")
    species = run.start.get("data_species") or []
    if species:
        parts.append(" ".join(species))
    epochs = max((len(rows) for rows in run.epochs), default=0)
    if epochs:
        parts.append(f"{epochs} epochs in {duration(_seconds(run))}")
    if run.start.get("written"):
        parts.append(str(run.start["written"])[:10])
    return parts


def _seconds(run: RunRecord) -> float:
    return sum(row.get("seconds", 0.0) for rows in run.epochs for row in rows)


def trained(run: RunRecord) -> Facts:
    """Facts of the training: parameters, time, memory."""
    yield from _method(run)
    counts = run.start.get("trainable") or {}
    trainable = counts.get("trainable", run.parameters.get("trainable"))
    total = counts.get("total", run.parameters.get("total"))
    if trainable is not None and total:
        share = 100 * trainable / total
        each = " in each member" if run.committee else ""
        yield "parameters that trained", f"{trainable:,} of {total:,} ({share:.1f} %){each}", ""
    if counts.get("groups"):
        yield "of these", ", ".join(f"{k} {v:,}" for k, v in counts["groups"].items()), ""
    rows = [row for epochs in run.epochs for row in epochs]
    if rows:
        best = int(best_row(rows).get("epoch", 0)) if len(run.epochs) == 1 else 0
        longest = max(len(epochs) for epochs in run.epochs)
        note = f"; the best was {best}, by {run.training.get('best_model_metric', 'validation')}"
        yield "epochs", f"{longest}" + (note if best else ""), ""
        seconds = _seconds(run)
        rates = [r["structures_per_second"] for r in rows if "structures_per_second" in r]
        yield "time of all epochs", f"{duration(seconds)} ({seconds / len(rows):.2g} s each)", ""
        if rates:
            yield "training speed", f"{sum(rates) / len(rates):.0f} structures/s", ""
    for key, words in (("process", "peak memory"), ("gpu", "peak memory of the GPU")):
        value = run.memory.get(key)
        if value is not None:
            yield words, f"{value:,.0f} MiB", ""
    machine = run.start.get("machine", {})
    if machine:
        yield "computed on", f"{machine['device']}, {_counted(machine['threads'], 'thread')}", ""
    for name, size in run.files.items():
        yield name, size_text(size), ""


def _method(run: RunRecord) -> Facts:
    if not run.is_finetuning:
        yield "method", "all parameters, from scratch", ""
        return
    config = run.finetune.get("config") or {}
    settings = [f"{k} {config[k]}" for k in ("rank", "alpha", "num_prompts") if k in config]
    flags = [k for k in ("use_rslora", "use_dora") if config.get(k)]
    method = str(run.finetune.get("method", ""))
    yield "method", ", ".join([method, *settings, *flags]), ""
    if run.finetune.get("replay"):
        yield "replay", str(run.finetune["replay"].get("structures") or "from a file"), ""
    if run.finetune.get("anchor"):
        yield "anchor", str(run.finetune["anchor"].get("type", "")), ""


def provenance(run: RunRecord) -> Facts:
    """Provenance of weights and data, and the software."""
    start = run.start
    if start.get("parent_fingerprint"):
        read = run.finetune.get("read_from")
        name = f"{start.get('parent')}" + (f" ({read})" if read else "")
        yield "starting model", name, f"fingerprint {start['parent_fingerprint']}"
    learned = start.get("pretraining") or {}
    if learned:
        frames = _counted(learned["frames"]["training"], "frame")
        words = f"{frames} of {learned['teacher']}: {learned.get('gain', '')}"
        yield "continued pre-training", words, duration(learned.get("seconds", 0.0))
    for symbol, source in (start.get("new_elements") or {}).items():
        yield f"new element {symbol}", f"starts from {source}", ""
    for name, of_set in (start.get("data") or {}).items():
        files = ", ".join(of_set.get("files") or [])
        words = _counted(of_set["structures"], "structure") + (f" of {files}" if files else "")
        yield f"{name} set", words, f"fingerprint {of_set['fingerprint']}"
    if run.options.get("seed") is not None:
        yield "seed", str(run.options["seed"]), ""
    if run.options.get("base_precision") is not None:
        yield "precision", f"{run.options['base_precision']} bits", ""
    versions: Mapping[str, Any] = start.get("versions") or {}
    if versions:
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items()), ""
    machine = start.get("machine", {})
    if machine:
        yield "system", f"Python {machine['python']}, {machine['system']}", ""
    if start.get("written"):
        yield "begun", str(start["written"]), ""
