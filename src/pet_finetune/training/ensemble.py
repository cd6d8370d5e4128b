"""A committee trained in one run: its members one after the other, then all together."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from pet_finetune import processes
from pet_finetune.backends.choice import choose_backend, use_backend
from pet_finetune.committee.calibration import Curves, calibration_svg, collect
from pet_finetune.committee.committee import Calibration
from pet_finetune.committee.committee_files import COMMITTEE_FILE, load_committee, write_committee
from pet_finetune.config.load import read_yaml
from pet_finetune.config.run_options import Options
from pet_finetune.data.splits import load_splits
from pet_finetune.device import choose_device, dtype_of_bits
from pet_finetune.errors import TrainingError
from pet_finetune.installation import drawn
from pet_finetune.log import FILE_ONLY, get_logger, setup_logging
from pet_finetune.rng import seed_everything
from pet_finetune.runs import undisturbed
from pet_finetune.terminal import show

from .loggers import calibration_table, committee_table
from .metrics import Errors
from .prepare import RunRequest, options_of_run
from .resume import plain_errors
from .run_files import ADAPTER, LAST, LOG, OPTIONS, PREDICTIONS, RESULTS, SPLITS, RunFiles
from .sets import AFTER, evaluate_sets, load_data, primary_set, wanted_derivatives
from .starting_model import read_start
from .step import TrainOutcome

_logger = get_logger(__name__)
PLOT = "calibration.svg"

TrainMember = Callable[..., TrainOutcome]


def train_ensemble(
    train_member: TrainMember, options: Options, folder: Path, request: RunRequest
) -> TrainOutcome:
    """Train every member in a folder of its own, ``member_0`` and so on, then judge them together.

    Several processes train a member each at a time. A run that goes on trains the members that are
    not finished, from where each stands.

    Args:
        train_member: :func:`~.run.train`, for a member's options.
        options: of the whole run.
        folder: of the whole run.
        request: how it begins; member 0 alone looks at the data and tells the notices.
    """
    size, restart, rooms = options.finetune.ensemble, request.restart, request.rooms
    assert size is not None, "a run without finetune.ensemble has no members"
    if not options.is_finetuning:  # options of a run that goes on may leave it out
        raise TrainingError(
            "--restart: an ensemble needs its foundation to the end, and these options name none. "
            f"Use the {OPTIONS} in the folder of the run."
        )
    files = RunFiles(folder)
    if processes.first():
        if restart is None:
            files.check_free(request.source)
            _check_no_members(folder)
        else:
            _take_over(Path(restart), files.folder)
    processes.barrier()
    seed = processes.from_first(_seed(options, files, restart is not None))
    files.write(OPTIONS, options_of_run(options, seed))

    def train_one(member: int) -> TrainOutcome:
        own = member_folder(files.folder, member)
        last = own / LAST
        return train_member(
            options.with_finetune(member=member).model_copy(update={"seed": seed}),
            own,
            restart=last if restart is not None and last.exists() else None,
            notices=request.notices if member == 0 else (),
            check=request.check and member == 0,
            rooms=rooms,
        )

    outcomes = _train_members(size, train_one)
    finished_ones = {member for member, one in outcomes.items() if one.result.finished}
    stopped = [member for member in range(size) if member not in finished_ones]
    if stopped:
        if processes.first():
            rooms.report(files.folder)
        command = ["pet-finetune", "train", f"{files.folder / OPTIONS}"]
        _logger.warning(
            "member %s of %d did not finish; go on with all of them: %s",
            ", ".join(map(str, stopped)),
            size,
            shlex.join([*command, "--restart", f"{files.folder}"]),
        )
        last_one = outcomes[max(outcomes)].result
        return TrainOutcome(files.folder, replace(last_one, finished=False), {}, {})
    setup_logging(file=files.folder / LOG)
    finished: TrainOutcome | None = None
    if processes.first():
        with processes.alone():
            finished = _finish(options, files, [outcomes[m] for m in range(size)], seed)
            rooms.report(files.folder)
    outcome = processes.from_first(finished)
    assert outcome is not None, "the first process has it"
    return outcome


def _train_members(size: int, train_one: Callable[[int], TrainOutcome]) -> dict[int, TrainOutcome]:
    """Train the members one after the other, or each by one of several processes.

    Returns:
        What was trained, by member; no other one is begun when one was interrupted.
    """
    outcomes: dict[int, TrainOutcome] = {}
    rank, count = processes.rank(), processes.size()
    if count > 1:
        _logger.info("%d members on %d processes, each by itself", size, count)
    with processes.alone():
        for member in range(rank, size, count):
            outcomes[member] = train_one(member)
            if not outcomes[member].result.finished:
                break
    return {m: one for found in processes.gathered(outcomes) for m, one in found.items()}


def member_folder(folder: Path, member: int) -> Path:
    """Folder of a member of an ensemble."""
    return folder / f"member_{member}"


def _members_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("member_*") if path.is_dir())


def _check_no_members(folder: Path) -> None:
    if _members_in(folder):
        raise TrainingError(
            f"The output folder '{folder}' holds an ensemble already. Choose another with "
            f"-o FOLDER, or go on with that one: --restart {folder}."
        )


def _take_over(last: Path, folder: Path) -> None:
    """Check that a run to continue is an ensemble, and copy it to its new folder."""
    old = last.parent.parent
    if not last.parent.name.startswith("member_"):
        raise TrainingError(
            f"--restart: '{last}' is of a single model, not a member of an ensemble. Remove "
            "finetune.ensemble from the options to go on with it, or start a new run."
        )
    if old.resolve() != folder.resolve():
        _check_no_members(folder)
        with undisturbed(old):
            for member in _members_in(old):
                shutil.copytree(member, folder / member.name)
            shutil.copy2(old / OPTIONS, folder / OPTIONS)
    for member in _members_in(folder):
        if not (member / LAST).exists():
            shutil.rmtree(member)  # stopped before it could be gone on with; begins anew


def _seed(options: Options, files: RunFiles, going_on: bool) -> int:
    """Seed of the whole ensemble: all members must split the data alike."""
    if not going_on:
        return seed_everything(None) if options.seed is None else options.seed
    seed = int(read_yaml(files.folder / OPTIONS)["seed"])
    if options.seed not in (None, seed):
        _logger.warning(
            "--restart: seed is %s; the run goes on with %s, as it began", options.seed, seed
        )
    return seed


def _finish(
    options: Options, files: RunFiles, outcomes: Sequence[TrainOutcome], seed: int
) -> TrainOutcome:
    """Calibrate the committee, evaluate it, write ``committee.json`` and ``results.json``."""
    names = [f"{member_folder(Path(), member)}/{ADAPTER}" for member in range(len(outcomes))]
    base, _, _ = read_start(options)
    device = choose_device(options.device)
    committee = load_committee(base, [files.folder / name for name in names])
    committee.to(device=device, dtype=dtype_of_bits(options.base_precision))
    use_backend(committee, choose_backend(device))
    splits = load_splits(member_folder(files.folder, 0) / SPLITS, options)
    data = load_data(options, splits, committee, seed, committee.dtype)
    wanted = wanted_derivatives(options, data.train.structures)
    if not splits.validation:
        _logger.warning("the spread is calibrated on the training set, which makes it too small")
    deviations = collect(committee, data.validation.view(), wanted)
    curves = {kind: Curves.of(found, found.factor) for kind, found in deviations.items()}
    calibration = Calibration(**{kind: curve.factor for kind, curve in curves.items()})
    write_committee(files.folder, names, calibration)
    said = member_folder(files.folder, 0) / PREDICTIONS  # of the starting model, by its side
    if said.exists():
        shutil.copy2(said, files.folder / PREDICTIONS)
    after: Errors = {}
    if options.final_eval:
        after = evaluate_sets(files, AFTER, committee, data, wanted)
    table = _show(outcomes, after, curves)
    drawn(PLOT, lambda: files.write(PLOT, calibration_svg(curves)))
    before = outcomes[0].before
    content = {
        "before": plain_errors(before),
        "after": plain_errors(after),
        "members": [plain_errors(outcome.after) for outcome in outcomes],
        "calibration": {kind: curve.plain() for kind, curve in curves.items()},
    }
    files.write(RESULTS, json.dumps(content, indent=2) + "\n")
    _logger.info("committee: %s", files.folder / COMMITTEE_FILE)
    return TrainOutcome(files.folder, outcomes[-1].result, before, after, table)


def _show(outcomes: Sequence[TrainOutcome], after: Errors, curves: Mapping[str, Curves]) -> Table:
    """Print the tables of errors (returned) and of the calibration, for the log file too."""
    tables = [calibration_table(curves)]
    if after:
        shown = primary_set(after)
        (target,) = after[shown]
        members = [outcome.after[shown][target] for outcome in outcomes]
        title = f"errors on the {shown} set"
        tables.insert(0, committee_table(members, after[shown][target], title=title))
    for table in tables:
        _logger.info("results\n%s", show(table), extra=FILE_ONLY)
    return tables[0]
